"""The training engine: losses against other people's, optimizer groups, the loop's arithmetic, kills and damage.

Legend: B batch, C channels, H W pixels, P Q token grid, D width, V codebook, M hidden cells of the batch, N classes.
"""

import contextlib
import io
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from oracles import masked_beit, perturb_, transformers_weights, worst
from safetensors.torch import load_file
from tinyruns import (
    TINY,
    beit_arguments,
    classify_arguments,
    dvae_arguments,
    finish,
    flip_byte,
    golden,
    lines,
    losses,
    make_tokenizer,
    members,
    run_here,
    start,
    wait_until,
)
from torch import Tensor, nn

from mimetic.backbones.catalog import create_backbone
from mimetic.backbones.files import load_backbone, transfer
from mimetic.data.views import Normalize
from mimetic.engine.checkpoints import Keeper, newest, verify
from mimetic.engine.config import OptimSettings
from mimetic.engine.errors import CheckpointError, SettingError
from mimetic.engine.optim import adamw, learning_rate, parameter_groups, set_rates
from mimetic.engine.run import _lock
from mimetic.export.backbone import export_backbone
from mimetic.finetune.objectives import Distill, Mixing, Supervised, _Between
from mimetic.pretrain.mim import MaskedImageModeling, TokenHead, check_grids, gather_hidden
from mimetic.tokenizers.dvae import DVAE

CPU = torch.device("cpu")
GREY = Normalize((0.4,), (0.3,))
RGB = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def some(*shape: int, seed: int = 0, high: int = 256) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return some(*shape, seed=seed).byte()


# Masked image modeling


def mim(name: str = "vit_tiny_patch16_224", channels: int = 1, side: int = 16, count: int = 6, **overrides) -> MaskedImageModeling:
    torch.manual_seed(0)
    backbone = perturb_(create_backbone(name, image_size=side, in_channels=channels, **TINY | {"global_pool": "token"} | overrides))
    tokenizer = DVAE(50, 4, channels, width=16, code_width=8)
    tokenizer.seed_codebook(pixels(40, channels, side, side, seed=5) / 255)
    head = perturb_(TokenHead(backbone.embed_dim, 50, count), seed=3)
    normalize = GREY if channels == 1 else RGB
    return MaskedImageModeling(backbone, tokenizer, head, normalize, CPU).eval()


def mim_batch(objective: MaskedImageModeling, images: int = 3) -> dict[str, Tensor]:
    backbone, count = objective.backbone, objective.head.count
    shape = (images, backbone.in_channels, *backbone.image_size)
    cells = torch.rand(images, math.prod(backbone.mask_grid), generator=torch.Generator().manual_seed(1))
    hidden_BPQ = (cells.argsort(1).argsort(1) < count).view(images, *backbone.mask_grid)
    return {"image": pixels(*shape, seed=2), "target": pixels(*shape, seed=3), "hidden": hidden_BPQ, "valid": torch.ones(images).bool()}


@torch.no_grad()
def test_mim_loss_equals_transformers():
    objective = mim("beit_base_patch16_224", channels=3, side=20, embed_dim=48, depth=3, num_heads=3)
    theirs = masked_beit(50, shared=False).eval()
    theirs.load_state_dict(transformers_weights(objective.backbone, objective.head.linear), strict=True)
    batch = mim_batch(objective)
    labels_M = objective.tokenizer.encode(batch["target"].float() / 255)[batch["hidden"]]
    wanted = theirs(objective.normalize(batch["image"]), bool_masked_pos=batch["hidden"].flatten(1), labels=labels_M).loss
    loss, metrics, counts = objective(batch)
    assert abs(loss - wanted) < 1e-5
    assert wanted > 1
    assert len(labels_M.unique()) > 10, "the labels must differ for the loss to prove anything"
    assert 0 <= metrics["masked_accuracy"] <= 1
    assert counts["predicted_codes"].sum() == len(labels_M)


