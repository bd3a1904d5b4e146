"""Helpers to hold our nets against other people's: weights that leave no term at zero, and tolerances."""

import re
from functools import partial

import timm
import torch
from timm.models import metaformer, mlp_mixer
from torch import Tensor, nn
from torchvision.models import swin_transformer as torchvision_swin_file
from torchvision.models.vision_transformer import VisionTransformer
from transformers import (
    BeitConfig,
    BeitForMaskedImageModeling,
    SwinConfig,
    SwinForMaskedImageModeling,
    Swinv2Config,
    Swinv2ForMaskedImageModeling,
)

from mimetic.backbones.catalog import CATALOG, arguments_of
from mimetic.backbones.contract import Backbone

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


@torch.no_grad()
def perturb_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic random values, such that activations stay of order one.

    Fresh weights prove little: biases, bias tables and layer scale start at or near 0, norms at 1.
    """
    random = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if parameter.dim() == 1:  # norms and layer scale multiply, biases add
            parameter.copy_(0.2 * noise + (0.0 if name.endswith("bias") else 1.0))
        elif name.endswith(("_token", "pos_embed", "bias_table")):
            parameter.copy_(noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=random))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=random))
    return module


def worst(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference, between values that are of order one, as a tolerance in absolute terms needs."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert 0.05 < theirs.std() < 20, f"values of the size of {theirs.std():.1e} make an absolute tolerance meaningless"
    return (ours - theirs).abs().max().item()


def masked_beit(vocabulary: int, shared: bool) -> BeitForMaskedImageModeling:
    """transformers' net for 20 x 20 pixels in patches of 4: width 48, 3 blocks, 3 heads."""
    config = BeitConfig(
        vocab_size=vocabulary, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=192,
        layer_norm_eps=1e-6, image_size=20, patch_size=4, use_mask_token=True, use_shared_relative_position_bias=shared,
        use_relative_position_bias=not shared,
    )
    return BeitForMaskedImageModeling(config)


def transformers_weights(ours: Backbone, head: nn.Linear) -> dict[str, Tensor]:
    """Our weights under transformers' names, which splits queries, keys and values."""
    renamed = {
        "patch_embed.proj": "beit.embeddings.patch_embeddings.projection", "patch_embed.": "beit.embeddings.",
        "rel_pos_bias.": "beit.shared_position_bias.", "norm.": "layernorm.",
    }
    in_block = {
        "attn.rel_pos_bias": "relative_position_bias", "attn.proj": "attention.o_proj", "mlp.": "mlp.", "gamma": "lambda",
        "norm1": "layernorm_before", "norm2": "layernorm_after",
    }
    state = {f"lm_head.{name}": value for name, value in head.state_dict().items()}
    for name, value in ours.state_dict().items():
        if "qkv" in name:
            to = "beit.layers." + name.removeprefix("blocks.").split("attn.")[0] + "attention.{}_proj." + "{}"
            if name.endswith("weight"):
                state |= {to.format(letter, "weight"): part for letter, part in zip("qkv", value.chunk(3), strict=True)}
            else:
                state[to.format(name[-6], "bias")] = value
        elif name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            old = next(old for old in in_block if rest.startswith(old))
            state[f"beit.layers.{index}.{rest.replace(old, in_block[old])}"] = value
        else:
            old = next(old for old in renamed if name.startswith(old))
            state[name.replace(old, renamed[old], 1)] = value
    return state


def timm_twin(ours: Backbone) -> nn.Module:
    """timm's net of the same name and arguments, with our weights, loaded strictly.

    timm's entries of PoolFormer and of the MLP nets let nobody change what they set themselves, so those are built from classes.
    """
    name, given = ours.config["name"], dict(ours.timm_arguments())
    changed = ours.config["overrides"].keys() & (CATALOG[name].family.common | CATALOG[name].arguments).keys()
    family = CATALOG[name].family.build.partition(".")[0]
    if changed and family == "metaformer":
        theirs = _metaformer(arguments_of(ours.config), given)
    elif changed and family == "mlp_nets":
        theirs = _mlp_net(CATALOG[name].family.build.partition(".")[2], arguments_of(ours.config), given)
    else:
        theirs = timm.create_model(name, **given)
    theirs = theirs.to(next(ours.parameters()).dtype).eval()
    theirs.load_state_dict(ours.timm_state_dict(), strict=True)
    return theirs


def _metaformer(arguments: dict, given: dict) -> nn.Module:
    return metaformer.MetaFormer(
        in_chans=given["in_chans"], num_classes=given["num_classes"], depths=arguments["depths"], dims=arguments["dims"],
        token_mixers=metaformer.Pooling, mlp_act=nn.GELU, mlp_bias=True, use_mlp_head=False, downsample_norm=None,
        norm_layers=metaformer.GroupNorm1, layer_scale_init_values=arguments.get("layer_scale_init_values", 1e-5),
        res_scale_init_values=None,
    )  # fmt: skip


def _mlp_net(kind: str, arguments: dict, given: dict) -> nn.Module:
    layers = {
        "MlpMixer": {"mlp_ratio": arguments.get("mlp_ratio", (0.5, 4.0))},
        "ResMlp": {"mlp_ratio": arguments.get("mlp_ratio", 4), "block_layer": mlp_mixer.ResBlock, "norm_layer": mlp_mixer.Affine},
        "GatedMlp": {"mlp_ratio": arguments.get("mlp_ratio", 6), "block_layer": mlp_mixer.SpatialGatingBlock,
                     "mlp_layer": mlp_mixer.GatedMlp},
    }[kind]  # fmt: skip
    sizes = {key: arguments[key] for key in ("patch_size", "num_blocks", "embed_dim")}
    return mlp_mixer.MlpMixer(num_classes=given["num_classes"], img_size=given["img_size"], in_chans=given["in_chans"], **sizes, **layers)


