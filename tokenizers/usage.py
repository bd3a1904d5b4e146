"""How much of a codebook is in use: the first thing to watch in a tokenizer, since a collapsed one teaches nothing.

Legend: B batch, C channels, H W pixels, P Q cells, V codebook size.
"""

import torch
from einops import rearrange
from torch import Tensor


def count_codes(ids: Tensor, vocab_size: int) -> Tensor:
    """Return counts_V, int64: how often each id occurs in `ids` (any shape). Integers, so the same bits on every run."""
    flat = ids.reshape(-1)
    return torch.zeros(vocab_size, dtype=torch.int64, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))


def code_usage(counts_V: Tensor) -> tuple[Tensor, Tensor]:
    """Return (share of codes that occur, perplexity) as scalar tensors.

    Perplexity is exp of the entropy in nats: V when all codes are equally common, 1 when a single one is, 0 when none occurs.
    """
    share_V = counts_V.float() / counts_V.sum().clamp(min=1)
    perplexity = torch.special.entr(share_V).sum().exp()
    used_V = counts_V > 0
    return used_V.float().mean(), torch.where(used_V.any(), perplexity, torch.zeros_like(perplexity))


def blank_cells(image_BCHW: Tensor, stride: int, tolerance: float = 2 / 255) -> Tensor:
    """Return bool_BPQ: cells in which each channel's pixels lie within `tolerance` of each other (images in [0, 1]).

    Blank cells deserve few codes, however many codes there are, so perplexity over the others says more about a codebook.
    """
    cells = rearrange(image_BCHW, "B C (P i) (Q j) -> B P Q C (i j)", i=stride, j=stride)
    return (cells.amax(-1) - cells.amin(-1) <= tolerance).all(-1)
