"""Windows: which tokens attend to each other, where they lie, and attention within them.

Partition into windows, cyclic shift and MaxViT's grid are each a permutation of the map's tokens, so each is one index.

Legend: B batch, h w feature grid, T = h*w tokens, W windows, N tokens of a window, D width, n heads, d width of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mimetic.backbones.contract import TABLE, Grid
from mimetic.backbones.interpolation import resize_table
from mimetic.engine.errors import SettingError


def check_tiling(image: Grid, strides: Sequence[int], windows: Sequence[Grid], *, smaller_maps: bool = True) -> None:
    """Refuses an image whose maps the windows do not tile.

    Args:
        image: (H, W) in pixels.
        strides: of each stage's map; the image is a multiple of the last.
        windows: (height, width) in tokens, of each stage.
        smaller_maps: whether a map may be smaller than a window; it is one window then.

    Raises:
        SettingError: names both sizes, and the nearest image sizes that fit.
    """

    def fits(side: int, axis: int) -> bool:
        pairs = [(side // stride, window[axis]) for stride, window in zip(strides, windows, strict=True)]
        return side % strides[-1] == 0 and all(cells % tile == 0 or (smaller_maps and cells < tile) for cells, tile in pairs)

    if all(fits(side, axis) for axis, side in enumerate(image)):
        return
    around = []
    for step in (-strides[-1], strides[-1]):
        found = [next((s for s in range(side, side + 200 * step, step) if s > 0 and fits(s, axis)), 0) for axis, side in enumerate(image)]
        around += ["x".join(map(str, found))] if all(found) else []
    told = " and ".join(dict.fromkeys("x".join(map(str, window)) for window in windows))
    raise SettingError(f"image_size {image[0]}x{image[1]} gives maps that windows of {told} do not tile; image_size "
                       f"{' and '.join(around)} can be tiled, or set another window size")  # fmt: skip


def relative_offsets(window: Grid) -> Tensor:
    """Rows and columns from key to query for each pair of a window's tokens, (N, N, 2), each from -(side - 1) to side - 1."""
    at_N2 = torch.cartesian_prod(*(torch.arange(side) for side in window)).view(-1, 2)
    return at_N2[:, None] - at_N2[None]


def relative_position_index(window: Grid) -> Tensor:
    """Row of the bias table for each pair (query, key), int32 (N, N): offsets counted from the most negative, row by row."""
    offset_NN2 = relative_offsets(window) + torch.tensor([side - 1 for side in window])
    return (offset_NN2[..., 0] * (2 * window[1] - 1) + offset_NN2[..., 1]).int()


def window_order(grid: Grid, window: Grid, shift: Grid = (0, 0)) -> Tensor:
    """Tokens window by window after a cyclic shift to the upper left: entry i is the token that comes to place i, (T,)."""
    token_hw = torch.arange(grid[0] * grid[1]).view(grid).roll((-shift[0], -shift[1]), (0, 1))
    return tiles(token_hw, window)