@torch.no_grad()
def test_samples_that_are_not_valid_count_for_nothing():
    objective = mim()
    batch = mim_batch(objective, images=4)
    alone = objective({name: value[:3] for name, value in batch.items()})
    padded = objective(batch | {"valid": torch.tensor([True, True, True, False])})
    assert torch.allclose(alone.loss, padded.loss, atol=1e-6)
    assert torch.allclose(alone.metrics["masked_accuracy"], padded.metrics["masked_accuracy"])
    assert objective(batch | {"valid": torch.zeros(4).bool()}).loss == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_hidden_pixels_change_no_bit_of_the_loss(name):
    objective = mim(name)
    batch = mim_batch(objective)
    covered = batch["hidden"].repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    before = objective(batch)
    for junk in (pixels(3, 1, 16, 16, seed=9), 255 - batch["image"], torch.full((3, 1, 16, 16), 255).byte()):
        assert torch.equal(objective(batch | {"image": torch.where(covered, junk, batch["image"])}).loss, before.loss)
    visible = torch.where(covered, batch["image"], 255 - batch["image"])
    assert not torch.equal(objective(batch | {"image": visible}).loss, before.loss)


def test_gather_hidden_is_boolean_indexing():
    values_BND = torch.randn(5, 16, 3, generator=torch.Generator().manual_seed(0))
    hidden_BPQ = (torch.rand(5, 16, generator=torch.Generator().manual_seed(1)).argsort(1).argsort(1) < 7).view(5, 4, 4)
    assert torch.equal(gather_hidden(values_BND, hidden_BPQ, 7), values_BND[hidden_BPQ.flatten(1)])


def test_the_tokenizer_is_neither_saved_nor_trained():
    objective = mim()
    assert not [name for name in objective.state_dict() if "tokenizer" in name]
    assert {id(p) for p in objective.tokenizer.parameters()}.isdisjoint(id(p) for p in objective.parameters())
    before = {name: value.clone() for name, value in objective.tokenizer.state_dict().items()}
    objective.train()
    objective(mim_batch(objective)).loss.backward()
    assert not objective.tokenizer.training
    assert all(p.grad is None for p in objective.tokenizer.parameters())
    assert all(p.grad is not None for name, p in objective.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in objective.tokenizer.state_dict().items())


def test_a_token_grid_unlike_the_patch_grid_is_refused_with_both():
    objective = mim()
    told = r"token grid is 8x8; .* feature grid 4x4 and divide its stem's grid 4x4; set views\.target_size to 4 x .* 4 = 16"
    with pytest.raises(SettingError, match=told):
        check_grids(objective.backbone, (8, 8), 4)
    assert check_grids(objective.backbone, (4, 4), 4) == 1


# Classification


def classifier(name: str = "vit_tiny_patch16_224", **overrides) -> nn.Module:
    return perturb_(create_backbone(name, 5, 16, 1, **TINY | overrides)).eval()


def label_batch() -> dict[str, Tensor]:
    return {"image": pixels(6, 1, 16, 16, seed=2), "label": some(6, seed=3, high=5), "valid": torch.ones(6).bool()}


@torch.no_grad()
def test_supervised_loss_equals_torchs_smoothed_cross_entropy():
    model, batch = classifier(), label_batch()
    loss, metrics, _ = Supervised(model, GREY, Mixing(5, 0.0, 0.0, 0), 0.1)(batch)
    logits_BN = model((batch["image"] / 255 - 0.4) / 0.3)
    assert abs(loss - nn.CrossEntropyLoss(label_smoothing=0.1)(logits_BN, batch["label"])) < 1e-6
    assert metrics["train_accuracy"] == (logits_BN.argmax(1) == batch["label"]).float().mean()


@torch.no_grad()
def test_distillation_loss_is_deits():
    """`DistillationLoss` of facebookresearch/deit, losses.py, with distillation_type="hard" and alpha 0.5."""
    student, teacher, batch = classifier("deit_tiny_distilled_patch16_224"), perturb_(classifier(), seed=8), label_batch()
    theirs = Normalize((0.1,), (0.6,))
    distill = Distill(student, GREY, Mixing(5, 0.0, 0.0, 0), 0.1, teacher, theirs, CPU)
    class_BN, dist_BN = student.forward_heads(GREY(batch["image"]))
    base_loss = nn.CrossEntropyLoss(label_smoothing=0.1)(class_BN, batch["label"])
    distillation_loss = F.cross_entropy(dist_BN, teacher(theirs(batch["image"])).argmax(dim=1))
    wanted = base_loss * (1 - 0.5) + distillation_loss * 0.5
    assert abs(distill(batch).loss - wanted) < 1e-5
    assert not [name for name in distill.state_dict() if "teacher" in name]
    assert {id(p) for p in teacher.parameters()}.isdisjoint(id(p) for p in distill.parameters())


