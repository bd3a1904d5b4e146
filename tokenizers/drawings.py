"""Pictures of what a tokenizer does: reconstructions, its tokens as colours, where images differ, and what codes stand for.

Legend: K images, C channels (of more than three the first three are shown, of two the first), H W pixels, P Q cells, V codebook size.
"""

import io
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mimetic.engine.pictures import contact_sheet
from mimetic.tokenizers.doctor import Figures, Specimens
from mimetic.tokenizers.usage import count_codes

SHOWN, CODES, PATCHES = 10, 8, 12
PLACE = 38  # pixels that a cell and its frame take
SMALLEST = 112  # pixels of a small image's side on a sheet


def draw(tokenizer: Any, seen: Specimens, figures: Figures) -> dict[str, bytes]:
    """Return PNG files by name: `tokens`, `codes`, `entropy`, and `reconstructions` if the tokenizer can decode."""
    image_KCHW, ids_KPQ = seen.image_KCHW[:SHOWN], seen.ids_NPQ[:SHOWN]
    drawn = {"reconstructions.png": sheet([image_KCHW, tokenizer.decode(ids_KPQ)])} if hasattr(tokenizer, "decode") else {}
    return drawn | {
        "tokens.png": sheet([image_KCHW, token_colours(ids_KPQ, seen.ids_NPQ, tokenizer.vocab_size, tokenizer.stride)]),
        "codes.png": code_figure(seen, tokenizer.vocab_size, tokenizer.stride),
        "entropy.png": entropy_figure(figures),
    }


def sheet(rows_KCHW: list[Tensor]) -> bytes:
    """Return a PNG of images in [0, 1], one row per batch; single channels are grey."""
    from PIL import Image

    coloured = [visible(row) for row in rows_KCHW]
    factor = max(1, -(-SMALLEST // max(coloured[0].shape[-2:])))
    large = [row.repeat_interleave(factor, -1).repeat_interleave(factor, -2) for row in coloured]
    buffer = io.BytesIO()
    Image.fromarray(contact_sheet(large)).save(buffer, "png")
    return buffer.getvalue()


def visible(image_KCHW: Tensor) -> Tensor:
    """Return three channels in [0, 1]: the first three, or the first as grey."""
    shown = image_KCHW[:, :3] if image_KCHW.shape[1] >= 3 else image_KCHW[:, :1].expand(-1, 3, -1, -1)
    return shown.detach().float().clamp(0, 1).cpu()


def token_colours(ids_KPQ: Tensor, all_NPQ: Tensor, vocab_size: int, stride: int) -> Tensor:
    """Return image_K3HW: a colour for each code, hues a golden angle apart in the order of frequency, so that common ones differ most."""
    import matplotlib as mpl

    rank_V = count_codes(all_NPQ, vocab_size).argsort(descending=True, stable=True).argsort().cpu().numpy()
    hue_V, ring_V = rank_V * 0.61803399 % 1, rank_V // 8 % 3
    colours_V3 = mpl.colors.hsv_to_rgb(np.stack([hue_V, 0.9 - 0.25 * ring_V, 0.95 - 0.2 * ring_V], 1))
    image_K3PQ = rearrange(torch.from_numpy(colours_V3).float()[ids_KPQ.cpu()], "K P Q D -> K D P Q")
    return image_K3PQ.repeat_interleave(stride, -1).repeat_interleave(stride, -2)


def code_figure(seen: Specimens, vocab_size: int, stride: int) -> bytes:
    """Return a PNG of the most and the least frequent codes among the images kept: share, mean, and some of their cells."""
    from matplotlib.figure import Figure

    patches_MCIJ = rearrange(visible(seen.image_KCHW), "K C (P i) (Q j) -> (K P Q) C i j", i=stride, j=stride)
    ids_M = seen.ids_NPQ[: len(seen.image_KCHW)].flatten().cpu()
    share_V, here_V = (count_codes(seen.ids_NPQ, vocab_size) / seen.ids_NPQ.numel()).cpu(), count_codes(ids_M, vocab_size)
    order_V = share_V.argsort(descending=True, stable=True)
    order = order_V[here_V[order_V] > 0].tolist()
    groups = {"most frequent": order[:CODES], "least frequent": order[CODES:][-CODES:]}
    figure = Figure(figsize=(13, 0.46 * len(groups["most frequent"]) + 0.8), dpi=100, layout="constrained", facecolor="white")
    halves: Any = figure.subplots(1, 2)
    for half, (title, codes) in zip(halves, groups.items(), strict=True):
        half.set_title(f"{title} codes: share, mean, some of their cells", fontsize=10)
        half.spines[:].set_visible(False)
        half.set(xticks=[], yticks=[])
        if codes:
            half.imshow(np.concatenate([_row_of_cells(patches_MCIJ[ids_M == code]) for code in codes]), interpolation="nearest")
            labels = [f"{code}:  {100 * share:.2g} %" for code, share in zip(codes, share_V[codes].tolist(), strict=True)]
            half.set_yticks([(row + 0.5) * PLACE - 0.5 for row in range(len(codes))], labels, fontsize=9)
            half.tick_params(length=0)
    return _png(figure)


def _row_of_cells(mine_MCIJ: Tensor) -> np.ndarray:
    """(PLACE, PLACE * (PATCHES + 1), 3): their mean, and some of them from all over the images, framed in grey."""
    chosen = torch.linspace(0, len(mine_MCIJ) - 1, min(PATCHES, len(mine_MCIJ))).long()
    shown = F.interpolate(torch.cat([mine_MCIJ.mean(0, keepdim=True), mine_MCIJ[chosen]]), (PLACE - 6, PLACE - 6), mode="nearest")
    framed = F.pad(F.pad(shown, [1] * 4, value=0.6), [2] * 4, value=1.0)
    row = np.ones((PLACE, PLACE * (PATCHES + 1), 3), np.float32)
    row[:, : PLACE * len(framed)] = rearrange(framed, "M C i j -> i (M j) C").numpy()
    return row


def entropy_figure(figures: Figures) -> bytes:
    """Return a PNG of the entropy at each place of the grid, in bits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.8), dpi=110, layout="constrained", facecolor="white")
    axes = figure.subplots()
    drawn = axes.imshow(figures.position_entropy, cmap="viridis", vmin=0, vmax=max(figures.entropy, *map(max, figures.position_entropy)))
    axes.set(xlabel="column of cells", ylabel="row of cells")
    axes.set_title(f"what tokens tell at each place, bits\n{figures.entropy:.2f} over all places, {figures.images:,} images", fontsize=10)
    figure.colorbar(drawn, ax=axes)
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
