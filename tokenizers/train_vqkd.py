"""Trains a VQ-KD tokenizer: `accelerate launch tokenizers/train_vqkd.py --config launch/recipes/... --out runs/vqkd`."""

from typing import TYPE_CHECKING

from mimetic.engine.config import Invocation, parse
from mimetic.engine.runtime import run_entry
from mimetic.tokenizers.running import TokenizerTraining, finished, run_training
from mimetic.tokenizers.vqkd_recipe import VqkdRecipe

if TYPE_CHECKING:
    import torch

    from mimetic.data.index import Index
    from mimetic.data.mixture import Mixture
    from mimetic.tokenizers.vqkd_objective import VQKDObjective

EXAMPLE = "accelerate launch tokenizers/train_vqkd.py --config launch/recipes/vqkd_fashion_mnist.yaml --out runs/vqkd"


def main() -> None:
    """Entry point."""
    invocation = parse(VqkdRecipe, example=EXAMPLE)
    if not finished(invocation):
        train_vqkd(invocation)


def train_vqkd(invocation: Invocation[VqkdRecipe]) -> None:
    """Trains, and leaves the tokenizer in `RUN/tokenizer`."""
    run_training(invocation, prepare)


def build(recipe: VqkdRecipe, index: "Index | Mixture", device: "torch.device") -> "VQKDObjective":
    """The objective, its codes not yet started from images.

    Raises:
        SettingError: encoder, teacher and data do not fit each other, or images are too few to start the codes.
        CheckpointError: the teacher cannot be opened.
    """
    import torch

    from mimetic.tokenizers.dvae import check_seeds
    from mimetic.tokenizers.teachers import open_teacher
    from mimetic.tokenizers.vqkd import VQKD, FeatureDecoder
    from mimetic.tokenizers.vqkd_objective import VQKDObjective

    settings, encoder, given = recipe.vqkd, recipe.backbone, recipe.teacher
    teacher = open_teacher(given.path, index.channels, weights=given.weights, image_size=given.image_size, mean=given.mean, std=given.std)
    torch.manual_seed(recipe.seed)
    vqkd = VQKD(settings.vocab_size, index.channels, encoder.name, encoder.image_size, encoder.overrides, settings.code_width)
    cells = vqkd.encoder.feature_grid[0] * vqkd.encoder.feature_grid[1]
    check_seeds(min(settings.start_images, len(index)), cells, settings.vocab_size, len(index),
                settings=("vqkd.start_images", "vqkd.vocab_size"))  # fmt: skip
    vqkd.encoder.grad_checkpointing = encoder.grad_checkpointing
    decoder = FeatureDecoder(vqkd.encoder.feature_grid, settings.code_width, vqkd.encoder.embed_dim, settings.decoder_depth, teacher.width,
                             encoder.overrides.get("weight_init", "beit"))  # fmt: skip
    return VQKDObjective(vqkd.to(device), decoder.to(device), teacher, device, settings.commitment, settings.decay, settings.restart_every)


def prepare(recipe: VqkdRecipe, index: "Index | Mixture", device: "torch.device") -> TokenizerTraining:
    """The objective, the views that it sees, and what it is measured by."""
    from mimetic.data.views import Augmentation, ClassifyViews
    from mimetic.tokenizers.vqkd_objective import evaluate_vqkd

    objective = build(recipe, index, device)
    vqkd, views = objective.vqkd, recipe.views
    side, size = vqkd.encoder.image_size[0], sum(p.numel() for p in objective.parameters()) / 1e6
    augment = ClassifyViews(side, Augmentation((views.crop_low, 1.0), flip=views.flip))
    title = f"VQ-KD tokenizer of {vqkd.vocab_size} codes, stride {vqkd.stride}, taught by {recipe.teacher.path} ({size:.1f} M parameters)"
    return TokenizerTraining(
        objective, vqkd, vqkd.start_codebook, recipe.vqkd.start_images, augment, ClassifyViews(side, None), title,
        lambda batches: evaluate_vqkd(objective, batches, device), "teacher_cosine", "pretrain/beit2.py",
    )  # fmt: skip


if __name__ == "__main__":
    run_entry(main)
