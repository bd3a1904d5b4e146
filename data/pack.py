"""Images into WebDataset shards with an index.

A source is an idx file (MNIST's format, labels found beside it) or a folder tree of images: sub-folders of the source are the
classes; a flat folder has none. Image bytes of a tree pass through unchanged. Samples are written in a fixed shuffled order,
so that neighbours in a shard are not of one class, and equal input gives equal shards.
"""

import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from mimetic.data.decode import NPY_MAGIC, decode, open_array
from mimetic.data.index import ROW, UNLABELLED, VERSION
from mimetic.data.randomness import mix
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import DataError, SettingError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".npy")
OURS = ("index.json", "samples.npy", "rejected.tsv", "shard-*.tar")
LOOK = 256  # images that are asked for their number of channels


@dataclass(frozen=True)
class Item:
    """One image to pack: its key in the shard, its file extension, its label, and how to get its bytes (and pixels, if at hand)."""

    key: str
    extension: str
    label: int
    read: Callable[[], bytes]
    path: str
    pixels_HW: np.ndarray | None = None


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
    source: Path, out: Path, *, samples_per_shard: int = 8192, max_bad: float = 0.01,
    progress: Callable[[Iterable[Item], int], Iterable[Item]] = lambda items, total: items,
) -> dict[str, Any]:  # fmt: skip
    """Writes `out/shard-00000.tar`, ..., `samples.npy`, `index.json`, and `rejected.tsv` if an image cannot be read.

    The folder appears whole or not at all: everything is written beside it and renamed at the end. Images have three channels
    if any of the first few hundred (in the shuffled order) is coloured, one if they are grey, and an array's own number else.

    Returns:
        The content of index.json.

    Raises:
        DataError: nothing to pack, or more than `max_bad` of the images cannot be read.
        SettingError: `out` exists and holds anything but shards of ours.
    """
    source, out = Path(source), Path(out).resolve()
    if not 0 <= max_bad <= 1 or samples_per_shard < 1:
        raise SettingError(f"--max-bad is {max_bad} (a share, 0 to 1), --samples-per-shard {samples_per_shard} (1 or more)")
    _refuse_to_overwrite(out)
    items, classes = find_items(source)
    order = np.argsort(mix(0, np.arange(len(items))), kind="stable")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = (out.with_name(f".{out.name}.{state}") for state in ("packing", "replaced"))
    for left_by_a_kill in (temporary, replaced):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    temporary.mkdir()
    try:
        content = _write(temporary, [items[i] for i in order], classes, samples_per_shard, max_bad, progress)
        if out.exists():
            out.rename(replaced)
        temporary.rename(out)
    finally:
        for folder in (temporary, replaced):
            shutil.rmtree(folder, ignore_errors=True)
    return content


