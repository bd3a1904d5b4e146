"""Images into WebDataset shards with an index.

A source is a folder tree of images (sub-folders are the classes; a flat folder has none), a list of images, tars, or an idx file.
What goes where is planned before anything is written: inputs in a fixed shuffled order, so that neighbours in a shard are not of
one class, cut into shards. So equal input gives equal shards, however many processes write them, and a start after a kill goes on
with the shards that are missing.
"""

import fcntl
import hashlib
import json
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mimetic.data.channels import channels_of_most
from mimetic.data.decode import silence_pillow
from mimetic.data.index import write_index
from mimetic.data.items import Item, as_line
from mimetic.data.moments import Moments, measured_places
from mimetic.data.randomness import mix
from mimetic.data.reencode import Encoding
from mimetic.data.shards import Shard, part_of, read_account, write_shard
from mimetic.data.sources import Found, find_items
from mimetic.data.workers import Tally, run_all
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import DataError, SettingError, disk_is_full

OURS = ("index.json", "samples.npy", "keys.txt", "rejected.tsv", "shard-*.tar")
SIDES = ("train", "val")
MOST_SAMPLES, MOST_BYTES = 8192, 256 << 20  # of a shard, unless asked otherwise
PLAN = 1  # to be raised when equal input is packed in another way

Progress = Callable[[int, int, int, int], None]


@dataclass(frozen=True)
class Options:
    """What `pack` takes beside source and folder; see there."""

    samples_per_shard: int | None = None
    max_bad: float = 0.01
    channels: int | None = None
    encoding: Encoding = field(default_factory=Encoding)
    dedup: bool = False
    val: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad <= 1 or (self.samples_per_shard is not None and self.samples_per_shard < 1):
            raise SettingError(f"--max-bad is {self.max_bad} (a share, 0 to 1), --samples-per-shard {self.samples_per_shard} (1 or more)")
        if self.channels is not None and self.channels < 1:
            raise SettingError(f"--channels is {self.channels}; 1 is grey, 3 is colour, arrays may have more")
        if self.channels not in (None, 1, 3) and self.encoding.changes:
            raise SettingError(f"--channels is {self.channels}; --short-side and --format are for pictures, of 1 or 3 channels")
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


def pack(
    source: Path, out: Path, *, samples_per_shard: int | None = None, max_bad: float = 0.01, channels: int | None = None,
    workers: int = 1, short_side: int | None = None, format: str | None = None, quality: int | None = None,
    dedup: bool = False, val: float | None = None, progress: Progress = lambda *numbers: None,
) -> dict[str, Any]:  # fmt: skip
    """Writes `out/shard-00000.tar`, ..., `samples.npy`, `keys.txt`, `index.json`, and `rejected.tsv` if not every input is packed.

    The folder appears whole or not at all: everything is written beside it, and renamed at the end. Killed or interrupted, the same
    call goes on with the shards that are missing, unless source or settings have changed. Unless `channels` says otherwise, images
    have three if any is coloured and one if all are grey; where most of the first few hundred (in the shuffled order) are arrays
    of another number, they have that.

    Args:
        source: see `find_items`.
        out: a new folder, or one with shards of ours, which are replaced.
        samples_per_shard: inputs of a shard; by default 8192, or what makes 256 MiB of images of mean size.
        max_bad: share of the inputs that may be unreadable; they are left out, and listed.
        channels: of every image.
        workers: processes; more than one needs a caller that can be imported (`if __name__ == "__main__"`).
        short_side, format, quality: see `Encoding`; without them the bytes of images stay as they are.
        dedup: leave out images whose bytes are those of an earlier one.
        val: share of the keys whose samples go to `out/val`, all others to `out/train`; a key's side depends on the key alone.
        progress: called with images and bytes that are done, and of how many.

    Returns:
        The content of index.json (of `out/train`, with that of `out/val` as `val`); and `beside`, the images beside the sub-folders,
        for which there are no classes; and `others`, how many files of each other kind were left out.

    Raises:
        DataError: nothing to pack, more than `max_bad` of the images cannot be read, or the disk is full.
        SettingError: `out` exists and holds anything but shards of ours, it cannot be written, or another process packs it.
    """
    source, out = Path(source), Path(out).resolve()
    options = Options(samples_per_shard, max_bad, channels, Encoding(short_side, format, quality), dedup, val)
    work, replaced = (out.with_name(f".{out.name}.{state}") for state in ("packing", "replaced"))
    with _in_one_line(out), warnings.catch_warnings():
        silence_pillow()
        _put_back(replaced, out)
        refuse_to_overwrite(out)
        found = find_items(source, out, workers)
        with _working_folder(work, out):
            shutil.rmtree(replaced, ignore_errors=True)  # left by a kill
            contents = _pack_sides(found, work, options, workers, progress)
            try:
                if out.exists():
                    out.rename(replaced)
                (work / "result").rename(out)
            finally:
                _put_back(replaced, out)
                shutil.rmtree(replaced, ignore_errors=True)
    return contents[0] | ({"val": contents[1]} if val else {}) | {"beside": found.beside, "others": found.others}


