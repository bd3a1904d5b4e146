"""MAE: its loss against transformers', an encoder that never meets what is hidden, and runs of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import perturb_, worst
from photographs import photo_world
from PIL import Image
from tinyruns import as_killed_at, lines, losses, mae_arguments, make_data, reset_accelerate, run_here, settings_words
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mimetic.backbones.catalog import create_backbone
from mimetic.backbones.files import load_backbone
from mimetic.backbones.vit import ViT
from mimetic.data.masks import RandomMasks
from mimetic.data.views import Normalize
from mimetic.engine.config import parse
from mimetic.engine.errors import SettingError
from mimetic.pretrain import mae
from mimetic.pretrain.autoencoder import MAE, Decoder, visible_and_hidden
from mimetic.pretrain.pixel_recipes import MaeRecipe

ROOT = Path(__file__).parents[1]
NET = {"patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}
RGB = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
COUNT = 18  # of 25


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_data(folder / "data")
    make_data(folder / "held-out", count=70, seed=1)
    return folder


def objective(norm_pix_loss: bool = True, **overrides) -> MAE:
    torch.manual_seed(0)
    backbone = perturb_(create_backbone("vit_tiny_patch16_224", image_size=20, in_channels=3, **NET | overrides))
    decoder = perturb_(Decoder(48, (5, 5), 48, embed_dim=32, depth=2, num_heads=4), seed=3)
    return MAE(backbone, decoder, RGB, COUNT, norm_pix_loss).eval()


def batch(images: int = 3, seed: int = 0) -> dict[str, Tensor]:
    seeds_B = np.arange(images, dtype=np.uint64) + np.uint64(seed)
    pixels = torch.randint(256, (images, 3, 20, 20), generator=torch.Generator().manual_seed(seed)).byte()
    return {"image": pixels, "hidden": RandomMasks((5, 5), COUNT).sample(seeds_B), "valid": torch.ones(images).bool()}


def over_pixels(hidden_BPQ: Tensor) -> Tensor:
    return torch.from_numpy(np.kron(hidden_BPQ.numpy(), np.ones((4, 4), bool)))[:, None]


# The loss


def transformers_mae(ours: MAE) -> ViTMAEForPreTraining:
    """transformers' net with our weights."""
    theirs = ViTMAEForPreTraining(ViTMAEConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=192, layer_norm_eps=1e-6, image_size=20, patch_size=4,
        decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=128,
        mask_ratio=COUNT / 25, norm_pix_loss=ours.norm_pix_loss,
    ))  # fmt: skip
    stem, decoder = ours.backbone.patch_embed, ours.decoder
    state = {
        "vit.embeddings.cls_token": stem.cls_token, "vit.embeddings.position_embeddings": stem.pos_embed,
        "decoder.mask_token": decoder.mask_token,
        "decoder.decoder_pos_embed": torch.cat([torch.zeros(1, 32), decoder.positions_LD])[None],
    }  # fmt: skip
    for name, part in (("vit.embeddings.patch_embeddings.projection", stem.proj), ("vit.layernorm", ours.backbone.norm),
                       ("decoder.decoder_embed", decoder.embed), ("decoder.decoder_norm", decoder.norm),
                       ("decoder.decoder_pred", decoder.pred)):  # fmt: skip
        state |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    for to, blocks in (("vit.layers", ours.backbone.blocks), ("decoder.decoder_layers", decoder.blocks)):
        for i, block in enumerate(blocks):
            state |= {f"{to}.{i}.{renamed(key)}": value for key, value in block.state_dict().items() if "qkv" not in key}
            for kind in ("weight", "bias"):
                parts = getattr(block.attn.qkv, kind).chunk(3)
                state |= {f"{to}.{i}.attention.{letter}_proj.{kind}": part for letter, part in zip("qkv", parts, strict=True)}
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


