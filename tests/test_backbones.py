"""The vision transformers against timm and transformers, and what their contract promises.

Legend: B batch, C channels, H W pixels, P Q token grid, N tokens, D width, V codebook, M hidden cells of the batch.
"""

import json
import subprocess
import sys

import pytest
import timm
import torch
from oracles import TOLERANCE, masked_beit, perturb_, transformers_weights, worst
from safetensors.torch import save_file
from torch import Tensor, nn

from mimetic.backbones.catalog import CATALOG, create_backbone, list_backbones
from mimetic.backbones.contract import Backbone
from mimetic.backbones.layers import add_branch
from mimetic.backbones.windows import attend, fused_attend
from mimetic.engine.errors import CheckpointError, SettingError

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 4}
SMALL_AT_20 = {"num_classes": 7, "image_size": 20, **SMALL}

# Name of a case -> arguments of create_backbone. The first three are nets of real size, but for BEiT's depth.
CASES = {
    "vit": {"name": "vit_tiny_patch16_224", "num_classes": 10},
    "distilled": {"name": "deit_tiny_distilled_patch16_224", "num_classes": 10},
    "beit": {"name": "beit_base_patch16_224", "num_classes": 10, "depth": 2},
    "deit": {"name": "deit_tiny_patch16_224", **SMALL_AT_20},
    "vit-avg": {"name": "vit_tiny_patch16_224", "global_pool": "avg", **SMALL_AT_20},
    "vit-without-cls": {"name": "vit_tiny_patch16_224", "global_pool": "avg", "class_token": False, **SMALL_AT_20},
    "vit-glorot": {"name": "vit_tiny_patch16_224", "weight_init": "mae", **SMALL_AT_20},
    "vit-scaled": {"name": "vit_small_patch16_224", "init_values": 0.1, "qkv_bias": False, **SMALL_AT_20},
    "vit-wide": {"name": "vit_tiny_patch16_224", **SMALL_AT_20, "image_size": (12, 28), "in_channels": 1, "mlp_ratio": 2.5},
    "vit-oblong-patch": {"name": "vit_tiny_patch16_224", **SMALL_AT_20, "image_size": (12, 32), "patch_size": (4, 8)},
    "deit3": {"name": "deit3_small_patch16_224", **SMALL_AT_20},
    "distilled-small": {"name": "deit_tiny_distilled_patch16_224", **SMALL_AT_20, "in_channels": 5},
    "beit-cls": {"name": "beit_base_patch16_224", "global_pool": "token", **SMALL_AT_20},
    "beit-wide": {"name": "beit_large_patch16_224", **SMALL_AT_20, "image_size": (12, 28), "in_channels": 5},
    "beit-absolute": {"name": "beit_base_patch16_224", "use_abs_pos_emb": True, "init_values": None, **SMALL_AT_20},
    "beit-no-bias": {"name": "beit_base_patch16_224", "qkv_bias": False, "use_rel_pos_bias": False, **SMALL_AT_20},
    "beit-shared": {"name": "beit_base_patch16_224", "use_shared_rel_pos_bias": True, **SMALL_AT_20},
    "beit-shared-cls": {
        "name": "beit_base_patch16_224", "use_shared_rel_pos_bias": True, "global_pool": "token", **SMALL_AT_20,
        "num_classes": 0,
    },
    "vit-avg-headless": {"name": "vit_tiny_patch16_224", "global_pool": "avg", **SMALL_AT_20, "num_classes": 0},
    "beit-headless": {"name": "beit_base_patch16_224", **SMALL_AT_20, "num_classes": 0},
    "distilled-headless": {"name": "deit_tiny_distilled_patch16_224", **SMALL_AT_20, "num_classes": 0},
}
SMALL_CASES = [case for case, arguments in CASES.items() if "patch_size" in arguments]
every_case = pytest.mark.parametrize("case", CASES)
small_cases = pytest.mark.parametrize("case", SMALL_CASES)


def built(case: str, dtype: torch.dtype = torch.float32, **changed) -> Backbone:
    return perturb_(create_backbone(**CASES[case] | changed)).to(dtype).eval()


