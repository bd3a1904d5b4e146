"""A codebook that is seeded from data and replaces its dead codes, so that it cannot collapse.

Legend: M cells of a batch, N cells to seed from, D code width, V codebook size.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimetic.tokenizers.clustering import draw_by_weight, kmeans, nearest
from mimetic.tokenizers.usage import count_codes

SHARPNESS = 8.0  # precision at the seed, times the mean squared distance from the nearest code


class Codebook(nn.Module):
    """V points in a D-wide space; a cell's logit for a code falls with the squared distance between them.

    The logits are those of V equal round Gaussians with a learned precision: a dot product and a bias for each code, as a
    convolutional head has. The decoder looks up the same points, so clustering features seeds both ends at once.

    A code is `anchor_VD + delta_VD`: data writes the anchor (a buffer), the optimizer the delta (a parameter). So a restart
    survives optimizers that keep their own copy of the weights, as DeepSpeed's do, and weight decay pulls a code to where
    data put it rather than to the origin.

    `counts_V` are the uses of each code since the last restart, summed over ranks at every step: all ranks hold the same,
    and a checkpoint that one of them writes resumes all of them.
    """

    anchor_VD: Tensor
    counts_V: Tensor

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.delta_VD = nn.Parameter(torch.zeros(vocab_size, width))
        self.log_precision = nn.Parameter(torch.zeros(()))
        self.register_buffer("anchor_VD", torch.randn(vocab_size, width))
        self.register_buffer("counts_V", torch.zeros(vocab_size, dtype=torch.int64))

    @property
    def codes(self) -> Tensor:
        """The codes as they stand."""
        return self.anchor_VD + self.delta_VD

    def logits(self, z_MD: Tensor) -> Tensor:
        """Return logits_MV: -precision / 2 * squared distance, up to a constant for each cell.

        In fp32 under autocast too, since a few per cent of cells are near ties.
        """
        with torch.autocast(z_MD.device.type, enabled=False):
            codes_VD = self.codes.float()
            score_MV = torch.addmm(-0.5 * codes_VD.square().sum(1), z_MD.float(), codes_VD.T)
            return score_MV * self.log_precision.float().exp()

    @torch.no_grad()
    def count(self, ids: Tensor) -> None:
        """Add these uses (ids of any shape) to `counts_V`, over all ranks."""
        counts_V = count_codes(ids, len(self.counts_V))
        if _world() > 1:
            dist.all_reduce(counts_V)
        self.counts_V += counts_V

    @torch.no_grad()
    def seed(self, z_ND: Tensor, seed: int = 0) -> None:
        """Set the codes to the k-means centres of these features, and the precision to fit their spread."""
        codes_VD = kmeans(z_ND, len(self.counts_V), seed=seed)
        spread = nearest(z_ND, codes_VD)[1].mean().clamp(min=1e-3 * z_ND.square().sum(1).mean() + 1e-6)
        self.anchor_VD.copy_(codes_VD - self.delta_VD)
        self.log_precision.copy_((SHARPNESS / spread).log())
        self.counts_V.zero_()

    @torch.no_grad()
    def restart_dead(self, z_MD: Tensor, seed: int, dead_below: float = 0.05) -> Tensor:
        """Move each code used less than `dead_below` times the mean onto a badly served feature; return how many moved.

        `z_MD` are this rank's features, equally many on each. They are gathered from all ranks, and targets are drawn among
        them with `seed` (use the step) and odds in proportion to the squared distance from the nearest code, as k-means++
        draws: each rank draws the same, and cells that a code already fits are left alone. Counts start anew. No host sync.
        """
        dead_V = self.counts_V < dead_below * self.counts_V.sum() / len(self.counts_V)
        moved_V, place_VD = new_places(dead_V, gather(z_MD.float()), self.codes, seed)
        self.anchor_VD.copy_(torch.where(moved_V[:, None], place_VD - self.delta_VD, self.anchor_VD))
        self.counts_V.zero_()
        return moved_V.sum()


def new_places(dead_V: Tensor, pool_MD: Tensor, codes_VD: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Where dead codes go: (moved_V, bool; place_VD, features drawn for them with odds by the squared distance from the nearest code).

    Fewer move than are dead where fewer features are badly served. The same on every process for the same pool. No host sync.
    """
    distance_M = nearest(pool_MD, codes_VD)[1]
    drawn = draw_by_weight(distance_M, min(len(codes_VD), len(pool_MD)), seed)
    place_V = (dead_V.cumsum(0) - 1).clamp(min=0)  # the i-th dead code takes the i-th target drawn
    target_V = drawn[place_V.clamp(max=len(drawn) - 1)]
    moved_V = dead_V & (place_V < len(drawn)) & (distance_M[target_V] > 0)
    return moved_V, pool_MD[target_V]


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(z_MD: Tensor) -> Tensor:
    """The rows of all processes, in their order; each has equally many."""
    if _world() == 1:
        return z_MD
    parts = [torch.empty_like(z_MD) for _ in range(_world())]
    dist.all_gather(parts, z_MD.contiguous())
    return torch.cat(parts)
