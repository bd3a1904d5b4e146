"""One pretraining step of the demo's ViT, ours beside timm's backbone with the same head: images/s and their ratio.

Run: python benchmarks/step.py [threads]
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from mimetic.backbones.catalog import create_backbone
from mimetic.data.views import Normalize
from mimetic.pretrain.mim import MaskedImageModeling, TokenHead
from mimetic.tokenizers.dvae import DVAE

SHAPE = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3, "class_token": False, "global_pool": "avg"}
BATCH, HIDDEN, ROUNDS, STEPS = 64, 30, 7, 10


def rate(step: Callable[[], None]) -> float:
    """Images/s of one round."""
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    return STEPS * BATCH / (time.perf_counter() - started)


def trained(module: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """A step of fused AdamW."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-3, fused=True)

    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    import timm

    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    image = torch.randint(0, 256, (BATCH, 1, 28, 28), dtype=torch.uint8)
    order = torch.rand(BATCH, 49).argsort(1).argsort(1)
    batch = {"image": image, "target": image, "hidden": (order < HIDDEN).view(BATCH, 7, 7), "valid": torch.ones(BATCH, dtype=torch.bool)}
    backbone = create_backbone("vit_tiny_patch16_224", image_size=28, in_channels=1, **SHAPE)
    dvae = DVAE(256, 4, 1)
    objective = MaskedImageModeling(backbone, dvae, TokenHead(96, 256, HIDDEN), Normalize((0.5,), (0.5,)), torch.device("cpu"))
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=28, in_chans=1, num_classes=256, **SHAPE)
    pixels, ids = image.float() / 255, torch.randint(0, 256, (BATCH * 49,))
    steps = {
        "mimetic, the whole step": trained(objective, lambda: objective(batch).loss),
        "timm, no mask, no tokenizer, all cells": trained(
            theirs, lambda: F.cross_entropy(theirs.head(theirs.forward_features(pixels)).flatten(0, 1), ids)
        ),
        "mimetic, tokenizer alone": lambda: dvae.encode(pixels),
    }
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            rates[name].append(rate(step))
    for name, values in rates.items():
        print(f"{name:42} {statistics.median(values):7.0f} images/s")
    first, second, *_ = rates.values()
    print(f"ratio of the first two, median of {ROUNDS} rounds: {statistics.median(a / b for a, b in zip(first, second, strict=True)):.2f}")


if __name__ == "__main__":
    main()
