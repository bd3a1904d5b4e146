"""Gradients that go wrong at chosen steps: what a bad image, a bit in memory, or a learning rate does to a training."""

from collections.abc import Callable

import torch
from torch import Tensor

from mimetic.engine.objective import Objective, StepOutput
from mimetic.finetune.objectives import Supervised
from mimetic.pretrain.mim import MaskedImageModeling
from mimetic.tokenizers.objective import DVAEObjective


def poisoned(steps: dict[int, float], rank: int = 0, own_rank: int = 0) -> Callable[[], None]:
    """From now on the gradient of these steps (counted from 0) is multiplied by their factor, on one process; returns the cure.

    The loss itself stays what it is. A step whose data is met again after the run went back is another step, and is sound.
    """
    due = dict(steps)
    sound = {kind: (kind.forward, kind.begin_step) for kind in (MaskedImageModeling, Supervised, DVAEObjective)}
    factor = [1.0]

    def begin_step(self: Objective, step: int, whole: int) -> None:
        sound[type(self)][1](self, step, whole)
        factor[0] = due.pop(step, 1.0) if own_rank == rank else 1.0

    def forward(self: Objective, batch: dict) -> StepOutput:
        output, by = sound[type(self)][0](self, batch), factor[0]
        return output._replace(loss=_Scaled.apply(output.loss, by)) if by != 1.0 and self.training else output

    for kind in sound:
        kind.forward, kind.begin_step = forward, begin_step  # type: ignore[method-assign]

    def cure() -> None:
        for kind, (own_forward, own_begin) in sound.items():
            kind.forward, kind.begin_step = own_forward, own_begin  # type: ignore[method-assign]

    return cure


class _Scaled(torch.autograd.Function):
    """The same number, with a gradient that is multiplied."""

    @staticmethod
    def forward(ctx, loss: Tensor, by: float) -> Tensor:
        ctx.by = by
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.by, None
