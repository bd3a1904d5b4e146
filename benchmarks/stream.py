"""How fast one core decodes and augments: ShardStream with BEiT's two views and masks, beside webdataset + torchvision doing the same.

Run: python benchmarks/stream.py SHARDS [SIZE]     SHARDS is a folder made by `mimetic pack`; SIZE of the view, 28 if left out
"""

import io
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torchvision.transforms import v2

from mimetic.data.index import open_index
from mimetic.data.masks import BlockMasks
from mimetic.data.randomness import mix
from mimetic.data.stream import ShardStream
from mimetic.data.views import Augmentation, PretrainViews

BATCH, BATCHES, ROUNDS = 64, 20, 5


def rate(batches: Iterable[object]) -> float:
    """Images/s over some batches."""
    started = time.perf_counter()
    for _ in islice(batches, BATCHES):
        pass
    return BATCH * BATCHES / (time.perf_counter() - started)


def plain(folder: Path, size: int) -> Iterator[list]:
    """webdataset's reader and torchvision's transforms, one picture at a time, without masks."""
    crop = v2.RandomResizedCrop(size, (0.5, 1.0))
    flip = v2.RandomHorizontalFlip()
    shards = [str(path) for path in sorted(folder.glob("shard-*.tar"))]
    samples = webdataset.WebDataset(shards, shardshuffle=False).shuffle(1000).to_tuple("png;jpg;jpeg")
    views = []
    for (content,) in samples:
        picture = flip(crop(Image.open(io.BytesIO(content))))
        views.append((np.asarray(picture), np.asarray(picture.resize((size // 2, size // 2), Image.Resampling.LANCZOS))))
        if len(views) == BATCH:
            yield views
            views = []


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder, size = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 28
    torch.set_num_threads(1)
    masks = BlockMasks((7, 7), 20, 4)
    views = PretrainViews(size, size // 2, Augmentation((0.5, 1.0)), masks)
    rates: dict[str, list[float]] = {"mimetic, two views and masks": [], "webdataset + torchvision": []}
    for epoch in range(ROUNDS):
        rates["mimetic, two views and masks"].append(rate(ShardStream(open_index(folder), BATCH, epoch=epoch, transform=views)))
        rates["webdataset + torchvision"].append(rate(plain(folder, size)))
    for name, values in rates.items():
        print(f"{name:30} {statistics.median(values):7.0f} images/s")
    ours, theirs = rates.values()
    print(f"ratio, median of {ROUNDS} rounds: {statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}")
    started = time.perf_counter()
    BlockMasks((14, 14), 75).sample(mix(0, np.arange(4096)))
    print(f"{'masks, 14x14 with 75 hidden':30} {4096 / (time.perf_counter() - started):7.0f} a second")


if __name__ == "__main__":
    main()
