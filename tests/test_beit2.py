"""BEiT v2's patch aggregation against blocks of timm's, wired as the paper draws them, and short pretrainings.

Legend: B batch, C channels, H W pixels, P Q token and mask grid, N tokens, D width, V codebook, M hidden cells of the batch.
"""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm.models.beit
import timm.models.vision_transformer
import torch
import torch.nn.functional as F
from oracles import perturb_
from safetensors.torch import load_file
from tinyruns import TINY, beit_arguments, lines, losses, run_here, vqkd_arguments
from torch import Tensor, nn

from mimetic.backbones.catalog import create_backbone
from mimetic.backbones.files import load_backbone
from mimetic.data.masks import mask_generator
from mimetic.data.views import UNALTERED, Augmentation, Normalize, PretrainViews
from mimetic.engine.errors import SettingError
from mimetic.engine.objective import reseed
from mimetic.pretrain.aggregation import PatchAggregation, following_blocks
from mimetic.pretrain.mim import MaskedImageModeling, TokenHead
from mimetic.tokenizers.vqkd import VQKD

CPU = torch.device("cpu")
VIT, BEIT = "vit_tiny_patch16_224", "beit_base_patch16_224"
SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "init_values": 0.3, "global_pool": "token"}


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).byte()


def tokenizer() -> VQKD:
    torch.manual_seed(1)
    vqkd = VQKD(30, 1, VIT, 16, TINY, code_width=6)
    perturb_(vqkd.encoder)
    perturb_(vqkd.projection, seed=1)
    return vqkd.eval()


def aggregation(name: str = VIT, layer: int = 3, head_layers: int = 2, **overrides) -> PatchAggregation:
    torch.manual_seed(0)
    backbone = create_backbone(name, image_size=16, in_channels=1, **TINY | {"depth": 4} | overrides)
    head = TokenHead(32, 30, 6)
    objective = PatchAggregation(backbone, tokenizer(), head, Normalize((0.4,), (0.3,)), CPU, layer=layer, head_layers=head_layers)
    return perturb_(objective).eval()


def batch(images: int = 3) -> dict[str, Tensor]:
    masks = mask_generator((4, 4), 6, kind="random", min_block=1, aspect=0.3, unit=1)
    hidden_BPQ = masks.sample(np.arange(images, dtype=np.uint64))
    return {"image": pixels(images, 1, 16, 16, seed=2), "target": pixels(images, 1, 16, 16, seed=3), "hidden": hidden_BPQ,
            "valid": torch.ones(images).bool()}  # fmt: skip