def test_distillation_needs_a_distillation_token():
    with pytest.raises(SettingError, match="distillation token, such as deit_tiny_distilled_patch16_224"):
        Distill(classifier(), GREY, Mixing(5, 0.0, 0.0, 0), 0.1, classifier(), GREY, CPU)


def test_a_teacher_sees_its_own_normalization():
    image_BCHW, other = pixels(4, 3, 8, 8), Normalize((0.5, 0.3, 0.1), (0.5, 0.25, 1.0))
    assert worst(_Between(RGB, other)(RGB(image_BCHW)), other(image_BCHW)) < 1e-5


def test_mixing_is_drawn_from_seed_and_step_alone():
    image_BCHW, label_B = torch.rand(6, 1, 8, 8), some(6, high=5)
    torch.manual_seed(4)
    wanted_next = torch.rand(3)
    draws = {}
    for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
        torch.manual_seed(4)
        mixed, target_BN = Mixing(5, 0.8, 1.0, seed)(image_BCHW, label_B, step)
        assert torch.equal(torch.rand(3), wanted_next), "the global generator must stand where it stood"
        assert torch.allclose(target_BN.sum(1), torch.ones(6))
        if (seed, step) in draws:
            assert torch.equal(mixed, draws[seed, step])
        draws[seed, step] = mixed
    assert len({tuple(mixed.flatten().tolist()) for mixed in draws.values()}) == 3


def test_mixup_mixes_images_as_it_mixes_labels():
    image_BCHW, label_B = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    mixed_BCHW, target_BN = Mixing(5, 0.8, 0.0, 3)(image_BCHW, label_B, 7)
    share = target_BN[2, 2].item()  # 1710.09412: one lambda for the batch, images and labels alike
    assert 0 < share < 1
    assert torch.allclose(mixed_BCHW, share * image_BCHW + (1 - share) * image_BCHW.roll(1, 0), atol=1e-6)
    one_hot_BN = torch.eye(5)[label_B]
    assert torch.allclose(target_BN, share * one_hot_BN + (1 - share) * one_hot_BN.roll(1, 0), atol=1e-6)


# Optimizer


@pytest.mark.parametrize("overrides", [{}, {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True}])
def test_groups_decay_matrices_alone_and_scale_by_depth(overrides):
    objective = mim("beit_base_patch16_224", **overrides)
    settings = OptimSettings(lr=0.1, weight_decay=0.05, layer_decay=0.5)
    groups = parameter_groups(objective, settings)
    placed = {id(p): group for group in groups for p in group["params"]}
    names = dict(objective.named_parameters())
    assert sorted(placed) == sorted(id(p) for p in names.values())
    assert sum(len(group["params"]) for group in groups) == len(names), "each exactly once"
    for name, parameter in names.items():
        group = placed[id(parameter)]
        matrix = name.endswith("weight") and parameter.ndim > 1
        assert group["weight_decay"] == (0.05 if matrix else 0.0), name
        # BEiT's code: get_num_layer_for_vit counts embeddings 0, block i as i + 1, the rest depth + 1
        layer = int(name.split(".")[2]) + 1 if ".blocks." in name else 0 if "patch_embed" in name or "backbone.rel_pos" in name else 3
        assert group["lr_scale"] == 0.5 ** (3 - layer), name
        assert group["lr"] == pytest.approx(0.1 * 0.5 ** (3 - layer))


def test_frozen_parameters_are_not_optimized():
    model = classifier()
    model.mask_token.requires_grad_(False)
    groups = parameter_groups(Supervised(model, GREY, Mixing(5, 0.0, 0.0, 0), 0.0), OptimSettings(lr=0.1))
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for name, p in model.named_parameters() if "mask_token" not in name}


