"""One suite for every backbone: other people's numbers with the same weights, and what the contract promises.

Legend: B batch, C channels, H W pixels, P Q mask grid, h w feature grid, D width.
"""

import json
import math

import pytest
import timm
import torch
from oracles import (
    TOLERANCE,
    perturb_,
    timm_twin,
    torchvision_swin,
    torchvision_vit,
    transformers_swin,
    worst,
)
from timm.layers import pos_embed_rel
from torch import Tensor, nn

from mimetic.backbones.catalog import CATALOG, create_backbone, list_backbones
from mimetic.backbones.contract import MASK_TOKEN, Backbone
from mimetic.backbones.counting import count
from mimetic.backbones.staged import Staged
from mimetic.backbones.vit import ViT
from mimetic.engine.errors import CheckpointError, SettingError

# The smallest published net of each family, at its own size.
SMALLEST = {
    "vit_tiny_patch16_224": {}, "deit_tiny_distilled_patch16_224": {}, "deit3_small_patch16_224": {}, "beit_base_patch16_224": {},
    "swin_tiny_patch4_window7_224": {}, "swinv2_tiny_window8_256": {}, "swinv2_base_window12to16_192to256": {"depths": (2, 2, 2, 2)},
    "poolformer_s12": {}, "twins_pcpvt_small": {}, "twins_svt_small": {}, "maxvit_tiny_tf_224": {}, "mixer_s32_224": {},
    "resmlp_12_224": {}, "gmlp_ti16_224": {},
}  # fmt: skip