def timm_block(ours: nn.Module, objective: PatchAggregation) -> nn.Module:
    """timm's block with the weights of one of ours."""
    name = objective.backbone.config["name"]
    if name == VIT:
        theirs = timm.models.vision_transformer.Block(32, 2, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    else:
        theirs = timm.models.beit.Block(32, 2, qkv_bias=True, init_values=0.3, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    weights = {objective.backbone.timm_name(f"blocks.0.{key}").removeprefix("blocks.0."): v for key, v in ours.state_dict().items()}
    missing, unknown = theirs.load_state_dict(weights, strict=False)
    assert not unknown
    assert not set(missing) - {"attn.k_bias"}
    return theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize(("name", "overrides"), [(VIT, {}), (BEIT, SHARED)], ids=["vit", "beit-shared-bias"])
def test_both_losses_are_those_of_the_paper(name, overrides):
    """Written out: blocks, [CLS] of the last with patches of the third, more blocks, one norm and one head for both."""
    objective, given = aggregation(name, **overrides), batch()
    backbone, cells = objective.backbone, given["hidden"].flatten(1)
    bias = () if backbone.rel_pos_bias is None else (backbone.rel_pos_bias(),)
    x = backbone.patch_embed((given["image"] / 255 - 0.4) / 0.3, given["hidden"])
    for place, block in enumerate(backbone.blocks):
        x = timm_block(block, objective)(x, *bias)
        if place + 1 == 3:
            early = x[:, 1:]
    aggregated = torch.cat([x[:, :1], early], 1)
    for block in objective.blocks:
        aggregated = timm_block(block, objective)(aggregated, *bias)
    weight, shift = backbone.norm.weight, backbone.norm.bias
    labels = objective.tokenizer.encode(given["target"] / 255).flatten(1)[cells]
    wanted, right = [], []
    for tokens in (x, aggregated):
        seen = F.layer_norm(tokens, (32,), weight, shift, 1e-6)[:, 1:][cells]
        logits = F.linear(seen, objective.head.linear.weight, objective.head.linear.bias)
        wanted.append(F.cross_entropy(logits, labels).item())
        right.append((logits.argmax(1) == labels).float().mean().item())
    loss, metrics, counts = objective(given)
    assert len(labels.unique()) > 4
    assert abs(wanted[0] - wanted[1]) > 0.05
    assert abs(loss.item() - sum(wanted)) < 1e-4
    assert abs(metrics["aggregated_loss"].item() - wanted[1]) < 1e-4
    assert [metrics[key].item() for key in ("masked_accuracy", "aggregated_accuracy")] == pytest.approx(right)
    assert counts["predicted_codes"].sum() == len(labels)


@torch.no_grad()
def test_the_first_of_the_two_losses_is_beits():
    objective, given = aggregation(), batch()
    plain = MaskedImageModeling(objective.backbone, objective.tokenizer, objective.head, objective.normalize, CPU).eval()
    loss, metrics, _ = objective(given)
    assert torch.allclose(plain(given).loss, loss - metrics["aggregated_loss"], atol=1e-5)
    given["valid"][2] = False
    first = {name: value[:2] for name, value in given.items()}
    assert torch.allclose(objective(given).loss, objective(first).loss, atol=1e-5)
    assert objective(given | {"valid": torch.zeros(3).bool()}).loss == 0


def test_the_blocks_above_learn_from_the_second_loss_through_the_class_token_alone():
    objective, given = aggregation(layer=2), batch()
    last_BND, (early_BDPQ,) = objective.backbone.forward_tokens(objective.normalize(given["image"]), given["hidden"], [1])
    objective._aggregate(last_BND[:, :1], early_BDPQ).square().sum().backward()
    assert all(p.grad.any() for p in objective.backbone.blocks[3].mlp.parameters())
    objective.zero_grad()
    last_BND, (early_BDPQ,) = objective.backbone.forward_tokens(objective.normalize(given["image"]), given["hidden"], [1])
    objective._aggregate(last_BND[:, :1].detach(), early_BDPQ).square().sum().backward()
    assert all(p.grad is None for p in objective.backbone.blocks[3].parameters())
    objective.zero_grad()
    objective(given).loss.backward()
    assert [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []


@torch.no_grad()
def test_hidden_pixels_change_no_bit_of_either_loss():
    objective, given = aggregation(BEIT, **SHARED), batch()
    covered = given["hidden"].repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    before = objective(given)
    after = objective(given | {"image": torch.where(covered, pixels(3, 1, 16, 16, seed=9), given["image"])})
    assert torch.equal(after.loss, before.loss)
    assert torch.equal(after.metrics["aggregated_loss"], before.metrics["aggregated_loss"])


def test_extra_blocks_are_those_of_their_depth():
    """Initial weights shrink and drop path grows as in a net that is deep enough: layers 4 and 5 of 5."""
    torch.manual_seed(0)
    backbone = create_backbone(BEIT, image_size=16, in_channels=1, **TINY | {"depth": 4, "drop_path_rate": 0.4, "embed_dim": 128} | SHARED)
    blocks = following_blocks(backbone, 3, 2)
    assert [round(block.drop_path, 6) for block in blocks] == [0.3, 0.4]
    for place, block in enumerate(blocks, 4):
        assert block.mlp.fc1.weight.std().item() == pytest.approx(backbone.blocks[0].mlp.fc1.weight.std().item(), rel=0.05)
        ratio = (block.mlp.fc2.weight.std() / backbone.blocks[0].mlp.fc2.weight.std()).item()
        assert ratio == pytest.approx((1 / place) ** 0.5, rel=0.05)
    assert not {p.data_ptr() for p in blocks.parameters()} & {p.data_ptr() for p in backbone.parameters()}
    objective = aggregation(BEIT, **SHARED | {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False})
    exempt = objective.no_weight_decay_names()
    assert {"blocks.0.attn.rel_pos_bias.relative_position_bias_table", "backbone.patch_embed.cls_token"} <= exempt
    assert objective.depth_of("blocks.0.mlp.fc1.weight") == objective.depth_of("head.linear.weight") == 5


def test_drop_path_draws_from_the_steps_seed():
    objective = aggregation(drop_path_rate=0.5).train()
    found = []
    for step in (1, 1, 2):
        reseed(0, step, 0)
        found.append(objective(batch()).loss.item())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("name", "layer", "overrides", "told"),
    [
        (VIT, 4, {}, r"aggregation\.layer is 4, the backbone has 4 blocks; take patches after 3 at most"),
        (VIT, 3, {"class_token": False, "global_pool": "avg"}, r"no \[CLS\] alone before its patches"),
        ("deit_tiny_distilled_patch16_224", 3, {}, r"no \[CLS\] alone before its patches"),
    ],
)
def test_backbones_without_a_place_for_it_are_refused(name, layer, overrides, told):
    with pytest.raises(SettingError, match=told):
        aggregation(name, layer, **overrides)


def test_both_views_are_one_where_size_and_interpolation_are():
    images, seeds = [pixels(1, 30, 20, seed=seed) for seed in range(4)], np.arange(4, dtype=np.uint64)
    one = PretrainViews(16, 16, Augmentation((0.3, 1.0)), None, "bicubic")(images, seeds)
    assert torch.equal(one["image"], one["target"])
    two = PretrainViews(16, 8, UNALTERED, None, "bicubic")(images, seeds)
    other = PretrainViews(8, 16, UNALTERED, None, "bicubic")(images, seeds)
    assert torch.equal(two["target"], other["image"])
    assert not torch.equal(two["target"], PretrainViews(16, 8, UNALTERED, None)(images, seeds)["target"])
    lanczos = PretrainViews(16, 16, UNALTERED, None)(images, seeds)
    assert not torch.equal(lanczos["image"], lanczos["target"])


@pytest.fixture(scope="module")
def vqkd_run(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    teacher = run_here("beit", beit_arguments(world, folder / "teacher", train__steps=3))
    return run_here("vqkd", vqkd_arguments(world, folder / "vqkd", teacher, train__steps=10, optim__lr=2e-4, vqkd__decay=0.9))


def test_a_pretraining_learns_measures_and_goes_on_with_the_same_bits(world, vqkd_run, tmp_path):
    settings = {"tokenizer__path": vqkd_run, "train__steps": 60, "train__checkpoint_every": 40, "train__log_every": 1,
                "evaluate_on": world / "held-out", "aggregation__layer": 1}  # fmt: skip
    whole = run_here("beit2", beit_arguments(world, tmp_path / "whole", overrides={"drop_path_rate": 0.1}, **settings))
    found = losses(whole)
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    records = {line["metric"]: line["value"] for line in lines(whole, "records.jsonl")}
    assert {"masked_accuracy", "aggregated_accuracy", "aggregated_loss", "masked_loss"} == set(records)
    assert records["masked_loss"] > records["aggregated_loss"] > 0
    assert len(load_backbone(whole).blocks) == 2, "the extra blocks stay behind"
    part = tmp_path / "part"
    checkpoint = shutil.copytree(whole / "checkpoints/step-00000040", part / "checkpoints/step-00000040")
    shutil.copyfile(whole / "config.yaml", part / "config.yaml")
    arguments = beit_arguments(world, part, overrides={"drop_path_rate": 0.1}, **settings)
    run_here("beit2", [*arguments, "--resume", str(checkpoint)])
    assert losses(part) == found[40:]
    ours, theirs = (load_file(run / "backbone/model.safetensors") for run in (part, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
