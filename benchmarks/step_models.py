"""What step.py times: steps of BEiT-B/16, ours and transformers', their matrix products alone, and the demo's ViT in two ways.

Legend: B batch, C channels, H W pixels, P Q token grid, K hidden cells per image, M rows of a product.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimetic.backbones.catalog import create_backbone
from mimetic.data.views import Normalize
from mimetic.engine.config import OptimSettings
from mimetic.engine.optim import adamw
from mimetic.pretrain.mim import MaskedImageModeling, TokenHead
from mimetic.tokenizers.dvae import DVAE

VOCABULARY, HIDDEN, GRID = 8192, 75, 14
RECIPE = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "init_values": 0.1, "drop_path_rate": 0.1, "global_pool": "token"}
DEMO = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3, "class_token": False, "global_pool": "avg"}
DEMO_BATCH, DEMO_HIDDEN = 64, 30
CLIP, OPTIM = 3.0, OptimSettings(lr=1e-4)


class Known:
    """A tokenizer whose ids are known already: its time is left out on both sides."""

    def __init__(self, ids_BPQ: Tensor) -> None:
        self.ids_BPQ = ids_BPQ

    def to(self, device: Any) -> "Known":
        """Ids lie where they are needed."""
        return self

    eval = requires_grad_ = lambda self, *_: self

    def encode(self, target_BCHW: Tensor) -> Tensor:
        """The ids, whatever the pixels."""
        return self.ids_BPQ


def training_batch(batch: int, channels: int = 3, side: int = 224, grid: int = GRID, hidden: int = HIDDEN) -> dict[str, Tensor]:
    """Noise in the loop's format, with ids."""
    image_BCHW = torch.randint(0, 256, (batch, channels, side, side), dtype=torch.uint8)
    hidden_BN = torch.rand(batch, grid * grid).argsort(1).argsort(1) < hidden
    return {"image": image_BCHW, "target": image_BCHW, "hidden": hidden_BN.view(batch, grid, grid),
            "valid": torch.ones(batch, dtype=torch.bool), "ids": torch.randint(0, VOCABULARY, (batch, grid, grid)), "bad": ()}  # fmt: skip


def ours(batch: dict[str, Any]) -> MaskedImageModeling:
    """BEiT-B/16 as launch/recipes/beit_base_in1k.yaml pretrains it."""
    head = TokenHead(768, VOCABULARY, HIDDEN)
    normalize, backbone = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), create_backbone("beit_base_patch16_224", **RECIPE)
    return MaskedImageModeling(backbone, Known(batch["ids"]), head, normalize, torch.device("cpu"))


def theirs() -> nn.Module:
    """transformers' net of the same shape."""
    from transformers import BeitConfig, BeitForMaskedImageModeling

    return BeitForMaskedImageModeling(BeitConfig(vocab_size=VOCABULARY, use_mask_token=True, use_shared_relative_position_bias=True,
                                                 layer_norm_eps=1e-6, drop_path_rate=RECIPE["drop_path_rate"]))  # fmt: skip


