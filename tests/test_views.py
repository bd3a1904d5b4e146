"""Views against torchvision's and Pillow's, and the promise that both views of BEiT show the same thing."""

import io
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from imagesets import encoded, noise
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from mimetic.data.jitter import jittered
from mimetic.data.masks import BlockMasks
from mimetic.data.picture import Picture
from mimetic.data.randomness import mix, uniform
from mimetic.data.views import FLIP, JITTER, Augmentation, ClassifyViews, Normalize, PretrainViews, random_boxes, resized

SEEDS = mix(3, np.arange(2000))


def ramps(height: int, width: int) -> torch.Tensor:
    """Red is the row, green the column, blue is nothing: a crop's channel means tell where it lies."""
    y, x = torch.linspace(0, 255, height), torch.linspace(0, 255, width)
    return torch.stack([y[:, None].expand(height, width), x[None].expand(height, width), torch.zeros(height, width)]).to(torch.uint8)


def photo(seed: int, side: int = 64) -> torch.Tensor:
    """Smooth structure, as photos have and noise has not."""
    coarse = torch.from_numpy(noise(seed, 3, 6, 6)).float()[None]
    return F.interpolate(coarse, side, mode="bicubic")[0].clamp(0, 255).to(torch.uint8)


def pixelwise_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(np.corrcoef(a.flatten().float(), b.flatten().float())[0, 1])


# Crops


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.9)], ids=str)
@pytest.mark.parametrize("size", [(224, 224), (300, 200), (120, 500), (28, 28)], ids=str)
def test_boxes_are_distributed_as_torchvisions(size, scale):
    torch.manual_seed(5)
    ratio = [3 / 4, 4 / 3]
    blank = torch.empty(1, *size)
    theirs = np.array([v2_get_params(blank, list(scale), ratio) for _ in range(len(SEEDS))])
    ours = random_boxes(SEEDS, np.tile(size, (len(SEEDS), 1)), scale)
    for a, b in zip(measures(ours), measures(theirs), strict=True):
        assert stats.ks_2samp(a, b).pvalue > 0.001
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= size).all()


@pytest.mark.parametrize("scale", [(0.08, 1.0), (1.0, 1.0)], ids=str)
def test_boxes_of_a_tiny_image_are_as_common_as_torchvisions(scale):
    """Where some tries fit and others do not, and few boxes are possible."""
    torch.manual_seed(5)
    blank = torch.empty(1, 3, 2)
    theirs = [v2_get_params(blank, list(scale), [3 / 4, 4 / 3]) for _ in range(len(SEEDS))]
    ours = [tuple(box) for box in random_boxes(SEEDS, np.tile((3, 2), (len(SEEDS), 1)), scale).tolist()]
    boxes = sorted({*ours, *theirs})
    counts = [[Counter(drawn)[box] for box in boxes] for drawn in (ours, theirs)]
    assert len(boxes) > 2
    assert stats.chi2_contingency(counts).pvalue > 0.001


def measures(boxes: np.ndarray) -> list[np.ndarray]:
    """Area, aspect, and the place in both directions, together and apart."""
    top, left, height, width = boxes.T
    return [height * width, np.log(width / height), top, left, top - left]


def v2_get_params(image: torch.Tensor, scale: list[float], ratio: list[float]) -> tuple[int, int, int, int]:
    params = v2.RandomResizedCrop(8, scale, ratio).make_params([image])
    return params["top"], params["left"], params["height"], params["width"]


@pytest.mark.parametrize("size", [(10, 1000), (1000, 10), (1, 1), (1, 400), (400, 1), (5, 2)], ids=str)
def test_where_nothing_fits_the_box_is_torchvisions_central_one(size):
    ours = random_boxes(SEEDS[:1], np.array([size]), (1.0, 1.0))[0]
    assert tuple(ours) == v2_get_params(torch.empty(1, *size), [1.0, 1.0], [3 / 4, 4 / 3])


def test_a_scale_of_one_takes_the_whole_of_a_square():
    assert (random_boxes(SEEDS, np.tile((28, 28), (len(SEEDS), 1)), (1.0, 1.0)) == (0, 0, 28, 28)).all()


def test_boxes_of_images_of_all_sizes_are_drawn_each_by_its_own():
    sizes = np.stack([20 + np.arange(50), 90 - np.arange(50)], 1)
    together = random_boxes(SEEDS[:50], sizes, (0.2, 1.0))
    alone = [random_boxes(SEEDS[i : i + 1], sizes[i : i + 1], (0.2, 1.0))[0] for i in range(50)]
    assert (together == np.stack(alone)).all()


