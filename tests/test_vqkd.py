"""VQ-KD against the paper's equations in NumPy, its teachers against timm and transformers, and short trainings that must not collapse.

Legend: B batch, C channels, H W pixels, P Q cells, M N cells of a batch, D code width, T teacher's width, V codebook.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from oracles import perturb_, worst
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans
from tinyruns import TINY, beit_arguments, lines, losses, run_here, vqkd_arguments
from torch import Tensor

from mimetic.backbones.catalog import create_backbone
from mimetic.backbones.files import save_backbone
from mimetic.engine.config import parse
from mimetic.engine.errors import CheckpointError, SettingError
from mimetic.engine.survey import survey
from mimetic.tokenizers.clustering import kmeans
from mimetic.tokenizers.contract import ImageTokenizer
from mimetic.tokenizers.files import open_tokenizer, save_tokenizer
from mimetic.tokenizers.spherical import SphericalCodebook
from mimetic.tokenizers.teachers import Teacher, open_teacher
from mimetic.tokenizers.vqkd import VQKD, FeatureDecoder, rows
from mimetic.tokenizers.vqkd_objective import VQKDObjective
from mimetic.tokenizers.vqkd_recipe import VqkdRecipe

CPU = torch.device("cpu")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).byte()


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# The codebook, equation by equation


def test_assignment_straight_through_gradient_and_commitment():
    codebook = SphericalCodebook(7, 5)
    codebook.codes_VD.copy_(F.normalize(noise(7, 5)))
    raw_MD = noise(40, 5, seed=1).requires_grad_()
    z_MD = F.normalize(raw_MD)
    z_MD.retain_grad()
    code_MD, ids_M, commitment = codebook.quantize(z_MD)
    pull_MD = noise(40, 5, seed=2)
    ((code_MD * pull_MD).sum() + 0.7 * commitment).backward()

    z, codes = z_MD.detach().double().numpy(), codebook.codes_VD.double().numpy()
    ids = (((z[:, None] - codes[None]) ** 2).sum(2)).argmin(1)  # nearest on the sphere is the largest cosine
    assert len(set(ids)) > 4
    assert np.array_equal(ids_M.numpy(), ids)
    assert np.abs(code_MD.detach().numpy() - codes[ids]).max() < 1e-6
    assert abs(commitment.item() - ((z - codes[ids]) ** 2).mean()) < 1e-6
    wanted = pull_MD.numpy() + 0.7 * 2 * (z - codes[ids]) / z.size
    assert np.abs(z_MD.grad.numpy() - wanted).max() < 1e-6


def test_codes_are_chosen_in_fp32_under_autocast_too():
    """Features of a young encoder are much alike: cosines that bf16 cannot tell apart."""
    codebook = SphericalCodebook(64, 8)
    codebook.codes_VD.copy_(F.normalize(torch.ones(8) + 0.05 * noise(64, 8)))
    z_MD = F.normalize(torch.ones(8) + 0.05 * noise(500, 8, seed=1))
    with torch.autocast("cpu", torch.bfloat16):
        code_MD, ids_M, commitment = codebook.quantize(z_MD)
        assert (codebook.nearest(z_MD) != ids_M).float().mean() > 0.3
    assert torch.equal(ids_M, codebook.nearest(z_MD))
    assert {code_MD.dtype, commitment.dtype} == {torch.float32}


def test_codes_follow_their_features_as_the_equations_say():
    """Two steps; a code that nothing is nearest to keeps its place to the bit."""
    codebook = SphericalCodebook(6, 4)
    start = F.normalize(noise(6, 4))
    start[5] = -F.normalize(noise(200, 4, seed=1).sum(0), dim=0)
    codebook.codes_VD.copy_(start)
    codes, usage = start.double().numpy(), np.zeros(6)
    for step in (1, 2):
        z_MD = F.normalize(noise(50, 4, seed=step).abs())  # all in one corner: some code gets none
        ids_M = codebook.nearest(z_MD)
        codebook.follow(*codebook.statistics(z_MD, ids_M), decay=0.9)
        z, ids = z_MD.double().numpy(), ids_M.numpy()
        counts = np.bincount(ids, minlength=6)
        assert (counts == 0).any()
        assert (counts > 0).sum() > 1
        for code in range(6):
            if counts[code]:
                codes[code] = unit(0.9 * codes[code] + 0.1 * unit(z[ids == code].mean(0)))
        usage = 0.9 * usage + 0.1 * counts
        assert np.abs(codebook.codes_VD.numpy() - codes).max() < 1e-6
        assert np.abs(codebook.usage_V.numpy() - usage).max() < 1e-5
    assert worst(codebook.codes_VD, start) > 0.01
    unused = torch.from_numpy(usage == 0)
    assert unused.any()
    assert torch.equal(codebook.codes_VD[unused], start[unused])


def clusters(count: int, width: int = 8) -> Tensor:
    """Unit vectors around `count` directions."""
    centres_VD = F.normalize(noise(count, width, seed=3))
    return F.normalize(centres_VD.repeat(60, 1) + 0.2 * noise(60 * count, width, seed=4))


def test_codes_start_as_spherical_kmeans():
    z_ND = clusters(20)
    codebook = SphericalCodebook(20, 8)
    codebook.start(z_ND, seed=1)
    ours = (z_ND @ codebook.codes_VD.T).amax(1).mean()
    theirs = torch.from_numpy(unit(KMeans(20, n_init=3, random_state=0).fit(z_ND.numpy()).cluster_centers_)).float()
    assert ours > (z_ND @ theirs.T).amax(1).mean() - 0.01
    assert torch.allclose(codebook.codes_VD.norm(dim=1), torch.ones(20), atol=1e-6)
    codes_VD = kmeans(z_ND, 20, rounds=60, seed=1, spherical=True)  # settled: every code is the mean direction of its own
    ids_N = (z_ND @ codes_VD.T).argmax(1)
    means = torch.stack([F.normalize(z_ND[ids_N == code].sum(0), dim=0) for code in range(20)])
    assert torch.allclose(codes_VD, means, atol=1e-5)
    again = SphericalCodebook(20, 8)
    again.start(z_ND, seed=1)
    assert torch.equal(again.codes_VD, codebook.codes_VD)


def test_restart_moves_dead_codes_onto_features_and_leaves_the_living():
    codebook = SphericalCodebook(4, 3)
    codebook.codes_VD.copy_(F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, -1, 0], [-1, 0, -1]])))
    codebook.usage_V.copy_(torch.tensor([10.0, 12, 0, 0.1]))
    before = codebook.codes_VD.clone()
    apart = F.normalize(torch.tensor([[0.1, 0.1, 1.0]]))
    assert codebook.restart_dead(torch.cat([before[:1].repeat(30, 1), apart]), seed=3) == 1  # one badly served feature, two dead
    assert torch.equal(codebook.codes_VD[[0, 1, 3]], before[[0, 1, 3]])
    assert torch.equal(codebook.codes_VD[2], apart[0])
    assert codebook.usage_V[2] == pytest.approx(22.1 / 4)
    assert codebook.restart_dead(apart, seed=4) == 0, "what has just been restarted is not dead, and the feature is served now"


# The objective


def tiny_vqkd(codes: int = 12, channels: int = 1, **overrides) -> VQKD:
    torch.manual_seed(0)
    vqkd = VQKD(codes, channels, "vit_tiny_patch16_224", 16, TINY | overrides, code_width=6)
    perturb_(vqkd.encoder)
    perturb_(vqkd.projection, seed=1)
    return vqkd.eval()


class Ramp(torch.nn.Module):
    """A teacher that one can compute by hand: means over cells of 8 pixels, and their squares."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        map_BChw = F.avg_pool2d(image_BCHW, 8)
        return torch.cat([map_BChw, map_BChw.square(), torch.ones_like(map_BChw)], 1)


