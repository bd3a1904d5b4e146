"""dVAEs of any stride, codebook and number of channels; the logit-Laplace likelihood against the paper's formula."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from imagesets import as_npy, folder_of
from scipy.integrate import quad
from sklearn.decomposition import PCA
from test_dvae import digit_images, photo_crops, reconstruction_error, train
from tinyruns import beit_arguments, dvae_arguments, lines, losses, run_here

from mimetic.data.pack import pack
from mimetic.engine.errors import CheckpointError, SettingError
from mimetic.tokenizers import codebook as codebook_module
from mimetic.tokenizers import components
from mimetic.tokenizers import dvae as dvae_module
from mimetic.tokenizers.clustering import kmeans
from mimetic.tokenizers.components import principal_components
from mimetic.tokenizers.dvae import DVAE
from mimetic.tokenizers.examination import examine
from mimetic.tokenizers.files import open_tokenizer, provenance_of, save_tokenizer
from mimetic.tokenizers.logit_laplace import map_pixels, negative_log_likelihood, unmap_pixels
from mimetic.tokenizers.usage import code_usage, count_codes
from mimetic.tokenizers.verdict import COLLAPSED


def density(x: float, mu: float, b: float) -> float:
    """Equation 2 of appendix A.3 (arXiv 2102.12092)."""
    return 1 / (2 * b * x * (1 - x)) * math.exp(-abs(math.log(x / (1 - x)) - mu) / b)


@pytest.mark.parametrize(("mu", "b"), [(0.0, 1.0), (1.3, 0.2), (-2.0, 0.05), (0.4, 0.9)])
def test_logit_laplace_is_the_papers_density_and_integrates_to_one(mu, b):
    def ours(x: float) -> float:
        values = (torch.tensor(value, dtype=torch.float64) for value in (x, mu, math.log(b)))
        return float(torch.exp(-negative_log_likelihood(*values)))

    for x in (0.003, 0.1, 0.4, 0.77, 0.95):
        assert math.isclose(ours(x), density(x, mu, b), rel_tol=1e-9)
    mode = 1 / (1 + math.exp(-mu))
    mass = quad(ours, 0, mode, limit=200)[0] + quad(ours, mode, 1, limit=200)[0]
    assert math.isclose(mass, 1, abs_tol=1e-5)


def test_pixels_are_mapped_as_in_the_paper():
    x = torch.linspace(0, 1, 11)
    assert torch.allclose(map_pixels(x), torch.tensor(np.linspace(0.1, 0.9, 11)).float())
    assert torch.allclose(unmap_pixels(map_pixels(x)), x, atol=1e-6)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_the_loss_is_the_mean_of_the_papers_formula():
    """All of the path from images to the number, transcribed: the decoder's output is taken, and nothing else."""
    torch.manual_seed(0)
    dvae = DVAE(8, 4, 3, width=16, code_width=8, likelihood="logit_laplace").eval()
    image_BCHW = torch.rand(2, 3, 8, 8)
    dvae.seed_codebook(image_BCHW)
    for parameter in dvae.decoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    drawn = []
    dvae.draw, draw = lambda code: drawn.append(draw(code)) or drawn[-1], dvae.draw
    _, metrics = dvae.loss(image_BCHW, 0.5, 0.0, torch.Generator().manual_seed(1))
    mu, learned = (value.detach().double().numpy() for value in drawn[0])
    x = 0.8 * image_BCHW.double().numpy() + 0.1
    logit = np.log(x / (1 - x))
    mean, std = (logit.mean((0, 2, 3), keepdims=True), logit.std((0, 2, 3), keepdims=True, ddof=1))
    b = np.exp(learned + dvae.log_b_C11.numpy()) + 0.8 / 255 * 2
    expected = -np.log(1 / (2 * b * x * (1 - x)) * np.exp(-np.abs(logit - (mu * std + mean)) / b))
    assert math.isclose(float(metrics["reconstruction"]), expected.mean(), rel_tol=1e-4)