def copy_weights(objective: MaskedImageModeling, model: nn.Module) -> None:
    """Ours into theirs."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from oracles import transformers_weights

    model.load_state_dict(transformers_weights(objective.backbone, objective.head.linear), strict=True)


def our_loss(objective: MaskedImageModeling, batch: dict[str, Any]) -> Callable[[], Tensor]:
    return lambda: objective(batch).loss


def their_loss(model: nn.Module, batch: dict[str, Any]) -> Callable[[], Tensor]:
    """With the pixels normalised, and the mask and labels in their form, beforehand."""
    pixels_BCHW = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(batch["image"])
    hidden_BN = batch["hidden"].flatten(1)
    labels_M = batch["ids"].flatten(1)[hidden_BN]
    return lambda: model(pixel_values=pixels_BCHW, bool_masked_pos=hidden_BN, labels=labels_M).loss


def training_step(module: nn.Module, loss: Callable[[], Tensor], bf16: bool) -> Callable[[], None]:
    """Forward, backward, clip, fused AdamW."""
    objective = isinstance(module, MaskedImageModeling)
    optimizer = adamw(module, OPTIM) if objective else torch.optim.AdamW(module.parameters(), OPTIM.lr, weight_decay=0.05, fused=True)
    module.train()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


class Products:
    """Every matrix product of a step of BEiT-B/16, forwards and backwards, and nothing else, each weight in memory of its own."""

    def __init__(self, batch: int, dtype: torch.dtype) -> None:
        places, tokens, width, heads = GRID * GRID, GRID * GRID + 1, 768, 12
        layers = 12 * [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        shapes = [(batch * places, width, width)] + [(batch * tokens, *layer) for layer in layers] + [(batch * HIDDEN, width, VOCABULARY)]
        self.weights_NK = [torch.randn(out, into, dtype=dtype) for _, into, out in shapes]
        self.rows = {(m, n): torch.randn(m, n, dtype=dtype) for shape in shapes for m, n in ((shape[0], shape[1]), (shape[0], shape[2]))}
        self.shapes = shapes
        self.share_GNN = torch.randn(batch * heads, tokens, tokens, dtype=dtype)
        self.value_GNd = torch.randn(batch * heads, tokens, width // heads, dtype=dtype)
        stem = 2 * batch * places * width * width  # pixels want no gradient
        linear = sum(6 * m * n * k for m, k, n in shapes) - stem
        self.gflop = (linear + 12 * 6 * 2 * self.share_GNN.numel() * width // heads) / 1e9

    def run(self) -> None:
        """One step's worth."""
        for index, ((m, k, n), weight_NK) in enumerate(zip(self.shapes, self.weights_NK, strict=True)):
            x_MK, gradient_MN = self.rows[m, k], self.rows[m, n]
            F.linear(x_MK, weight_NK)
            gradient_MN.T @ x_MK
            if index:
                gradient_MN @ weight_NK
        share, value = self.share_GNN, self.value_GNd
        for _ in range(12):
            for left, right in ((value, value.mT), (share, value), (value, value.mT), (share.mT, value), (share, value), (share.mT, value)):
                torch.bmm(left, right)


class PlainViT(nn.Module):
    """The demo's masked image modeling as one writes it from timm's modules."""

    def __init__(self, dvae: DVAE) -> None:
        super().__init__()
        import timm

        self.vit = timm.create_model("vit_tiny_patch16_224", img_size=28, in_chans=1, num_classes=0, **DEMO)
        self.head = nn.Linear(DEMO["embed_dim"], dvae.vocab_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, DEMO["embed_dim"]))
        self.dvae = [dvae]

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss."""
        with torch.no_grad():
            ids_BN = self.dvae[0].encode(batch["target"].float() / 255).flatten(1)
        hidden_BN = batch["hidden"].flatten(1)
        x_BND = self.vit.patch_embed((batch["image"].float() / 255 - 0.5) / 0.5)
        x_BND = self.vit._pos_embed(torch.where(hidden_BN[..., None], self.mask_token, x_BND))
        logits_BNV = self.head(self.vit.norm(self.vit.blocks(x_BND)))
        return F.cross_entropy(logits_BNV[hidden_BN], ids_BN[hidden_BN])


def demo_objective(dvae: DVAE) -> MaskedImageModeling:
    """Ours, as launch/recipes/demo_pretrained.yaml has it."""
    backbone = create_backbone("vit_tiny_patch16_224", image_size=28, in_channels=1, weight_init="mae", **DEMO)
    head = TokenHead(DEMO["embed_dim"], dvae.vocab_size, DEMO_HIDDEN)
    return MaskedImageModeling(backbone, dvae, head, Normalize((0.5,), (0.5,)), torch.device("cpu"))


def demo_batches(count: int = 8) -> Iterator[dict[str, Any]]:
    """Some batches, over and over; their ids are the tokenizer's to tell."""
    batches = [training_batch(DEMO_BATCH, 1, 28, 7, DEMO_HIDDEN) for _ in range(count)]
    for batch in batches:
        del batch["ids"]
    while True:
        yield from batches
