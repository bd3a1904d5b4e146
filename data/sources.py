"""What there is to pack: the images of a folder tree or of an idx file, with keys and labels."""

import gzip
import io
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from mimetic.data.index import UNLABELLED
from mimetic.engine.errors import DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pnm", ".npy")


@dataclass(frozen=True)
class Item:
    """One image to pack: its key in the shard, its file extension, its label, and how to open it (and its pixels, if at hand)."""

    key: str
    extension: str
    label: int
    open: Callable[[], BinaryIO]
    path: str
    pixels_HW: np.ndarray | None = None

    def read(self) -> bytes:
        """The whole file."""
        with self.open() as file:
            return file.read()


@dataclass(frozen=True)
class Found:
    """What a source holds: images, class names, images that lie beside its sub-folders, and how many files of which other kinds."""

    items: list[Item]
    classes: list[str]
    beside: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def find_items(source: Path, out: Path) -> Found:
    """The images of a source, sorted by name, and its class names; the folder `out` is none of it.

    Raises:
        DataError: the source does not exist or holds no image.
    """
    if not os.path.exists(source):  # which is False for a name that is too long, where Path.exists raises
        raise DataError(f"{source}: no such file or folder; give a folder of images or an idx file")
    if source.is_dir() and (files := sorted(source.glob("*idx3-ubyte*"))):
        names = ", ".join(file.name for file in files)
        raise DataError(f"{source} holds idx files; name the one to pack: {names}")
    found = _idx_items(source) if source.is_file() else _tree_items(source, out)
    if not found.items:
        raise DataError(f"{source}: no image in it{left_out(found.others)}; known are {' '.join(EXTENSIONS)} and idx files")
    return found


def _tree_items(source: Path, out: Path) -> Found:
    files, others = _image_files(source, out)
    tops = {path.relative_to(source).parts[0] for path in files if path.parent != source}
    # Images beside the sub-folders would have no class: then the tree is taken as unlabelled.
    beside = [_text(path.name) for path in files if path.parent == source] if tops else []
    classes = [] if beside else sorted(tops)
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
        items.append(Item(key, path.suffix.lower()[1:], label, partial(io.FileIO, path), _text(path)))
    return Found(items, [_text(name) for name in classes], beside, others)


def _image_files(source: Path, out: Path) -> tuple[list[Path], Counter[str]]:
    """The images of a tree, sorted, and how many files of which other kinds it holds.

    Linked folders count, since classes are often chosen by links; hidden ones do not: they hold thumbnails and the like.
    """
    images: list[Path] = []
    others: Counter[str] = Counter()
    left_out = {os.path.realpath(source), str(out)}
    met: set[tuple[str, str]] = set()

    def is_new(folder: Path) -> bool:
        # Once in each class: so links that cross lead to an end, however many paths they make, and classes may share a folder.
        place = (folder.relative_to(source).parts[0], os.path.realpath(folder))
        new = place not in met and place[1] not in left_out
        met.add(place)
        return new

    for folder, below, names in os.walk(source, followlinks=True):
        below[:] = [name for name in sorted(below) if not name.startswith(".") and is_new(Path(folder, name))]
        for path in (Path(folder, name) for name in sorted(names)):
            if (kind := _kind(path)) in EXTENSIONS:
                images.append(path)
            else:
                others[kind] += 1
    return sorted(images), others


def _kind(path: Path) -> str:
    if path.name.startswith("."):
        return "hidden"
    return _text(path.suffix.lower()) or "no extension" if os.path.isfile(path) else "broken links"


def _text(path: str | Path) -> str:
    """The path in proper UTF-8, whatever bytes the file system holds."""
    return os.fsencode(path).decode("utf-8", "replace")


def _idx_items(source: Path) -> Found:
    images = read_idx(source)
    if images.ndim != 3 or not images.size:
        raise DataError(f"{source}: an idx file of shape {images.shape}; images have 3 dimensions (name the images file)")
    beside = source.with_name(source.name.replace("images-idx3", "labels-idx1"))
    labels = read_idx(beside) if beside != source and beside.exists() else None
    if labels is not None and labels.ndim != 1:
        raise DataError(f"{beside}: an idx file of shape {labels.shape}; labels have 1 dimension")
    if labels is not None and len(labels) != len(images):
        raise DataError(f"{beside} has {len(labels)} labels, {source.name} has {len(images)} images")
    classes = [str(i) for i in range(int(labels.max()) + 1)] if labels is not None else []

    def item(i: int) -> Item:
        label = int(labels[i]) if labels is not None else UNLABELLED
        return Item(f"{i:08d}", "png", label, lambda: io.BytesIO(_png(images[i])), f"{source}#{i}", images[i])

    return Found([item(i) for i in range(len(images))], classes)


def read_idx(path: Path) -> np.ndarray:
    """An uint8 array from an idx file (http://yann.lecun.com/exdb/mnist/), gzipped or not.

    Raises:
        DataError: no idx file, or cut off.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {error}") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08" or not 1 <= content[3] <= 4:
        raise DataError(f"{path} is no idx file of bytes, nor a folder")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise DataError(f"{path} is cut off: {len(content)} bytes, its header alone has {header}")
    dimensions = np.frombuffer(content, ">u4", content[3], 4).tolist()
    values = np.frombuffer(content, np.uint8, offset=header)
    if len(values) != math.prod(dimensions):
        raise DataError(f"{path} is cut off: {len(values)} values, its header says {math.prod(dimensions)}")
    return values.reshape(dimensions)


def _png(image_HW: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HW).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def left_out(others: Counter[str]) -> str:
    """What to say of files that were not packed; nothing if there are none."""
    if not others:
        return ""
    kinds = ", ".join(kind for kind, _ in others.most_common(3)) + (" ..." if len(others) > 3 else "")
    return f", {others.total():,} file{'s' if others.total() > 1 else ''} of other kinds left out ({kinds})"