def test_logit_laplace_starts_as_kmeans_and_learns():
    torch.manual_seed(0)
    image_BCHW = digit_images()
    dvae = DVAE(64, 4, 1, width=32, code_width=16, likelihood="logit_laplace")
    dvae.seed_codebook(image_BCHW[:600])
    plain = DVAE(64, 4, 1, width=32, code_width=16)
    plain.seed_codebook(image_BCHW[:600])
    start = reconstruction_error(dvae, image_BCHW[1500:])
    assert start < 1.3 * reconstruction_error(plain, image_BCHW[1500:])
    errors = train(dvae, image_BCHW[:1500], 120)
    assert np.mean(errors[-10:]) < np.mean(errors[:10]) - 0.3  # nats a value
    assert reconstruction_error(dvae, image_BCHW[1500:]) < 0.9 * start
    used, perplexity = code_usage(count_codes(dvae.encode(image_BCHW), 64))
    assert used > 0.9
    assert perplexity > 0.3 * 64


def test_its_seed_knows_the_spread_that_is_left():
    """ln b of the start is the likeliest one for the seeded linear maps: any other for all values costs more."""
    image_BCHW = photo_crops(64, 32)
    dvae = DVAE(64, 8, 3, width=16, code_width=8, likelihood="logit_laplace").eval()
    dvae.seed_codebook(image_BCHW)

    @torch.no_grad()
    def cost(change: float) -> float:
        code_BPQD = dvae.codebook.codes[dvae.encode(image_BCHW)]
        drawn, learned = dvae.draw(code_BPQD.permute(0, 3, 1, 2))
        return float(dvae._reconstruction(image_BCHW, drawn, learned + change))

    assert cost(0) < min(cost(-0.3), cost(0.3))


def test_a_saved_tokenizer_keeps_its_likelihood_and_old_ones_open(tmp_path):
    dvae = DVAE(8, 4, 1, width=16, code_width=8, likelihood="logit_laplace")
    dvae.seed_codebook(torch.rand(4, 1, 8, 8))
    save_tokenizer(dvae, tmp_path / "new")
    opened = open_tokenizer(tmp_path / "new")
    assert opened.config == dvae.config
    ids_BPQ = torch.arange(4).view(1, 2, 2)
    assert torch.equal(opened.decode(ids_BPQ), dvae.decode(ids_BPQ))
    arguments = {name: value for name, value in DVAE(8, 4, 1).config.items() if name != "likelihood"}
    assert DVAE(**arguments).likelihood == "mse"
    with pytest.raises(SettingError, match="likelihood 'l1'"):
        DVAE(8, 4, 1, likelihood="l1")


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
@pytest.mark.parametrize("stride", [4, 8, 16, 32])
@pytest.mark.parametrize("likelihood", ["mse", "logit_laplace"])
def test_every_stride_seeds_encodes_and_decodes(stride, channels, likelihood):
    torch.manual_seed(0)
    image_BCHW = torch.rand(20, channels, stride * 2, stride * 3)
    dvae = DVAE(64, stride, channels, width=8, code_width=8, depth=0, likelihood=likelihood)
    dvae.seed_codebook(image_BCHW)
    used, _ = code_usage(count_codes(dvae.encode(image_BCHW), 64))
    assert used == 1
    mean_BCHW = image_BCHW.mean((0, 2, 3), keepdim=True).expand_as(image_BCHW)
    assert reconstruction_error(dvae, image_BCHW) < float((image_BCHW - mean_BCHW).square().mean())
    loss, _ = dvae.loss(image_BCHW, 1.0, 0.01)
    loss.backward()
    assert math.isfinite(loss.detach())


def test_a_codebook_of_16384_codes_is_seeded_with_all_in_use(monkeypatch):
    monkeypatch.setattr(codebook_module, "kmeans", partial(kmeans, rounds=1))  # the others take 20 s
    torch.manual_seed(0)
    image_BCHW = torch.rand(16, 1, 128, 128)  # 16,384 cells
    dvae = DVAE(16384, 4, 1, width=8, code_width=4, depth=0)
    dvae.seed_codebook(image_BCHW)
    assert code_usage(count_codes(dvae.encode(image_BCHW), 16384))[0] > 0.9
    with pytest.raises(SettingError, match=r"1024 cells cannot seed 16384 codes: 1 images have 1024 cells each; set dvae.seed_images to 16 "
                       r"or more, or dvae.vocab_size to 1024 or less"):  # fmt: skip
        dvae.seed_codebook(image_BCHW[:1])


