"""Nets without attention: MLP-Mixer (arXiv:2105.01601), ResMLP (arXiv:2105.03404), gMLP (arXiv:2105.08050).

Tokens are mixed by linear layers over the places, so each net knows one grid only.

Legend: B batch, C channels, H W pixels, P Q mask grid, h w = P Q feature grid, N = h*w places, D width.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mimetic.backbones.contract import sides
from mimetic.backbones.layers import Gelu, PatchStem, PlacesLinear, drop_path, drop_path_rates, mlp
from mimetic.backbones.staged import Stage, Staged
from mimetic.engine.errors import SettingError

layer_norm = partial(nn.LayerNorm, eps=1e-6)


class MlpNet(Staged):
    """Patches, blocks that mix places and channels in turn, the mean; a subclass says what a block is.

    Args:
        image_size: side or (H, W) in pixels, a multiple of the patch.
        in_channels: C.
        num_classes: outputs of the classifier; 0 for none.
        patch_size: side of a patch in pixels. embed_dim: D. num_blocks: how many blocks.
        mlp_ratio: hidden width of the MLP over D.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.

    Raises:
        SettingError: arguments that contradict each other, both named.
    """

    norm_of = layer_norm

    def __init__(
        self, image_size: int | Sequence[int] = 224, in_channels: int = 3, num_classes: int = 0, *,
        patch_size: int = 16, embed_dim: int = 512, num_blocks: int = 8, drop_path_rate: float = 0.0, **of_block: float,
    ) -> None:
        super().__init__(sides(image_size), in_channels, num_classes, [embed_dim], [num_blocks], patch_size, patch_size)
        places = self.stem_grid[0] * self.stem_grid[1]
        self.stem = PatchStem(self.stem_grid, (patch_size, patch_size), in_channels, embed_dim)
        rates = drop_path_rates(drop_path_rate, [num_blocks])[0]
        self.stages = nn.ModuleList([Stage(nn.Identity(), [self.block(embed_dim, places, rate, **of_block) for rate in rates])])
        self.norm = type(self).norm_of(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        for name, part in self.named_modules():
            if isinstance(part, nn.Linear) and not name.endswith("gate.proj"):
                nn.init.trunc_normal_(part.weight, std=0.02) if name == "head" else nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
                if "mlp" in name:
                    nn.init.normal_(part.bias, std=1e-6)

    block: type[nn.Module]

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits, or pooled features without classes."""
        return self.head(self.norm(self.encode(image_BCHW)).mean((1, 2)))

    def timm_arguments(self) -> dict[str, Any]:
        """Keywords for `timm.create_model`; initial values are no matter of a net that has weights."""
        return {name: value for name, value in super().timm_arguments().items() if name != "init_values"}

    def timm_name(self, name: str) -> str:
        """Name in timm's model."""
        return re.sub(r"^stages\.0\.", "", name)

    def no_weight_decay_names(self) -> set[str]:
        """Also the scales of `Affine`, which are vectors of three axes in timm's files."""
        return super().no_weight_decay_names() | {name for name, _ in self.named_parameters() if name.endswith(("alpha", "beta"))}


class MixerBlock(nn.Module):
    """x + MLP over places(norm(x)), then x + MLP over channels(norm(x))."""

    def __init__(self, width: int, places: int, drop_path: float, mlp_ratio: Sequence[float] = (0.5, 4.0)) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.mlp_tokens = mlp(places, int(mlp_ratio[0] * width))
        self.norm2 = layer_norm(width)
        self.mlp_channels = mlp(width, int(mlp_ratio[1] * width))
        self.drop_path = drop_path

    def forward(self, x_BhwD: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        x_BND = x_BhwD.flatten(1, 2)
        x_BND = x_BND + drop_path(self.mlp_tokens(self.norm1(x_BND).mT).mT, self.drop_path, self.training)
        return (x_BND + drop_path(self.mlp_channels(self.norm2(x_BND)), self.drop_path, self.training)).view(x_BhwD.shape)


class ResMlpBlock(nn.Module):
    """x + scale * linear over places(affine(x)), then x + scale * MLP over channels(affine(x)); no norm at all."""

    def __init__(self, width: int, places: int, drop_path: float, mlp_ratio: float = 4.0, init_values: float = 1e-4) -> None:
        super().__init__()
        self.norm1 = Affine(width)
        self.linear_tokens = PlacesLinear(places, places)
        self.norm2 = Affine(width)
        self.mlp_channels = mlp(width, int(mlp_ratio * width))
        self.ls1, self.ls2 = (nn.Parameter(torch.full((width,), init_values)) for _ in range(2))
        self.drop_path = drop_path

    def forward(self, x_BhwD: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        x_BND = x_BhwD.flatten(1, 2)
        x_BND = x_BND + drop_path(self.ls1 * self.linear_tokens(self.norm1(x_BND)), self.drop_path, self.training)
        return (x_BND + drop_path(self.ls2 * self.mlp_channels(self.norm2(x_BND)), self.drop_path, self.training)).view(x_BhwD.shape)


class Affine(nn.Module):
    """A factor and a summand per channel, where other nets have a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(1, 1, width)), nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x_BND: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return torch.addcmul(self.beta, self.alpha, x_BND)


class GatedMlpBlock(nn.Module):
    """x + an MLP over channels in whose middle places are mixed: half of the channels decide what passes of the other half."""

    def __init__(self, width: int, places: int, drop_path: float, mlp_ratio: float = 6.0) -> None:
        super().__init__()
        hidden = int(mlp_ratio * width)
        if hidden % 2:
            raise SettingError(f"embed_dim {width} times mlp_ratio {mlp_ratio:g} is {hidden}; the gate needs an even number")
        self.norm = layer_norm(width)
        fc1, fc2 = nn.Linear(width, hidden), nn.Linear(hidden // 2, width)
        self.mlp_channels = nn.Sequential(OrderedDict(fc1=fc1, act=Gelu(), gate=SpatialGate(hidden // 2, places), fc2=fc2))
        self.drop_path = drop_path

    def forward(self, x_BhwD: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        x_BND = x_BhwD.flatten(1, 2)
        return (x_BND + drop_path(self.mlp_channels(self.norm(x_BND)), self.drop_path, self.training)).view(x_BhwD.shape)


class SpatialGate(nn.Module):
    """u * linear over places(norm(v)) of the two halves u, v of the channels; it starts as u * 1."""

    def __init__(self, width: int, places: int) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(width), PlacesLinear(places, places)
        nn.init.normal_(self.proj.weight, std=1e-6)
        nn.init.ones_(self.proj.bias)

    def forward(self, x_BNE: Tensor) -> Tensor:
        """(B, N, 2 D') -> (B, N, D')."""
        u_BND, v_BND = x_BNE.chunk(2, dim=-1)
        return u_BND * self.proj(self.norm(v_BND))


class MlpMixer(MlpNet):
    """MLP-Mixer; arguments as of `MlpNet`, mlp_ratio is of the MLPs over places and over channels, each over D."""

    block = MixerBlock


class ResMlp(MlpNet):
    """ResMLP; arguments as of `MlpNet`, and init_values, the initial factor on each branch."""

    block = ResMlpBlock
    norm_of = Affine  # type: ignore[assignment]


class GatedMlp(MlpNet):
    """gMLP; arguments as of `MlpNet`."""

    block = GatedMlpBlock
