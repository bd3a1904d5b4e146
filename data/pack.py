"""Images into WebDataset shards with an index.

A source is an idx file (MNIST's format, labels found beside it) or a folder tree of images: sub-folders of the source are the
classes; a flat folder has none. Image bytes of a tree pass through unchanged. Samples are written in a fixed shuffled order,
so that neighbours in a shard are not of one class, and equal input gives equal shards.
"""

import hashlib
import os
import shutil
import tarfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from mimetic.data.decode import channels_of, decode, silence_pillow
from mimetic.data.index import ROW, UNLABELLED, Part, write_index
from mimetic.data.randomness import mix
from mimetic.data.sources import Item, find_items, left_out
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import DataError, SettingError, disk_is_full

OURS = ("index.json", "samples.npy", "keys.txt", "rejected.tsv", "shard-*.tar")
LOOK = 256  # images that are asked whether they are pictures or arrays of more channels


@dataclass
class Statistics:
    """Exact sums over uint8 pixels for the channel means and deviations."""

    channels: int
    pixels: int = 0
    total: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    def add(self, image_CHW: np.ndarray) -> None:
        """Counts one uint8 image."""
        flat = image_CHW.reshape(self.channels, -1)
        self.pixels += flat.shape[1]
        self.total = self.total + flat.sum(1, dtype=np.int64)
        self.squares = self.squares + np.square(flat, dtype=np.uint16).sum(1, dtype=np.int64)

    def summary(self) -> dict[str, Any]:
        """`channels`, and `mean` and `std` of pixels in [0, 1]."""
        mean = self.total / self.pixels / 255
        std = np.sqrt(np.maximum(self.squares / self.pixels / 255**2 - mean**2, 1e-12))
        return {"channels": self.channels, "mean": mean.round(6).tolist(), "std": std.round(6).tolist()}


def pack(
    source: Path, out: Path, *, samples_per_shard: int = 8192, max_bad: float = 0.01, channels: int | None = None,
    progress: Callable[[Iterable[Item], int], Iterable[Item]] = lambda items, total: items,
) -> dict[str, Any]:  # fmt: skip
    """Writes `out/shard-00000.tar`, ..., `samples.npy`, `index.json`, and `rejected.tsv` if an image cannot be read.

    The folder appears whole or not at all: everything is written beside it and renamed at the end. Unless `channels` says
    otherwise, images have three if any is coloured and one if all are grey; where most of the first few hundred (in the shuffled
    order) are arrays of another number, they have that.

    Returns:
        The content of index.json; and `beside`, the images beside the sub-folders, for which there are no classes; and
        `others`, how many files of each other kind were left out.

    Raises:
        DataError: nothing to pack, more than `max_bad` of the images cannot be read, or the disk is full.
        SettingError: `out` exists and holds anything but shards of ours, or it cannot be written.
    """
    source, out = Path(source), Path(out).resolve()
    if not 0 <= max_bad <= 1 or samples_per_shard < 1:
        raise SettingError(f"--max-bad is {max_bad} (a share, 0 to 1), --samples-per-shard {samples_per_shard} (1 or more)")
    if channels is not None and channels < 1:
        raise SettingError(f"--channels is {channels}; 1 is grey, 3 is colour, arrays may have more")
    temporary, replaced = (out.with_name(f".{out.name}.{state}") for state in ("packing", "replaced"))
    with _in_one_line(out), warnings.catch_warnings():
        silence_pillow()
        _put_back(replaced, out)
        _refuse_to_overwrite(out)
        found = find_items(source, out)
        order = np.argsort(mix(0, np.arange(len(found.items))), kind="stable")
        parents = [folder for folder in out.parents if not folder.exists()]
        for left_by_a_kill in (temporary, replaced):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            content = _write(temporary, [found.items[i] for i in order], found.classes, samples_per_shard, max_bad, channels, progress)
            if out.exists():
                out.rename(replaced)
            temporary.rename(out)
        finally:
            _put_back(replaced, out)
            for folder in (temporary, replaced):
                shutil.rmtree(folder, ignore_errors=True)
            for folder in parents:
                with suppress(OSError):  # not empty: it holds `out`
                    folder.rmdir()
    return content | {"beside": found.beside, "others": found.others}


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
    if os.path.exists(replaced / "index.json") and not os.path.exists(out):  # no OSError, whatever the names
        replaced.rename(out)


def _refuse_to_overwrite(out: Path) -> None:
    nearest = next(path for path in (out, *out.parents) if path.exists())
    if not nearest.is_dir():
        raise SettingError(f"{out} cannot be a folder, {nearest} is a file; give a new folder")
    foreign = sorted(path.name for path in out.glob("*") if not any(path.match(name) for name in OURS))
    if foreign:
        raise SettingError(f"{out} holds {foreign[0]}, which is no shard: give a new folder, so that nothing of yours is overwritten")
    if out.exists() and any(out.iterdir()) and not (out / "index.json").exists():
        raise SettingError(f"{out} exists and holds no index.json: give a new folder, so that nothing of yours is overwritten")


