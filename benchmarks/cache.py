"""A pretraining step with the tokenizer in it beside one that reads its ids from a token cache.

Run: python benchmarks/cache.py [--batch 4] [--rounds 5] [--threads 1] [--photos FOLDER]
     python benchmarks/cache.py --help

BEiT-B/16 at 224 pixels in bf16, a tokenizer of the size of DALL-E's dVAE with random weights in fp32. Images are packed, the cache is
made by the product, and both streams decode in the training process, so that images/s are those of everything together. Both see the
same batches, and the losses are compared before anything is timed. Ways alternate within each round; printed are medians.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the product does, before torch is loaded

import numpy as np
import torch
from PIL import Image
from step import interleave, ratio
from step_models import CLIP, HIDDEN, OPTIM, RECIPE, VOCABULARY
from torch import Tensor, nn

from mimetic.backbones.catalog import create_backbone
from mimetic.data.index import Index, open_index
from mimetic.data.masks import BlockMasks
from mimetic.data.pack import pack
from mimetic.data.stream import ShardStream
from mimetic.data.views import Augmentation, Normalize, PretrainViews
from mimetic.engine.optim import adamw
from mimetic.pretrain.mim import MaskedImageModeling, TokenHead
from mimetic.tokenizers.caching import CacheWriter
from mimetic.tokenizers.token_cache import CachedViews, open_cache, terms_of

GOAL = 1.5
IMAGES, VIEWS = 32, 2
CPU = torch.device("cpu")


class DallE(nn.Module):
    """DALL-E's encoder as an image tokenizer, with random weights; transformers has the same network."""

    vocab_size, stride, in_channels = VOCABULARY, 8, 3

    def __init__(self) -> None:
        super().__init__()
        from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

        self.encoder = FlavaImageCodebook(FlavaImageCodebookConfig())

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        """ids_BPQ, in fp32 under autocast too, as tokenizers have it."""
        with torch.autocast(image_BCHW.device.type, enabled=False):
            return self.encoder.get_codebook_indices(0.8 * image_BCHW.float() + 0.1)


def noise_photos(folder: Path) -> Path:
    """JPEGs of 500 x 375 pixels, as ImageNet's are: smooth noise."""
    folder.mkdir()
    for number in range(IMAGES):
        small = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.jpg", quality=90)
    return folder


def training(index: Index, views: Any, tokenizer: DallE, batch: int) -> tuple[Any, MaskedImageModeling]:
    """A step from shards to weights, and what it trains."""
    torch.manual_seed(0)
    head = TokenHead(768, VOCABULARY, HIDDEN)
    normalize = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    objective = MaskedImageModeling(create_backbone("beit_base_patch16_224", **RECIPE), tokenizer, head, normalize, CPU).train()
    optimizer, batches = adamw(objective, OPTIM), ShardStream(index, batch, tail="drop", transform=views).run(1 << 20)

    def step() -> float:
        torch.manual_seed(0)  # of drop path
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(next(batches)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, objective


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--photos", type=Path, help="a folder of pictures (default: smooth noise, as large as ImageNet's)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pack(given.photos or noise_photos(folder / "photos"), folder / "shards")
        index, tokenizer = open_index(folder / "shards"), DallE().eval().requires_grad_(False)
        views = PretrainViews(224, 112, Augmentation(jitter=0.4), BlockMasks((14, 14), HIDDEN))
        terms, began = terms_of(views, index, "random", "fp32", 0), time.perf_counter()
        CacheWriter(folder / "tokens", index, views, tokenizer, CPU, terms, count=VIEWS, batch_size=given.batch).write()
        spent = time.perf_counter() - began
        cached = CachedViews(open_cache(folder / "tokens", index, terms), views)
        steps = {name: training(index, seen, tokenizer, given.batch)[0] for name, seen in (("cached", cached), ("online", views))}
        first = {name: step() for name, step in steps.items()}
        if first["cached"] != first["online"]:
            sys.exit(f"the losses differ: {first}")
        print(f"same first loss, {first['online']:.6f}; the cache took {spent:.1f} s for {VIEWS * len(index)} views")
        rates = interleave(steps, given.batch, given.rounds)
    print(f"BEiT-B/16, 224 pixels, batch {given.batch}, bf16, tokenizer fp32 ({sum(p.numel() for p in tokenizer.parameters()) / 1e6:.1f} M "
          f"parameters), {given.threads} threads, decoding included")  # fmt: skip
    for name, values in rates.items():
        print(f"  {name:8} {statistics.median(values):7.2f} images/s")
    ratio(rates, "cached", "online", GOAL)


if __name__ == "__main__":
    main()
