"""Positions at another resolution, and a stem's weights for other channels.

Legend: D width, N tokens, n heads, L offsets of a window (2 h - 1) * (2 w - 1), C channels, k side of a kernel.
"""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mimetic.backbones.contract import Grid


def resize_positions(positions_1ND: Tensor, old: Grid, new: Grid, prefix: int = 0) -> Tensor:
    """Position embeddings on another grid by antialiased bicubic interpolation (ViT, arXiv:2010.11929, section 3.2).

    Args:
        prefix: tokens before the patches, whose embeddings stay.
    """
    if tuple(old) == tuple(new):
        return positions_1ND
    map_1Dhw = rearrange(positions_1ND[:, prefix:], "B (h w) D -> B D h w", h=old[0])
    map_1Dhw = F.interpolate(map_1Dhw.float(), new, mode="bicubic", antialias=True).to(positions_1ND.dtype)
    return torch.cat([positions_1ND[:, :prefix], rearrange(map_1Dhw, "B D h w -> B (h w) D")], 1)


def resize_table(table_Ln: Tensor, old: Grid, new: Grid, method: str = "geometric") -> Tensor:
    """A relative position bias table for windows of another size; rows beyond the L offsets (BEiT's for [CLS]) stay.

    Args:
        old: window of the table.
        new: window wanted.
        method: "geometric" keeps near offsets as they are and stretches far ones by a geometric progression (BEiT,
            arXiv:2106.08254; linear between them, as timm does); "bicubic" stretches all alike (Swin's own code).
    """
    if tuple(old) == tuple(new):
        return table_Ln
    lengths, wanted = (tuple(2 * side - 1 for side in window) for window in (old, new))
    count = lengths[0] * lengths[1]
    table_nhw = rearrange(table_Ln[:count].float(), "(h w) n -> n h w", h=lengths[0])
    if method == "bicubic":
        table_nhw = F.interpolate(table_nhw[None], wanted, mode="bicubic")[0]
    else:
        rows, columns = (_geometric(length, size) for length, size in zip(lengths, wanted, strict=True))
        table_nhw = rows.to(table_nhw) @ table_nhw @ columns.to(table_nhw).T
    return torch.cat([rearrange(table_nhw, "n h w -> (h w) n").to(table_Ln.dtype), table_Ln[count:]])


def _geometric(length: int, wanted: int) -> Tensor:
    """(wanted, length) weights of a linear interpolation: offset i of the old table lies at 1 + q + ... + q^(i-1).

    The ratio q makes the old far end meet the new one.
    """
    half = length // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        low, high = (low, ratio) if (1 - ratio**half) / (1 - ratio) > wanted // 2 else (ratio, high)
    steps = np.cumsum(ratio ** np.arange(half))
    old = np.concatenate([-steps[::-1], [0], steps])
    new = np.arange(wanted) - wanted // 2
    return torch.tensor(np.stack([np.interp(new, old, unit) for unit in np.eye(length)], 1))


def adapt_channels(weight_DCkk: Tensor, channels: int) -> Tensor:
    """The stem's weights for other input channels, so that a grey picture gives what it gave as three equal channels.

    One channel: the sum over the old ones. More: the old ones again and again, scaled to keep the size of the sum.
    """
    have = weight_DCkk.shape[1]
    if channels == 1:
        return weight_DCkk.sum(1, keepdim=True)
    return weight_DCkk.repeat(1, -(-channels // have), 1, 1)[:, :channels] * (have / channels)
