"""Helpers to hold our nets against other people's: weights that leave no term at zero, and tolerances (DESIGN, section 6)."""

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


@torch.no_grad()
def perturb_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic random values, such that activations stay of order one.

    Fresh weights prove little: biases, bias tables and layer scale start at or near 0, norms at 1.
    """
    random = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if parameter.dim() == 1:  # norms and layer scale multiply, biases add
            parameter.copy_(0.2 * noise + (0.0 if name.endswith("bias") else 1.0))
        elif name.endswith(("_token", "pos_embed", "bias_table")):
            parameter.copy_(noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=random))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=random))
    return module


def worst(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference, between values that are of order one, as a tolerance in absolute terms needs."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert 0.05 < theirs.std() < 20, f"values of the size of {theirs.std():.1e} make an absolute tolerance meaningless"
    return (ours - theirs).abs().max().item()
