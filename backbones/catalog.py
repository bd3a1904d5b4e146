"""Backbones by timm's names, with what their papers print about them.

Each entry is data: which class builds it, from which arguments, and which of those `create_backbone` lets you override.
Arguments bear timm's names, so that `timm.create_model(name, **overrides)` builds the same net. Nothing heavy is imported
before a net is built, so that a recipe's names and overrides are checked at once.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mimetic.engine.config import did_you_mean
from mimetic.engine.errors import SettingError

if TYPE_CHECKING:
    from mimetic.backbones.contract import Backbone

ADAPTED = "timm:"  # before any name of timm's: its own net, in our contract


@dataclass(frozen=True)
class Published:
    """A paper's own figures: millions of parameters, billions of multiply-adds, ImageNet-1k top-1 in percent."""

    params_m: float | None = None
    gmacs: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class Family:
    """Backbones of one paper: what builds them (file and class), the arguments common to all, those that a user may override."""

    build: str
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
    build="vit.ViT",
    paper="Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, arXiv:2010.11929",
    common={},
    overrides=(*PLAIN, "global_pool", "class_token", "no_embed_class"),
)
# ViT-Ti and ViT-S are not in the ViT paper: DeiT introduced the sizes, and this paper trained them as plain ViTs.
VIT_SMALL = Family(
    build="vit.ViT",
    paper="Steiner et al., How to train your ViT?, TMLR 2022, arXiv:2106.10270",
    common={},
    overrides=VIT.overrides,
)
DEIT = Family(
    build="vit.ViT",
    paper="Touvron et al., Training data-efficient image transformers through attention, ICML 2021, arXiv:2012.12877",
    common={},
    overrides=VIT.overrides,
)
DEIT_DISTILLED = Family(
    build="vit.ViT",
    paper=DEIT.paper,
    common={"dist_token": True},
    overrides=PLAIN,
)
DEIT3 = Family(
    build="vit.ViT",
    paper="Touvron et al., DeiT III: Revenge of the ViT, ECCV 2022, arXiv:2204.07118",
    common={"no_embed_class": True, "init_values": 1e-6},
    overrides=VIT.overrides,
)
BEIT = Family(
    build="vit.ViT",
    paper="Bao et al., BEiT: BERT Pre-Training of Image Transformers, ICLR 2022, arXiv:2106.08254",
    common={
        "key_bias": False, "use_abs_pos_emb": False, "use_rel_pos_bias": True, "global_pool": "avg", "head_init_scale": 0.001,
    },
    overrides=(*PLAIN, "global_pool", "head_init_scale", "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias"),
)

