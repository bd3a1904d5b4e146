"""Trains a dVAE tokenizer: `accelerate launch tokenizers/train_dvae.py --config launch/recipes/... --out runs/tokenizer`."""

from typing import TYPE_CHECKING

from mimetic.engine.config import Invocation, parse
from mimetic.engine.errors import SettingError
from mimetic.engine.runtime import run_entry
from mimetic.tokenizers.recipe import DvaeRecipe
from mimetic.tokenizers.running import TokenizerTraining, finished, run_training

if TYPE_CHECKING:
    import torch

    from mimetic.data.index import Index
    from mimetic.data.mixture import Mixture
    from mimetic.tokenizers.objective import DVAEObjective

EXAMPLE = "accelerate launch tokenizers/train_dvae.py --config launch/recipes/demo_tokenizer.yaml --out runs/tokenizer"


def main() -> None:
    """Entry point."""
    invocation = parse(DvaeRecipe, example=EXAMPLE)
    if not finished(invocation):
        train_dvae(invocation)


def build(recipe: DvaeRecipe, index: "Index | Mixture", device: "torch.device") -> "DVAEObjective":
    """The objective, its codes not yet seeded from images.

    Raises:
        SettingError: the images are no whole number of cells, or too few to seed the codes.
    """
    import torch

    from mimetic.tokenizers.dvae import DVAE, check_seeds
    from mimetic.tokenizers.objective import DVAEObjective

    settings, side = recipe.dvae, recipe.views.image_size
    if side % settings.stride:
        raise SettingError(f"views.image_size {side} is no multiple of dvae.stride {settings.stride}; use "
                           f"{max(1, side // settings.stride) * settings.stride}")  # fmt: skip
    check_seeds(min(settings.seed_images, len(index)), (side // settings.stride) ** 2, settings.vocab_size, len(index))
    torch.manual_seed(recipe.seed)
    dvae = DVAE(settings.vocab_size, settings.stride, index.channels, settings.width, settings.code_width, settings.depth,
                settings.loss).to(device)  # fmt: skip
    return DVAEObjective(dvae, settings.temperature, settings.final_temperature, settings.kl_weight, settings.restart_every)


def train_dvae(invocation: Invocation[DvaeRecipe]) -> None:
    """Trains, and leaves the tokenizer in `RUN/tokenizer`."""
    run_training(invocation, prepare)


def prepare(recipe: DvaeRecipe, index: "Index | Mixture", device: "torch.device") -> TokenizerTraining:
    """The objective, the views that it sees, and what it is measured by."""
    from mimetic.data.views import Augmentation, ClassifyViews
    from mimetic.tokenizers.objective import evaluate_tokenizer

    objective = build(recipe, index, device)
    dvae, settings, views = objective.dvae, recipe.dvae, recipe.views
    augment = ClassifyViews(views.image_size, Augmentation((views.crop_low, 1.0), flip=views.flip))
    size = sum(p.numel() for p in dvae.parameters()) / 1e6
    return TokenizerTraining(
        objective, dvae, dvae.seed_codebook, settings.seed_images, augment, ClassifyViews(views.image_size, None),
        f"dVAE tokenizer of {settings.vocab_size} codes, stride {settings.stride} ({size:.1f} M parameters), without labels",
        lambda batches: evaluate_tokenizer(dvae, batches, device), "reconstruction_psnr", "pretrain/beit.py",
    )  # fmt: skip


if __name__ == "__main__":
    run_entry(main)
