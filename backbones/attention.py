"""Looking inside: where attention goes, how it flows through the layers, what a place can know.

Legend: B batch, P Q patch grid, h w feature grid, N tokens ([CLS] and [DIST] first), n heads, l layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mimetic.backbones.contract import Backbone
from mimetic.backbones.staged import Staged
from mimetic.backbones.vit import ViT
from mimetic.engine.errors import SettingError

FUSIONS = {"mean": lambda x: x.mean(1), "max": lambda x: x.amax(1), "min": lambda x: x.amin(1)}


@torch.no_grad()
def attention_maps(backbone: ViT, image_BCHW: Tensor) -> list[Tensor]:
    """The attention of each layer, (B, n, N, N): row = query, column = key; each row sums to 1."""
    maps: list[Tensor] = []

    def keep(attention: Any, inputs: tuple[Any, ...]) -> None:
        maps.append(attention.weights(*inputs))

    blocks: Any = backbone.blocks
    handles = [block.attn.register_forward_pre_hook(keep) for block in blocks]
    try:
        backbone.eval()(image_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    return maps


def rollout(maps: Sequence[Tensor], fuse: str = "mean", discard: float = 0.0, normalize: bool = True) -> list[Tensor]:
    """Attention rollout (arXiv:2005.00928): how much of each input token is in each token after layer 1, 2, ..., (B, N, N).

    rollout_1 = A_1 + I, rollout_l = (A_l + I) rollout_(l-1), where I stands for the residual connection. Row = token after the
    layer, column = input token: [CLS]'s view of the picture is row 0.

    Args:
        maps: attention of each layer, (B, n, N, N).
        fuse: what becomes of the heads: mean, max or min.
        discard: share of the entries of each fused map, the lowest ones, that are set to 0 first.
        normalize: whether the rows of A + I are made to sum to 1, so that no layer weighs more than another.

    Raises:
        SettingError: an unknown fusion, or a share outside [0, 1).
    """
    if fuse not in FUSIONS or not 0 <= discard < 1:
        raise SettingError(f"fuse is {fuse!r}, discard {discard:g}; fuse is one of {', '.join(FUSIONS)}, discard a share in [0, 1)")
    rolled: list[Tensor] = []
    for map_BnNN in maps:
        fused_BNN = FUSIONS[fuse](map_BnNN)
        if dropped := int(discard * fused_BNN[0].numel()):
            lowest = fused_BNN.flatten(1).argsort(dim=1, stable=True)[:, :dropped]
            fused_BNN = fused_BNN.flatten(1).scatter(1, lowest, 0.0).view_as(fused_BNN)
        step_BNN = fused_BNN + torch.eye(fused_BNN.shape[-1], dtype=fused_BNN.dtype, device=fused_BNN.device)
        if normalize:
            step_BNN = step_BNN / step_BNN.sum(-1, keepdim=True)
        rolled.append(step_BNN @ rolled[-1] if rolled else step_BNN)
    return rolled


def seen_from(backbone: ViT, share_BNN: Tensor, cell: tuple[int, int] | None = None) -> Tensor:
    """One token's row of attention or rollout, on the patch grid, (B, P, Q).

    Args:
        cell: (row, column) of a patch; None for [CLS], or for the mean of all patches where there is none.
    """
    prefix, (p, q) = backbone.patch_embed.num_prefix, backbone.mask_grid
    if cell is not None:
        row_BN = share_BNN[:, prefix + _place(cell, backbone.mask_grid)]
    else:
        row_BN = share_BNN[:, 0] if backbone.has_cls else share_BNN.mean(1)
    return row_BN[:, prefix:].unflatten(1, (p, q))


def attention_distance(backbone: ViT, maps: Sequence[Tensor]) -> Tensor:
    """How far heads look, (l, n): pixels between query and key patch, weighted by attention (arXiv:2010.11929, figure 7)."""
    prefix = backbone.patch_embed.num_prefix
    size = torch.tensor(backbone.patch_size, dtype=torch.float64)
    at_N2 = torch.cartesian_prod(*(torch.arange(side) for side in backbone.mask_grid)).view(-1, 2) * size
    distance_NN = torch.cdist(at_N2, at_N2).to(maps[0])
    patches = torch.stack([map_BnNN[..., prefix:, prefix:] for map_BnNN in maps])
    return (patches * distance_NN).sum((-2, -1)).mean(1) / patches.sum((-2, -1)).mean(1)


def position_similarity(backbone: ViT) -> Tensor | None:
    """Cosine of the position embeddings of each pair of patches, (P, Q, P, Q); None for a net without absolute positions."""
    if backbone.patch_embed.pos_embed is None:
        return None
    (p, q), positions_ND = backbone.mask_grid, backbone.patch_embed.pos_embed.detach()[0]
    unit_ND = F.normalize(positions_ND[-p * q :], dim=-1)
    return (unit_ND @ unit_ND.T).view(p, q, p, q)


def reach(backbone: Backbone, cell: tuple[int, int]) -> list[Tensor]:
    """Where information of a place can have come from after block 0, 1, ...: bool maps on the stem's grid.

    The structure alone tells: windows, shifts, grids, convolutions and steps between stages, whatever the weights.

    Args:
        cell: (row, column) of the last map; in larger maps the place in its middle is meant.

    Raises:
        SettingError: a net that mixes all places in every block or is none of ours, or a cell outside the map.
    """
    name = backbone.config.get("name", "this net")
    if not isinstance(backbone, Staged | ViT):
        raise SettingError(f"what a place of {name} can know is not known here: its blocks are timm's; draw a backbone of `mimetic models`")
    if isinstance(backbone, ViT) or not all(hasattr(block, "reach") for stage in backbone.stages for block in stage.blocks):
        raise SettingError(f"{name} mixes all places in every block: each place can know everything")
    _place(cell, backbone.feature_grid)
    maps = []
    for last, stage in enumerate(backbone.stages):
        grid = [side << (len(backbone.stages) - 1 - last) for side in backbone.feature_grid]
        row, column = (int((at + 0.5) * side / places) for at, side, places in zip(cell, grid, backbone.feature_grid, strict=True))
        for block in range(len(stage.blocks)):
            seen_hw = torch.zeros(grid[0], grid[1], dtype=torch.bool)
            seen_hw[row, column] = True
            for i in range(last, -1, -1):
                passed = backbone.stages[i].blocks[: block + 1] if i == last else backbone.stages[i].blocks
                for step in (*reversed(passed), backbone.stages[i].downsample):
                    seen_hw = step.reach(seen_hw) if hasattr(step, "reach") else seen_hw
            maps.append(seen_hw)
    return maps


def _place(cell: tuple[int, int], grid: tuple[int, int]) -> int:
    if any(not 0 <= at < side for at, side in zip(cell, grid, strict=True)):
        raise SettingError(f"cell {cell[0]}, {cell[1]} is outside the {grid[0]}x{grid[1]} grid; rows and columns count from 0")
    return cell[0] * grid[1] + cell[1]
