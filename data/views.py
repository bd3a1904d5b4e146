"""Views: what the networks see of a picture.

All randomness is drawn from each sample's own seed, as arrays over the batch. Pixels stay uint8 until they are on the device;
those of data with a pixel range are float32 in [0, 1], and stay there.

Legend: B batch, C channels, H W pixels, P Q token grid. A box is (top, left, height, width) in pixels.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from mimetic.data.jitter import jittered
from mimetic.data.jpeg import Box
from mimetic.data.masks import MaskGenerator
from mimetic.data.picture import Picture, cut, in_unit_range
from mimetic.data.randomness import mix, uniform
from mimetic.engine.errors import SettingError

CROP, FLIP, JITTER, SHIFT, MASK = range(5)  # what a draw is for: each has its own stream of numbers
ATTEMPTS = 10

Images = Sequence[Picture | torch.Tensor]  # (C, H, W) where they are tensors, uint8 or float32 in [0, 1]


def random_boxes(seeds_B: NDArray[np.uint64], sizes_B2: NDArray[np.int64], scale: tuple[float, float],
                 ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> NDArray[np.int64]:  # fmt: skip
    """Boxes (B, 4) of torchvision's RandomResizedCrop: an even share of the area, a log-even aspect ratio, ten tries each.

    Where no try fits, the largest central box of an allowed ratio.
    """
    height_B1, width_B1 = sizes_B2[:, :1].astype(float), sizes_B2[:, 1:].astype(float)
    tries = np.arange(ATTEMPTS)
    area_BT = height_B1 * width_B1 * (scale[0] + uniform(seeds_B[:, None], CROP, 0, tries) * (scale[1] - scale[0]))
    low, high = np.log(ratio)
    ratio_BT = np.exp(low + uniform(seeds_B[:, None], CROP, 1, tries) * (high - low))
    w_BT, h_BT = np.rint(np.sqrt(area_BT * ratio_BT)), np.rint(np.sqrt(area_BT / ratio_BT))
    fits_BT = (w_BT > 0) & (w_BT <= width_B1) & (h_BT > 0) & (h_BT <= height_B1)
    first_B, rows = fits_BT.argmax(1), np.arange(len(seeds_B))
    whole = np.clip(width_B1 / height_B1, *ratio)[:, 0]
    central_h = np.minimum(height_B1[:, 0], np.rint(width_B1[:, 0] / whole))
    central_w = np.minimum(width_B1[:, 0], np.rint(height_B1[:, 0] * whole))
    any_B = fits_BT.any(1)
    h_B, w_B = np.where(any_B, h_BT[rows, first_B], central_h), np.where(any_B, w_BT[rows, first_B], central_w)
    room_h, room_w = height_B1[:, 0] - h_B, width_B1[:, 0] - w_B
    top = np.where(any_B, np.floor(uniform(seeds_B, CROP, 2) * (room_h + 1)), room_h // 2)
    left = np.where(any_B, np.floor(uniform(seeds_B, CROP, 3) * (room_w + 1)), room_w // 2)
    return np.stack([top, left, h_B, w_B], 1).astype(np.int64)


class Drawn(NamedTuple):
    """What was drawn for pictures: with the pictures themselves, all that makes their views.

    Attributes:
        boxes_B4: what is cropped, in pixels of the picture.
        flips_B: whether the crop is turned round.
        seeds_B: of shift and colours.
    """

    boxes_B4: NDArray[np.int64]
    flips_B: NDArray[np.bool_]
    seeds_B: NDArray[np.uint64]


@dataclass(frozen=True)
class Augmentation:
    """What happens to a picture before it is resized: shift, crop, flip, colour jitter.

    Attributes:
        scale: share of the area that a random crop keeps, (low, high); (1, 1) takes the largest box.
        shift: pixels by which the picture may move in each direction, over black.
        flip: probability of a horizontal flip.
        jitter: strength of brightness, contrast and saturation jitter (BEiT: 0.4), at most 1. It is computed on the crop, where
            BEiT's code jitters the whole picture first; only contrast, which centres on a mean, notices.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    shift: int = 0
    flip: float = 0.5
    jitter: float = 0.0

    def __call__(self, images: Images, seeds_B: NDArray[np.uint64], smallest: int | None = None) -> Iterator[torch.Tensor]:
        """Crops of different sizes (C, h, w). Boxes are drawn in the picture's own pixels and read as `Picture.crop` does.

        One after the other, so that a crop is still in the processor's cache when it is resized.
        """
        return self.crops(images, self.draw(images, seeds_B), smallest)

    def draw(self, images: Images, seeds_B: NDArray[np.uint64]) -> Drawn:
        """What each picture's seed means for it."""
        boxes_B4 = random_boxes(seeds_B, np.array([image.shape[-2:] for image in images]), self.scale)
        return Drawn(boxes_B4, uniform(seeds_B, FLIP) < self.flip, seeds_B)

    def crops(self, images: Images, drawn: Drawn, smallest: int | None = None) -> Iterator[torch.Tensor]:
        """The crops that were drawn, whenever that was."""
        boxes_B4, flips_B, seeds_B = drawn
        if self.shift:
            images = self._shifted(images, seeds_B)
        factors_B3 = 1 + self.jitter * (2 * uniform(seeds_B[:, None], JITTER, 0, np.arange(3)) - 1)
        orders_B3 = uniform(seeds_B[:, None], JITTER, 1, np.arange(3)).argsort(1)
        for image, box, flip, factors, order in zip(images, boxes_B4.tolist(), flips_B, factors_B3, orders_B3, strict=True):
            crop = cropped(image, box, smallest)
            crop = jittered(crop, factors, order) if self.jitter else crop
            yield _flipped(crop) if flip else crop

    def _shifted(self, images: Images, seeds_B: NDArray[np.uint64]) -> list[torch.Tensor]:
        moves = np.floor(uniform(seeds_B[:, None], SHIFT, np.arange(2)) * (2 * self.shift + 1)).astype(int).tolist()
        padded = [F.pad(_whole(image), [self.shift] * 4) for image in images]
        return [cut(wide, (y, x, *image.shape[-2:])) for wide, image, (y, x) in zip(padded, images, moves, strict=True)]