def test_learning_rate_over_the_training():
    settings = OptimSettings(lr=1.0, min_lr=0.1, warmup_lr=0.01, warmup=0.2)
    wanted = {0: 0.01, 0.1: (0.01 + 1) / 2, 0.2: 1.0, 0.6: (1 + 0.1) / 2, 1: 0.1}
    for progress, rate in wanted.items():
        assert learning_rate(settings, progress) == pytest.approx(rate), progress
    assert learning_rate(OptimSettings(lr=1.0, warmup=0.0), 0) == 1.0
    optimizer = adamw(mim(), OptimSettings(lr=1.0, layer_decay=0.5))
    set_rates(optimizer, 0.3, 0.0)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.3 * 0.5**i for i in (3, 2, 1, 0)])


# The loop


@pytest.fixture(scope="module")
def pretrained(world, tmp_path_factory) -> Path:
    """The golden run, with held-out accuracy."""
    return run_here("beit", beit_arguments(world, tmp_path_factory.mktemp("runs") / "golden", evaluate_on=world / "held-out"))


def test_the_first_20_losses_are_golden(pretrained):
    assert losses(pretrained) == pytest.approx(golden(), abs=1e-3)


def test_what_a_run_leaves_behind(pretrained):
    names = {path.name for path in pretrained.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "records.jsonl", "tensorboard", "samples", "checkpoints", "backbone"} <= names
    assert [line["step"] for line in lines(pretrained) if "loss" in line] == list(range(1, 21))
    assert sorted(path.name for path in (pretrained / "checkpoints").iterdir()) == ["best", "last", "step-00000018", "step-00000020"]
    assert (pretrained / "checkpoints/last").resolve().name == "step-00000020"
    records = lines(pretrained, "records.jsonl")
    assert {(record["step"], record["samples"], record["count"], record["kind"]) for record in records} == {(20, 320, 70, "pretrain")}
    saved = load_file(pretrained / "checkpoints/last/model.safetensors")
    assert torch.equal(saved["backbone.blocks.1.mlp.fc2.weight"], load_backbone(pretrained).blocks[1].mlp.fc2.weight)
    rates = [line["learning_rate"] for line in lines(pretrained) if "loss" in line]
    assert rates == pytest.approx([learning_rate(OptimSettings(lr=2e-3), step / 20) for step in range(20)])


def test_accumulated_micro_batches_equal_one_batch(world, tmp_path):
    whole = run_here("beit", beit_arguments(world, tmp_path / "whole", train__steps=12))
    halves = run_here("beit", beit_arguments(world, tmp_path / "halves", train__steps=12, train__accumulate=2, data__batch_size=8))
    assert losses(halves) == pytest.approx(losses(whole), abs=1e-5)
    ours, theirs = (load_file(run / "backbone/model.safetensors") for run in (halves, whole))
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-4


def test_an_evaluation_counts_every_image_once(world, tmp_path):
    """70 and 200 images in batches of 256, 70 in three classes' draws, and tokens of all of them."""
    run = run_here("classify", classify_arguments(world, tmp_path / "classify", evaluation__labels__per_class=5, train__evaluate_every=4))
    assert [(line["step"], line["count"]) for line in lines(run, "records.jsonl")] == [(4, 20), (8, 20)]
    run = run_here("dvae", dvae_arguments(world, tmp_path / "dvae"))
    records = {line["metric"]: line for line in lines(run, "records.jsonl")}
    assert {record["count"] for record in records.values()} == {70}
    assert sum(records["codes_used"]["details"]["counts"]) == 70 * 16


# Kills and damage

LONG = {"train__steps": 60, "train__checkpoint_every": 5, "train__log_every": 1, "overrides": {"drop_path_rate": 0.3}}


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory) -> Path:
    return run_here("beit", beit_arguments(world, tmp_path_factory.mktemp("runs") / "uninterrupted", **LONG))


