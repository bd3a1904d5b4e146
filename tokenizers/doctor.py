"""What is measured of a tokenizer on images that it did not learn from: `measure` is all of it, as plain numbers.

Tokens of all images are kept (8 bytes each), pixels of the first few only: shifts, reconstructions and the yardstick are measured
on those. Everything runs where the tokenizer is; nothing draws from torch's global generator.

Legend: N images, B batch, C channels, H W pixels, P Q cells, V codebook size, E = C * stride**2 values in a cell.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mimetic.tokenizers.clustering import kmeans, nearest
from mimetic.tokenizers.contract import ImageTokenizer, only_size
from mimetic.tokenizers.information import (
    entropy_bits,
    guess_from_surroundings,
    neighbour_information,
    position_entropy,
    position_information,
)
from mimetic.tokenizers.usage import blank_cells, count_codes

KEPT = 256  # images whose pixels are kept
KEPT_VALUES = 1 << 25  # of pixels: 128 MiB
PART = 32  # images that the tokenizer gets at a time
YARDSTICK_CELLS, CELLS_PER_CODE = 1 << 14, 16  # what the k-means yardstick learns from
CELLS = "K C (P i) (Q j) -> (K P Q) (C i j)"
LITTLE = 1e-9  # of variance, to divide by where images are blank


@dataclass(frozen=True)
class Figures:
    """What was measured. Shares are in [0, 1], information in bits.

    Attributes:
        images: N, and `cells` their tokens, `non_blank` those of cells that show anything.
        codes_used: codes that occur.
        perplexity: of all tokens; `perplexity_non_blank` of those of cells that are not blank.
        entropy: log2 of the perplexity.
        top1: share of the most frequent code; `top10` of the ten most frequent; `top1_non_blank` in cells that are not blank.
        position_entropy: P x Q, of the token at each place.
        position_information: what a token's place tells of it.
        beside, below: mutual information of neighbours, less that of shuffled ones (`*_shuffled`).
        guess_alone: bits to guess a token by the shares of codes; `guess_surrounded` by its neighbours; `guessable` the part that they
            give away.
        stays: share of tokens that stay under shifts down and right by some pixels ("1 pixel"; under "1 cell" they have to move
            along) and under a horizontal flip; `stays_by_chance` what independent tokens of those shares would do.
        mse, psnr, explained, detail: of reconstructions, see `Fidelity`, and in dB; None for a tokenizer without `decode`.
        yardstick_codes: size of a k-means codebook of raw cells, learned from half of the images that were kept;
            `yardstick_explained` and `yardstick_detail` what that explains of the other half, where the tokenizer is measured too.
        pixel_mean, pixel_std: per channel.
    """

    images: int
    cells: int
    non_blank: int
    vocab_size: int
    codes_used: int
    perplexity: float
    perplexity_non_blank: float
    entropy: float
    top1: float
    top10: float
    top1_non_blank: float
    position_entropy: list[list[float]]
    position_information: float
    beside: float
    beside_shuffled: float
    below: float
    below_shuffled: float
    guess_alone: float
    guess_surrounded: float
    guessable: float
    stays: dict[str, float]
    stays_by_chance: dict[str, float]
    mse: float | None
    psnr: float | None
    explained: float | None
    detail: float | None
    yardstick_codes: int
    yardstick_explained: float
    yardstick_detail: float
    pixel_mean: list[float]
    pixel_std: list[float]


@dataclass(frozen=True)
class Fidelity:
    """How much of images is in their reconstructions.

    Attributes:
        mse: mean squared error in [0, 1].
        explained: share of the variance about each channel's mean that is explained.
        detail: the same inside cells that are not blank, about each cell's own mean: what a mosaic of plain cells has nothing of.
    """

    mse: float
    explained: float
    detail: float


@dataclass(frozen=True)
class Specimens:
    """Tokens ids_NPQ and blank_NPQ of all images; `image_KCHW`, the first K of them in [0, 1]; all on the tokenizer's device."""

    ids_NPQ: Tensor
    blank_NPQ: Tensor
    image_KCHW: Tensor
    pixel_mean: list[float]
    pixel_std: list[float]


