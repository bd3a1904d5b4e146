"""The worked examples of a lecture on vision transformers, as tests of the code that they explain.

Legend: B batch, h w feature grid, N tokens of a window, D width, n heads, d width of a head, G windows of the batch.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import perturb_, timm_twin, worst
from torch import Tensor, nn

from mimetic.backbones import metaformer
from mimetic.backbones.attention import rollout
from mimetic.backbones.catalog import create_backbone
from mimetic.backbones.interpolation import resize_positions
from mimetic.backbones.swin import WindowAttention, windows_of
from mimetic.backbones.vit import sincos_positions
from mimetic.backbones.windows import (
    attend,
    fused_attend,
    grid_order,
    regions,
    relative_offsets,
    relative_position_index,
    tiles,
    window_order,
)

SMALL_SWIN = {"patch_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}


def test_relative_positions_in_a_window_of_three_by_three():
    """Tokens 1 2 3 / 4 5 6 / 7 8 9: the first coordinate falls by one from row to row of keys, the second from column to column."""
    offset_NN2 = relative_offsets((3, 3))
    third = np.repeat([0, -1, -2], 3)
    assert np.array_equal(offset_NN2[..., 0], np.stack([third + row for row in (0, 0, 0, 1, 1, 1, 2, 2, 2)]))
    inner = np.tile([0, -1, -2], 3)
    assert np.array_equal(offset_NN2[..., 1], np.stack([inner + column for column in (0, 1, 2) * 3]))
    index_NN = relative_position_index((3, 3))
    assert index_NN[0].tolist() == [12, 11, 10, 7, 6, 5, 2, 1, 0]  # from the upper left: itself is the middle of 5 x 5
    assert index_NN[8].tolist() == [24, 23, 22, 19, 18, 17, 14, 13, 12]
    assert len(index_NN.unique()) == 25
    for key in range(9):
        assert index_NN[key, key] == 12


def test_regions_of_an_eight_by_eight_map_with_windows_of_four_and_a_shift_of_two():
    expected = np.zeros((8, 8), int)
    count = 0
    for rows in (slice(0, -4), slice(-4, -2), slice(-2, None)):
        for columns in (slice(0, -4), slice(-4, -2), slice(-2, None)):
            expected[rows, columns] = count
            count += 1
    found = regions((8, 8), (4, 4), (2, 2))
    assert np.array_equal(found, expected)
    assert found[0].tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert found[:, 0].tolist() == [0, 0, 0, 0, 3, 3, 6, 6]


def test_cyclic_shift_brings_the_ninth_row_of_numbers_first():
    """Of 1 to 64 in rows of eight, the first window after a shift of (2, 2) begins with 19, 20, 21, 22, 27."""
    order = window_order((8, 8), (4, 4), (2, 2)) + 1
    assert order[:5].tolist() == [19, 20, 21, 22, 27]
    assert order[16:20].tolist() == [23, 24, 17, 18]
    assert order[-4:].tolist() == [15, 16, 9, 10]
    assert window_order((8, 8), (4, 4))[:5].tolist() == [0, 1, 2, 3, 8]


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), window=st.tuples(st.integers(1, 4), st.integers(1, 4)), heads=st.integers(1, 3))
def test_shift_with_mask_equals_a_loop_over_the_ragged_windows(rows, columns, window, heads):
    grid = rows * window[0], columns * window[1]
    torch.manual_seed(0)
    attention = perturb_(WindowAttention(4 * heads, windows_of(grid, window, heads, shifted=True), grid, window, True)).double()
    x_BhwD = torch.randn(2, *grid, 4 * heads, dtype=torch.float64)
    shift = [tile // 2 if tile < side else 0 for tile, side in zip(window, grid, strict=True)]
    expected = torch.empty_like(x_BhwD)
    for top, bottom in cuts(grid[0], window[0], shift[0]):
        for left, right in cuts(grid[1], window[1], shift[1]):
            expected[:, top:bottom, left:right] = plain_attention(attention, x_BhwD[:, top:bottom, left:right], window)
    assert worst(attention(x_BhwD), expected) < 1e-10 if x_BhwD.numel() > 64 else torch.allclose(attention(x_BhwD), expected)


def cuts(side: int, tile: int, shift: int) -> list[tuple[int, int]]:
    """Where a side is cut when windows begin `shift` places in: the first and the last part are smaller."""
    at = sorted({0, *range(shift, side, tile), side})
    return list(itertools.pairwise(at))


def plain_attention(attention: WindowAttention, x_BhwD: Tensor, window: tuple[int, int]) -> Tensor:
    """One ragged window by the formula, with the bias looked up offset by offset."""
    batch, h, w, width = x_BhwD.shape
    heads = attention.windows.heads
    q, k, v = attention.qkv(x_BhwD.reshape(batch, h * w, width)).view(batch, h * w, 3, heads, -1).permute(2, 0, 3, 1, 4)
    at_N2 = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2)
    offset = at_N2[:, None] - at_N2[None] + torch.tensor([window[0] - 1, window[1] - 1])
    row_NN = offset[..., 0] * (2 * window[1] - 1) + offset[..., 1]
    bias_NNn = attention.rel_pos_bias.relative_position_bias_table[row_NN]
    share = (q @ k.mT / q.shape[-1] ** 0.5 + bias_NNn.permute(2, 0, 1)).softmax(-1)
    return attention.proj((share @ v).transpose(1, 2).reshape(batch, h, w, width))


@pytest.mark.parametrize("bias", [None, (1, 3), (4, 3), (4, 1)])
def test_attention_in_small_groups_is_pytorchs_with_all_gradients(bias):
    torch.manual_seed(0)
    qkv = torch.randn(3, 8, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    added = None if bias is None else torch.randn(*bias, 6, 6, dtype=torch.float64, requires_grad=True)
    whole = None if added is None else added.repeat(8 // len(added), 1, 1, 1)
    found, expected = attend(qkv, added), F.scaled_dot_product_attention(*qkv, attn_mask=whole)
    assert torch.allclose(found, expected, atol=1e-12)
    towards = torch.randn_like(found)
    inputs = [x for x in (qkv, added) if x is not None]
    for ours, theirs in zip(*(torch.autograd.grad((y * towards).sum(), inputs, retain_graph=True) for y in (found, expected)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    if bias == (4, 3):
        assert torch.autograd.gradcheck(attend, (qkv, added))
        assert torch.autograd.gradcheck(attend, (qkv, added, torch.rand(3, 1, 1, dtype=torch.float64, requires_grad=True) + 0.5))


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("bias", [None, (1, 3), (4, 3), (4, 1)])
def test_the_two_ways_to_attend_agree(bias, cosine):
    """One for CPUs, one for accelerators."""
    torch.manual_seed(0)
    inputs = [torch.randn(3, 8, 3, 6, 5), None if bias is None else torch.randn(*bias, 6, 6), torch.rand(3, 1, 1) + 1 if cosine else None]
    inputs = [x if x is None else x.double().requires_grad_() for x in inputs]
    found, expected = attend(*inputs), fused_attend(*inputs)
    assert torch.allclose(found, expected, atol=1e-12)
    towards, wanted = torch.randn_like(found), [x for x in inputs if x is not None]
    for ours, theirs in zip(*(torch.autograd.grad((y * towards).sum(), wanted) for y in (found, expected)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_a_net_that_was_looked_at_in_inference_mode_still_trains():
    net = create_backbone("swin_tiny_patch4_window7_224", image_size=32, **SMALL_SWIN)
    image = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        seen = net(image)
    net(image).sum().backward()
    assert torch.allclose(net(image), seen, atol=1e-6)


def test_grid_attention_takes_every_other_place():
    """MaxViT's figure 3: on a 4x4 map a grid of 2x2 joins places two apart."""
    assert grid_order((4, 4), (2, 2)).view(4, 4).tolist() == [[0, 2, 8, 10], [1, 3, 9, 11], [4, 6, 12, 14], [5, 7, 13, 15]]
    assert tiles(torch.arange(16).view(4, 4), (2, 2)).tolist()[:4] == [0, 1, 4, 5]


