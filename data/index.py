"""The index of a set of shards: what is in them, and where.

`index.json` is for people and for checks: shards with their samples, bytes and sha256, classes, image statistics. Two side files
hold what there is per sample, so that any sample of any shard is one seek away: that is what lets a stream be exact on any number
of ranks and workers and resume without replay. `samples.npy` has a row of 24 bytes (offset and size of the encoded image in its
shard, label, where its key begins), in shard order; `keys.txt` has one key a line. Both are read through memory maps.
docs/DATA.md describes the format.
"""

import hashlib
import json
import os
import re
import tempfile
import tokenize
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimetic.data.cache import ShardCache, cache_folder
from mimetic.data.fetch import EXTRAS, fetch, is_address, joined, parent, shown
from mimetic.data.order import Chosen, InOrder, Order, Shuffled
from mimetic.data.pixelrange import Range
from mimetic.engine.errors import DataError

VERSION = 2
ROW = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("key", "<u8")])
AT_START = 20.0  # seconds: a wrong address is known soon, where a training under way waits longer for its network
OPEN_SHARDS = 128  # file descriptors are few: often 1024 for a process, 256 on macOS
UNLABELLED = -1
LONGEST_KEY = 1 << 16  # bytes
DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, SyntaxError,
          tokenize.TokenError)  # fmt: skip
ELSEWHERE = ("http", "https", *EXTRAS)  # where an index may say that a shard lies
REPAIR = "pack it again with `mimetic pack`, or index the tars again with `mimetic index`"


@dataclass(frozen=True)
class Index:
    """An opened index.

    Attributes:
        home: the folder or address that shard names start from.
        shards: per shard its `name`, `samples`, `bytes`, `sha256`.
        classes: class names, in the order of label numbers; empty when unlabelled.
        channels: of every image.
        mean: per channel, in [0, 1].
        std: per channel, in [0, 1].
        rows: memory map (N,) of ROW, in shard order; `label` is -1 where there is none.
        key_bytes: memory map of the keys of all samples, each with a line feed after it.
        starts: (shards + 1,) number of the first sample of each shard, and N.
        fingerprint: names this very content; kept in checkpoints.
        cache: of shards that lie elsewhere.
        range: the pixel values that become 0 and 1, of images that are read deeper than 8 bits; None for 8 bits.
    """

    home: str
    shards: list[dict[str, Any]]
    classes: list[str]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rows: Any
    key_bytes: Any
    starts: NDArray[np.int64]
    fingerprint: str
    cache: ShardCache
    range: Range | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is not forked maps the files anew; a memory map would be sent to it with all that it maps.
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("rows", "key_bytes")}
        return _mapped_anew, (type(self), values, str(self.rows.filename), str(self.key_bytes.filename))

    @property
    def indexes(self) -> "tuple[Index, ...]":
        """Itself: a mixture has several."""
        return (self,)

    def shard_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard that holds each sample."""
        return np.searchsorted(self.starts, samples, "right") - 1

    def key_table(self, samples: NDArray[np.int64]) -> NDArray[np.bytes_]:
        """The keys of samples (n,), as the shards have them."""
        following = np.minimum(samples + 1, len(self) - 1)
        begin = self.rows["key"][samples].astype(np.int64)
        end = np.where(samples + 1 < len(self), self.rows["key"][following].astype(np.int64), len(self.key_bytes)) - 1
        if (end < begin).any() or (end > len(self.key_bytes)).any() or (end - begin).max(initial=0) > LONGEST_KEY:
            raise DataError(f"{shown(self.home)}: samples.npy and keys.txt do not fit together; {REPAIR}")
        place = begin[:, None] + np.arange(max(1, (end - begin).max(initial=0)))
        letters = np.where(place < end[:, None], self.key_bytes[np.minimum(place, len(self.key_bytes) - 1)], np.uint8(0))
        return letters.view(f"S{letters.shape[1]}")[:, 0]

    def keys(self, samples: NDArray[np.int64]) -> list[str]:
        """The keys of samples, as text."""
        return [key.decode("utf-8", "replace") for key in self.key_table(samples)]

    def labels(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Label numbers; -1 where there is none."""
        return self.rows["label"][samples].astype(np.int64)

    def order(self, seed: int, *, shuffle: bool, streams: int, block: int, members: NDArray[np.int64] | None = None) -> Order:
        """The order of all samples, or of `members`."""
        chosen = members if members is None or not shuffle else np.sort(members)
        sizes = np.diff(self.starts) if chosen is None else np.bincount(self.shard_of(chosen), minlength=len(self.shards))
        order: Order = (Shuffled(sizes, seed, streams=streams, block=block) if shuffle
                        else InOrder(int(sizes.sum()), np.flatnonzero(sizes)))  # fmt: skip
        return order if chosen is None else Chosen(chosen, order)

    def shards_of(self, samples: NDArray[np.int64]) -> "list[tuple[Index, int]]":
        """The shards that hold any of the samples, in the order in which they are first met."""
        return [(self, shard) for shard in dict.fromkeys(self.shard_of(samples).tolist())]

    def path(self, shard: int) -> Path:
        """The file of a shard on this machine, fetched first if it lies elsewhere and is not here.

        Raises:
            DataError: it cannot be fetched.
            SettingError: the cache cannot take it.
        """
        entry = self.shards[shard]
        address = located(self.home, entry["name"])
        return self.cache.fetched(address, entry["bytes"], entry["sha256"]) if is_address(address) else Path(address)

    def read(self, sample: int) -> bytes:
        """The encoded image of one sample.

        Raises:
            DataError: the shard is gone or shorter than the index says.
        """
        row, shard = self.rows[sample], int(self.shard_of(np.array([sample]))[0])
        content = os.pread(_descriptor(self, shard), int(row["size"]), int(row["offset"]))
        if len(content) != row["size"]:
            place, key = located(self.home, self.shards[shard]["name"]), self.keys(np.array([sample]))[0]
            raise DataError(f"{shown(place)}: sample {key} has {len(content)} of {row['size']} bytes; the shard has changed: {REPAIR}")
        return content