@pytest.fixture(scope="module")
def killed(world, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run that SIGKILL met at a random moment after its first checkpoint, as it lay then, and its command."""
    out = tmp_path_factory.mktemp("runs") / "killed"
    command = [sys.executable, "pretrain/beit.py", *beit_arguments(world, out, data__workers=1, **LONG)]
    seed = time.time_ns()
    dice = random.Random(seed)
    step, moment = dice.randint(11, 45), dice.uniform(0, 0.02)
    process = start(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(losses(out)) >= step or process.poll() is not None, step=0.002)
    time.sleep(moment)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    print(f"seed {seed}: killed {moment * 1e3:.1f} ms after step {step} was logged; {len(losses(out))} losses are on the disk")
    _lock(out).close()  # the folder is free, though the killed run's worker may live on a while
    wait_until(lambda: not members(process), 30)
    return out, command


def test_a_killed_run_goes_on_to_the_same_bits(killed, uninterrupted, tmp_path):
    out, command = killed
    untouched = shutil.copytree(out, tmp_path / "killed", symlinks=True)
    step = newest(out / "checkpoints")[1]["step"]
    assert step % (200 // 16), "the interruption must lie within an epoch"
    done = finish(start(*command))
    assert done.returncode == 0, done.stderr
    assert f"going on after step {step}" in done.stdout
    same_end(out, uninterrupted)

    # What a kill in the middle of a save, and a bad disk, leave behind.
    checkpoints = untouched / "checkpoints"
    half = checkpoints / f".step-{step + 5:08d}"
    half.mkdir(exist_ok=True)
    (half / "model.safetensors").write_bytes(b"half")
    flip_byte(checkpoints / f"step-{step:08d}" / "optimizer.safetensors")
    command[command.index("--out") + 1] = str(untouched)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run_here("beit", command[2:])
    assert said.getvalue().count("passing over a damaged checkpoint: ") == 1
    assert f"step-{step:08d}/optimizer.safetensors is missing or differs from what was written" in said.getvalue()
    assert f"going on after step {step - 5}\n" in said.getvalue()
    same_end(untouched, uninterrupted)


def test_a_checkpoint_just_written_is_never_dropped_for_a_later_one_that_is_damaged(tmp_path):
    (tmp_path / "step-00000050").mkdir()
    keeper = Keeper(tmp_path, keep=2)
    for step in (44, 45, 46):
        keeper.save(step, {"model.safetensors": {"weight": torch.ones(3)}}, {"step": step})
        keeper.wait()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000045", "step-00000046", "step-00000050"]
    assert newest(tmp_path, tell=False)[0].name == (tmp_path / "last").readlink().name == "step-00000046"
    assert verify(tmp_path / "last") == {"step": 46}


def same_end(run: Path, other: Path) -> None:
    """The same weights to the last bit, and each step logged once."""
    ours, theirs = (load_file(folder / "checkpoints/step-00000060/model.safetensors") for folder in (run, other))
    assert len(ours) > 20
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [line["step"] for line in lines(run)] == list(range(1, 61))
    assert losses(run) == losses(other)
    assert not list((run / "checkpoints").glob(".step*"))


# From pretraining to classifiers, and out of the house


def built(name: str = "vit_tiny_patch16_224", classes: int = 0, seed: int = 0, **overrides) -> nn.Module:
    return perturb_(create_backbone(name, classes, 16, 1, **TINY | overrides), seed=seed)


def test_a_pretrained_body_moves_into_a_classifier():
    source, target = built(), built(classes=5, seed=1)
    head = target.head.weight.clone()
    transfer(source, target)
    image_BCHW = torch.randn(2, 1, 16, 16)
    assert torch.equal(source.eval().forward_features(image_BCHW).cls_BD, target.eval().forward_features(image_BCHW).cls_BD)
    assert torch.equal(target.head.weight, head), "the classifier is the target's own"


def test_a_pretrained_body_moves_beside_a_distillation_token():
    source, target = built(), built("deit_tiny_distilled_patch16_224", classes=5, seed=1)
    fresh = {name: target.state_dict()[name].clone() for name in ("patch_embed.dist_token", "head.weight", "head_dist.weight")}
    position_D = target.patch_embed.pos_embed[0, 1].clone()
    transfer(source, target)
    assert torch.equal(target.patch_embed.pos_embed[0, [0, *range(2, 18)]], source.patch_embed.pos_embed[0])
    assert torch.equal(target.patch_embed.pos_embed[0, 1], position_D)
    assert all(torch.equal(target.state_dict()[name], value) for name, value in fresh.items())
    assert torch.equal(target.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_a_shared_bias_table_becomes_one_in_each_block():
    pooled = {"global_pool": "token"}
    source = built("beit_base_patch16_224", use_shared_rel_pos_bias=True, **pooled)
    target = built("beit_base_patch16_224", classes=5, seed=1, **pooled)
    transfer(source, target)
    image_BCHW = torch.randn(2, 1, 16, 16)
    found, wanted = (net.eval().forward_features(image_BCHW).map_BDhw for net in (target, source))
    assert worst(found, wanted) < 1e-5
    tables = [block.attn.rel_pos_bias.relative_position_bias_table for block in target.blocks]
    assert tables[0] is not tables[1]
    assert all(torch.equal(table, source.rel_pos_bias.relative_position_bias_table) for table in tables)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({}, {"depth": 3}, r"depth 2 in the pretrained backbone, 3 here; set backbone\.overrides\.depth to 2"),
        ({"depth": 3}, {}, r"depth 3 in the pretrained backbone, 2 here; set backbone\.overrides\.depth to 3"),
        ({}, {"embed_dim": 48}, r"\(1, 1, 32\) in the pretrained backbone, \(1, 1, 48\) here; give backbone\.overrides"),
        ({"init_values": 0.1}, {}, r"gamma_1: \(32,\) in the pretrained backbone, nothing here"),
        ({}, {"init_values": 0.1}, r"gamma_1: nothing in the pretrained backbone, \(32,\) here"),
    ],
)
def test_a_body_of_another_shape_is_refused_with_both(source, target, message):
    target = built(classes=5, seed=1, **target)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        transfer(built(**source), target)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


BEIT = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "global_pool": "token", "init_values": 0.1}


@pytest.fixture(scope="module")
def beit_run(world, tmp_path_factory) -> Path:
    """Pretrained with one bias table for all blocks, as BEiT is."""
    out = tmp_path_factory.mktemp("runs") / "beit"
    return run_here("beit", beit_arguments(world, out, train__steps=4, backbone__name="beit_base_patch16_224", overrides=BEIT))


def checkpointed(run: Path, prefix: str, **arguments) -> nn.Module:
    """The backbone as the last checkpoint has it, built without what the run exported."""
    name = arguments.pop("name", "vit_tiny_patch16_224")
    model = create_backbone(name, image_size=16, in_channels=1, **TINY | arguments)
    weights = load_file(run / "checkpoints/last/model.safetensors")
    model.load_state_dict({name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)})
    return model.eval()


def exported(run: Path, out: Path, to: str = "timm") -> str:
    """Exports, and runs the lines that were printed; returns them."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        export_backbone(run, out, to)
    snippet = said.getvalue().partition("open it with:\n\n")[2]
    exec(snippet, names := {})
    assert names["features"].isfinite().all()
    return snippet


@torch.no_grad()
def check_export(run: Path, out: Path, trained: nn.Module) -> None:
    assert "timm.create_model" in exported(run, out)
    theirs, image_BCHW = timm.create_model(f"local-dir:{out}", pretrained=True).eval(), torch.randn(3, 1, 16, 16)
    assert worst(theirs(image_BCHW), trained(image_BCHW)) < 1e-4
    assert worst(load_backbone(out)(image_BCHW), trained(image_BCHW)) < 1e-4


def test_a_pretrained_run_is_exported_to_timm_and_safetensors(pretrained, tmp_path):
    trained = checkpointed(pretrained, "backbone.")
    check_export(pretrained, tmp_path / "timm", trained)
    assert "mimetic.load_backbone" in exported(pretrained, tmp_path / "plain", "safetensors")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "timm" / name).read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(SettingError, match="mine exists and is no exported backbone; give a new folder"):
        export_backbone(pretrained, tmp_path / "mine", "safetensors")
    with pytest.raises(CheckpointError, match=r"nowhere: no backbone there .* give a finished run or an exported folder"):
        export_backbone(tmp_path / "nowhere", tmp_path / "out", "safetensors")
    assert not (tmp_path / "out").exists()


