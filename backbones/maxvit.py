"""MaxViT (arXiv:2204.01697): in each block a convolution, attention within windows, and attention over a grid of distant places.

The variant is that of the authors' weights (`_tf_` in timm's names).

Legend: B batch, C channels, H W pixels, P Q mask grid, h w feature grid, D width, N tokens of a window or grid, n heads, d = 32.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mimetic.backbones.contract import TABLE, Grid, hide, repeat_mask, sides, zero_hidden
from mimetic.backbones.interpolation import resize_table
from mimetic.backbones.layers import Gelu, drop_path, drop_path_rates, mlp, neighbours
from mimetic.backbones.staged import Stage, Staged
from mimetic.backbones.windows import Windows, attend, check_tiling, grid_order, relative_position_index, window_order
from mimetic.engine.errors import SettingError

HEAD = 32  # d
STEM_STRIDE = 2
gelu = partial(Gelu, approximate="tanh")
batch_norm = partial(nn.BatchNorm2d, eps=1e-3)
layer_norm = partial(nn.LayerNorm, eps=1e-5)


class MaxViT(Staged):
    """A MaxViT; arguments beyond the first three bear timm's names.

    Args:
        image_size: side or (H, W) in pixels, a multiple of the stride (32 with four stages).
        in_channels: C.
        num_classes: outputs of the classifier; 0 for none.
        embed_dim: D of each stage, multiples of 32. depths: blocks of each stage. stem_width: channels of the stem.
        window_size: side or (height, width) of windows and of grids in tokens; None for the last stage's map, 7 at 224 pixels.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.

    Raises:
        SettingError: arguments that contradict each other, both named.
    """

    channels_last = False

    def __init__(
        self, image_size: int | Sequence[int] = 224, in_channels: int = 3, num_classes: int = 0, *,
        embed_dim: Sequence[int] = (64, 128, 256, 512), depths: Sequence[int] = (2, 2, 5, 2), stem_width: int = 64,
        window_size: int | Sequence[int] | None = None, drop_path_rate: float = 0.0,
    ) -> None:
        image, strides = sides(image_size), [2 * STEM_STRIDE << stage for stage in range(len(depths))]
        super().__init__(image, in_channels, num_classes, embed_dim, depths, STEM_STRIDE, strides[-1])
        if any(width % HEAD for width in embed_dim):
            raise SettingError(f"embed_dim {list(embed_dim)}: each is to be a multiple of {HEAD}, the width of an attention head")
        window = self.window = self.feature_grid if window_size is None else sides(window_size, "window_size")
        check_tiling(image, strides, [window] * len(depths), smaller_maps=False)
        self.stem = ConvStem(self.stem_grid, in_channels, stem_width)
        stages, inside = [], stem_width
        for i, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            grid, width = (image[0] // strides[i], image[1] // strides[i]), embed_dim[i]
            groups = [Windows(order(grid, window), window[0] * window[1], width // HEAD) for order in (window_order, grid_order)]
            blocks = [MaxViTBlock(width if j else inside, width, 1 if j else 2, groups, grid, window, rate) for j, rate in enumerate(rates)]
            stages.append(Stage(nn.Identity(), blocks))
            inside = width
        self.stages = nn.ModuleList(stages)
        self.norm = layer_norm(self.embed_dim)
        self.head_hidden = nn.Linear(self.embed_dim, self.embed_dim)
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels // part.groups
                nn.init.normal_(part.weight, std=math.sqrt(2 / fan_out))
            elif isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
            if isinstance(part, nn.Conv2d | nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits, or the last hidden features without classes; the norm comes after the mean."""
        return self.head(self.head_hidden(self.norm(self.encode(image_BCHW).mean((2, 3)))).tanh())

    def final_map(self, x: Tensor) -> Tensor:
        """The map after the norm, each place by itself."""
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)

    def timm_name(self, name: str) -> str:
        """Name in timm's model."""
        name = re.sub("^norm", "head.norm", re.sub(r"^head\.", "head.fc.", name))
        return re.sub("^head_hidden", "head.pre_logits.fc", name)

    def timm_arguments(self) -> dict[str, Any]:
        """Keywords for `timm.create_model`."""
        arguments = super().timm_arguments()
        arguments.pop("window_size", None)
        window = {"transformer_window_size": self.window, "transformer_grid_size": self.window}
        return arguments | window | {"head_hidden_size": self.embed_dim}


class ConvStem(nn.Module):
    """Two 3x3 convolutions, the first of stride 2.

    They look beyond their cell, so hidden pixels are set to 0 before them, and the mask token is put at hidden cells after them.
    """

    def __init__(self, grid: Grid, channels: int, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.conv1 = nn.Conv2d(channels, width, 3, 2)
        self.norm1 = batch_norm(width)
        self.act = gelu()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.mask_token = nn.Parameter(torch.empty(1, width, 1, 1))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, image_BCHW: Tensor, hidden_BPQ: Tensor | None = None) -> Tensor:
        """(B, C, H, W) and bool (B, P, Q), True = hidden -> (B, D, h, w)."""
        hidden_Bhw = None if hidden_BPQ is None else repeat_mask(hidden_BPQ, self.grid)
        if hidden_Bhw is not None:
            image_BCHW = zero_hidden(image_BCHW, hidden_Bhw)
        x_BDhw = self.conv2(self.act(self.norm1(self.conv1(pad_same(image_BCHW)))))
        return x_BDhw if hidden_Bhw is None else hide(x_BDhw, hidden_Bhw[:, None], self.mask_token)