def collect(tokenizer: ImageTokenizer, batches: Iterable[Tensor], keep: int = KEPT) -> Specimens:
    """Return the tokens of all batches, image_BCHW in [0, 1] on the tokenizer's device, and the pixels of at most `keep` images.

    Raises:
        SettingError: images that the tokenizer does not take.
    """
    ids: list[Tensor] = []
    blank: list[Tensor] = []
    kept: list[Tensor] = []
    moments = torch.zeros(3, 1, dtype=torch.float64)
    for image_BCHW in batches:
        ids.append(tokenizer.encode(image_BCHW))
        blank.append(blank_cells(image_BCHW, tokenizer.stride))
        room = min(keep, max(2, KEPT_VALUES // image_BCHW[0].numel())) - sum(len(images) for images in kept)
        kept.append(image_BCHW[: max(0, room)])
        pixels_CM = rearrange(image_BCHW, "B C H W -> C (B H W)").double()
        sums = [torch.full_like(pixels_CM[:, 0], pixels_CM.shape[1]), pixels_CM.sum(1), pixels_CM.square().sum(1)]
        moments = moments.to(pixels_CM.device) + torch.stack(sums)
    count_C, sum_C, square_C = moments
    mean_C = sum_C / count_C
    std_C = (square_C / count_C - mean_C.square()).clamp(min=0).sqrt()
    return Specimens(torch.cat(ids), torch.cat(blank), torch.cat(kept), mean_C.tolist(), std_C.tolist())


def measure(tokenizer: ImageTokenizer, seen: Specimens, *, shifts: bool = True) -> Figures:
    """Return all figures.

    Args:
        tokenizer: frozen, with `decode` or without.
        seen: what `collect` found: two images at least.
        shifts: whether stability is measured; it takes five encodings of each image that was kept.
    """
    counts_V = count_codes(seen.ids_NPQ, tokenizer.vocab_size)
    textured_V = count_codes(seen.ids_NPQ[~seen.blank_NPQ], tokenizer.vocab_size)
    share_V = counts_V.double().sort(descending=True).values / counts_V.sum()
    beside, below = (neighbour_information(seen.ids_NPQ, tokenizer.vocab_size, dim) for dim in (2, 1))
    guess = guess_from_surroundings(seen.ids_NPQ, tokenizer.vocab_size)
    ids_KPQ = seen.ids_NPQ[: len(seen.image_KCHW)]
    stays = stability(tokenizer, seen.image_KCHW, ids_KPQ) if shifts else {}
    learned_KCHW, asked_KCHW = seen.image_KCHW[::2], seen.image_KCHW[1::2]
    decode = getattr(tokenizer, "decode", None)
    drawn = in_parts(decode, ids_KPQ[1::2]).float() if decode else None
    own = None if drawn is None else fidelity(asked_KCHW, drawn, tokenizer.stride)
    codes, drawn = kmeans_yardstick(learned_KCHW, asked_KCHW, tokenizer.stride, tokenizer.vocab_size)
    yardstick = fidelity(asked_KCHW, drawn, tokenizer.stride)
    entropy = float(entropy_bits(counts_V))
    return Figures(
        images=len(seen.ids_NPQ), cells=seen.ids_NPQ.numel(), non_blank=int(textured_V.sum()), vocab_size=tokenizer.vocab_size,
        codes_used=int((counts_V > 0).sum()), perplexity=2**entropy,
        perplexity_non_blank=float(2 ** entropy_bits(textured_V)) if textured_V.any() else 0.0,
        entropy=entropy, top1=float(share_V[0]), top10=float(share_V[:10].sum()),
        top1_non_blank=float(textured_V.max() / textured_V.sum().clamp(min=1)),
        position_entropy=position_entropy(seen.ids_NPQ).tolist(), position_information=position_information(seen.ids_NPQ),
        beside=beside.excess, beside_shuffled=beside.shuffled, below=below.excess, below_shuffled=below.shuffled,
        guess_alone=guess.alone, guess_surrounded=guess.surrounded, guessable=guess.share,
        stays={name: kept for name, (kept, _) in stays.items()}, stays_by_chance={name: chance for name, (_, chance) in stays.items()},
        mse=own.mse if own else None, psnr=-10 * math.log10(max(own.mse, 1e-12)) if own else None,
        explained=own.explained if own else None, detail=own.detail if own else None,
        yardstick_codes=codes, yardstick_explained=yardstick.explained, yardstick_detail=yardstick.detail,
        pixel_mean=seen.pixel_mean, pixel_std=seen.pixel_std,
    )  # fmt: skip


def stability(tokenizer: ImageTokenizer, image_KCHW: Tensor, ids_KPQ: Tensor) -> dict[str, tuple[float, float]]:
    """Return (share of tokens that stay, what chance would do) under shifts and a flip.

    Shifted are two crops of the same pixels, one cell smaller than the image, so that nothing has to be made up at the border. For a
    tokenizer that takes one size alone the image is enlarged by a cell before.
    """
    stride, larger_KCHW = tokenizer.stride, image_KCHW
    if only_size(tokenizer):
        larger_KCHW = F.interpolate(image_KCHW, [side + stride for side in image_KCHW.shape[2:]], mode="bilinear")
    height, width = (side - stride for side in larger_KCHW.shape[2:])
    found: dict[str, tuple[float, float]] = {}
    if min(height, width) >= 2 * stride:
        still, *moved = (in_parts(tokenizer.encode, larger_KCHW[..., by : by + height, by : by + width])
                         for by in (0, 1, max(1, stride // 2), stride))  # fmt: skip
        names = ["1 pixel", f"{max(1, stride // 2)} pixels", "1 cell"]
        for name, ids in zip(names, moved, strict=True):
            pair = (still[:, 1:, 1:], ids[:, :-1, :-1]) if name == "1 cell" else (still, ids)
            found[name] = agreement(*pair, tokenizer.vocab_size)
    turned = in_parts(lambda part: tokenizer.encode(part.flip(-1)).flip(-1), image_KCHW)
    return found | {"flip": agreement(ids_KPQ, turned, tokenizer.vocab_size)}


def agreement(ids: Tensor, others: Tensor, vocab_size: int) -> tuple[float, float]:
    """Return the share of places at which two maps of tokens agree, and what that would be if they were independent."""
    share_V, other_V = (count_codes(each, vocab_size).double() / each.numel() for each in (ids, others))
    return float((ids == others).double().mean()), float((share_V * other_V).sum())


def kmeans_yardstick(learned_KCHW: Tensor, asked_KCHW: Tensor, stride: int, vocab_size: int) -> tuple[int, Tensor]:
    """Return the size of a k-means codebook of raw cells, at most V, and the asked images as it draws them.

    The least that a tokenizer of this size should do on these images. It sees no context and is made in seconds, so one that does far
    worse was not made for them.
    """
    cells_NE, asked_NE = (rearrange(image, CELLS, i=stride, j=stride) for image in (learned_KCHW, asked_KCHW))
    order_N = torch.randperm(len(cells_NE), generator=torch.Generator().manual_seed(0))[:YARDSTICK_CELLS]
    codes = max(1, min(vocab_size, len(order_N) // CELLS_PER_CODE))
    centres_VE = kmeans(cells_NE[order_N.to(cells_NE.device)], codes)
    rows = asked_KCHW.shape[2] // stride
    left, right = reversed(CELLS.split(" -> "))
    drawn_NE = centres_VE[nearest(asked_NE, centres_VE)[0]]
    return codes, rearrange(drawn_NE, f"{left} -> {right}", K=len(asked_KCHW), P=rows, i=stride, j=stride)


def fidelity(image_KCHW: Tensor, drawn_KCHW: Tensor, stride: int) -> Fidelity:
    """Return how much of the images is in what was drawn of them; both in [0, 1]."""
    error_KCHW = (drawn_KCHW - image_KCHW).double()
    mse = float(error_KCHW.square().mean())
    variance = float(image_KCHW.double().var((0, 2, 3), correction=0).mean())
    textured_N = ~blank_cells(image_KCHW, stride).flatten()
    inside, lost = (_inside_cells(each, stride, textured_N) for each in (image_KCHW.double(), error_KCHW))
    return Fidelity(mse, 1 - mse / max(variance, LITTLE), 1 - lost / max(inside, LITTLE))


def in_parts(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Apply a function to a few images, or their tokens, at a time."""
    return torch.cat([function(part.contiguous()) for part in rows.split(PART)])


def _inside_cells(image_KCHW: Tensor, stride: int, textured_N: Tensor) -> float:
    """Mean square, over cells that are not blank, about each channel's mean in the cell."""
    cells_NCI = rearrange(image_KCHW, "K C (P i) (Q j) -> (K P Q) C (i j)", i=stride, j=stride)[textured_N]
    return float((cells_NCI - cells_NCI.mean(2, keepdim=True)).square().sum() / max(1, cells_NCI.numel()))