def _pack_sides(found: Found, work: Path, options: Options, workers: int, progress: Progress) -> list[dict[str, Any]]:
    """Fills `work/result`; what a killed start has left there of the same plan is kept."""
    _start_over_if_changed(work, found, options)
    duplicates = _duplicates(work, found.items, workers) if options.dedup else {}
    sides = _sides(found.items, duplicates, work / "result", options.val)
    channels = options.channels or channels_of_most([side.items[i] for side in sides for i in _order(side)])
    if options.encoding.changes and channels not in (1, 3):
        raise SettingError(f"images have {channels} channels; --short-side and --format are for pictures, of 1 or 3 channels")
    allowed = int(options.max_bad * len(found.items) + 1e-9)
    for side in sides:
        side.folder.mkdir(exist_ok=True, parents=True)
        side.shards = _plan(side, work / "done", channels, allowed, options)
    shards = [shard for side in sides for shard in side.shards]
    finished = {shard.tar: account for shard in shards if (account := read_account(shard)) is not None}
    missing = [shard for shard in shards if shard.tar not in finished]
    there = [item for shard in shards if shard.tar in finished for item in shard.items]
    images, size = len(there), sum(item.size for item in there)
    total = sum(len(shard.items) for shard in shards), sum(item.size for shard in shards for item in shard.items)
    progress(images, size, *total)
    run_all(write_shard, missing, workers, lambda more, bytes_more: progress(images + more, size + bytes_more, *total),
            sum(len(account["rejected"]) for account in finished.values()))  # fmt: skip
    return [_finish(side, found.classes, channels) for side in sides]


def _finish(side: Side, classes: list[str], channels: int) -> dict[str, Any]:
    """The index of a side whose shards are written."""
    moments, samples = Moments(channels), 0
    for left_by_a_kill in side.folder.glob(".*"):
        left_by_a_kill.unlink()
    rejected = [(as_line(item.path), f"duplicate of {as_line(path)}") for item, path in side.duplicates]

    def accounts() -> Iterator[tuple[Shard, dict[str, Any]]]:
        return ((shard, account) for shard in side.shards if (account := read_account(shard)))

    for _, account in accounts():
        moments.merge(Moments(**account["moments"]))
        samples += len(account["rows"])
        rejected += account["rejected"]
    bad = len(rejected) - len(side.duplicates)
    if not samples or not moments.images:
        path, reason = rejected[len(side.duplicates)]
        raise DataError(f"none of {bad} images can be read, the first: {path} ({reason})")
    if rejected:
        write_atomically(side.folder / "rejected.tsv", "".join(f"{path}\t{reason}\n" for path, reason in rejected))
    parts = (part_of(shard, account) for shard, account in accounts() if account["rows"])
    return write_index(side.folder, parts, samples, classes=classes, image=moments.summary(), rejected=bad, duplicates=len(side.duplicates))


def _order(side: Side) -> list[int]:
    return np.argsort(mix(0, np.arange(len(side.items))), kind="stable").tolist()


