"""Bytes to pixels.

Plain JPEGs are read by libjpeg-turbo itself (`mimetic.data.jpeg`), arrays by numpy, everything else by Pillow. Without a pixel range
all pixels are 8 bits; with one they are read as deep as they were written, and mapped to [0, 1].
"""

import io
import re
import warnings
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mimetic.data.jpeg import Box, Jpeg
from mimetic.data.pixelrange import Range, mapped

NPY_MAGIC = b"\x93NUMPY"
MODES = {1: "L", 3: "RGB"}
DTYPES = ("uint8", "uint16", "int16", "float16", "float32", "float64")  # of arrays


def decode(content: bytes, channels: int, range: Range | None = None) -> NDArray[Any]:
    """(C, H, W) from an encoded picture, or from an `.npy` of shape (H, W), (H, W, C).

    EXIF orientation is applied; grey, palette and alpha pictures are brought to `channels`. Pictures are read up to Pillow's limit
    of 179 million pixels; beyond it they are to be cut into tiles.

    Args:
        range: the values that become 0 and 1: then pixels are float32 in [0, 1], of whatever depth they were written with.
            Without one they are uint8, and 16-bit grey is scaled to 8 bits.

    Raises:
        ValueError: the bytes are no picture, not of this many channels, or too deep to be read without a range.
    """
    array = whole(content, channels, deep=range is not None)
    array = array if range is None else mapped(array, range)
    return np.array(array.transpose(2, 0, 1), order="C")  # a copy: Pillow's memory is read-only


def whole(content: bytes, channels: int, *, deep: bool = False) -> NDArray[Any]:
    """(H, W, C): all pixels, perhaps read-only; uint8, or if `deep` as they were written. Raises as `decode` does."""
    jpeg = Jpeg.of(content, channels)
    return by_pillow(content, channels, deep=deep) if jpeg is None else jpeg_crop(jpeg, channels, (0, 0, *jpeg.size))


def open_picture(content: bytes) -> Image.Image:
    """A fully read Pillow image, upright.

    Raises:
        ValueError: the bytes are no picture that Pillow reads, they are cut off, or there are too many pixels.
    """
    try:
        picture = Image.open(io.BytesIO(content))
        ImageOps.exif_transpose(picture, in_place=True)
        return picture
    except Image.DecompressionBombError as error:
        raise ValueError(f"{str(error).partition(',')[0]}; cut it into tiles") from None
    except Exception as error:  # a damaged file can raise nearly anything, and must not end a training
        raise ValueError(str(error).replace("<_io.BytesIO object at ", "<").split("<")[0].strip() or "unreadable") from None


def silence_pillow() -> None:
    """Pillow warns of many pixels and of odd EXIF: nothing that stops a picture from being used.

    Once for a process: a filter around every picture costs 4 % of the time that a small one takes.
    """
    warnings.filterwarnings("ignore", module=r"PIL\b")


def open_array(content: bytes) -> NDArray[Any]:
    """The (H, W, C) array of an `.npy`, of one of DTYPES.

    Raises:
        ValueError: damaged, of another dtype, or not of shape (H, W) or (H, W, C) with pixels in it.
    """
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # the header is Python text: damage can raise nearly anything
        raise ValueError(f"damaged npy ({error})") from None
    if array.dtype.name not in DTYPES or array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"npy of {array.dtype} {array.shape}; it must be (H, W) or (H, W, C) of {', '.join(DTYPES)}")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array[..., None] if array.ndim == 2 else array


def is_deep(file: BinaryIO) -> bool:
    """Whether pixels have more than 8 bits, by the header alone; False where it cannot be read."""
    try:
        if file.read(len(NPY_MAGIC)) != NPY_MAGIC:
            file.seek(0)
            return Image.open(file).mode.startswith(("I", "F"))
        file.seek(0)
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version](file)
        return header[2].name in DTYPES[1:]
    except Exception:  # damage can raise nearly anything; `decode` will say what is wrong
        return False


