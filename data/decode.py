"""Bytes to pixels."""

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

NPY_MAGIC = b"\x93NUMPY"
MODES = {1: "L", 3: "RGB"}


def decode(content: bytes, channels: int) -> torch.Tensor:
    """uint8 (C, H, W) from an encoded picture, or from an `.npy` of shape (H, W), (H, W, C).

    EXIF orientation is applied; grey, palette and alpha pictures are brought to `channels`, 16-bit grey is scaled to 8 bits.

    Raises:
        ValueError: the bytes are no picture, or not of this many channels.
    """
    is_array = content.startswith(NPY_MAGIC)
    array = open_array(content) if is_array else _eight_bits(open_picture(content), MODES.get(channels, "RGB"))
    if array.shape[-1] != channels:
        raise ValueError(f"{array.shape[-1]} channels; the index says {channels}")
    return torch.from_numpy(np.array(array.transpose(2, 0, 1), order="C"))  # a copy: Pillow's memory is read-only


def open_picture(content: bytes) -> Image.Image:
    """A fully read Pillow image, upright.

    Raises:
        ValueError: the bytes are no picture that Pillow reads, or they are cut off.
    """
    try:
        picture = Image.open(io.BytesIO(content))
        ImageOps.exif_transpose(picture, in_place=True)
        return picture
    except Exception as error:  # a damaged file can raise nearly anything, and must not end a training
        raise ValueError(str(error).replace("<_io.BytesIO object at ", "<").split("<")[0].strip() or "unreadable") from None


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


def _eight_bits(picture: Image.Image, mode: str) -> NDArray[np.uint8]:
    """(H, W, C), in Pillow's mode L or RGB."""
    if picture.mode in ("I", "F"):
        raise ValueError("32-bit pixels, whose range is not known; convert them to 8 or 16 bits")
    if picture.mode.startswith("I;16"):  # Pillow's own conversion would clip to 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # straight to RGB, Pillow warns
    array = np.asarray(picture if picture.mode == mode else picture.convert(mode))
    return array[..., None] if array.ndim == 2 else array
