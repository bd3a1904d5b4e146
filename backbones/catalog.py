"""Backbones by timm's names, with what their papers print about them.

Each entry is data: which class builds it, from which arguments, and which of those `create_backbone` lets you override.
Arguments bear timm's names, so that `timm.create_model(name, **overrides)` builds the same net.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mimetic.backbones.contract import Backbone
from mimetic.backbones.vit import ViT
from mimetic.engine.errors import SettingError


@dataclass(frozen=True)
class Published:
    """A paper's own figures: millions of parameters, billions of multiply-adds, ImageNet-1k top-1 in percent."""

    params_m: float | None = None
    gmacs: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class Family:
    """Backbones of one paper: what builds them, the arguments common to all, the arguments a user may override."""

    build: Callable[..., Backbone]
    paper: str
    common: dict[str, Any]
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One backbone: its family, the pixels of a side, its own arguments, the paper's figures for it."""

    family: Family
    image_size: int
    arguments: dict[str, Any]
    published: Published = field(default_factory=Published)


PLAIN = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "init_values", "drop_path_rate", "weight_init")

VIT = Family(
    build=ViT,
    paper="Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, arXiv:2010.11929",
    common={},
    overrides=(*PLAIN, "global_pool", "class_token", "no_embed_class"),
)
# ViT-Ti and ViT-S are not in the ViT paper: DeiT introduced the sizes, and this paper trained them as plain ViTs.
VIT_SMALL = Family(
    build=ViT,
    paper="Steiner et al., How to train your ViT?, TMLR 2022, arXiv:2106.10270",
    common={},
    overrides=VIT.overrides,
)
DEIT = Family(
    build=ViT,
    paper="Touvron et al., Training data-efficient image transformers through attention, ICML 2021, arXiv:2012.12877",
    common={},
    overrides=VIT.overrides,
)
DEIT_DISTILLED = Family(
    build=ViT,
    paper=DEIT.paper,
    common={"dist_token": True},
    overrides=PLAIN,
)
DEIT3 = Family(
    build=ViT,
    paper="Touvron et al., DeiT III: Revenge of the ViT, ECCV 2022, arXiv:2204.07118",
    common={"no_embed_class": True, "init_values": 1e-6},
    overrides=VIT.overrides,
)
BEIT = Family(
    build=ViT,
    paper="Bao et al., BEiT: BERT Pre-Training of Image Transformers, ICLR 2022, arXiv:2106.08254",
    common={
        "key_bias": False, "use_abs_pos_emb": False, "use_rel_pos_bias": True, "global_pool": "avg", "head_init_scale": 0.001,
    },
    overrides=(*PLAIN, "global_pool", "head_init_scale", "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias"),
)

TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}
SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
MEDIUM = {"embed_dim": 512, "depth": 12, "num_heads": 8}
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
P8, P14, P16, P32 = ({"patch_size": side} for side in (8, 14, 16, 32))
BEIT_BASE = BASE | P16 | {"init_values": 0.1}
BEIT_LARGE = LARGE | P16 | {"init_values": 1e-5}

