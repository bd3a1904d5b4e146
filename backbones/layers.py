"""Parts that several families share.

Legend: B batch, C channels, H W pixels, P Q mask grid, h w feature grid, N = h*w places, D width.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mimetic.backbones.contract import Grid, hide, repeat_mask, zero_hidden
from mimetic.engine.errors import SettingError

SLAB = 768  # rows of a weight whose gradient is computed at a time in bf16, see `TrainedLinear`
WIDE = 512  # outputs from which on a layer's products in float32 take a hundred times as long as GELU before it


class Gelu(nn.GELU):
    """GELU; where no gradient is wanted it overwrites its input, which the layer before has just made: large maps cost memory's time."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        if torch.is_grad_enabled():
            return super().forward(input)
        return torch.ops.aten.gelu_(input, approximate=self.approximate)


def mlp(width: int, hidden: int, approximate: str = "none") -> nn.Sequential:
    """The transformer's two linear layers with GELU between them, on the last axis.

    Args:
        approximate: of GELU, as torch spells it.
    """
    return nn.Sequential(OrderedDict(fc1=Linear(width, hidden), fc2=GeluLinear(hidden, width, approximate)))


def drop_path(branch: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (arXiv:1603.09382): whole samples of a residual branch are dropped, the others scaled up."""
    if not training or not rate:
        return branch
    kept = branch.new_empty(len(branch), *[1] * (branch.dim() - 1)).bernoulli_(1 - rate)
    return branch * kept / (1 - rate)


def neighbours(seen_hw: Tensor) -> Tensor:
    """The 3x3 places around each one of `seen_hw` (bool): what a convolution can have used."""
    return F.max_pool2d(seen_hw.float()[None, None], 3, 1, 1)[0, 0].bool()


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """The rate of each block, stage by stage, rising linearly from 0 to `last` over all of them."""
    if min(depths) < 1 or not 0 <= last < 1:
        raise SettingError(f"depths {list(depths)}, drop_path_rate {last:g}: each depth must be 1 or more, drop_path_rate in [0, 1)")
    rates = iter([last * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
    return [[next(rates) for _ in range(depth)] for depth in depths]


def add_branch(x: Tensor, branch: Tensor, gamma_D: Tensor | None, rate: float, training: bool) -> Tensor:
    """x + gamma * branch, the branch under stochastic depth (`drop_path`), in one pass over (B, N, D)."""
    factor = gamma_D
    if training and rate:
        kept_B11 = x.new_empty(len(x), 1, 1).bernoulli_(1 - rate) / (1 - rate)
        factor = kept_B11 if gamma_D is None else gamma_D * kept_B11
    return x + branch if factor is None else torch.addcmul(x, branch, factor)


class Linear(nn.Linear):
    """nn.Linear, trained by `TrainedLinear` in bf16 on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return linear(input, self.weight, self.bias)


class GeluLinear(Linear):
    """A linear layer of GELU(input): the second half of a transformer's MLP.

    Args:
        approximate: of GELU, as torch spells it.
    """

    def __init__(self, into: int, out: int, approximate: str = "none") -> None:
        super().__init__(into, out)
        self.approximate = approximate

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return linear(input, self.weight, self.bias, self.approximate)


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, gelu: str | None = None) -> Tensor:
    """F.linear, of GELU(x) where its approximation is named; by `TrainedLinear` where a CPU trains the weight and gains by it."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    rounded = autocast and dtype == torch.bfloat16 and weight_NK.dtype == torch.float32
    leaner = gelu is not None and len(weight_NK) >= WIDE and dtype == weight_NK.dtype
    trained = torch.is_grad_enabled() and weight_NK.requires_grad and x.device.type == "cpu"
    if trained and (rounded or leaner) and not torch.compiler.is_compiling():
        return TrainedLinear.apply(x, weight_NK, bias_N, dtype, gelu)
    if gelu is not None:
        # without a gradient over its input, which the layer before has just made: large maps cost memory's time
        x = F.gelu(x, approximate=gelu) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x, approximate=gelu)
    return F.linear(x, weight_NK, bias_N)


class TrainedLinear(torch.autograd.Function):
    """A linear layer as autocast computes it, for a CPU: in float32 it keeps less for the way back, in bf16 it is faster on it.

    In float32 GELU before it is computed again: kept, what it puts out would be a fifth of all that a transformer's block keeps. In
    bf16, where products are fast, that would take too large a share of the time. There the weight's gradient, a product over all
    rows, takes oneDNN twice as long as the product forwards: it packs a transposed operand slowly. Transposing the narrower of the
    two operands first, and the result on its way to float32, is faster.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, dtype: torch.dtype, gelu: str | None) -> Tensor:
        """(..., K) -> (..., N), of `dtype`."""
        ctx.dtype, ctx.has_bias, ctx.gelu = x.dtype, bias_N is not None, gelu
        x = x.to(dtype)
        activated = x if gelu is None else F.gelu(x, approximate=gelu)
        again = gelu is None or dtype == weight_NK.dtype
        # to round the weight again takes less than a hundredth of the step, to keep it 2 bytes each
        ctx.save_for_backward(x, weight_NK, None if again else activated)
        return F.linear(activated, weight_NK.to(dtype), None if bias_N is None else bias_N.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of input, weight and bias."""
        x, weight_NK, activated = ctx.saved_tensors
        if activated is None:
            activated = x if ctx.gelu is None else F.gelu(x, approximate=ctx.gelu)
        of_output_MN = gradient.flatten(0, -2)
        of_weight_NK = _weight_gradient(of_output_MN, activated.flatten(0, -2), weight_NK.dtype)
        of_bias_N = of_output_MN.sum(0).to(weight_NK.dtype) if ctx.has_bias else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight_NK, of_bias_N, None, None
        of_x = gradient @ weight_NK.to(gradient.dtype)
        if ctx.gelu is not None:
            of_x = torch.ops.aten.gelu_backward.grad_input(of_x, x, approximate=ctx.gelu, grad_input=of_x)
        return of_x.to(ctx.dtype), of_weight_NK, of_bias_N, None, None


def _weight_gradient(of_output_MN: Tensor, x_MK: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K) of `dtype`; see `TrainedLinear`."""
    if of_output_MN.dtype == dtype:
        return of_output_MN.T @ x_MK
    rows, columns = of_output_MN.shape[1], x_MK.shape[1]
    if rows <= columns:
        return (of_output_MN.T.contiguous() @ x_MK).to(dtype)
    of_weight_NK, x_KM = x_MK.new_empty(rows, columns, dtype=dtype), x_MK.T.contiguous()
    for first in range(0, rows, SLAB):  # what is transposed then still lies in the core's cache
        of_weight_NK[first : first + SLAB].copy_((x_KM @ of_output_MN[:, first : first + SLAB]).T)
    return of_weight_NK


class KeylessBiasLinear(nn.Linear):
    """Projection to queries, keys and values, (..., D) -> (..., 3 D): the keys' bias is 0 and not learned (BEiT, SwinV2)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., 3 D)."""
        return linear(input, self.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))


