"""SimMIM: its loss against transformers', its targets against SwinV2's, and runs of it over the families."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import perturb_, transformers_swin
from photographs import photo_world
from PIL import Image
from test_pretraining_every_family import FAMILIES, THIN
from tinyruns import (
    as_killed_at,
    classify_arguments,
    lines,
    losses,
    make_data,
    reset_accelerate,
    run_here,
    settings_words,
    simmim_arguments,
)
from torch import Tensor

from mimetic.backbones.catalog import create_backbone
from mimetic.backbones.files import load_backbone
from mimetic.data.masks import RandomMasks
from mimetic.data.views import UNALTERED, MaskedViews, Normalize, PretrainViews
from mimetic.engine.checkpoints import verify
from mimetic.engine.config import parse
from mimetic.engine.errors import SettingError
from mimetic.engine.run import Record, Run
from mimetic.pretrain import simmim
from mimetic.pretrain.pixel_recipes import SimmimRecipe, hidden_count
from mimetic.pretrain.pixels import SimMIM, local_statistics, map_stride, pixel_decoder, unit_grid

ROOT = Path(__file__).parents[1]
SWIN = {"patch_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
RGB = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_data(folder / "data")
    make_data(folder / "held-out", count=70, seed=1)
    return folder


@pytest.fixture(scope="module")
def land(tmp_path_factory) -> Path:
    return photo_world(tmp_path_factory.mktemp("photographs"))


def objective(name: str = "swin_tiny_patch4_window7_224", norm_target: int | None = None, **overrides) -> SimMIM:
    torch.manual_seed(0)
    backbone = perturb_(create_backbone(name, image_size=32, in_channels=3, **overrides or SWIN))
    decoder = perturb_(pixel_decoder(backbone.embed_dim, map_stride(backbone), 3), seed=3)
    return SimMIM(backbone, decoder, RGB, 10, norm_target).eval()


def batch(images: int = 3, seed: int = 0) -> dict[str, Tensor]:
    seeds_B = np.arange(images, dtype=np.uint64) + np.uint64(seed)
    pixels = torch.randint(256, (images, 3, 32, 32), generator=torch.Generator().manual_seed(seed)).byte()
    return {"image": pixels, "hidden": RandomMasks((4, 4), 10).sample(seeds_B), "valid": torch.ones(images).bool()}


def covered(hidden_BPQ: Tensor) -> Tensor:
    return torch.from_numpy(np.kron(hidden_BPQ.numpy(), np.ones((8, 8), bool)))[:, None]


# The loss


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_loss_and_gradients_equal_transformers(name):
    ours = objective(name, **SWIN | ({"pretrained_window_sizes": (0, 0)} if "v2" in name else {}))
    theirs = transformers_swin(ours.backbone)
    theirs.decoder.load_state_dict(ours.decoder.state_dict(), strict=True)
    given = batch()
    masked_BN = given["hidden"].repeat_interleave(4, 1).repeat_interleave(4, 2).flatten(1)
    wanted = theirs(RGB(given["image"]), bool_masked_pos=masked_BN).loss
    found = ours(given).loss
    assert abs(found - wanted) < 1e-5
    assert wanted > 0.5
    found.backward()
    wanted.backward()
    inner = theirs.swinv2 if "v2" in name else theirs.swin
    block = inner.encoder.layers[1].blocks[1]
    output = block.attention.output.dense if "v2" in name else block.attention.o_proj
    pairs = [
        (ours.decoder[0].weight, theirs.decoder[0].weight), (ours.decoder[0].bias, theirs.decoder[0].bias),
        (ours.backbone.stem.proj.weight, inner.embeddings.patch_embeddings.projection.weight),
        (ours.backbone.mask_token.flatten(), inner.embeddings.mask_token.flatten()),
        (ours.backbone.stages[1].blocks[1].attn.proj.weight, output.weight),
    ]  # fmt: skip
    grads = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert all(p.grad is not None for p in grads[0].values())
    for own, their in pairs[:3] + pairs[4:]:
        assert torch.allclose(own.grad, their.grad, rtol=1e-3, atol=1e-6)
        assert their.grad.abs().max() > 1e-4
    assert torch.allclose(ours.backbone.mask_token.grad.flatten(), inner.embeddings.mask_token.grad.flatten(), rtol=1e-3, atol=1e-6)


def test_targets_in_a_window_are_a_numpy_sliding_windows():
    image_BCHW = torch.randn(2, 3, 9, 13, generator=torch.Generator().manual_seed(0)).double() + 5
    mean_BCHW, deviation_BCHW = local_statistics(image_BCHW, 5)
    for y, x in ((0, 0), (4, 6), (8, 12), (1, 11)):
        inside = image_BCHW[..., max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].flatten(2).numpy()
        assert np.allclose(mean_BCHW[..., y, x], inside.mean(-1))
        assert np.allclose(deviation_BCHW[..., y, x], np.sqrt(inside.var(-1, ddof=1) + 1e-6))


def test_normalised_targets_make_the_loss_of_normalised_pixels():
    ours = objective(norm_target=7)
    given = batch()
    image_BCHW = RGB(given["image"])
    mean_BCHW, deviation_BCHW = local_statistics(image_BCHW, 7)
    painted_BCHW = ours.decoder(ours.backbone.forward_features(image_BCHW, given["hidden"]).map_BDhw)
    gap = (painted_BCHW - (image_BCHW - mean_BCHW) / deviation_BCHW).abs()[covered(given["hidden"]).expand(-1, 3, -1, -1)]
    assert abs(ours(given).loss - gap.mean()) < 1e-5
    assert abs(ours(given).loss - objective()(given).loss) > 0.01


@torch.no_grad()
def test_what_is_hidden_is_a_target_and_nothing_else():
    """Its pixels move the loss by no more than they are wrong themselves; visible ones are no targets."""
    ours = objective()
    given = batch()
    hidden_B1HW = covered(given["hidden"])
    image_BCHW = RGB(given["image"])
    junk_BCHW = torch.where(hidden_B1HW, torch.nan, image_BCHW)
    assert torch.equal(ours.paint(junk_BCHW, given["hidden"]), ours.paint(image_BCHW, given["hidden"]))
    painted_BCHW = ours.paint(image_BCHW, given["hidden"])
    by_hand = (painted_BCHW - image_BCHW).abs()[hidden_B1HW.expand(-1, 3, -1, -1)].mean()
    assert abs(ours(given).loss - by_hand) < 1e-5


@torch.no_grad()
def test_samples_that_are_not_valid_count_for_nothing():
    ours, given = objective(), batch(images=4)
    alone = ours({name: value[:3] for name, value in given.items()}).loss
    assert torch.allclose(alone, ours(given | {"valid": torch.tensor([True, True, True, False])}).loss, atol=1e-6)
    assert ours(given | {"valid": torch.zeros(4).bool()}).loss == 0


# Masks and views


@pytest.mark.parametrize(("size", "unit", "ratio", "count"), [(192, 32, 0.6, 22), (224, 32, 0.6, 30), (28, 4, 0.6, 30), (80, 8, 0.55, 55)])
def test_the_share_is_rounded_up_as_the_authors_do(size, unit, ratio, count):
    cells = (size // unit) ** 2
    assert hidden_count("simmim.ratio", ratio, cells) == count
    assert ratio == 0.55 or count == int(np.ceil(cells * ratio))  # in floating point 0.55 * 100 is more than 55
    masks = RandomMasks((size // unit,) * 2, count).sample(np.arange(50, dtype=np.uint64))
    assert (masks.flatten(1).sum(1) == count).all()


def test_the_masked_view_is_beits_first_one():
    pictures = [torch.randint(256, (3, 40, 50), generator=torch.Generator().manual_seed(i)).byte() for i in range(4)]
    seeds_B, masks = np.arange(4, dtype=np.uint64), RandomMasks((4, 4), 10)
    found, wanted = (views(pictures, seeds_B) for views in (MaskedViews(32, UNALTERED, masks), PretrainViews(32, 16, UNALTERED, masks)))
    assert found.keys() == {"image", "hidden"}
    assert all(torch.equal(found[name], wanted[name]) for name in found)


# Runs


@pytest.mark.parametrize("family", ["vit", "swinv2", "timm's ConvNeXt"])
def test_twenty_steps_lower_the_loss_on_photographs(family, land, tmp_path):
    name, size, overrides, *_ = FAMILIES[family]
    run = run_here("simmim", settings_words({
        "out": tmp_path / "run", "data.index": land / "photos", "data.workers": 0, "backbone.name": name, "backbone.image_size": size,
        "backbone.overrides": overrides, "train.steps": 20, "train.log_every": 1, "data.batch_size": 8, "optim.lr": 3e-3,
        "optim.warmup": 0.1, "simmim.unit": 32,
    }))  # fmt: skip
    found = losses(run)
    assert len(found) == 20
    assert sum(found[-4:]) < 0.95 * sum(found[:4])
    assert load_backbone(run).config["name"] == name


def test_a_run_goes_on_to_the_same_bits(world, tmp_path):
    settings = {"train__steps": 6, "train__checkpoint_every": 2, "train__log_every": 1, "train__keep": 3}
    whole = run_here("simmim", simmim_arguments(world, tmp_path / "whole", **settings))
    run = as_killed_at(2, whole, tmp_path / "run")
    run_here("simmim", simmim_arguments(world, run, **settings))
    for name in ("checkpoints/last/model.safetensors", "checkpoints/last/optimizer.safetensors", "backbone/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert losses(run) == losses(whole)


def test_what_it_learned_is_fine_tuned(world, tmp_path):
    run = run_here("simmim", simmim_arguments(world, tmp_path / "run", train__steps=2, overrides={"global_pool": "avg"}))
    still = {"train__steps": 1, "optim__lr": 1e-30, "optim__warmup_lr": 0, "optim__min_lr": 0, "overrides": {"global_pool": "avg"}}
    tuned = run_here("classify", classify_arguments(world, tmp_path / "tuned", init__path=run, **still))
    own, moved = (load_backbone(folder).state_dict() for folder in (run, tuned))
    body = [name for name in own if not name.startswith("head") and "mask_token" not in name]
    assert len(body) > 20
    assert all(torch.allclose(own[name], moved[name], atol=1e-6) for name in body)


def test_the_lowest_loss_on_held_out_images_is_the_best(world, tmp_path):
    run = run_here("simmim", simmim_arguments(
        world, tmp_path / "run", evaluate_on=world / "held-out", train__evaluate_every=4, train__steps=12, train__keep=1, optim__lr=0.02,
        optim__warmup=0,
    ))  # fmt: skip
    records = lines(run, "records.jsonl")
    assert [(record["metric"], record["count"]) for record in records] == [("masked_loss", 70)] * 3
    best = min(records, key=lambda record: (record["value"], -record["step"]))
    assert verify(run / "checkpoints/best")["step"] == best["step"] > records[0]["step"]
    assert records[0]["details"] == {"hidden": 8}


def test_lowest_and_highest_are_opposites(world, tmp_path):
    invocation = parse(SimmimRecipe, example="", argv=simmim_arguments(world, tmp_path))
    (tmp_path / "records.jsonl").write_text("".join(json.dumps({"metric": "m", "value": value}) + "\n" for value in (2.0, 3.0)))
    run = Run(invocation, "pretrain")
    values = (1.0, 2.0, 2.5, 3.0, 3.5, math.nan)
    assert [value for value in values if run.is_best("m", [Record("m", value)], lowest=True)] == [1.0, 2.0]
    assert [value for value in values if run.is_best("m", [Record("m", value)])] == [3.0, 3.5]


def test_pictures_show_image_hidden_squares_and_what_is_painted(world, tmp_path):
    run = run_here("simmim", simmim_arguments(world, tmp_path / "run", train__steps=2, simmim__norm_target=5))
    picture = np.array(Image.open(sorted((run / "samples").glob("*.png"))[-1])).astype(int)
    factor = 112 // 16
    rows = np.split(picture, 3)
    image, seen, painted = (row[2:-2, 2 : 2 + 16 * factor, 0] for row in rows)
    hidden = seen == 128
    assert 0.5 <= hidden.mean() < 0.6
    assert (seen[~hidden] == image[~hidden]).all()
    assert (painted[~hidden] == image[~hidden]).all()
    assert (painted[hidden] != image[hidden]).mean() > 0.5


def test_the_published_recipe_runs_for_two_steps_with_a_thin_net(land, tmp_path):
    changes = {"out": tmp_path / "run", "data.index": land / "photos", "data.workers": 0, "data.batch_size": 2, "train.epochs": "null",
               "train.steps": 2, "train.log_every": 1, "backbone.overrides": THIN | {"window_size": 6}}  # fmt: skip
    reset_accelerate()
    recipe = ["--config", str(ROOT / "launch/recipes/simmim_swin_base_in1k.yaml")]
    simmim.pretrain(parse(SimmimRecipe, example="", argv=[*recipe, *settings_words(changes)]))
    assert len(losses(tmp_path / "run")) == 2
    assert np.isfinite(losses(tmp_path / "run")).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"simmim__unit": 6}, r"simmim\.unit is 6 pixels; squares of whole cells \(4x4 pixels\) that tile the 16x16 image have 4 or 8"),
        ({"simmim__unit": 16}, r"simmim\.unit is 16 pixels; .* have 4 or 8"),
        ({"simmim__ratio": 0}, r"simmim\.ratio is 0.*; it must be in \(0, 1\)"),
        ({"simmim__ratio": 1}, r"simmim\.ratio is 1.*; it must be in \(0, 1\)"),
        ({"simmim__ratio": 0.95}, r"simmim\.ratio is 0\.95, which hides all 16 cells of an image; at most 0\.937 leaves one to see"),
        ({"simmim__norm_target": 8}, r"simmim\.norm_target is 8; a window has a middle, so it must be odd, and 3 or more"),
        ({"overrides": {"patch_size": [4, 8]}, "simmim__unit": 8}, r"backbone\.overrides\.patch_size must be square here"),
    ],
)
def test_settings_that_cannot_be_are_one_line(changes, message, world, tmp_path):
    with pytest.raises(SettingError, match=message) as refused:
        run_here("simmim", simmim_arguments(world, tmp_path / "run", **changes))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_units_of_a_staged_net_are_whole_cells_of_its_stem():
    backbone = create_backbone("swin_tiny_patch4_window7_224", image_size=192, **THIN | {"window_size": 6})
    assert unit_grid(backbone, 32) == (6, 6)
    with pytest.raises(SettingError, match=r"have 4 or 8 or 12 or 16"):
        unit_grid(backbone, 6)
