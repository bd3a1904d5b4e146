"""Linear layers with a backward of their own, against torch's."""

import pytest
import torch
from torch import Tensor, nn

from mimetic.backbones.layers import GeluLinear, Linear

INTO, OUT = 40, 24


def both(approximate: str | None, bias: bool, dtype: torch.dtype, wide: bool) -> tuple[Linear, nn.Module]:
    """Ours, and torch's with the same weights; a wide one has a backward of its own, which under bf16 takes its weight in slabs."""
    torch.manual_seed(0)
    into, out = (INTO, 2 * 768 + 5) if wide else (INTO, OUT)
    ours = Linear(into, out, bias) if approximate is None else GeluLinear(into, out, approximate)
    linear = nn.Linear(into, out, bias)
    linear.load_state_dict(ours.state_dict(), strict=True)
    theirs = linear if approximate is None else nn.Sequential(nn.GELU(approximate), linear)
    return ours.to(dtype), theirs.to(dtype)


def results(module: nn.Module, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of all weights."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(gradient.to(y.dtype))
    return [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("approximate", "bias"), [(None, True), (None, False), ("none", True), ("tanh", True)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_trained_as_torchs(dtype, tolerance, approximate, bias, wide):
    autocast = dtype == torch.bfloat16
    ours, theirs = both(approximate, bias, torch.float32 if autocast else dtype, wide)
    x, gradient = (torch.randn(3, 7, 5, side, dtype=torch.float32 if autocast else dtype) for side in (INTO, ours.out_features))
    gradient = gradient.transpose(0, 1).contiguous().transpose(0, 1)  # as it may come
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = results(ours, x, gradient), results(theirs, x, gradient)
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == other.dtype
        assert (mine - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_measured_as_torchs(approximate):
    ours, theirs = both(approximate, True, torch.float32, False)
    x = torch.randn(3, 7, INTO)
    with torch.no_grad():
        assert torch.allclose(ours(x.clone()), theirs(x), atol=1e-6)


def test_an_input_that_wants_no_gradient_gets_none():
    ours, theirs = both(None, True, torch.float32, False)
    x = torch.randn(6, INTO)
    for module in (ours, theirs):
        module(x).square().sum().backward()
    assert torch.allclose(ours.weight.grad, theirs.weight.grad, atol=1e-4)
    assert torch.allclose(ours.bias.grad, theirs.bias.grad, atol=1e-4)


def test_gelus_output_is_not_kept_before_a_wide_layer():
    ours, theirs = both("none", True, torch.float32, True)
    x = torch.randn(64, INTO, requires_grad=True)

    def kept(module: nn.Module) -> int:
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
            module(x)
        return shapes.count(x.shape)

    assert (kept(ours), kept(theirs)) == (1, 2)
