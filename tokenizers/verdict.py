"""A word on a tokenizer from what the doctor measured, and the reasons for it.

The thresholds are relative: to what the codebook could carry on so many cells, to what a k-means codebook of the same images does, and to
what the tokenizer itself did on held-out images of its own training, where its folder tells.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimetic.tokenizers.doctor import Figures, Specimens

HEALTHY, COARSE, COLLAPSED, BLIND = "healthy", "coarse", "collapsed", "blind to this domain"
REFERENCE = ("images", "non_blank", "codes_used", "perplexity", "perplexity_non_blank", "top1_non_blank", "explained", "detail",
             "yardstick_detail", "pixel_mean", "pixel_std")  # fmt: skip  # what a training keeps of its own figures
FEWEST = 32  # cells that are not blank; of fewer nothing can be said


@dataclass(frozen=True)
class Limits:
    """What figures are held against; V are the codes that could occur: of the codebook, or as many as there are cells that are not blank.

    Attributes:
        collapsed_entropy: share of log2 V: 9 of 256 equally common codes, 37 of 8192.
        collapsed_used: share of V in use, for a tokenizer whose perplexity is coarse, or that has no reference.
        collapsed_top: share of the most frequent code in cells that are not blank.
        collapsed_explained: variance that reconstructions explain, as a share of what k-means explains: random weights reach 0.14.
        blind_perplexity: share of the reference's.
        blind_detail: share of k-means's detail inside cells, times the reference's own share of that; `blind_detail_alone` without one.
        blind_lost: variance that reconstructions lose, as a multiple of the reference's; and `blind_lost_yardstick` of k-means's.
        blind_place: share of a token's information that is its place.
        blind_moved: agreement beyond chance after a shift by a cell.
        coarse_entropy: share of log2 V: 16 of 256 equally common codes, 90 of 8192; and `coarse_bits` at the least.
        coarse_used: share of V in use, where there are `cells_a_code` times as many cells that are not blank, so that all could occur.
        coarse_explained: share of the variance that reconstructions explain.
    """

    collapsed_entropy: float = 0.4
    collapsed_used: float = 1 / 3
    collapsed_top: float = 0.5
    collapsed_explained: float = 0.25
    blind_perplexity: float = 1 / 3
    blind_detail: float = 0.5
    blind_detail_alone: float = 0.35
    blind_lost: float = 2.0
    blind_lost_yardstick: float = 1.3
    blind_place: float = 0.8
    blind_moved: float = 0.05
    coarse_entropy: float = 0.5
    coarse_bits: float = 3.0
    coarse_used: float = 0.4
    cells_a_code: int = 16
    coarse_explained: float = 0.8


LIMITS = Limits()


@dataclass(frozen=True)
class Verdict:
    """What is said of a tokenizer.

    Attributes:
        word: healthy, coarse, collapsed, or blind to this domain.
        reasons: for the word, each with the figure and its limit.
        compared: what figures were held against.
    """

    word: str
    reasons: tuple[str, ...]
    compared: str


def reference_of(figures: Figures) -> dict[str, Any]:
    """The few figures that a tokenizer's folder keeps of its own held-out images."""
    return {name: getattr(figures, name) for name in REFERENCE}


def judge(figures: Figures, reference: Mapping[str, Any] | None = None) -> Verdict:
    """Return the verdict.

    A tokenizer collapsed whatever it is shown, or was never trained, if its tokens carry next to nothing here and its own
    reference is no better or is not known. It is blind to this domain if it was better on its own, or does far worse than k-means.
    """
    compared = ("reference figures of its own held-out images" if reference else
                "absolute limits and k-means alone: the tokenizer's folder has no reference figures")  # fmt: skip
    fails = _collapse(figures.vocab_size, figures.non_blank, figures.codes_used, figures.perplexity_non_blank, figures.top1_non_blank,
                      figures.explained, figures.yardstick_explained)  # fmt: skip
    if not reference and figures.codes_used < least_used(figures, LIMITS.collapsed_used):  # where it might have been better is not known
        fails.append(f"{_in_use(figures)}, less than {LIMITS.collapsed_used:.0%}: the others are dead")
    if fails and not (reference and _was_sound(reference, figures.vocab_size)):
        return Verdict(COLLAPSED, tuple(fails), compared)
    blind = fails + (_worse_than(figures, reference) if reference else []) + _blindness(figures, reference)
    if blind:
        return Verdict(BLIND, tuple(blind), compared)
    coarse = _coarseness(figures)
    return Verdict(COARSE, tuple(coarse), compared) if coarse else Verdict(HEALTHY, (_praise(figures),), compared)