def test_settings_that_differ_are_admitted_one_by_one_and_some_never(world, tmp_path):
    first = {"train__steps": 6, "train__checkpoint_every": 3}
    run_here("beit", beit_arguments(world, tmp_path / "run", **first))
    changed = beit_arguments(world, tmp_path / "run", **first | {"train__steps": 9, "optim__lr": 1e-3})
    with pytest.raises(CheckpointError) as told:
        run_here("beit", changed)
    assert "train.steps 6 there, 9 here; optim.lr 0.002 there, 0.001 here" in str(told.value)
    assert str(told.value).endswith("or --allow train.steps --allow optim.lr")
    with pytest.raises(CheckpointError, match=r"\(optim\.lr 0\.002 there, 0\.001 here\)"):
        run_here("beit", [*changed, "--allow", "train.steps"])
    assert (tmp_path / "run/finished.json").exists()
    run_here("beit", [*changed, "--allow", "train.steps", "--allow", "optim.lr"])
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 10))
    assert lines(tmp_path / "run", "events.jsonl")[-1]["kind"] == "finished"
    for name, value in {"seed": 1, "backbone__overrides__depth": 1, "data__shuffle_block": 16}.items():
        words = beit_arguments(world, tmp_path / "run", **first | {name: value})
        with pytest.raises(CheckpointError, match=r"use those, or another --out$"):
            run_here("beit", [*words, "--allow", name.replace("__", "."), "--allow", "train.steps", "--allow", "optim.lr"])
    with pytest.raises(CheckpointError, match=r"has done 9 steps, train\.steps is 4; raise it"):
        run_here("beit", [*beit_arguments(world, tmp_path / "run", train__steps=4), "--allow", "train.steps", "--allow", "optim.lr"])
    with pytest.raises(SettingError, match=r"--allow optim\.lrr: no such setting \(did you mean optim\.lr\?\)"):
        run_here("beit", [*changed, "--allow", "optim.lrr"])


