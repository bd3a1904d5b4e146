"""`timm:NAME`: timm's own nets in our contract.

Legend: B batch, C channels, H W pixels, P Q mask grid.
"""

import sys

import pytest
import timm
import torch
from oracles import perturb_
from test_conformance import images, mask, over_pixels

from mimetic.backbones.catalog import create_backbone
from mimetic.backbones.files import load_backbone, save_backbone, transfer
from mimetic.engine.errors import SettingError
from mimetic.export.backbone import _checked

# Tokens with and without [CLS], maps with channels first and last, nets for one size and for all.
LIGHT = ["test_vit", "test_convnext", "test_resnet", "test_efficientnet", "test_byobnet", "test_mambaout"]
NAMES = [*LIGHT, "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "twins_svt_small", "maxvit_tiny_tf_224"]


def adapted(name: str, classes: int = 0, **changed):
    torch.manual_seed(0)
    return create_backbone(f"timm:{name}", classes, **changed).eval()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_it_is_timms_net(name):
    ours = adapted(name, 5)
    theirs = timm.create_model(name, **ours.timm_arguments()).eval()
    theirs.load_state_dict(ours.timm_state_dict(), strict=True)
    assert torch.equal(ours(images(ours, 1)), theirs(images(ours, 1)))
    features, x = ours.forward_features(images(ours, 1)), theirs.forward_features(images(ours, 1))
    assert features.map_BDhw.shape[-2:] == ours.feature_grid
    values = x[:, getattr(theirs, "num_prefix_tokens", 0) :] if x.dim() == 3 else x
    last = values.mT.unflatten(2, ours.feature_grid) if x.dim() == 3 else values
    if "swin" in name or "mamba" in name:
        last = values.permute(0, 3, 1, 2)
    assert torch.equal(features.map_BDhw, last)
    assert (features.cls_BD is None) == (getattr(theirs, "num_prefix_tokens", 0) == 0)
    assert (features.dist_BD is None) == ("distilled" not in name)


@pytest.mark.parametrize("junk", [torch.nan, 9.0])
@pytest.mark.parametrize("name", LIGHT)
def test_hidden_pixels_change_no_bit(name, junk):
    ours = adapted(name).train()
    image, hidden = images(ours), mask(ours)
    covered = over_pixels(hidden, ours).expand_as(image)
    spoilt = torch.where(covered, torch.tensor(junk), image).requires_grad_()
    torch.manual_seed(0)
    clean_map = ours.forward_features(image, hidden).map_BDhw
    ours.zero_grad()
    for part in ours.modules():  # running statistics moved with the first pass
        if isinstance(part, torch.nn.BatchNorm2d):
            part.reset_running_stats()
    torch.manual_seed(0)
    spoilt_map = ours.forward_features(spoilt, hidden).map_BDhw
    assert torch.equal(clean_map, spoilt_map)
    spoilt_map.square().sum().backward()
    assert ours.mask_token.grad.abs().sum() > 0
    assert not spoilt.grad[covered].any()
    assert spoilt.grad.isfinite().all()


@pytest.mark.parametrize("name", LIGHT)
def test_depths_and_heads_cover_the_parameters(name):
    ours = adapted(name, 5)
    depths = {parameter: ours.depth_of(parameter) for parameter, _ in ours.named_parameters()}
    assert set(depths.values()) <= set(range(ours.num_depths))
    assert depths["stand_in.mask_token"] == 0
    assert ours.head_names()
    ours.forward_features(images(ours), mask(ours)).map_BDhw.square().sum().backward()
    assert {n for n, p in ours.named_parameters() if p.grad is None} == ours.head_names()
    assert "stand_in.mask_token" in ours.no_weight_decay_names() <= depths.keys()


def test_it_is_saved_opened_and_moved_into_a_classifier(tmp_path):
    ours = perturb_(adapted("test_vit"))
    save_backbone(ours, tmp_path / "net", mean=[0.5] * 3, std=[0.5] * 3)
    again = load_backbone(tmp_path / "net")
    assert torch.equal(again.forward_features(images(ours), mask(ours)).map_BDhw, ours.forward_features(images(ours), mask(ours)).map_BDhw)
    target = adapted("test_vit", 5)
    assert transfer(ours, target) == []
    assert torch.equal(target.forward_features(images(ours)).map_BDhw, ours.forward_features(images(ours)).map_BDhw)


def test_the_folder_opens_in_timm(tmp_path):
    ours = adapted("test_convnext", 4)
    save_backbone(ours, tmp_path / "net", mean=[0.5] * 3, std=[0.5] * 3)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(theirs(images(ours)), ours(images(ours)))


def test_its_export_to_timm_is_checked(tmp_path):
    save_backbone(adapted("test_convnext"), tmp_path / "net", mean=[0.5] * 3, std=[0.5] * 3)
    assert "local-dir:" in _checked(load_backbone(tmp_path / "net"), tmp_path / "net", tmp_path / "exported", "timm")


def test_another_size_and_other_channels():
    ours = adapted("test_vit", image_size=96, in_channels=5)
    assert ours.image_size == (96, 96)
    assert ours.forward_features(torch.zeros(1, 5, 96, 96)).map_BDhw.shape[-2:] == ours.feature_grid == (6, 6)
    assert adapted("test_convnext", image_size=(64, 128)).mask_grid == (4, 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "timm:convnext_ato"}, r"timm knows no 'convnext_ato' \(did you mean convnext_atto\?\)"),
        ({"name": "timm:test_vit", "depths": 3}, r"timm:test_vit cannot be built with .*depths"),
        ({"name": "timm:test_vit", "image_size": 100}, r"images of 100x100|cannot be built"),
    ],
)
def test_what_cannot_be_adapted_is_named(arguments, words):
    with pytest.raises(SettingError, match=words) as caught:
        create_backbone(**arguments)
    assert "\n" not in str(caught.value)


def test_without_timm_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SettingError, match="timm:test_vit is a net of timm's, which is not installed; pip install timm"):
        create_backbone("timm:test_vit")