# Augmentation


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_flips_come_as_often_as_asked(share):
    image = ramps(4, 6)
    crops = Augmentation((1.0, 1.0), flip=share)([image] * len(SEEDS), SEEDS)
    flipped = np.array([bool(crop[1, 0, 0] > crop[1, 0, -1]) for crop in crops])
    assert abs(flipped.mean() - share) <= 4 * np.sqrt(share * (1 - share) / len(SEEDS))


def test_shifts_are_even_in_every_direction_over_black():
    point = torch.zeros(1, 9, 9, dtype=torch.uint8)
    point[0, 4, 4] = 255
    crops = list(Augmentation((1.0, 1.0), shift=2, flip=0)([point] * len(SEEDS), SEEDS))
    places = np.array([divmod(int(crop.argmax()), 9) for crop in crops]) - 2
    assert all(crop.sum() == 255 and crop.shape == point.shape for crop in crops)
    counts = np.bincount(places[:, 0] * 5 + places[:, 1], minlength=25)
    assert counts.shape == (25,)
    assert stats.chisquare(counts).pvalue > 0.001


def test_jitter_is_a_brightness_between_its_bounds_on_a_flat_grey_image():
    flat = torch.full((1, 4, 4), 100, dtype=torch.uint8)
    factors = np.array([float(crop.float().mean()) for crop in Augmentation((1.0, 1.0), jitter=0.4)([flat] * len(SEEDS), SEEDS)]) / 100
    assert stats.kstest(factors, "uniform", (0.6, 0.8)).pvalue > 0.001  # contrast leaves a flat image as it is


def test_jitter_changes_contrast_and_saturation_as_torchvision_does():
    image = photo(1, 16)
    seen = []
    for crop in Augmentation((1.0, 1.0), flip=0, jitter=0.4)([image] * 300, SEEDS[:300]):
        spread = crop.float().std((1, 2)).mean() / image.float().std((1, 2)).mean()
        saturation = (crop.float().amax(0) - crop.float().amin(0)).mean() / (image.float().amax(0) - image.float().amin(0)).mean()
        seen.append([float(spread), float(saturation)])
    torch.manual_seed(0)
    jitter = v2.ColorJitter(0.4, 0.4, 0.4)
    theirs = []
    for crop in (jitter(image) for _ in range(300)):
        spread = crop.float().std((1, 2)).mean() / image.float().std((1, 2)).mean()
        saturation = (crop.float().amax(0) - crop.float().amin(0)).mean() / (image.float().amax(0) - image.float().amin(0)).mean()
        theirs.append([float(spread), float(saturation)])
    for ours, expected in zip(np.transpose(seen), np.transpose(theirs), strict=True):
        assert stats.ks_2samp(ours, expected).pvalue > 0.001


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
@pytest.mark.parametrize("factors", [(1.4, 0.6, 1.4), (0.6, 1.4, 0.6), (1.3, 1.4, 1.4), (2, 2, 2), (0, 0, 0), (1, 1, 1)], ids=str)
def test_jitter_is_torchvisions_to_a_few_grey_levels(factors, order):
    """Noise meets every clamp; more pixels than are worked on at a time, in lines that no power of two divides."""
    for image in (torch.from_numpy(noise(1, 3, 131, 227)), photo(2, 33), torch.zeros(3, 8, 8, dtype=torch.uint8), photo(3, 20)[:1]):
        expected = image
        for i in order:
            if i < 2 or len(image) == 3:
                expected = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)[i](expected, float(factors[i]))
        error = (jittered(image, np.array(factors), np.array(order)).int() - expected.int()).abs().float()
        assert error.max() <= (4 if max(factors) <= 1.4 else 7)  # a level lost in one step grows in the next
        assert error.mean() <= (0.8 if max(factors) <= 1.4 else 1.2)


# Both views


def test_views_without_resizing_are_equal_to_the_last_bit_jitter_included():
    images = [photo(i, 28) for i in range(40)]
    batch = PretrainViews(28, 28, Augmentation((1.0, 1.0), shift=3, jitter=0.4), None)(images, SEEDS[:40])
    assert torch.equal(batch["image"], batch["target"])
    assert not torch.equal(batch["image"], torch.stack(images))
    assert "hidden" not in batch