def test_many_logits_in_parts_give_the_same_loss_and_gradients(monkeypatch):
    dvae = DVAE(64, 4, 1, width=16, code_width=8)
    image_BCHW = digit_images()[:30]
    dvae.seed_codebook(image_BCHW)

    def measured() -> tuple[float, list[torch.Tensor], torch.Tensor]:
        torch.manual_seed(3)
        dvae.zero_grad()
        dvae.codebook.counts_V.zero_()
        loss, _ = dvae.train().loss(image_BCHW, 0.7, 0.1)
        loss.backward()
        return float(loss.detach()), [p.grad.clone() for p in dvae.parameters() if p.grad is not None], dvae.codebook.counts_V.clone()

    whole, ids_BPQ = measured(), dvae.encode(image_BCHW)
    monkeypatch.setattr(dvae_module, "HELD", 64 * 64)  # 480 cells in parts of 64
    parts = measured()
    assert math.isclose(whole[0], parts[0], rel_tol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(whole[1], parts[1], strict=True))
    assert torch.equal(whole[2], parts[2])
    assert torch.equal(ids_BPQ, dvae.encode(image_BCHW))


def test_components_of_wide_cells_are_those_of_scikit_learn(monkeypatch):
    random = np.random.default_rng(0)
    x_NE = (random.normal(0, 1, (400, 60)) * 0.9 ** np.arange(60) @ random.normal(0, 1, (60, 300)) + 5).astype(np.float32)
    reference = PCA(8, svd_solver="full").fit(x_NE)
    for exact in (2048, 100):
        monkeypatch.setattr(components, "EXACT", exact)
        mean_E, axes_KE = principal_components(torch.from_numpy(x_NE), 8)
        assert np.allclose(mean_E, reference.mean_, atol=1e-3)
        assert np.allclose(np.abs((axes_KE.numpy() * reference.components_).sum(1)), 1, atol=1e-3)
        assert torch.equal(axes_KE, principal_components(torch.from_numpy(x_NE), 8)[1])
    assert principal_components(torch.rand(5, 300), 8)[1].shape == (5, 300)  # fewer cells than components


def test_cells_that_seed_are_read_in_parts(monkeypatch):
    image_BCHW = photo_crops(16, 32)
    whole, parts = (DVAE(32, 8, 3, width=16, code_width=8) for _ in range(2))
    whole.seed_codebook(image_BCHW)
    monkeypatch.setattr(dvae_module, "HELD", 192 * 200)  # 256 cells in parts of 200
    parts.seed_codebook(image_BCHW)
    assert reconstruction_error(parts, image_BCHW) < 1.1 * reconstruction_error(whole, image_BCHW)


# Trainings on data of four channels and 12 bits


@pytest.fixture(scope="module")
def twelve_bits(tmp_path_factory):
    """`data` and `held-out`: 16x16 images of four channels, 12 of 16 bits, packed with --range."""
    world = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16] / 16
    for name, count in (("data", 160), ("held-out", 40)):
        files = {}
        for i in range(count):
            a, b, c = random.uniform(0.2, 0.8, 3)
            shape = np.stack([(x - a) ** 2 + (y - b) ** 2 < 0.05, np.abs(x - c) < 0.2, a * x + b * y, np.abs(y - a) < c / 3], -1)
            noisy = 500 + 3000 * shape + random.normal(0, 60, shape.shape)
            files[f"{i:03d}.npy"] = as_npy(noisy.clip(0, 4095).astype(np.uint16))
        pack(folder_of(world / f"{name}-source", files), world / name, range=(0, 4095), samples_per_shard=64)
    return world


