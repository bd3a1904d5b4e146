"""Pictures as views meet them: encoded until pixels are asked for."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mimetic.data.decode import by_pillow, jpeg_crop
from mimetic.data.jpeg import Box, Jpeg
from mimetic.data.pixelrange import Range, mapped


class Picture:
    """An encoded picture: its size at once, its pixels when a box of it is asked for.

    A JPEG stays encoded until then, so that no more of it is decoded than a view needs. What cannot be read is black and
    8x8 pixels large, so that a batch keeps its shape; whoever made the picture looks at `failed` afterwards.

    Args:
        content: as `decode` takes it.
        channels: C.
        range: as `decode` takes it; pixels are float32 in [0, 1] with one, uint8 without.

    Attributes:
        shape: (C, H, W), upright.
        failed: the bytes are no picture, or not of this many channels. Final once pixels were asked for.
    """

    def __init__(self, content: bytes, channels: int, range: Range | None = None) -> None:
        self._jpeg, self._channels, self._range, self.failed = Jpeg.of(content, channels), channels, range, False
        if self._jpeg is None:
            self._pixels = self._or_black(lambda: _channels_first(np.array(by_pillow(content, channels, deep=range is not None))))
        self.shape = (channels, *(self._jpeg.size if self._jpeg else self._pixels.shape[1:]))

    def crop(self, box: Box, smallest: int | None = None) -> torch.Tensor:
        """(C, h, w): what lies in a box, smaller where it is a JPEG's and has more than `smallest` pixels a side.

        Args as in `Jpeg.crop`.
        """
        jpeg = self._jpeg
        if jpeg is None:
            return self._mapped(cut(self._pixels, box))
        return self._mapped(self._or_black(lambda: _channels_first(jpeg_crop(jpeg, self._channels, box, smallest))))

    def pixels(self) -> torch.Tensor:
        """(C, H, W): all of it."""
        return self.crop((0, 0, *self.shape[1:])).contiguous()

    def _mapped(self, pixels_CHW: torch.Tensor) -> torch.Tensor:
        if self._range is None:
            return pixels_CHW
        if self.failed:
            return torch.zeros_like(pixels_CHW, dtype=torch.float32)
        return torch.from_numpy(mapped(pixels_CHW.numpy(), self._range))

    def _or_black(self, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        try:
            return read()
        except ValueError:
            self.failed = True
            return torch.zeros(self._channels, 8, 8, dtype=torch.uint8)


def _channels_first(array_HWC: NDArray[Any]) -> torch.Tensor:
    """(C, H, W), in memory as it was: what resizes fastest."""
    return torch.from_numpy(array_HWC).permute(2, 0, 1)


def in_unit_range(image: torch.Tensor) -> torch.Tensor:
    """float32 in [0, 1] of pixels as streams carry them, on the device where they are: 8 bits of 0 to 255, floats as they are."""
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def cut(image_CHW: torch.Tensor, box: Box) -> torch.Tensor:
    """What lies in a box."""
    top, left, height, width = box
    return image_CHW[..., top : top + height, left : left + width]
