"""What a pretraining is measured by on held-out images: masked accuracy is the number that says whether BEiT learns."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mimetic.engine.objective import Objective
from mimetic.engine.run import Record
from mimetic.engine.runtime import add_up


def evaluate(objective: Objective, batches: Iterable[Mapping[str, Any]], device: torch.device) -> list[Record]:
    """Records of every metric of the objective, and `masked_loss`: each image once, its mask fixed by the stream's seed."""
    names, totals = [], torch.zeros(1, dtype=torch.float64, device=device)
    for batch in batches:
        output, images = objective(batch), batch["valid"].sum()
        names = [*output.metrics, "masked_loss"]
        means = [*output.metrics.values(), output.loss]
        totals = totals + torch.stack([*(mean.double() * images for mean in means), images.double()])
    *sums, images = add_up(totals).tolist()
    details = objective.measured_on
    return [Record(name, total / max(images, 1), int(images), details=details) for name, total in zip(names, sums, strict=True)]
