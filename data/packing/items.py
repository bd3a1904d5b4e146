"""One image that is to be packed, wherever it lies, and what it is called in a shard."""

import io
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mimetic.data.index import UNLABELLED

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pnm", ".npy")
LARGEST = (1 << 32) - 1  # bytes: what a row of an index can say
_CONTROL = dict.fromkeys((*range(32), 127, ord(".")), "_")  # keys are lines of a file, and webdataset ends one at a dot
_LINE = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})


@dataclass(frozen=True, slots=True)
class Item:
    """One image to pack.

    Attributes:
        key: in the shard, unique.
        extension: of the file, without a dot.
        path: as people are told of it.
        file: that holds it.
        offset: of the image in that file; -1 if the file is the image.
        size: bytes.
        stamp: when the file was changed last, in ns.
        label: -1 where there is none.
        fault: why it cannot be packed, if that is known already.
        pixels_HW: if at hand.
    """

    key: str
    extension: str
    path: str
    file: str
    offset: int = -1
    size: int = 0
    stamp: int = 0
    label: int = UNLABELLED
    fault: str = ""
    pixels_HW: NDArray[np.uint8] | None = None

    def open(self) -> BinaryIO:
        """The encoded image.

        Raises:
            OSError: it cannot be read.
            ValueError: it is known to be no image.
        """
        if self.fault:
            raise ValueError(self.fault)
        if self.pixels_HW is not None:
            buffer = io.BytesIO()
            Image.fromarray(self.pixels_HW).save(buffer, "png", compress_level=1)
            buffer.seek(0)
            return buffer
        file = io.FileIO(self.file)
        if self.offset < 0:
            return file
        with file:
            return io.BytesIO(os.pread(file.fileno(), self.size, self.offset))

    def read(self) -> bytes:
        """The whole encoded image; raises as `open` does."""
        with self.open() as file:
            return file.read()


def file_item(key: str, file: str, path: str, label: int = UNLABELLED) -> Item:
    """A file as an item; one that is no image file, or not there, is an item with a fault."""
    extension = os.path.splitext(file)[1].lower()
    fault, size, stamp = "", 0, 0
    try:
        status = os.stat(file)
        size, stamp = status.st_size, status.st_mtime_ns
        if not stat.S_ISREG(status.st_mode):
            fault = "no regular file"
        elif extension not in EXTENSIONS:
            fault = f"{as_text(extension) or 'no extension'}: known are {' '.join(EXTENSIONS)}"
        elif size > LARGEST:
            fault = f"{size:,} bytes; the most is {LARGEST:,}"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        fault = getattr(error, "strerror", None) or str(error)
    return Item(key, extension[1:], path, file, size=size, stamp=stamp, label=label, fault=fault)


def key_maker() -> Callable[[str], str]:
    """A function that makes keys out of paths: fit for webdataset, one line each, inside the shard, and no two alike."""
    used: dict[str, int] = {}

    def key(path: str) -> str:
        made = base = as_text(path).translate(_CONTROL).lstrip("/") or "_"
        if base.startswith("__"):  # webdataset takes __NAME__ for its own
            made = base = "_" + base.lstrip("_")
        while made in used:
            used[base] += 1
            made = f"{base}-{used[base] - 1}"
        used[made] = 1
        return made

    return key


def as_text(path: str) -> str:
    """The path in proper UTF-8, whatever bytes the file system holds."""
    return os.fsencode(path).decode("utf-8", "replace")


def as_line(text: str) -> str:
    """Fit for a field of a table: one line, no tab, proper UTF-8."""
    return text.encode("utf-8", "replace").decode().translate(_LINE)


def counted(number: int, word: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"