# Nets of a few thousand parameters: at least two stages, shifted windows, every kind of block.
SWIN = {"patch_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
TWO_STAGES = {"embed_dims": (32, 64), "num_heads": (1, 2), "mlp_ratios": (4, 2), "depths": (2, 2), "sr_ratios": (2, 1), "patch_size": 4}
MLP = {"patch_size": 4, "embed_dim": 48, "num_blocks": 2}
SMALL = {
    "vit": ("vit_tiny_patch16_224", 20, {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 4}),
    "beit": ("beit_base_patch16_224", 20, {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 4}),
    "swin": ("swin_tiny_patch4_window7_224", 32, SWIN),
    "swin-oblong": ("swin_tiny_patch4_window7_224", (16, 32), SWIN | {"window_size": (2, 4)}),
    "swin-no-bias": ("swin_tiny_patch4_window7_224", 32, SWIN | {"qkv_bias": False, "mlp_ratio": 2.0}),
    "swinv2": ("swinv2_tiny_window8_256", 32, SWIN | {"pretrained_window_sizes": (0, 0)}),
    "swinv2-moved": ("swinv2_tiny_window8_256", 32, SWIN | {"pretrained_window_sizes": (3, 2)}),
    "swinv2-oblong": ("swinv2_tiny_window8_256", (16, 64), SWIN | {"pretrained_window_sizes": (0, 0)}),
    "poolformer": ("poolformer_s12", 64, {"depths": (1, 2, 1), "dims": (16, 24, 32)}),
    "poolformer-oblong": ("poolformer_s12", (32, 64), {"depths": (1, 2, 1), "dims": (16, 24, 32)}),
    "pcpvt": ("twins_pcpvt_small", 32, TWO_STAGES),
    "svt": ("twins_svt_small", 32, TWO_STAGES | {"wss": (4, 2), "depths": (3, 2)}),
    "svt-oblong": ("twins_svt_small", (32, 64), TWO_STAGES | {"wss": (4, 2)}),
    "maxvit": ("maxvit_tiny_tf_224", 32, {"embed_dim": (32, 64), "depths": (2, 1), "stem_width": 16, "window_size": 4}),
    "maxvit-oblong": ("maxvit_tiny_tf_224", (32, 64), {"embed_dim": (32, 64), "depths": (1, 2), "stem_width": 16, "window_size": (2, 4)}),
    "mixer": ("mixer_s16_224", 20, MLP),
    "mixer-oblong": ("mixer_s16_224", (12, 20), MLP | {"mlp_ratio": (1.0, 2.0)}),
    "resmlp": ("resmlp_12_224", 20, MLP),
    "gmlp": ("gmlp_ti16_224", 20, MLP),
}  # fmt: skip
every_small = pytest.mark.parametrize("case", SMALL)
square_small = pytest.mark.parametrize("case", [case for case in SMALL if "-" not in case])


def small(case: str, dtype: torch.dtype = torch.float32, classes: int = 7, channels: int = 3, size=None, **changed) -> Backbone:
    name, own, overrides = SMALL[case]
    torch.manual_seed(0)
    return perturb_(create_backbone(name, classes, size or own, channels, **overrides | changed)).to(dtype).eval()


def images(net: Backbone, count: int = 2, seed: int = 1) -> Tensor:
    shape = (count, net.in_channels, *net.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(next(net.parameters()).dtype)


def mask(net: Backbone, count: int = 2, seed: int = 2) -> Tensor:
    return torch.rand(count, *net.mask_grid, generator=torch.Generator().manual_seed(seed)) < 0.4


def over_pixels(hidden_BPQ: Tensor, net: Backbone) -> Tensor:
    (height, width), (p, q) = net.image_size, net.mask_grid
    return hidden_BPQ.repeat_interleave(height // p, 1).repeat_interleave(width // q, 2)[:, None]


# Against timm


@pytest.mark.parametrize("name", SMALLEST)
@torch.no_grad()
def test_published_nets_equal_timms_at_their_own_size(name):
    ours = perturb_(create_backbone(name, 10, **SMALLEST[name])).eval()
    theirs = timm_twin(ours)
    for dtype, tolerance in TOLERANCE.items():
        logits, expected = (net.to(dtype)(images(ours.to(dtype), 1)) for net in (ours, theirs))
        assert worst(logits, expected) < tolerance


@every_small
@torch.no_grad()
def test_logits_features_and_stages_equal_timms(case):
    ours = small(case)
    theirs = timm_twin(ours)
    for dtype, tolerance in TOLERANCE.items():
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        image_BCHW = images(ours)
        ends = [sum(ours.depths[: i + 1]) - 1 for i in range(len(ours.depths))] if isinstance(ours, Staged) else [0, 2]
        features = ours.forward_features(image_BCHW, layers=ends)
        assert worst(ours(image_BCHW), theirs(image_BCHW)) < tolerance
        assert worst(features.map_BDhw, normed_map(ours, theirs, image_BCHW)) < tolerance
        if isinstance(ours, Staged) and len(ours.depths) > 1:
            taken = list(range(len(ends) + 1))[-len(ends) :] if "maxvit" in case else list(range(len(ends)))
            maps = theirs.forward_intermediates(image_BCHW, indices=taken, intermediates_only=True)
            assert all(worst(own, their) < tolerance for own, their in zip(features.layers, maps, strict=True))


def normed_map(ours: Backbone, theirs: nn.Module, image_BCHW: Tensor) -> Tensor:
    """timm's last map after its final norm, wherever timm keeps that."""
    x = theirs.forward_features(image_BCHW)
    if x.dim() == 3:
        x = getattr(theirs, "fc_norm", nn.Identity())(x)
        return x[:, x.shape[1] - math.prod(ours.feature_grid) :].mT.unflatten(2, ours.feature_grid)
    if theirs.__class__.__name__ in ("MetaFormer", "MaxxVit"):
        return theirs.head.norm(x)
    return x.permute(0, 3, 1, 2)


@every_small
def test_gradients_equal_timms(case):
    ours = small(case, torch.float64)
    theirs = timm_twin(ours)
    image_BCHW = images(ours)
    found = {}
    for net in (ours, theirs):
        net.requires_grad_()(image_BCHW).square().sum().backward()
        found[net] = {name: parameter.grad for name, parameter in net.named_parameters()}
    for name, gradient in found[ours].items():
        if not name.endswith(MASK_TOKEN):
            expected = found[theirs][ours.timm_name(name)]
            assert torch.allclose(gradient, expected, rtol=1e-8, atol=1e-9), name
            assert expected.abs().max() > 0, name


@every_small
def test_weights_travel_both_ways(case):
    ours = small(case)
    other = small(case)
    before = perturb_(other, seed=5).mask_token.clone()
    other.load_timm_state_dict(timm_twin(ours).state_dict())
    assert torch.equal(other.mask_token, before)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in ours.state_dict().items() if MASK_TOKEN not in name)


@pytest.mark.parametrize("name", list_backbones())
def test_every_size_has_timms_parameters_and_multiply_adds(name, monkeypatch):
    # timm looks MaxViT's biases up by products with one-hot tables, which no paper counts.
    monkeypatch.setattr(pos_embed_rel, "reindex_2d_einsum_lookup", lambda table, h, w, *_: table.new_empty(len(table), h * w, h * w))
    with torch.device("meta"):
        ours, theirs = create_backbone(name, num_classes=1000), timm.create_model(name, num_classes=1000)
    assert {key: value.shape for key, value in ours.timm_state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    own, their = count(ours, ours.image_size), count(theirs, ours.image_size)
    assert own.parameters == their.parameters
    assert own.macs == pytest.approx(their.macs, rel=0.005)
    published = CATALOG[name].published
    if published.params_m:  # papers round, cut off (DeiT-Ti) or count a head more (ViT-L)
        assert abs(own.parameters / 1e6 - published.params_m) < max(1, 0.015 * published.params_m)
    if published.gmacs:  # FACTS of the field: timm and the papers differ by up to 5 %
        assert own.macs / 1e9 == pytest.approx(published.gmacs, rel=0.06)


# Second oracles


@pytest.mark.parametrize("case", ["swin", "swinv2"])
@torch.no_grad()
def test_masked_encoders_equal_transformers(case):
    ours = small(case, torch.float64, classes=0)
    theirs = transformers_swin(ours)
    image_BCHW, hidden_BPQ = images(ours), mask(ours)
    at_stem = hidden_BPQ.repeat_interleave(ours.stem_grid[0] // ours.mask_grid[0], 1)
    at_stem = at_stem.repeat_interleave(ours.stem_grid[1] // ours.mask_grid[1], 2)
    encoder = theirs.swinv2 if case == "swinv2" else theirs.swin
    tokens_BND = encoder(image_BCHW, bool_masked_pos=at_stem.flatten(1)).last_hidden_state
    assert worst(ours.forward_features(image_BCHW, hidden_BPQ).map_BDhw.flatten(2).mT, tokens_BND) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(("case", "twin"), [("swin", torchvision_swin), ("vit", torchvision_vit)])
@torch.no_grad()
def test_logits_equal_torchvisions(case, twin):
    ours = small(case, torch.float64)
    assert worst(ours(images(ours)), twin(ours)(images(ours))) < TOLERANCE[torch.float64]


# Hidden means hidden


@pytest.mark.parametrize("junk", ["noise", "nan", "inf"])
@every_small
def test_hidden_pixels_change_no_bit(case, junk):
    ours = small(case)
    if "maxvit" in case:  # running statistics are no hiding place either
        ours.train()
    image_BCHW, hidden_BPQ = images(ours), mask(ours)
    hidden_BCHW = over_pixels(hidden_BPQ, ours).expand_as(image_BCHW)
    other = {"noise": 9 * images(ours, seed=4), "nan": torch.tensor(torch.nan), "inf": torch.tensor(torch.inf)}[junk]
    spoilt_BCHW = torch.where(hidden_BCHW, other, image_BCHW).requires_grad_()

    def run(image: Tensor) -> list[Tensor]:
        ours.zero_grad()
        features = ours.forward_features(image, hidden_BPQ, layers=(0, 1))
        features.map_BDhw.square().sum().backward()
        gradients = [p.grad for p in ours.parameters() if p.grad is not None]
        return [features.map_BDhw, *([] if features.cls_BD is None else [features.cls_BD]), *features.layers, *gradients]

    for clean, spoilt in zip(run(image_BCHW), run(spoilt_BCHW), strict=True):
        assert torch.equal(clean, spoilt)
        assert spoilt.isfinite().all()
    assert ours.mask_token.grad.abs().sum() > 0
    assert spoilt_BCHW.grad.isfinite().all()
    assert torch.equal(spoilt_BCHW.grad != 0, ~hidden_BCHW), "a gradient for exactly the pixels that are seen"


@square_small
def test_masks_of_every_grid_that_divides_the_stems(case):
    ours = small(case)
    image_BCHW, side = images(ours), ours.stem_grid[0]
    for cells in (cells for cells in range(1, side + 1) if side % cells == 0):
        hidden_BPQ = torch.rand(2, cells, cells, generator=torch.Generator().manual_seed(cells)) < 0.4
        fine_BPQ = hidden_BPQ.repeat_interleave(side // cells, 1).repeat_interleave(side // cells, 2)
        assert torch.equal(*(ours.forward_features(image_BCHW, hidden).map_BDhw for hidden in (hidden_BPQ, fine_BPQ)))
    with pytest.raises(SettingError, match=rf"mask grid {side + 1}x{side} does not divide the backbone's grid {side}x{side}: set"):
        ours.forward_features(image_BCHW, torch.zeros(2, side + 1, side, dtype=torch.bool))
    empty = torch.zeros(2, *ours.mask_grid, dtype=torch.bool)
    assert torch.equal(ours.forward_features(image_BCHW, empty).map_BDhw, ours.forward_features(image_BCHW).map_BDhw)


@every_small
def test_every_parameter_receives_a_gradient(case):
    ours = small(case).train()
    ours.forward_features(images(ours), mask(ours)).map_BDhw.square().sum().backward()
    without = {name for name, p in ours.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == ours.head_names()
    ours.zero_grad()
    ours(images(ours)).square().sum().backward()
    assert {name for name, p in ours.named_parameters() if p.grad is None or not p.grad.any()} == {
        name for name, _ in ours.named_parameters() if name.endswith(MASK_TOKEN)
    }


# Behaviour


@every_small
def test_config_rebuilds_the_net(case):
    ours = small(case)
    config = json.loads(json.dumps(ours.config))
    again = create_backbone(**config.pop("overrides"), **config).eval()
    again.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(again(images(ours)), ours(images(ours)))


@every_small
def test_depths_rise_with_the_blocks_and_vectors_are_free_of_decay(case):
    ours = small(case)
    depths = {name: ours.depth_of(name) for name, _ in ours.named_parameters()}
    assert set(depths.values()) == set(range(ours.num_depths))
    stems = {name for name, depth in depths.items() if depth == 0}
    assert any(name.endswith(MASK_TOKEN) for name in stems)
    assert all(depths[name] == ours.num_depths - 1 for name in depths if name.startswith(("norm", "head")))
    exempt = ours.no_weight_decay_names()
    assert exempt <= depths.keys()
    matrices = {name for name, p in ours.named_parameters() if p.dim() > 1} - exempt
    kinds = ("proj", "qkv", ".q.", ".kv.", "sr.", "fc1", "fc2", "conv", "reduction", "head", "expand", "linear_tokens", "linear.")
    assert all(any(kind in name for kind in kinds) for name in matrices), matrices


@every_small
def test_gradient_checkpointing_changes_no_number(case):
    plain, again = (small(case, drop_path_rate=0.5).train() for _ in range(2))
    again.grad_checkpointing = True
    for net in (plain, again):
        torch.manual_seed(0)
        net.forward_features(images(net, 4), mask(net, 4)).map_BDhw.square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max())), name
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), again.buffers(), strict=True)), "running statistics move once"


@square_small
def test_drop_path_drops_whole_samples_in_training_alone(case):
    ours, plain = small(case, drop_path_rate=0.5), small(case)
    image_BCHW = images(ours, 1).expand(32, -1, -1, -1)
    with torch.no_grad():
        assert torch.equal(ours(image_BCHW), plain(image_BCHW))
        for part in ours.modules():  # of each sample's own accord, batch norm's statistics aside
            part.training = not isinstance(part, nn.BatchNorm2d)
        torch.manual_seed(0)
        assert 1 < len(ours(image_BCHW).round(decimals=3).unique(dim=0)) <= 32


@every_small
def test_bf16_stays_near_fp32(case):
    """Within 6 % of the spread of the values under autocast, gradients finite."""
    ours = small(case)
    exact = ours.forward_features(images(ours), mask(ours)).map_BDhw
    with torch.autocast("cpu", torch.bfloat16):
        rough = ours.forward_features(images(ours), mask(ours)).map_BDhw
    rough.float().square().sum().backward()
    assert 0 < (rough - exact).square().mean().sqrt() < 0.06 * exact.std()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


DEEP = {
    "vit": {"depth": 32, "init_values": 1e-5}, "beit": {"depth": 32, "init_values": 1e-5}, "swin": {"depths": (16, 16)},
    "swinv2": {"depths": (16, 16)}, "poolformer": {"depths": (8, 16, 8), "layer_scale_init_values": 1e-5}, "pcpvt": {"depths": (16, 16)},
    "svt": {"depths": (16, 16)}, "maxvit": {"depths": (16, 16)}, "mixer": {"num_blocks": 32}, "gmlp": {"num_blocks": 32},
    "resmlp": {"num_blocks": 32, "init_values": 1e-5},
}  # fmt: skip


@pytest.mark.parametrize("bf16", [False, True])
@square_small
def test_deep_nets_with_small_layer_scale_stay_finite(case, bf16):
    name, size, overrides = SMALL[case]
    torch.manual_seed(0)
    ours = create_backbone(name, 7, size, **overrides | DEEP[case]).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        features = ours.forward_features(10 * images(ours), mask(ours)).map_BDhw
    features.float().square().mean().backward()
    assert features.isfinite().all()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


@square_small
def test_compiles_without_graph_breaks(case):
    ours = small(case).train()
    torch._dynamo.reset()
    compiled = torch.compile(ours.forward_features, fullgraph=True, backend="aot_eager")
    image_BCHW, hidden_BPQ = images(ours), mask(ours)
    expected = ours.forward_features(image_BCHW, hidden_BPQ).map_BDhw
    found = compiled(image_BCHW, hidden_BPQ).map_BDhw
    assert torch.allclose(found, expected, atol=1e-5)
    found.square().sum().backward()
    assert ours.mask_token.grad.any()


# What a user can get wrong


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "swin_tinny_patch4_window7_224"}, r"did you mean swin_tiny_patch4_window7_224\?"),
        ({"name": "swin_tiny_patch4_window7_224", "image_size": 256}, r"256x256 .* windows of 7x7 .* 224x224 and 448x448"),
        ({"name": "swin_tiny_patch4_window7_224", "image_size": (224, 240)}, r"224x240 is no multiple of 32.*; 224x256 is"),
        ({"name": "swin_tiny_patch4_window7_224", "image_size": (224, 256)}, r"224x256 .* 224x224 and 224x448 can be tiled"),
        ({"name": "swin_tiny_patch4_window7_224", "num_heads": (5, 6, 12, 24)}, r"num_heads \[5, 6, 12, 24\] must divide"),
        ({"name": "swin_tiny_patch4_window7_224", "window": 8}, r"no override 'window' \(did you mean window_size\?\)"),
        ({"name": "swinv2_tiny_window8_256", "depths": (1, 1)}, r"num_heads|pretrained_window_sizes .* depths \[1, 1\]"),
        ({"name": "twins_svt_small", "image_size": 256}, r"256x256 .* windows of 7x7 do not tile; image_size 224x224 and 448x448"),
        ({"name": "twins_pcpvt_small", "num_heads": (1, 2)}, r"num_heads \[1, 2\] has 2 values, there are 4 stages"),
        ({"name": "maxvit_tiny_tf_224", "image_size": 256, "window_size": 7}, r"256x256 .* windows of 7x7 .* 224x224 and 448x448"),
        ({"name": "maxvit_tiny_tf_224", "embed_dim": (60, 128, 256, 512)}, r"embed_dim \[60, .* multiple of 32"),
        ({"name": "poolformer_s12", "token_mixers": "poling"}, r"token_mixers \['poling'.* pooling, attention, spatial_mlp, identity"),
        ({"name": "poolformer_s12", "dims": (64, 128)}, r"2 widths \[64, 128\], 4 depths"),
        ({"name": "mixer_b16_224", "image_size": 220}, r"220x220 is no multiple of 16, .*; 224x224 is"),
        ({"name": "mixer_b16_224", "drop_path_rate": 1.5}, r"drop_path_rate 1\.5.* in \[0, 1\)"),
        ({"name": "swin_tiny_patch4_window7_224", "in_channels": 0}, r"in_channels 0"),
        ({"name": "swin_tiny_patch4_window7_224", "embed_dim": "wide"}, r"cannot be built with .*wide"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(SettingError, match=words) as caught:
        create_backbone(**arguments)
    assert "\n" not in str(caught.value)


@square_small
def test_bad_inputs_are_named(case):
    ours = small(case)
    height, width = ours.image_size
    with pytest.raises(SettingError, match=rf"images are {height + 4}x{width}, .* {height}x{width}: resize"):
        ours(torch.zeros(1, 3, height + 4, width))
    with pytest.raises(SettingError, match=r"1 channels, .* in_channels=3"):
        ours(torch.zeros(1, 1, height, width))
    last = ours.num_depths - 3
    with pytest.raises(SettingError, match=rf"layers \[{last + 1}\]: the backbone has blocks 0 to {last}"):
        ours.forward_features(images(ours), layers=(last + 1,))


@square_small
def test_foreign_weights_are_refused_and_change_nothing(case):
    ours = small(case)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    other = small("gmlp" if case != "gmlp" else "swin").timm_state_dict()
    with pytest.raises(CheckpointError, match=r"missing .* \(\d+\); unknown .* \(\d+\); name, overrides"):
        ours.load_timm_state_dict(other)
    state = ours.timm_state_dict()
    key = next(name for name, value in state.items() if value.dim() > 1)
    with pytest.raises(CheckpointError, match=rf"{key}: \(.*\) in the weights, \(.*\) in the backbone; build"):
        ours.load_timm_state_dict(state | {key: torch.cat([state[key]] * 2)})
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_every_family_of_the_lecture_is_there():
    names = " ".join(list_backbones())
    for family in ("vit_huge", "deit_tiny_distilled", "beit_large", "swin_large", "swinv2_large", "poolformer_m48", "twins_pcpvt_large",
                   "twins_svt_large", "maxvit_xlarge", "mixer_l16", "resmlp_36", "gmlp_b16"):  # fmt: skip
        assert family in names
    assert len({type(small(case)) for case in SMALL}) == 9
    assert isinstance(small("beit"), ViT)
