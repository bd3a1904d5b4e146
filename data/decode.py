"""Bytes to pixels."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps

NPY_MAGIC = b"\x93NUMPY"
MODES = {1: "L", 3: "RGB"}


def decode(content: bytes, channels: int) -> torch.Tensor:
    """uint8 (C, H, W) from an encoded picture, or from an `.npy` of shape (H, W), (H, W, C).

    EXIF orientation is applied; grey, palette and alpha pictures are brought to `channels`.

    Raises:
        ValueError: the bytes are no picture, or not of this many channels.
    """
    if content.startswith(NPY_MAGIC):
        array = np.load(io.BytesIO(content), allow_pickle=False)
        array = array[..., None] if array.ndim == 2 else array
        if array.dtype != np.uint8 or array.ndim != 3:
            raise ValueError(f"npy of {array.dtype} {array.shape}; it must be uint8 (H, W, C)")
    else:
        array = np.asarray(open_picture(content).convert(MODES.get(channels, "RGB")))
        array = array[..., None] if array.ndim == 2 else array
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
        picture.load()
        return ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error).replace("<_io.BytesIO object at ", "<").split("<")[0].strip() or "unreadable") from None
