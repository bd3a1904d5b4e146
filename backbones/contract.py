"""What every backbone promises, so that objectives, heads, probes and exports need to know none of them.

Legend: B batch, C channels, H W pixels, P Q mask and token grid, h w feature grid, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimetic.engine.errors import CheckpointError, SettingError

Grid = tuple[int, int]
ONLY_OURS = ("weight_init",)  # overrides that change no architecture, and mean something else to timm
MASK_TOKEN = "mask_token"  # last part of its parameter's name, in every backbone
TABLE = "relative_position_bias_table"  # likewise, of every bias that is learned per offset


class Features(NamedTuple):
    """What a backbone sees in an image.

    `map_BDhw` comes after the final norm (an adapted net's is what timm's `forward_features`
    gives); `cls_BD` and `dist_BD` are the class and distillation tokens after the same norm,
    None where the backbone has none; `layers` are the raw maps of the layers that were asked for, in the order asked.
    """

    map_BDhw: Tensor
    cls_BD: Tensor | None = None
    dist_BD: Tensor | None = None
    layers: tuple[Tensor, ...] = ()


class Backbone(nn.Module, ABC):
    """An image encoder that can be shown part of an image.

    Attributes:
        image_size: (H, W) in pixels; other sizes are refused.
        in_channels: C.
        num_classes: outputs of the classifier; 0 for none.
        embed_dim: D of `map_BDhw` (the last stage's, where widths differ).
        feature_grid: (h, w) of `map_BDhw`.
        stem_grid: grid of the stem's output; `hidden_BPQ` may have any grid that divides it.
        mask_grid: (P, Q), the grid of masks and tokens unless a recipe says otherwise: the feature grid of a backbone with one
            resolution, twice that of one whose map shrinks to 1/32 (cells of 16 pixels).
        mask_token: learned stand-in for hidden cells. It is ours alone: timm's models have none, so it is left out of
            `timm_state_dict`. Without a mask it gets no gradient: freeze it for fine-tuning, or DDP waits for it.
        num_depths: how many values `depth_of` takes.
        grad_checkpointing: forget what blocks computed and compute it again for the gradient: slower, in less memory.
        config: what `create_backbone(**config, **overrides)` needs to build this net again, as plain values: `name`,
            `image_size`, `in_channels`, `num_classes`, `overrides`. Empty for a net built without the catalog.

    Parameters are only read inside the `forward` of the module that owns them: ZeRO-3 gathers them there and nowhere else.
    """

    image_size: Grid
    in_channels: int
    num_classes: int
    embed_dim: int
    feature_grid: Grid
    stem_grid: Grid
    mask_grid: Grid
    num_depths: int

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.grad_checkpointing = False

    @property
    @abstractmethod
    def mask_token(self) -> nn.Parameter:
        """The stand-in for hidden cells."""

    @abstractmethod
    def forward_features(self, image_BCHW: Tensor, hidden_BPQ: Tensor | None = None, layers: Sequence[int] = ()) -> Features:
        """Encode images.

        Args:
            image_BCHW: normalised pixels, of the size that the backbone was built for.
            hidden_BPQ: bool, True = hidden. No output bit depends on a hidden pixel, be it NaN, nor does any gradient. The
                grid must divide `stem_grid`; a coarser mask is repeated.
            layers: indices (from 0) of layers whose output to return as well, before the final norm.

        Raises:
            SettingError: an image size, channel count, mask grid or layer that does not fit.
        """

    @abstractmethod
    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, num_classes); the pooled features (B, D) of a backbone built without classes, as timm does."""

    @abstractmethod
    def depth_of(self, parameter_name: str) -> int:
        """Return 0 for stem, tokens and positions, i + 1 for layer i, `num_depths` - 1 for the final norm and heads.

        Layer decay gives a parameter the rate lr * decay ** (num_depths - 1 - depth) (BEiT, arXiv:2106.08254, appendix).
        """

    @abstractmethod
    def no_weight_decay_names(self) -> set[str]:
        """Names of tokens, positions and bias tables: not 1-D, yet free of weight decay like biases and norms."""

    def head_names(self) -> set[str]:
        """Names of the parameters that serve `forward` alone: pretraining freezes them, fine-tuning starts them afresh."""
        return {name for name, _ in self.named_parameters() if name.startswith("head")}

    def learned_arguments(self) -> dict[str, Any]:
        """Arguments that the weights depend on and that follow from the image size: they go along when it changes."""
        return {}

    def timm_name(self, name: str) -> str:
        """Name in timm's model of what `state_dict` calls `name`."""
        return name

    def timm_arguments(self) -> dict[str, Any]:
        """Keywords with which `timm.create_model(config["name"], ...)` builds this net's equal."""
        if not self.config:
            raise SettingError("a backbone built without the catalog has no timm name; use create_backbone(name, ...)")
        overrides = {name: value for name, value in self.config["overrides"].items() if name not in ONLY_OURS}
        return {"img_size": self.image_size, "in_chans": self.in_channels, "num_classes": self.num_classes} | overrides

    def timm_state_dict(self) -> dict[str, Tensor]:
        """Weights under timm's names; loads with `strict=True` into timm's model of the same name."""
        return {self.timm_name(name): value for name, value in self.state_dict().items() if not name.endswith(MASK_TOKEN)}

    def load_timm_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over timm's weights, all of them; the mask token stays as it is.

        Raises:
            CheckpointError: a name is missing, unknown, or of another shape. No weight has been changed then.
        """
        own = {self.timm_name(name): name for name in self.state_dict() if not name.endswith(MASK_TOKEN)}
        _refuse_other_names(own, state)
        weights = self.state_dict()
        for key, name in own.items():
            if state[key].shape != weights[name].shape:
                shapes = f"{tuple(state[key].shape)} in the weights, {tuple(weights[name].shape)} in the backbone"
                raise CheckpointError(f"{key}: {shapes}; build the backbone with the arguments that these weights had")
        self.load_state_dict({name: state[key] for key, name in own.items()}, strict=False)

    def run_block(self, block: nn.Module, *inputs: Any) -> Any:
        """A block's output, under gradient checkpointing if that is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _still(block)))
        return block(*inputs)

    def check_layers(self, layers: Sequence[int]) -> None:
        """Refuse indices of layers that are not there."""
        last = self.num_depths - 3
        if any(not 0 <= layer <= last for layer in layers):
            raise SettingError(f"layers {list(layers)}: the backbone has blocks 0 to {last}")

    def check_image(self, image_BCHW: Tensor) -> None:
        """Refuse images of another size or channel count than the backbone was built for."""
        channels, *size = image_BCHW.shape[-3:]
        if channels != self.in_channels:
            raise SettingError(f"images have {channels} channels, the backbone was built for in_channels={self.in_channels}")
        if tuple(size) != self.image_size:
            ours, theirs = "x".join(map(str, self.image_size)), "x".join(map(str, size))
            raise SettingError(f"images are {theirs}, the backbone was built for {ours}: resize, or set image_size to {theirs}")


@contextmanager
def _still(block: nn.Module) -> Iterator[None]:
    """Batch norms compute as before and leave their running statistics alone: what is computed again must not count again."""
    norms = [part for part in block.modules() if isinstance(part, nn.BatchNorm2d) and part.training]
    kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms if norm.num_batches_tracked is not None]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)  # type: ignore[union-attr]