def _refuse_to_overwrite(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise SettingError(f"{out} is a file; give a new folder")
    foreign = sorted(path.name for path in out.glob("*") if not any(path.match(name) for name in OURS))
    if foreign:
        raise SettingError(f"{out} holds {foreign[0]}, which is no shard: give a new folder, so that nothing of yours is overwritten")
    if out.exists() and any(out.iterdir()) and not (out / "index.json").exists():
        raise SettingError(f"{out} exists and holds no index.json: give a new folder, so that nothing of yours is overwritten")


def find_items(source: Path) -> tuple[list[Item], list[str]]:
    """The images of a source, sorted by name, and its class names.

    Raises:
        DataError: the source does not exist or holds no image.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; give a folder of images or an idx file")
    if source.is_dir() and (files := sorted(source.glob("*idx3-ubyte*"))):
        names = ", ".join(file.name for file in files)
        raise DataError(f"{source} holds idx files; name the one to pack: {names}")
    items, classes = _idx_items(source) if source.is_file() else _tree_items(source)
    if not items:
        raise DataError(f"{source}: no image in it; known are {' '.join(EXTENSIONS)} and idx files")
    return items, classes


def _tree_items(source: Path) -> tuple[list[Item], list[str]]:
    files = sorted(_image_files(source))
    tops = {path.relative_to(source).parts[0] for path in files if path.parent != source}
    # Images beside the sub-folders would have no class: then the tree is taken as unlabelled.
    classes = sorted(tops) if all(path.parent != source for path in files) else []
    numbers = {name: number for number, name in enumerate(classes)}
    items, seen = [], set()
    for path in files:
        relative = path.relative_to(source)
        key = base = _text(relative.with_suffix("")).replace(".", "_")  # webdataset ends a key at the first dot
        number = 1
        while key in seen:
            key, number = f"{base}-{number}", number + 1
        seen.add(key)
        label = numbers[relative.parts[0]] if classes else UNLABELLED
        items.append(Item(key, path.suffix.lower()[1:], label, path.read_bytes, _text(path)))
    return items, [_text(name) for name in classes]


def _image_files(source: Path) -> Iterator[Path]:
    # Linked folders count, since classes are often chosen by links; hidden files do not: they are thumbnails and the like.
    for folder, below, names in os.walk(source, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in EXTENSIONS and path.is_file():
                yield path


def _text(path: str | Path) -> str:
    """The path in proper UTF-8, whatever bytes the file system holds."""
    return os.fsencode(path).decode("utf-8", "replace")


def _idx_items(source: Path) -> tuple[list[Item], list[str]]:
    images = read_idx(source)
    if images.ndim != 3:
        raise DataError(f"{source}: an idx file of shape {images.shape}; images have 3 dimensions (name the images file)")
    beside = source.with_name(source.name.replace("images-idx3", "labels-idx1"))
    labels = read_idx(beside) if beside != source and beside.exists() else None
    if labels is not None and len(labels) != len(images):
        raise DataError(f"{beside} has {len(labels)} labels, {source.name} has {len(images)} images")
    classes = [str(i) for i in range(int(labels.max()) + 1)] if labels is not None else []

    def item(i: int) -> Item:
        label = int(labels[i]) if labels is not None else UNLABELLED
        return Item(f"{i:08d}", "png", label, lambda: _png(images[i]), f"{source}#{i}", images[i])

    return [item(i) for i in range(len(images))], classes


def read_idx(path: Path) -> np.ndarray:
    """An uint8 array from an idx file (http://yann.lecun.com/exdb/mnist/), gzipped or not.

    Raises:
        DataError: no idx file, or cut off.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: {error}") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08" or not 1 <= content[3] <= 4:
        raise DataError(f"{path} is no idx file of bytes, nor a folder")
    dimensions = np.frombuffer(content, ">u4", content[3], 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if len(values) != dimensions.prod():
        raise DataError(f"{path} is cut off: {len(values)} values, its header says {dimensions.prod()}")
    return values.reshape(dimensions)


def _png(image_HW: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HW).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _write(folder: Path, items: list[Item], classes: list[str], samples_per_shard: int, max_bad: float,
           progress: Callable[[Iterable[Item], int], Iterable[Item]]) -> dict[str, Any]:  # fmt: skip
    rejected: list[tuple[str, str]] = []
    rows: list[tuple[int, int, int, int, bytes]] = []
    statistics = Statistics(_channels(items[:LOOK]))
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
    longest = max(len(row[4]) for row in rows)
    kinds = ("<i4", "<i8", "<i8", "<i4", f"S{longest}")
    table = np.array(rows, dtype=list(zip(ROW, kinds, strict=True)))
    np.save(folder / "samples.npy", table)
    shards = [
        {"name": tar.name, "samples": int(samples), "bytes": tar.stat().st_size, "sha256": _sha256(tar)}
        for tar, samples in zip(sorted(folder.glob("shard-*.tar")), np.bincount(table["shard"]), strict=True)
    ]
    if rejected:
        write_atomically(folder / "rejected.tsv", "".join(f"{path}\t{reason}\n" for path, reason in rejected))
    summary = {"version": VERSION, "samples": len(rows), "rejected": len(rejected), "classes": classes,
               "image": statistics.summary(), "shards": shards}  # fmt: skip
    write_atomically(folder / "index.json", json.dumps(summary, indent=1) + "\n")
    return summary


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
            statistics.add(decode(content, statistics.channels).numpy() if item.pixels_HW is None else item.pixels_HW[None])
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
    """The most that any of these images has: one grey picture makes no colour set grey, whichever comes first."""
    return max(1 if item.pixels_HW is not None else _channels_of(item) for item in items) or 3


def _channels_of(item: Item) -> int:
    """From the header alone; 0 where it cannot be read."""
    try:
        content = item.read()
        if content.startswith(NPY_MAGIC):
            return open_array(content).shape[-1]
        return {"L": 1, "RGB": 3}[Image.getmodebase(Image.open(io.BytesIO(content)).mode)]
    except Exception:  # it will be rejected, with the reason, when its turn comes
        return 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack_and_tell(source: Path, out: Path, samples_per_shard: int, max_bad: float) -> None:
    """`mimetic pack`: says what will happen, how far it is, and where the result is."""
    print(f"packing {source} into shards of {samples_per_shard:,} images in {out}", flush=True)
    content = pack(source, out, samples_per_shard=samples_per_shard, max_bad=max_bad, progress=_told)
    rejected = f", {content['rejected']} unreadable ones listed in {out}/rejected.tsv" if content["rejected"] else ""
    classes = f"{len(content['classes'])} classes" if content["classes"] else "no labels"
    print(f"{content['samples']:,} images, {classes}, {len(content['shards'])} shards{rejected}: {out}/index.json")


def _told(items: Iterable[Item], total: int) -> Iterator[Item]:
    started = told = time.perf_counter()
    for number, item in enumerate(items):
        yield item
        now = time.perf_counter()
        if now - told > 5:
            rate, told = (number + 1) / (now - started), now
            print(f"{number + 1:,}/{total:,}  {rate:,.0f} images/s  {(total - number) / rate:.0f} s left", flush=True)