def _whole(image: Picture | torch.Tensor) -> torch.Tensor:
    """All pixels, as many as the picture says: boxes are drawn by that, and one that cannot be read is smaller."""
    pixels = image.pixels() if isinstance(image, Picture) else image
    return pixels if pixels.shape == image.shape else pixels.new_zeros(image.shape)


UNALTERED = Augmentation((1.0, 1.0), flip=0.0)


class PretrainViews:
    """BEiT's two views and the mask: `image` and `target` (BCHW) share crop, flip and jitter; `hidden` (bool BPQ).

    They differ in size and interpolation: bicubic for the backbone, Lanczos for the tokenizer (bicubic in BEiT v2, whose two views
    are then one and the same).
    """

    def __init__(self, image_size: int, target_size: int, augmentation: Augmentation, masks: MaskGenerator | None,
                 target_interpolation: str = "lanczos") -> None:  # fmt: skip
        self.image_size, self.target_size, self.augmentation, self.masks = image_size, target_size, augmentation, masks
        self.target_interpolation = target_interpolation

    def __call__(self, images: Images, seeds_B: NDArray[np.uint64]) -> dict[str, torch.Tensor]:
        """Args as in `mimetic.data.stream.Transform`."""
        batch = self.made(images, self.augmentation.draw(images, seeds_B))
        return batch if self.masks is None else batch | {"hidden": self.masks.sample(mix(seeds_B, MASK))}

    def made(self, images: Images, drawn: Drawn, names: Sequence[str] = ("image", "target")) -> dict[str, torch.Tensor]:
        """The views that were drawn, both or one of them."""
        views = {"image": (self.image_size, "bicubic"), "target": (self.target_size, self.target_interpolation)}
        wanted = list(dict.fromkeys(views[name] for name in names))  # once where both are the same
        crops = self.augmentation.crops(images, drawn, max(self.image_size, self.target_size))
        made = dict(zip(wanted, resized(crops, len(images), *wanted), strict=True))
        return {name: made[views[name]] for name in names}


class MaskedViews:
    """`image` (BCHW) and its mask `hidden` (bool BPQ): all that is needed where pixels themselves are to be predicted."""

    def __init__(self, image_size: int, augmentation: Augmentation, masks: MaskGenerator) -> None:
        self.image_size, self.augmentation, self.masks = image_size, augmentation, masks

    def __call__(self, images: Images, seeds_B: NDArray[np.uint64]) -> dict[str, torch.Tensor]:
        """Args as in `mimetic.data.stream.Transform`."""
        crops = self.augmentation(images, seeds_B, self.image_size)
        (image_BCHW,) = resized(crops, len(images), (self.image_size, "bicubic"))
        return {"image": image_BCHW, "hidden": self.masks.sample(mix(seeds_B, MASK))}


