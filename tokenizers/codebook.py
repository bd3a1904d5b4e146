"""A codebook that is seeded from data and replaces its dead codes, so that it cannot collapse.

Legend: N vectors, M cells, D code width, V codebook size.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimetic.tokenizers.usage import count_codes


class Codebook(nn.Module):
    """V points in a D-wide space; a cell's logit for a code falls with their squared distance.

    Logits are those of a mixture of V equal round Gaussians whose common width is learned, so a plain convolutional
    head (a dot product and a bias for each code) is what this amounts to; but as the same points are looked up again by the decoder,
    clustering features seeds both ends at once.

    A code is `anchor_VD + delta_VD`: data writes the anchor (a buffer), the optimizer the delta (a parameter). A restart
    therefore survives optimizers that keep their own copy of the weights, as DeepSpeed's do, and weight decay pulls a code
    towards where data put it, not to the origin.

    `counts_V` holds the uses of each code since the last restart, summed over all ranks at every step: each rank holds the same numbers,
    so whichever rank writes the checkpoint, each can resume from it.
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.delta_VD = nn.Parameter(torch.zeros(vocab_size, width))
        self.log_precision = nn.Parameter(torch.zeros(()))
        self.register_buffer("anchor_VD", torch.randn(vocab_size, width))
        self.register_buffer("counts_V", torch.zeros(vocab_size, dtype=torch.int64))

    @property
    def codes_VD(self) -> Tensor:
        """The codes as they stand."""
        return self.anchor_VD + self.delta_VD

    def logits(self, z_MD: Tensor) -> Tensor:
        """Return logits_MV: minus half the squared distance times the precision, less what is the same for every code."""
        codes_VD = self.codes_VD
        score_MV = torch.addmm(-0.5 * codes_VD.square().sum(1), z_MD, codes_VD.T)
        return score_MV * self.log_precision.exp()

    @torch.no_grad()
    def count(self, ids: Tensor) -> None:
        """Add these uses (ids of any shape) to `counts_V`, over all ranks."""
        counts_V = count_codes(ids, len(self.counts_V))
        if _distributed():
            dist.all_reduce(counts_V)
        self.counts_V += counts_V

    @torch.no_grad()
    def seed(self, z_ND: Tensor, seed: int = 0) -> None:
        """Set the codes to the k-means centres of these features; rank 0's serve every rank. N >= V; a few V do better."""
        codes_VD = kmeans(z_ND, len(self.counts_V), seed=seed)
        distance_N = nearest(z_ND, codes_VD)[1]
        # The width that makes the mixture fit its features best: D / mean squared distance.
        precision = z_ND.shape[1] / distance_N.mean().clamp(min=1e-6)
        self._place(codes_VD, slice(None))
        self.log_precision.copy_(precision.log())
        if _distributed():
            dist.broadcast(self.anchor_VD, 0)
            dist.broadcast(self.log_precision, 0)

    @torch.no_grad()
    def restart_dead(self, z_MD: Tensor, seed: int, dead_below: float = 0.05) -> Tensor:
        """Move each code used less than `dead_below` times the mean onto a feature that the codebook serves badly; return how many.

        `z_MD` are this rank's features, as many on each rank. Candidates are gathered from all ranks and drawn with a
        generator seeded by `seed` (use the step), with odds in proportion to the squared distance from the nearest code, as k-means++ does (Arthur and
        Vassilvitskii 2007): every rank draws the same, and blank cells, all alike, are not drawn. Counts start anew.
        """
        pool_MD = _gather(z_MD.float())
        distance_M = nearest(pool_MD, self.codes_VD)[1]
        chosen = _draw(distance_M, min(len(self.counts_V), len(pool_MD)), seed)
        dead_V = self.counts_V < dead_below * self.counts_V.sum() / len(self.counts_V)
        rank_V = (dead_V.cumsum(0) - 1).clamp(min=0)  # the i-th dead code takes the i-th vector drawn
        dead_V = dead_V & (rank_V < len(chosen)) & (distance_M[chosen[rank_V.clamp(max=len(chosen) - 1)]] > 0)
        target_VD = pool_MD[chosen[rank_V.clamp(max=len(chosen) - 1)]]
        self.anchor_VD.copy_(torch.where(dead_V[:, None], target_VD - self.delta_VD, self.anchor_VD))
        self.counts_V.zero_()
        return dead_V.sum()

    def _place(self, codes_VD: Tensor, where: slice) -> None:
        self.anchor_VD[where] = codes_VD - self.delta_VD[where]


def nearest(z_ND: Tensor, codes_VD: Tensor, chunk: int = 1 << 14) -> tuple[Tensor, Tensor]:
    """Return (ids_N, squared distance_N) of the nearest code of each vector."""
    parts = [_nearest(part, codes_VD) for part in z_ND.split(chunk)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _nearest(z_ND: Tensor, codes_VD: Tensor) -> tuple[Tensor, Tensor]:
    ids_N = torch.addmm(codes_VD.square().sum(1), z_ND, codes_VD.T, alpha=-2).argmin(1)
    return ids_N, (z_ND - codes_VD[ids_N]).square().sum(1)  # by differences: exact 0 for a vector that is a code


def kmeans(z_ND: Tensor, count: int, rounds: int = 10, seed: int = 0) -> Tensor:
    """Return centres_VD, V = `count`, by k-means++ and `rounds` of Lloyd's iteration; an empty cluster keeps its centre."""
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(z_ND), (1,), generator=generator))
    centres_VD = z_ND[first].repeat(count, 1)
    distance_N = (z_ND - z_ND[first]).square().sum(1)
    for v in range(1, count):
        noise_N = torch.empty(len(z_ND)).exponential_(generator=generator).to(z_ND.device)
        centres_VD[v] = z_ND[(distance_N / noise_N).argmax()]
        distance_N = torch.minimum(distance_N, (z_ND - centres_VD[v]).square().sum(1))
    for _ in range(rounds):
        ids_N = nearest(z_ND, centres_VD)[0]
        counts_V = count_codes(ids_N, count)[:, None]
        sums_VD = torch.zeros_like(centres_VD).index_add_(0, ids_N, z_ND)
        centres_VD = torch.where(counts_V > 0, sums_VD / counts_V.clamp(min=1), centres_VD)
    return centres_VD


def _draw(weight_M: Tensor, count: int, seed: int) -> Tensor:
    """Return indices of `count` different entries, drawn with odds `weight_M` (exponential races, Efraimidis and Spirakis 2006)."""
    noise_M = torch.empty(len(weight_M)).exponential_(generator=torch.Generator().manual_seed(seed)).to(weight_M.device)
    return (weight_M / noise_M).topk(count).indices


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather(z_MD: Tensor) -> Tensor:
    if not _distributed():
        return z_MD
    parts = [torch.empty_like(z_MD) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, z_MD.contiguous())
    return torch.cat(parts)
