"""The tokenizer doctor: its estimates against those of others, and its verdict on tokenizers whose state is known."""

import io
import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from imagesets import as_npy, encoded, folder_of, idx_files, noise
from photographs import crops
from PIL import Image
from scipy.stats import entropy
from sklearn.cluster import KMeans
from sklearn.metrics import mutual_info_score, r2_score
from tinyruns import TINY, beit_arguments, dvae_arguments, losses, run_here, structured
from torchvision.transforms.v2.functional import resize

from mimetic.cli import dispatch
from mimetic.data.opening import open_set
from mimetic.data.pack import pack
from mimetic.data.stream import ShardStream
from mimetic.data.views import ClassifyViews
from mimetic.engine.errors import CheckpointError, DataError, MimeticError, SettingError
from mimetic.pretrain import screening
from mimetic.pretrain.recipe import TokenizerSettings
from mimetic.tokenizers.doctor import agreement, collect, fidelity, kmeans_yardstick, measure, stability
from mimetic.tokenizers.drawings import code_figure, sheet, token_colours
from mimetic.tokenizers.dvae import DVAE
from mimetic.tokenizers.examination import examine, fitting_size
from mimetic.tokenizers.files import provenance_of, save_tokenizer, tokenizer_hash
from mimetic.tokenizers.information import (
    PRIOR,
    entropy_bits,
    guess_from_surroundings,
    neighbour_information,
    position_entropy,
    position_information,
)
from mimetic.tokenizers.verdict import BLIND, COARSE, COLLAPSED, HEALTHY, judge, reference_of
from mimetic.tokenizers.vqkd import VQKD

SIDE, STRIDE = 16, 4


def tokens(seed: int, *shape: int, codes: int = 8) -> torch.Tensor:
    """Tokens of uneven frequencies that know nothing of each other."""
    return torch.from_numpy(np.minimum(np.random.default_rng(seed).geometric(0.3, shape), codes) - 1)


class ByCell:
    """Tells cells by their mean alone: the same wherever a cell lies."""

    vocab_size, stride, in_channels = 32, STRIDE, 1

    def encode(self, image_BCHW):
        mean_BPQ = torch.nn.functional.avg_pool2d(image_BCHW, self.stride)[:, 0]
        return (mean_BPQ * self.vocab_size).long().clamp(max=self.vocab_size - 1)


