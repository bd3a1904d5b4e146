"""What goes where, before anything is written: so neither the number of processes nor a rejected image moves anything else."""

import hashlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mimetic.data.packing.items import Item
from mimetic.data.packing.moments import evenly, how_many_measured
from mimetic.data.packing.outfolder import SIDES
from mimetic.data.packing.reencode import Encoding
from mimetic.data.packing.shards import Shard
from mimetic.data.pixelrange import Range, as_typed
from mimetic.data.randomness import mix
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import DataError, SettingError

MOST_SAMPLES, MOST_BYTES = 8192, 256 << 20  # of a shard, unless asked otherwise
PLAN = 1  # to be raised when equal input is packed in another way


@dataclass(frozen=True)
class Options:
    """What `pack` takes beside source and folder; see there."""

    samples_per_shard: int | None = None
    max_bad: float = 0.01
    channels: int | None = None
    encoding: Encoding = field(default_factory=Encoding)
    dedup: bool = False
    val: float | None = None
    range: Range | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad <= 1 or (self.samples_per_shard is not None and self.samples_per_shard < 1):
            raise SettingError(f"--max-bad is {self.max_bad} (a share, 0 to 1), --samples-per-shard {self.samples_per_shard} (1 or more)")
        if self.channels is not None and self.channels < 1:
            raise SettingError(f"--channels is {self.channels}; 1 is grey, 3 is colour, arrays may have more")
        if self.channels not in (None, 1, 3) and self.encoding.changes:
            raise SettingError(f"--channels is {self.channels}; --short-side and --format are for pictures, of 1 or 3 channels")
        if self.range is not None and self.encoding.changes:
            raise SettingError(f"--range {as_typed(self.range)} keeps all bits of pixels, --short-side and --format write 8; choose")
        if self.val is not None and not 0 < self.val < 1:
            raise SettingError(f"--val is {self.val}; it must be a share between 0 and 1")


@dataclass
class Side:
    """A set that gets an index: all, or one side of a split.

    Attributes:
        folder: of the shards.
        items: in the order of the source.
        duplicates: an item that is left out, and the path of the one that stays.
        shards: planned.
    """

    folder: Path
    items: list[Item] = field(default_factory=list)
    duplicates: list[tuple[Item, str]] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)


def shuffled(side: Side) -> list[Item]:
    """The items of a side in the fixed order in which they are packed."""
    return [side.items[i] for i in np.argsort(mix(0, np.arange(len(side.items))), kind="stable").tolist()]


def plan_shards(side: Side, done: Path, channels: int, allowed: int, options: Options) -> list[Shard]:
    """The shards of a side; their accounts go to the folder `done`."""
    items = shuffled(side)
    size = max(1, sum(item.size for item in items))
    step = options.samples_per_shard or max(1, min(MOST_SAMPLES, MOST_BYTES * len(items) // size))
    every = all(item.pixels_HW is not None for item in items) or options.range is not None  # as good as free
    measured = evenly(len(items), len(items) if every else how_many_measured(len(items), size))
    shards = []
    for number, begin in enumerate(range(0, len(items), step)):
        name = f"shard-{number:05d}"
        places = measured[np.searchsorted(measured, begin) : np.searchsorted(measured, begin + step)] - begin
        shards.append(Shard(side.folder / f"{name}.tar", done / f"{side.folder.name}-{name}.json", items[begin : begin + step],
                            frozenset(places.tolist()), channels, options.encoding, allowed, options.range))  # fmt: skip
    return shards


def split(items: list[Item], duplicates: dict[int, int], folder: Path, val: float | None) -> list[Side]:
    """One side, or with a share `val` two: an item's side depends on its key alone, so a set that grows keeps its split.

    Raises:
        DataError: a side would be empty.
    """
    sides = [Side(folder / name) for name in SIDES] if val else [Side(folder)]
    for number, item in enumerate(items):
        side = sides[_drawn(item.key) < val if val else 0]
        if number in duplicates:
            side.duplicates.append((item, items[duplicates[number]].path))
        else:
            side.items.append(item)
    for side in sides:
        if not side.items:
            raise DataError(f"--val {val} leaves no image of {len(items) - len(duplicates)} for {side.folder.name}; "
                            f"use a {'larger' if side.folder.name == 'val' else 'smaller'} share, or more images")  # fmt: skip
    return sides


def _drawn(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / (1 << 48)


def start_over_if_changed(work: Path, items: list[Item], classes: list[str], options: Options) -> None:
    """Removes what a killed start has left in the folder `work`, unless it was of the same source and settings."""
    plan = hashlib.sha256(repr((PLAN, classes, options.samples_per_shard, options.channels, options.encoding, options.dedup,
                                options.val, options.range)).encode("utf-8", "surrogateescape"))  # fmt: skip
    for item in items:
        told = (item.key, item.path, item.file, item.offset, item.size, item.stamp, item.label, item.fault)
        plan.update(repr(told).encode("utf-8", "surrogateescape"))
    file = work / "plan.txt"
    if not file.exists() or file.read_text() != plan.hexdigest():
        for left in ("done", "result"):
            shutil.rmtree(work / left, ignore_errors=True)
        (work / "duplicates.json").unlink(missing_ok=True)
        write_atomically(file, plan.hexdigest())
    (work / "done").mkdir(exist_ok=True)