def _plan(side: Side, done: Path, channels: int, allowed: int, options: Options) -> list[Shard]:
    items = [side.items[i] for i in _order(side)]
    mean = max(1, sum(item.size for item in items) // len(items))
    step = options.samples_per_shard or max(1, min(MOST_SAMPLES, MOST_BYTES // mean))
    every = all(item.pixels_HW is not None for item in items)  # as good as free
    measured = np.arange(len(items)) if every else measured_places(len(items))
    shards = []
    for number, begin in enumerate(range(0, len(items), step)):
        name = f"shard-{number:05d}"
        places = measured[np.searchsorted(measured, begin) : np.searchsorted(measured, begin + step)] - begin
        shards.append(Shard(side.folder / f"{name}.tar", done / f"{side.folder.name}-{name}.json", items[begin : begin + step],
                            frozenset(places.tolist()), channels, options.encoding, allowed))  # fmt: skip
    return shards


def _sides(items: list[Item], duplicates: dict[int, int], folder: Path, val: float | None) -> list[Side]:
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


def _duplicates(work: Path, items: list[Item], workers: int) -> dict[int, int]:
    """Which items have the bytes of which earlier one. Only those of equal size are read."""
    file = work / "duplicates.json"
    with suppress(OSError, ValueError):
        return {int(later): first for later, first in json.loads(file.read_bytes()).items()}
    by_size = defaultdict(list)
    for number, item in enumerate(items):
        if item.size and not item.fault:
            by_size[item.size].append(number)
    numbers = sorted(number for group in by_size.values() if len(group) > 1 for number in group)
    pieces = [numbers[i : i + MOST_SAMPLES] for i in range(0, len(numbers), MOST_SAMPLES)]
    digests = [digest for part in run_all(_digests, [[items[i] for i in piece] for piece in pieces], workers) for digest in part]
    first: dict[bytes, int] = {}
    found = {}
    for number, digest in zip(numbers, digests, strict=True):
        if digest and first.setdefault(digest, number) != number:
            found[number] = first[digest]
    write_atomically(file, json.dumps(found))
    return found


def _digests(items: Sequence[Item], tally: Tally) -> list[bytes]:
    digests = []
    for item in items:
        try:
            digests.append(hashlib.sha256(item.read()).digest())
        except (OSError, ValueError):  # told when it is packed
            digests.append(b"")
        tally.add(1, item.size)
    return digests


def _start_over_if_changed(work: Path, found: Found, options: Options) -> None:
    plan = hashlib.sha256(repr((PLAN, found.classes, options.samples_per_shard, options.channels, options.encoding, options.dedup,
                                options.val)).encode("utf-8", "surrogateescape"))  # fmt: skip
    for item in found.items:
        told = (item.key, item.path, item.file, item.offset, item.size, item.stamp, item.label, item.fault)
        plan.update(repr(told).encode("utf-8", "surrogateescape"))
    file = work / "plan.txt"
    if not file.exists() or file.read_text() != plan.hexdigest():
        for left in ("done", "result"):
            shutil.rmtree(work / left, ignore_errors=True)
        (work / "duplicates.json").unlink(missing_ok=True)
        write_atomically(file, plan.hexdigest())
    (work / "done").mkdir(exist_ok=True)


@contextmanager
def _working_folder(work: Path, out: Path) -> Iterator[None]:
    """The hidden folder beside `out`, for this process alone. Only an interruption leaves it, with the shards that are finished."""
    parents = [folder for folder in out.parents if not folder.exists()]
    keep = False
    try:
        work.mkdir(parents=True, exist_ok=True)
        with (work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                keep = True
                raise SettingError(f"{out} is being packed by another process; wait for it or end it, or give another folder") from None
            try:
                yield
            except KeyboardInterrupt:
                keep = any((work / "done").glob("*.json"))
                raise
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)
            for folder in parents:
                with suppress(OSError):  # not empty: it holds `out`
                    folder.rmdir()


@contextmanager
def _in_one_line(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if disk_is_full(error):
            raise DataError(f"{out}: the disk is full; nothing was left behind: free some space and pack again") from None
        raise SettingError(f"{out} cannot be written ({error.strerror}); give another folder") from None


def _put_back(replaced: Path, out: Path) -> None:
    """Undoes the first of two renames when the second did not come."""
    with suppress(OSError):  # whatever the names
        if replaced.exists() and not out.exists():
            replaced.rename(out)


def refuse_to_overwrite(out: Path) -> None:
    """Refuses a folder that holds anything but shards of ours.

    Raises:
        SettingError: the line names what is in the way.
    """
    nearest = next(path for path in (out, *out.parents) if path.exists())
    if not nearest.is_dir():
        raise SettingError(f"{out} cannot be a folder, {nearest} is a file; give a new folder")
    split = {path for path in (out / side for side in SIDES) if (path / "index.json").exists()}
    foreign = sorted(path.relative_to(out) for folder in (out, *split) for path in folder.glob("*")
                     if path not in split and not any(path.match(name) for name in OURS))  # fmt: skip
    if foreign:
        raise SettingError(f"{out} holds {foreign[0]}, which is no shard: give a new folder, so that nothing of yours is overwritten")
    if out.exists() and any(out.iterdir()) and not (out / "index.json").exists() and not split:
        raise SettingError(f"{out} exists and holds no index.json: give a new folder, so that nothing of yours is overwritten")