def channels_of(file: BinaryIO) -> int:
    """A picture's 1 or 3, by its header alone; an array's own number; 0 where neither can be read."""
    try:
        is_array = file.read(len(NPY_MAGIC)) == NPY_MAGIC
        file.seek(0)
        if is_array:
            return open_array(file.read()).shape[-1]
        return {"L": 1, "RGB": 3}[Image.getmodebase(Image.open(file).mode)]
    except Exception:  # as above; `decode` will say what is wrong
        return 0


def is_sixteen_bits(picture: Image.Image) -> bool:
    """Whether it is grey of 16 bits, which Pillow reads in several modes."""
    return picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PPM")


def jpeg_crop(jpeg: Jpeg, channels: int, box: Box, smallest: int | None = None) -> NDArray[np.uint8]:
    """(h, w, C): what lies in a box, by libjpeg if it can, else by Pillow. Args as in `Jpeg.crop`.

    Raises:
        ValueError: neither can.
    """
    try:
        return jpeg.crop(box, smallest)
    except ValueError:  # libjpeg was told to stop at the least doubt
        top, left, height, width = box
        return np.array(by_pillow(jpeg.content, channels)[top : top + height, left : left + width])


def by_pillow(content: bytes, channels: int, *, deep: bool = False) -> NDArray[Any]:
    """(H, W, C), upright: a picture by Pillow, an array by numpy. uint8, or if `deep` as it was written.

    Raises:
        ValueError: the bytes are neither, not of this many channels, or of numbers that are not finite; too deep unless `deep`.
    """
    mode = MODES.get(channels, "RGB")
    if content.startswith(NPY_MAGIC):
        array = open_array(content)
    else:
        picture = open_picture(content)
        array = _as_written(picture, content, mode) if deep else _eight_bits(picture, mode)
    if array.dtype != np.uint8 and not deep:
        raise ValueError(f"npy of {array.dtype} {array.shape}; it must be uint8 (H, W, C), or be packed with --range LOW HIGH")
    if array.shape[-1] != channels:
        raise ValueError(f"{array.shape[-1]} channels, where {channels} are wanted")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("pixels that are not finite (NaN or infinite)")
    return array


def _as_written(picture: Image.Image, content: bytes, mode: str) -> NDArray[Any]:
    """(H, W, C): a grey picture of more than 8 bits with its own numbers, in each channel of Pillow's mode; others with 8 bits.

    Raises:
        ValueError: a colour picture of more than 8 bits, which Pillow would cut to them.
    """
    if picture.mode.startswith(("I", "F")):
        array = np.asarray(picture)
        return np.repeat(array.astype(array.dtype.newbyteorder("="), copy=False)[..., None], len(mode) if mode == "RGB" else 1, -1)
    if _bits(picture, content) > 8:
        raise ValueError(f"a {picture.format} of {_bits(picture, content)} bits a colour, of which only 8 are read; write it as .npy")
    return _eight_bits(picture, mode)


def _bits(picture: Image.Image, content: bytes) -> int:
    """Of each colour, in the file."""
    if picture.format == "PNG":
        return content[24]
    if picture.format == "TIFF":
        return int(max(picture.tag_v2.get(258, (8,))))  # type: ignore[attr-defined]  # BitsPerSample
    if content[:2] in (b"P3", b"P6"):
        return int(re.sub(rb"#[^\n]*", b"", content[:4096]).split(None, 4)[3]).bit_length()
    return 8


def _eight_bits(picture: Image.Image, mode: str) -> NDArray[np.uint8]:
    """(H, W, C), in Pillow's mode L or RGB."""
    sixteen_bits = is_sixteen_bits(picture)
    if picture.mode in ("I", "F") and not sixteen_bits:
        raise ValueError("32-bit pixels, whose range is not known; convert them to 8 or 16 bits, or pack with --range LOW HIGH")
    if sixteen_bits:  # Pillow's own conversion would clip to 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # straight to RGB, Pillow warns
    array = np.asarray(picture if picture.mode == mode else picture.convert(mode))
    return array[..., None] if array.ndim == 2 else array