def _mapped_anew(kind: type[Index], values: dict[str, Any], rows: str, keys: str) -> Index:
    return kind(**values, rows=np.lib.format.open_memmap(Path(rows), mode="r"), key_bytes=np.memmap(keys, np.uint8, "r"))


def open_index(path: str | Path, cache: ShardCache | None = None, *, sizes: bool = True) -> Index:
    """Opens an `index.json`, or the folder that holds it, on this machine or elsewhere.

    Args:
        path: a file, a folder, or the address of either.
        cache: of what lies elsewhere; the default is the user's own cache folder.
        sizes: whether shards that lie here must have the size that the index says.

    Raises:
        DataError: missing, empty, damaged, or of another version; the line names the file.
    """
    cache = cache or ShardCache(cache_folder())
    file = _index_file(str(path))
    home = parent(file) if is_address(file) else os.path.dirname(file) or "."
    try:
        raw = _fetched_now(file) if is_address(file) else Path(file).read_bytes()
        content = json.loads(raw)
        if content["version"] != VERSION:
            raise DataError(f"{shown(file)}: index version {content['version']}, this program reads version {VERSION}; {REPAIR}")
        _check(content)
        rows, keys = (_mapped(home, name, content["files"][name], cache) for name in ("samples.npy", "keys.txt"))
        shards, image = content["shards"], content["image"]
        starts = np.cumsum([0, *(shard["samples"] for shard in shards)], dtype=np.int64)
        if rows.dtype != ROW or rows.shape != (starts[-1],):
            raise ValueError(f"samples.npy holds {rows.shape} of {rows.dtype.names}, the shards {starts[-1]} samples")
    except DAMAGE as error:
        raise DataError(f"{shown(file)} is damaged ({type(error).__name__}: {error}); {REPAIR}") from None
    if not len(rows):
        raise DataError(f"{shown(file)}: the index holds no sample; pack a folder that has images")
    index = Index(home, shards, content["classes"], image["channels"], tuple(image["mean"]), tuple(image["std"]), rows, keys, starts,
                  hashlib.sha256(raw).hexdigest()[:16], cache, tuple(image["range"]) if "range" in image else None)  # fmt: skip
    _check_shards(index, sizes)
    return index


def _check(content: dict[str, Any]) -> None:
    """Raises ValueError, or whatever nonsense leads to, if an index.json says what cannot be."""
    image, classes = content["image"], content["classes"]
    entries = [(name, entry) for name, entry in content["files"].items()] + [(entry["name"], entry) for entry in content["shards"]]
    counts = [("image.channels", image["channels"], 1), *(("samples", shard["samples"], 0) for shard in content["shards"]),
              *((f"bytes of {name}", entry["bytes"], 0) for name, entry in entries)]  # fmt: skip
    for name, value, least in counts:
        if type(value) is not int or not least <= value < 1 << 60:
            raise ValueError(f"{name} is {value!r}")
    for name, entry in entries:
        if not isinstance(name, str) or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            raise ValueError(f"sha256 of {name!r} is {entry['sha256']!r}")
    if not len(image["mean"]) == len(image["std"]) == image["channels"] or not all(np.isfinite([*image["mean"], *image["std"]])):
        raise ValueError(f"mean and std of {image['channels']} channels are {image['mean']!r} and {image['std']!r}")
    low, high = image.get("range", (0, 1))
    if not low < high or not np.isfinite(high - low):
        raise ValueError(f"range is {image['range']!r}")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"classes are {classes!r}")