CATALOG: dict[str, Entry] = {
    "vit_tiny_patch16_224": Entry(VIT_SMALL, 224, TINY | P16),
    "vit_tiny_patch16_384": Entry(VIT_SMALL, 384, TINY | P16),
    "vit_small_patch8_224": Entry(VIT_SMALL, 224, SMALL | P8),
    "vit_small_patch16_224": Entry(VIT_SMALL, 224, SMALL | P16),
    "vit_small_patch16_384": Entry(VIT_SMALL, 384, SMALL | P16),
    "vit_small_patch32_224": Entry(VIT_SMALL, 224, SMALL | P32),
    "vit_small_patch32_384": Entry(VIT_SMALL, 384, SMALL | P32),
    "vit_base_patch8_224": Entry(VIT, 224, BASE | P8),
    "vit_base_patch16_224": Entry(VIT, 224, BASE | P16, Published(86, 17.6)),
    "vit_base_patch16_384": Entry(VIT, 384, BASE | P16, Published(86, 55.4, 77.9)),
    "vit_base_patch32_224": Entry(VIT, 224, BASE | P32),
    "vit_base_patch32_384": Entry(VIT, 384, BASE | P32),
    "vit_large_patch14_224": Entry(VIT, 224, LARGE | P14),
    "vit_large_patch16_224": Entry(VIT, 224, LARGE | P16, Published(307, 63.6)),
    "vit_large_patch16_384": Entry(VIT, 384, LARGE | P16, Published(307, 190.7, 76.5)),
    "vit_large_patch32_224": Entry(VIT, 224, LARGE | P32),
    "vit_large_patch32_384": Entry(VIT, 384, LARGE | P32),
    "vit_huge_patch14_224": Entry(VIT, 224, HUGE | P14, Published(632)),
    "deit_tiny_patch16_224": Entry(DEIT, 224, TINY | P16, Published(5, None, 72.2)),
    "deit_small_patch16_224": Entry(DEIT, 224, SMALL | P16, Published(22, 4.6, 79.8)),
    "deit_base_patch16_224": Entry(DEIT, 224, BASE | P16, Published(86, 17.5, 81.8)),
    "deit_base_patch16_384": Entry(DEIT, 384, BASE | P16, Published(86, 55.4, 83.1)),
    "deit_tiny_distilled_patch16_224": Entry(DEIT_DISTILLED, 224, TINY | P16, Published(6, None, 74.5)),
    "deit_small_distilled_patch16_224": Entry(DEIT_DISTILLED, 224, SMALL | P16, Published(22, None, 81.2)),
    "deit_base_distilled_patch16_224": Entry(DEIT_DISTILLED, 224, BASE | P16, Published(87, None, 83.4)),
    "deit_base_distilled_patch16_384": Entry(DEIT_DISTILLED, 384, BASE | P16, Published(87)),
    "deit3_small_patch16_224": Entry(DEIT3, 224, SMALL | P16, Published(22, None, 81.4)),
    "deit3_small_patch16_384": Entry(DEIT3, 384, SMALL | P16),
    "deit3_medium_patch16_224": Entry(DEIT3, 224, MEDIUM | P16),
    "deit3_base_patch16_224": Entry(DEIT3, 224, BASE | P16, Published(86.6, None, 83.8)),
    "deit3_base_patch16_384": Entry(DEIT3, 384, BASE | P16),
    "deit3_large_patch16_224": Entry(DEIT3, 224, LARGE | P16, Published(304.4, None, 84.9)),
    "deit3_large_patch16_384": Entry(DEIT3, 384, LARGE | P16),
    "deit3_huge_patch14_224": Entry(DEIT3, 224, HUGE | P14, Published(632.1, None, 85.2)),
    "beit_base_patch16_224": Entry(BEIT, 224, BEIT_BASE, Published(86, None, 83.2)),
    "beit_base_patch16_384": Entry(BEIT, 384, BEIT_BASE, Published(86, None, 84.6)),
    "beit_large_patch16_224": Entry(BEIT, 224, BEIT_LARGE, Published(307, None, 85.2)),
    "beit_large_patch16_384": Entry(BEIT, 384, BEIT_LARGE, Published(307, None, 86.3)),
    "beit_large_patch16_512": Entry(BEIT, 512, BEIT_LARGE),
}


def list_backbones() -> list[str]:
    """Names that `create_backbone` takes."""
    return list(CATALOG)


def create_backbone(
    name: str,
    num_classes: int = 0,
    image_size: int | Sequence[int] | None = None,
    in_channels: int = 3,
    **overrides: Any,
) -> Backbone:
    """Build a backbone with fresh weights.

    Args:
        name: timm's name, one of `list_backbones()`.
        num_classes: outputs of the classifier; 0 for none.
        image_size: side or (H, W) in pixels; None for the name's own.
        in_channels: C of the images.
        **overrides: arguments of the net to replace, by timm's names: `depth=4, embed_dim=128, patch_size=4, ...`.

    Raises:
        SettingError: unknown name or override, or values that contradict each other.
    """
    if name not in CATALOG:
        raise SettingError(f"unknown backbone {name!r}{_nearest(name, CATALOG)}; mimetic.list_backbones() lists them all")
    entry = CATALOG[name]
    for key in overrides:
        if key not in entry.family.overrides:
            known = entry.family.overrides
            raise SettingError(f"{name} has no override {key!r}{_nearest(key, known)}; it has {', '.join(known)}")
    size = entry.image_size if image_size is None else image_size
    try:
        backbone = entry.family.build(size, in_channels, num_classes, **(entry.family.common | entry.arguments | overrides))
    except (TypeError, ValueError, RuntimeError) as error:  # of a wrong kind, such as depth="four"
        if not overrides:
            raise
        raise SettingError(f"{name} cannot be built with {overrides}: {' '.join(str(error).split())}") from None
    backbone.config = {
        "name": name, "num_classes": num_classes, "image_size": list(backbone.image_size), "in_channels": in_channels,
        "overrides": overrides,
    }
    return backbone


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments that the net of a `Backbone.config` was built with, the catalog's own included; none without the catalog."""
    entry = CATALOG.get(config.get("name", ""))
    return entry.family.common | entry.arguments | config["overrides"] if entry else {}


def _nearest(word: str, known: Sequence[str] | dict[str, Entry]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
