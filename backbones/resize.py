"""Backbones for images of another size or other channels: what depends on them is interpolated, inflated or summed."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from mimetic.backbones.catalog import create_backbone
from mimetic.backbones.contract import MASK_TOKEN, Backbone
from mimetic.backbones.interpolation import adapt_channels
from mimetic.engine.errors import CheckpointError


def resized(backbone: Backbone, image_size: int | Sequence[int] | None = None, in_channels: int | None = None,
            **overrides: Any) -> Backbone:  # fmt: skip
    """The same backbone for images of another size or other channels, with its weights fitted.

    Args:
        backbone: built from the catalog.
        image_size: side or (H, W) in pixels; None keeps it.
        in_channels: C; None keeps it.
        **overrides: such as `window_size=12`, where the size asks for one.

    Raises:
        SettingError: a size that the family does not allow.
        CheckpointError: a weight that cannot be fitted, such as a linear layer over the places.
    """
    config = dict(backbone.config)
    overrides = config.pop("overrides") | backbone.learned_arguments() | overrides
    config["image_size"] = config["image_size"] if image_size is None else image_size
    config["in_channels"] = config["in_channels"] if in_channels is None else in_channels
    target = create_backbone(**config, **overrides).to(backbone.mask_token.dtype)
    target.load_state_dict(fitted(backbone, target))
    return target.train(backbone.training)


@torch.no_grad()
def fitted(source: Backbone, target: Backbone, fresh: Collection[str] = ()) -> dict[str, Tensor]:
    """The weights of `source` in the shapes of `target`, a backbone of the same architecture.

    Positions and bias tables are interpolated, the stem's input channels summed or inflated, a bias table that all blocks
    shared is copied into each; whatever else differs is refused.

    Args:
        fresh: names of weights that stay as they are in `target`, and are left out.

    Raises:
        CheckpointError: names the first weight that cannot be fitted, and both shapes.
    """
    given, wanted, parts = source.state_dict(), target.state_dict(), dict(source.named_modules())
    for name, part in target.named_modules():
        other = parts.get(name) or parts.get(name.rpartition(".attn.")[2])  # BEiT's bias, shared there and per block here
        if hasattr(part, "resized_from") and other is not None:
            given |= {f"{name}.{key}": value for key, value in part.resized_from(other).items()}
    if source.in_channels != target.in_channels:
        stem = next(name for name, value in given.items()
                    if value.dim() == 4 and value.shape[1] == source.in_channels and not name.endswith(MASK_TOKEN))  # fmt: skip
        given[stem] = adapt_channels(given[stem], target.in_channels)
    shared = {name for name in given if name.startswith("rel_pos_bias.") and name not in wanted and any(
        other.endswith(f".attn.{name}") for other in wanted)}  # fmt: skip
    for name in [*wanted, *given]:
        if name in fresh or name in shared:
            continue
        have, want = (tuple(state[name].shape) if name in state else None for state in (given, wanted))
        if have != want:
            cure = "give backbone.overrides the values it was pretrained with"
            if source.image_size != target.image_size:
                cure += f", or set backbone.image_size to its {'x'.join(map(str, source.image_size))}"
            raise CheckpointError(f"{name}: {have or 'nothing'} in the pretrained backbone, {want or 'nothing'} here; {cure}")
    return {name: given[name] for name in wanted if name not in fresh}