def test_work_and_memory_of_an_image_do_not_depend_on_the_batch(world, tmp_path, capsys):
    """A batch of one image has no second one to tell what is constant."""
    told = []
    for size in (1, 2, 16):
        run_here("beit", [*beit_arguments(world, tmp_path / "run", data__batch_size=size), "--dry-run"])
        told.append(re.search(r"work: (\S+) MMAC an image", capsys.readouterr().out)[1])
    assert len(set(told)) == 1
    assert float(told[0]) > 1


def test_a_setting_that_is_allowed_and_changes_shapes_is_refused_with_both(world, tmp_path):
    run_here("beit", beit_arguments(world, tmp_path / "run", train__steps=2))
    other = make_tokenizer(tmp_path / "tokenizer", world / "data", codes=8)
    words = beit_arguments(world, tmp_path / "run", train__steps=2, tokenizer__path=other)
    with pytest.raises(CheckpointError, match=r"has head\.linear\.bias of shape \(16,\), this run \(8,\); use another --out"):
        run_here("beit", [*words, "--allow", "tokenizer.path"])


def test_a_run_that_is_resumed_from_an_older_checkpoint_leaves_the_other_branch(world, tmp_path):
    arguments = beit_arguments(world, tmp_path / "run", train__checkpoint_every=5, train__keep=4)
    run_here("beit", arguments)
    run_here("beit", [*arguments, "--resume", str(tmp_path / "run/checkpoints/step-00000005")])
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 21))
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*")) == [f"step-{step:08d}" for step in (5, 10, 15, 20)]


