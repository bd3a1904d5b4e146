"""JPEGs by libjpeg-turbo (simplejpeg), which can leave out what a small view does not need.

A picture of 1/2, 3/8, 1/4 or 1/8 of the size comes straight from the coefficients. What is odd or damaged is not read here: it is
Pillow's to decide. Whole pictures are Pillow's to the last bit.

Legend: C channels, H W pixels. A box is (top, left, height, width) in pixels of the upright picture.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

Box = tuple[int, int, int, int]

SOI, SOS, APP1 = b"\xff\xd8", 0xDA, 0xE1
COLOURS = {(1, "Gray"): "GRAY", (3, "Gray"): "RGB", (3, "YCbCr"): "RGB", (3, "RGB"): "RGB"}  # (wanted, as written): as read
EIGHTHS = (1, 2, 3, 4, 8)  # of the size; libjpeg has all, but lacks vector code for those left out: they take as long as the whole
ORIENTATION = 0x0112
UPRIGHT = {  # EXIF orientation: are rows and columns to be swapped; are rows, are columns to be turned round afterwards
    1: (False, False, False), 2: (False, False, True), 3: (False, True, True), 4: (False, True, False),
    5: (True, False, False), 6: (True, False, True), 7: (True, True, True), 8: (True, True, False),
}  # fmt: skip


@dataclass(frozen=True)
class Jpeg:
    """A JPEG by its header.

    Attributes:
        content: the file.
        colour: simplejpeg's name for what it is to be read as.
        encoded_HW: size as encoded.
        orientation: EXIF's, 1 to 8.
    """

    content: bytes
    colour: str
    encoded_HW: tuple[int, int]
    orientation: int

    @staticmethod
    def of(content: bytes, channels: int) -> "Jpeg | None":
        """None where it is better left to Pillow: no JPEG, CMYK, a damaged header, grey wanted of colours, too many pixels."""
        if not content.startswith(SOI):
            return None
        try:
            height, width, written, _ = simplejpeg.decode_jpeg_header(content)
            orientation = _orientation(content)
        except Exception:  # damage can raise nearly anything; Pillow will have the words for it
            return None
        if (channels, written) not in COLOURS or height * width > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        return Jpeg(content, COLOURS[channels, written], (height, width), orientation)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the upright picture."""
        return self.encoded_HW[::-1] if UPRIGHT[self.orientation][0] else self.encoded_HW

    def crop(self, box: Box, smallest: int | None = None) -> NDArray[np.uint8]:
        """uint8 (h, w, C), upright: what lies in a box.

        Args:
            box: inside the picture.
            smallest: pixels a side that are enough. A larger box comes at 1/2, 3/8, 1/4 or 1/8 of its size, whichever is the
                least that has them, its edges moved to the nearest pixel of that size.

        Raises:
            ValueError: there is something about the file, not always a damage.
        """
        eighths = 8 if smallest is None else next((e for e in EIGHTHS if e * min(box[2:]) >= 8 * (smallest + 1)), 8)
        height, width = (-(-side * eighths // 8) for side in self.encoded_HW)
        try:
            array = simplejpeg.decode_jpeg(self.content, self.colour, min_height=height, min_width=width)
        except Exception as error:
            raise ValueError(str(error)) from None
        cut = self._cut(array, box, eighths)
        return cut if min(cut.strides) > 0 else np.ascontiguousarray(cut)  # torch cannot read backwards

    def _cut(self, array: NDArray[np.uint8], box: Box, eighths: int) -> NDArray[np.uint8]:
        """The box is turned as the file is, cut, and turned back: the edges of a reduced picture need not be whole pixels."""
        swapped, rows_turned, columns_turned = UPRIGHT[self.orientation]
        top, left, height, width = box
        if rows_turned:
            top = self.size[0] - top - height
        if columns_turned:
            left = self.size[1] - left - width
        rows, columns = (slice((start * eighths + 4) // 8, ((start + length) * eighths + 4) // 8)
                         for start, length in ((top, height), (left, width)))  # fmt: skip
        cut = array[columns, rows].swapaxes(0, 1) if swapped else array[rows, columns]
        return cut[:: -1 if rows_turned else 1, :: -1 if columns_turned else 1]


def _orientation(content: bytes) -> int:
    """Pillow is asked only where there may be something to find: that takes as long as a tenth of a small picture."""
    if not _may_be_turned(content):
        return 1
    orientation = Image.open(io.BytesIO(content)).getexif().get(ORIENTATION, 1)
    return orientation if orientation in UPRIGHT else 1


def _may_be_turned(content: bytes) -> bool:
    """A segment APP1, where EXIF and XMP are, comes before the pixels, or segments do not follow each other."""
    place = len(SOI)
    while content[place] == 0xFF and content[place + 1] not in (SOS, APP1):
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return content[place] != 0xFF or content[place + 1] == APP1
