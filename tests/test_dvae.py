"""The dVAE against independent formulas, and a short training that a collapsing tokenizer would fail."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, load_sample_images
from torch.distributions import Categorical, kl_divergence

from mimetic.engine.errors import SettingError
from mimetic.tokenizers.clustering import draw_by_weight, kmeans, nearest
from mimetic.tokenizers.codebook import Codebook
from mimetic.tokenizers.contract import ImageTokenizer, TrainableTokenizer
from mimetic.tokenizers.dvae import DVAE, gumbel_softmax, kl_to_uniform
from mimetic.tokenizers.objective import only_valid
from mimetic.tokenizers.usage import blank_cells, code_usage, count_codes


def digit_images() -> torch.Tensor:
    """1,797 digits of 8x8 pixels, as (B, 1, 16, 16)."""
    image_BCHW = torch.from_numpy(load_digits().images / 16).float()[:, None]
    return F.interpolate(image_BCHW, 16, mode="bilinear", antialias=True)


def photo_crops(count: int, size: int) -> torch.Tensor:
    """Random crops of scikit-learn's two photos, as (B, 3, size, size)."""
    photos = [torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    crops = []
    for i in range(count):
        top, left = (int(torch.randint(side - size, (1,), generator=generator)) for side in photos[i % 2].shape[1:])
        crops.append(photos[i % 2][:, top : top + size, left : left + size])
    return torch.stack(crops)


def train(dvae: DVAE, image_BCHW: torch.Tensor, steps: int, seed: int = 0) -> list[float]:
    """A small copy of the real loop; returns the reconstruction error of each step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(dvae.parameters(), lr=2e-3)
    dvae.train()
    errors = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = image_BCHW[torch.randperm(len(image_BCHW), generator=generator)[:64]]
        if step and step % 25 == 0:
            dvae.restart_dead_codes(batch, seed=step)
        loss, metrics = dvae.loss(batch, temperature=0.1 ** (step / steps), kl_weight=0.01, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(metrics["reconstruction"]))
    dvae.eval()
    return errors


def reconstruction_error(dvae: DVAE, image_BCHW: torch.Tensor) -> float:
    return float((dvae.decode(dvae.encode(image_BCHW)) - image_BCHW).square().mean())


@pytest.fixture(scope="module")
def trained() -> tuple[DVAE, DVAE, torch.Tensor]:
    """(as seeded, after a short training, held-out images)."""
    torch.manual_seed(0)
    image_BCHW = digit_images()
    dvae = DVAE(64, 4, 1, width=32, code_width=16)
    dvae.seed_codebook(image_BCHW[:600])
    seeded = copy.deepcopy(dvae).eval()
    train(dvae, image_BCHW[:1500], 120)
    return seeded, dvae, image_BCHW[1500:]


def test_short_training_uses_its_codes_and_beats_patch_kmeans(trained):
    seeded, dvae, held_out = trained
    ids_BPQ = dvae.encode(held_out)
    used, perplexity = code_usage(count_codes(ids_BPQ[~blank_cells(held_out, 4)], 64))
    assert used > 0.9
    assert perplexity > 0.5 * 64
    cells = lambda x: x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(-1, 16).numpy()  # noqa: E731
    reference = KMeans(64, n_init=1, random_state=0).fit(cells(digit_images()[:1500]))
    error = float(((reference.cluster_centers_[reference.predict(cells(held_out))] - cells(held_out)) ** 2).mean())
    assert reconstruction_error(seeded, held_out) < 1.15 * error  # it starts as what scikit-learn finds
    assert reconstruction_error(dvae, held_out) < 0.9 * error  # and learns beyond it
    assert reconstruction_error(dvae, held_out) < 0.2 * float(held_out.var())


def test_codes_are_stable_under_small_noise(trained):
    _, dvae, held_out = trained
    noise = 0.01 * torch.randn(held_out.shape, generator=torch.Generator().manual_seed(0))
    same = dvae.encode(held_out) == dvae.encode((held_out + noise).clamp(0, 1))
    assert same.float().mean() > 0.9


def test_a_collapsed_codebook_recovers():
    """All codes but two are moved far away: restarts bring them back into use."""
    image_BCHW = digit_images()
    dvae = DVAE(64, 4, 1, width=16, code_width=16)
    dvae.seed_codebook(image_BCHW)
    dvae.codebook.anchor_VD[2:] = 100.0
    assert dvae.encode(image_BCHW).unique().numel() <= 2
    dvae.train().loss(image_BCHW[:256], 1.0, 0.0)
    assert dvae.restart_dead_codes(image_BCHW[:256], seed=1) == 62
    used, perplexity = code_usage(count_codes(dvae.encode(image_BCHW), 64))
    assert used > 0.9
    assert perplexity > 20
    assert dvae.codebook.counts_V.sum() == 0


def test_restart_leaves_living_codes_and_fitted_cells_alone():
    codebook = Codebook(4, 2)
    codebook.anchor_VD.copy_(torch.tensor([[0.0, 0], [1, 0], [9, 9], [8, 8]]))
    codebook.delta_VD.data.fill_(0.5)  # the optimizer has moved all of them
    before = codebook.codes.clone()
    codebook.count(torch.tensor([0, 0, 1, 1]))
    fitted, apart = before[:1].detach().repeat(30, 1), torch.tensor([[-3.0, 2.0]])
    assert codebook.restart_dead(torch.cat([fitted, apart]), seed=3) == 1  # one target only for two dead codes
    assert torch.equal(codebook.codes[:2], before[:2])
    assert torch.allclose(codebook.codes[2], apart[0])
    assert torch.equal(codebook.codes[3], before[3])


def test_logits_are_those_of_equal_gaussians():
    codebook = Codebook(7, 3)
    codebook.log_precision.data.fill_(math.log(2.5))
    z_MD = torch.randn(11, 3)
    expected = -2.5 / 2 * torch.cdist(z_MD, codebook.codes).square()
    assert torch.allclose(codebook.logits(z_MD).log_softmax(1), expected.log_softmax(1), atol=1e-5)


def test_kl_agrees_with_torch_distributions():
    logits_MV = 3 * torch.randn(50, 9, dtype=torch.float64)
    expected = kl_divergence(Categorical(logits=logits_MV), Categorical(logits=torch.zeros_like(logits_MV))).mean()
    assert torch.allclose(kl_to_uniform(logits_MV), expected, atol=1e-12)


def test_gumbel_samples_follow_the_categorical():
    logits_V = torch.tensor([1.0, 0.0, -1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    soft_MV = gumbel_softmax(logits_V.expand(40_000, 4), 0.5, generator)
    assert torch.allclose(soft_MV.sum(1), torch.ones(40_000), atol=1e-5)
    frequency_V = count_codes(soft_MV.argmax(1), 4) / 40_000
    assert torch.allclose(frequency_V, logits_V.softmax(0), atol=0.01)
    cold_MV = gumbel_softmax(logits_V.expand(1000, 4), 1e-3, generator)
    assert (cold_MV.amax(1) > 0.99).float().mean() > 0.98


def test_loss_is_reconstruction_plus_weighted_kl():
    dvae = DVAE(16, 4, 1, width=16, code_width=8).eval()
    image_BCHW = torch.rand(2, 1, 8, 8)
    loss, metrics = dvae.loss(image_BCHW, 0.5, 0.3, torch.Generator().manual_seed(1))
    assert torch.allclose(loss, metrics["reconstruction"] + 0.3 * metrics["kl"] / math.log(16))
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    again, _ = dvae.loss(image_BCHW, 0.5, 0.3, torch.Generator().manual_seed(1))
    assert torch.equal(loss, again)
    assert dvae.codebook.counts_V.sum() == 0  # counted in training only
    dvae.train().loss(image_BCHW, 0.5, 0.3)
    assert dvae.codebook.counts_V.sum() == 2 * 2 * 2


def test_every_parameter_learns():
    dvae = DVAE(16, 8, 3, width=32, code_width=8)
    image_BCHW = photo_crops(32, 32)
    dvae.seed_codebook(image_BCHW)
    train(dvae, image_BCHW, 3)
    loss, _ = dvae.loss(image_BCHW, 1.0, 0.1)
    dvae.zero_grad()
    loss.backward()
    assert [name for name, p in dvae.named_parameters() if p.requires_grad and not p.grad.any()] == []


@pytest.mark.parametrize(
    ("stride", "channels", "height", "width"), [(4, 1, 28, 28), (8, 3, 32, 48), (16, 3, 64, 64), (4, 5, 12, 8), (2, 1, 6, 6)]
)
def test_strides_and_channels(stride, channels, height, width):
    dvae = DVAE(32, stride, channels, width=16, code_width=12).eval()
    image_BCHW = torch.rand(16, channels, height, width)
    dvae.seed_codebook(image_BCHW)
    ids_BPQ = dvae.encode(image_BCHW)
    assert ids_BPQ.shape == (16, height // stride, width // stride)
    assert ids_BPQ.dtype == torch.int64
    assert ids_BPQ.min() >= 0
    assert ids_BPQ.max() < 32
    decoded_BCHW = dvae.decode(ids_BPQ)
    assert decoded_BCHW.shape == image_BCHW.shape
    assert decoded_BCHW.min() >= 0
    assert decoded_BCHW.max() <= 1
    assert not decoded_BCHW.requires_grad


@pytest.mark.parametrize("stride", [8, 16])
def test_many_values_to_a_cell_and_no_warmup_do_not_collapse_it(stride):
    """Trained linear maps fell from perplexity 55 to 8 here: 768 small weights make one feature, and Adam moves each of them."""
    torch.manual_seed(0)
    image_BCHW = photo_crops(384, 64)
    dvae = DVAE(128, stride, 3, width=16)
    dvae.seed_codebook(image_BCHW[:256])
    start = reconstruction_error(dvae, image_BCHW[256:])
    train(dvae, image_BCHW[:256], 20)
    used, perplexity = code_usage(count_codes(dvae.encode(image_BCHW), 128))
    assert used > 0.8
    assert perplexity > 0.3 * 128
    assert reconstruction_error(dvae, image_BCHW[256:]) < 1.03 * start


def test_encode_is_deterministic_and_free_of_its_batch(trained):
    _, dvae, held_out = trained
    ids_BPQ = dvae.encode(held_out[:64])
    assert torch.equal(ids_BPQ, copy.deepcopy(dvae).train().encode(held_out[:64]))
    assert torch.equal(ids_BPQ[:4], dvae.encode(held_out[:4]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ids_BPQ, dvae.encode(held_out[:64]))
    assert not ids_BPQ.requires_grad


def test_state_dict_round_trip_and_resume(trained):
    """A copy made from config and state goes on with the same bits: nothing is kept outside the state."""
    _, dvae, held_out = trained
    ours, theirs = copy.deepcopy(dvae), DVAE(**dvae.config)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.encode(held_out), theirs.eval().encode(held_out))
    assert train(ours, held_out, 30) == train(theirs, held_out, 30)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_it_keeps_the_contract():
    dvae = DVAE(8, 4, 1)
    assert isinstance(dvae, ImageTokenizer)
    assert isinstance(dvae, TrainableTokenizer)
    assert (dvae.vocab_size, dvae.stride) == (8, 4)


def test_unfit_settings_are_named():
    with pytest.raises(SettingError, match=r"width 30 .*stride 4.* 28 or 32"):
        DVAE(8, 4, 1).encode(torch.rand(1, 1, 28, 30))
    with pytest.raises(SettingError, match=r"\(batch, 3, .*\(1, 1, 8, 8\)"):
        DVAE(8, 4, 3).encode(torch.rand(1, 1, 8, 8))
    with pytest.raises(SettingError, match="stride 6"):
        DVAE(8, 6, 1)
    with pytest.raises(SettingError, match="vocab_size 1"):
        DVAE(1, 4, 1)
    with pytest.raises(SettingError, match="4 cells cannot seed 8 codes"):
        DVAE(8, 4, 1).seed_codebook(torch.rand(1, 1, 8, 8))


def test_images_without_texture_do_no_harm():
    """Fewer different cells than codes, constant channels: no NaN, and ids still name a code."""
    dvae = DVAE(16, 4, 2)
    image_BCHW = torch.zeros(8, 2, 8, 8)
    image_BCHW[:4, 0] = 1
    dvae.seed_codebook(image_BCHW)
    assert np.isfinite(train(dvae, image_BCHW, 30)).all()
    assert reconstruction_error(dvae, image_BCHW) < 1e-2


def test_kmeans_matches_scikit_learn():
    z_ND = torch.from_numpy(load_digits().data / 16).float()
    for seed in range(3):
        ours = nearest(z_ND, kmeans(z_ND, 40, seed=seed))[1].sum()
        assert ours < 1.05 * KMeans(40, n_init=1, random_state=seed).fit(z_ND.numpy()).inertia_


def test_draws_follow_their_weights():
    weight_N = torch.tensor([1.0, 3.0, 0.0, 4.0])
    drawn = torch.stack([draw_by_weight(weight_N, 1, seed)[0] for seed in range(4000)])
    assert torch.allclose(count_codes(drawn, 4) / 4000, weight_N / 8, atol=0.03)


def test_usage_and_blank_cells():
    used, perplexity = code_usage(torch.tensor([5, 5, 5, 5, 0, 0, 0, 0]))
    assert used == 0.5
    assert math.isclose(perplexity, 4, rel_tol=1e-6)
    assert [float(value) for value in code_usage(torch.zeros(8, dtype=torch.int64))] == [0, 0]
    image_BCHW = torch.zeros(1, 2, 8, 8)
    image_BCHW[0, 1, :4, 4:] = 0.5  # one colour in each channel: blank
    image_BCHW[0, 1, 5, 5] = 0.1  # a speck in one channel: not
    assert blank_cells(image_BCHW, 4).tolist() == [[[True, True], [True, False]]]


def test_pictures_that_do_not_decode_are_replaced_by_a_valid_one():
    image_BCHW = torch.arange(4)[:, None, None, None].expand(4, 1, 8, 8)
    valid_B = torch.tensor([False, True, False, True])
    assert only_valid({"image": image_BCHW, "valid": valid_B})[:, 0, 0, 0].tolist() == [1, 1, 1, 3]
