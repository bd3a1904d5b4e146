"""idx files, MNIST's format (http://yann.lecun.com/exdb/mnist/)."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mimetic.engine.errors import DataError


def read_images(source: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Images (N, H, W) of an idx file, and the labels (N,) of the file beside it, if there is one.

    Raises:
        DataError: damaged, of other dimensions, or labels that are not as many as the images.
    """
    images = read_idx(source)
    if images.ndim != 3 or not images.size:
        raise DataError(f"{source}: an idx file of shape {images.shape}; images have 3 dimensions (name the images file)")
    beside = source.with_name(source.name.replace("images-idx3", "labels-idx1"))
    labels = read_idx(beside) if beside != source and beside.exists() else None
    if labels is not None and labels.ndim != 1:
        raise DataError(f"{beside}: an idx file of shape {labels.shape}; labels have 1 dimension")
    if labels is not None and len(labels) != len(images):
        raise DataError(f"{beside} has {len(labels)} labels, {source.name} has {len(images)} images")
    return images, labels


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of an idx file of bytes, gzipped or not.

    Raises:
        DataError: no idx file, or cut off.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {error}") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08" or not 1 <= content[3] <= 4:
        raise DataError(f"{path} is no idx file of bytes, no tar, no .csv, .tsv or .jsonl, nor a folder")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise DataError(f"{path} is cut off: {len(content)} bytes, its header alone has {header}")
    dimensions = np.frombuffer(content, ">u4", content[3], 4).tolist()
    values = np.frombuffer(content, np.uint8, offset=header)
    if len(values) != math.prod(dimensions):
        raise DataError(f"{path} is cut off: {len(values)} values, its header says {math.prod(dimensions)}")
    return values.reshape(dimensions)
