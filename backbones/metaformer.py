"""MetaFormer and PoolFormer (arXiv:2111.11418): the transformer's frame, in which pooling does as a token mixer.

Legend: B batch, C channels, H W pixels, P Q mask grid, h w feature grid, N = h*w tokens, D width, n heads, d width of a head.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mimetic.backbones.contract import Grid, hide, repeat_mask, sides, zero_hidden
from mimetic.backbones.layers import Gelu, PlacesLinear, drop_path, drop_path_rates, neighbours
from mimetic.backbones.staged import Stage, Staged
from mimetic.engine.errors import SettingError

STRIDE = 4  # of the stem


class MetaFormer(Staged):
    """A MetaFormer with four resolutions; with pooling everywhere it is a PoolFormer. Names of arguments are timm's.

    Args:
        image_size: side or (H, W) in pixels, a multiple of the stride (32 with four stages).
        in_channels: C.
        num_classes: outputs of the classifier; 0 for none.
        depths: blocks of each stage. dims: D of each stage.
        token_mixers: what mixes tokens, for all stages or for each: pooling, attention, spatial_mlp (a linear layer over the
            places, as in ResMLP), identity.
        layer_scale_init_values: initial factor on each branch.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.

    Raises:
        SettingError: arguments that contradict each other, both named.
    """

    channels_last = False

    def __init__(
        self, image_size: int | Sequence[int] = 224, in_channels: int = 3, num_classes: int = 0, *,
        depths: Sequence[int] = (2, 2, 6, 2), dims: Sequence[int] = (64, 128, 320, 512),
        token_mixers: str | Sequence[str] = "pooling", layer_scale_init_values: float = 1e-5, drop_path_rate: float = 0.0,
    ) -> None:
        image, strides = sides(image_size), [STRIDE << stage for stage in range(len(depths))]
        super().__init__(image, in_channels, num_classes, dims, depths, STRIDE, strides[-1])
        mixers = [token_mixers] * len(depths) if isinstance(token_mixers, str) else list(token_mixers)
        if len(mixers) != len(depths) or not set(mixers) <= MIXERS.keys():
            raise SettingError(f"token_mixers {mixers}: give one, or one for each of the {len(depths)} stages, of {', '.join(MIXERS)}")
        self.stem = ConvStem(self.stem_grid, in_channels, dims[0])
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            grid = image[0] // strides[i], image[1] // strides[i]
            blocks = [MetaFormerBlock(dims[i], MIXERS[mixers[i]](dims[i], grid), layer_scale_init_values, rate) for rate in rates]
            stages.append(Stage(Downsampling(dims[i - 1], dims[i]) if i else nn.Identity(), blocks))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits, or pooled features without classes; the norm comes after the mean."""
        return self.head(self.norm(self.encode(image_BCHW).mean((2, 3))))

    def final_map(self, x_BDhw: Tensor) -> Tensor:
        """The map after the norm, each place by itself."""
        return self.norm(x_BDhw.movedim(1, -1)).movedim(-1, 1)

    def timm_name(self, name: str) -> str:
        """Name in timm's model."""
        return re.sub("^norm", "head.norm", re.sub("^head", "head.fc", name))

    def timm_arguments(self) -> dict[str, Any]:
        """Keywords for `timm.create_model`, whose MetaFormers take images of any size."""
        return {name: value for name, value in super().timm_arguments().items() if name not in ("img_size", "layer_scale_init_values")}


class ConvStem(nn.Module):
    """A 7x7 convolution of stride 4: it looks beyond its cell, so hidden pixels are set to 0 before and the mask token put after it."""

    def __init__(self, grid: Grid, channels: int, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(channels, width, 7, STRIDE, 2)
        self.mask_token = nn.Parameter(torch.empty(1, width, 1, 1))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, image_BCHW: Tensor, hidden_BPQ: Tensor | None = None) -> Tensor:
        """(B, C, H, W) and bool (B, P, Q), True = hidden -> (B, D, h, w)."""
        if hidden_BPQ is None:
            return self.conv(image_BCHW)
        hidden_Bhw = repeat_mask(hidden_BPQ, self.grid)
        return hide(self.conv(zero_hidden(image_BCHW, hidden_Bhw)), hidden_Bhw[:, None], self.mask_token)


