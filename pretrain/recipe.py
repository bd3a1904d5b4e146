"""What a BEiT pretraining is made of. Imports nothing heavy: `--help` and typos answer before torch is loaded."""

from dataclasses import dataclass

from mimetic.backbones import catalog
from mimetic.engine import ranges
from mimetic.engine.config import BackboneSettings, DataSettings, Expected, GuardSettings, OptimSettings, TrainSettings
from mimetic.engine.errors import SettingError


@dataclass(frozen=True)
class TokenizerSettings:
    """The frozen image tokenizer.

    Args:
        path: The folder of a tokenizer, the run folder that trained it, or dalle for the one that OpenAI published.
        precision: Of its convolutions: fp32, or bf16, which is faster and changes some ids of cells that two codes fit almost equally.
        cache: A folder that `mimetic tokens` made with this recipe: training reads its ids and does not run the tokenizer. Epoch e
            sees view e mod N of its N.
        accept_collapsed: Train although the look at some images before the first step finds that its tokens carry next to nothing.
    """

    path: str
    precision: str = "fp32"
    cache: str | None = None
    accept_collapsed: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise SettingError(f"tokenizer.precision is {self.precision!r}; it must be fp32 or bf16")


@dataclass(frozen=True)
class MaskSettings:
    """Which cells are hidden.

    Args:
        kind: block (BEiT's blockwise masks) or random (cells drawn evenly).
        count: K, hidden cells per image, exactly.
        min_block: Cells of the smallest block.
        aspect: Lowest aspect ratio of a block; the highest is its inverse.
        unit: Side in cells of the squares that are hidden as one; SimMIM's 32 pixels are 2 cells of 16.
    """

    kind: str = "block"
    count: int = 75
    min_block: int = 16
    aspect: float = 0.3
    unit: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("block", "random"):
            raise SettingError(f"mask.kind is {self.kind!r}; it must be block or random")
        ranges.require(self, "mask", count=ranges.COUNT, min_block=ranges.COUNT, aspect=ranges.SOME_SHARE, unit=ranges.COUNT)


@dataclass(frozen=True)
class ViewSettings:
    """The views of a picture that backbone and tokenizer get.

    Args:
        crop_low: Smallest share of the picture's area that a random crop keeps.
        crop_high: Largest share.
        shift: Pixels by which the picture may move before it is cropped.
        flip: Probability of a horizontal flip.
        jitter: Strength of brightness, contrast and saturation jitter.
        target_size: Side of the tokenizer's view in pixels; its tokens are the grid of masks and targets. The default gives the
            backbone's own: a token for each patch of a ViT, for each 16 pixels of a net whose map shrinks to 1/32.
        mean: Per channel, in [0, 1], subtracted from the backbone's view; the default is the index's.
        std: Per channel; the default is the index's.
    """

    crop_low: float = 0.08
    crop_high: float = 1.0
    shift: int = 0
    flip: float = 0.5
    jitter: float = 0.4
    target_size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        ranges.require(self, "views", crop_low=ranges.SOME_SHARE, crop_high=ranges.SOME_SHARE, shift=ranges.NOT_NEGATIVE,
                       flip=ranges.SHARE, jitter=ranges.SHARE, target_size=ranges.COUNT, std=ranges.POSITIVE)  # fmt: skip
        if self.crop_low > self.crop_high:
            raise SettingError(f"views.crop_low is {self.crop_low}, views.crop_high {self.crop_high}; the low one must not be the larger")
        ranges.require_together(self, "views", "mean", "std")


@dataclass(frozen=True)
class BeitRecipe:
    """Pretrains a backbone by BEiT's masked image modeling (arXiv 2106.08254).

    Args:
        seed: Of everything that is random.
        evaluate_on: An index of held-out images; masked accuracy is measured there.
        expected: What others published for this very setting; changes no number.
    """

    data: DataSettings
    train: TrainSettings
    optim: OptimSettings
    tokenizer: TokenizerSettings
    backbone: BackboneSettings = BackboneSettings()
    mask: MaskSettings = MaskSettings()
    views: ViewSettings = ViewSettings()
    evaluate_on: str | None = None
    guard: GuardSettings = GuardSettings()
    seed: int = 0
    expected: Expected = Expected()

    def __post_init__(self) -> None:
        ranges.require(self, seed=ranges.SEED)
        catalog.check(self.backbone.name, self.backbone.overrides)


@dataclass(frozen=True)
class AggregationSettings:
    """Where patch aggregation branches off (Peng et al., arXiv 2208.06366, section 2.3).

    Args:
        layer: Blocks after which patch tokens are taken; they must win the rest from the last [CLS]. 9 of 12, 21 of 24.
        head_layers: Blocks that bring both together, used in pretraining only.
    """

    layer: int = 9
    head_layers: int = 2

    def __post_init__(self) -> None:
        ranges.require(self, "aggregation", layer=ranges.COUNT, head_layers=ranges.COUNT)


@dataclass(frozen=True)
class Beit2Recipe(BeitRecipe):
    """Pretrains a backbone by BEiT v2's masked image modeling with patch aggregation (arXiv 2208.06366).

    Args:
        aggregation: What makes [CLS] gather the image.
    """

    aggregation: AggregationSettings = AggregationSettings()