class PlacesLinear(nn.Linear):
    """A linear layer over the places of a map, the same for every channel (ResMLP, arXiv:2105.03404); it knows one grid only."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return super().forward(input.mT).mT


class PatchStem(nn.Module):
    """Pixels to a map: project patches, normalise, put the mask token at hidden cells. Channels come last, as in timm's.

    Args:
        grid: (h, w) of the map.
        norm: after the projection, if any.
    """

    def __init__(self, grid: Grid, patch: Grid, channels: int, width: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.grid = grid
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.norm = norm if norm is not None else nn.Identity()
        self.mask_token = nn.Parameter(torch.empty(1, 1, 1, width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, image_BCHW: Tensor, hidden_BPQ: Tensor | None = None) -> Tensor:
        """(B, C, H, W) and bool (B, P, Q), True = hidden -> (B, h, w, D)."""
        hidden_Bhw = None if hidden_BPQ is None else repeat_mask(hidden_BPQ, self.grid)
        if hidden_Bhw is not None:
            image_BCHW = zero_hidden(image_BCHW, hidden_Bhw)
        # Contiguous: norms and linear layers read a token's numbers side by side, in every block to come.
        x_BhwD = self.norm(rearrange(self.proj(image_BCHW), "B D h w -> B h w D").contiguous())
        return x_BhwD if hidden_Bhw is None else hide(x_BhwD, hidden_Bhw[..., None], self.mask_token)


@torch.no_grad()
def init_linear_(module: nn.Module) -> None:
    """Weights of linear layers from a normal of 0.02 cut at two, biases 0: Swin's rule, PoolFormer's and Twins'."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
