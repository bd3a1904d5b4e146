"""What training a classifier is made of. Imports nothing heavy: `--help` and typos answer before torch is loaded."""

from dataclasses import dataclass

from mimetic.backbones import catalog
from mimetic.engine import ranges
from mimetic.engine.config import BackboneSettings, DataSettings, Expected, GuardSettings, OptimSettings, TrainSettings
from mimetic.engine.errors import SettingError

RESIDUAL_CNN = "residual_cnn"  # the one model that is no backbone: a teacher


@dataclass(frozen=True)
class LabelSettings:
    """Which labelled images are used. Draws with the same seed and disjoint ranges are disjoint.

    Args:
        per_class: Images per class; the default uses every labelled image.
        skip: Images per class to leave out before, in the drawn order.
        seed: Of the draw, apart from the seed of the training.
    """

    per_class: int | None = None
    skip: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.skip and self.per_class is None:
            raise SettingError(f"labels.skip is {self.skip} but labels.per_class is not set; a draw needs both")
        ranges.require(self, "labels", per_class=ranges.COUNT, skip=ranges.NOT_NEGATIVE, seed=ranges.SEED)


@dataclass(frozen=True)
class EvaluationSettings:
    """What accuracy is measured on; every image counts exactly once.

    Args:
        index: An index of images that were not trained on; the training index if a draw is given.
        metric: Its name in the records: test_accuracy, validation_accuracy.
        labels: A draw from that index; the default takes all of it.
    """

    index: str
    metric: str = "test_accuracy"
    labels: LabelSettings = LabelSettings()


@dataclass(frozen=True)
class InitSettings:
    """Where the weights come from.

    Args:
        path: A finished pretraining run or an exported backbone; the default starts from random weights.
    """

    path: str | None = None


@dataclass(frozen=True)
class DistillSettings:
    """DeiT's hard distillation (arXiv 2012.12877); needs a backbone with a distillation token.

    Args:
        teacher: A finished classifier run; the default trains on labels alone.
    """

    teacher: str | None = None


@dataclass(frozen=True)
class ClassifyViewSettings:
    """Augmentation and mixing.

    Args:
        crop_low: Smallest share of the picture's area that a random crop keeps; 1 does not crop.
        shift: Pixels by which the picture may move.
        flip: Probability of a horizontal flip.
        jitter: Strength of brightness, contrast and saturation jitter.
        smoothing: Label smoothing.
        mixup: Mixup's alpha (1710.09412); 0 switches it off.
        cutmix: CutMix's alpha (1905.04899); 0 switches it off. With both, each batch draws one.
        mean: Per channel, in [0, 1]; the default is the pretrained backbone's, else the index's.
        std: Likewise.
    """

    crop_low: float = 0.08
    shift: int = 0
    flip: float = 0.5
    jitter: float = 0.0
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        ranges.require(self, "views", crop_low=ranges.SOME_SHARE, shift=ranges.NOT_NEGATIVE, flip=ranges.SHARE, jitter=ranges.SHARE,
                       smoothing=ranges.BELOW_ONE, mixup=ranges.NOT_NEGATIVE, cutmix=ranges.NOT_NEGATIVE, std=ranges.POSITIVE)  # fmt: skip
        ranges.require_together(self, "views", "mean", "std")


@dataclass(frozen=True)
class ClassifyRecipe:
    """Trains a classifier: supervised from scratch, DeiT-distilled from a teacher, or fine-tuned from a pretrained backbone.

    Args:
        arm: What this run is called in comparisons.
        seed: Of everything that is random but the draw of labels.
        expected: What others published for this very setting; changes no number.
    """

    data: DataSettings
    train: TrainSettings
    optim: OptimSettings
    evaluation: EvaluationSettings
    backbone: BackboneSettings = BackboneSettings()
    labels: LabelSettings = LabelSettings()
    init: InitSettings = InitSettings()
    distill: DistillSettings = DistillSettings()
    views: ClassifyViewSettings = ClassifyViewSettings()
    arm: str = "supervised"
    guard: GuardSettings = GuardSettings()
    seed: int = 0
    expected: Expected = Expected()

    def __post_init__(self) -> None:
        if self.init.path and self.distill.teacher:
            raise SettingError("init.path and distill.teacher are both set; an arm is either fine-tuned or distilled")
        ranges.require(self, seed=ranges.SEED)
        if self.backbone.name != RESIDUAL_CNN:
            catalog.check(self.backbone.name, self.backbone.overrides)