@pytest.mark.parametrize("likelihood", ["mse", "logit_laplace"])
def test_a_tokenizer_and_a_pretraining_on_them(twelve_bits, tmp_path, likelihood):
    run = run_here("dvae", dvae_arguments(twelve_bits, tmp_path / "tokenizer", train__steps=30, dvae__loss=likelihood))
    records = {line["metric"]: line["value"] for line in lines(run, "records.jsonl")}
    assert records["codes_used"] > 0.8
    assert records["reconstruction_psnr"] > 14
    tokenizer = open_tokenizer(run)
    assert (tokenizer.in_channels, tokenizer.likelihood) == (4, likelihood)
    assert provenance_of(run)["range"] == (0, 4095)
    changes = {"train__steps": 12, "tokenizer__path": run, "evaluate_on": twelve_bits / "held-out", "views__jitter": 0.4}
    beit = run_here("beit", beit_arguments(twelve_bits, tmp_path / "beit", **changes))
    assert losses(beit)[-1] < losses(beit)[0]
    assert list((beit / "samples").glob("*.png"))
    assert (beit / "backbone" / "config.json").exists()


def test_images_of_another_range_than_it_learned_from_are_refused(twelve_bits, tmp_path):
    """The same pixel would be another number, and every token another."""
    learned = {"of 16 bits": [0, 65535], "of 8 bits": None, "that tells none": ()}
    for name, limits in learned.items():
        save_tokenizer(DVAE(8, 4, 4, width=8, code_width=4), tmp_path / name, {} if limits == () else {"range": limits})
    with pytest.raises(SettingError, match=r"of 16 bits learned from the pixel range 0 65535, .*/data has the pixel range 0 4095; pack or "
                       r"index them with --range 0 65535, or train a tokenizer on them$"):  # fmt: skip
        run_here("beit", beit_arguments(twelve_bits, tmp_path / "beit", tokenizer__path=tmp_path / "of 16 bits"))
    with pytest.raises(SettingError, match=r"of 8 bits learned from 8-bit pixels, .*/data has the pixel range 0 4095; pack them without"):
        examine(str(tmp_path / "of 8 bits"), str(twelve_bits / "data"))
    assert examine(str(tmp_path / "that tells none"), str(twelve_bits / "data")) == COLLAPSED


def test_too_few_images_for_the_codes_are_told_before_anything_starts(twelve_bits, tmp_path):
    with pytest.raises(SettingError, match=r"16 cells cannot seed 64 codes: 1 images .*; set dvae.seed_images to 4 or more"):
        run_here("dvae", dvae_arguments(twelve_bits, tmp_path / "a", dvae__vocab_size=64, dvae__seed_images=1))
    with pytest.raises(SettingError, match=r"2560 cells cannot seed 4096 codes: .* the data has 160 images, where 256 are needed, or "
                       r"dvae.vocab_size to 2560 or less"):  # fmt: skip
        run_here("dvae", dvae_arguments(twelve_bits, tmp_path / "b", dvae__vocab_size=4096, dvae__seed_images=1000))
    with pytest.raises(SettingError, match=r"views.image_size 16 is no multiple of dvae.stride 32; use 32"):
        run_here("dvae", dvae_arguments(twelve_bits, tmp_path / "c", dvae__stride=32))
    with pytest.raises(SettingError, match=r"^dvae\.loss is 'laplace'; it must be mse or logit_laplace$"):
        run_here("dvae", dvae_arguments(twelve_bits, tmp_path / "d", dvae__loss="laplace"))


@pytest.mark.parametrize("told", [{"kind": []}, {"kind": None}, {"arguments": [1]}, {"arguments": {"vocab_size": "many"}},
                                  {"image_size": "large"}, {"reference": 5}, {"range": [1]}, {"range": [2, 1]}])  # fmt: skip
def test_whatever_a_tokenizers_json_says_is_one_line(tmp_path, told):
    save_tokenizer(DVAE(8, 4, 1, width=8, code_width=4), tmp_path / "tokenizer")
    file = tmp_path / "tokenizer/tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    look = open_tokenizer if told.keys() & {"kind", "arguments"} else provenance_of
    with pytest.raises(CheckpointError, match="tokenizer"):
        look(tmp_path / "tokenizer")
