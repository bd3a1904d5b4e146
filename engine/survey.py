"""What a training takes, counted and measured before it starts: work and memory per image, and the machine's matrix rate."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mimetic.engine.objective import Objective

ROUNDS, SIDE = 5, 1024


class Survey(NamedTuple):
    """Of one image, forward and backward.

    Attributes:
        macs: multiply-adds of matrix products, convolutions and attention; norms, activations, softmax and the optimizer are not
            counted. What a frozen tokenizer or teacher does is; so is what gradient checkpointing computes again.
        saved_bytes: what the forward keeps for the backward.
        constant_bytes: what it keeps whatever the number of images, such as weights rounded for autocast.
    """

    macs: int
    saved_bytes: int
    constant_bytes: int


def survey(objective: Objective, batch: Mapping[str, Any]) -> Survey:
    """Runs the objective on two images, and on one of them, on its device, and leaves it as it was.

    Args:
        batch: of two images, or of one, which then stands for both.
    """
    batch = {name: torch.cat([value, value])[:2] if isinstance(value, Tensor) else value for name, value in batch.items()}
    training = objective.training
    objective.eval()  # no statistics of BatchNorm, no restarts of codes
    own = {tensor.untyped_storage().data_ptr() for tensor in (*objective.parameters(), *objective.buffers())}
    own |= {value.untyped_storage().data_ptr() for value in batch.values() if isinstance(value, Tensor)}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []
    for images in (1, 2):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = objective({name: value[:images] if isinstance(value, Tensor) else value for name, value in batch.items()}).loss
            held.append(sum(saved.values()))
            del loss
    # Fused attention has no formula on every device; written out it is matrix products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective(batch).loss.backward()
    objective.zero_grad(set_to_none=True)
    objective.train(training)
    return Survey(counter.get_total_flops() // 4, held[1] - held[0], 2 * held[0] - held[1])


def state_bytes(objective: Objective, engine: str, processes: int, averaged: bool) -> int:
    """What one process holds of weights, gradients and optimizer states in fp32, from the way the engine splits them."""
    weights = sum(p.numel() for p in objective.parameters())
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    stage = int(engine[-1]) if engine.startswith("ZeRO") else 0
    split = [processes if stage >= level else 1 for level in (1, 2, 3)]  # from which stage on optimizer, gradients, weights are split
    copies = (3 if averaged else 2) + (1 if stage else 0)  # ZeRO steps on a copy of the weights of its own
    return round(4 * (weights / split[2] + trained / split[1] + copies * trained / split[0]))


def matrix_rate(device: torch.device, precision: str) -> float:
    """Multiply-adds per second of square matrix products in the precision of the training, best of a few: a fifth of a second."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    side = SIDE if device.type == "cpu" else 8 * SIDE
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        left @ right
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return side**3 / best