def too_little(seen: Specimens) -> str:
    """Return why nothing can be said on these images; empty where something can."""
    images, cells = len(seen.ids_NPQ), int((~seen.blank_NPQ).sum())
    if images < 2:
        return f"{images} images that can be read are too few to judge a tokenizer on; give some hundred"
    if cells < FEWEST:
        return f"{cells} of {seen.blank_NPQ.numel():,} cells show anything at all, too few to judge a tokenizer on; give other images"
    return ""


def limits(vocab_size: int, cells: int) -> tuple[float, float]:
    """Return the perplexities over `cells` cells that are not blank below which a tokenizer is collapsed, and coarse."""
    possible = _possible(vocab_size, cells)
    return possible**LIMITS.collapsed_entropy, max(possible**LIMITS.coarse_entropy, 2**LIMITS.coarse_bits)


def least_used(f: Figures, share: float = LIMITS.coarse_used) -> int:
    """Return how many codes a share of V is, by default that of a tokenizer that is not coarse: 0 where there are too few cells to tell."""
    return math.ceil(share * f.vocab_size) if f.non_blank >= LIMITS.cells_a_code * f.vocab_size else 0


def _possible(vocab_size: int, cells: int) -> int:
    return max(2, min(vocab_size, cells))


def beyond_chance(figures: Figures, what: str) -> float:
    """Return the share of tokens that stay beyond those that chance would keep: 1 for all, 0 for chance (Cohen's kappa)."""
    chance = figures.stays_by_chance[what]
    return (figures.stays[what] - chance) / (1 - chance) if chance < 1 else 1.0


def _collapse(vocab_size: int, non_blank: int, codes_used: int, perplexity_non_blank: float, top1_non_blank: float,
              explained: float | None, by_kmeans: float = 1.0) -> list[str]:  # fmt: skip
    """Reasons to call a tokenizer collapsed; `by_kmeans` is what k-means explains where that is known, all of it otherwise."""
    reasons, (limit, coarse) = [], limits(vocab_size, non_blank)
    perplexity = f"perplexity {perplexity_non_blank:.3g} over cells that are not blank"
    if perplexity_non_blank < limit:
        reasons.append(f"{perplexity}, below {limit:.3g}: less than two fifths of the bits that {vocab_size:,} codes could carry")
    elif perplexity_non_blank < coarse and codes_used < LIMITS.collapsed_used * _possible(vocab_size, non_blank):
        reasons.append(f"{perplexity}, below {coarse:.3g}, and less than {LIMITS.collapsed_used:.0%} of {vocab_size:,} codes in use")
    if top1_non_blank > LIMITS.collapsed_top:
        reasons.append(f"one code takes {top1_non_blank:.0%} of the cells that are not blank, more than {LIMITS.collapsed_top:.0%}")
    if explained is not None and explained < LIMITS.collapsed_explained * by_kmeans:
        reasons.append(f"reconstructions explain {explained:.0%} of the images' variance, less than {LIMITS.collapsed_explained:.0%} of "
                       f"the {by_kmeans:.0%} that k-means does")  # fmt: skip
    return reasons


def _was_sound(reference: Mapping[str, Any], vocab_size: int) -> bool:
    """Whether a tokenizer was not collapsed on its own held-out images."""
    known = {name: reference[name] for name in ("codes_used", "perplexity_non_blank", "top1_non_blank", "explained")}
    return not _collapse(vocab_size, reference["non_blank"], **known)


