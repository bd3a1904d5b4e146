"""What pretrainings on raw pixels are made of. Imports nothing heavy: `--help` and typos answer before torch is loaded."""

import math
from dataclasses import dataclass

from mimetic.backbones import catalog
from mimetic.engine import ranges
from mimetic.engine.config import BackboneSettings, DataSettings, Expected, GuardSettings, OptimSettings, TrainSettings
from mimetic.engine.errors import SettingError

RATIO = ranges.Range(0, 1, above=True, below=True)


def hidden_count(setting: str, ratio: float, cells: int) -> int:
    """K, hidden cells of an image: their share rounded up, as SimMIM and MAE round it.

    Raises:
        SettingError: nothing would be left to see.
    """
    count = math.ceil(round(ratio * cells, 6))  # 0.55 x 100 is a little more than 55 in floating point
    if count >= cells:
        most = math.floor(1000 * (1 - 1 / cells)) / 1000
        raise SettingError(f"{setting} is {ratio:g}, which hides all {cells} cells of an image; at most {most:g} leaves one to see")
    return count


@dataclass(frozen=True)
class PixelViewSettings:
    """The view of a picture that is partly hidden and predicted.

    Args:
        crop_low: Smallest share of the picture's area that a random crop keeps.
        shift: Pixels by which the picture may move before it is cropped.
        flip: Probability of a horizontal flip.
        mean: Per channel, in [0, 1], subtracted from pixels; the default is the index's.
        std: Per channel; the default is the index's.
    """

    crop_low: float = 0.67
    shift: int = 0
    flip: float = 0.5
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        ranges.require(self, "views", crop_low=ranges.SOME_SHARE, shift=ranges.NOT_NEGATIVE, flip=ranges.SHARE, std=ranges.POSITIVE)
        ranges.require_together(self, "views", "mean", "std")


@dataclass(frozen=True)
class MaeViewSettings(PixelViewSettings):
    """The view of a picture that is partly hidden and predicted.

    Args:
        crop_low: Smallest share of the picture's area that a random crop keeps.
        shift: Pixels by which the picture may move before it is cropped.
        flip: Probability of a horizontal flip.
        mean: Per channel, in [0, 1], subtracted from pixels; the default is the index's.
        std: Per channel; the default is the index's.
    """

    crop_low: float = 0.2


@dataclass(frozen=True)
class SimmimSettings:
    """What is hidden, and what is predicted there.

    Args:
        unit: Side in pixels of the squares that are hidden; whole cells of the backbone's stem.
        ratio: Share of the squares that are hidden.
        norm_target: Side in pixels, an odd number, of a window around each pixel whose mean and deviation its target is normalised by
            (SwinV2, arXiv 2111.09883, takes 47); the default predicts pixels as they are.
    """

    unit: int = 32
    ratio: float = 0.6
    norm_target: int | None = None

    def __post_init__(self) -> None:
        ranges.require(self, "simmim", unit=ranges.COUNT, ratio=RATIO, norm_target=ranges.COUNT)
        if self.norm_target is not None and (self.norm_target < 3 or self.norm_target % 2 == 0):
            raise SettingError(f"simmim.norm_target is {self.norm_target}; a window has a middle, so it must be odd, and 3 or more")


@dataclass(frozen=True)
class SimmimRecipe:
    """Pretrains a backbone by SimMIM: hidden pixels are predicted (arXiv 2111.09886).

    Args:
        seed: Of everything that is random.
        evaluate_on: An index of held-out images; the loss at their hidden pixels is measured there.
        expected: What others published for this very setting; changes no number.
    """

    data: DataSettings
    train: TrainSettings
    optim: OptimSettings
    backbone: BackboneSettings = BackboneSettings()
    simmim: SimmimSettings = SimmimSettings()
    views: PixelViewSettings = PixelViewSettings()
    evaluate_on: str | None = None
    guard: GuardSettings = GuardSettings()
    seed: int = 0
    expected: Expected = Expected()

    def __post_init__(self) -> None:
        ranges.require(self, seed=ranges.SEED)
        catalog.check(self.backbone.name, self.backbone.overrides)


@dataclass(frozen=True)
class MaeSettings:
    """What is hidden, and the decoder that predicts it and is then thrown away.

    Args:
        ratio: Share of the patches that are hidden, drawn evenly.
        norm_pix_loss: Predict each patch's pixels normalised by their own mean and deviation.
        decoder_embed_dim: Width of the decoder.
        decoder_depth: Its blocks.
        decoder_num_heads: Its heads, a divisor of the width.
    """

    ratio: float = 0.75
    norm_pix_loss: bool = True
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16

    def __post_init__(self) -> None:
        ranges.require(self, "mae", ratio=RATIO, decoder_embed_dim=ranges.COUNT, decoder_depth=ranges.COUNT, decoder_num_heads=ranges.COUNT)
        for name, divisor in (("mae.decoder_num_heads", self.decoder_num_heads), ("sine-cosine positions", 4)):
            if self.decoder_embed_dim % divisor:
                raise SettingError(f"mae.decoder_embed_dim is {self.decoder_embed_dim}, no multiple of {divisor} ({name}); use "
                                   f"{max(1, self.decoder_embed_dim // divisor) * divisor}")  # fmt: skip


@dataclass(frozen=True)
class MaeRecipe:
    """Pretrains a ViT as a masked autoencoder: it sees visible patches alone (arXiv 2111.06377).

    Args:
        seed: Of everything that is random.
        evaluate_on: An index of held-out images; the loss at their hidden patches is measured there.
        expected: What others published for this very setting; changes no number.
    """

    data: DataSettings
    train: TrainSettings
    optim: OptimSettings
    backbone: BackboneSettings = BackboneSettings("vit_base_patch16_224")
    mae: MaeSettings = MaeSettings()
    views: MaeViewSettings = MaeViewSettings()
    evaluate_on: str | None = None
    guard: GuardSettings = GuardSettings()
    seed: int = 0
    expected: Expected = Expected()

    def __post_init__(self) -> None:
        ranges.require(self, seed=ranges.SEED)
        catalog.check(self.backbone.name, self.backbone.overrides)
