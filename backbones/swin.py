"""Swin (arXiv:2103.14030): attention in windows, shifted in every other block, on maps that patch merging halves.

Legend: B batch, C channels, H W pixels, P Q mask grid, h w feature grid, D width, W windows, N tokens of a window, n heads,
d width of a head, G = B*W.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from mimetic.backbones.contract import Grid, sides
from mimetic.backbones.layers import PatchStem, drop_path, drop_path_rates, init_linear_, mlp
from mimetic.backbones.staged import Stage, Staged
from mimetic.backbones.windows import (
    RelativePositionBias,
    Windows,
    attend,
    check_tiling,
    regions,
    tiles,
    window_order,
)
from mimetic.engine.errors import SettingError


class Swin(Staged):
    """A Swin transformer; arguments beyond the first three bear timm's names.

    Args:
        image_size: side or (H, W) in pixels; the windows must tile the map of every stage.
        in_channels: C.
        num_classes: outputs of the classifier; 0 for none.
        patch_size: side of a patch in pixels.
        embed_dim: D of the first stage; it doubles from stage to stage.
        depths: blocks of each stage. num_heads: n of each stage.
        window_size: side or (height, width) of a window in tokens; a map no larger than the window is one window.
        mlp_ratio: hidden width of the MLP over D. qkv_bias: biases of queries, keys and values.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        shifted: False leaves out the shift, the paper's ablation; timm has no such net.

    Raises:
        SettingError: arguments that contradict each other, both named.
    """

    def __init__(
        self, image_size: int | Sequence[int] = 224, in_channels: int = 3, num_classes: int = 0, *,
        patch_size: int = 4, embed_dim: int = 96, depths: Sequence[int] = (2, 2, 6, 2), num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7, mlp_ratio: float = 4.0, qkv_bias: bool = True, drop_path_rate: float = 0.0,
        shifted: bool = True,
    ) -> None:
        def block(stage: int, width: int, windows: Windows, grid: Grid, window: Grid, rate: float) -> nn.Module:
            return SwinBlock(width, windows, grid, window, rate, qkv_bias, mlp_ratio)

        self._build(image_size, in_channels, num_classes, patch_size, embed_dim, depths, num_heads, window_size, drop_path_rate, shifted,
                    PatchMerging, block)  # fmt: skip

    def _build(
        self, image_size: int | Sequence[int], in_channels: int, num_classes: int, patch_size: int, embed_dim: int,
        depths: Sequence[int], num_heads: Sequence[int], window_size: int | Sequence[int], drop_path_rate: float, shifted: bool,
        merging: Callable[[int], nn.Module], block: Callable[[int, int, Windows, Grid, Grid, float], nn.Module],
    ) -> None:
        """What Swin and SwinV2 have in common: all but the step between stages and the block."""
        image, window = sides(image_size), sides(window_size, "window_size")
        widths = [embed_dim << stage for stage in range(len(depths))]
        strides = [patch_size << stage for stage in range(len(depths))]
        super().__init__(image, in_channels, num_classes, widths, depths, patch_size, strides[-1])
        if len(num_heads) != len(depths) or any(heads < 1 or width % heads for width, heads in zip(widths, num_heads, strict=True)):
            raise SettingError(f"num_heads {list(num_heads)} must divide the widths {widths} of the {len(depths)} stages")
        check_tiling(image, strides, [window] * len(depths))
        self.stem = PatchStem(self.stem_grid, (patch_size, patch_size), in_channels, embed_dim, nn.LayerNorm(embed_dim))
        stages = []
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            grid = image[0] // strides[i], image[1] // strides[i]
            here = min(window[0], grid[0]), min(window[1], grid[1])
            kinds = [windows_of(grid, here, num_heads[i], shift) for shift in ((False, shifted) if len(rates) > 1 else (False,))]
            blocks = [block(i, widths[i], kinds[j % 2], grid, here, rate) for j, rate in enumerate(rates)]
            stages.append(Stage(merging(widths[i - 1]) if i else nn.Identity(), blocks))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(self.embed_dim)
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        init_linear_(self)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits, or pooled features without classes."""
        return self.head(self.norm(self.encode(image_BCHW)).mean((1, 2)))

    def timm_name(self, name: str) -> str:
        """Name in timm's model."""
        name = re.sub("^stem", "patch_embed", re.sub("^stages", "layers", name))
        return re.sub("^head", "head.fc", name).replace(".rel_pos_bias.", ".")

    def timm_arguments(self) -> dict[str, Any]:
        """Keywords for `timm.create_model`; it refuses the one that leaves out the shift, for it has no such net."""
        return {name: value for name, value in super().timm_arguments().items() if (name, value) != ("shifted", True)}


def windows_of(grid: Grid, window: Grid, heads: int, shifted: bool) -> Windows:
    """The windows of a map, those of every other block moved by half a window; a side of one window is not shifted."""
    rows, columns = (tile // 2 if shifted and tile < side else 0 for tile, side in zip(window, grid, strict=True))
    shift = rows, columns
    region_T = tiles(regions(grid, window, shift), window) if any(shift) else None
    return Windows(window_order(grid, window, shift), window[0] * window[1], heads, region_T)


class SwinBlock(nn.Module):
    """x + attention(norm(x)) within windows, then x + MLP(norm(x))."""

    def __init__(self, width: int, windows: Windows, grid: Grid, window: Grid, drop_path: float, qkv_bias: bool,
                 mlp_ratio: float) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, windows, grid, window, qkv_bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width, int(width * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x_BhwD: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        x_BhwD = x_BhwD + drop_path(self.attn(self.norm1(x_BhwD)), self.drop_path, self.training)
        return x_BhwD + drop_path(self.mlp(self.norm2(x_BhwD)), self.drop_path, self.training)

    def reach(self, seen_hw: Tensor) -> Tensor:
        """Places whose tokens those of `seen_hw` can have used."""
        return self.attn.windows.reach(seen_hw)


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, softmax(q k^T / sqrt(d) + relative position bias) v."""

    def __init__(self, width: int, windows: Windows, grid: Grid, window: Grid, qkv_bias: bool) -> None:
        super().__init__()
        self.windows, self.grid = windows, grid
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.rel_pos_bias = RelativePositionBias(window, windows.heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BhwD: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        x_GnNd = attend(self.windows.split(self.qkv(x_BhwD)), self.windows.masked(self.rel_pos_bias()))
        return self.proj(self.windows.merge(x_GnNd, self.grid))


class PatchMerging(nn.Module):
    """The four tokens of a 2x2 square become one: concatenated, normed, projected to twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x_BhwD: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h / 2, w / 2, 2 D)."""
        return self.reduction(self.norm(squares(x_BhwD)))

    def reach(self, seen_hw: Tensor) -> Tensor:
        """Places of the larger map that those of `seen_hw` are made of."""
        return seen_hw.repeat_interleave(2, 0).repeat_interleave(2, 1)


def squares(x_BhwD: Tensor) -> Tensor:
    """2x2 squares of tokens side by side, column by column: (B, h, w, D) -> (B, h / 2, w / 2, 4 D)."""
    return rearrange(x_BhwD, "B (h a) (w b) D -> B h w (b a D)", a=2, b=2)
