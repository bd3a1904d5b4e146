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
import tempfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimetic.data.cache import ShardCache, cache_folder
from mimetic.data.fetch import fetch, is_address
from mimetic.data.order import Chosen, InOrder, Order, Shuffled
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import DataError

VERSION = 2
ROW = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("key", "<u8")])
AT_START = 20.0  # seconds: a wrong address is known soon, where a training under way waits longer for its network
OPEN_SHARDS = 128  # file descriptors are few: often 1024 for a process, 256 on macOS
UNLABELLED = -1
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
        rows: (N,) of ROW, in shard order; `label` is -1 where there is none.
        key_bytes: keys of all samples, each with a line feed after it.
        starts: (shards + 1,) number of the first sample of each shard, and N.
        fingerprint: names this very content; kept in checkpoints.
        cache: of shards that lie elsewhere.
    """

    home: str
    shards: list[dict[str, Any]]
    classes: list[str]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rows: NDArray[Any]
    key_bytes: NDArray[np.uint8]
    starts: NDArray[np.int64]
    fingerprint: str
    cache: ShardCache

    def __len__(self) -> int:
        return len(self.rows)

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
        if not shuffle:
            return InOrder(len(self)) if members is None else Chosen(members, InOrder(len(members)))
        if members is None:
            return Shuffled(np.diff(self.starts), seed, streams=streams, block=block)
        members = np.sort(members)
        sizes = np.bincount(self.shard_of(members), minlength=len(self.shards))
        return Chosen(members, Shuffled(sizes, seed, streams=streams, block=block))

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
            raise DataError(f"{place}: sample {key} has {len(content)} of {row['size']} bytes; the shard has changed: {REPAIR}")
        return content


@dataclass(frozen=True)
class Part:
    """One shard's share of an index.

    Attributes:
        name: of the shard, relative to the index, or an address.
        size: bytes of the whole shard.
        sha256: of the whole shard, in hex.
        rows: (n,) of ROW, where `key` counts from the first byte of `keys`.
        keys: each with a line feed after it.
    """

    name: str
    size: int
    sha256: str
    rows: NDArray[Any]
    keys: bytes


def write_index(folder: Path, parts: Iterable[Part], samples: int, *, classes: list[str], image: dict[str, Any],
                **more: Any) -> dict[str, Any]:  # fmt: skip
    """Writes samples.npy, keys.txt and, last, index.json; memory is that of one shard's rows.

    Args:
        folder: where the three go; an index that is there is replaced.
        parts: in shard order.
        samples: of all parts together.
        classes: names in the order of label numbers.
        image: `channels`, and `mean` and `std` per channel of pixels in [0, 1].
        more: further entries of index.json.

    Returns:
        The content of index.json.
    """
    (folder / "index.json").unlink(missing_ok=True)  # a kill in between leaves no index, rather than one that contradicts itself
    shards: list[dict[str, Any]] = []
    first, begin = 0, 0
    rows = np.lib.format.open_memmap(folder / "samples.npy", "w+", ROW, (samples,))
    with (folder / "keys.txt").open("wb") as keys:
        for part in parts:
            place = slice(first, first := first + len(part.rows))
            rows[place] = part.rows
            rows["key"][place] += np.uint64(begin)
            begin += keys.write(part.keys)
            shards.append({"name": part.name, "samples": len(part.rows), "bytes": part.size, "sha256": part.sha256})
        keys.flush()
        os.fsync(keys.fileno())
    assert first == samples
    rows.flush()
    files = {name: _described(folder / name) for name in ("samples.npy", "keys.txt")}
    summary = {"version": VERSION, "samples": samples, **more, "classes": classes, "image": image, "files": files, "shards": shards}
    write_atomically(folder / "index.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _described(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


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
    home = os.path.dirname(file) or "."
    try:
        raw = _fetched_now(file, cache) if is_address(file) else Path(file).read_bytes()
        content = json.loads(raw)
        if content["version"] != VERSION:
            raise DataError(f"{file}: index version {content['version']}, this program reads version {VERSION}; {REPAIR}")
        beside = {name: _beside(home, name, content["files"][name], cache) for name in ("samples.npy", "keys.txt")}
        rows = np.load(beside["samples.npy"], mmap_mode="r", allow_pickle=False)
        shards, image = content["shards"], content["image"]
        starts = np.cumsum([0, *(shard["samples"] for shard in shards)], dtype=np.int64)
        if rows.dtype != ROW or rows.shape != (starts[-1],):
            raise ValueError(f"samples.npy holds {rows.shape} of {rows.dtype.names}, the shards {starts[-1]} samples")
        if not len(rows):
            raise DataError(f"{file}: the index holds no sample; pack a folder that has images")
        index = Index(home, shards, content["classes"], image["channels"], tuple(image["mean"]), tuple(image["std"]), rows,
                      np.memmap(beside["keys.txt"], np.uint8, "r"), starts, hashlib.sha256(raw).hexdigest()[:16], cache)  # fmt: skip
        _check_shards(index, sizes)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({type(error).__name__}: {error}); {REPAIR}") from None
    return index


def located(home: str, name: str) -> str:
    """The path or address of a shard."""
    return name if is_address(name) or os.path.isabs(name) else f"{home}/{name}"


def _index_file(path: str) -> str:
    if is_address(path):
        return path if path.endswith(".json") else f"{path.rstrip('/')}/index.json"
    file = Path(path) / "index.json" if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise DataError(f"{path}: no index.json there; make one with `mimetic pack {path if Path(path).is_dir() else 'SRC'} SHARDS`, "
                        "and give its folder SHARDS; or with `mimetic index`, for tars that exist")  # fmt: skip
    return str(file)


def _fetched_now(address: str, cache: ShardCache) -> bytes:
    """A small file from elsewhere, as it is now."""
    with tempfile.TemporaryDirectory() as folder:
        fetch(address, Path(folder, "index.json"), patience=AT_START)
        return Path(folder, "index.json").read_bytes()


def _beside(home: str, name: str, file: dict[str, Any], cache: ShardCache) -> Path:
    address = located(home, name)
    return cache.fetched(address, file["bytes"], file["sha256"]) if is_address(address) else Path(address)


def _check_shards(index: Index, sizes: bool) -> None:
    for shard in index.shards:
        place = located(index.home, shard["name"])
        if shard["name"].startswith("pipe:"):
            raise DataError(f"{index.home}: its index names {shard['name'][:60]!r}; an index never runs a command: type it")
        if is_address(place) or not sizes:
            continue
        if is_address(index.home):
            raise DataError(f"{index.home}: its index names {place}, which lies on this machine; {REPAIR}")
        found = os.stat(place).st_size if os.path.exists(place) else 0
        if found != shard["bytes"]:
            raise DataError(f"{place}: {found} bytes, the index says {shard['bytes']}; the shard has changed: {REPAIR}")


_descriptors: OrderedDict[tuple[str, str, int], int] = OrderedDict()


def _descriptor(index: Index, shard: int) -> int:
    # Kept open per process, the OPEN_SHARDS last used; shards packed anew have another fingerprint. pread has no shared
    # position, so forked workers do not disturb each other.
    known = (index.home, index.fingerprint, shard)
    if known in _descriptors:
        _descriptors.move_to_end(known)
        if is_address(located(index.home, index.shards[shard]["name"])):
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