def zero_hidden(image_BCHW: Tensor, hidden_BPQ: Tensor) -> Tensor:
    """Set hidden pixels to 0, by selection: NaN times 0 would stay NaN, forwards and in the stem's gradient."""
    hidden_BHW = repeat_mask(hidden_BPQ, image_BCHW.shape[-2:])
    return torch.where(hidden_BHW[:, None], image_BCHW.new_zeros(()), image_BCHW)


def hide(x: Tensor, hidden: Tensor, mask_token: Tensor) -> Tensor:
    """The mask token where `hidden`, else x: by selection, so that nothing of x is left there, not even NaN."""
    return torch.where(hidden, mask_token.to(x.dtype), x)


def repeat_mask(hidden_BPQ: Tensor, grid: Sequence[int]) -> Tensor:
    """Repeat the mask to a finer grid: (B, P, Q) -> (B, *grid).

    Raises:
        SettingError: a cell of the mask is no whole number of cells of that grid.
    """
    (p, q), (height, width) = hidden_BPQ.shape[-2:], grid
    if height % p or width % q:
        raise SettingError(f"the mask grid {p}x{q} does not divide the backbone's grid {height}x{width}: set the mask's grid "
                           f"to {height}x{width} or a divisor of it")
    return hidden_BPQ.repeat_interleave(height // p, -2).repeat_interleave(width // q, -1)


def sides(size: int | Sequence[int], name: str = "image_size") -> Grid:
    """(height, width) of a side or a pair.

    Raises:
        SettingError: less than 1.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise SettingError(f"{name} {height}x{width} cannot be; a side is 1 or more")
    return int(height), int(width)


def _refuse_other_names(own: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    missing, unknown = [key for key in own if key not in state], [key for key in state if key not in own]
    if missing or unknown:
        told = [f"{what} {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''} ({len(keys)})"
                for what, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise CheckpointError(f"weights do not fit the backbone: {'; '.join(told)}; name, overrides and num_classes must agree")