def grid_order(grid: Grid, cells: Grid) -> Tensor:
    """Tokens group by group for MaxViT's grid attention (arXiv:2204.01697): a group takes every (h / cells)-th row and column."""
    token_hw = torch.arange(grid[0] * grid[1]).view(cells[0], grid[0] // cells[0], cells[1], grid[1] // cells[1])
    return token_hw.permute(1, 3, 0, 2).flatten()


def regions(grid: Grid, window: Grid, shift: Grid) -> Tensor:
    """Ids of the parts that lie together in the picture, on the map after the cyclic shift, (h, w).

    The shift brings parts from opposite sides of the picture into the windows of the last row and column; tokens attend only
    to those of their own id (Swin, arXiv:2103.14030, figure 4).
    """
    parts = [
        (torch.arange(side) >= side - tile).long() + (torch.arange(side) >= side - step).long() if step else torch.zeros(side).long()
        for side, tile, step in zip(grid, window, shift, strict=True)
    ]
    return 3 * parts[0][:, None] + parts[1][None]


def tiles(map_hw: Tensor, window: Grid) -> Tensor:
    """A map's values window by window, (T,)."""
    h, w = map_hw.shape
    return map_hw.view(h // window[0], window[0], w // window[1], window[1]).transpose(1, 2).flatten()


class Windows(nn.Module):
    """One way to group the tokens of a map; blocks of a stage that group alike share it.

    Args:
        order_T: tokens group by group.
        size: N, tokens of a group.
        heads: n.
        region_T: an id per place of `order_T`; tokens of different ids do not see each other. None where all do.
    """

    token_WN: Tensor
    to_heads_3R: Tensor
    from_heads_S: Tensor
    to_tokens_R: Tensor
    from_tokens_R: Tensor
    mask_WNN: Tensor | None

    def __init__(self, order_T: Tensor, size: int, heads: int, region_T: Tensor | None = None) -> None:
        super().__init__()
        self.size, self.heads = size, heads
        self._batch: tuple[int, torch.device] | None = None
        self._orders: Any = None
        self.register_buffer("token_WN", order_T.view(-1, size), persistent=False)
        token_W1N, head_n1 = self.token_WN[:, None], torch.arange(heads)[:, None]
        # Rows of d numbers. The projection has S = T * 3 * n of them in the order (token, qkv, head); each of queries, keys and
        # values takes R = T * n of them in the order (window, head, token of the window).
        to_heads_3R = torch.stack([(token_W1N * 3 * heads + part * heads + head_n1).flatten() for part in range(3)])
        from_tokens_R = (token_W1N * heads + head_n1).flatten()
        orders = {"to_heads_3R": to_heads_3R, "from_heads_S": to_heads_3R.flatten().argsort(),
                  "to_tokens_R": from_tokens_R.argsort(), "from_tokens_R": from_tokens_R}  # fmt: skip
        for name, order in orders.items():
            self.register_buffer(name, order, persistent=False)
        mask_WNN = None
        if region_T is not None:
            region_WN = region_T.view(-1, size)
            apart_WNN = region_WN[:, :, None] != region_WN[:, None]
            mask_WNN = torch.zeros(apart_WNN.shape).masked_fill(apart_WNN, -torch.inf)
        self.register_buffer("mask_WNN", mask_WNN, persistent=False)

    def split(self, qkv_BhwE: Tensor) -> Tensor:
        """(B, h, w, 3 n d) -> queries, keys and values window by window, (3, B W, n, N, d)."""
        batch = len(qkv_BhwE)
        to_heads, from_heads, _, _ = self._over(batch, qkv_BhwE.device)
        rows_Sd = Reordered.apply(qkv_BhwE.reshape(len(to_heads), -1), to_heads, from_heads)
        return rows_Sd.view(3, -1, self.heads, self.size, rows_Sd.shape[-1])

    def merge(self, x_GnNd: Tensor, grid: Grid) -> Tensor:
        """(B W, n, N, d) -> (B, h, w, n d), tokens back at their places."""
        width = x_GnNd.shape[-1]
        rows_Rd = x_GnNd.reshape(-1, width)
        _, _, to_tokens, from_tokens = self._over(len(rows_Rd) // len(self.to_tokens_R), rows_Rd.device)
        return Reordered.apply(rows_Rd, to_tokens, from_tokens).view(-1, *grid, self.heads * width)

    def _over(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The orders for the rows of a whole batch, there and back; made once for each batch size, since all blocks need them."""
        if self._batch != (batch, device):
            with torch.inference_mode(False):  # what is made there could not be used in training
                count, image_B = len(self.to_tokens_R), torch.arange(batch, device=device)
                to_heads = (self.to_heads_3R[:, None] + image_B[None, :, None] * 3 * count).flatten()
                part_S, row_S = self.from_heads_S // count, self.from_heads_S % count
                from_heads = (part_S * count * batch + row_S + image_B[:, None] * count).flatten()
                tokens = [(order_R + image_B[:, None] * count).flatten() for order_R in (self.to_tokens_R, self.from_tokens_R)]
                self._batch, self._orders = (batch, device), tuple(order.int() for order in (to_heads, from_heads, *tokens))
        return self._orders

    def reach(self, seen_hw: Tensor) -> Tensor:
        """Places that those of `seen_hw` (bool) attend to, (h, w)."""
        seen_W1N = seen_hw.flatten()[self.token_WN][:, None]
        allowed = True if self.mask_WNN is None else self.mask_WNN == 0
        reached_WN = (seen_W1N.mT & allowed).any(1).expand_as(self.token_WN)
        return torch.zeros_like(seen_hw.flatten()).index_put((self.token_WN.flatten(),), reached_WN.flatten()).view_as(seen_hw)

    def masked(self, bias_nNN: Tensor | None) -> Tensor | None:
        """The bias on scores with the mask added, (1 or W, n or 1, N, N); None where there is neither."""
        if self.mask_WNN is None:
            return None if bias_nNN is None else bias_nNN[None]
        mask_W1NN = self.mask_WNN[:, None]
        return mask_W1NN if bias_nNN is None else bias_nNN + mask_W1NN.to(bias_nNN.dtype)


class Reordered(torch.autograd.Function):
    """Rows in another order; the gradient is the way back, where autograd would add up into zeros."""

    @staticmethod
    def forward(ctx: Any, x_Rd: Tensor, there_R: Tensor, back_R: Tensor) -> Tensor:
        """(R, d) -> (R, d)."""
        ctx.save_for_backward(back_R)
        return x_Rd.index_select(0, there_R)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Gradient of x."""
        (back_R,) = ctx.saved_tensors
        return gradient.index_select(0, back_R), None, None


def attend(qkv_3GnNd: Tensor, bias_WnNN: Tensor | None = None, scale_n11: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v over many small groups of tokens, (G, n, N, d).

    Args:
        bias_WnNN: added to the scores; G is a multiple of W, groups of an image follow each other.
        scale_n11: for cosine attention, softmax(scale cos(q, k) + bias) v (SwinV2, arXiv:2111.09883).

    On accelerators it is PyTorch's fused attention. On CPUs that one is slow for groups of a few dozen tokens, more so for a
    bias that wants a gradient (benchmarks/backbones.py); batched products with a backward of their own are faster.
    """
    dtype = qkv_3GnNd.dtype
    bias_WnNN, scale_n11 = (None if x is None else x.to(dtype) for x in (bias_WnNN, scale_n11))
    if qkv_3GnNd.device.type in ("cpu", "meta") and not torch.compiler.is_compiling():
        with torch.autocast("cpu", enabled=False):
            return SmallAttention.apply(qkv_3GnNd, bias_WnNN, scale_n11)
    return fused_attend(qkv_3GnNd, bias_WnNN, scale_n11)


def fused_attend(qkv_3GnNd: Tensor, bias_WnNN: Tensor | None, scale_n11: Tensor | None) -> Tensor:
    """`attend` by PyTorch's fused attention."""
    q, k, v = qkv_3GnNd.unbind(0)
    if scale_n11 is not None:
        q, k = F.normalize(q, dim=-1).to(q.dtype) * scale_n11, F.normalize(k, dim=-1).to(q.dtype)
    if bias_WnNN is not None and len(bias_WnNN) > 1:
        bias_WnNN = bias_WnNN.repeat(len(q) // len(bias_WnNN), 1, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias_WnNN, scale=None if scale_n11 is None else 1.0)


class SmallAttention(torch.autograd.Function):
    """`attend` as batched matrix products, with nothing computed twice and nothing copied on the way back."""

    @staticmethod
    def forward(ctx: Any, qkv_3GnNd: Tensor, bias_WnNN: Tensor | None, scale_n11: Tensor | None) -> Tensor:
        """As `attend`."""
        factor_2GnN1 = None
        if scale_n11 is not None:
            factor_2GnN1 = torch.linalg.vector_norm(qkv_3GnNd[:2], dim=-1, keepdim=True).clamp_(min=1e-12).reciprocal_()
            factor_2GnN1[0] *= scale_n11
            qkv_3GnNd = torch.cat([qkv_3GnNd[:2] * factor_2GnN1, qkv_3GnNd[2:]])
        ctx.alpha = 1.0 if scale_n11 is not None else qkv_3GnNd.shape[-1] ** -0.5
        q, k, v = qkv_3GnNd.flatten(1, 2).unbind(0)
        if bias_WnNN is not None and bias_WnNN.dtype == torch.bfloat16:  # added before rounding, and faster than a pass of its own
            groups = len(qkv_3GnNd[0]) // len(bias_WnNN)
            score = bias_WnNN.new_empty(groups, len(bias_WnNN), qkv_3GnNd.shape[2], *bias_WnNN.shape[2:])
            score = score.copy_(bias_WnNN).flatten(0, 2).baddbmm_(q, k.mT, alpha=ctx.alpha)
        else:
            score = torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=ctx.alpha)
            if bias_WnNN is not None:
                score.view(-1, len(bias_WnNN), qkv_3GnNd.shape[2], *score.shape[1:]).add_(bias_WnNN)
        share = torch.softmax(score, -1, out=score)  # each row is read before it is written
        ctx.save_for_backward(qkv_3GnNd, share, factor_2GnN1, scale_n11)
        ctx.bias_shape = None if bias_WnNN is None else bias_WnNN.shape
        return torch.bmm(share, v).view(qkv_3GnNd.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of queries, keys and values, of the bias and of the scale."""
        qkv_3GnNd, share, factor_2GnN1, scale_n11 = ctx.saved_tensors
        q, k, v = qkv_3GnNd.flatten(1, 2).unbind(0)
        gradient = gradient.flatten(0, 1)
        of_share = torch.bmm(gradient, v.mT)
        of_score = torch._softmax_backward_data(of_share, share, -1, share.dtype, grad_input=of_share)
        of_bias = of_scale = None
        if ctx.bias_shape is not None and ctx.needs_input_grad[1]:
            of_bias = of_score.view(-1, ctx.bias_shape[0], qkv_3GnNd.shape[2], *ctx.bias_shape[2:]).sum(0).sum_to_size(ctx.bias_shape)
        of_qkv = torch.empty_like(qkv_3GnNd)
        of_q, of_k, of_v = of_qkv.flatten(1, 2).unbind(0)
        torch.baddbmm(of_q, of_score, k, beta=0, alpha=ctx.alpha, out=of_q)
        torch.baddbmm(of_k, of_score.mT, q, beta=0, alpha=ctx.alpha, out=of_k)
        torch.bmm(share.mT, gradient, out=of_v)
        if factor_2GnN1 is not None:  # from s q / |q| back to q: what lies along q has no effect
            along_2GnN1 = (of_qkv[:2] * qkv_3GnNd[:2]).sum(-1, keepdim=True)
            of_scale = (along_2GnN1[0] / scale_n11).sum((0, 2), keepdim=True)[0] if ctx.needs_input_grad[2] else None
            along_2GnN1[0] /= scale_n11 * scale_n11
            of_qkv[:2].addcmul_(qkv_3GnNd[:2], along_2GnN1, value=-1).mul_(factor_2GnN1)
        return of_qkv, of_bias, of_scale


class RelativePositionBias(nn.Module):
    """A learned score for each offset between two tokens of a window and each head."""

    index_NN: Tensor

    def __init__(self, window: Grid, heads: int) -> None:
        super().__init__()
        self.window = window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window[0] - 1) * (2 * window[1] - 1), heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("index_NN", relative_position_index(window), persistent=False)

    def forward(self) -> Tensor:
        """Bias on the attention scores, (n, N, N)."""
        # F.embedding and not table[index]: the backward of advanced indexing differs between runs on several CPU threads.
        return F.embedding(self.index_NN, self.relative_position_bias_table).permute(2, 0, 1).contiguous()

    def resized_from(self, other: "RelativePositionBias") -> dict[str, Tensor]:
        """The other's table for this window."""
        return {TABLE: resize_table(other.relative_position_bias_table, other.window, self.window)}