def _write(folder: Path, items: list[Item], classes: list[str], samples_per_shard: int, max_bad: float, channels: int | None,
           progress: Callable[[Iterable[Item], int], Iterable[Item]]) -> dict[str, Any]:  # fmt: skip
    rejected: list[tuple[str, str]] = []
    rows: list[tuple[int, int, int, int, bytes]] = []
    statistics = Statistics(channels or _channels(items))
    with webdataset.ShardWriter(
        str(folder).replace("%", "%%") + "/shard-%05d.tar", maxcount=samples_per_shard, maxsize=1 << 62, verbose=0,
        mtime=0, user="", group="", encoder=False,
    ) as writer:  # fmt: skip
        for item, content in _readable(progress(items, len(items)), rejected, int(max_bad * len(items) + 1e-9), statistics):
            labels = {"cls": str(item.label).encode()} if item.label != UNLABELLED else {}
            writer.write({"__key__": item.key, item.extension: content} | labels)
            end = writer.tarstream.tarstream.offset
            rows.append((writer.shard - 1, _offset(item, len(content), end), len(content), item.label, item.key.encode()))
    if not rows:
        raise DataError(f"none of {len(items)} images can be read, the first: {rejected[0][0]} ({rejected[0][1]})")
    if rejected:
        write_atomically(folder / "rejected.tsv", "".join(f"{path}\t{reason}\n" for path, reason in rejected))
    parts = [_part(tar, [row[1:] for row in rows if row[0] == number]) for number, tar in enumerate(sorted(folder.glob("shard-*.tar")))]
    return write_index(folder, parts, len(rows), classes=classes, image=statistics.summary(), rejected=len(rejected))


def _part(tar: Path, members: list[tuple[int, int, int, bytes]]) -> Part:
    keys = [member[3] + b"\n" for member in members]
    begins = np.cumsum([0, *map(len, keys)])[:-1]
    rows = np.array([(*member[:3], begin) for member, begin in zip(members, begins.tolist(), strict=True)], ROW)
    return Part(tar.name, tar.stat().st_size, _sha256(tar), rows, b"".join(keys))


def _offset(item: Item, size: int, end: int) -> int:
    """Where an image of `size` bytes begins, when its sample ends at `end`: webdataset sorts a sample's members by extension."""
    image = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    label_after = item.label != UNLABELLED and item.extension < "cls"  # bmp
    return end - image - (len(tarfile.TarInfo(f"{item.key}.cls").tobuf()) + tarfile.BLOCKSIZE if label_after else 0)


def _readable(items: Iterable[Item], rejected: list[tuple[str, str]], allowed: int,
              statistics: Statistics) -> Iterator[tuple[Item, bytes]]:  # fmt: skip
    """Yields what decodes, lists what does not."""
    for item in items:
        try:
            content = item.read()
            if item.pixels_HW is not None and statistics.channels == 1:
                statistics.add(item.pixels_HW[None])
            else:
                statistics.add(decode(content, statistics.channels).numpy())
        except (OSError, ValueError) as error:
            rejected.append((item.path, " ".join(str(error).split())))
            if len(rejected) > allowed:
                raise DataError(
                    f"{len(rejected)} unreadable images, {allowed} are tolerated; the last: {item.path} ({rejected[-1][1]}); "
                    "mend them or raise --max-bad"
                ) from None
        else:
            yield item, content


def _channels(items: list[Item]) -> int:
    """What most of a few have, if that is an array's own number; else the most that any picture has.

    One coloured picture makes a grey set coloured, wherever it comes; so only grey sets are looked at to their end.
    """
    looked = Counter(channels if channels != 1 else 3 for item in items[:LOOK] if (channels := _channels_of(item)))
    most = max(looked, key=lambda channels: (looked[channels], channels == 3), default=3)
    return most if most != 3 or any(_channels_of(item) == 3 for item in items) else 1


def _channels_of(item: Item) -> int:
    if item.pixels_HW is not None:
        return 1
    try:
        with item.open() as file:
            return channels_of(file)
    except OSError:
        return 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack_and_tell(source: Path, out: Path, samples_per_shard: int, max_bad: float, channels: int | None = None) -> None:
    """`mimetic pack`: says what will happen, how far it is, and where the result is."""
    print(f"packing {source} into shards of {samples_per_shard:,} images in {out}", flush=True)
    content = pack(source, out, samples_per_shard=samples_per_shard, max_bad=max_bad, channels=channels, progress=_told)
    rejected = f", {content['rejected']} unreadable ones listed in {out}/rejected.tsv" if content["rejected"] else ""
    classes = f"{len(content['classes'])} classes" if content["classes"] else f"no labels{_why(content['beside'])}"
    others = left_out(content["others"])
    print(f"{content['samples']:,} images, {classes}, {len(content['shards'])} shards{rejected}{others}: {out}/index.json")


def _why(beside: list[str]) -> str:
    if not beside:
        return ""
    one = len(beside) == 1
    who = f"{beside[0]} lies" if one else f"{beside[0]} and {len(beside) - 1:,} more lie"
    return f" ({who} beside the sub-folders; move {'it' if one else 'them'} into one to have classes)"


def _told(items: Iterable[Item], total: int) -> Iterator[Item]:
    started = told = time.perf_counter()
    for number, item in enumerate(items):
        yield item
        now = time.perf_counter()
        if now - told > 5:
            rate, told = (number + 1) / (now - started), now
            print(f"{number + 1:,}/{total:,}  {rate:,.0f} images/s  {(total - number) / rate:.0f} s left", flush=True)
