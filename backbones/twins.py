"""Twins (arXiv:2104.13840): attention within windows and attention to a summary of the whole map, positions from a convolution.

Legend: B batch, C channels, H W pixels, P Q mask grid, h w feature grid, N = h*w tokens, M tokens of the summary, D width, n heads,
d width of a head.
"""

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mimetic.backbones.contract import Grid, sides
from mimetic.backbones.layers import PatchStem, drop_path, drop_path_rates, init_linear_, mlp, neighbours
from mimetic.backbones.staged import Stage, Staged
from mimetic.backbones.swin import windows_of
from mimetic.backbones.windows import Windows, attend, check_tiling
from mimetic.engine.errors import SettingError


class Twins(Staged):
    """Twins-PCPVT, or with windows Twins-SVT; arguments beyond the first three bear timm's names.

    Args:
        image_size: side or (H, W) in pixels, a multiple of the stride (32 with four stages); windows must tile every map.
        in_channels: C.
        num_classes: outputs of the classifier; 0 for none.
        patch_size: side of the stem's patches in pixels.
        embed_dims: D of each stage. depths: blocks of each. num_heads: n of each. mlp_ratios: hidden width of the MLP over D.
        sr_ratios: side of the square of tokens that one token of the summary stands for, in each stage.
        wss: side of a window in each stage; every other block, from the first, attends within windows. None (PCPVT): no windows.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.

    Raises:
        SettingError: arguments that contradict each other, both named.
    """

    def __init__(
        self, image_size: int | Sequence[int] = 224, in_channels: int = 3, num_classes: int = 0, *,
        patch_size: int = 4, embed_dims: Sequence[int] = (64, 128, 256, 512), depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (1, 2, 4, 8), mlp_ratios: Sequence[float] = (4, 4, 4, 4), sr_ratios: Sequence[int] = (8, 4, 2, 1),
        wss: Sequence[int] | None = None, drop_path_rate: float = 0.0,
    ) -> None:
        image, strides = sides(image_size), [patch_size << stage for stage in range(len(depths))]
        super().__init__(image, in_channels, num_classes, embed_dims, depths, patch_size, strides[-1])
        for name, values in {"num_heads": num_heads, "mlp_ratios": mlp_ratios, "sr_ratios": sr_ratios, "wss": wss}.items():
            if values is not None and len(values) != len(depths):
                raise SettingError(f"{name} {list(values)} has {len(values)} values, there are {len(depths)} stages; give one for each")
        if any(width % heads for width, heads in zip(embed_dims, num_heads, strict=True)):
            raise SettingError(f"num_heads {list(num_heads)} must divide embed_dims {list(embed_dims)}")
        if wss:
            check_tiling(image, strides, [(side, side) for side in wss], smaller_maps=False)
        self.stem = PatchStem(self.stem_grid, (patch_size, patch_size), in_channels, embed_dims[0], nn.LayerNorm(embed_dims[0]))
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            grid, width = (image[0] // strides[i], image[1] // strides[i]), embed_dims[i]
            local = windows_of(grid, (wss[i], wss[i]), num_heads[i], shifted=False) if wss else None
            _check_summary(grid, sr_ratios[i])
            blocks = []
            for j, rate in enumerate(rates):
                attention: nn.Module
                if local is not None and j % 2 == 0:
                    attention = LocallyGroupedAttention(width, local, grid)
                else:
                    attention = GlobalSubsampledAttention(width, num_heads[i], sr_ratios[i])
                blocks.append(TwinsBlock(width, attention, mlp_ratios[i], rate, positions=j == 0))
            stages.append(Stage(PatchMerge(embed_dims[i - 1], width) if i else nn.Identity(), blocks))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        init_linear_(self)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels // part.groups
                nn.init.normal_(part.weight, std=math.sqrt(2 / fan_out))
                nn.init.zeros_(part.bias)  # type: ignore[arg-type]  # all of these have one

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits, or pooled features without classes."""
        return self.head(self.norm(self.encode(image_BCHW)).mean((1, 2)))

    def timm_name(self, name: str) -> str:
        """Name in timm's model, where blocks, steps between stages and positions are three lists."""
        name = re.sub("^stem", "patch_embeds.0", name)
        name = re.sub(r"^stages\.(\d+)\.downsample", r"patch_embeds.\1", name)
        name = re.sub(r"^stages\.(\d+)\.blocks\.0\.position\.", r"pos_block.\1.proj.0.", name)
        return re.sub(r"^stages\.(\d+)\.blocks\.", r"blocks.\1.", name)

    def no_weight_decay_names(self) -> set[str]:
        """Also the convolutions that make positions."""
        return super().no_weight_decay_names() | {name for name, _ in self.named_parameters() if ".position." in name}


def _check_summary(grid: Grid, ratio: int) -> None:
    if min(grid) < ratio:
        raise SettingError(f"a map of {grid[0]}x{grid[1]} tokens is smaller than sr_ratios' {ratio}; set a larger image_size or a "
                           "smaller ratio")  # fmt: skip


class TwinsBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); the first block of a stage ends with the position encoding."""

    def __init__(self, width: int, attention: nn.Module, mlp_ratio: float, drop_path: float, positions: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = attention
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = mlp(width, int(width * mlp_ratio))
        self.drop_path = drop_path
        # Conditional positions (arXiv:2102.10882): a depthwise convolution whose padding tells it where the border is.
        self.position = nn.Conv2d(width, width, 3, padding=1, groups=width) if positions else None

    def forward(self, x_BhwD: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        x_BhwD = x_BhwD + drop_path(self.attn(self.norm1(x_BhwD)), self.drop_path, self.training)
        x_BhwD = x_BhwD + drop_path(self.mlp(self.norm2(x_BhwD)), self.drop_path, self.training)
        if self.position is None:
            return x_BhwD
        return x_BhwD + rearrange(self.position(rearrange(x_BhwD, "B h w D -> B D h w")), "B D h w -> B h w D")

    def reach(self, seen_hw: Tensor) -> Tensor:
        """Places whose tokens those of `seen_hw` can have used."""
        if self.position is not None:
            seen_hw = neighbours(seen_hw)
        return self.attn.windows.reach(seen_hw) if isinstance(self.attn, LocallyGroupedAttention) else torch.ones_like(seen_hw)


class LocallyGroupedAttention(nn.Module):
    """Multi-head self-attention within windows, without shift or bias."""

    def __init__(self, width: int, windows: Windows, grid: Grid) -> None:
        super().__init__()
        self.windows, self.grid = windows, grid
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BhwD: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        return self.proj(self.windows.merge(attend(self.windows.split(self.qkv(x_BhwD))), self.grid))


class GlobalSubsampledAttention(nn.Module):
    """Every token attends to a summary of the map: one token for each square of `ratio` times `ratio`."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.sr = nn.Conv2d(width, width, ratio, ratio) if ratio > 1 else None
        self.norm = nn.LayerNorm(width) if ratio > 1 else None

    def forward(self, x_BhwD: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        h, w = x_BhwD.shape[1:3]
        q_BnNd = rearrange(self.q(x_BhwD), "B h w (n d) -> B n (h w) d", n=self.heads)
        if self.sr is not None and self.norm is not None:
            x_BhwD = self.norm(rearrange(self.sr(rearrange(x_BhwD, "B h w D -> B D h w")), "B D h w -> B h w D"))
        k_BnMd, v_BnMd = rearrange(self.kv(x_BhwD), "B h w (kv n d) -> kv B n (h w) d", kv=2, n=self.heads)
        x_BnNd = F.scaled_dot_product_attention(q_BnNd, k_BnMd, v_BnMd)
        return self.proj(rearrange(x_BnNd, "B n (h w) d -> B h w (n d)", h=h, w=w))


class PatchMerge(nn.Module):
    """2x2 squares of tokens projected to one token each, then normed."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(inside, outside, 2, 2), nn.LayerNorm(outside)

    def forward(self, x_BhwD: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h / 2, w / 2, D')."""
        return self.norm(rearrange(self.proj(rearrange(x_BhwD, "B h w D -> B D h w")), "B D h w -> B h w D"))

    def reach(self, seen_hw: Tensor) -> Tensor:
        """Places of the larger map that those of `seen_hw` are made of."""
        return seen_hw.repeat_interleave(2, 0).repeat_interleave(2, 1)