def tiny_objective(**options) -> VQKDObjective:
    vqkd = tiny_vqkd()
    teacher = Teacher(Ramp(), 32, [0.4], [0.3], 1)
    decoder = perturb_(FeatureDecoder((4, 4), 6, 32, 2, teacher.width), seed=2)
    return VQKDObjective(vqkd, decoder, teacher, CPU, **options).train()


def batch(images: int = 4, seed: int = 0) -> dict[str, Tensor]:
    return {"image": pixels(images, 1, 16, 16, seed=seed), "valid": torch.ones(images).bool()}


def test_the_loss_is_the_papers():
    objective = tiny_objective(commitment=0.6, decay=0.8)
    objective.vqkd.codebook.start(F.normalize(noise(80, 6)))
    codes = objective.vqkd.codebook.codes_VD.double().numpy()
    for step in range(2):
        objective.begin_step(step, 10)
        image_BCHW = batch(seed=step)["image"] / 255
        z = rows(objective.vqkd.features(image_BCHW)).detach().double().numpy()
        ids = (z @ codes.T).argmax(1)
        code_BDPQ = torch.from_numpy(codes[ids]).float().view(4, 4, 4, 6).permute(0, 3, 1, 2)
        told = objective.decoder(code_BDPQ).detach().double().numpy()
        seen = F.interpolate(image_BCHW, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
        true = objective.teacher.net((seen - 0.4) / 0.3).permute(0, 2, 3, 1).double().numpy()
        cosine = (unit(told) * unit(true)).sum(-1).mean()
        wanted = 1 - cosine + 0.6 * ((z - codes[ids]) ** 2).mean()
        loss, metrics, _ = objective(batch(seed=step))
        assert abs(loss.item() - wanted) < 1e-6
        assert abs(metrics["teacher_cosine"].item() - cosine) < 1e-6
        for code in set(ids):
            codes[code] = unit(0.8 * codes[code] + 0.2 * unit(z[ids == code].sum(0)))
    objective.begin_step(2, 10)
    assert np.abs(objective.vqkd.codebook.codes_VD.numpy() - codes).max() < 1e-6
    assert not objective.counts_V.any()


def test_a_step_of_two_micro_batches_moves_codes_as_one_does():
    whole, parts = tiny_objective(), tiny_objective()
    images = batch(8)
    for objective, pieces in ((whole, [slice(8)]), (parts, [slice(4), slice(4, 8)])):
        objective.begin_step(0, 10)
        for piece in pieces:
            objective({name: value[piece] for name, value in images.items()})
        objective.begin_step(1, 10)
    assert torch.allclose(whole.vqkd.codebook.codes_VD, parts.vqkd.codebook.codes_VD, atol=1e-6)
    assert torch.equal(whole.vqkd.codebook.usage_V, parts.vqkd.codebook.usage_V)
    assert worst(whole.vqkd.codebook.codes_VD, tiny_objective().vqkd.codebook.codes_VD) > 1e-4


def test_dead_codes_restart_after_sound_steps_only():
    objective = tiny_objective(restart_every=5)
    codebook = objective.vqkd.codebook
    codebook.codes_VD[2:] = codebook.codes_VD[0]  # ties go to the first: ten codes are never used
    before = codebook.codes_VD.clone()
    for step, sound in ((4, True), (5, False)):
        objective.begin_step(step, 100)
        objective(batch(8))
        assert objective.wants_end_step == (step == 5)
        objective.end_step(sound)
        assert torch.equal(codebook.codes_VD[2:], before[2:])
    objective.begin_step(10, 100)
    objective(batch(8))
    objective.end_step(True)
    assert (codebook.codes_VD[2:] != before[2:]).any(1).all()
    assert len(codebook.codes_VD.unique(dim=0)) == 12
    objective.begin_step(80, 100)
    objective(batch(8))
    assert not objective.wants_end_step, "the last quarter is for settling"


def test_everything_that_trains_gets_a_gradient_and_a_survey_changes_nothing():
    objective = tiny_objective()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    survey(objective, batch(2))
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    objective(batch()).loss.backward()
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert not [name for name in objective.state_dict() if "teacher" in name]
    assert "vqkd.encoder.patch_embed.pos_embed" in objective.no_weight_decay_names() <= set(dict(objective.named_parameters()))
    assert objective.pictures(batch()).shape[2] == 3


# The tokenizer


@torch.no_grad()
def test_encode_keeps_the_contract_and_its_bits(tmp_path):
    vqkd = tiny_vqkd(channels=3)
    assert isinstance(vqkd, ImageTokenizer)
    image_BCHW = pixels(9, 3, 16, 16) / 255
    ids_BPQ = vqkd.encode(image_BCHW)
    assert ids_BPQ.shape == (9, 4, 4)
    assert ids_BPQ.dtype == torch.int64
    assert len(ids_BPQ.unique()) > 3
    theirs = timm.create_model("vit_tiny_patch16_224", **vqkd.encoder.timm_arguments()).eval()
    theirs.load_state_dict(vqkd.encoder.timm_state_dict())
    z = vqkd.projection(theirs.forward_features(image_BCHW * 2 - 1)[:, 1:])
    assert torch.equal((z @ vqkd.codebook.codes_VD.T).argmax(2), ids_BPQ.flatten(1))
    assert torch.equal(ids_BPQ, vqkd.train().encode(image_BCHW))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ids_BPQ, vqkd.encode(image_BCHW))
    save_tokenizer(vqkd, tmp_path / "vqkd")
    opened = open_tokenizer(tmp_path / "vqkd")
    assert isinstance(opened, VQKD)
    assert not opened.training
    assert torch.equal(opened.encode(image_BCHW), ids_BPQ)
    assert opened.config == vqkd.config == json.loads((tmp_path / "vqkd/tokenizer.json").read_text())["arguments"]
    assert not [name for name in load_file(tmp_path / "vqkd/model.safetensors") if "decoder" in name]


