"""Small sets of images, made where a test needs them."""

import gzip
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def noise(seed: int, *shape: int) -> Pixels:
    """Random uint8 pixels: no two seeds give the same image."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels: NDArray | Image.Image, kind: str = "png", **options) -> bytes:
    """A picture file's bytes; PNG, BMP and TIFF lose nothing."""
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def as_npy(array: NDArray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def folder_of(root: Path, files: dict[str, bytes]) -> Path:
    """Writes a tree of files and returns its root."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def grey_folder(root: Path, count: int, side: int = 8) -> Path:
    """A flat folder of grey PNGs."""
    return folder_of(root, {f"{i:04d}.png": encoded(noise(i, side, side)) for i in range(count)})


def idx_files(folder: Path, images: Pixels, labels: Pixels | None = None, suffix: str = "") -> Path:
    """MNIST's files, gzipped where `suffix` is ".gz"; returns the one of images."""
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if suffix == ".gz" else bytes
    file = folder / f"train-images-idx3-ubyte{suffix}"
    file.write_bytes(pack(_idx(images)))
    if labels is not None:
        (folder / f"train-labels-idx1-ubyte{suffix}").write_bytes(pack(_idx(labels)))
    return file


def _idx(array: Pixels) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()
