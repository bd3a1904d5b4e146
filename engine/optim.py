"""AdamW's parameter groups, and the learning rate over the training."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from mimetic.engine.config import OptimSettings
from mimetic.engine.objective import Objective


def parameter_groups(objective: Objective, settings: OptimSettings) -> list[dict[str, Any]]:
    """Groups by (weight decay or none, learning-rate scale); few groups, since many are slow under DeepSpeed.

    Vectors (biases, norms, layer scale), positions, tokens and bias tables have no weight decay. Layer decay (BEiT,
    2106.08254) scales the rate of depth d by layer_decay ** (num_depths - 1 - d).
    """
    exempt = objective.no_weight_decay_names()
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim <= 1 or name in exempt else settings.weight_decay
        scale = settings.layer_decay ** (objective.num_depths - 1 - objective.depth_of(name))
        groups.setdefault((decay, scale), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale, "lr": settings.lr * scale}
        for (decay, scale), parameters in groups.items()
    ]


def adamw(objective: Objective, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW (1711.05101) over `parameter_groups`, which keeps a running mean of the weights where a group has an `ema_decay`."""
    groups = parameter_groups(objective, settings)
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True)
    optimizer.register_step_post_hook(_average_weights)
    return optimizer


@torch.no_grad()
def _average_weights(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Beside the moments, as `ema`: so ZeRO splits it as it splits them, and checkpoints hold it."""
    for group in optimizer.param_groups:
        weights = [p for p in group["params"] if optimizer.state[p]]  # one without a gradient has no state yet
        if weights and (decay := group.get("ema_decay")):
            means = [optimizer.state[p].setdefault("ema", p.detach().clone()) for p in weights]
            moved = getattr(optimizer, "found_inf", None)  # 1 where the step was left out: then the mean stays too
            share = 1 - decay if moved is None else [(1 - decay) * (1 - moved)] * len(means)
            torch._foreach_lerp_(means, weights, share)


def ema_decay(highest: float, step: int) -> float:
    """The decay at a step, counted from 0: short at the start, when weights change most; 0 keeps no mean."""
    return min(highest, (1 + step) / (10 + step))


def learning_rate(settings: OptimSettings, progress: float) -> float:
    """Linear warm-up, then cosine to `min_lr`; `progress` in [0, 1] is the share of all samples seen before this step."""
    if progress < settings.warmup:
        return settings.warmup_lr + (settings.lr - settings.warmup_lr) * progress / settings.warmup
    done = (progress - settings.warmup) / (1 - settings.warmup)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def set_rates(optimizer: torch.optim.Optimizer, rate: float, decay: float) -> None:
    """Gives each group its share of the learning rate, and all the mean's decay; plain numbers, nothing to save or restore."""
    for group in optimizer.param_groups:
        group["lr"], group["ema_decay"] = rate * group["lr_scale"], decay


@torch.no_grad()
def update_and_weight_squares(optimizer: torch.optim.Optimizer, parts: Iterable[tuple[dict[str, Any], torch.Tensor]]) -> torch.Tensor:
    """(2,): the sums of squares of AdamW's last update and of the weights, from the optimizer's states.

    The root of their ratio is about 1e-3 in a healthy training; far above, the weights are thrown about, far below, nothing moves.

    Args:
        parts: each tensor of weights that the optimizer holds, with its group.
    """
    found = []
    for group, weights in parts:
        if not (state := optimizer.state[weights]):  # before its first step
            continue
        (beta1, beta2), step = group["betas"], state["step"].to(weights.device).clamp(min=1)  # 0 where the first was left out
        mean, square = state["exp_avg"] / (1 - beta1**step), state["exp_avg_sq"] / (1 - beta2**step)
        update = group["lr"] * (mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * weights)
        found.append(torch.stack([update.square().sum(), weights.square().sum()]))
    return torch.stack(found).sum(0) if found else torch.zeros(2)
