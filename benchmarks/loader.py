"""What one core delivers of BEiT's two views and masks from photographs: ours, beside the usual ways and a bare decoder.

Run: python benchmarks/loader.py     fetches wallpapers (140 MB) the first time, then takes two to three minutes

One process, one thread, all ways in turn, several rounds; medians of the rates, and of the ratios within each round.
"""

import io
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from torchvision.transforms import ColorJitter, RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms import functional as TF
from wallpapers import photographs, small_ones

from mimetic.data.index import open_index
from mimetic.data.masks import BlockMasks
from mimetic.data.pack import pack
from mimetic.data.randomness import mix
from mimetic.data.stream import ShardStream
from mimetic.data.views import Augmentation, PretrainViews

BATCH, ROUNDS, SMALL_COUNT = 64, 5, 512
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GOALS = {"BEiT's own": {"small": 5, "large": 8}, "bare decoder": {"small": 0.5, "large": 0.5}}


def tars(folder: Path) -> webdataset.WebDataset:
    return webdataset.WebDataset([str(path) for path in sorted(folder.glob("shard-*.tar"))], shardshuffle=False)


def beit_mask(grid: int = 14, count: int = 75, smallest: int = 16, aspect: float = 0.3) -> np.ndarray:
    """masking_generator.py of BEiT, cell by cell."""
    mask, hidden = np.zeros((grid, grid), dtype=int), 0
    while hidden < count:
        added = 0
        for _ in range(10):
            area = random.uniform(smallest, count - hidden)
            ratio = math.exp(random.uniform(math.log(aspect), math.log(1 / aspect)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w < grid and h < grid:
                top, left = random.randint(0, grid - h), random.randint(0, grid - w)
                if 0 < h * w - mask[top : top + h, left : left + w].sum() <= count - hidden:
                    for i in range(top, top + h):
                        for j in range(left, left + w):
                            if mask[i, j] == 0:
                                mask[i, j] = 1
                                added += 1
                if added:
                    break
        if not added:
            break
        hidden += added
    return mask


def beit(folder: Path) -> Iterator[int]:
    """BEiT's datasets.py: jitter and flip of the whole picture, one crop at two sizes, normalized on the CPU."""
    jitter, flip = ColorJitter(0.4, 0.4, 0.4), RandomHorizontalFlip()
    for (content,) in tars(folder).to_tuple("jpg"):
        picture = flip(jitter(Image.open(io.BytesIO(content)).convert("RGB")))
        box = RandomResizedCrop.get_params(picture, (0.08, 1.0), (3 / 4, 4 / 3))
        view = TF.resized_crop(picture, *box, [224, 224], TF.InterpolationMode.BICUBIC)
        target = TF.resized_crop(picture, *box, [112, 112], TF.InterpolationMode.LANCZOS)
        TF.normalize(TF.to_tensor(view), MEAN, STD), 0.8 * TF.to_tensor(target) + 0.1, beit_mask()
        yield 1


def webdataset_decode(folder: Path) -> Iterator[int]:
    """webdataset's decoder alone, no views."""
    for _ in tars(folder).decode("pil").to_tuple("jpg"):
        yield 1


def bare_decoder(folder: Path) -> Iterator[int]:
    """Whole pictures by libjpeg-turbo (simplejpeg), from memory that they lie in already, and nothing else."""
    index = open_index(folder)
    contents = [index.read(i) for i in range(len(index))]
    yield 0
    for content in contents:
        simplejpeg.decode_jpeg(content)
        yield 1


def ours(folder: Path, epoch: int) -> Iterator[int]:
    views = PretrainViews(224, 112, Augmentation(jitter=0.4), BlockMasks((14, 14), 75))
    index = open_index(folder)
    stream = ShardStream(index, min(BATCH, len(index) // 2), epoch=epoch, transform=views)
    yield 0
    for batch in stream:
        yield int(batch["valid"].sum())


def rate(samples: Iterator[int]) -> float:
    """Images/s, from where the first step of preparation is done."""
    started, count = time.perf_counter(), 0
    for number in samples:
        started = started if number else time.perf_counter()
        count += number
    return count / (time.perf_counter() - started)


def compare(name: str, folder: Path) -> float:
    """Prints rates and ratios; returns our seconds per image."""
    rates: dict[str, list[float]] = {}
    for epoch in range(ROUNDS):
        ways = {"ours": ours(folder, epoch), "BEiT's own": beit(folder), "webdataset, decode only": webdataset_decode(folder),
                "bare decoder": bare_decoder(folder)}  # fmt: skip
        for way, samples in ways.items():
            rates.setdefault(way, []).append(rate(samples))
    for way, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["ours"], values, strict=True))
        goal = f", wanted {GOALS[way][name]}" if way in GOALS else ""
        print(f"  {way:24} {statistics.median(values):7.1f} images/s" + (f"   ours / this {ratio:5.2f}{goal}" if way != "ours" else ""))
    return 1 / statistics.median(rates["ours"])


def mask_seconds() -> float:
    """For one mask, in batches."""
    masks, spent = BlockMasks((14, 14), 75), []
    for i in range(100):
        seeds = mix(i, np.arange(BATCH))
        started = time.perf_counter()
        masks.sample(seeds)
        spent.append((time.perf_counter() - started) / BATCH)
    return statistics.median(spent)


def main() -> None:
    torch.set_num_threads(1)
    photos, origin = photographs()
    print(origin)
    with tempfile.TemporaryDirectory() as work:
        for name, files in (("small", small_ones(photos, SMALL_COUNT)), ("large", photos * 3)):
            source, shards = Path(work) / name, Path(work) / f"{name}-shards"
            source.mkdir()
            for i, content in enumerate(files):
                (source / f"{i:04d}.jpg").write_bytes(content)
            pack(source, shards, samples_per_shard=128)
            sizes = [np.prod(Image.open(io.BytesIO(content)).size) / 1e6 for content in files]
            print(f"{name}: {len(files)} JPEGs, mean {np.mean(sizes):.2f} megapixels, {np.mean([len(c) for c in files]) / 1000:.0f} KB")
            seconds = compare(name, shards)
            spent = mask_seconds()
            print(f"  a mask, in batches of {BATCH}: {spent * 1e6:.1f} microseconds, {spent / seconds:.2%} of a sample, wanted below 1 %")


if __name__ == "__main__":
    main()