def test_unfit_images_and_settings_are_named():
    vqkd = tiny_vqkd()
    with pytest.raises(SettingError, match=r"\(batch, 1, .*\(2, 3, 16, 16\)"):
        vqkd.encode(torch.rand(2, 3, 16, 16))
    with pytest.raises(SettingError, match=r"height 18 .*stride 4"):
        vqkd.encode(torch.rand(2, 1, 18, 16))
    with pytest.raises(SettingError, match=r"the tokenizer takes images of 16x16 pixels alone, and got 32x32"):
        vqkd.encode(torch.rand(2, 1, 32, 32))
    with pytest.raises(SettingError, match="16 cells cannot start 100 codes"):
        tiny_vqkd(100).start_codebook(torch.rand(1, 1, 16, 16))
    with pytest.raises(SettingError, match="vocab_size 1 "):
        tiny_vqkd(1)
    with pytest.raises(SettingError, match=r"cells of 4x8 pixels; they must be square"):
        tiny_vqkd(patch_size=[4, 8])
    words = ["--out", "run", "--data.index", "x", "--train.steps", "1", "--optim.lr", "1", "--teacher.path", "t"]
    with pytest.raises(SettingError, match=r"train\.ema_decay is 0\.9.* set it to 0"):
        parse(VqkdRecipe, example="", argv=[*words, "--train.ema_decay", "0.9"])