WINDOWED = ("patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "qkv_bias", "drop_path_rate", "shifted")
SWIN = Family(
    build="swin.Swin",
    paper="Liu et al., Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021, arXiv:2103.14030",
    common={"patch_size": 4, "shifted": True},
    overrides=WINDOWED,
)
SWINV2 = Family(
    build="swinv2.SwinV2",
    paper="Liu et al., Swin Transformer V2: Scaling Up Capacity and Resolution, CVPR 2022, arXiv:2111.09883",
    common={"patch_size": 4, "shifted": True},
    overrides=(*WINDOWED, "pretrained_window_sizes"),
)
POOLFORMER = Family(
    build="metaformer.MetaFormer",
    paper="Yu et al., MetaFormer Is Actually What You Need for Vision, CVPR 2022, arXiv:2111.11418",
    common={"token_mixers": "pooling"},
    overrides=("depths", "dims", "token_mixers", "layer_scale_init_values", "drop_path_rate"),
)
TWINS = Family(
    build="twins.Twins",
    paper="Chu et al., Twins: Revisiting the Design of Spatial Attention in Vision Transformers, NeurIPS 2021, arXiv:2104.13840",
    common={"patch_size": 4, "sr_ratios": (8, 4, 2, 1)},
    overrides=("patch_size", "embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios", "wss", "drop_path_rate"),
)
MAXVIT = Family(
    build="maxvit.MaxViT",
    paper="Tu et al., MaxViT: Multi-Axis Vision Transformer, ECCV 2022, arXiv:2204.01697",
    common={},
    overrides=("embed_dim", "depths", "stem_width", "window_size", "drop_path_rate"),
)
PATCHES = ("patch_size", "embed_dim", "num_blocks", "mlp_ratio", "drop_path_rate")
MIXER = Family(
    build="mlp_nets.MlpMixer",
    paper="Tolstikhin et al., MLP-Mixer: An all-MLP Architecture for Vision, NeurIPS 2021, arXiv:2105.01601",
    common={},
    overrides=PATCHES,
)
RESMLP = Family(
    build="mlp_nets.ResMlp",
    paper="Touvron et al., ResMLP: Feedforward networks for image classification with data-efficient training, arXiv:2105.03404",
    common={"embed_dim": 384, "patch_size": 16},
    overrides=(*PATCHES, "init_values"),
)
GMLP = Family(
    build="mlp_nets.GatedMlp",
    paper="Liu et al., Pay Attention to MLPs, NeurIPS 2021, arXiv:2105.08050",
    common={"patch_size": 16, "num_blocks": 30},
    overrides=PATCHES,
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
SWIN_T = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
SWIN_S = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
SWIN_B = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
SWIN_L = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
W7, W8, W12, W16, W24 = ({"window_size": side} for side in (7, 8, 12, 16, 24))
FROM_12 = {"pretrained_window_sizes": (12, 12, 12, 6)}
POOL_S, POOL_M = {"dims": (64, 128, 320, 512)}, {"dims": (96, 192, 384, 768)}
SCALED = {"layer_scale_init_values": 1e-6}
PCPVT = {"embed_dims": (64, 128, 320, 512), "num_heads": (1, 2, 5, 8), "mlp_ratios": (8, 8, 4, 4)}
SVT = {"mlp_ratios": (4, 4, 4, 4), "wss": (7, 7, 7, 7)}
SVT_S = {"embed_dims": (64, 128, 256, 512), "num_heads": (2, 4, 8, 16), "depths": (2, 2, 10, 4)}
SVT_B = {"embed_dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24), "depths": (2, 2, 18, 2)}
SVT_L = {"embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32), "depths": (2, 2, 18, 2)}
MAXVIT_SIZES = {
    "tiny": {"embed_dim": (64, 128, 256, 512), "depths": (2, 2, 5, 2), "stem_width": 64},
    "small": {"embed_dim": (96, 192, 384, 768), "depths": (2, 2, 5, 2), "stem_width": 64},
    "base": {"embed_dim": (96, 192, 384, 768), "depths": (2, 6, 14, 2), "stem_width": 64},
    "large": {"embed_dim": (128, 256, 512, 1024), "depths": (2, 6, 14, 2), "stem_width": 128},
    "xlarge": {"embed_dim": (192, 384, 768, 1536), "depths": (2, 6, 14, 2), "stem_width": 192},
}
MAXVIT_PUBLISHED = {  # table 2 of the paper, trained on ImageNet-1k; xlarge was trained on more
    ("tiny", 224): Published(31, 5.6, 83.62), ("tiny", 384): Published(31, 17.7, 85.24), ("tiny", 512): Published(31, 33.7, 85.72),
    ("small", 224): Published(69, 11.7, 84.45), ("small", 384): Published(69, 36.1, 85.74), ("small", 512): Published(69, 67.6, 86.19),
    ("base", 224): Published(120, 23.4, 84.95), ("base", 384): Published(120, 74.2, 86.34), ("base", 512): Published(120, 138.5, 86.66),
    ("large", 224): Published(212, 43.9, 85.17), ("large", 384): Published(212, 133.1, 86.40), ("large", 512): Published(212, 245.4, 86.70),
}

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
    "swin_tiny_patch4_window7_224": Entry(SWIN, 224, SWIN_T | W7, Published(29, 4.5, 81.3)),
    "swin_small_patch4_window7_224": Entry(SWIN, 224, SWIN_S | W7, Published(50, 8.7, 83.0)),
    "swin_base_patch4_window7_224": Entry(SWIN, 224, SWIN_B | W7, Published(88, 15.4, 83.5)),
    "swin_base_patch4_window12_384": Entry(SWIN, 384, SWIN_B | W12, Published(88, 47.0, 84.5)),
    "swin_large_patch4_window7_224": Entry(SWIN, 224, SWIN_L | W7, Published(197, 34.5)),
    "swin_large_patch4_window12_384": Entry(SWIN, 384, SWIN_L | W12, Published(197, 103.9)),
    "swinv2_tiny_window8_256": Entry(SWINV2, 256, SWIN_T | W8, Published(28, 5.9, 81.8)),
    "swinv2_tiny_window16_256": Entry(SWINV2, 256, SWIN_T | W16, Published(28, 6.6, 82.8)),
    "swinv2_small_window8_256": Entry(SWINV2, 256, SWIN_S | W8, Published(50, 11.5, 83.7)),
    "swinv2_small_window16_256": Entry(SWINV2, 256, SWIN_S | W16, Published(50, 12.6, 84.1)),
    "swinv2_base_window8_256": Entry(SWINV2, 256, SWIN_B | W8, Published(88, 20.3, 84.2)),
    "swinv2_base_window16_256": Entry(SWINV2, 256, SWIN_B | W16, Published(88, 21.8, 84.6)),
    "swinv2_base_window12_192": Entry(SWINV2, 192, SWIN_B | W12, Published(88)),
    "swinv2_base_window12to16_192to256": Entry(SWINV2, 256, SWIN_B | W16 | FROM_12, Published(88, 21.8)),
    "swinv2_base_window12to24_192to384": Entry(SWINV2, 384, SWIN_B | W24 | FROM_12, Published(88, 54.7, 87.1)),
    "swinv2_large_window12_192": Entry(SWINV2, 192, SWIN_L | W12, Published(197)),
    "swinv2_large_window12to16_192to256": Entry(SWINV2, 256, SWIN_L | W16 | FROM_12, Published(197, 47.5)),
    "swinv2_large_window12to24_192to384": Entry(SWINV2, 384, SWIN_L | W24 | FROM_12, Published(197, 115.4, 87.7)),
    "poolformer_s12": Entry(POOLFORMER, 224, POOL_S | {"depths": (2, 2, 6, 2)}, Published(12, 1.9, 77.2)),
    "poolformer_s24": Entry(POOLFORMER, 224, POOL_S | {"depths": (4, 4, 12, 4)}, Published(21, 3.5, 80.3)),
    "poolformer_s36": Entry(POOLFORMER, 224, POOL_S | {"depths": (6, 6, 18, 6)} | SCALED, Published(31, 5.1, 81.4)),
    "poolformer_m36": Entry(POOLFORMER, 224, POOL_M | {"depths": (6, 6, 18, 6)} | SCALED, Published(56, 9.0, 82.1)),
    "poolformer_m48": Entry(POOLFORMER, 224, POOL_M | {"depths": (8, 8, 24, 8)} | SCALED, Published(73, 11.8, 82.5)),
    "twins_pcpvt_small": Entry(TWINS, 224, PCPVT | {"depths": (3, 4, 6, 3)}, Published(24.1, 3.8, 81.2)),
    "twins_pcpvt_base": Entry(TWINS, 224, PCPVT | {"depths": (3, 4, 18, 3)}, Published(43.8, 6.7, 82.7)),
    "twins_pcpvt_large": Entry(TWINS, 224, PCPVT | {"depths": (3, 8, 27, 3)}, Published(60.9, 9.8, 83.1)),
    "twins_svt_small": Entry(TWINS, 224, SVT | SVT_S, Published(24.0, 2.9, 81.7)),
    "twins_svt_base": Entry(TWINS, 224, SVT | SVT_B, Published(56.0, 8.6, 83.2)),
    "twins_svt_large": Entry(TWINS, 224, SVT | SVT_L, Published(99.2, 15.1, 83.7)),
    **{
        f"maxvit_{size}_tf_{side}": Entry(MAXVIT, side, MAXVIT_SIZES[size], MAXVIT_PUBLISHED.get((size, side), Published()))
        for size in MAXVIT_SIZES for side in (224, 384, 512)
    },
    "mixer_s32_224": Entry(MIXER, 224, P32 | {"embed_dim": 512, "num_blocks": 8}, Published(19)),
    "mixer_s16_224": Entry(MIXER, 224, P16 | {"embed_dim": 512, "num_blocks": 8}, Published(18)),
    "mixer_b32_224": Entry(MIXER, 224, P32 | {"embed_dim": 768, "num_blocks": 12}, Published(60)),
    "mixer_b16_224": Entry(MIXER, 224, P16 | {"embed_dim": 768, "num_blocks": 12}, Published(59, 12.7, 76.4)),
    "mixer_l32_224": Entry(MIXER, 224, P32 | {"embed_dim": 1024, "num_blocks": 24}, Published(206)),
    "mixer_l16_224": Entry(MIXER, 224, P16 | {"embed_dim": 1024, "num_blocks": 24}, Published(207)),
    "resmlp_12_224": Entry(RESMLP, 224, {"num_blocks": 12, "init_values": 1e-4}, Published(15, 3.0, 76.6)),
    "resmlp_24_224": Entry(RESMLP, 224, {"num_blocks": 24, "init_values": 1e-5}, Published(30, 6.0, 79.4)),
    "resmlp_36_224": Entry(RESMLP, 224, {"num_blocks": 36, "init_values": 1e-6}, Published(45, 8.9, 79.7)),
    "resmlp_big_24_224": Entry(RESMLP, 224, P8 | {"embed_dim": 768, "num_blocks": 24, "init_values": 1e-6}, Published(129, 100.2)),
    "gmlp_ti16_224": Entry(GMLP, 224, {"embed_dim": 128}, Published(6, 1.4, 72.3)),
    "gmlp_s16_224": Entry(GMLP, 224, {"embed_dim": 256}, Published(20, 4.5, 79.6)),
    "gmlp_b16_224": Entry(GMLP, 224, {"embed_dim": 512}, Published(73, 15.8, 81.6)),
}


def list_backbones() -> list[str]:
    """Names that `create_backbone` takes; `timm:NAME` takes any model of timm's beside them, if timm is installed."""
    return list(CATALOG)


def create_backbone(
    name: str,
    num_classes: int = 0,
    image_size: int | Sequence[int] | None = None,
    in_channels: int = 3,
    **overrides: Any,
) -> "Backbone":
    """Build a backbone with fresh weights.

    Args:
        name: timm's name, one of `list_backbones()`; or `timm:NAME` for timm's own net of that name in our contract.
        num_classes: outputs of the classifier; 0 for none.
        image_size: side or (H, W) in pixels; None for the name's own.
        in_channels: C of the images.
        **overrides: arguments of the net to replace, by timm's names: `depth=4, embed_dim=128, patch_size=4, ...`.

    Raises:
        SettingError: unknown name or override, or values that contradict each other.
    """
    check(name, overrides)
    if in_channels < 1 or num_classes < 0:
        raise SettingError(f"in_channels {in_channels}, num_classes {num_classes}: channels are 1 or more, classes 0 or more")
    if name.startswith(ADAPTED):
        from mimetic.backbones.adapter import adapt

        backbone = adapt(name.removeprefix(ADAPTED), num_classes, image_size, in_channels, **overrides)
    else:
        entry = CATALOG[name]
        file, _, kind = entry.family.build.partition(".")
        build = getattr(importlib.import_module(f"mimetic.backbones.{file}"), kind)
        size = entry.image_size if image_size is None else image_size
        try:
            backbone = build(size, in_channels, num_classes, **(entry.family.common | entry.arguments | overrides))
        except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:  # of a wrong kind, such as depth="four"
            if not overrides:
                raise
            raise SettingError(f"{name} cannot be built with {overrides}: {' '.join(str(error).split())}") from None
    backbone.config = {
        "name": name, "num_classes": num_classes, "image_size": list(backbone.image_size), "in_channels": in_channels,
        "overrides": overrides,
    }
    return backbone


def check(name: str, overrides: Mapping[str, Any]) -> None:
    """Refuses names and overrides that nothing is known of, without loading what builds nets.

    Raises:
        SettingError: with the nearest known ones.
    """
    if name.startswith(ADAPTED):
        return
    if name not in CATALOG:
        raise SettingError(f"unknown backbone {name!r}{did_you_mean(name, CATALOG)}; `mimetic models` lists them all, and "
                           "timm:NAME takes any net of timm's")  # fmt: skip
    known = CATALOG[name].family.overrides
    for key in overrides:
        if key not in known:
            raise SettingError(f"{name} has no override {key!r}{did_you_mean(key, known)}; it has {', '.join(known)}")


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments that the net of a `Backbone.config` was built with, the catalog's own included; none without the catalog."""
    entry = CATALOG.get(config.get("name", ""))
    return entry.family.common | entry.arguments | config["overrides"] if entry else {}
