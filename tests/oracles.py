"""Helpers to hold our nets against other people's: weights that leave no term at zero, and tolerances."""

import torch
from torch import Tensor, nn
from transformers import BeitConfig, BeitForMaskedImageModeling

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