# Teachers


@torch.no_grad()
def test_an_exported_teacher_is_what_timm_opens(tmp_path):
    backbone = perturb_(create_backbone("vit_tiny_patch16_224", image_size=16, in_channels=1, **TINY)).eval()
    save_backbone(backbone, tmp_path / "net", mean=[0.4], std=[0.3])
    teacher = open_teacher(str(tmp_path / "net"), 1)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    image_BCHW = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted = theirs.forward_features((image_BCHW - 0.4) / 0.3)[:, 1:].mT.unflatten(2, (4, 4))
    assert worst(teacher(image_BCHW), wanted) < 1e-4
    assert teacher.width == 32
    larger = open_teacher(str(tmp_path / "net"), 1, image_size=32, mean=[0.5], std=[0.5])
    assert larger(image_BCHW).shape == (3, 32, 8, 8)
    with pytest.raises(SettingError, match=r"teacher\.mean has 3 values, .*net sees 1 channels; give one for each"):
        open_teacher(str(tmp_path / "net"), 1, mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(SettingError, match="the teacher sees 1 channels, the images have 3"):
        open_teacher(str(tmp_path / "net"), 3)
    with pytest.raises(CheckpointError, match="no backbone there"):
        open_teacher(str(tmp_path), 1)
    with pytest.raises(SettingError, match=r"teacher\.weights is x, but .* brings its own"):
        open_teacher(str(tmp_path / "net"), 1, weights="x")


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """timm's smallest EfficientNet with random weights, and a folder of files that hold them."""
    folder = tmp_path_factory.mktemp("weights")
    net = perturb_(timm.create_model("test_efficientnet")).eval()
    state = net.state_dict()
    save_file(state, folder / "named.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, folder / "named.pth")
    foreign = {f"_layer{place}.{name.rpartition('.')[2]}": value for place, (name, value) in enumerate(state.items())}
    torch.save(foreign, folder / "other-names.pth")
    torch.save({name: value for name, value in state.items() if not name.startswith("classifier")}, folder / "headless.pth")
    torch.save(dict(list(foreign.items())[:-3]), folder / "short.pth")
    torch.save(net, folder / "pickled.pth")
    return net, folder


@torch.no_grad()
@pytest.mark.parametrize("file", ["named.safetensors", "named.pth", "other-names.pth", "headless.pth"])
def test_a_timm_teacher_has_the_weights_of_its_file(efficientnet, file):
    net, folder = efficientnet
    teacher = open_teacher("timm:test_efficientnet", 1, weights=str(folder / file), image_size=64, mean=[0.5] * 3, std=[0.5] * 3)
    grey_BCHW = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert worst(teacher(grey_BCHW), net.forward_features(grey_BCHW.repeat(1, 3, 1, 1) * 2 - 1)) < 1e-4
    small = F.interpolate(grey_BCHW, (16, 16), mode="area")
    resized = F.interpolate(small, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    assert worst(teacher(small), net.forward_features(resized.repeat(1, 3, 1, 1) * 2 - 1)) < 1e-4


def test_weights_that_do_not_fit_are_refused_in_one_line(efficientnet, tmp_path):
    def refused(weights: str | None, name: str = "timm:test_efficientnet", channels: int = 3) -> str:
        with pytest.raises((SettingError, CheckpointError)) as caught:
            open_teacher(name, channels, weights=weights)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    folder = efficientnet[1]
    (tmp_path / "junk.pth").write_bytes(b"junk")
    assert "a random teacher teaches nothing; set teacher.weights" in refused(None)
    assert "conv_stem.weight not there in the file" in refused(str(folder / "short.pth"))
    assert "without running code" in refused(str(folder / "pickled.pth"))
    assert "without running code" in refused(str(tmp_path / "junk.pth"))
    assert "there is no such file" in refused(str(tmp_path / "none.safetensors"))
    assert "does not fit ResNet" in refused(str(folder / "named.pth"), "timm:test_resnet")
    assert "did you mean test_efficientnet" in refused(str(folder / "named.pth"), "timm:test_eficientnet")
    assert "the teacher sees 3 channels, the images have 4" in refused(str(folder / "named.pth"), channels=4)


def vision_model(kind: str) -> torch.nn.Module:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 24,
             "patch_size": 4}  # fmt: skip
    if kind == "vit":
        return transformers.ViTModel(transformers.ViTConfig(**small))
    if kind == "registers":
        return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**small, num_register_tokens=3))
    if kind == "convnext":
        return transformers.ConvNextModel(transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]))
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50,
            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=small, text_config=text, projection_dim=20))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "registers", "clip", "convnext"])
