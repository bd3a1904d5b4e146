"""What a dVAE training is made of. Imports nothing heavy: `--help` and typos answer before torch is loaded."""

from dataclasses import dataclass

from mimetic.engine import ranges
from mimetic.engine.config import DataSettings, Expected, GuardSettings, OptimSettings, TrainSettings
from mimetic.engine.errors import SettingError


@dataclass(frozen=True)
class DvaeSettings:
    """The tokenizer's size and its annealing (Ramesh et al., arXiv 2102.12092).

    Args:
        vocab_size: V, codes.
        stride: Pixels of a cell's side: 4, 8, 16 or 32.
        width: Channels of the convolutions at the cell grid.
        code_width: Width of a code vector.
        depth: Residual blocks on each side.
        loss: Of reconstructions: mse of standardised pixels, or logit_laplace, -log of DALL-E's density (appendix A.3).
        temperature: Of the Gumbel-softmax at the start.
        final_temperature: Reached after four fifths of the training.
        kl_weight: Weight of the KL to uniform, reached linearly over the first half of the training.
        restart_every: Steps between restarts of dead codes.
        seed_images: Images whose features seed the codebook.
    """

    vocab_size: int = 8192
    stride: int = 8
    width: int = 64
    code_width: int = 32
    depth: int = 1
    loss: str = "mse"
    temperature: float = 1.0
    final_temperature: float = 0.1
    kl_weight: float = 0.001
    restart_every: int = 50
    seed_images: int = 2048

    def __post_init__(self) -> None:
        if self.loss not in ("mse", "logit_laplace"):
            raise SettingError(f"dvae.loss is {self.loss!r}; it must be mse or logit_laplace")
        ranges.require(self, "dvae", vocab_size=ranges.COUNT, stride=ranges.COUNT, width=ranges.COUNT, code_width=ranges.COUNT,
                       depth=ranges.NOT_NEGATIVE, temperature=ranges.POSITIVE, final_temperature=ranges.POSITIVE,
                       kl_weight=ranges.NOT_NEGATIVE, restart_every=ranges.COUNT, seed_images=ranges.COUNT)  # fmt: skip


@dataclass(frozen=True)
class TokenizerViewSettings:
    """What the tokenizer sees while it trains.

    Args:
        image_size: Side in pixels, a multiple of the stride.
        crop_low: Smallest share of the picture's area that a random crop keeps.
        flip: Probability of a horizontal flip.
    """

    image_size: int = 112
    crop_low: float = 0.5
    flip: float = 0.5

    def __post_init__(self) -> None:
        ranges.require(self, "views", image_size=ranges.COUNT, crop_low=ranges.SOME_SHARE, flip=ranges.SHARE)


@dataclass(frozen=True)
class DvaeRecipe:
    """Trains a dVAE image tokenizer on shards (arXiv 2102.12092), without labels.

    Args:
        seed: Of everything that is random.
        evaluate_on: An index of held-out images; code usage and reconstructions are measured there.
        expected: What others published for this very setting; changes no number.
    """

    data: DataSettings
    train: TrainSettings
    optim: OptimSettings
    dvae: DvaeSettings = DvaeSettings()
    views: TokenizerViewSettings = TokenizerViewSettings()
    evaluate_on: str | None = None
    guard: GuardSettings = GuardSettings()
    seed: int = 0
    expected: Expected = Expected()

    def __post_init__(self) -> None:
        ranges.require(self, seed=ranges.SEED)
