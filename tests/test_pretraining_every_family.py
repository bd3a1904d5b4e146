"""BEiT's masked image modeling over every family, on real images, through the product's own entry."""

from pathlib import Path

import pytest
import torch
import yaml
from oracles import perturb_, worst
from photographs import photo_world
from tinyruns import losses, reset_accelerate, run_here, settings_words
from torch import nn

from mimetic.backbones.catalog import create_backbone
from mimetic.backbones.files import load_backbone
from mimetic.engine.config import parse
from mimetic.pretrain.beit import pretrain
from mimetic.pretrain.mim import TokenHead
from mimetic.pretrain.recipe import BeitRecipe

RECIPES = sorted(Path(__file__).parents[1].glob("launch/recipes/beit_*_in1k.yaml"))
THIN = {"embed_dim": 24, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}
# Name, pixels, overrides, hidden cells, unit of the mask.
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", 64, {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8}, 26, 1),
    "deit": ("deit_tiny_distilled_patch16_224", 64, {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8}, 26, 1),
    "beit": ("beit_base_patch16_224", 64, {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8, "init_values": 0.1}, 26, 1),
    "swin": ("swin_tiny_patch4_window7_224", 224, THIN, 116, 2),
    "swinv2": ("swinv2_tiny_window8_256", 128, THIN | {"window_size": 4}, 36, 2),
    "poolformer": ("poolformer_s12", 128, {"depths": [1, 1, 2, 1], "dims": [24, 32, 48, 64]}, 36, 2),
    "pcpvt": ("twins_pcpvt_small", 128, {"embed_dims": [16, 32, 48, 64], "num_heads": [1, 1, 1, 1], "depths": [1, 1, 2, 1]}, 36, 2),
    "svt": ("twins_svt_small", 128, {"embed_dims": [16, 32, 48, 64], "num_heads": [1, 1, 1, 1], "wss": [4, 4, 4, 4],
                                     "depths": [2, 2, 2, 2]}, 36, 2),
    "maxvit": ("maxvit_tiny_tf_224", 128, {"embed_dim": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "stem_width": 16}, 36, 2),
    "mixer": ("mixer_b16_224", 64, {"embed_dim": 64, "num_blocks": 2, "patch_size": 8}, 26, 1),
    "resmlp": ("resmlp_12_224", 64, {"embed_dim": 64, "num_blocks": 2, "patch_size": 8, "init_values": 0.1}, 26, 1),
    "gmlp": ("gmlp_s16_224", 64, {"embed_dim": 64, "num_blocks": 2, "patch_size": 8}, 26, 1),
    "timm's ConvNeXt": ("timm:test_convnext", 128, {}, 36, 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def land(tmp_path_factory) -> Path:
    return photo_world(tmp_path_factory.mktemp("photographs"))


def settings(land: Path, out: Path, **changes) -> list[str]:
    own = {"out": out, "data.index": land / "photos", "data.workers": 0, "tokenizer.path": land / "tokenizer"}
    return settings_words(own | {name.replace("__", "."): value for name, value in changes.items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_lower_the_loss_on_photographs(family, land, tmp_path):
    name, size, overrides, hidden, unit = FAMILIES[family]
    run = run_here("beit", settings(
        land, tmp_path / "run", backbone__name=name, backbone__image_size=size, backbone__overrides=overrides, mask__count=hidden,
        mask__unit=unit, mask__kind="random", train__steps=20, train__log_every=1, data__batch_size=16, optim__lr=3e-3,
        optim__warmup=0.1, views__crop_low=0.5,
    ))  # fmt: skip
    found = losses(run)
    assert len(found) == 20
    assert sum(found[-4:]) < 0.97 * sum(found[:4])
    backbone = load_backbone(run)
    assert backbone.config["name"] == name
    assert backbone.forward_features(torch.zeros(1, 3, size, size)).map_BDhw.isfinite().all()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_runs_for_two_steps(recipe, land, tmp_path):
    changes = settings(land, tmp_path / "run", data__batch_size=2, train__epochs="null", train__steps=2, train__log_every=1)
    reset_accelerate()
    pretrain(parse(BeitRecipe, example="", argv=["--config", str(recipe), *changes]))
    assert len(losses(tmp_path / "run")) == 2
    assert load_backbone(tmp_path / "run").config["name"] == yaml.safe_load(recipe.read_text())["backbone"]["name"]


def test_recipes_cover_every_family():
    names = " ".join(path.stem for path in RECIPES)
    for family in ("beit_base", "vit", "deit", "swin_tiny", "swin_base", "swinv2", "poolformer", "twins", "maxvit", "mixer"):
        assert family in names


@torch.no_grad()
def test_the_token_head_lays_cells_out_as_pixel_shuffle_does():
    """SimMIM's decoder: a 1x1 convolution to D * 4 channels, then PixelShuffle; ours orders those channels cell by cell."""
    head = perturb_(TokenHead(24, 7, 5, scale=2))
    map_BDhw, hidden_BPQ = torch.randn(3, 24, 2, 3), torch.zeros(3, 4, 6, dtype=torch.bool)
    for i, cells in enumerate(([0, 1, 5, 9, 23], [2, 3, 4, 7, 11], [6, 12, 13, 20, 22])):
        hidden_BPQ[i].view(-1)[cells] = True
    convolution = nn.Conv2d(24, 96, 1)
    weight, bias = head.expand.weight.view(2, 2, 24, 24), head.expand.bias.view(2, 2, 24)
    convolution.weight.copy_(weight.permute(2, 0, 1, 3).reshape(96, 24, 1, 1))
    convolution.bias.copy_(bias.permute(2, 0, 1).flatten())
    cells_BDPQ = nn.PixelShuffle(2)(convolution(map_BDhw))
    expected = head.linear(cells_BDPQ.permute(0, 2, 3, 1)[hidden_BPQ])
    assert worst(head(map_BDhw, hidden_BPQ), expected) < 1e-5


def test_a_backbone_that_only_classifies_in_its_head_leaves_that_alone():
    backbone = create_backbone("maxvit_tiny_tf_224", image_size=32, embed_dim=(32, 64), depths=(1, 1), stem_width=16)
    assert backbone.head_names() == {"head_hidden.weight", "head_hidden.bias"}
