"""Backbones at another resolution and for other channels, against timm's own ways.

Legend: B batch, D width, P Q patch grid, L offsets of a window, n heads.
"""

import pytest
import timm
import torch
from oracles import perturb_, timm_twin, worst
from test_conformance import SMALL, images, mask, normed_map, small
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table, resize_rel_pos_bias_table_simple
from timm.models._manipulate import adapt_input_conv

from mimetic.backbones.catalog import create_backbone
from mimetic.backbones.files import load_backbone, save_backbone, transfer
from mimetic.backbones.interpolation import adapt_channels, resize_positions, resize_table
from mimetic.backbones.resize import resized
from mimetic.engine.errors import CheckpointError, SettingError
from mimetic.export.backbone import _checked

# timm's own interpolation, our oracle here, uses what PyTorch warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:torch.searchsorted")


@pytest.mark.parametrize("new", [(7, 7), (3, 9), (14, 12)])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_positions_as_timm_resamples_them(prefix, new):
    positions = torch.randn(1, 25 + prefix, 12)
    expected = resample_abs_pos_embed(positions, list(new), [5, 5], num_prefix_tokens=prefix)
    assert torch.allclose(resize_positions(positions, (5, 5), new, prefix), expected, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [((7, 7), (12, 12)), ((7, 7), (8, 8)), ((8, 8), (6, 6)), ((4, 6), (7, 5)), ((14, 14), (24, 24))])
def test_bias_tables_as_timm_resizes_them(old, new):
    table_Ln = torch.randn((2 * old[0] - 1) * (2 * old[1] - 1), 3)
    shape = (2 * new[0] - 1) * (2 * new[1] - 1), 3
    expected = resize_rel_pos_bias_table(table_Ln, new, shape, old)
    assert worst(resize_table(table_Ln, old, new), expected) < 1e-4
    if old[0] == old[1]:
        assert worst(resize_table(table_Ln, old, new, "bicubic"), resize_rel_pos_bias_table_simple(table_Ln, new, shape)) < 1e-5


def test_the_scores_of_cls_stay():
    table_Ln = torch.randn(7 * 7 + 3, 2)
    assert torch.equal(resize_table(table_Ln, (4, 4), (6, 6))[-3:], table_Ln[-3:])
    assert resize_table(table_Ln, (4, 4), (4, 4)) is table_Ln


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_channels_as_timm_adapts_them(channels):
    weight = torch.randn(8, 3, 4, 4)
    assert torch.allclose(adapt_channels(weight, channels), adapt_input_conv(channels, weight), atol=1e-6)


def test_a_grey_picture_gives_what_it_gave_as_three_equal_channels():
    ours = small("swin")
    grey = torch.randn(2, 1, 32, 32)
    assert worst(resized(ours, in_channels=1)(grey), ours(grey.expand(-1, 3, -1, -1))) < 1e-4


