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


@runtime_checkable
class EncodesInAnyPrecision(ImageTokenizer, Protocol):
    """A tokenizer that can encode in less than fp32."""

    def encode_in(self, dtype: torch.dtype) -> None:
        """Compute `encode` in this dtype from now on, ids still chosen by fp32 logits. Casts weights for good: not for saving."""
        ...


def only_size(tokenizer: ImageTokenizer) -> int | None:
    """The side in pixels of a tokenizer that takes square images of one size alone, its `image_size`; None for one that takes any."""
    return getattr(tokenizer, "image_size", None)


def check_image_fits(image_BCHW: Tensor, stride: int, channels: int) -> None:
    """Raise SettingError unless images have `channels` channels, sides that `stride` divides, and floats in [0, 1].

    On an accelerator the range is looked at there, without a wait: a violation ends the process at the next one.
    """
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
    if not image_BCHW.is_floating_point():
        raise SettingError(f"the tokenizer takes pixels as floats in [0, 1], and got {_dtype(image_BCHW)}: divide by 255")
    if image_BCHW.numel():
        _check_range(image_BCHW)


def _check_range(image_BCHW: Tensor) -> None:
    low, high = image_BCHW.aminmax()  # both NaN where any pixel is
    within = (low >= 0) & (high <= 1)
    if torch.compiler.is_compiling() or image_BCHW.device.type != "cpu":
        torch._assert_async(within, "the tokenizer takes pixels in [0, 1]: divide by 255, and do not normalize")
    elif not within:
        raise SettingError(f"the tokenizer takes pixels in [0, 1], and got {low:.4g} to {high:.4g}: divide by 255, and do not normalize")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
