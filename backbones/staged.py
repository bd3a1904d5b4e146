"""Backbones whose map shrinks from stage to stage: Swin, SwinV2, PoolFormer, Twins, MaxViT.

Legend: B batch, C channels, H W pixels, P Q mask grid, h w feature grid, D width.
"""

from abc import abstractmethod
from collections.abc import Container, Iterable, Sequence
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from mimetic.backbones.contract import MASK_TOKEN, TABLE, Backbone, Features, Grid
from mimetic.engine.errors import SettingError


class Stage(nn.Module):
    """Blocks at one resolution, and what leads there from the stage before."""

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.downsample, self.blocks = downsample, nn.ModuleList(blocks)


class Staged(Backbone):
    """Stem, stages, norm, mean over the map, head.

    A subclass sets `stem` (called with image and mask), `stages`, `norm` and `head`. Layer i is block i, counted through the
    stages; maps between blocks are channels-last where `channels_last` says so.
    """

    stem: nn.Module
    stages: Any  # an nn.ModuleList of Stage
    norm: nn.Module
    channels_last = True

    def __init__(self, image_size: Grid, in_channels: int, num_classes: int, widths: Sequence[int], depths: Sequence[int],
                 stem_stride: int, stride: int) -> None:  # fmt: skip
        super().__init__()
        if len(widths) != len(depths):
            raise SettingError(f"{len(widths)} widths {list(widths)}, {len(depths)} depths {list(depths)}; each stage has one of both")
        if any(side % stride for side in image_size):
            near = "x".join(str(max(round(side / stride), 1) * stride) for side in image_size)
            raise SettingError(f"image_size {image_size[0]}x{image_size[1]} is no multiple of {stride}, the backbone's stride; {near} is")
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        self.embed_dim, self.depths, self.num_depths = widths[-1], tuple(depths), sum(depths) + 2
        self.stem_grid = image_size[0] // stem_stride, image_size[1] // stem_stride
        self.feature_grid = image_size[0] // stride, image_size[1] // stride
        # Cells of half the stride: 16 pixels at a stride of 32, as large as the patches of a ViT.
        self.mask_grid = self.feature_grid if stride == stem_stride else (2 * self.feature_grid[0], 2 * self.feature_grid[1])

    @property
    def mask_token(self) -> nn.Parameter:
        """The stand-in for hidden cells."""
        return self.stem.mask_token  # type: ignore[return-value]

    def forward_features(self, image_BCHW: Tensor, hidden_BPQ: Tensor | None = None, layers: Sequence[int] = ()) -> Features:
        """Encode images; see `Backbone.forward_features`."""
        seen: dict[int, Tensor] = {}
        self.check_layers(layers)
        x_BDhw = self.final_map(self.encode(image_BCHW, hidden_BPQ, dict.fromkeys(layers), seen))
        return Features(x_BDhw, layers=tuple(seen[layer] for layer in layers))

    def encode(self, image_BCHW: Tensor, hidden_BPQ: Tensor | None = None, wanted: Container[int] = (),
               seen: dict[int, Tensor] | None = None) -> Tensor:  # fmt: skip
        """The last block's output, in the layout of the blocks; maps (B, D, h, w) of the wanted layers go into `seen`."""
        self.check_image(image_BCHW)
        x = self.stem(image_BCHW, hidden_BPQ)
        layer = 0
        for stage in self.stages:
            x = stage.downsample(x)
            for block in stage.blocks:
                x = self.run_block(block, x)
                if seen is not None and layer in wanted:
                    seen[layer] = self._map(x)
                layer += 1
        return x

    def final_map(self, x: Tensor) -> Tensor:
        """(B, D, h, w) after the final norm."""
        return self._map(self.norm(x))

    @abstractmethod
    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits, or pooled features without classes."""

    def _map(self, x: Tensor) -> Tensor:
        return rearrange(x, "B h w D -> B D h w") if self.channels_last else x

    def depth_of(self, parameter_name: str) -> int:
        """Depth for layer decay: the step between two stages goes with the block before it, as in SimMIM (arXiv:2111.09886)."""
        part, *rest = parameter_name.split(".")
        if part == "stem":
            return 0
        if part != "stages":
            return self.num_depths - 1
        before = sum(self.depths[: int(rest[0])])
        return before + int(rest[2]) + 1 if rest[1] == "blocks" else before

    def no_weight_decay_names(self) -> set[str]:
        """Names of the mask token and the position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith((MASK_TOKEN, TABLE))}
