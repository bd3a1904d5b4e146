"""Masked image modeling without a tokenizer: hidden pixels themselves are predicted (SimMIM, arXiv:2111.09886).

Legend: B batch, C channels, H W pixels, P Q mask grid, h w feature grid, D width, K hidden cells per image.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimetic.backbones.contract import Backbone, Grid, repeat_mask
from mimetic.data.picture import in_unit_range
from mimetic.data.views import Normalize
from mimetic.engine.errors import SettingError
from mimetic.engine.objective import Objective, StepOutput
from mimetic.engine.pictures import contact_sheet

SHOWN = 12


class PixelModeling(Objective, ABC):
    """A backbone, and a decoder that paints what was hidden from it; a subclass says how, and what it costs to be wrong.

    Args:
        count: K.
    """

    def __init__(self, backbone: Backbone, decoder: nn.Module, normalize: Normalize, count: int) -> None:
        super().__init__()
        self.backbone, self.decoder, self.normalize, self.count = backbone, decoder, normalize, count
        for name in backbone.head_names():
            backbone.get_parameter(name).requires_grad_(False)
        self.num_depths = backbone.num_depths

    @abstractmethod
    def paint(self, image_BCHW: Tensor, hidden_BPQ: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) whose hidden pixels are the predicted ones; the others may be anything."""

    @property
    def measured_on(self) -> dict[str, Any]:
        """What a record of held-out images says beside the number."""
        return {"hidden": self.count}

    @torch.no_grad()
    def pictures(self, batch: Mapping[str, Any]) -> np.ndarray:
        """Rows: image, what the encoder sees, the same with predicted pixels in the hidden places.

        Targets that are normalised by their own mean and deviation are put back with those: what is painted has the true brightness.
        """
        image_BCHW, hidden_BPQ = batch["image"][:SHOWN], batch["hidden"][:SHOWN]
        was_training = self.training
        self.eval()
        painted_BCHW = self.normalize.undo(self.paint(self.normalize(image_BCHW), hidden_BPQ))
        self.train(was_training)
        image_BCHW, covered_B1HW = in_unit_range(image_BCHW), over_pixels(hidden_BPQ, image_BCHW)
        return contact_sheet([image_BCHW, torch.where(covered_B1HW, 0.5, image_BCHW), torch.where(covered_B1HW, painted_BCHW, image_BCHW)])

    def describe(self) -> dict[str, Any]:
        """The backbone, and what its input is normalized with."""
        return {"prefix": "backbone.", "create_backbone": self.backbone.config, **self.normalize.describe()}

    def depth_of(self, parameter_name: str) -> int:
        """The backbone's own depths; the decoder is last."""
        owner, _, name = parameter_name.partition(".")
        return self.backbone.depth_of(name) if owner == "backbone" else self.num_depths - 1

    def no_weight_decay_names(self) -> set[str]:
        """The backbone's tokens, positions and bias tables."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay_names()}


class SimMIM(PixelModeling):
    """features = backbone(image, hidden); painted = decoder(features); loss = |painted - image| over hidden pixels.

    Args:
        norm_target: side in pixels of the window that normalises targets, see `local_statistics`; None for pixels as they are.
    """

    def __init__(self, backbone: Backbone, decoder: nn.Module, normalize: Normalize, count: int, norm_target: int | None = None) -> None:
        super().__init__(backbone, decoder, normalize, count)
        self.norm_target = norm_target

    def forward(self, batch: Mapping[str, Any]) -> StepOutput:
        """`image` (B, C, H, W), uint8 or in [0, 1], `hidden` bool (B, P, Q), `valid` bool (B,)."""
        image_BCHW, hidden_BPQ = self.normalize(batch["image"]), batch["hidden"]
        painted_BCHW = self.decoder(self.backbone.forward_features(image_BCHW, hidden_BPQ).map_BDhw).float()
        mean_BCHW, deviation_BCHW = self._scale(image_BCHW)
        error_BCHW = (painted_BCHW - (image_BCHW - mean_BCHW) / deviation_BCHW).abs()
        counts_B1HW = (over_pixels(hidden_BPQ, image_BCHW) & batch["valid"][:, None, None, None]).float()
        return StepOutput((error_BCHW * counts_B1HW).sum() / (counts_B1HW.sum() + 1e-5) / image_BCHW.shape[1])

    def paint(self, image_BCHW: Tensor, hidden_BPQ: Tensor) -> Tensor:
        """See `PixelModeling.paint`."""
        mean_BCHW, deviation_BCHW = self._scale(image_BCHW)
        return self.decoder(self.backbone.forward_features(image_BCHW, hidden_BPQ).map_BDhw) * deviation_BCHW + mean_BCHW

    def _scale(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        if self.norm_target is None:
            return image_BCHW.new_zeros(()), image_BCHW.new_ones(())
        return local_statistics(image_BCHW, self.norm_target)


def pixel_decoder(width: int, stride: int, channels: int) -> nn.Sequential:
    """SimMIM's: a 1x1 convolution makes of each place of the map the pixels of its square; (B, D, h, w) -> (B, C, H, W)."""
    return nn.Sequential(nn.Conv2d(width, stride * stride * channels, kernel_size=1), nn.PixelShuffle(stride))


