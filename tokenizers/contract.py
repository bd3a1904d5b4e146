"""What every image tokenizer offers, whoever made it.

Legend: B batch, C channels, H W pixels, P Q cells of the token grid (P = H / stride, Q = W / stride), V codebook size.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mimetic.engine.errors import SettingError


@runtime_checkable
class ImageTokenizer(Protocol):
    """Turns each cell of stride x stride pixels into one of `vocab_size` ids: frozen, deterministic, without gradient."""

    vocab_size: int
    stride: int
    in_channels: int

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Return ids_BPQ, int64 in [0, V), of images in [0, 1]; SettingError if a side is no multiple of the stride."""
        ...


@runtime_checkable
class TrainableTokenizer(ImageTokenizer, Protocol):
    """A tokenizer that learns from images and can draw what its ids stand for."""

    def decode(self, ids_BPQ: Tensor) -> Tensor:
        """Return image_BCHW in [0, 1]."""
        ...

    def loss(
        self, image_BCHW: Tensor, temperature: float, kl_weight: float, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar to minimise, and scalar tensors worth logging."""
        ...


def check_image_fits(image_BCHW: Tensor, stride: int, channels: int) -> None:
    """Raise SettingError unless images have `channels` channels and sides that `stride` divides."""
    if image_BCHW.ndim != 4 or image_BCHW.shape[1] != channels:
        raise SettingError(
            f"the tokenizer takes images of shape (batch, {channels}, height, width), and got {tuple(image_BCHW.shape)}: "
            f"convert the images to {channels} channel(s), or train a tokenizer for theirs"
        )
    for side, pixels in zip(("height", "width"), image_BCHW.shape[2:], strict=True):
        if pixels == 0 or pixels % stride:
            smaller, larger = pixels // stride * stride, (pixels // stride + 1) * stride
            cure = f"{smaller} or {larger}" if smaller else f"{larger}"
            raise SettingError(f"image {side} {pixels} is no multiple of the tokenizer's stride {stride}: resize to {cure}")