def test_pooling_takes_the_place_itself_off_again():
    x_BDhw = torch.randn(2, 3, 5, 6)
    found = metaformer.Pooling(3, (5, 6))(x_BDhw)
    assert torch.equal(found, F.avg_pool2d(x_BDhw, 3, 1, 1, count_include_pad=False) - x_BDhw)
    corner = x_BDhw[:, :, :2, :2].mean((2, 3)) - x_BDhw[:, :, 0, 0]
    assert torch.allclose(found[:, :, 0, 0], corner, atol=1e-6), "padding does not count"


def test_the_two_rollout_equations():
    random = np.random.default_rng(0)
    maps = [random.random((2, 3, 5, 5)) for _ in range(4)]
    maps = [a / a.sum(-1, keepdims=True) for a in maps]
    expected = None
    found = rollout([torch.from_numpy(a) for a in maps], normalize=False)
    for layer, a in enumerate(maps):
        step = a.mean(1) + np.eye(5)
        expected = step if expected is None else step @ expected  # A^1 + I, then (A^l + I) A^(l-1)_rollout
        assert np.allclose(found[layer], expected, atol=1e-12)


def test_positions_are_interpolated_in_two_dimensions():
    """A position that says where it is goes on saying so on a finer grid; [CLS] keeps its own."""
    coarse = torch.stack(torch.meshgrid(torch.linspace(-0.75, 0.75, 4), torch.linspace(-0.75, 0.75, 4), indexing="ij"), -1)
    own = torch.full((1, 1, 2), 9.0)
    fine = resize_positions(torch.cat([own, coarse.view(1, 16, 2)], 1), (4, 4), (8, 8), prefix=1)
    assert torch.equal(fine[:, :1], own)
    expected = torch.stack(torch.meshgrid(torch.linspace(-0.875, 0.875, 8), torch.linspace(-0.875, 0.875, 8), indexing="ij"), -1)
    inside = fine[0, 1:].view(8, 8, 2)[2:-2, 2:-2] - expected[2:-2, 2:-2]
    assert inside.abs().max() < 0.025
    wave = sincos_positions((6, 6), 16)[None]
    finer = resize_positions(wave, (6, 6), (12, 12))[0].view(12, 12, 16)
    assert F.cosine_similarity(finer[::2, ::2], wave[0].view(6, 6, 16), dim=-1).min() > 0.5