def local_statistics(image_BCHW: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation, (B, C, H, W) each, of the pixels in a square window around each pixel, as far as it lies in the image.

    SwinV2 (arXiv:2111.09883) normalises SimMIM's targets by them, in 47 pixels, and keeps the sum of the variance and 1e-6.

    Args:
        window: side in pixels, odd.
    """

    def mean_of(x_BCHW: Tensor) -> Tensor:  # by rows, then by columns: 2 x 47 additions a pixel in place of 47 x 47
        across = F.avg_pool2d(x_BCHW, (1, window), 1, (0, window // 2), count_include_pad=False)
        return F.avg_pool2d(across, (window, 1), 1, (window // 2, 0), count_include_pad=False)

    height, width = image_BCHW.shape[-2:]
    inside_HW = _inside(height, window, image_BCHW.device)[:, None] * _inside(width, window, image_BCHW.device)
    mean_BCHW = mean_of(image_BCHW)
    variance_BCHW = (mean_of(image_BCHW.square()) - mean_BCHW.square()) * inside_HW / (inside_HW - 1)
    return mean_BCHW, (variance_BCHW.clamp(min=0) + 1e-6).sqrt()


def _inside(side: int, window: int, device: torch.device) -> Tensor:
    """Pixels of the window around each place of a side that lie in it, (side,)."""
    places = torch.arange(side, device=device)
    return (places + window // 2).clamp(max=side - 1) - (places - window // 2).clamp(min=0) + 1


def over_pixels(hidden_BPQ: Tensor, image_BCHW: Tensor) -> Tensor:
    """The mask at each pixel, bool (B, 1, H, W)."""
    return repeat_mask(hidden_BPQ, image_BCHW.shape[-2:])[:, None]


def unit_grid(backbone: Backbone, unit: int) -> Grid:
    """(P, Q) squares of `unit` pixels, the grid of SimMIM's masks.

    Raises:
        SettingError: a square is no whole number of the stem's cells, or the image no whole number of squares.
    """
    (height, width), (rows, columns) = backbone.image_size, backbone.stem_grid
    cell = height // rows, width // columns
    fitting = [side for side in range(1, min(height, width)) if not any((side % cell[0], side % cell[1], height % side, width % side))]
    if unit not in fitting:
        raise SettingError(f"simmim.unit is {unit} pixels; squares of whole cells ({cell[0]}x{cell[1]} pixels) that tile the "
                           f"{height}x{width} image have {' or '.join(map(str, fitting)) or 'no side that fits'}")  # fmt: skip
    return height // unit, width // unit


def map_stride(backbone: Backbone) -> int:
    """Pixels of a side of a place of the backbone's map.

    Raises:
        SettingError: places are not square.
    """
    strides = {side // places for side, places in zip(backbone.image_size, backbone.feature_grid, strict=True)}
    if len(strides) > 1:
        raise SettingError("backbone.overrides.patch_size must be square here: the decoder's pixel shuffle is")
    return strides.pop()
