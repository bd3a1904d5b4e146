"""What the training loop trains: a module that turns a batch into a loss."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn


class StepOutput(NamedTuple):
    """Result of one micro-batch.

    Attributes:
        loss: scalar, averaged over what it is a loss of.
        metrics: scalars to average over steps and ranks; tensors, so that nothing waits for the device.
        counts: histograms over a codebook (V,), summed; the run's log tells how many codes occur, and their perplexity.
    """

    loss: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = {}
    counts: Mapping[str, torch.Tensor] = {}


class Objective(nn.Module):
    """A model with its loss. A frozen teacher or tokenizer is kept out of state_dict and optimizer (see `frozen`)."""

    num_depths: int = 1
    moves_weights: bool = False  # whether `end_step` changes weights by itself, behind the optimizer's back

    def forward(self, batch: Mapping[str, Any]) -> StepOutput:
        """One micro-batch of the stream, tensors on the device."""
        raise TypeError(f"{type(self).__name__} must define forward(batch) -> StepOutput")

    def depth_of(self, parameter_name: str) -> int:
        """0 for the stem to `num_depths` - 1 for the head: the exponent of layer decay counts from the head."""
        return 0

    def no_weight_decay_names(self) -> set[str]:
        """Parameters of two or more dimensions that are no matrices: positions, tokens, bias tables."""
        return set()

    def pictures(self, batch: Mapping[str, Any]) -> np.ndarray | None:
        """uint8 (H, W, 3) picture of what is being learned from this batch, or None."""
        return None

    def describe(self) -> dict[str, Any]:
        """Plain values that checkpoints keep, so that a backbone can be taken from them without data; empty where there is none."""
        return {}

    @property
    def measured_on(self) -> dict[str, Any]:
        """Details that records of held-out images bear beside the numbers."""
        return {}

    def begin_step(self, step: int, steps: int) -> None:
        """Told before each step how many of all steps are done: for annealing."""

    @property
    def wants_end_step(self) -> bool:
        """Whether `end_step` has something to do after this step."""
        return False

    def end_step(self, sound: bool) -> None:
        """After the optimizer's step: what changes weights otherwise than by their gradient belongs here, and only if it was sound."""


def reseed(seed: int, step: int, rank: int) -> None:
    """Drop path, Gumbel noise and the like draw from (seed, step, process): nothing of it has to be saved, or is lost by going back."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def frozen(module: Any, device: torch.device | str) -> tuple[Any]:
    """Wraps a module in a tuple, which nn.Module does not register: it is neither saved nor trained nor moved with its owner."""
    return (module.to(device).eval().requires_grad_(False),)