def test_swin_without_shifted_windows():
    """The lecture's ablation: the same weights, and no window ever hears of its neighbour before patches merge."""
    name = "swin_tiny_patch4_window7_224"
    nets = [perturb_(create_backbone(name, image_size=32, **SMALL_SWIN, shifted=on)).eval() for on in (True, False)]
    assert nets[0].state_dict().keys() == nets[1].state_dict().keys()
    image = torch.randn(1, 3, 32, 32)
    other = image.clone()
    other[..., :16, :16] += 1  # the upper left quarter: windows of 8 pixels, of 16 after merging
    changed = [(net.forward_features(image).map_BDhw - net.forward_features(other).map_BDhw).abs().sum((0, 1)) > 0 for net in nets]
    assert changed[1][:4, :4].all()
    assert changed[1].sum() == 16, "nothing crosses the border of a window"
    assert changed[0].sum() > 16, "with the shift it does"
    assert worst(nets[0](image), timm_twin(nets[0])(image)) < 1e-4


@pytest.mark.parametrize(("mixer", "theirs"), [("attention", True), ("spatial_mlp", False), ("identity", False), ("pooling", True)])
def test_metaformers_mixer_is_a_choice(mixer, theirs):
    torch.manual_seed(0)
    net = create_backbone("poolformer_s12", 5, 32, dims=(32, 64), depths=(1, 1), token_mixers=mixer, layer_scale_init_values=1.0)
    image = torch.randn(2, 3, 32, 32)
    assert net(image).isfinite().all()
    if theirs:
        from timm.models import metaformer as timms

        block = net.stages[0].blocks[0]
        x_BDhw = torch.randn(2, 32, 8, 8)
        twin = timms.Attention(32, proj_bias=True) if mixer == "attention" else timms.Pooling()
        twin.load_state_dict(block.token_mixer.state_dict())
        expected = twin(x_BDhw.flatten(2).mT).mT.unflatten(2, (8, 8)) if mixer == "attention" else twin(x_BDhw)
        assert torch.allclose(block.token_mixer(x_BDhw), expected, atol=1e-6)
    if mixer == "spatial_mlp":
        x_BDhw = torch.randn(2, 32, 8, 8)
        by_hand = torch.einsum("bdn,mn->bdm", x_BDhw.flatten(2), net.stages[0].blocks[0].token_mixer.weight).view_as(x_BDhw)
        assert torch.allclose(net.stages[0].blocks[0].token_mixer(x_BDhw), by_hand, atol=1e-5)


def test_mixed_mixers_by_stage():
    net = create_backbone("poolformer_s12", image_size=64, dims=(32, 32, 64), depths=(1, 1, 1),
                          token_mixers=("pooling", "identity", "attention"))  # fmt: skip
    assert [type(stage.blocks[0].token_mixer).__name__ for stage in net.stages] == ["Pooling", "Identity", "Attention"]
    assert isinstance(net.stages[0].downsample, nn.Identity)
