"""What `mimetic doctor` says, in words: each figure beside the limit that it is held against."""

from collections.abc import Mapping
from typing import Any

from mimetic.tokenizers.doctor import Figures
from mimetic.tokenizers.verdict import BLIND, COARSE, COLLAPSED, HEALTHY, LIMITS, Verdict, least_detail, least_used, limits

NEXT = {
    HEALTHY: "pretrain with it on images like these: pretrain/beit.py --tokenizer.path {path} (--help has an example)",
    COARSE: "it can be pretrained with, and teaches less than a finer one; train one with more codes or smaller cells "
            "(dvae.vocab_size, dvae.stride), or give it larger images (--image-size here, views.target_size in pretraining)",
    COLLAPSED: "train another: tokenizers/train_dvae.py seeds codes from images and restarts dead ones (dvae.seed_images, "
               "dvae.restart_every)",
    BLIND: "train one on images like these: tokenizers/train_dvae.py --data.index {shards}",
}  # fmt: skip


def findings(f: Figures, reference: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return (what, found), one for each line of the report."""
    collapsed, coarse = limits(f.vocab_size, f.non_blank)
    fewest = least_used(f)
    alone = "" if reference else f"collapsed below {least_used(f, LIMITS.collapsed_used):,}, "
    enough = f" ({alone}coarse below {fewest:,})" if fewest else ""
    lines = [
        ("codes", f"{f.codes_used:,} of {f.vocab_size:,} occur{enough}, the ten most frequent in {f.top10:.1%} of {f.cells:,} cells, the "
                  f"first in {f.top1:.1%} and in {f.top1_non_blank:.1%} of those that are not blank (collapsed above "
                  f"{LIMITS.collapsed_top:.0%})"),
        ("perplexity", f"{f.perplexity:.1f}; {f.perplexity_non_blank:.1f} over the {f.non_blank / f.cells:.0%} of cells that are not blank "
                       f"(collapsed below {collapsed:.3g}, coarse below {coarse:.3g}{_before(reference, 'perplexity_non_blank', '.1f')})"),
        ("places", f"{f.entropy:.2f} bits a token, of which its place tells {f.position_information:.2f} (blind above "
                   f"{LIMITS.blind_place:.0%} of them)"),
        ("neighbours", f"tell {f.beside:.2f} bits (beside) and {f.below:.2f} (below) of each other; {f.beside_shuffled:.2f} and "
                       f"{f.below_shuffled:.2f} that shuffled pairs seem to tell are taken off"),
        ("guessing", f"{f.guess_alone:.2f} bits are missing before, {f.guess_surrounded:.2f} after a look at the four neighbours: "
                     f"they give {f.guessable:.0%} of a token away, the rest is for the network to find"),
    ]  # fmt: skip
    if f.stays:
        kept = ", ".join(f"{share:.0%} under {name} ({f.stays_by_chance[name]:.0%} by chance)" for name, share in f.stays.items())
        lines.append(("stability", f"tokens that stay: {kept}; under 1 cell they move along (blind below {LIMITS.blind_moved:.0%} beyond "
                                   "chance)"))  # fmt: skip
    if f.explained is not None and f.detail is not None:
        least = least_detail(f.yardstick_detail, reference)
        lines += [
            ("reconstruction", f"{f.psnr:.1f} dB; explains {f.explained:.1%} of the variance (collapsed below "
                               f"{LIMITS.collapsed_explained * f.yardstick_explained:.0%}, coarse below {LIMITS.coarse_explained:.0%}"
                               f"{_before(reference, 'explained', '.1%')}) and {f.detail:.1%} of the detail inside cells (blind below "
                               f"{least:.1%})"),
            ("yardstick", f"{f.yardstick_codes:,} codes of k-means, made of these images in seconds, explain {f.yardstick_explained:.1%} "
                          f"and {f.yardstick_detail:.1%}"),
        ]  # fmt: skip
    else:
        lines.append(("reconstruction", "left out: this tokenizer does not decode"))
    pixels = f"mean {_numbers(f.pixel_mean)}, deviation {_numbers(f.pixel_std)}"
    if reference:
        pixels += f"; its own held-out images: {_numbers(reference['pixel_mean'])}, {_numbers(reference['pixel_std'])}"
    return [*lines, ("pixels", pixels)]


def conclusion(verdict: Verdict, path: str, shards: str) -> list[str]:
    """Return the verdict, its reasons, and what to do next."""
    return [f"verdict: {verdict.word}", *(f"- {reason}" for reason in verdict.reasons), f"held against {verdict.compared}",
            f"next: {NEXT[verdict.word].format(path=path, shards=shards)}"]  # fmt: skip


def page(title: str, f: Figures, reference: Mapping[str, Any] | None, told: list[str], pictures: list[str]) -> str:
    """Return the report as markdown."""
    rows = "".join(f"| {what} | {found} |\n" for what, found in findings(f, reference))
    shown = "".join(f"\n## {name.removesuffix('.png').capitalize()}\n\n![]({name})\n" for name in pictures)
    verdict, *reasons, compared, following = told
    listed = "\n".join(reasons)
    return f"# {verdict.capitalize()}\n\n{title}\n\n{listed}\n\n{compared}\n\n{following}\n\n| | |\n|---|---|\n{rows}{shown}"


def _before(reference: Mapping[str, Any] | None, name: str, style: str) -> str:
    return f"; {reference[name]:{style}} on its own held-out images" if reference and reference[name] is not None else ""


def _numbers(values: list[float]) -> str:
    shown = " ".join(f"{value:.3g}" for value in values[:4])
    return shown if len(values) <= 4 else f"{shown} ... ({len(values)} channels)"
