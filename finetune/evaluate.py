"""Accuracy over a whole set, each image counted exactly once on any number of processes."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mimetic.engine.run import Record
from mimetic.engine.runtime import add_up


def accuracy(model: nn.Module, normalize: nn.Module, batches: Iterable[Mapping[str, Any]], device: torch.device,
             metric: str, details: dict[str, Any]) -> Record:  # fmt: skip
    """Share of correct decisions.

    Args:
        batches: with `image`, `label` and `valid` on the device, from a padded, unshuffled stream.
        metric: the record's name.
        details: kept in the record.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        image_BCHW, label_B, valid_B = (batch[name] for name in ("image", "label", "valid"))
        correct_B = (model(normalize(image_BCHW)).argmax(1) == label_B) & valid_B
        totals += torch.stack([correct_B.sum(), valid_B.sum()])
    correct, count = add_up(totals).tolist()
    return Record(metric, correct / max(count, 1), int(count), details=details)