def twin(ours: Backbone) -> nn.Module:
    """timm's net of the same name and arguments, with our weights."""
    theirs = timm.create_model(ours.config["name"], **ours.timm_arguments()).to(next(ours.parameters()).dtype).eval()
    theirs.load_state_dict(ours.timm_state_dict(), strict=True)
    return theirs


def images(backbone: Backbone, count: int = 2, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    shape = (count, backbone.in_channels, *backbone.image_size)
    return torch.randn(shape, generator=random).to(next(backbone.parameters()).dtype)


def mask(backbone: Backbone, count: int = 2, seed: int = 2) -> Tensor:
    return torch.rand(count, *backbone.mask_grid, generator=torch.Generator().manual_seed(seed)) < 0.4


# Against timm


@every_case
@torch.no_grad()
def test_logits_and_features_equal_timms(case):
    ours = built(case)
    theirs = twin(ours)
    for dtype, tolerance in TOLERANCE.items():
        pairs = matching_outputs(ours.to(dtype), theirs.to(dtype))
        differences = {what: worst(*pair) for what, pair in pairs.items()}
        assert max(differences.values()) < tolerance, differences


def matching_outputs(ours: Backbone, theirs: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    image_BCHW = images(ours)
    features = ours.forward_features(image_BCHW, layers=(1, 0))
    tokens_BND, maps = theirs.forward_intermediates(image_BCHW, indices=[0, 1])
    # With mean pooling timm leaves tokens as they are and holds the norm in the head; our maps come after it in either case.
    tokens_BND = theirs.fc_norm(tokens_BND)
    prefix = theirs.num_prefix_tokens
    assert (features.cls_BD is not None) + (features.dist_BD is not None) == prefix
    pairs = {
        "logits": (ours(image_BCHW), theirs(image_BCHW)),
        "map": (features.map_BDhw.flatten(2).mT, tokens_BND[:, prefix:]),
        "layer 1": (features.layers[0], maps[1]),
        "layer 0": (features.layers[1], maps[0]),
    }
    tokens = zip(("cls", "dist"), (features.cls_BD, features.dist_BD), tokens_BND.unbind(1), strict=False)
    return pairs | {what: (own, their) for what, own, their in tokens if own is not None}


@small_cases
def test_gradients_equal_timms(case):
    ours = built(case, torch.float64)
    theirs, image_BCHW = twin(ours), images(ours)
    for net in (ours, theirs):
        net(image_BCHW).square().sum().backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if "mask_token" in name:
            assert parameter.grad is None
        elif name.startswith("rel_pos_bias"):  # one table stands for all of theirs: gradients add up
            tables = [gradient for key, gradient in their_gradients.items() if key.endswith("bias_table")]
            assert torch.allclose(parameter.grad, sum(tables), rtol=1e-9, atol=1e-9)
        else:
            assert torch.allclose(parameter.grad, their_gradients[ours.timm_name(name)], rtol=1e-9, atol=1e-9), name


@small_cases
def test_weights_travel_both_ways(case):
    ours = built(case)
    theirs = twin(ours)
    other = create_backbone(**CASES[case])
    before = other.mask_token.clone()
    other.load_timm_state_dict(theirs.state_dict())
    assert torch.equal(other.mask_token, before)
    for name, value in ours.state_dict().items():
        assert "mask_token" in name or torch.equal(other.state_dict()[name], value), name


@small_cases
def test_timm_opens_a_folder_of_ours_strictly(case, tmp_path):
    ours = built(case)
    save_file({name: value.contiguous() for name, value in ours.timm_state_dict().items()}, tmp_path / "model.safetensors")
    arguments = ours.timm_arguments()
    config = {"architecture": ours.config["name"], "model_args": arguments, "pretrained_cfg": {"num_classes": ours.num_classes}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert worst(ours(images(ours)), theirs(images(ours))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", list_backbones())
def test_parameters_as_in_timm_and_in_the_paper(name):
    with torch.device("meta"):
        ours, theirs = create_backbone(name, num_classes=1000), timm.create_model(name, num_classes=1000)
    count = sum(p.numel() for key, p in ours.named_parameters() if "mask_token" not in key)
    assert count == sum(p.numel() for p in theirs.parameters())
    shapes = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.timm_state_dict().items()} == shapes
    published = CATALOG[name].published.params_m
    if published is not None:  # papers round, cut off (DeiT-Ti) or count a head more (ViT-L)
        assert abs(count / 1e6 - published) < max(1, 0.015 * published)


# Against transformers


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_masked_model_equals_transformers(shared, dtype):
    vocabulary = 50
    ours = built("beit-cls", dtype, num_classes=0, use_shared_rel_pos_bias=shared)
    head = perturb_(nn.Linear(ours.embed_dim, vocabulary), seed=3).to(dtype)
    theirs = masked_beit(vocabulary, shared).to(dtype).eval()
    theirs.load_state_dict(transformers_weights(ours, head), strict=True)

    image_BCHW, hidden_BPQ = images(ours), mask(ours)
    map_BDPQ = ours.forward_features(image_BCHW, hidden_BPQ).map_BDhw
    logits_MV = head(map_BDPQ.permute(0, 2, 3, 1)[hidden_BPQ])
    their_logits_MV = theirs(image_BCHW, bool_masked_pos=hidden_BPQ.flatten(1)).logits[hidden_BPQ.flatten(1)]
    assert worst(logits_MV, their_logits_MV) < TOLERANCE[dtype]


# Hidden means hidden


@pytest.mark.parametrize("junk", ["noise", "nan", "inf"])
@small_cases
def test_hidden_pixels_change_no_bit(case, junk):
    ours = built(case)
    image_BCHW, hidden_BPQ = images(ours), mask(ours)
    cell = [side // cells for side, cells in zip(ours.image_size, ours.mask_grid, strict=True)]
    hidden_BHW = hidden_BPQ.repeat_interleave(cell[0], 1).repeat_interleave(cell[1], 2)
    other = {"noise": 9 * images(ours, seed=4), "nan": torch.tensor(torch.nan), "inf": torch.tensor(torch.inf)}[junk]
    spoilt_BCHW = torch.where(hidden_BHW[:, None], other, image_BCHW).requires_grad_()

    def run(image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        ours.zero_grad()
        features = ours.forward_features(image, hidden_BPQ, layers=(0, 1))
        features.map_BDhw.square().sum().backward()
        outputs = [features.map_BDhw, features.cls_BD, features.dist_BD, *features.layers]
        return [o for o in outputs if o is not None], [p.grad for p in ours.parameters() if p.grad is not None]

    for clean, spoilt in zip(run(image_BCHW), run(spoilt_BCHW), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(clean, spoilt, strict=True))
        assert all(b.isfinite().all() for b in spoilt)
    assert ours.mask_token.grad.abs().sum() > 0
    seen_BCHW = hidden_BHW[:, None].expand_as(image_BCHW).logical_not()
    assert spoilt_BCHW.grad.isfinite().all()
    assert torch.equal(spoilt_BCHW.grad != 0, seen_BCHW), "a gradient for exactly the pixels that are seen"


def test_visible_pixels_and_the_mask_do_change_the_output():
    ours = built("beit-shared")
    image_BCHW, hidden_BPQ = images(ours), mask(ours)
    masked, unmasked = ours.forward_features(image_BCHW, hidden_BPQ).map_BDhw, ours.forward_features(image_BCHW).map_BDhw
    assert (masked - unmasked).abs().max() > 0.1
    assert torch.equal(ours.forward_features(image_BCHW, torch.zeros_like(hidden_BPQ)).map_BDhw, unmasked)


def test_a_coarser_mask_is_repeated_and_one_that_does_not_fit_refused():
    ours = built("vit-avg", image_size=24)
    image_BCHW, coarse_BPQ = images(ours), mask(ours)[:, :3, :2]
    fine_BPQ = coarse_BPQ.repeat_interleave(2, 1).repeat_interleave(3, 2)
    assert torch.equal(*(ours.forward_features(image_BCHW, hidden).map_BDhw for hidden in (coarse_BPQ, fine_BPQ)))
    for shape in ((4, 6), (6, 12)):
        with pytest.raises(SettingError, match=rf"{shape[0]}x{shape[1]} .* 6x6"):
            ours.forward_features(image_BCHW, torch.zeros(2, *shape, dtype=torch.bool))


# Behaviour


@small_cases
def test_every_parameter_has_a_depth(case):
    ours = built(case)
    depths = {name: ours.depth_of(name) for name, _ in ours.named_parameters()}
    assert set(depths.values()) == set(range(ours.num_depths)) == set(range(5))
    for name, depth in depths.items():
        expected = 0 if name.startswith(("patch_embed.", "rel_pos_bias.")) else 4
        assert depth == (int(name.split(".")[1]) + 1 if name.startswith("blocks.") else expected)


def test_parameters_free_of_weight_decay():
    names = built("beit-absolute").no_weight_decay_names()
    own = {f"patch_embed.{name}" for name in ("cls_token", "mask_token", "pos_embed")}
    assert names == own | {f"blocks.{i}.attn.rel_pos_bias.relative_position_bias_table" for i in range(3)}
    assert "patch_embed.dist_token" in built("distilled-small").no_weight_decay_names()
    assert "rel_pos_bias.relative_position_bias_table" in built("beit-shared").no_weight_decay_names()


@torch.no_grad()
def test_shared_table_becomes_one_per_block():
    shared, per_block = built("beit-shared"), built("beit-shared", use_shared_rel_pos_bias=False)
    per_block.load_timm_state_dict(shared.timm_state_dict())
    image_BCHW = images(shared)
    assert torch.equal(shared(image_BCHW), per_block(image_BCHW))
    per_block.blocks[1].attn.rel_pos_bias.relative_position_bias_table.add_(1)
    with pytest.raises(CheckpointError, match="differ between blocks"):
        shared.load_timm_state_dict(per_block.timm_state_dict())


def test_bias_lookup_backward_is_deterministic_by_construction():
    ours = built("beit-cls")
    waiting, seen = [ours(images(ours)).grad_fn], set()
    while waiting:
        node = waiting.pop()
        seen.add(node.name())
        waiting += [parent for parent, _ in node.next_functions if parent is not None and parent.name() != "AccumulateGrad"]
    assert "EmbeddingBackward0" in seen
    assert "IndexBackward0" not in seen, "on several CPU threads its sums differ from run to run"


def test_drop_path_works_in_training_alone():
    ours, plain = built("vit-scaled", drop_path_rate=0.6), built("vit-scaled")
    image_BCHW = images(ours)
    assert torch.equal(ours(image_BCHW), plain(image_BCHW))
    assert [block.drop_path for block in ours.blocks] == pytest.approx([0, 0.3, 0.6])
    torch.manual_seed(0)
    ours.train()
    x_BND = torch.ones(4000, 1, 48)
    branch_BND = add_branch(torch.zeros_like(x_BND), x_BND, None, ours.blocks[2].drop_path, training=True)
    assert set(branch_BND[:, 0, 0].tolist()) == {0.0, 2.5}
    assert torch.equal(branch_BND, branch_BND[:, :1, :1].expand_as(branch_BND)), "whole samples are dropped"
    assert branch_BND.mean().item() == pytest.approx(1, abs=0.08)
    assert not torch.equal(ours(image_BCHW), plain(image_BCHW))


def test_fresh_weights_are_beits():
    ours = create_backbone("beit_base_patch16_224", num_classes=10, depth=3, embed_dim=192, num_heads=3)
    cut_std = 0.02 * 0.5396  # of a normal distribution cut at one standard deviation
    for name, weight in ours.named_parameters():
        if name.endswith("table") or name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name or "gamma" in name:
            assert (weight == (0.1 if "gamma" in name else 1)).all(), name
        else:
            scale = 0.001 if name.startswith("head") else 1
            if name.endswith(("attn.proj.weight", "fc2.weight")):
                scale = (2 * (int(name.split(".")[1]) + 1)) ** -0.5
            assert weight.abs().max() <= 0.02 * scale * 1.0001, name
            assert weight.std().item() == pytest.approx(cut_std * scale, rel=0.15), name


@pytest.mark.parametrize("case", ["distilled-small", "beit-shared", "beit-wide", "vit-avg"])
def test_runs_under_bf16_autocast_and_backwards(case):
    ours = built(case).train()
    image_BCHW, hidden_BPQ = images(ours), mask(ours)
    exact = ours.forward_features(image_BCHW, hidden_BPQ).map_BDhw
    with torch.autocast("cpu", torch.bfloat16):
        rough = ours.forward_features(image_BCHW, hidden_BPQ).map_BDhw
    assert 0 < (rough - exact).abs().max() < 0.3
    rough.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


@small_cases
def test_config_rebuilds_the_net(case):
    ours = built(case)
    config = json.loads(json.dumps(ours.config))
    again = create_backbone(**config.pop("overrides"), **config)
    again.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(again.eval()(images(ours)), ours(images(ours)))
    assert json.loads(json.dumps(again.config)) == json.loads(json.dumps(ours.config))


def test_distilled_net_shows_both_heads():
    ours = built("distilled-small")
    image_BCHW = images(ours)
    features, (cls, dist) = ours.forward_features(image_BCHW), ours.forward_heads(image_BCHW)
    assert torch.allclose(cls, ours.head(features.cls_BD), atol=1e-6)
    assert torch.allclose(dist, ours.head_dist(features.dist_BD), atol=1e-6)
    assert torch.allclose(ours(image_BCHW), (cls + dist) / 2, atol=1e-6)


# What a user can get wrong


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "beit_base_patch16_225"}, r"did you mean beit_base_patch16_224\?"),
        ({"name": "vit_tiny_patch16_224", "embed_dims": 32}, r"did you mean embed_dim\?.* it has patch_size"),
        ({"name": "deit_tiny_distilled_patch16_224", "global_pool": "avg"}, "no override 'global_pool'"),
        ({"name": "vit_tiny_patch16_224", "global_pool": "mean"}, '"token" or "avg", not "mean"'),
        ({"name": "vit_tiny_patch16_224", "class_token": False}, 'class_token=False needs global_pool="avg"'),
        ({"name": "vit_tiny_patch16_224", "num_heads": 5}, "embed_dim 192 .* num_heads 5"),
        ({"name": "vit_tiny_patch16_224", "image_size": (224, 220)}, "224x220 .* 16x16; 224x224 is"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(SettingError, match=words):
        create_backbone(**arguments)


def test_bad_inputs_are_named():
    ours = built("vit-avg")
    with pytest.raises(SettingError, match=r"images are 24x20, .* 20x20: resize, or set image_size to 24x20"):
        ours(torch.zeros(1, 3, 24, 20))
    with pytest.raises(SettingError, match=r"1 channels, .* in_channels=3"):
        ours(torch.zeros(1, 1, 20, 20))
    with pytest.raises(SettingError, match=r"layers \[3\]: the backbone has blocks 0 to 2"):
        ours.forward_features(images(ours), layers=(3,))


def test_foreign_weights_are_refused_and_change_nothing():
    ours = built("vit-avg")
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"missing fc_norm.weight, fc_norm.bias \(2\); unknown norm.weight"):
        ours.load_timm_state_dict(built("vit-avg", global_pool="token").timm_state_dict())
    with pytest.raises(CheckpointError, match=r"pos_embed: \(1, 37, 48\) in the weights, \(1, 26, 48\) in the backbone"):
        ours.load_timm_state_dict(built("vit-avg", image_size=24).timm_state_dict())
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_catalog_does_without_timm():
    code = "import sys, mimetic.backbones.catalog; sys.exit(any(name in sys.modules for name in ('timm', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("groups", "windows"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_attention_leaves_the_bias_that_it_is_given_alone(groups, windows):
    """In bf16 scores are added up where the bias was copied to; one for all heads or windows stays one."""
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, groups * windows, 2, 4, 8, generator=random).bfloat16()
    for heads in (1, 2):
        bias = torch.randn(windows, heads, 4, 4, generator=random).bfloat16()
        before = bias.clone()
        ours, theirs = attend(qkv, bias, None), fused_attend(qkv.float(), bias.float(), None)
        assert torch.equal(bias, before)
        assert (ours.float() - theirs).abs().max() < 0.03