def _worse_than(f: Figures, reference: Mapping[str, Any]) -> list[str]:
    reasons, before = [], reference["perplexity_non_blank"]
    if f.perplexity_non_blank < LIMITS.blind_perplexity * before:
        reasons.append(f"{_perplexity(f)}, below a third of the {before:.3g} on its own held-out images")
    if f.explained is not None and reference["explained"] is not None:
        lost, lost_before, lost_by_kmeans = 1 - f.explained, 1 - reference["explained"], 1 - f.yardstick_explained
        if lost > max(LIMITS.blind_lost * lost_before, LIMITS.blind_lost_yardstick * lost_by_kmeans):
            reasons.append(f"reconstructions lose {lost:.1%} of the variance, more than {LIMITS.blind_lost:g} times the {lost_before:.1%} "
                           f"on its own held-out images and {LIMITS.blind_lost_yardstick:g} times the {lost_by_kmeans:.1%} that k-means "
                           "loses here")  # fmt: skip
    return reasons


def _blindness(f: Figures, reference: Mapping[str, Any] | None) -> list[str]:
    reasons = []
    if f.detail is not None and f.detail < (least := least_detail(f.yardstick_detail, reference)):
        reasons.append(f"reconstructions have {f.detail:.0%} of the detail inside cells, less than {least:.0%}: {f.yardstick_codes:,} "
                       f"codes of k-means have {f.yardstick_detail:.0%}")  # fmt: skip
    if f.position_information > LIMITS.blind_place * f.entropy > 0:
        reasons.append(f"{f.position_information:.2g} of a token's {f.entropy:.2g} bits are where its cell is, and not what it shows")
    if "1 cell" in f.stays and (moved := beyond_chance(f, "1 cell")) < LIMITS.blind_moved:
        reasons.append(f"shifted by a cell, {moved:.0%} of the tokens move along beyond chance, less than {LIMITS.blind_moved:.0%}")
    return reasons


def least_detail(by_kmeans: float, reference: Mapping[str, Any] | None) -> float:
    """Return the detail inside cells below which a tokenizer is blind where k-means has so much of it."""
    if not reference or reference["detail"] is None or reference["yardstick_detail"] <= 0:
        return LIMITS.blind_detail_alone * by_kmeans
    return LIMITS.blind_detail * min(1.0, reference["detail"] / reference["yardstick_detail"]) * by_kmeans


def _coarseness(f: Figures) -> list[str]:
    reasons, (_, limit) = [], limits(f.vocab_size, f.non_blank)
    if f.perplexity_non_blank < limit:
        reasons.append(f"{_perplexity(f)}, below {limit:.3g}: tokens of {math.log2(f.perplexity_non_blank):.2g} bits say little")
    if f.codes_used < least_used(f):
        reasons.append(f"{_in_use(f)}, less than {LIMITS.coarse_used:.0%}: the others are dead, and a codebook without them would tell as "
                       "much")  # fmt: skip
    if f.explained is not None and f.explained < LIMITS.coarse_explained:
        reasons.append(f"reconstructions explain {f.explained:.0%} of the images' variance, less than {LIMITS.coarse_explained:.0%}: "
                       "smaller cells or more codes would explain more")  # fmt: skip
    return reasons


def _praise(f: Figures) -> str:
    drawn = ("; it does not decode, so what its tokens tell is not judged" if f.explained is None
             else f", reconstructions explain {f.explained:.0%} of the images' variance")  # fmt: skip
    return f"{_in_use(f)}, {_perplexity(f)}{drawn}"


def _in_use(f: Figures) -> str:
    return f"{f.codes_used:,} of {f.vocab_size:,} codes in use"


def _perplexity(f: Figures) -> str:
    return f"perplexity {f.perplexity_non_blank:.3g} over cells that are not blank"
