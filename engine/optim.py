"""AdamW's parameter groups, and the learning rate over the training."""

import math
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
    """AdamW (1711.05101) over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(objective, settings), betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True)


def learning_rate(settings: OptimSettings, progress: float) -> float:
    """Linear warm-up, then cosine to `min_lr`; `progress` in [0, 1] is the share of all samples seen before this step."""
    if progress < settings.warmup:
        return settings.warmup_lr + (settings.lr - settings.warmup_lr) * progress / settings.warmup
    done = (progress - settings.warmup) / (1 - settings.warmup)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives each group its share; plain numbers, nothing to save or restore."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