def test_a_transformers_teacher_gives_the_patches_of_its_model(kind, tmp_path):
    theirs = vision_model(kind).eval()
    perturb_(theirs.vision_model if kind == "clip" else theirs)
    theirs.save_pretrained(tmp_path / "net")
    (tmp_path / "net/preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}))
    teacher = open_teacher(f"transformers:{tmp_path / 'net'}", 3, image_size=96 if kind == "convnext" else None)
    size = 96 if kind == "convnext" else 24
    image_BCHW = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    seen = theirs.vision_model if kind == "clip" else theirs
    x = seen(pixel_values=(image_BCHW - mean) / std).last_hidden_state
    if kind == "clip":  # as the authors take it: encode_image(return_all_tokens=True) @ visual.proj
        x = seen.post_layernorm(x) @ theirs.visual_projection.weight.T
    wanted = x if kind == "convnext" else x[:, {"vit": 1, "registers": 4, "clip": 1}[kind] :].mT.unflatten(2, (6, 6))
    assert worst(teacher(image_BCHW), wanted) < 1e-4
    assert teacher.width == wanted.shape[1]


def test_a_transformers_folder_must_hold_safetensors_and_say_its_normalization(tmp_path):
    net = vision_model("vit")
    net.save_pretrained(tmp_path / "net")
    with pytest.raises(SettingError, match=r"does not say what its input is normalized with; set teacher\.mean"):
        open_teacher(f"transformers:{tmp_path / 'net'}", 3)
    (tmp_path / "net/model.safetensors").unlink()
    torch.save(net.state_dict(), tmp_path / "net/pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"cannot be opened .* model\.safetensors"):
        open_teacher(f"transformers:{tmp_path / 'net'}", 3)
    with pytest.raises(CheckpointError, match=r"no config\.json there"):
        open_teacher(f"transformers:{tmp_path}", 3)


# Whole trainings


@pytest.fixture(scope="module")
def taught(world, tmp_path_factory) -> Path:
    """A teacher pretrained for a moment."""
    return run_here("beit", beit_arguments(world, tmp_path_factory.mktemp("teacher") / "run", train__steps=60))


def test_a_short_training_uses_its_codes_and_learns_the_teacher(world, taught, tmp_path):
    run = run_here("vqkd", vqkd_arguments(world, tmp_path / "run", taught, train__steps=120, vqkd__restart_every=10, vqkd__decay=0.9))
    records = {line["metric"]: line for line in lines(run, "records.jsonl")}
    assert records["codes_used"]["value"] >= 0.9
    assert records["perplexity_non_blank"]["value"] > 0.4 * 16
    first = next(line["teacher_cosine"] for line in lines(run) if "loss" in line)
    assert records["teacher_cosine"]["value"] > max(0.8, first + 0.2)
    counts = records["codes_used"]["details"]["counts"]
    assert sum(counts) == 70 * 16
    tokenizer = open_tokenizer(run)
    assert (tokenizer.vocab_size, tokenizer.stride) == (16, 4)
    assert list((run / "samples").glob("*.png"))


def test_too_few_images_to_start_the_codes_are_named_before_training(world, taught, tmp_path):
    told = r"set vqkd\.start_images to 125 or more, or vqkd\.vocab_size to 1600 or less"
    with pytest.raises(SettingError, match=told):
        run_here("vqkd", vqkd_arguments(world, tmp_path / "run", taught, vqkd__vocab_size=2000))
    assert not (tmp_path / "run").exists()


def test_a_training_that_goes_on_has_the_same_bits(world, taught, tmp_path):
    settings = {"train__steps": 14, "train__checkpoint_every": 5, "train__keep": 9, "train__log_every": 1, "train__accumulate": 2}
    whole = run_here("vqkd", vqkd_arguments(world, tmp_path / "whole", taught, **settings))
    for step in (5, 10):  # before and after codes were restarted
        part = tmp_path / f"part-{step}"
        checkpoint = Path(shutil.copytree(whole / f"checkpoints/step-{step:08d}", part / f"checkpoints/step-{step:08d}"))
        shutil.copyfile(whole / "config.yaml", part / "config.yaml")
        run_here("vqkd", [*vqkd_arguments(world, part, taught, **settings), "--resume", str(checkpoint)])
        assert losses(part) == losses(whole)[step:]
        ours, theirs = (load_file(run / "tokenizer/model.safetensors") for run in (part, whole))
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
