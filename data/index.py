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
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimetic.data.randomness import mix
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import DataError, SettingError

VERSION = 2
ROW = np.dtype([("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("key", "<u8")])
OPEN_SHARDS = 128  # file descriptors are few: often 1024 for a process, 256 on macOS
UNLABELLED = -1


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

    def __len__(self) -> int:
        return len(self.rows)

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

    def path(self, shard: int) -> Path:
        """The local file of a shard."""
        return Path(self.home, self.shards[shard]["name"])

    def read(self, sample: int) -> bytes:
        """The encoded image of one sample.

        Raises:
            DataError: the shard is gone or shorter than the index says.
        """
        row, shard = self.rows[sample], int(self.shard_of(np.int64(sample)))
        path = self.path(shard)
        content = os.pread(_descriptor(path, self.fingerprint), int(row["size"]), int(row["offset"]))
        if len(content) != row["size"]:
            raise DataError(f"{path}: sample {self.keys(np.array([sample]))[0]} has {len(content)} of {row['size']} bytes; pack it again")
        return content


@dataclass(frozen=True)
class Part:
    """One shard's share of an index.

    Attributes:
        name: of the shard, relative to the index, or an address.
        bytes: of the whole shard.
        sha256: of the whole shard, in hex.
        rows: (n,) of ROW, where `key` counts from the first byte of `keys`.
        keys: each with a line feed after it.
    """

    name: str
    bytes: int
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
    shards, first, begin = [], 0, 0
    rows = np.lib.format.open_memmap(folder / "samples.npy", "w+", ROW, (samples,))
    with (folder / "keys.txt").open("wb") as keys:
        for part in parts:
            place = slice(first, first := first + len(part.rows))
            rows[place] = part.rows
            rows["key"][place] += np.uint64(begin)
            begin += keys.write(part.keys)
            shards.append({"name": part.name, "samples": len(part.rows), "bytes": part.bytes, "sha256": part.sha256})
        keys.flush()
        os.fsync(keys.fileno())
    assert first == samples
    rows.flush()
    summary = {"version": VERSION, "samples": samples, **more, "classes": classes, "image": image, "shards": shards}
    write_atomically(folder / "index.json", json.dumps(summary, indent=1) + "\n")
    return summary


def open_index(path: str | Path, *, sizes: bool = True) -> Index:
    """Opens an `index.json`, or the folder that holds it, and checks that each shard is there in full size, unless `sizes` is False.

    Raises:
        DataError: missing, empty, damaged, or of another version; the line names the file.
    """
    file = Path(path) / "index.json" if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise DataError(f"{path}: no index.json there; make one with `mimetic pack {path if Path(path).is_dir() else 'SRC'} SHARDS`, "
                        "and give its folder SHARDS")  # fmt: skip
    try:
        content = json.loads(file.read_bytes())
        if content["version"] != VERSION:
            raise DataError(f"{file}: index version {content['version']}, this program reads {VERSION}; pack it again")
        rows = np.load(file.with_name("samples.npy"), mmap_mode="r", allow_pickle=False)
        keys = np.memmap(file.with_name("keys.txt"), np.uint8, "r")
        shards, image = content["shards"], content["image"]
        starts = np.cumsum([0, *(shard["samples"] for shard in shards)], dtype=np.int64)
        index = Index(str(file.parent), shards, content["classes"], image["channels"], tuple(image["mean"]), tuple(image["std"]),
                      rows, keys, starts, hashlib.sha256(file.read_bytes()).hexdigest()[:16])  # fmt: skip
        names = [(file.parent / shard["name"], shard["bytes"]) for shard in shards]
        if rows.dtype != ROW or rows.shape != (starts[-1],):
            raise ValueError(f"samples.npy holds {rows.shape} of {rows.dtype.names}, the shards {starts[-1]} samples")
        if starts[-1] and index.keys(np.array([len(rows) - 1])) == [""]:
            raise ValueError("keys.txt is cut off")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({type(error).__name__}: {error}); pack it again") from None
    if not len(index):
        raise DataError(f"{file}: the index holds no sample; pack a folder that has images")
    for shard, size in names if sizes else ():
        found = shard.stat().st_size if shard.exists() else 0
        if found != size:
            raise DataError(f"{shard}: {found} bytes, the index says {size}; pack it again")
    return index


def open_held_out(path: str | Path, training: Index, *, labelled: bool = False) -> Index:
    """Opens an index to measure on, of the same kind of images as the training's.

    Raises:
        DataError: as `open_index` does.
        SettingError: other channels, or with `labelled` other classes: label numbers would mean something else.
    """
    index = open_index(path)
    if index.channels != training.channels:
        raise SettingError(f"{path} has {index.channels} channels, the training data {training.channels}; pack both alike, "
                           f"with --channels {training.channels}")  # fmt: skip
    if labelled and index.classes != training.classes:
        told = [f"{len(classes)} classes ({', '.join(classes[:3])} ...)" for classes in (index.classes, training.classes)]
        raise SettingError(f"{path} has {told[0]}, the training data {told[1]}; both need the same sub-folders")
    return index


def draw_per_class(index: Index, count: int, seed: int, *, skip: int = 0) -> NDArray[np.int64]:
    """Samples `skip` to `skip + count` of each class in an order drawn by `seed`: disjoint draws have disjoint ranges.

    Raises:
        SettingError: a class has fewer than `skip + count` samples, or there are no labels.
    """
    labels = np.asarray(index.rows["label"])
    if not index.classes or (labels == UNLABELLED).all():
        raise SettingError(f"{index.home}: no labels to draw {count} images per class from")
    draws = []
    for label, name in enumerate(index.classes):
        members = np.flatnonzero(labels == label)
        if len(members) < skip + count:
            raise SettingError(f"{index.home}: class {name} has {len(members)} images, {skip + count} per class are asked for")
        draws.append(members[np.argsort(mix(seed, members), kind="stable")][skip : skip + count])
    return np.sort(np.concatenate(draws))


_descriptors: OrderedDict[tuple[Path, str], int] = OrderedDict()


def _descriptor(path: Path, fingerprint: str) -> int:
    # Kept open per process, the OPEN_SHARDS last used; shards packed anew have another fingerprint. pread has no shared
    # position, so forked workers do not disturb each other.
    known = (path, fingerprint)
    if known in _descriptors:
        _descriptors.move_to_end(known)
        return _descriptors[known]
    while len(_descriptors) >= OPEN_SHARDS:
        os.close(_descriptors.popitem(last=False)[1])
    try:
        _descriptors[known] = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; the index names this shard") from None
    return _descriptors[known]