def pad_same(x_BDhw: Tensor) -> Tensor:
    """What TensorFlow's "same" adds before a 3x3 convolution of stride 2 on even sides: zeros below and to the right."""
    return F.pad(x_BDhw, (0, 1, 0, 1))


class MaxViTBlock(nn.Module):
    """MBConv, then attention within windows, then attention over the grid."""

    def __init__(self, inside: int, width: int, stride: int, groups: Sequence[Windows], grid: Grid, window: Grid,
                 drop_path: float) -> None:  # fmt: skip
        super().__init__()
        self.conv = MBConv(inside, width, stride, drop_path)
        self.attn_block, self.attn_grid = (GroupedTransformer(width, group, grid, window, drop_path) for group in groups)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D', h / stride, w / stride)."""
        x_BhwD = rearrange(self.conv(x_BDhw), "B D h w -> B h w D")
        return rearrange(self.attn_grid(self.attn_block(x_BhwD)), "B h w D -> B D h w")

    def reach(self, seen_hw: Tensor) -> Tensor:
        """Places whose tokens those of `seen_hw` can have used; the squeeze, which hands every channel's mean to all, is left out."""
        seen_hw = self.attn_block.attn.group.reach(self.attn_grid.attn.group.reach(seen_hw))
        if self.conv.stride == 1:
            return neighbours(seen_hw)
        spread = F.conv_transpose2d(seen_hw.double()[None, None], torch.ones(1, 1, 3, 3).double(), stride=2)[0, 0]
        return spread[: 2 * len(seen_hw), : 2 * seen_hw.shape[1]] > 0  # the 3x3 window of stride 2 starts at each even place


class MBConv(nn.Module):
    """Inverted bottleneck (arXiv:1801.04381): widen, depthwise 3x3, squeeze and excite, narrow; norms come first."""

    def __init__(self, inside: int, width: int, stride: int, drop_path: float) -> None:
        super().__init__()
        middle = 4 * width
        self.shortcut = nn.Sequential(OrderedDict(
            pool=nn.AvgPool2d(2) if stride == 2 else nn.Identity(),
            expand=nn.Conv2d(inside, width, 1) if inside != width else nn.Identity(),
        ))  # fmt: skip
        self.pre_norm = batch_norm(inside)
        self.conv1_1x1 = nn.Conv2d(inside, middle, 1, bias=False)
        self.norm1 = batch_norm(middle)
        self.conv2_kxk = nn.Conv2d(middle, middle, 3, stride, 0 if stride == 2 else 1, groups=middle, bias=False)
        self.norm2 = batch_norm(middle)
        self.se = SqueezeExcite(middle, width // 4)
        self.conv3_1x1 = nn.Conv2d(middle, width, 1)
        self.act, self.stride, self.drop_path = gelu(), stride, drop_path

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D', h / stride, w / stride)."""
        y = self.act(self.norm1(self.conv1_1x1(self.pre_norm(x_BDhw))))
        y = self.act(self.norm2(self.conv2_kxk(pad_same(y) if self.stride == 2 else y)))
        return self.shortcut(x_BDhw) + drop_path(self.conv3_1x1(self.se(y)), self.drop_path, self.training)


class SqueezeExcite(nn.Module):
    """A factor for each channel, computed from all channels' means (arXiv:1709.01507)."""

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Conv2d(width, narrow, 1), nn.SiLU(), nn.Conv2d(narrow, width, 1)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w)."""
        return x_BDhw * self.fc2(self.act(self.fc1(x_BDhw.mean((2, 3), keepdim=True)))).sigmoid()


class GroupedTransformer(nn.Module):
    """x + attention(norm(x)) within groups of places, then x + MLP(norm(x))."""

    def __init__(self, width: int, group: Windows, grid: Grid, window: Grid, drop_path: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = GroupedAttention(width, group, grid, window)
        self.norm2 = layer_norm(width)
        self.mlp = mlp(width, 4 * width, "tanh")
        self.drop_path = drop_path

    def forward(self, x_BhwD: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        x_BhwD = x_BhwD + drop_path(self.attn(self.norm1(x_BhwD)), self.drop_path, self.training)
        return x_BhwD + drop_path(self.mlp(self.norm2(x_BhwD)), self.drop_path, self.training)


class GroupedAttention(nn.Module):
    """Multi-head self-attention within groups of places, with a relative position bias."""

    def __init__(self, width: int, group: Windows, grid: Grid, window: Grid) -> None:
        super().__init__()
        self.group, self.grid = group, grid
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rel_pos = RelativePositionBias(window, group.heads)

    def forward(self, x_BhwD: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        return self.proj(self.group.merge(attend(self.group.split(self.qkv(x_BhwD)), self.rel_pos()[None]), self.grid))


class RelativePositionBias(nn.Module):
    """A learned score for each offset from query to key and each head; TensorFlow's order, heads first."""

    index_NN: Tensor

    def __init__(self, window: Grid, heads: int) -> None:
        super().__init__()
        self.window = window
        self.relative_position_bias_table = nn.Parameter(torch.empty(heads, 2 * window[0] - 1, 2 * window[1] - 1))
        nn.init.normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("index_NN", relative_position_index(window).T.contiguous(), persistent=False)

    def forward(self) -> Tensor:
        """Bias on the attention scores, (n, N, N)."""
        return F.embedding(self.index_NN, self.relative_position_bias_table.flatten(1).T).permute(2, 0, 1).contiguous()

    def resized_from(self, other: "RelativePositionBias") -> dict[str, Tensor]:
        """The other's table for this window."""
        table_Ln = resize_table(other.relative_position_bias_table.flatten(1).T, other.window, self.window)
        return {TABLE: table_Ln.T.reshape(self.relative_position_bias_table.shape)}