def test_the_backbone_sees_bicubic_and_the_tokenizer_lanczos():
    images, augmentation = [photo(i) for i in range(4)], Augmentation((0.2, 1.0), jitter=0.4)
    batch = PretrainViews(32, 16, augmentation, None)(images, SEEDS[:4])
    crops = list(augmentation(images, SEEDS[:4]))
    assert torch.equal(batch["image"], resized(crops, 4, (32, "bicubic"))[0])
    assert torch.equal(batch["target"], resized(crops, 4, (16, "lanczos"))[0])


@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_both_views_show_the_same_crop_and_flip(jitter):
    images = [photo(i) for i in range(40)]
    batch = PretrainViews(32, 16, Augmentation((0.2, 1.0), jitter=jitter), None)(images, SEEDS[:40])
    halved = F.avg_pool2d(batch["image"].float(), 2)
    assert batch["target"].shape == (40, 3, 16, 16)
    agreement = [pixelwise_correlation(*pair) for pair in zip(halved, batch["target"], strict=True)]
    turned = [pixelwise_correlation(*pair) for pair in zip(halved.flip(-1), batch["target"], strict=True)]
    assert min(agreement) > 0.98
    assert np.median(turned) < 0.7
    assert (halved - batch["target"].float()).abs().mean() < 3


def test_both_views_lie_at_the_same_place_of_the_picture():
    batch = PretrainViews(24, 12, Augmentation((0.1, 0.6)), None)([ramps(90, 70)] * 100, SEEDS[:100])
    places = [batch[name].float().mean((2, 3))[:, :2] for name in ("image", "target")]
    assert (places[0] - places[1]).abs().max() < 1.5
    assert (places[0].std(0) > 20).all()
    left_to_right = [batch[name][:, 1, :, -1].float().mean(1) > batch[name][:, 1, :, 0].float().mean(1) for name in ("image", "target")]
    assert torch.equal(*left_to_right)
    assert 20 < left_to_right[0].sum() < 80


def test_the_mask_does_not_follow_from_the_crop():
    """Crop, flip and mask of a sample come from separate numbers."""
    views = PretrainViews(8, 8, Augmentation((0.1, 1.0)), BlockMasks((8, 8), 24, 4))
    batch = views([ramps(60, 60)] * len(SEEDS), SEEDS)
    assert (batch["hidden"].sum((1, 2)) == 24).all()
    crop = batch["image"][:, :2].float().mean((2, 3))
    cells = batch["hidden"].float().flatten(1)
    correlation = np.corrcoef(torch.cat([crop, cells], 1).T)[:2, 2:]
    assert np.abs(correlation).max() < 4.5 / np.sqrt(len(SEEDS))


@pytest.mark.parametrize(("mode", "filter_"), [("bicubic", Image.BICUBIC), ("lanczos", Image.LANCZOS)],
                         ids=["bicubic", "lanczos"])  # fmt: skip
def test_resizing_is_pillows(mode, filter_):
    for seed, (height, width) in enumerate([(64, 64), (20, 31), (90, 17), (8, 8)]):
        pixels = noise(seed, height, width, 3)
        ours = resized([torch.from_numpy(pixels).permute(2, 0, 1)], 1, (16, mode))[0][0].permute(1, 2, 0).numpy()
        theirs = np.asarray(Image.fromarray(pixels).resize((16, 16), filter_))
        assert np.abs(ours.astype(int) - theirs).mean() < 0.6  # Pillow rounds between its two passes; bilinear would differ by 12


def test_arrays_of_five_channels_and_grey_images_pass_through_all_steps():
    for channels in (1, 5):
        images = [torch.from_numpy(noise(i, channels, 20, 30)) for i in range(4)]
        batch = PretrainViews(16, 8, Augmentation((0.3, 1.0), shift=2, jitter=0.4), BlockMasks((4, 4), 6, 2))(images, SEEDS[:4])
        assert batch["image"].shape == (4, channels, 16, 16)
        assert batch["target"].shape == (4, channels, 8, 8)
        assert batch["image"].dtype == batch["target"].dtype == torch.uint8


# Both views of real photographs, against the same steps done plainly

PHOTOS = [encoded(image, "jpeg", quality=92) for image in load_sample_images().images]  # 640x427