def transformers_swin(ours: Backbone) -> nn.Module:
    """transformers' masked model around Swin or SwinV2, with our weights."""
    arguments = arguments_of(ours.config)
    second = "swinv2" in ours.config["name"]
    config_class, model_class = (
        (Swinv2Config, Swinv2ForMaskedImageModeling) if second else (SwinConfig, SwinForMaskedImageModeling)
    )
    config = config_class(
        image_size=ours.image_size[0], patch_size=arguments["patch_size"], embed_dim=arguments["embed_dim"],
        depths=list(arguments["depths"]), num_heads=list(arguments["num_heads"]), window_size=arguments["window_size"],
        num_channels=ours.in_channels, encoder_stride=4, layer_norm_eps=1e-5,
    )  # fmt: skip
    theirs = model_class(config)
    top = "swinv2" if second else "swin"
    state = {key: value for key, value in theirs.state_dict().items() if key.startswith("decoder.")}
    for name, value in ours.state_dict().items():
        state |= _swin_renamed(name, value, top, second)
    theirs.load_state_dict(state, strict=True)
    return theirs.to(next(ours.parameters()).dtype).eval()


def _swin_renamed(name: str, value: Tensor, top: str, second: bool) -> dict[str, Tensor]:
    if name.startswith("stem."):
        return {f"{top}.embeddings." + name.removeprefix("stem.").replace("proj", "patch_embeddings.projection"): value.flatten(0, -2)[None]
                if "mask_token" in name else value}  # fmt: skip
    if name.startswith("norm."):
        return {f"{top}.layer{name}": value}
    _, stage, part, *rest = name.split(".")
    if part == "downsample":  # theirs ends a stage, ours begins one
        return {f"{top}.encoder.layers.{int(stage) - 1}.downsample.{'.'.join(rest)}": value}
    block, inside = f"{top}.encoder.layers.{stage}.blocks.{rest[0]}.", ".".join(rest[1:])
    inside = inside.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
    if inside == "attn.qkv.weight" or (inside == "attn.qkv.bias" and not second):
        parts = ("self.query", "self.key", "self.value") if second else ("q_proj", "k_proj", "v_proj")
        end = inside.rpartition(".")[2]
        return {f"{block}attention.{p}.{end}": v for p, v in zip(parts, value.chunk(3), strict=True)}
    if second:
        renames = {
            "attn.qkv.q_bias": "attention.self.query.bias", "attn.qkv.v_bias": "attention.self.value.bias",
            "attn.cpb_mlp": "attention.self.continuous_position_bias_mlp", "attn.logit_scale": "attention.self.logit_scale",
            "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
        }  # fmt: skip
        for old, new in renames.items():
            inside = inside.replace(old, new)
    else:
        inside = inside.replace("attn.rel_pos_bias", "attention.relative_position_bias").replace("attn.proj", "attention.o_proj")
    return {block + inside: value}


def torchvision_swin(ours: Backbone) -> nn.Module:
    """torchvision's Swin with our weights."""
    arguments = arguments_of(ours.config)
    side = arguments["window_size"]
    theirs = torchvision_swin_file.SwinTransformer(
        [arguments["patch_size"]] * 2, arguments["embed_dim"], list(arguments["depths"]), list(arguments["num_heads"]), [side, side],
        num_classes=ours.num_classes, norm_layer=nn.LayerNorm, stochastic_depth_prob=0.0,
    )  # fmt: skip
    state = {key: value for key, value in theirs.state_dict().items() if key.endswith("relative_position_index")}
    for name, value in ours.state_dict().items():
        if "mask_token" in name:
            continue
        renamed = name.replace("stem.proj", "features.0.0").replace("stem.norm", "features.0.2")
        renamed = re.sub(r"^stages\.(\d+)\.blocks\.", lambda found: f"features.{2 * int(found[1]) + 1}.", renamed)
        renamed = re.sub(r"^stages\.(\d+)\.downsample\.", lambda found: f"features.{2 * int(found[1])}.", renamed)
        renamed = renamed.replace("attn.rel_pos_bias.", "attn.").replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
        state[renamed] = value
    theirs.load_state_dict(state, strict=True)
    return theirs.to(next(ours.parameters()).dtype).eval()


def torchvision_vit(ours: Backbone) -> nn.Module:
    """torchvision's ViT with our weights."""
    arguments = arguments_of(ours.config)
    theirs = VisionTransformer(
        ours.image_size[0], arguments["patch_size"], arguments["depth"], arguments["num_heads"], ours.embed_dim, 4 * ours.embed_dim,
        num_classes=ours.num_classes, norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    renames = (
        ("patch_embed.cls_token", "class_token"), ("patch_embed.proj", "conv_proj"), ("patch_embed.pos_embed", "encoder.pos_embedding"),
        ("norm1", "ln_1"), ("norm2", "ln_2"), ("attn.qkv.weight", "self_attention.in_proj_weight"),
        ("attn.qkv.bias", "self_attention.in_proj_bias"), ("attn.proj", "self_attention.out_proj"), ("mlp.fc1", "mlp.0"),
        ("mlp.fc2", "mlp.3"), ("blocks.", "encoder.layers.encoder_layer_"), ("norm.", "encoder.ln."), ("head.", "heads.head."),
    )  # fmt: skip
    state = {}
    for name, value in ours.state_dict().items():
        if "mask_token" not in name:
            for old, new in renames:
                name = name.replace(old, new, 1)
            state[name] = value
    theirs.load_state_dict(state, strict=True)
    return theirs.to(next(ours.parameters()).dtype).eval()
