"""Masked accuracy on held-out images: the number that says whether pretraining learns."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mimetic.engine.run import Record
from mimetic.engine.runtime import add_up
from mimetic.pretrain.mim import MaskedImageModeling


def masked_accuracy(objective: MaskedImageModeling, batches: Iterable[Mapping[str, Any]], device: torch.device) -> list[Record]:
    """Records `masked_accuracy` and `masked_loss` over hidden cells, each image once, its mask fixed by the stream's seed."""
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        output, images = objective(batch), batch["valid"].sum()
        totals += torch.stack([output.metrics["masked_accuracy"] * images, output.loss * images, images])
    accuracy, loss, images = add_up(totals).tolist()
    details = {"hidden": objective.head.count, "vocab_size": objective.tokenizer.vocab_size}
    return [
        Record("masked_accuracy", accuracy / max(images, 1), int(images), details=details),
        Record("masked_loss", loss / max(images, 1), int(images), details=details),
    ]