def located(home: str, name: str) -> str:
    """The path or address of a shard."""
    if is_address(name) or os.path.isabs(name):
        return name
    return joined(home, name) if is_address(home) else f"{home}/{name}"


def _index_file(path: str) -> str:
    if is_address(path):
        return path if shown(path).endswith(".json") else joined(path, "index.json")
    file = Path(path) / "index.json" if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise DataError(f"{path}: no index.json there; make one with `mimetic pack {path if Path(path).is_dir() else 'SRC'} SHARDS`, "
                        "and give its folder SHARDS; or with `mimetic index`, for tars that exist")  # fmt: skip
    return str(file)


def _fetched_now(address: str) -> bytes:
    """A small file from elsewhere, as it is now."""
    with tempfile.TemporaryDirectory() as folder:
        fetch(address, Path(folder, "index.json"), patience=AT_START)
        return Path(folder, "index.json").read_bytes()


def _mapped(home: str, name: str, entry: dict[str, Any], cache: ShardCache) -> Any:
    """One of the two files beside an index.json, through a memory map."""
    place = located(home, name)
    while True:
        file = cache.fetched(place, entry["bytes"], entry["sha256"]) if is_address(place) else Path(place)
        try:
            if file.stat().st_size != entry["bytes"]:
                raise ValueError(f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}")
            return np.lib.format.open_memmap(file, mode="r") if name.endswith(".npy") else np.memmap(file, np.uint8, "r")
        except FileNotFoundError:
            if not cache.holds(file):
                raise  # else it gave way to another before it was opened


def _check_shards(index: Index, sizes: bool) -> None:
    """Raises DataError for names that an index must not have, and for shards here that have another size."""
    for shard in index.shards:
        name, place = shard["name"], located(index.home, shard["name"])
        if name.startswith("pipe:"):
            raise DataError(f"{shown(index.home)}: its index names {name[:60]!r}; an index never runs a command: type it")
        if is_address(place):
            if place.partition("://")[0] not in ELSEWHERE or "::" in place:
                raise DataError(f"{shown(index.home)}: its index names {name[:60]!r}; it may name {', '.join(ELSEWHERE)}; {REPAIR}")
            continue
        if is_address(index.home):
            raise DataError(f"{shown(index.home)}: its index names {place}, which lies on this machine; {REPAIR}")
        found = os.stat(place).st_size if sizes and os.path.exists(place) else 0
        if sizes and found != shard["bytes"]:
            raise DataError(f"{place}: {found} bytes, the index says {shard['bytes']}; the shard has changed: {REPAIR}")


_descriptors: OrderedDict[tuple[Path, str, str, int], int] = OrderedDict()


def _descriptor(index: Index, shard: int) -> int:
    # Kept open per process, the OPEN_SHARDS last used; shards packed anew have another fingerprint. pread has no shared
    # position, so forked workers do not disturb each other.
    known = (index.cache.folder, index.home, index.fingerprint, shard)
    if known in _descriptors:
        _descriptors.move_to_end(known)
        if is_address(located(index.home, index.shards[shard]["name"])):
            with suppress(OSError):  # somebody else's
                os.utime(_descriptors[known])  # a copy in the cache: what is being read is not what gives way
        return _descriptors[known]
    while True:
        path = index.path(shard)
        for other in [other for other, opened in _descriptors.items() if not os.fstat(opened).st_nlink]:
            os.close(_descriptors.pop(other))  # evicted from the cache: its disk is free once nobody has it open
        while len(_descriptors) >= OPEN_SHARDS:
            os.close(_descriptors.popitem(last=False)[1])
        try:
            _descriptors[known] = os.open(path, os.O_RDONLY)
            return _descriptors[known]
        except FileNotFoundError as error:
            if not index.cache.holds(path):  # else it was evicted between the two lines above
                raise DataError(f"{path}: {error.strerror}; the index names this shard") from None
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; the index names this shard") from None
