"""DALL-E's dVAE as image tokenizer (Ramesh et al., arXiv 2102.12092, appendix A): the network whose weights OpenAI published.

Layers bear the names of its code, https://github.com/openai/DALL-E, less `blocks`: `encoder.group_1.block_1.res_path.conv_1.weight`.

Legend: B batch, C channels, H W pixels, P Q cells (P = H / 8, Q = W / 8), D width, V codebook size.
"""

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimetic.tokenizers.contract import check_image_fits
from mimetic.tokenizers.logit_laplace import map_pixels, unmap_pixels

GROUPS = 4


class DalleTokenizer(nn.Module):
    """The encoder alone: all that pretraining needs.

    Args:
        vocab_size: V.
        in_channels: C.
        n_hid: Width of the first group; each further one is twice as wide.
        n_blk_per_group: Residual blocks in each of the four groups.
    """

    stride = 8

    def __init__(self, vocab_size: int = 8192, in_channels: int = 3, n_hid: int = 256, n_blk_per_group: int = 2) -> None:
        super().__init__()
        self.vocab_size, self.in_channels, self.n_hid, self.n_blk_per_group = vocab_size, in_channels, n_hid, n_blk_per_group
        self.encoder = build_encoder(vocab_size, in_channels, n_hid, n_blk_per_group)
        self.to(memory_format=torch.channels_last)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments: `type(self)(**config)` has this one's shapes."""
        return {name: getattr(self, name) for name in ("vocab_size", "in_channels", "n_hid", "n_blk_per_group")}

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Return ids_BPQ, int64 in [0, V): the likeliest code of each cell of images in [0, 1]. The same under autocast.

        Raises:
            SettingError: a side is no multiple of 8, the channels are others, or pixels are not in [0, 1].
        """
        check_image_fits(image_BCHW, self.stride, self.in_channels)
        return self.logits(image_BCHW).max(-1).indices  # on a CPU argmax takes more than twice as long

    def logits(self, image_BCHW: Tensor) -> Tensor:
        """Return logits_BPQV of images in [0, 1]. The last layer is in fp32 always: many cells are near ties, bf16 would make them ties."""
        layers: list[Any] = list(self.encoder)
        *trunk, output = layers
        with torch.autocast(image_BCHW.device.type, enabled=False):
            x_BDhw = map_pixels(image_BCHW.float()).to(trunk[0].weight.dtype, memory_format=torch.channels_last)
            for layer in trunk:
                x_BDhw = layer(x_BDhw)
            features_BPQD = output.relu(x_BDhw).movedim(1, -1).float()
            return F.linear(features_BPQD, output.conv.weight.flatten(1), output.conv.bias)  # as a convolution it takes longer

    def encode_in(self, dtype: torch.dtype) -> None:
        """Compute all but the last layer of `encode` in this dtype. Weights are cast once and for good, so this is not for saving."""
        for layer in list(self.encoder)[:-1]:
            layer.to(dtype)


class DalleVAE(DalleTokenizer):
    """Encoder and decoder.

    Args:
        vocab_size: V.
        in_channels: C.
        n_hid: Width of the encoder's first group and of the decoder's last.
        n_blk_per_group: Residual blocks in each of the four groups, on each side.
        n_init: Width of a code vector in the decoder.
    """

    def __init__(self, vocab_size: int = 8192, in_channels: int = 3, n_hid: int = 256, n_blk_per_group: int = 2,
                 n_init: int = 128) -> None:  # fmt: skip
        super().__init__(vocab_size, in_channels, n_hid, n_blk_per_group)
        self.n_init = n_init
        self.decoder = build_decoder(vocab_size, in_channels, n_hid, n_blk_per_group, n_init)
        self.to(memory_format=torch.channels_last)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().config | {"n_init": self.n_init}

    @torch.no_grad()
    def decode(self, ids_BPQ: Tensor) -> Tensor:
        """Return image_BCHW in [0, 1], the mode of what the decoder draws from ids_BPQ in [0, V). In fp32 under autocast too."""
        with torch.autocast(ids_BPQ.device.type, enabled=False):
            mean_BCHW = self.draw(ids_BPQ)[:, : self.in_channels]  # the other half are scales
            return unmap_pixels(mean_BCHW.sigmoid())

    def draw(self, ids_BPQ: Tensor) -> Tensor:
        """Return (B, 2C, H, W): location and log scale of each pixel's logit-Laplace distribution."""
        parts: list[Any] = list(self.decoder)
        table, *layers = parts
        x_BDhw = F.embedding(ids_BPQ, table.weight.flatten(1).T) + table.bias  # a 1x1 convolution of one-hot vectors
        x_BDhw = x_BDhw.movedim(-1, 1)
        for layer in layers:
            x_BDhw = layer(x_BDhw)
        return x_BDhw


class Block(nn.Module):
    """id_path(x) + post_gain * res_path(x); res_path is four convolutions of these kernels, each after a ReLU."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, int, int, int], post_gain: float) -> None:
        super().__init__()
        self.post_gain = post_gain
        self.id_path = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = (n_in, *[n_out // 4] * 3, n_out)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, ((before, after), kernel) in enumerate(zip(pairwise(widths), kernels, strict=True), 1):
            layers[f"relu_{i}"] = nn.ReLU(inplace=i > 1)  # the first one's input is the id_path's too
            layers[f"conv_{i}"] = nn.Conv2d(before, after, kernel, padding=kernel // 2)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_in, h, w) to (B, n_out, h, w)."""
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.post_gain)


def build_encoder(vocab_size: int, in_channels: int, n_hid: int, n_blk_per_group: int) -> nn.Sequential:
    """(B, C, H, W) to (B, V, P, Q): `input`, four groups with a max-pooling after each but the last, `output`."""
    widths = [n_hid, *(n_hid << i for i in range(GROUPS))]
    groups = _groups(widths, (3, 3, 3, 1), n_blk_per_group, ("pool", nn.MaxPool2d(2)))
    output = _named(relu=nn.ReLU(), conv=nn.Conv2d(widths[-1], vocab_size, 1))
    return _named(input=nn.Conv2d(in_channels, n_hid, 7, padding=3), **groups, output=output)


def build_decoder(vocab_size: int, in_channels: int, n_hid: int, n_blk_per_group: int, n_init: int) -> nn.Sequential:
    """(B, V, P, Q) to (B, 2C, H, W): `input`, four groups with an upsampling after each but the last, `output`."""
    widths = [n_init, *(n_hid << i for i in reversed(range(GROUPS)))]
    groups = _groups(widths, (1, 3, 3, 3), n_blk_per_group, ("upsample", nn.Upsample(scale_factor=2, mode="nearest")))
    output = _named(relu=nn.ReLU(), conv=nn.Conv2d(widths[-1], 2 * in_channels, 1))
    return _named(input=nn.Conv2d(vocab_size, n_init, 1), **groups, output=output)


def _groups(widths: list[int], kernels: tuple[int, int, int, int], blocks: int, resize: tuple[str, nn.Module]) -> dict[str, nn.Module]:
    post_gain = 1 / (GROUPS * blocks) ** 2
    groups: dict[str, nn.Module] = {}
    for number, (before, after) in enumerate(pairwise(widths), 1):
        layers = {f"block_{i + 1}": Block(after if i else before, after, kernels, post_gain) for i in range(blocks)}
        groups[f"group_{number}"] = _named(**layers, **dict([resize] if number < GROUPS else []))
    return groups


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))
