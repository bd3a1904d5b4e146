"""Bytes to pixels.

Plain JPEGs are read by libjpeg-turbo itself (`mimetic.data.jpeg`), arrays by numpy, everything else by Pillow.
"""

import io
import warnings
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mimetic.data.jpeg import Box, Jpeg

NPY_MAGIC = b"\x93NUMPY"
MODES = {1: "L", 3: "RGB"}


def decode(content: bytes, channels: int) -> NDArray[np.uint8]:
    """(C, H, W) from an encoded picture, or from an `.npy` of shape (H, W), (H, W, C).

    EXIF orientation is applied; grey, palette and alpha pictures are brought to `channels`, 16-bit grey is scaled to 8 bits.
    Pictures are read up to Pillow's limit of 179 million pixels; beyond it they are to be cut into tiles.

    Raises:
        ValueError: the bytes are no picture, or not of this many channels.
    """
    jpeg = Jpeg.of(content, channels)
    array = by_pillow(content, channels) if jpeg is None else jpeg_crop(jpeg, channels, (0, 0, *jpeg.size))
    return np.array(array.transpose(2, 0, 1), order="C")  # a copy: Pillow's memory is read-only


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


def open_array(content: bytes) -> NDArray[np.uint8]:
    """The (H, W, C) array of an `.npy`.

    Raises:
        ValueError: damaged, or not uint8 of shape (H, W) or (H, W, C) with pixels in it.
    """
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # the header is Python text: damage can raise nearly anything
        raise ValueError(f"damaged npy ({error})") from None
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"npy of {array.dtype} {array.shape}; it must be uint8 (H, W, C)")
    return array[..., None] if array.ndim == 2 else array


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


def by_pillow(content: bytes, channels: int) -> NDArray[np.uint8]:
    """(H, W, C), upright: a picture by Pillow, an array by numpy.

    Raises:
        ValueError: the bytes are neither, or not of this many channels.
    """
    is_array = content.startswith(NPY_MAGIC)
    array = open_array(content) if is_array else _eight_bits(open_picture(content), MODES.get(channels, "RGB"))
    if array.shape[-1] != channels:
        raise ValueError(f"{array.shape[-1]} channels, where {channels} are wanted")
    return array


def _eight_bits(picture: Image.Image, mode: str) -> NDArray[np.uint8]:
    """(H, W, C), in Pillow's mode L or RGB."""
    sixteen_bits = picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PPM")
    if picture.mode in ("I", "F") and not sixteen_bits:
        raise ValueError("32-bit pixels, whose range is not known; convert them to 8 or 16 bits")
    if sixteen_bits:  # Pillow's own conversion would clip to 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # straight to RGB, Pillow warns
    array = np.asarray(picture if picture.mode == mode else picture.convert(mode))
    return array[..., None] if array.ndim == 2 else array