def renamed(key: str) -> str:
    return key.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after").replace("attn.proj", "attention.o_proj")


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_and_gradients_equal_transformers(norm_pix_loss):
    ours = objective(norm_pix_loss)
    theirs, given = transformers_mae(ours), batch()
    noise_BL = given["hidden"].flatten(1).float() + torch.linspace(0, 0.5, 25)  # they hide where it is largest
    answer = theirs(RGB(given["image"]), noise=noise_BL)
    assert torch.equal(answer.mask.bool(), given["hidden"].flatten(1))
    found = ours(given).loss
    assert abs(found - answer.loss) < 1e-5
    assert answer.loss > 1
    found.backward()
    answer.loss.backward()
    embeddings, decoder = theirs.vit.embeddings, theirs.decoder
    pairs = [
        (ours.backbone.patch_embed.proj.weight, embeddings.patch_embeddings.projection.weight),
        (ours.backbone.patch_embed.cls_token, embeddings.cls_token), (ours.decoder.mask_token, decoder.mask_token),
        (ours.backbone.blocks[0].attn.proj.weight, theirs.vit.layers[0].attention.o_proj.weight),
        (ours.decoder.embed.weight, decoder.decoder_embed.weight), (ours.decoder.pred.bias, decoder.decoder_pred.bias),
    ]  # fmt: skip
    for own, their in pairs:
        assert torch.allclose(own.grad, their.grad, rtol=1e-3, atol=1e-6)
        assert their.grad.abs().max() > 1e-4
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)
    assert ours.backbone.mask_token.grad is None


@torch.no_grad()
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_pictures_are_painted_where_transformers_paints(norm_pix_loss):
    ours = objective(norm_pix_loss)
    theirs, given = transformers_mae(ours), batch()
    image_BCHW, hidden_BLX = RGB(given["image"]), given["hidden"].flatten(1)[..., None]
    answer = theirs(image_BCHW, noise=given["hidden"].flatten(1).float())
    patch_BLX = theirs.patchify(image_BCHW)
    logits_BLX = answer.logits
    if norm_pix_loss:
        logits_BLX = logits_BLX * (patch_BLX.var(-1, keepdim=True) + 1e-6).sqrt() + patch_BLX.mean(-1, keepdim=True)
    wanted = theirs.unpatchify(torch.where(hidden_BLX, logits_BLX, patch_BLX))
    assert worst(ours.paint(image_BCHW, given["hidden"]), wanted) < 1e-5


@torch.no_grad()
def test_samples_that_are_not_valid_count_for_nothing():
    ours, given = objective(), batch(images=4)
    alone = ours({name: value[:3] for name, value in given.items()}).loss
    assert torch.allclose(alone, ours(given | {"valid": torch.tensor([True, True, True, False])}).loss, atol=1e-6)
    assert ours(given | {"valid": torch.zeros(4).bool()}).loss == 0


# The encoder