def test_the_mean_of_the_weights_is_saved_and_can_be_given_up(world, tmp_path):
    """As AdamW's steps and the schedule of the decay make it, step by step."""
    every = {"train__checkpoint_every": 1, "train__keep": 100, "train__steps": 8}
    run = run_here("beit", beit_arguments(world, tmp_path / "run", train__ema_decay=0.5, **every))
    steps = [load_file(run / f"checkpoints/step-{step:08d}/model.safetensors") for step in range(1, 9)]
    moments = load_file(run / "checkpoints/last/optimizer.safetensors")
    name = "backbone.blocks.1.mlp.fc2.weight"
    mean = steps[0][name].clone()
    for step, weights in enumerate(steps[1:], 1):
        mean.lerp_(weights[name], 1 - min(0.5, (1 + step) / (10 + step)))
    assert torch.allclose(moments[f"{name}:ema"], mean, atol=1e-7)
    assert not torch.allclose(steps[-1][name], mean, atol=1e-5)
    assert torch.equal(load_file(run / "backbone/model.safetensors")["blocks.1.mlp.fc2.weight"], moments[f"{name}:ema"])
    longer = beit_arguments(world, run, **every | {"train__steps": 9})
    run_here("beit", [*longer, "--allow", "train.ema_decay", "--allow", "train.steps"])
    assert not [name for name in load_file(run / "checkpoints/last/optimizer.safetensors") if name.endswith(":ema")]
    weights = load_file(run / "checkpoints/last/model.safetensors")
    assert torch.equal(load_file(run / "backbone/model.safetensors")["blocks.1.mlp.fc2.weight"], weights[name])


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_checkpoint_is_exported_while_the_run_goes_on(decay, world, tmp_path, capsys):
    """What a run of so many steps would have left, the mean of the weights included."""
    settings = {"train__steps": 10, "train__checkpoint_every": 5, "train__ema_decay": decay, "optim__warmup": 0, "optim__min_lr": 2e-3}
    run = run_here("beit", beit_arguments(world, tmp_path / "run", **settings))
    short = run_here("beit", beit_arguments(world, tmp_path / "short", **settings | {"train__steps": 5}))
    export_backbone(run / "checkpoints/step-00000005", tmp_path / "middle", "timm")
    assert "after step 5 (" in capsys.readouterr().out
    middle, end = (load_file(folder / "model.safetensors") for folder in (tmp_path / "middle", short / "backbone"))
    assert all(torch.equal(middle[name], end[name]) for name in end)
    (run / "finished.json").unlink()
    export_backbone(run, tmp_path / "newest", "safetensors")
    assert "after step 10 (" in capsys.readouterr().out
    tokenizer = run_here("dvae", dvae_arguments(world, tmp_path / "tokenizer", train__steps=2))
    with pytest.raises(CheckpointError, match="is of a run that trains no backbone"):
        export_backbone(tokenizer / "checkpoints/last", tmp_path / "none", "safetensors")


def test_a_shared_bias_is_exported_and_fine_tuned(world, beit_run, tmp_path, monkeypatch):
    monkeypatch.setattr("mimetic.export.backbone._run_snippet", lambda _: None)  # `exported` runs it
    check_export(beit_run, tmp_path / "pretrained", checkpointed(beit_run, "backbone.", name="beit_base_patch16_224", **BEIT))
    fine = {"init_values": 0.1, "head_init_scale": 1.0}  # BEiT's own: mean pooling, a table in each block
    arguments = classify_arguments(
        world, tmp_path / "fine", train__steps=4, backbone__name="beit_base_patch16_224", overrides=fine, init__path=beit_run,
        optim__layer_decay=0.65,
    )  # fmt: skip
    run = run_here("classify", arguments)
    trained = checkpointed(run, "model.", name="beit_base_patch16_224", num_classes=4, **fine)
    check_export(run, tmp_path / "exported", trained)


def test_a_distilled_run_is_exported(world, pretrained, tmp_path, monkeypatch):
    """The teacher is a ViT with mean pooling; both are taken away."""
    monkeypatch.setattr("mimetic.export.backbone._run_snippet", lambda _: None)
    pooled = {"global_pool": "avg", "class_token": False}
    teacher = run_here("classify", classify_arguments(world, tmp_path / "teacher", train__steps=4, overrides=pooled))
    check_export(teacher, tmp_path / "exported-teacher", checkpointed(teacher, "model.", num_classes=4, **pooled))
    name = "deit_tiny_distilled_patch16_224"
    arguments = classify_arguments(world, tmp_path / "student", train__steps=4, backbone__name=name, distill__teacher=teacher)
    student = run_here("classify", arguments)
    check_export(student, tmp_path / "exported-student", checkpointed(student, "model.", name=name, num_classes=4))
