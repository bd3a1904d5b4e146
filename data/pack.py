"""Images into WebDataset shards with an index.

A source is an idx file (MNIST's format, labels found beside it) or a folder tree of images: sub-folders of the source are the
classes; a flat folder has none. Image bytes of a tree pass through unchanged. Samples are written in a fixed shuffled order,
so that neighbours in a shard are not of one class, and equal input gives equal shards.
"""

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from mimetic.data.decode import NPY_MAGIC, decode, open_picture
from mimetic.data.index import UNLABELLED, VERSION
from mimetic.data.randomness import mix
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import DataError, SettingError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".npy")


@dataclass(frozen=True)
class Item:
    """One image to pack: its key in the shard, its file extension, its label, and how to get its bytes."""

    key: str
    extension: str
    label: int
    read: Callable[[], bytes]
    path: str


@dataclass
class Statistics:
    """Sums over pixels in [0, 1] for the channel means and deviations."""

    channels: int
    pixels: int = 0
    total: np.ndarray = field(default_factory=lambda: np.zeros(1))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(1))

    def add(self, image_CHW: np.ndarray) -> None:
        """Counts one uint8 image."""
        flat = image_CHW.reshape(self.channels, -1).astype(np.float64) / 255
        self.pixels += flat.shape[1]
        self.total = self.total + flat.sum(1)
        self.squares = self.squares + (flat**2).sum(1)

    def summary(self) -> dict[str, Any]:
        """`channels`, `mean` and `std` for the index."""
        mean = self.total / self.pixels
        std = np.sqrt(np.maximum(self.squares / self.pixels - mean**2, 1e-12))
        return {"channels": self.channels, "mean": mean.round(6).tolist(), "std": std.round(6).tolist()}


def pack(
    source: Path, out: Path, *, samples_per_shard: int = 8192, max_bad: float = 0.01,
    progress: Callable[[Iterable[Item], int], Iterable[Item]] = lambda items, total: items,
) -> dict[str, Any]:  # fmt: skip
    """Writes `out/shard-00000.tar`, ..., `samples.npy`, `index.json`, and `rejected.tsv` if an image cannot be read.

    The folder appears whole or not at all: everything is written beside it and renamed at the end.

    Returns:
        The content of index.json.

    Raises:
        DataError: nothing to pack, or more than `max_bad` of the images cannot be read.
        SettingError: `out` exists and is not an index of ours.
    """
    if not 0 <= max_bad <= 1 or samples_per_shard < 1:
        raise SettingError(f"--max-bad is {max_bad} (a share, 0 to 1), --samples-per-shard {samples_per_shard} (1 or more)")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "index.json").exists())):
        raise SettingError(f"{out} exists and holds no index.json: give a new folder, so that nothing of yours is overwritten")
    items, classes = find_items(source)
    order = np.argsort(mix(0, np.arange(len(items))), kind="stable")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.packing")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
    temporary.mkdir()
    try:
        content = _write(temporary, [items[i] for i in order], classes, samples_per_shard, max_bad, progress)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return content


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
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    tops = {path.relative_to(source).parts[0] for path in files if path.parent != source}
    # Images beside the sub-folders would have no class: then the tree is taken as unlabelled.
    classes = sorted(tops) if all(path.parent != source for path in files) else []
    items, seen = [], set()
    for path in files:
        relative = path.relative_to(source)
        key = base = str(relative.with_suffix("")).replace(".", "_")  # webdataset ends a key at the first dot
        number = 1
        while key in seen:
            key, number = f"{base}-{number}", number + 1
        seen.add(key)
        label = classes.index(relative.parts[0]) if classes else UNLABELLED
        items.append(Item(key, path.suffix.lower()[1:], label, path.read_bytes, str(path)))
    return items, classes


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
        return Item(f"{i:08d}", "png", label, lambda: _png(images[i]), f"{source}#{i}")

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
    statistics: list[Statistics] = []
    with webdataset.ShardWriter(
        str(folder / "shard-%05d.tar"), maxcount=samples_per_shard, maxsize=1 << 62, verbose=0, mtime=0, user="", group=""
    ) as writer:
        for item, content in _readable(progress(items, len(items)), rejected, int(max_bad * len(items)), statistics):
            labels = {"cls": str(item.label).encode()} if item.label != UNLABELLED else {}
            writer.write({"__key__": item.key, item.extension: content} | labels)
    tars = sorted(folder.glob("shard-*.tar"))
    rows, shards = [], []
    for number, tar in enumerate(tars):
        found = list(scan(tar, number))
        rows += found
        shards.append({"name": tar.name, "samples": len(found), "bytes": tar.stat().st_size, "sha256": _sha256(tar)})
    if not rows:
        raise DataError(f"none of {len(items)} images can be read, the first: {rejected[0][0]} ({rejected[0][1]})")
    longest = max(len(row[4]) for row in rows)
    table = np.array(rows, dtype=[("shard", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("label", "<i4"), ("key", f"S{longest}")])
    np.save(folder / "samples.npy", table)
    if rejected:
        write_atomically(folder / "rejected.tsv", "".join(f"{path}\t{reason}\n" for path, reason in rejected))
    content = {"version": VERSION, "samples": len(rows), "rejected": len(rejected), "classes": classes,
               "image": statistics[0].summary(), "shards": shards}  # fmt: skip
    write_atomically(folder / "index.json", json.dumps(content, indent=1) + "\n")
    return content


def _readable(items: Iterable[Item], rejected: list[tuple[str, str]], allowed: int,
              statistics: list[Statistics]) -> Iterator[tuple[Item, bytes]]:  # fmt: skip
    """Yields what decodes, lists what does not; the first good image sets the number of channels."""
    for item in items:
        try:
            content = item.read()
            if not statistics:
                statistics.append(Statistics(_channels(content)))
            statistics[0].add(decode(content, statistics[0].channels).numpy())
            yield item, content
        except (OSError, ValueError) as error:
            rejected.append((item.path, " ".join(str(error).split())))
            if len(rejected) > allowed:
                raise DataError(
                    f"{len(rejected)} unreadable images, {allowed} are tolerated; the last: {item.path} ({rejected[-1][1]}); "
                    "mend them or raise --max-bad"
                ) from None


def _channels(content: bytes) -> int:
    if content.startswith(NPY_MAGIC):
        array = np.load(io.BytesIO(content), allow_pickle=False)
        return 1 if array.ndim == 2 else array.shape[-1]
    return 1 if open_picture(content).mode in ("1", "L", "I", "I;16", "F") else 3


def scan(tar: Path, number: int) -> Iterator[tuple[int, int, int, int, bytes]]:
    """Where each sample of a shard lies: (shard number, offset, size, label, key)."""
    image: tuple[str, int, int] | None = None
    label = UNLABELLED
    with tarfile.open(tar, "r:") as members:
        for member in members:
            key, _, extension = member.name.rpartition("/")[2].partition(".")
            key = member.name[: len(member.name) - len(extension) - 1] if extension else key
            if image and key != image[0]:
                yield number, image[1], image[2], label, image[0].encode()
                image, label = None, UNLABELLED
            if extension == "cls":
                stream = members.extractfile(member)
                label = int(stream.read()) if stream else UNLABELLED
            else:
                image = (key, member.offset_data, member.size)
    if image:
        yield number, image[1], image[2], label, image[0].encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