class ClassifyViews:
    """`image` (BCHW): augmented for training, or the centre for evaluation (`augmentation=None`)."""

    def __init__(self, image_size: int, augmentation: Augmentation | None) -> None:
        self.image_size, self.augmentation = image_size, augmentation

    def __call__(self, images: Images, seeds_B: NDArray[np.uint64]) -> dict[str, torch.Tensor]:
        """Args as in `mimetic.data.stream.Transform`."""
        if self.augmentation is None:
            crops: Iterator[torch.Tensor] = (cropped(image, _centre(*image.shape[-2:]), self.image_size) for image in images)
        else:
            crops = self.augmentation(images, seeds_B, self.image_size)
        (image_BCHW,) = resized(crops, len(images), (self.image_size, "bicubic"))
        return {"image": image_BCHW}


def cropped(image: Picture | torch.Tensor, box: Box, smallest: int | None) -> torch.Tensor:
    """(C, h, w): of a picture as `Picture.crop` has it; of pixels, all that lie in the box."""
    return image.crop(box, smallest) if isinstance(image, Picture) else cut(image, box)


def resized(crops: Iterable[torch.Tensor], count: int, *views: tuple[int, str]) -> list[torch.Tensor]:
    """(B, C, size, size) of the crops' dtype for each (size, "bicubic" or "lanczos"), antialiased: as Pillow resizes.

    In memory colours stay side by side (channels last), as decoders leave them and resizing takes them: turning them into planes
    costs a tenth of a small picture's time, and what follows on the device does not need it.
    """
    batches: list[torch.Tensor] = []
    for place, crop in enumerate(crops):
        batches = batches or [
            torch.empty(count, len(crop), size, size, dtype=crop.dtype, memory_format=torch.channels_last) for size, _ in views
        ]
        crop_1CHW = crop.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # so that torch takes it for channels last, and a third less time
        for batch_BCHW, (size, mode) in zip(batches, views, strict=True):
            fits = crop.shape[-2:] == (size, size)
            batch_BCHW[place] = crop if fits else F.interpolate(crop_1CHW, (size, size), mode=mode, antialias=True)[0]
    for batch_BCHW in batches:
        if batch_BCHW.is_floating_point():
            batch_BCHW.clamp_(0, 1)  # bicubic and Lanczos overshoot at edges; in 8 bits torch clamps by itself
    return batches


def _flipped(image_CHW: torch.Tensor) -> torch.Tensor:
    """Rows of whole pixels turned round: three times as fast as in each channel, where they lie in memory as pixels."""
    return image_CHW.permute(1, 2, 0).flip(1).permute(2, 0, 1)


def _centre(height: int, width: int) -> Box:
    """The largest square, where torchvision's `center_crop` puts it."""
    side = min(height, width)
    return round((height - side) / 2), round((width - side) / 2), side, side


class Normalize(nn.Module):
    """BCHW to float, (x - mean) / std per channel with x in [0, 1], on the device where the pixels are."""

    mean_C11: torch.Tensor
    std_C11: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise SettingError(f"views.mean has {len(mean)} values, views.std has {len(std)}; give one a channel")
        self.register_buffer("mean_C11", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std_C11", torch.tensor(std)[:, None, None], persistent=False)

    def describe(self) -> dict[str, Any]:
        """Mean and deviation per channel, in [0, 1]."""
        return {"mean": self.mean_C11.flatten().tolist(), "std": self.std_C11.flatten().tolist()}

    def for_channels(self, channels: int) -> "Normalize":
        """Itself, once it is sure that images of so many channels fit.

        Raises:
            SettingError: they do not; both numbers are named.
        """
        if len(self.mean_C11) != channels:
            raise SettingError(f"views.mean has {len(self.mean_C11)} values, images have {channels} channels; give one a channel")
        return self

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """float32 BCHW."""
        return (in_unit_range(image_BCHW) - self.mean_C11) / self.std_C11

    def undo(self, normalized_BCHW: torch.Tensor) -> torch.Tensor:
        """Normalized pixels as they were, in [0, 1]."""
        return normalized_BCHW * self.std_C11 + self.mean_C11
