"""The index of a set of shards: what is in them, and where.

`index.json` is for people and for checks (shards, counts, bytes, sha256, classes, image statistics). Beside it, `samples.npy`
holds one fixed-size row per sample, read through a memory map, so that any sample of any shard is one seek away: that is what
lets a stream be exact on any number of ranks and workers and resume without replay.
"""

import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimetic.data.randomness import mix
from mimetic.engine.errors import DataError, SettingError

VERSION = 1
ROW = ("shard", "offset", "size", "label", "key")
OPEN_SHARDS = 128  # file descriptors are few: often 1024 for a process, 256 on macOS
UNLABELLED = -1


@dataclass(frozen=True)
class Index:
    """An opened index.

    Attributes:
        folder: where shards and index lie.
        shards: per shard its `name`, `samples`, `bytes`, `sha256`.
        classes: class names, in the order of label numbers; empty when unlabelled.
        channels: of every image.
        mean: per channel, in [0, 1].
        std: per channel, in [0, 1].
        rows: per sample `shard`, `offset`, `size`, `label` (-1: none), `key` (bytes); in shard order.
        fingerprint: names this very content; kept in checkpoints.
    """

    folder: Path
    shards: list[dict[str, Any]]
    classes: list[str]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rows: NDArray[Any]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Samples per shard."""
        return np.array([shard["samples"] for shard in self.shards], dtype=np.int64)

    def read(self, sample: int) -> bytes:
        """The encoded image of one sample.

        Raises:
            DataError: the shard is gone or shorter than the index says.
        """
        row = self.rows[sample]
        path = self.folder / self.shards[row["shard"]]["name"]
        content = os.pread(_descriptor(path, self.fingerprint), int(row["size"]), int(row["offset"]))
        if len(content) != row["size"]:
            raise DataError(f"{path}: sample {row['key'].decode()} has {len(content)} of {row['size']} bytes; pack it again")
        return content


def open_index(path: str | Path) -> Index:
    """Opens an `index.json`, or the folder that holds it, and checks that each shard is there in full size.

    Raises:
        DataError: missing, empty, damaged, or from a newer version; the line names the file.
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
        shards, image = content["shards"], content["image"]
        index = Index(file.parent, shards, content["classes"], image["channels"], tuple(image["mean"]), tuple(image["std"]),
                      rows, hashlib.sha256(file.read_bytes()).hexdigest()[:16])  # fmt: skip
        names = [(file.parent / shard["name"], shard["bytes"]) for shard in shards]
        listed = index.shard_sizes.sum()
        if rows.dtype.names != ROW or rows.shape != (listed,):
            raise ValueError(f"samples.npy holds {rows.shape} of {rows.dtype.names}, the shards {listed} samples")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({type(error).__name__}: {error}); pack it again") from None
    if not len(index):
        raise DataError(f"{file}: the index holds no sample; pack a folder that has images")
    for shard, size in names:
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
        raise SettingError(f"{index.folder}: no labels to draw {count} images per class from")
    draws = []
    for label, name in enumerate(index.classes):
        members = np.flatnonzero(labels == label)
        if len(members) < skip + count:
            raise SettingError(f"{index.folder}: class {name} has {len(members)} images, {skip + count} per class are asked for")
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