def plain_views(content: bytes, seed: int, sizes: tuple[int, int], jitter: float, grid: bool) -> tuple[list[np.ndarray], bool]:
    """Pillow and torchvision, step by step; where a small picture is enough, the box's edges lie on its pixels if `grid`."""
    seeds, picture = np.array([seed]), Image.open(io.BytesIO(content))
    box = random_boxes(seeds, np.array([picture.size[::-1]]), (0.08, 1.0))[0]
    eighths = next((e for e in (1, 2, 3, 4) if e * min(box[2:]) >= 8 * (sizes[0] + 1)), 8)
    edges = np.array([*box[:2], *(box[:2] + box[2:])])
    edges = np.rint((edges * eighths + 4) // 8 * 8 / eighths).astype(int) if grid else edges
    top, left, bottom, right = np.minimum(edges, [*picture.size[::-1]] * 2)
    crop = torch.from_numpy(np.array(picture)[top:bottom, left:right]).permute(2, 0, 1)
    factors = 1 + jitter * (2 * uniform(seeds[:, None], JITTER, 0, np.arange(3))[0] - 1)
    for i in uniform(seeds[:, None], JITTER, 1, np.arange(3))[0].argsort():
        crop = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)[i](crop, float(factors[i]))
    crop = TF.horizontal_flip(crop) if uniform(seeds, FLIP)[0] < 0.5 else crop
    whole = Image.fromarray(crop.permute(1, 2, 0).numpy())
    filters = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS
    return [np.array(whole.resize((size, size), kind)) for size, kind in zip(sizes, filters, strict=True)], eighths < 8


def differences(sizes: tuple[int, int], jitter: float, grid: bool = True) -> dict[bool, np.ndarray]:
    """Means and 99th percentiles of absolute differences of both views, (samples, 2, 2), without and with reduction."""
    views, found = PretrainViews(*sizes, Augmentation(jitter=jitter), None), {False: [], True: []}
    for i, seed in enumerate(SEEDS[:120]):
        batch = views([Picture(PHOTOS[i % 2], 3)], SEEDS[i : i + 1])
        expected, reduced = plain_views(PHOTOS[i % 2], seed, sizes, jitter, grid)
        ours = (batch[name][0].permute(1, 2, 0).numpy().astype(int) for name in ("image", "target"))
        errors = [np.abs(mine - theirs) for mine, theirs in zip(ours, expected, strict=True)]
        found[reduced].append([[error.mean(), np.quantile(error, 0.99)] for error in errors])
    return {reduced: np.array(values) for reduced, values in found.items() if values}


@pytest.mark.parametrize("jitter", [0.0, 0.4, 1.0])
def test_views_are_those_of_a_plain_pipeline(jitter):
    """Without reduction: rounding between the passes of a resize, and factors of jitter rounded to 1/256."""
    found = differences((224, 112), jitter)
    assert found.keys() == {False}
    worst = {0.0: (0.4, 1), 0.4: (1.2, 3), 1.0: (1.8, 3)}[jitter]  # of 120 samples: mean and 99th percentile, grey levels
    assert (found[False].max(0) <= worst).all(), found[False].max(0)
    assert (found[False].mean(0) <= (0.4, 2)).all(), found[False].mean(0)


@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_views_of_reduced_pictures_differ_by_what_the_decoder_averages(jitter):
    found = differences((64, 32), jitter)[True]
    assert len(found) > 60
    assert (found.mean(0) <= [(1.8, 12), (1.0, 7)]).all(), found.mean(0)  # mean and 99th percentile of `image` and `target`
    drawn = differences((64, 32), jitter, grid=False)[True]
    assert (drawn.mean(0) > found.mean(0)).all(), "edges lie on the reduced picture's pixels"
    assert (drawn.mean(0) <= [(4, 28), (2.6, 18)]).all(), drawn.mean(0)


# Classification and normalization


def test_evaluation_shows_the_largest_central_square():
    image = torch.from_numpy(noise(1, 3, 40, 30))
    batch = ClassifyViews(30, None)([image, image.flip(1)], SEEDS[:2])
    assert torch.equal(batch["image"][0], image[:, 5:35])
    assert torch.equal(batch["image"][1], image.flip(1)[:, 5:35])


def test_training_shows_what_the_augmentation_gives():
    images = [photo(i, 40) for i in range(6)]
    augmentation = Augmentation((0.3, 1.0), jitter=0.2)
    ours = ClassifyViews(16, augmentation)(images, SEEDS[:6])["image"]
    assert torch.equal(ours, resized(augmentation(images, SEEDS[:6]), 6, (16, "bicubic"))[0])


def test_normalization_is_torchvisions():
    image = torch.from_numpy(noise(1, 4, 3, 8, 8))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.1)
    torch.testing.assert_close(Normalize(mean, std)(image), v2.functional.normalize(image.float() / 255, list(mean), list(std)))
    assert not Normalize(mean, std).state_dict()
