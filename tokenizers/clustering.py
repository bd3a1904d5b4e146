"""k-means on the device, and the draw of badly served vectors that both its start and the restart of dead codes use.

Legend: N vectors, D width, V centres.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mimetic.tokenizers.usage import count_codes

_PAIRS = 1 << 24  # distances held in memory at a time


def kmeans(z_ND: Tensor, count: int, rounds: int = 10, seed: int = 0, spherical: bool = False) -> Tensor:
    """Return `count` centres_VD after k-means++'s start and `rounds` of Lloyd's iteration; an empty cluster keeps its centre.

    `spherical` is for vectors of unit length: so are the centres then, and the nearest one is that of the largest cosine.

    The start draws centres in blocks of an eighth of those there are, as k-means|| does (arXiv 1203.6402): some 60 rounds
    for V = 8192, where one at a time takes minutes.
    """
    centres_VD = z_ND[_draw_one(len(z_ND), seed)][None]
    distance_N = torch.full((len(z_ND),), torch.inf, device=z_ND.device)
    newest_KD = centres_VD
    while len(centres_VD) < count:
        distance_N = torch.minimum(distance_N, nearest(z_ND, newest_KD)[1])
        block = min(max(1, len(centres_VD) // 8), count - len(centres_VD))
        newest_KD = z_ND[draw_by_weight(distance_N, block, seed + len(centres_VD))]
        centres_VD = torch.cat([centres_VD, newest_KD])
    for _ in range(rounds):
        centres_VD = _lloyd(z_ND, centres_VD)
        centres_VD = F.normalize(centres_VD) if spherical else centres_VD
    return centres_VD


def nearest(z_ND: Tensor, codes_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Return (ids_N, squared distance_N) of the nearest code of each vector."""
    parts = [_nearest(part, codes_VD) for part in z_ND.split(max(1, _PAIRS // len(codes_VD)))]
    return torch.cat([ids for ids, _ in parts]), torch.cat([distance for _, distance in parts])


def draw_by_weight(weight_N: Tensor, count: int, seed: int) -> Tensor:
    """Return indices of `count` different entries, drawn with odds `weight_N`: the winners of exponential races.

    The noise comes from a CPU generator with this seed, so every rank and device draws alike (Efraimidis and Spirakis 2006).
    """
    noise_N = torch.empty(len(weight_N)).exponential_(generator=torch.Generator().manual_seed(seed))
    return (weight_N / noise_N.to(weight_N.device)).topk(count).indices


def _draw_one(below: int, seed: int) -> int:
    return int(torch.randint(below, (1,), generator=torch.Generator().manual_seed(seed)))


def _nearest(z_ND: Tensor, codes_VD: Tensor) -> tuple[Tensor, Tensor]:
    ids_N = torch.addmm(codes_VD.square().sum(1), z_ND, codes_VD.T, alpha=-2).argmin(1)
    return ids_N, (z_ND - codes_VD[ids_N]).square().sum(1)  # by differences: exactly 0 for a vector that is a code


def _lloyd(z_ND: Tensor, centres_VD: Tensor) -> Tensor:
    ids_N = nearest(z_ND, centres_VD)[0]
    counts_V1 = count_codes(ids_N, len(centres_VD))[:, None]
    sums_VD = torch.zeros_like(centres_VD).index_add_(0, ids_N, z_ND)
    return torch.where(counts_V1 > 0, sums_VD / counts_V1.clamp(min=1), centres_VD)