class ByPlace(ByCell):
    """Looks at nothing."""

    def encode(self, image_BCHW):
        rows, columns = (side // self.stride for side in image_BCHW.shape[2:])
        return torch.arange(rows * columns).view(1, rows, columns).expand(len(image_BCHW), -1, -1).contiguous() % self.vocab_size


# Estimates


def test_entropy_is_scipys():
    counts = np.random.default_rng(0).integers(0, 50, (3, 40))
    assert entropy_bits(torch.from_numpy(counts)).numpy() == pytest.approx(entropy(counts, base=2, axis=1), abs=1e-12)


def test_entropy_by_position_is_scipys_at_each_place():
    ids_NPQ = tokens(0, 60, 3, 5)
    expected = [[entropy(np.bincount(ids_NPQ[:, p, q]), base=2) for q in range(5)] for p in range(3)]
    assert position_entropy(ids_NPQ).numpy() == pytest.approx(np.array(expected), abs=1e-12)


def test_place_tells_all_of_a_token_that_hangs_on_it_and_nothing_of_another():
    by_place = torch.arange(16).view(1, 4, 4).expand(200, -1, -1)
    assert position_information(by_place) == pytest.approx(4, abs=0.1)
    assert position_information(tokens(0, 400, 4, 4)) < 0.02


@pytest.mark.parametrize("dim", [1, 2])
def test_mutual_information_is_scikit_learns(dim):
    ids_NPQ = torch.cumsum(tokens(1, 50, 6, 6, codes=4), dim) % 12
    one, other = (ids_NPQ.narrow(dim, first, 5).flatten().numpy() for first in (0, 1))
    found = neighbour_information(ids_NPQ, 12, dim)
    assert found.plain == pytest.approx(mutual_info_score(one, other) / math.log(2), abs=1e-10)
    assert found.excess == pytest.approx(found.plain - found.shuffled)
    assert found.plain > 1 > 10 * found.shuffled


def test_independent_tokens_tell_nothing_of_each_other_however_many_codes_there_are():
    """The plug-in estimate finds bits where there are none; less that of shuffled pairs it is 0, almost exactly."""
    ids_NPQ = torch.from_numpy(np.random.default_rng(0).integers(0, 512, (40, 8, 8)))
    found = neighbour_information(ids_NPQ, 512, 2)
    assert found.plain > 5
    assert abs(found.excess) < 0.05
    assert neighbour_information(ids_NPQ, 512, 2, seed=1).excess == pytest.approx(found.excess, abs=0.02)


def test_a_token_that_its_neighbour_settles_is_known_whole():
    ids_NPQ = (torch.randint(8, (500, 4, 1), generator=torch.Generator().manual_seed(0)) + 3 * torch.arange(6)) % 8
    found = neighbour_information(ids_NPQ, 8, 2)
    assert found.excess == pytest.approx(3, abs=0.05)
    assert neighbour_information(ids_NPQ, 8, 1).excess == pytest.approx(0, abs=0.05)
    guess = guess_from_surroundings(ids_NPQ, 8)
    assert guess.alone == pytest.approx(3, abs=0.02)
    sides = [(across, along) for along in (1, 2, 2, 1) for across in (1, 2, 2, 2, 2, 1)]  # who knows all, and who only chance
    expected = np.mean([-math.log2((across + along / 8) / (across + along)) for across, along in sides])
    assert guess.surrounded == pytest.approx(expected, abs=0.05)
    assert guess.share == pytest.approx(1 - expected / 3, abs=0.02)


def guess_by_hand(ids_NPQ: np.ndarray, codes: int) -> tuple[float, float]:
    """The same definition, cell by cell."""
    learned, asked = ids_NPQ[::2], ids_NPQ[1::2]
    share = np.bincount(learned.ravel(), minlength=codes) + 0.5
    share = share / share.sum()
    sides = [(-1, 0), (1, 0), (0, -1), (0, 1)]
    rows, columns = learned.shape[1:]

    def pairs(grid, down, right):
        for p in range(rows):
            for q in range(columns):
                if 0 <= p + down < rows and 0 <= q + right < columns:
                    yield p, q, grid[p + down, q + right], grid[p, q]

    followers = {side: Counter((given, told) for grid in learned for _, _, given, told in pairs(grid, *side)) for side in sides}
    totals = {side: Counter(given for grid in learned for _, _, given, _ in pairs(grid, *side)) for side in sides}
    bits = []
    for grid in asked:
        chances = {}
        for side in sides:
            for p, q, given, told in pairs(grid, *side):
                chance = (followers[side][given, told] + PRIOR * share[told]) / (totals[side][given] + PRIOR)
                chances.setdefault((p, q), []).append(chance)
        bits += [-np.log2(np.mean(values)) for values in chances.values()]
    return float(-np.log2(share[asked]).mean()), float(np.mean(bits))


def test_guessing_is_what_it_says():
    ids_NPQ = torch.cumsum(tokens(2, 14, 4, 5, codes=3), 2) % 7
    guess = guess_from_surroundings(ids_NPQ, 7)
    assert (guess.alone, guess.surrounded) == pytest.approx(guess_by_hand(ids_NPQ.numpy(), 7), abs=1e-10)
    assert guess_from_surroundings(tokens(3, 400, 5, 5), 8).share < 0.01


def test_tokens_of_cells_alone_move_along_with_their_cells():
    image_KCHW = torch.from_numpy(structured(20, SIDE)[0])[:, None] / 255
    found = stability(ByCell(), image_KCHW, ByCell().encode(image_KCHW))
    assert list(found) == ["1 pixel", "2 pixels", "1 cell", "flip"]
    assert found["1 cell"][0] == found["flip"][0] == 1
    assert 0.1 < found["2 pixels"][0] < found["1 pixel"][0] < 1
    unmoved = stability(ByPlace(), image_KCHW, ByPlace().encode(image_KCHW))
    assert (unmoved["1 cell"][0], unmoved["1 pixel"][0]) == (0, 1)


class OfOneSize(ByCell):
    """As a net whose positions are of one grid."""

    image_size = SIDE

    def encode(self, image_BCHW):
        assert image_BCHW.shape[2:] == (SIDE, SIDE)
        return super().encode(image_BCHW)


def test_a_tokenizer_of_one_size_is_moved_over_images_a_cell_larger():
    image_KCHW = torch.from_numpy(structured(20, SIDE)[0])[:, None] / 255
    found = stability(OfOneSize(), image_KCHW, OfOneSize().encode(image_KCHW))
    larger_KCHW = resize(image_KCHW, [SIDE + STRIDE] * 2, antialias=False)
    assert found == stability(ByCell(), larger_KCHW, ByCell().encode(larger_KCHW)) | {"flip": found["flip"]}
    assert found["1 cell"][0] == found["flip"][0] == 1


def test_chance_agreement_is_that_of_shuffled_tokens():
    one, other = tokens(0, 400, 10), tokens(1, 400, 10)
    share, chance = agreement(one, other, 8)
    assert share == pytest.approx((one.numpy() == other.numpy()).mean())
    assert share == pytest.approx(chance, abs=0.02)


def test_explained_variance_is_scikit_learns():
    random = np.random.default_rng(0)
    image, drawn = random.random((2, 6, 3, 8, 8)) * np.array([0.2, 0.5, 1])[None, :, None, None]
    drawn = 0.8 * image + 0.2 * drawn
    found = fidelity(torch.from_numpy(image), torch.from_numpy(drawn), 4)
    rows, cells = (lambda x: np.moveaxis(x, 1, -1).reshape(-1, 3)), (lambda x: x.reshape(6, 3, 2, 4, 2, 4).transpose(3, 5, 0, 1, 2, 4))
    assert found.mse == pytest.approx(((image - drawn) ** 2).mean())
    assert found.explained == pytest.approx(r2_score(rows(image), rows(drawn), multioutput="variance_weighted"))
    centred, missed = cells(image) - cells(image).mean((0, 1)), cells(drawn - image) - cells(drawn - image).mean((0, 1))
    assert found.detail == pytest.approx(1 - (missed**2).sum() / (centred**2).sum())


def test_a_mosaic_of_plain_cells_has_no_detail():
    image = torch.from_numpy(noise(0, 4, 1, 8, 8)) / 255
    mosaic = torch.nn.functional.avg_pool2d(image, 4).repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert fidelity(image, mosaic, 4).detail == pytest.approx(0, abs=1e-6)
    assert fidelity(image, image, 4).detail == fidelity(image, image, 4).explained == 1


def test_the_yardstick_is_as_good_as_scikit_learns_k_means():
    image = torch.from_numpy(crops(48, 32)).permute(0, 3, 1, 2) / 255
    codes, drawn = kmeans_yardstick(image[::2], image[1::2], 4, 64)
    assert codes == 64
    cells = image.reshape(-1, 3, 8, 4, 8, 4).permute(0, 2, 4, 1, 3, 5).reshape(len(image), -1, 48)
    learned, asked = (cells[first::2].flatten(0, 1).numpy() for first in (0, 1))
    theirs = KMeans(64, n_init=1, random_state=0).fit(learned)
    error = ((theirs.cluster_centers_[theirs.predict(asked)] - asked) ** 2).mean()
    assert fidelity(image[1::2], drawn, 4).mse == pytest.approx(error, rel=0.15)
    assert kmeans_yardstick(image[::2], image[1::2], 4, 8192)[0] == 24 * 64 // 16  # no more codes than the cells can fill


# Verdicts


def gratings(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Grey waves of a few pixels, of any direction: detail that drawn shapes have nothing of."""
    random = np.random.default_rng(seed)
    ends = (0, 3.14), (0, 6.28), (2.5, 6), (0, 100), (150, 255)
    angle, phase, period, low, high = (random.uniform(*each, (count, 1, 1)) for each in ends)
    y, x = np.mgrid[:side, :side]
    wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period + phase)
    return (low + (high - low) * (0.5 + 0.5 * wave)).astype(np.uint8)


def photographs_in_grey(count: int) -> np.ndarray:
    """Crops of two photographs, in no order."""
    return np.random.default_rng(0).permutation(crops(count, SIDE)).mean(3).astype(np.uint8)


@pytest.fixture(scope="module")
def domains() -> dict[str, list[torch.Tensor]]:
    """Drawn shapes, waves and photographs: images to learn from and held-out ones, in [0, 1]."""
    pixels = {"shapes": structured(500, SIDE)[0], "gratings": gratings(500, SIDE), "photographs": photographs_in_grey(500)}
    return {name: list((torch.from_numpy(images)[:, None] / 255).split(300)) for name, images in pixels.items()}


def trained(image_BCHW: torch.Tensor, codes: int = 64) -> DVAE:
    torch.manual_seed(0)
    dvae = DVAE(codes, STRIDE, image_BCHW.shape[1], width=16, code_width=16)
    dvae.seed_codebook(image_BCHW)
    return dvae.eval().requires_grad_(False)


def looked_at(tokenizer, image_BCHW):
    return measure(tokenizer, collect(tokenizer, image_BCHW.split(50)))


@pytest.mark.parametrize("domain", ["shapes", "photographs"])
def test_a_tokenizer_of_the_domain_is_healthy(domains, domain):
    learned, held_out = domains[domain]
    tokenizer = trained(learned)
    figures = looked_at(tokenizer, held_out)
    assert judge(figures).word == HEALTHY
    assert judge(figures, reference_of(looked_at(tokenizer, learned))).word == HEALTHY
    assert "reference" in judge(figures, reference_of(figures)).compared
    assert "no reference" in judge(figures).compared


@pytest.mark.parametrize(("own", "other"), [("shapes", "gratings"), ("gratings", "shapes"), ("gratings", "photographs")])
def test_a_tokenizer_of_another_domain_is_blind(domains, own, other):
    tokenizer = trained(domains[own][0])
    reference = reference_of(looked_at(tokenizer, domains[own][1]))
    verdict = judge(looked_at(tokenizer, domains[other][1]), reference)
    assert verdict.word == BLIND, verdict
    assert any("own held-out images" in reason or "k-means" in reason for reason in verdict.reasons)


@pytest.mark.parametrize("domain", ["shapes", "photographs"])
@pytest.mark.parametrize("codes", [64, 2048])
def test_a_tokenizer_that_never_learned_is_collapsed(domains, domain, codes):
    for seed in range(3):
        torch.manual_seed(seed)
        assert judge(looked_at(DVAE(codes, STRIDE, 1).eval(), domains[domain][1])).word == COLLAPSED


def with_few_codes(tokenizer: DVAE, kept: int) -> DVAE:
    """All codes but the first few are out of reach, as those of a codebook that collapsed are."""
    with torch.no_grad():
        tokenizer.codebook.anchor_VD[kept:] = 1e3
    return tokenizer


@pytest.mark.parametrize("domain", ["shapes", "photographs"])
def test_a_codebook_of_which_little_is_left_is_collapsed_wherever_it_is_looked_at(domains, domain):
    tokenizer = with_few_codes(trained(domains["shapes"][0], 512), 9)
    reference = reference_of(looked_at(tokenizer, domains["shapes"][1]))
    figures = looked_at(tokenizer, domains[domain][1])
    assert figures.codes_used <= 9
    assert judge(figures, reference).word == judge(figures).word == COLLAPSED


def test_codes_that_draw_little_of_what_k_means_does_are_collapsed_however_many_are_used(domains):
    learned, held_out = domains["shapes"]
    tokenizer = trained(learned)
    tokenizer.codebook.anchor_VD.mul_(0.05)
    figures = looked_at(tokenizer, held_out)
    assert figures.codes_used > 40
    assert 0.1 < figures.explained < 0.2 < figures.yardstick_explained
    verdict = judge(figures)
    assert verdict.word == COLLAPSED
    assert verdict.reasons == ("reconstructions explain 12% of the images' variance, less than 25% of the 86% that k-means does",)
    assert judge(replace(figures, yardstick_explained=0.3)).word != COLLAPSED  # images that nothing of this size draws well


def test_losing_more_than_at_home_and_than_k_means_is_blind(domains):
    figures = replace(looked_at(trained(domains["shapes"][0]), domains["shapes"][1]), yardstick_explained=0.9)
    reference = reference_of(replace(figures, explained=0.95))
    words = [judge(replace(figures, explained=explained), reference).word for explained in (0.88, 0.86)]
    assert words == [HEALTHY, BLIND]
    assert judge(replace(figures, explained=0.86), reference_of(replace(figures, explained=0.92))).word == HEALTHY


def test_few_codes_or_large_cells_are_coarse(domains):
    learned, held_out = domains["shapes"]
    assert judge(looked_at(trained(learned, 6), held_out)).word == COARSE
    torch.manual_seed(0)
    large = DVAE(10, 16, 1, width=16, code_width=16)
    large.seed_codebook(learned)
    assert judge(looked_at(large.eval(), held_out)).word == COARSE


def test_dead_codes_are_coarse_where_all_could_have_been_used_and_collapsed_where_the_others_say_little(domains):
    figures = replace(looked_at(trained(domains["shapes"][0]), domains["shapes"][1]), vocab_size=512, non_blank=16 * 512)
    reference = reference_of(replace(figures, codes_used=180))
    with_codes = {used: judge(replace(figures, codes_used=used, perplexity_non_blank=60.0)) for used in (200, 210)}
    assert [judge(replace(figures, codes_used=170), told).word for told in (reference, None)] == [COARSE, COLLAPSED]
    assert [verdict.word for verdict in with_codes.values()] == [COARSE, HEALTHY]
    assert with_codes[200].reasons == ("200 of 512 codes in use, less than 40%: the others are dead, and a codebook without them would "
                                       "tell as much",)  # fmt: skip
    assert judge(replace(figures, codes_used=200, perplexity_non_blank=60.0, non_blank=16 * 512 - 1)).word == HEALTHY
    assert [judge(replace(figures, codes_used=used, perplexity_non_blank=22.0)).word for used in (170, 171)] == [COLLAPSED, COARSE]
    alive = looked_at(trained(domains["shapes"][0], 128), domains["shapes"][1])
    few = looked_at(with_few_codes(trained(domains["shapes"][0], 128), 46), domains["shapes"][1])
    assert (judge(alive).word, judge(few).word) == (HEALTHY, COARSE)
    assert any("codes in use, less than 40%" in reason for reason in judge(few).reasons)


def test_tokens_that_hang_on_the_place_are_blind(domains):
    verdict = judge(looked_at(ByPlace(), domains["shapes"][1]))
    assert verdict.word == BLIND
    assert "where its cell is" in verdict.reasons[0]


def test_tokens_that_change_at_random_are_blind(domains):
    class Hashing(ByCell):
        def encode(self, image_BCHW):
            sums_B = (image_BCHW.double().sum((1, 2, 3)) * 1e4).long()[:, None, None]  # the least change anywhere changes all of them
            return ((sums_B + torch.arange(1, 1 + image_BCHW[0, 0].numel() // 16).view(image_BCHW.shape[2] // 4, -1)) * 7919 % 104729) % 32

    figures = looked_at(Hashing(), domains["photographs"][1])
    assert figures.explained is None
    assert "by a cell" in judge(figures).reasons[-1]
    assert judge(figures).word == BLIND
    assert judge(looked_at(ByCell(), domains["photographs"][1])).word == HEALTHY


def test_figures_do_not_hang_on_how_images_are_cut_into_batches(domains):
    tokenizer, image_BCHW = trained(domains["shapes"][0]), domains["shapes"][1]
    before = torch.get_rng_state()
    one, other = (measure(tokenizer, collect(tokenizer, image_BCHW.split(size), keep=40)) for size in (7, 120))
    assert torch.equal(torch.get_rng_state(), before)
    assert replace(one, pixel_std=[], pixel_mean=[]) == replace(other, pixel_std=[], pixel_mean=[])
    assert one.pixel_std == pytest.approx([float(image_BCHW.std(correction=0))], rel=1e-6)
    counts = np.bincount(tokenizer.encode(image_BCHW).flatten(), minlength=64)
    assert one.perplexity == pytest.approx(math.exp(entropy(counts)))
    assert (one.codes_used, one.top1) == ((counts > 0).sum(), pytest.approx(counts.max() / counts.sum()))
    assert one.top10 == pytest.approx(np.sort(counts)[-10:].sum() / counts.sum())


# The command


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`run` (a tokenizer's training), `data`, `held-out` and `gratings`."""
    folder = tmp_path_factory.mktemp("doctor")
    for name, images in (("data", structured(300, SIDE, 0)[0]), ("held-out", structured(120, SIDE, 1)[0]),
                         ("gratings", gratings(200, SIDE))):  # fmt: skip
        pack(idx_files(folder / f"{name}-idx", images), folder / name)
    run_here("dvae", dvae_arguments(folder, folder / "run", dvae__vocab_size=48, dvae__code_width=16, dvae__seed_images=300))
    return folder


def command(monkeypatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["mimetic", "doctor", *map(str, words)])
    dispatch()


def colours(png: bytes) -> int:
    return len(Image.open(io.BytesIO(png)).convert("RGB").getcolors(1 << 24))


def test_the_command_tells_and_writes_all_of_it(place, tmp_path, monkeypatch, capsys):
    command(monkeypatch, place / "run", place / "held-out", "--out", tmp_path / "out", "--json", tmp_path / "there/figures.json")
    told = capsys.readouterr().out
    assert f"on 120 of the 120 images of {place}/held-out, at 16x16 pixels: 16 tokens each" in told
    assert "verdict: healthy" in told
    assert "reference figures of its own held-out images" in told
    assert "collapsed below 4.7" in told  # 48 ** 0.4
    assert "of 48 occur (coarse below 20)" in told
    content = json.loads((tmp_path / "out/doctor.json").read_text())
    assert content == json.loads((tmp_path / "there/figures.json").read_text())
    assert content["verdict"]["word"] == "healthy"
    assert content["tokenizer"]["sha256"] == tokenizer_hash(place / "run")
    assert content["data"]["fingerprint"] == open_set(place / "held-out").fingerprint
    assert content["reference"] == provenance_of(place / "run")["reference"]
    assert {"collapsed_entropy", "coarse_explained", "blind_detail"} <= content["thresholds"].keys()
    figures = content["figures"]
    assert (figures["images"], figures["cells"], len(figures["position_entropy"])) == (120, 1920, 4)
    assert figures["explained"] == pytest.approx(content["reference"]["explained"], abs=1e-6)  # it was measured on these very images
    page = (tmp_path / "out/doctor.md").read_text()
    assert page.startswith("# Verdict: healthy\n")
    for name in ("reconstructions", "tokens", "codes", "entropy"):
        assert f"![]({name}.png)" in page
        assert colours((tmp_path / "out" / f"{name}.png").read_bytes()) > 20
    assert not list((tmp_path / "out").glob(".*"))


def test_another_domain_is_told_and_ends_well(place, monkeypatch, capsys):
    command(monkeypatch, place / "run", place / "gratings", "--images", "190")
    told = capsys.readouterr().out
    assert "on 190 of the 200 images" in told
    assert f"verdict: {BLIND}" in told
    assert f"train one on images like these: tokenizers/train_dvae.py --data.index {place}/gratings" in told


def test_a_tokenizer_without_reference_is_held_against_limits_alone(place, tmp_path, monkeypatch, capsys):
    save_tokenizer(trained(torch.from_numpy(structured(300, SIDE, 0)[0])[:, None] / 255), tmp_path / "old")
    command(monkeypatch, tmp_path / "old", place / "held-out")
    assert "at 16x16 pixels" in (told := capsys.readouterr().out)  # the images' own size
    assert "has no reference figures" in told
    assert "of 64 occur (collapsed below 22, coarse below 26)" in told


def test_many_channels_and_large_images_are_drawn_and_fit(tmp_path):
    images = {f"{i:02d}.npy": as_npy(noise(i, 5, 5, 13).repeat(8, 0).repeat(9, 1)) for i in range(24)}
    pack(folder_of(tmp_path / "files", images), tmp_path / "data")
    assert fitting_size(open_set(tmp_path / "data"), 8) == 40
    floats = {f"{number}.npy": as_npy(np.random.default_rng(number).random((47, 60, 2))) for number in range(3)}
    pack(folder_of(tmp_path / "floats", floats), tmp_path / "deep", range=(0, 1))
    assert fitting_size(open_set(tmp_path / "deep"), 8) == 40
    batch = next(iter(ShardStream(open_set(tmp_path / "data"), 24, transform=ClassifyViews(40, None))))
    save_tokenizer(trained(batch["image"] / 255, 16), tmp_path / "tokenizer")
    examine(str(tmp_path / "tokenizer"), str(tmp_path / "data"), tmp_path / "out")
    for name in ("reconstructions", "tokens", "codes", "entropy"):
        assert colours((tmp_path / "out" / f"{name}.png").read_bytes()) > 20


def test_a_tokenizer_of_one_size_that_does_not_decode_is_examined_too(place, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    vqkd = VQKD(16, 1, "vit_tiny_patch16_224", SIDE, TINY, code_width=8)
    vqkd.start_codebook(torch.from_numpy(structured(100, SIDE)[0])[:, None] / 255)
    save_tokenizer(vqkd, tmp_path / "vqkd")
    command(monkeypatch, tmp_path / "vqkd", place / "held-out", "--out", tmp_path / "out")
    told = capsys.readouterr().out
    assert "this tokenizer does not decode" in told
    assert "it does not decode, so what its tokens tell is not judged" in told
    assert "under 1 cell they move along" in told
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"doctor.json", "doctor.md", "tokens.png", "codes.png", "entropy.png"}
    with pytest.raises(SettingError, match="--image-size 32: the tokenizer takes images of 16 pixels alone; leave it out"):
        command(monkeypatch, tmp_path / "vqkd", place / "held-out", "--image-size", 32)
    with pytest.raises(SettingError, match="takes images of 16 pixels alone and would get 32; take a backbone of 4 cells a side"):
        run_here("beit", beit_arguments(place, tmp_path / "beit", tokenizer__path=tmp_path / "vqkd", backbone__image_size=32))


def test_token_maps_and_sheets_show_what_they_say(domains):
    ids_KPQ = torch.tensor([[[0, 1], [1, 2]]])
    map_K3HW = token_colours(ids_KPQ, ids_KPQ, 3, 4)
    assert map_K3HW.shape == (1, 3, 8, 8)
    assert torch.equal(map_K3HW[0, :, 0, 4], map_K3HW[0, :, 7, 0])
    assert len(map_K3HW[0].flatten(1).T.unique(dim=0)) == 3
    pixels = np.asarray(Image.open(io.BytesIO(sheet([torch.full((2, 1, 8, 8), 0.25)]))))
    assert pixels.shape[0] > 100
    assert tuple(pixels[50, 50]) == (64, 64, 64)
    one_code = collect(with_few_codes(trained(domains["shapes"][0]), 1), domains["shapes"][1].split(50))
    assert colours(code_figure(one_code, 64, 4)) > 20


def test_mistakes_are_one_line_with_the_cure(place, tmp_path, monkeypatch):
    pack(folder_of(tmp_path / "colour", {f"{i}.png": encoded(noise(i, 16, 16, 3)) for i in range(4)}), tmp_path / "rgb")
    pack(folder_of(tmp_path / "dark", {f"{i}.png": encoded(np.full((16, 16), i, np.uint8)) for i in range(4)}), tmp_path / "blank")
    pack(folder_of(tmp_path / "single", {"a.png": encoded(noise(0, 16, 16))}), tmp_path / "one")
    (tmp_path / "file").write_text("")
    cases: list[tuple[type[MimeticError], str, list]] = [
        (SettingError, r"images of 1 channels, those of .*rgb have 3; pack them with --channels 1", [place / "run", tmp_path / "rgb"]),
        (SettingError, "18 is no multiple of the tokenizer's stride 4; use 16", [place / "run", place / "data", "--image-size", "18"]),
        (SettingError, "--images 1: ", [place / "run", place / "data", "--images", "1"]),
        (SettingError, "file is no folder that can be written", [place / "run", place / "held-out", "--out", tmp_path / "file"]),
        (CheckpointError, "no tokenizer there", [tmp_path, place / "data"]),
        (DataError, "index.json", [place / "run", tmp_path / "nothing"]),
        (DataError, "0 of 64 cells show anything at all", [place / "run", tmp_path / "blank"]),
        (DataError, "1 images that can be read are too few", [place / "run", tmp_path / "one"]),
    ]  # fmt: skip
    for kind, line, words in cases:
        with pytest.raises(kind, match=line) as caught:
            command(monkeypatch, *words)
        assert "\n" not in str(caught.value)


def test_reference_figures_of_another_version_are_refused(place, tmp_path):
    save_tokenizer(trained(torch.rand(50, 1, 16, 16)), tmp_path / "other", {"reference": {"perplexity": 3}})
    with pytest.raises(CheckpointError, match="lack images"):
        examine(str(tmp_path / "other"), str(place / "held-out"))


# Before a pretraining


@pytest.fixture(scope="module")
def collapsed(place) -> Path:
    save_tokenizer(with_few_codes(trained(torch.from_numpy(structured(300, SIDE, 0)[0])[:, None] / 255), 2), place / "collapsed")
    return place / "collapsed"


def test_a_pretraining_says_how_its_tokenizer_does(place, tmp_path, capsys):
    run_here("beit", beit_arguments(place, tmp_path / "run", tokenizer__path=place / "run", train__steps=1))
    told = capsys.readouterr().out
    assert re.search(rf"^tokenizer {place}/run: 4\d of 48 codes in use on 256 images, perplexity [\d.]+: healthy$", told, re.MULTILINE)


def test_a_pretraining_refuses_a_collapsed_tokenizer_before_anything_is_written(place, collapsed, tmp_path):
    arguments = beit_arguments(place, tmp_path / "run", tokenizer__path=collapsed, train__steps=2)
    line = r"2 of 64 codes in use on 256 images, perplexity .*: collapsed .*tokenizer.accept_collapsed"
    with pytest.raises(SettingError, match=line) as caught:
        run_here("beit", arguments)
    assert caught.value.together
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_it_trains_with_a_collapsed_tokenizer_when_told_and_goes_on_without_a_look(place, collapsed, tmp_path, capsys):
    arguments = beit_arguments(place, tmp_path / "run", tokenizer__path=collapsed, train__steps=2, evaluate_on=place / "held-out")
    run_here("beit", [*arguments, "--tokenizer.accept_collapsed", "true"])
    assert "2 of 64 codes in use on 120 images" in capsys.readouterr().out  # held-out ones, where there are some
    run_here("beit", [*arguments, "--train.steps", "3", "--allow", "train.steps"])  # accept_collapsed changes no number
    assert "codes in use" not in capsys.readouterr().out
    assert len(losses(tmp_path / "run")) == 3


def test_the_look_draws_no_random_numbers_and_is_short_for_a_large_tokenizer(place, monkeypatch, capsys):
    from mimetic.tokenizers.files import open_tokenizer

    class Target:
        def __call__(self, images, seeds_B):
            return {"target": ClassifyViews(SIDE, None)(images, seeds_B)["image"]}

    index, settings = open_set(place / "data"), TokenizerSettings(str(place / "run"))
    tokenizer = open_tokenizer(place / "run")
    before = torch.get_rng_state()
    for large, images in ((screening.LARGE, 256), (10, 32)):
        monkeypatch.setattr(screening, "LARGE", large)
        stream = ShardStream(index, screening.LOOKED_AT, transform=Target())
        screening.look_at_tokenizer(tokenizer, settings, stream, torch.device("cpu"), main=True)
        assert f"on {images} images" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), before)


def test_blank_images_are_no_reason_to_refuse_a_pretraining(place, tmp_path, capsys):
    pack(folder_of(tmp_path / "dark", {f"{i}.png": encoded(np.full((16, 16), i, np.uint8)) for i in range(16)}), tmp_path / "data")
    run_here("beit", beit_arguments(tmp_path, tmp_path / "run", tokenizer__path=place / "run", train__steps=1))
    assert "not judged (0 of 256 cells show anything at all" in capsys.readouterr().out
