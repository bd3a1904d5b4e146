"""Channel means and deviations of many images, exactly."""

import io
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mimetic.data.decode import decode
from mimetic.data.pixelrange import Range, mapped, outside

MEASURED, FEWEST = 512, 64  # images of a large set that are measured: its mean is then right to about 0.005, or 0.015
MEASURED_BYTES = 48 << 20  # between the two numbers, as many as these bytes hold: decoding is slow
MODES = {1: "L", 3: "RGB"}
LARGE = 256 << 10  # bytes of a JPEG that is measured at a part of its size
ENOUGH = 1 << 16  # pixels of an image that count; of larger ones every second row, or every third


@dataclass
class Moments:
    """Sums over uint8 pixels: integers, so the order in which images come does not matter. Or float64 sums over pixels in [0, 1],
    which are the same on every machine since images are added in their order, shard by shard.

    Attributes:
        channels: of every image.
        images: that were added.
        pixels: of all of them.
        total: per channel.
        squares: per channel.
        values: numbers that were held against a pixel range.
        outside: of them, those beyond it.
    """

    channels: int
    images: int = 0
    pixels: int = 0
    total: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    values: int = 0
    outside: int = 0

    def add(self, image_CHW: NDArray[Any]) -> None:
        """Counts one image, uint8 or in [0, 1]."""
        wide, wider = (np.uint16, np.int64) if image_CHW.dtype == np.uint8 else (np.float64, np.float64)
        height, width = image_CHW.shape[1:]
        rows = max(1, height * width // ENOUGH)
        flat = image_CHW[:, ::rows].reshape(self.channels, -1)
        self.merge(Moments(self.channels, 1, flat.shape[1], flat.sum(1, dtype=wider).tolist(),
                           np.square(flat, dtype=wide).sum(1, dtype=wider).tolist()))  # fmt: skip

    def add_deep(self, raw_HWC: NDArray[Any], limits: Range) -> None:
        """Counts one image as its pixel range maps it, and what lies outside of that."""
        self.add(mapped(raw_HWC, limits).transpose(2, 0, 1))
        self.values += raw_HWC.size
        self.outside += outside(raw_HWC, limits)

    def merge(self, other: "Moments") -> None:
        """Counts what another has counted."""
        self.images += other.images
        self.pixels += other.pixels
        self.values += other.values
        self.outside += other.outside
        nothing = [0] * self.channels
        self.total = [a + b for a, b in zip(self.total or nothing, other.total or nothing, strict=True)]
        self.squares = [a + b for a, b in zip(self.squares or nothing, other.squares or nothing, strict=True)]

    def summary(self, limits: Range | None = None) -> dict[str, Any]:
        """What an index says of its images: `channels`, `mean` and `std` of pixels in [0, 1], and how many were `measured`.

        With a pixel range also the `range`, and the share of values `outside` of it.
        """
        white = 255 if limits is None else 1
        mean = np.array(self.total) / self.pixels / white
        std = np.sqrt(np.maximum(np.array(self.squares) / self.pixels / white**2 - mean**2, 1e-12))
        told = {"channels": self.channels, "mean": mean.round(6).tolist(), "std": std.round(6).tolist(), "measured": self.images}
        return told if limits is None else told | {"range": list(limits), "outside": round(self.outside / self.values, 6)}


def how_many_measured(count: int, size: int) -> int:
    """Of `count` images of `size` bytes together: all of few."""
    return min(count, MEASURED, max(FEWEST, MEASURED_BYTES * count // max(1, size)))


def evenly(count: int, chosen: int) -> NDArray[np.int64]:
    """Places of so many of `count`, evenly spread."""
    return np.arange(chosen) * count // max(1, chosen)


def pixels_to_measure(content: bytes, channels: int) -> NDArray[np.uint8]:
    """(C, H, W) of an encoded image; a large JPEG is decoded at a half, a quarter or an eighth of its size, in a third of the time.

    Raises:
        ValueError: as `decode` does.
    """
    if channels in MODES and len(content) > LARGE and content.startswith(b"\xff\xd8\xff"):
        with suppress(Exception), Image.open(io.BytesIO(content)) as picture:  # `decode` will say what is wrong
            picture.draft(MODES[channels], (512, 512))
            array = np.asarray(picture.convert(MODES[channels]))
            return np.atleast_3d(array).transpose(2, 0, 1)
    return decode(content, channels)
