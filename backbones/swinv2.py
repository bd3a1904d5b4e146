"""SwinV2 (arXiv:2111.09883): Swin with norms after the branches, cosine attention, and a bias that is a function of the offset.

Legend: B batch, h w feature grid, D width, N tokens of a window, n heads, d width of a head, G windows of the batch.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimetic.backbones.contract import Grid
from mimetic.backbones.layers import KeylessBiasLinear, drop_path, mlp
from mimetic.backbones.swin import Swin, squares
from mimetic.backbones.windows import Windows, attend, relative_position_index
from mimetic.engine.errors import SettingError

LARGEST_LOGIT_SCALE = math.log(100)


class SwinV2(Swin):
    """A SwinV2 transformer; arguments as of `Swin`, and one more.

    Args:
        pretrained_window_sizes: the window of each stage that the weights were trained with, where it differs from
            `window_size`: offsets are measured in it, so that the bias learned there holds here. 0 where it does not differ.
    """

    def __init__(
        self, image_size: int | Sequence[int] = 256, in_channels: int = 3, num_classes: int = 0, *,
        patch_size: int = 4, embed_dim: int = 96, depths: Sequence[int] = (2, 2, 6, 2), num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 8, mlp_ratio: float = 4.0, qkv_bias: bool = True, drop_path_rate: float = 0.0,
        shifted: bool = True, pretrained_window_sizes: Sequence[int] = (0, 0, 0, 0),
    ) -> None:
        if len(pretrained_window_sizes) != len(depths):
            raise SettingError(f"pretrained_window_sizes {list(pretrained_window_sizes)} names {len(pretrained_window_sizes)} windows, "
                               f"depths {list(depths)} {len(depths)} stages; give one for each stage, 0 for the stage's own")  # fmt: skip

        def block(stage: int, width: int, windows: Windows, grid: Grid, window: Grid, rate: float) -> nn.Module:
            return SwinV2Block(width, windows, grid, window, rate, qkv_bias, mlp_ratio, pretrained_window_sizes[stage])

        self._build(image_size, in_channels, num_classes, patch_size, embed_dim, depths, num_heads, window_size, drop_path_rate, shifted,
                    PatchMerging, block)  # fmt: skip
        for part in self.modules():  # each branch starts at nothing, as in the authors' code
            if isinstance(part, SwinV2Block):
                for norm in (part.norm1, part.norm2):
                    nn.init.zeros_(norm.weight)

    def learned_arguments(self) -> dict[str, Any]:
        """The window that each stage's offsets are measured in, so that the bias says the same of them in another window."""
        windows = [stage.blocks[0].attn.measured_in for stage in self.stages]
        return {"pretrained_window_sizes": [rows for rows, _ in windows]} if all(rows == columns for rows, columns in windows) else {}

    def timm_name(self, name: str) -> str:
        """Name in timm's model."""
        return re.sub(r"\.qkv\.([qv]_bias)$", r".\1", super().timm_name(name))

    def no_weight_decay_names(self) -> set[str]:
        """Also the net that makes the bias and the attention's temperature, as in the authors' code."""
        ours = {name for name, _ in self.named_parameters() if ".cpb_mlp." in name or name.endswith("logit_scale")}
        return super().no_weight_decay_names() | ours


class SwinV2Block(nn.Module):
    """x + norm(attention(x)) within windows, then x + norm(MLP(x)): what a branch adds keeps its size in deep nets."""

    def __init__(self, width: int, windows: Windows, grid: Grid, window: Grid, drop_path: float, qkv_bias: bool, mlp_ratio: float,
                 pretrained_window: int) -> None:  # fmt: skip
        super().__init__()
        self.attn = CosineWindowAttention(width, windows, grid, window, qkv_bias, pretrained_window)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = mlp(width, int(width * mlp_ratio))
        self.norm2 = nn.LayerNorm(width)
        self.drop_path = drop_path

    def forward(self, x_BhwD: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        x_BhwD = x_BhwD + drop_path(self.norm1(self.attn(x_BhwD)), self.drop_path, self.training)
        return x_BhwD + drop_path(self.norm2(self.mlp(x_BhwD)), self.drop_path, self.training)

    def reach(self, seen_hw: Tensor) -> Tensor:
        """Places whose tokens those of `seen_hw` can have used."""
        return self.attn.windows.reach(seen_hw)


class CosineWindowAttention(nn.Module):
    """Self-attention within windows, softmax(cos(q, k) / temperature + bias(offset)) v; keys have no bias of their own."""

    offset_L2: Tensor
    index_NN: Tensor

    def __init__(self, width: int, windows: Windows, grid: Grid, window: Grid, qkv_bias: bool, pretrained_window: int) -> None:
        super().__init__()
        self.windows, self.grid = windows, grid
        self.measured_in = (pretrained_window, pretrained_window) if pretrained_window else window
        self.logit_scale = nn.Parameter(torch.full((windows.heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, windows.heads, bias=False))
        self.qkv = KeylessBiasLinear(width) if qkv_bias else nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.register_buffer("offset_L2", log_offsets(window, pretrained_window), persistent=False)
        self.register_buffer("index_NN", relative_position_index(window), persistent=False)

    def forward(self, x_BhwD: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        qkv_3GnNd = self.windows.split(self.qkv(x_BhwD))
        scale_n11 = self.logit_scale.clamp(max=LARGEST_LOGIT_SCALE).exp()
        return self.proj(self.windows.merge(attend(qkv_3GnNd, self.windows.masked(self._bias()), scale_n11), self.grid))

    def _bias(self) -> Tensor:
        """Bias on the attention scores, (n, N, N), between 0 and 16."""
        table_Ln = 16 * torch.sigmoid(self.cpb_mlp(self.offset_L2))
        return F.embedding(self.index_NN, table_Ln).permute(2, 0, 1).contiguous()


class PatchMerging(nn.Module):
    """The four tokens of a 2x2 square become one: concatenated, projected to twice the width, normed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, x_BhwD: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h / 2, w / 2, 2 D)."""
        return self.norm(self.reduction(squares(x_BhwD)))

    def reach(self, seen_hw: Tensor) -> Tensor:
        """Places of the larger map that those of `seen_hw` are made of."""
        return seen_hw.repeat_interleave(2, 0).repeat_interleave(2, 1)


def log_offsets(window: Grid, pretrained_window: int = 0) -> Tensor:
    """What the bias is a function of, (L, 2) for the L offsets of a window, in the order of `relative_position_index`.

    sign(x) log2(1 + |x|) / 3 with x = 8 at the far end of the pretrained window (equation 4, and its footnote's scaling): a
    window twice as large asks for values only a little beyond those that were learned.
    """
    reach = [max((pretrained_window or side) - 1, 1) for side in window]
    axes = [torch.arange(1 - side, side) * (8 / far) for side, far in zip(window, reach, strict=True)]
    x_L2 = torch.cartesian_prod(*axes).view(-1, 2)
    return x_L2.sign() * (x_L2.abs() + 1).log2() / 3