# Name of a case -> (size, overrides) that its windows allow.
OTHER = {
    "vit": (28, {}), "beit": (28, {}), "swin": (64, {}), "swinv2": (64, {}), "swin-oblong": ((32, 48), {"window_size": (4, 6)}),
    "poolformer": (96, {}), "pcpvt": (64, {}), "svt": (48, {"wss": (4, 2)}), "maxvit": (64, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
@torch.no_grad()
def test_built_at_another_resolution_features_equal_timms(case):
    size, overrides = OTHER[case]
    ours = small(case, size=size, **overrides)
    assert ours.image_size != small(case).image_size
    theirs = timm_twin(ours)
    image_BCHW = images(ours)
    assert worst(ours.forward_features(image_BCHW).map_BDhw, normed_map(ours, theirs, image_BCHW)) < 1e-4
    assert worst(ours(image_BCHW), theirs(image_BCHW)) < 1e-4


SET = {  # what timm's set_input_size takes beside the image size
    "swin_tiny_patch4_window7_224": ((48, 64), {"window_size": (6, 8)}, (6, 8)),
    "swinv2_tiny_window8_256": (64, {"window_size": 8}, (8, 8)),
    "vit_tiny_patch16_224": ((28, 20), {}, None),
    "beit_base_patch16_224": (28, {}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", ["vit", "beit", "swin", "swinv2"])
@torch.no_grad()
def test_trained_weights_moved_to_another_resolution_equal_timms(case):
    ours = small(case)
    theirs = timm_twin(ours)
    size, overrides, window = SET[SMALL[case][0]]
    pair = (size, size) if isinstance(size, int) else size
    if window is None:
        theirs.set_input_size(pair)
    else:
        theirs.set_input_size(pair, window_size=window)
    if case == "swinv2":  # timm's set_input_size measures offsets anew in the new window
        overrides = overrides | {"pretrained_window_sizes": (0, 0)}
    moved = resized(ours, size, **overrides)
    image_BCHW = images(moved)
    assert worst(moved(image_BCHW), theirs(image_BCHW)) < 1e-4


@torch.no_grad()
def test_swinv2_measures_offsets_in_the_window_it_was_trained_with():
    ours = small("swinv2")
    moved = resized(ours, 64, window_size=8)
    for old, new in zip(ours.modules(), moved.modules(), strict=True):
        if hasattr(old, "offset_L2"):
            inner = new.offset_L2.view(15, 15, 2)[4:-4, 4:-4].reshape(-1, 2)
            assert torch.allclose(inner, old.offset_L2, atol=1e-6), "what the bias was learned for, it says again"
            assert new.offset_L2.max() < 1.5 * old.offset_L2.max()


@torch.no_grad()
def test_maxvits_table_moves_with_its_window():
    ours = small("maxvit")
    moved = resized(ours, 64, window_size=8)
    table, wider = (net.stages[0].blocks[0].attn_grid.attn.rel_pos.relative_position_bias_table for net in (ours, moved))
    expected = resize_rel_pos_bias_table(table, (8, 8), wider.shape, (4, 4))
    assert worst(wider, expected) < 1e-4
    assert moved(images(moved)).isfinite().all()


def test_what_cannot_be_resized_is_refused():
    with pytest.raises(CheckpointError, match=r"mlp_tokens.fc1.weight: \(24, 25\) .*, \(24, 36\) here|linear|tokens"):
        resized(small("mixer"), 24)
    with pytest.raises(SettingError, match=r"windows of 4x4 do not tile; image_size 32x32 and 48x48|do not tile"):
        resized(small("swin"), 40)


@pytest.mark.parametrize("case", ["vit", "swin", "swinv2", "maxvit", "poolformer", "svt", "mixer"])
def test_a_saved_backbone_opens_at_its_own_size_and_at_another(case, tmp_path):
    ours = small(case, classes=0)
    save_backbone(ours, tmp_path / "net", mean=[0.5] * 3, std=[0.5] * 3)
    again = load_backbone(tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(again.forward_features(images(ours), mask(ours)).map_BDhw,
                           ours.forward_features(images(ours), mask(ours)).map_BDhw)  # fmt: skip
    if case != "mixer":
        size = ours.image_size[0] * 2
        wider = load_backbone(tmp_path / "net", image_size=size, in_channels=1)
        assert wider.forward_features(torch.zeros(1, 1, size, size)).map_BDhw.isfinite().all()
        model = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True) if case in ("vit", "swin", "svt", "maxvit") else None
        assert model is None or sum(p.numel() for p in model.parameters()) > 0


@pytest.mark.parametrize("case", ["vit", "swin", "swinv2", "maxvit", "poolformer", "svt", "mixer"])
def test_fine_tuning_takes_over_another_size_and_says_so(case):
    source = small(case, classes=0)
    name, size, overrides = SMALL[case]
    same = perturb_(create_backbone(name, 5, size, 3, **overrides), seed=9)
    assert transfer(source, same) == []
    with torch.no_grad():
        assert torch.equal(same.eval().forward_features(images(source)).map_BDhw, source.forward_features(images(source)).map_BDhw)
    if case != "mixer":
        other = create_backbone(name, 5, 2 * size, 1, **overrides)
        assert transfer(source, other) == [f"weights for {size}x{size} pixels fitted to {2 * size}x{2 * size}",
                                           "the stem for 3 channels fitted to 1"]  # fmt: skip


@pytest.mark.parametrize("name", ["poolformer_s12", "maxvit_tiny_tf_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
                                  "twins_svt_small", "resmlp_12_224"])  # fmt: skip
def test_what_is_exported_timm_opens_with_the_same_features(name, tmp_path):
    save_backbone(perturb_(create_backbone(name)), tmp_path / "backbone", mean=[0.5] * 3, std=[0.5] * 3)
    trained = load_backbone(tmp_path)
    snippet = _checked(trained, tmp_path / "backbone", tmp_path / "exported", "timm")
    assert f"local-dir:{tmp_path / 'exported'}" in snippet


def test_what_timm_cannot_build_is_said_in_one_line(tmp_path):
    save_backbone(small("poolformer"), tmp_path / "backbone", mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(CheckpointError, match=r"timm cannot build poolformer_s12 with other depths, dims .*; --to safetensors can"):
        _checked(load_backbone(tmp_path), tmp_path / "backbone", tmp_path / "exported", "timm")


@pytest.mark.parametrize("case", ["vit", "swin", "svt", "poolformer", "maxvit"])
def test_a_grey_backbone_moves_to_colour(case):
    ours = small(case, channels=1)
    colour = torch.randn(2, 3, *ours.image_size)
    with torch.no_grad():
        assert worst(resized(ours, in_channels=3)(colour), ours(colour.mean(1, keepdim=True))) < 1e-4


def test_another_family_is_refused_by_name():
    with pytest.raises(CheckpointError, match=r"swin_tiny_patch4_window7_224 was pretrained, here is vit_.*; set backbone\.name to swin"):
        transfer(small("swin", classes=0), small("vit"))


def test_weights_that_mean_something_else_are_refused():
    source = small("swin", classes=0)
    name, size, overrides = SMALL["swin"]
    with pytest.raises(CheckpointError, match=r"num_heads \[2, 4\] in the pretrained backbone, \[3, 4\] here; set .*num_heads to \[2, 4\]"):
        transfer(source, create_backbone(name, 5, size, **overrides | {"num_heads": [3, 4]}))
    with pytest.raises(CheckpointError, match=r"depths \[2, 2\] in the pretrained backbone, \[1, 2\] here; set .*depths to \[2, 2\]"):
        transfer(source, create_backbone(name, 5, size, **overrides | {"depths": (1, 2)}))
    with pytest.raises(CheckpointError, match=r"shifted True in the pretrained backbone, False here"):
        transfer(source, create_backbone(name, 5, size, **overrides | {"shifted": False}))