NETS = {
    "vit": {}, "distilled": {"dist_token": True}, "no-cls": {"class_token": False, "global_pool": "avg"},
    "patch-positions": {"no_embed_class": True, "init_values": 0.1}, "no-positions": {"use_abs_pos_emb": False},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("net", NETS)
def test_all_patches_in_order_are_the_whole_image(net):
    torch.manual_seed(0)
    backbone = perturb_(ViT(20, **NET, **NETS[net])).eval()
    image_BCHW = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    features = backbone.forward_features(image_BCHW)
    tokens_BND = backbone.forward_visible(image_BCHW, torch.arange(25).expand(2, -1))
    prefix = [token for token in (features.cls_BD, features.dist_BD) if token is not None]
    assert torch.equal(tokens_BND, torch.cat([*(token[:, None] for token in prefix), features.map_BDhw.flatten(2).mT], 1))
    shuffled_BN = torch.stack([torch.randperm(25, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    index_BND = shuffled_BN[..., None].expand(-1, -1, 48)
    moved_BND = backbone.forward_visible(image_BCHW, shuffled_BN)[:, len(prefix) :]
    assert worst(moved_BND, tokens_BND[:, len(prefix) :].gather(1, index_BND)) < 1e-5


def test_hidden_pixels_reach_neither_tokens_nor_gradients_of_the_encoder():
    backbone, given = objective().backbone, batch()
    visible_BN, _ = visible_and_hidden(given["hidden"], COUNT)
    seen = []
    for junk in (0.0, torch.nan):
        image_BCHW = torch.where(over_pixels(given["hidden"]), junk, RGB(given["image"]))
        backbone.zero_grad()
        tokens_BND = backbone.forward_visible(image_BCHW, visible_BN)
        tokens_BND.square().sum().backward()
        seen.append([tokens_BND, *(p.grad.clone() for p in backbone.parameters() if p.grad is not None)])
    assert tokens_BND.shape == (3, 1 + 25 - COUNT, 48)
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


def test_visible_patches_are_encoded_as_if_there_were_no_others():
    """Not as `forward_features` does, where mask tokens stand in for hidden ones."""
    backbone, given = objective().backbone, batch()
    visible_BN, _ = visible_and_hidden(given["hidden"], COUNT)
    alone = backbone.forward_visible(RGB(given["image"]), visible_BN)
    block_inputs = []
    handle = backbone.blocks[0].register_forward_pre_hook(lambda _, inputs: block_inputs.append(inputs[0]))
    backbone.forward_features(RGB(given["image"]))
    handle.remove()
    for i, places in enumerate(visible_BN):
        x_1ND = block_inputs[0][i : i + 1, [0, *(places + 1).tolist()]]
        for block in backbone.blocks:
            x_1ND = block(x_1ND)
        assert worst(alone[i : i + 1], backbone.norm(x_1ND)) < 1e-5


def test_each_patch_is_either_visible_or_hidden():
    hidden_BPQ = RandomMasks((5, 5), COUNT).sample(np.arange(20, dtype=np.uint64))
    visible_BN, hidden_BK = visible_and_hidden(hidden_BPQ, COUNT)
    assert (visible_BN.shape[1], hidden_BK.shape[1]) == (25 - COUNT, COUNT)
    assert (torch.cat([visible_BN, hidden_BK], 1).sort(1).values == torch.arange(25)).all()
    assert hidden_BPQ.flatten(1).gather(1, hidden_BK).all()
    assert not hidden_BPQ.flatten(1).gather(1, visible_BN).any()


@pytest.mark.parametrize("overrides", [{"use_rel_pos_bias": True}, {"use_shared_rel_pos_bias": True}])
def test_relative_position_bias_is_refused(overrides):
    backbone = ViT(20, **NET, **overrides)
    with pytest.raises(SettingError, match="relative position bias knows whole grids only"):
        backbone.forward_visible(torch.zeros(1, 3, 20, 20), torch.zeros(1, 3, dtype=torch.int64))


@torch.no_grad()
def test_a_beit_without_it_is_encoded():
    absolute = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": False, "use_abs_pos_emb": True}
    backbone = perturb_(create_backbone("beit_base_patch16_224", image_size=20, **NET, **absolute)).eval()
    image_BCHW = torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    tokens_BND = backbone.forward_visible(image_BCHW, torch.arange(25)[None])
    assert torch.equal(tokens_BND[:, 1:].mT, backbone.forward_features(image_BCHW).map_BDhw.flatten(2))


# Runs


def test_twenty_steps_lower_the_loss_on_photographs(tmp_path):
    land = photo_world(tmp_path / "photographs")
    run = run_here("mae", mae_arguments(
        land, tmp_path / "run", data__index=land / "photos", backbone__image_size=64, overrides={"patch_size": 8, "embed_dim": 64},
        train__log_every=1, optim__lr=3e-3, optim__warmup=0.1, mae__norm_pix_loss=False, mae__decoder_embed_dim=64,
    ))  # fmt: skip
    found = losses(run)
    assert len(found) == 20
    assert sum(found[-4:]) < 0.9 * sum(found[:4])
    features = load_backbone(run).forward_features(torch.zeros(1, 3, 64, 64))
    assert features.map_BDhw.isfinite().all()


def test_a_run_goes_on_to_the_same_bits_and_measures_held_out_images(world, tmp_path):
    settings = {"train__steps": 6, "train__checkpoint_every": 2, "train__log_every": 1, "train__keep": 3, "evaluate_on": world / "held-out"}
    whole = run_here("mae", mae_arguments(world, tmp_path / "whole", **settings))
    assert [(record["metric"], record["count"], record["details"]) for record in lines(whole, "records.jsonl")] == [
        ("masked_loss", 70, {"hidden": 12})
    ]
    run = as_killed_at(2, whole, tmp_path / "run")
    run_here("mae", mae_arguments(world, run, **settings))
    for name in ("checkpoints/last/model.safetensors", "checkpoints/last/optimizer.safetensors", "backbone/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert losses(run) == losses(whole)
    picture = np.array(Image.open(run / "samples/step-00000006.png"))
    image, seen, painted = (row[2:-2, 2:114, 0].astype(int) for row in np.split(picture, 3))
    hidden = seen == 128
    assert 0.75 <= hidden.mean() < 0.8
    assert (painted[~hidden] == image[~hidden]).all()
    assert (painted[hidden] != image[hidden]).mean() > 0.5


def test_the_published_recipe_runs_for_two_steps_with_a_thin_net(tmp_path):
    land = photo_world(tmp_path / "photographs", count=16)
    changes = {"out": tmp_path / "run", "data.index": land / "photos", "data.workers": 0, "data.batch_size": 2, "train.epochs": "null",
               "train.steps": 2, "train.log_every": 1, "mae.decoder_depth": 1, "mae.decoder_embed_dim": 64,
               "backbone.overrides": {"weight_init": "mae", "embed_dim": 48, "depth": 2, "num_heads": 3}}  # fmt: skip
    reset_accelerate()
    recipe = ["--config", str(ROOT / "launch/recipes/mae_vit_base_in1k.yaml")]
    mae.pretrain(parse(MaeRecipe, example="", argv=[*recipe, *settings_words(changes)]))
    assert len(losses(tmp_path / "run")) == 2
    assert np.isfinite(losses(tmp_path / "run")).all()


SWIN = {"patch_size": 2, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone__name": "swin_tiny_patch4_window7_224", "backbone__overrides": SWIN}, r"MAE .* swin_tiny_\w+ cannot; set"),
        ({"backbone__name": "timm:vit_tiny_patch16_224", "backbone__overrides": {"patch_size": 4}}, r"MAE .* timm:vit_tiny\w+ cannot; set"),
        ({"backbone__name": "beit_base_patch16_224"}, r"relative position bias .* use_abs_pos_emb to true"),
        ({"mae__ratio": 0}, r"mae\.ratio is 0.*; it must be in \(0, 1\)"),
        ({"mae__ratio": 0.99}, r"mae\.ratio is 0\.99, which hides all 16 cells of an image; at most 0\.937 leaves one to see"),
        ({"mae__decoder_embed_dim": 18}, r"mae\.decoder_embed_dim is 18, no multiple of 4 \(sine-cosine positions\); use 16"),
        ({"mae__decoder_embed_dim": 20, "mae__decoder_num_heads": 3}, r"is 20, no multiple of 3 \(mae\.decoder_num_heads\); use 18"),
    ],
)
def test_settings_that_cannot_be_are_one_line(changes, message, world, tmp_path):
    with pytest.raises(SettingError, match=message) as refused:
        run_here("mae", mae_arguments(world, tmp_path / "run", **changes))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()
