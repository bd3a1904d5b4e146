"""Channel means and deviations of many images, exactly."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

MEASURED = 512  # images of a large set that its means and deviations are measured on: the mean is then right to about 0.005
ENOUGH = 1 << 16  # pixels of an image that count; of larger ones every second row, or every third


@dataclass
class Moments:
    """Sums over uint8 pixels: integers, so the order in which images come does not matter.

    Attributes:
        channels: of every image.
        images: that were added.
        pixels: of all of them.
        total: per channel.
        squares: per channel.
    """

    channels: int
    images: int = 0
    pixels: int = 0
    total: list[int] = field(default_factory=list)
    squares: list[int] = field(default_factory=list)

    def add(self, image_CHW: NDArray[np.uint8]) -> None:
        """Counts one image."""
        height, width = image_CHW.shape[1:]
        rows = max(1, height * width // ENOUGH)
        flat = image_CHW[:, ::rows].reshape(self.channels, -1)
        self.merge(Moments(self.channels, 1, flat.shape[1], flat.sum(1, dtype=np.int64).tolist(),
                           np.square(flat, dtype=np.uint16).sum(1, dtype=np.int64).tolist()))  # fmt: skip

    def merge(self, other: "Moments") -> None:
        """Counts what another has counted."""
        self.images += other.images
        self.pixels += other.pixels
        nothing = [0] * self.channels
        self.total = [a + b for a, b in zip(self.total or nothing, other.total or nothing, strict=True)]
        self.squares = [a + b for a, b in zip(self.squares or nothing, other.squares or nothing, strict=True)]

    def summary(self) -> dict[str, Any]:
        """What an index says of its images: `channels`, `mean` and `std` of pixels in [0, 1], and how many were `measured`."""
        mean = np.array(self.total) / self.pixels / 255
        std = np.sqrt(np.maximum(np.array(self.squares) / self.pixels / 255**2 - mean**2, 1e-12))
        return {"channels": self.channels, "mean": mean.round(6).tolist(), "std": std.round(6).tolist(), "measured": self.images}


def measured_places(count: int) -> NDArray[np.int64]:
    """Which of `count` images in a shuffled order are measured: all of few, else MEASURED of them, evenly spread."""
    return np.arange(count) if count <= MEASURED else np.arange(MEASURED) * count // MEASURED