class Downsampling(nn.Module):
    """A 3x3 convolution of stride 2."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, 2, 1)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D', h / 2, w / 2)."""
        return self.conv(x_BDhw)

    def reach(self, seen_hw: Tensor) -> Tensor:
        """Places of the larger map that those of `seen_hw` can have used."""
        centre_hw = F.conv_transpose2d(seen_hw[None, None].float(), torch.ones(1, 1, 1, 1), stride=2, output_padding=1)[0, 0]
        return neighbours(centre_hw.bool())


class MetaFormerBlock(nn.Module):
    """x + scale * mixer(norm(x)), then x + scale * MLP(norm(x)): a transformer's block, whatever mixes the tokens."""

    def __init__(self, width: int, mixer: nn.Module, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(1, width)
        self.token_mixer = mixer
        self.layer_scale1 = Scale(width, layer_scale)
        self.norm2 = nn.GroupNorm(1, width)
        fc1, fc2 = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=Gelu(), fc2=fc2))
        self.layer_scale2 = Scale(width, layer_scale)
        self.drop_path = drop_path

    def reach(self, seen_hw: Tensor) -> Tensor:
        """Places whose tokens those of `seen_hw` can have used; the norm, whose statistics are the whole map's, is left out."""
        if isinstance(self.token_mixer, Pooling):
            return neighbours(seen_hw)
        return seen_hw if isinstance(self.token_mixer, Identity) else torch.ones_like(seen_hw)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w)."""
        x_BDhw = x_BDhw + self.layer_scale1(drop_path(self.token_mixer(self.norm1(x_BDhw)), self.drop_path, self.training))
        return x_BDhw + self.layer_scale2(drop_path(self.mlp(self.norm2(x_BDhw)), self.drop_path, self.training))


class Scale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), value))

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w)."""
        return x_BDhw * self.scale[:, None, None]


class Pooling(nn.Module):
    """The mean of the 3x3 places around each one, less the place itself, since the block adds it back (the paper's algorithm 1)."""

    def __init__(self, width: int, grid: Grid) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w)."""
        return self.pool(x_BDhw) - x_BDhw


class Attention(nn.Module):
    """Multi-head self-attention over all places, heads 32 wide, no bias on queries, keys and values."""

    def __init__(self, width: int, grid: Grid) -> None:
        super().__init__()
        if width % 32:
            raise SettingError(f"dims {width} is no multiple of 32, the width of an attention head here")
        self.heads = width // 32
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w)."""
        h, w = x_BDhw.shape[-2:]
        qkv = self.qkv(rearrange(x_BDhw, "B D h w -> B (h w) D"))
        q_BnNd, k_BnNd, v_BnNd = rearrange(qkv, "B N (qkv n d) -> qkv B n N d", qkv=3, n=self.heads)
        x_BnNd = F.scaled_dot_product_attention(q_BnNd, k_BnNd, v_BnNd)
        return rearrange(self.proj(rearrange(x_BnNd, "B n N d -> B N (n d)")), "B (h w) D -> B D h w", h=h, w=w)


class SpatialMlp(PlacesLinear):
    """A linear layer over the places, without bias."""

    def __init__(self, width: int, grid: Grid) -> None:
        super().__init__(grid[0] * grid[1], grid[0] * grid[1], bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w)."""
        return super().forward(input.flatten(2).mT).mT.view_as(input)


class Identity(nn.Module):
    """Mixes nothing: what the frame alone can do."""

    def __init__(self, width: int, grid: Grid) -> None:
        super().__init__()

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w)."""
        return x_BDhw


MIXERS: dict[str, Callable[[int, Grid], nn.Module]] = {
    "pooling": Pooling, "attention": Attention, "spatial_mlp": SpatialMlp, "identity": Identity,
}
