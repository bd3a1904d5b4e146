"""Trains a dVAE tokenizer: `accelerate launch tokenizers/train_dvae.py --config launch/recipes/... --out runs/tokenizer`."""

from typing import TYPE_CHECKING

from mimetic.engine.config import Invocation, parse
from mimetic.engine.errors import SettingError
from mimetic.engine.run import Run
from mimetic.engine.runtime import run_entry, same_on_all_ranks, start
from mimetic.tokenizers.recipe import DvaeRecipe

if TYPE_CHECKING:
    import torch

    from mimetic.data.index import Index
    from mimetic.data.mixture import Mixture
    from mimetic.tokenizers.objective import DVAEObjective

EXAMPLE = "accelerate launch tokenizers/train_dvae.py --config launch/recipes/demo_tokenizer.yaml --out runs/tokenizer"


def main() -> None:
    """Entry point."""
    invocation = parse(DvaeRecipe, example=EXAMPLE)
    if Run(invocation, "tokenizer").finished:
        print(f"{invocation.out} is finished: this very recipe has been trained there; its tokenizer is {invocation.out}/tokenizer")
        return
    train_dvae(invocation)


def build(recipe: DvaeRecipe, index: "Index | Mixture", device: "torch.device") -> "DVAEObjective":
    """The objective, its codes not yet seeded from images.

    Raises:
        SettingError: the images are no whole number of cells.
    """
    import torch

    from mimetic.tokenizers.dvae import DVAE
    from mimetic.tokenizers.objective import DVAEObjective

    settings, side = recipe.dvae, recipe.views.image_size
    if side % settings.stride:
        raise SettingError(f"views.image_size {side} is no multiple of dvae.stride {settings.stride}; use "
                           f"{max(1, side // settings.stride) * settings.stride}")  # fmt: skip
    torch.manual_seed(recipe.seed)
    dvae = DVAE(settings.vocab_size, settings.stride, index.channels, settings.width, settings.code_width, settings.depth).to(device)
    return DVAEObjective(dvae, settings.temperature, settings.final_temperature, settings.kl_weight, settings.restart_every)


def train_dvae(invocation: Invocation[DvaeRecipe]) -> None:
    """Builds the parts, trains, measures on held-out images, and leaves the tokenizer in `RUN/tokenizer`."""
    recipe = invocation.recipe
    accelerator = start(recipe.train, recipe.optim, recipe.data.batch_size)

    from mimetic.data.opening import open_data, open_held_out
    from mimetic.data.picture import in_unit_range
    from mimetic.data.stream import ShardStream
    from mimetic.data.views import Augmentation, ClassifyViews
    from mimetic.engine.loop import Evaluation, train
    from mimetic.tokenizers.examination import reference_figures
    from mimetic.tokenizers.files import save_tokenizer
    from mimetic.tokenizers.objective import evaluate_tokenizer, only_valid

    index = open_data(recipe.data)
    held_out = open_held_out(recipe.evaluate_on, index) if recipe.evaluate_on else index
    settings, views = recipe.dvae, recipe.views
    objective = build(recipe, index, accelerator.device)
    dvae = objective.dvae
    ranks = {"rank": accelerator.process_index, "world": accelerator.num_processes, "workers": recipe.data.workers}
    augment = ClassifyViews(views.image_size, Augmentation((views.crop_low, 1.0), flip=views.flip))
    stream = ShardStream(index, recipe.data.batch_size, seed=recipe.seed, tail="drop", transform=augment,
                         accumulate=recipe.train.accumulate, **ranks, **recipe.data.shuffling)  # fmt: skip
    if not any((invocation.out / "checkpoints").glob("step-*")):  # the same images on every rank and world
        first = ShardStream(index, min(settings.seed_images, len(index)), seed=recipe.seed, transform=augment, **recipe.data.shuffling)
        dvae.seed_codebook(in_unit_range(only_valid(next(first.run(1))).to(accelerator.device)), recipe.seed)
    same_on_all_ranks(dvae.state_dict().values())  # sums on a GPU differ in their last bits, and k-means amplifies that

    whole = ClassifyViews(views.image_size, None)

    evaluation = Evaluation(
        lambda: ShardStream(held_out, 2 * recipe.data.batch_size, shuffle=False, transform=whole, **ranks),
        lambda batches: evaluate_tokenizer(dvae, batches, accelerator.device),
        best="reconstruction_psnr",
    )

    size = sum(p.numel() for p in dvae.parameters()) / 1e6
    title = f"dVAE tokenizer of {settings.vocab_size} codes, stride {settings.stride} ({size:.1f} M parameters), without labels"
    trained = train(objective, stream, invocation=invocation, kind="tokenizer", accelerator=accelerator, title=title,
                    evaluation=evaluation if recipe.evaluate_on else None,
                    shown=next(ShardStream(held_out, 16, shuffle=False, transform=whole).run(1)))  # fmt: skip
    if trained and accelerator.is_main_process:
        reference = reference_figures(dvae.eval(), held_out, views.image_size, accelerator.device)
        save_tokenizer(dvae, invocation.out / "tokenizer", {"image_size": views.image_size, "reference": reference})
        Run(invocation, "tokenizer").finish()
        print(f"tokenizer in {invocation.out}/tokenizer\nnext: pretrain with it, pretrain/beit.py --tokenizer.path {invocation.out} "
              f"--data.index {recipe.data.named} (--help has an example)")  # fmt: skip
    accelerator.end_training()


if __name__ == "__main__":
    run_entry(main)
