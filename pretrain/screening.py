"""A look at the tokenizer before the first step: a collapsed one teaches nothing, however long the training."""

from typing import TYPE_CHECKING, Any

import torch

from mimetic.data.picture import in_unit_range
from mimetic.engine.errors import SettingError
from mimetic.engine.runtime import add_up
from mimetic.pretrain.recipe import TokenizerSettings
from mimetic.tokenizers.doctor import collect, measure
from mimetic.tokenizers.examination import reference_in
from mimetic.tokenizers.files import provenance_of
from mimetic.tokenizers.verdict import COLLAPSED, HEALTHY, judge, too_little

if TYPE_CHECKING:
    from mimetic.data.stream import ShardStream

LOOKED_AT = 32  # images of a batch
MANY, FEW = 256, 32  # images in all; few on a CPU where the tokenizer is as large as DALL-E's, at a second or more an image
LARGE = 10_000_000  # parameters


def look_at_tokenizer(tokenizer: Any, settings: TokenizerSettings, images: "ShardStream", device: torch.device, main: bool) -> None:
    """Prints in a line how the tokenizer does on some images; one process looks, and all of them hear.

    Draws no random numbers, so that a training is the same with it and without.

    Args:
        images: batches with `target`, uint8 or float (B, C, H, W), and `valid`.
        main: whether this process is the one that looks.

    Raises:
        SettingError: it is collapsed, and `tokenizer.accept_collapsed` is not set.
    """
    line, collapsed = "", torch.zeros((), device=device)
    if main:
        line, word = _look(tokenizer, settings, images, device)
        collapsed.fill_(word == COLLAPSED and not settings.accept_collapsed)
    if add_up(collapsed) > 0:
        raise SettingError(f"{line}; train another (tokenizers/train_dvae.py), see what is wrong (`mimetic doctor`), or set "
                           "tokenizer.accept_collapsed", together=True)  # fmt: skip
    if main:
        print(line, flush=True)


def _look(tokenizer: Any, settings: TokenizerSettings, images: "ShardStream", device: torch.device) -> tuple[str, str]:
    """What is said, and the verdict's word."""
    large = sum(parameter.numel() for parameter in tokenizer.parameters()) > LARGE and device.type == "cpu"
    count, keep = (FEW, FEW // 4) if large else (MANY, MANY // 4)
    if large:
        print(f"looking at the tokenizer on {count} images first: with one of this size that can take a minute on a CPU", flush=True)
    batches = images.run(min(len(images), count // LOOKED_AT))
    seen = collect(tokenizer, (in_unit_range(batch["target"][batch["valid"]].to(device)) for batch in batches), keep)
    if reason := too_little(seen):
        return f"tokenizer {settings.path}: not judged ({reason})", ""
    figures = measure(tokenizer, seen, shifts=False)
    verdict = judge(figures, reference_in(provenance_of(settings.path), settings.path))
    used = (f"tokenizer {settings.path}: {figures.codes_used:,} of {figures.vocab_size:,} codes in use on {figures.images} images, "
            f"perplexity {figures.perplexity:.3g}: {verdict.word}")  # fmt: skip
    return used if verdict.word == HEALTHY else f"{used} ({'; '.join(verdict.reasons)})", verdict.word
