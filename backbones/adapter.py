"""`timm:NAME`: any net of timm's that yields a feature map, in the contract of our own backbones.

Its inside is not ours to change, so the mask token stands in pixels: hidden cells become a learned patch before the net sees them.

Legend: B batch, C channels, H W pixels, P Q mask grid, h w feature grid, N tokens, D width, k pixels of a cell's side.
"""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mimetic.backbones.contract import MASK_TOKEN, Backbone, Features, hide, repeat_mask, sides
from mimetic.engine.errors import SettingError


def adapt(name: str, num_classes: int, image_size: int | Sequence[int] | None, in_channels: int, **overrides: Any) -> "TimmBackbone":
    """timm's net `name` in our contract.

    Args:
        image_size: side or (H, W) in pixels; None for the name's own.
        **overrides: keywords of timm's own.

    Raises:
        SettingError: timm is not installed, does not know the name or an override, or the net yields no feature map.
    """
    try:
        import timm
    except ImportError:
        raise SettingError(f"timm:{name} is a net of timm's, which is not installed; pip install timm") from None
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise SettingError(f"timm knows no {name!r}" + (f" (did you mean {near[0]}?)" if near else ""))
    own = timm.get_pretrained_cfg(name)
    size = sides(image_size if image_size is not None else tuple((own.input_size if own else (3, 224, 224))[1:]))
    arguments = {"num_classes": num_classes, "in_chans": in_channels} | overrides
    try:
        if _takes_a_size(name):
            arguments["img_size"] = size
        return TimmBackbone(timm.create_model(name, **arguments), size, in_channels, num_classes, arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        told = f"{arguments} for images of {size[0]}x{size[1]}"
        raise SettingError(f"timm:{name} cannot be built with {told}: {' '.join(str(error).split())}") from None


def _takes_a_size(name: str) -> bool:
    """Whether the net is built for one image size."""
    import timm

    with torch.device("meta"):
        return "img_size" in inspect.signature(type(timm.create_model(name)).__init__).parameters


class TimmBackbone(Backbone):
    """A net of timm's.

    Args:
        net: the net; its last map is found by one run over a blank picture.
        arguments: keywords it was built with.

    Raises:
        SettingError: it yields no feature map, or its map does not fit the image.
    """

    net: Any

    def __init__(self, net: Any, image_size: tuple[int, int], in_channels: int, num_classes: int, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.net, self.arguments = net, arguments
        self.prefix = int(getattr(net, "num_prefix_tokens", 0))
        self.reduction = int(net.feature_info[-1]["reduction"]) if getattr(net, "feature_info", None) else 0
        was_training = net.training
        with torch.enable_grad():  # a gradient tells which parameters the map does not depend on: those of the classifier
            map_BDhw, _ = self._features(torch.zeros(1, in_channels, *image_size, device=next(net.parameters()).device), net.eval())
            map_BDhw.sum().backward()
        self.heads = {name for name, parameter in net.named_parameters() if parameter.grad is None}
        net.train(was_training).zero_grad()
        self.embed_dim, *grid = map_BDhw.shape[1:]
        self.feature_grid = grid[0], grid[1]
        if any(side % cells for side, cells in zip(image_size, grid, strict=True)):
            raise SettingError(f"images of {image_size[0]}x{image_size[1]} pixels become a map of {grid[0]}x{grid[1]} places, which does "
                               f"not divide them; use a multiple of {-(-image_size[0] // grid[0])}")  # fmt: skip
        cell = [side // cells for side, cells in zip(image_size, grid, strict=True)]
        self.stem_grid = image_size  # hidden in pixels: a cell may have any size
        halved = min(cell) >= 32  # as of our own nets: tokens of 16 pixels
        self.mask_grid = (2 * grid[0], 2 * grid[1]) if halved else self.feature_grid
        patch = [side // cells for side, cells in zip(image_size, self.mask_grid, strict=True)]
        self.stand_in = StandIn(in_channels, (patch[0], patch[1]), self.mask_grid)
        self.depths = self._depths()
        self.num_depths = max(self.depths.values()) + 1

    @property
    def mask_token(self) -> nn.Parameter:
        """The stand-in for hidden cells, (1, C, k, k) pixels."""
        return self.stand_in.mask_token

    def forward_features(self, image_BCHW: Tensor, hidden_BPQ: Tensor | None = None, layers: Sequence[int] = ()) -> Features:
        """Encode images; see `Backbone.forward_features`. Layers are those of timm's `forward_intermediates`."""
        self.check_image(image_BCHW)
        image_BCHW = self.stand_in(image_BCHW, hidden_BPQ)
        map_BDhw, prefix_BND = self._features(image_BCHW, self.net)
        maps: list[Tensor] = []
        if layers:
            found = self.net.forward_intermediates(image_BCHW, indices=sorted(set(layers)), intermediates_only=True)
            maps = [found[sorted(set(layers)).index(layer)] for layer in layers]
        has_cls, has_dist = (getattr(self.net, name, None) is not None for name in ("cls_token", "dist_token"))
        cls, dist = (prefix_BND[:, i] if prefix_BND is not None and has else None for i, has in enumerate((has_cls, has_dist)))
        return Features(map_BDhw, cls, dist, tuple(maps))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits, or pooled features without classes, as timm's net gives them."""
        self.check_image(image_BCHW)
        return self.net(image_BCHW)

    def _features(self, image_BCHW: Tensor, net: Any) -> tuple[Tensor, Tensor | None]:
        """The last map (B, D, h, w), and the tokens before it (B, N, D)."""
        x = net.forward_features(image_BCHW)
        if not isinstance(x, Tensor) or x.dim() not in (3, 4):
            raise SettingError(f"{type(net).__name__} of timm yields no feature map, but {type(x).__name__}; it cannot be pretrained here")
        if x.dim() == 4:
            channels_last = x.shape[1] != net.num_features == x.shape[-1]
            return rearrange(x, "B h w D -> B D h w") if channels_last else x, None
        count = x.shape[1] - self.prefix
        h, w = (-(-side // self.reduction) for side in self.image_size) if self.reduction else (0, 0)
        if h * w != count:
            raise SettingError(f"{type(net).__name__} of timm yields {count} tokens, no {h}x{w} map; it cannot be pretrained here")
        return rearrange(x[:, self.prefix :], "B (h w) D -> B D h w", h=h), x[:, : self.prefix] if self.prefix else None

    def _depths(self) -> dict[str, int]:
        """Depths by timm's own grouping of parameters."""
        names = [name for name, _ in self.net.named_parameters()]
        if not hasattr(self.net, "group_matcher"):
            return dict.fromkeys(names, 0) | {"": 1}
        from timm.models import group_parameters

        groups = group_parameters(self.net, self.net.group_matcher(coarse=False))
        depths = {name: int(group) for group, members in groups.items() for name in members}
        last = max(depth for name, depth in depths.items() if name not in self.heads)
        return {name: min(depth, last) for name, depth in depths.items()}  # a classifier is as deep as what it stands on

    def depth_of(self, parameter_name: str) -> int:
        """Depth for layer decay, as timm counts it; the mask token counts as the stem."""
        return 0 if parameter_name.endswith(MASK_TOKEN) else self.depths[parameter_name.removeprefix("net.")]

    def no_weight_decay_names(self) -> set[str]:
        """What timm's net exempts, and the mask token."""
        theirs = self.net.no_weight_decay() if hasattr(self.net, "no_weight_decay") else set()
        named = {f"net.{name}" for name in theirs} | {f"stand_in.{MASK_TOKEN}"}
        return named & {name for name, _ in self.named_parameters()}

    def head_names(self) -> set[str]:
        """Names of the parameters that the map does not depend on."""
        return {f"net.{name}" for name in self.heads}

    def timm_name(self, name: str) -> str:
        """Name in timm's model."""
        return name.removeprefix("net.")

    def timm_arguments(self) -> dict[str, Any]:
        """Keywords for `timm.create_model`."""
        return dict(self.arguments)


class StandIn(nn.Module):
    """Hidden cells become a learned patch of pixels."""

    def __init__(self, channels: int, patch: tuple[int, int], grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, channels, *patch))

    def forward(self, image_BCHW: Tensor, hidden_BPQ: Tensor | None) -> Tensor:
        """(B, C, H, W) and bool (B, P, Q), True = hidden -> (B, C, H, W)."""
        if hidden_BPQ is None:
            return image_BCHW
        hidden_BHW = repeat_mask(hidden_BPQ, image_BCHW.shape[-2:])
        return hide(image_BCHW, hidden_BHW[:, None], self.mask_token.repeat(1, 1, *self.grid))
