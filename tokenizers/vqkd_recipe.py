"""What a VQ-KD training is made of. Imports nothing heavy: `--help` and typos answer before torch is loaded."""

from dataclasses import dataclass

from mimetic.backbones import catalog
from mimetic.engine import ranges
from mimetic.engine.config import BackboneSettings, DataSettings, Expected, GuardSettings, OptimSettings, TrainSettings
from mimetic.engine.errors import SettingError


@dataclass(frozen=True)
class VqkdSettings:
    """The codebook and the decoder (Peng et al., arXiv 2208.06366).

    Args:
        vocab_size: V, codes.
        code_width: Width of a code vector.
        decoder_depth: Blocks of the decoder, which is as wide as the encoder.
        commitment: Weight of the pull of features to their codes.
        decay: Of the running means that codes are.
        restart_every: Steps between restarts of dead codes.
        start_images: Images whose features the codes start from.
    """

    vocab_size: int = 8192
    code_width: int = 32
    decoder_depth: int = 3
    commitment: float = 1.0
    decay: float = 0.99
    restart_every: int = 50
    start_images: int = 1024

    def __post_init__(self) -> None:
        ranges.require(self, "vqkd", vocab_size=ranges.COUNT, code_width=ranges.COUNT, decoder_depth=ranges.COUNT,
                       commitment=ranges.NOT_NEGATIVE, decay=ranges.BELOW_ONE, restart_every=ranges.COUNT,
                       start_images=ranges.COUNT)  # fmt: skip


@dataclass(frozen=True)
class TeacherSettings:
    """The frozen net whose features the tokens are to tell.

    Args:
        path: A finished run or an exported folder, `timm:NAME` with `weights`, or `transformers:FOLDER`. Nothing is downloaded.
        weights: File of a timm net's weights: .safetensors, or .pth.
        image_size: Side in pixels that images are resized to for the teacher; the default is its own.
        mean: Per channel, in [0, 1], subtracted from the teacher's input; the default is its own.
        std: Per channel; the default is its own.
    """

    path: str
    weights: str | None = None
    image_size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        ranges.require(self, "teacher", image_size=ranges.COUNT, std=ranges.POSITIVE)
        ranges.require_together(self, "teacher", "mean", "std")


@dataclass(frozen=True)
class VqkdViewSettings:
    """What the tokenizer and its teacher see; the size in pixels is the encoder's.

    Args:
        crop_low: Smallest share of the picture's area that a random crop keeps.
        flip: Probability of a horizontal flip.
    """

    crop_low: float = 0.08
    flip: float = 0.5

    def __post_init__(self) -> None:
        ranges.require(self, "views", crop_low=ranges.SOME_SHARE, flip=ranges.SHARE)


@dataclass(frozen=True)
class VqkdRecipe:
    """Trains a VQ-KD image tokenizer on shards (arXiv 2208.06366), without labels, from a teacher's features.

    Args:
        backbone: The encoder.
        seed: Of everything that is random.
        evaluate_on: An index of held-out images; code usage and likeness to the teacher are measured there.
        expected: What others published for this very setting; changes no number.
    """

    data: DataSettings
    train: TrainSettings
    optim: OptimSettings
    teacher: TeacherSettings
    vqkd: VqkdSettings = VqkdSettings()
    backbone: BackboneSettings = BackboneSettings(name="vit_base_patch16_224")
    views: VqkdViewSettings = VqkdViewSettings()
    evaluate_on: str | None = None
    guard: GuardSettings = GuardSettings()
    seed: int = 0
    expected: Expected = Expected()

    def __post_init__(self) -> None:
        ranges.require(self, seed=ranges.SEED)
        catalog.check(self.backbone.name, self.backbone.overrides)
        if self.train.ema_decay:
            raise SettingError(f"train.ema_decay is {self.train.ema_decay}; a mean of the encoder's weights would not fit the codes, which "
                               "follow the encoder itself; set it to 0")  # fmt: skip
