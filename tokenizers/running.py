"""What every training of a tokenizer does around its method: opens data, starts the codes, trains, measures, leaves the tokenizer."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from mimetic.engine.config import Invocation
from mimetic.engine.run import Run
from mimetic.engine.runtime import same_on_all_ranks, start

if TYPE_CHECKING:
    import torch

    from mimetic.data.index import Index
    from mimetic.data.mixture import Mixture
    from mimetic.data.stream import Transform
    from mimetic.data.views import ClassifyViews
    from mimetic.engine.loop import Batches
    from mimetic.engine.objective import Objective
    from mimetic.engine.run import Record


class TokenizerTraining(NamedTuple):
    """A method, built for its data.

    Attributes:
        objective: what is trained.
        tokenizer: the part of it that is kept.
        start_codes: called once, with images (B, C, H, W) in [0, 1] on the device and the seed, on every process alike.
        start_images: how many images that takes.
        training: the view it learns from.
        plain: the view it is measured on: the whole picture, unaltered.
        title: what the first line says is going to happen.
        measure: records from batches of held-out images on the device.
        best: the metric whose highest value marks the best checkpoint.
        pretraining: the script that this tokenizer is for.
    """

    objective: "Objective"
    tokenizer: Any
    start_codes: Callable[["torch.Tensor", int], None]
    start_images: int
    training: "Transform"
    plain: "ClassifyViews"
    title: str
    measure: "Callable[[Batches], list[Record]]"
    best: str
    pretraining: str


Build = Callable[[Any, "Index | Mixture", "torch.device"], TokenizerTraining]


def finished(invocation: Invocation[Any]) -> bool:
    """Whether this very recipe has been trained there; says so."""
    if done := Run(invocation, "tokenizer").finished:
        print(f"{invocation.out} is finished: this very recipe has been trained there; its tokenizer is {invocation.out}/tokenizer")
    return done


def run_training(invocation: Invocation[Any], build: Build) -> None:
    """Builds the parts, trains, measures on held-out images, and leaves the tokenizer in `RUN/tokenizer`."""
    recipe = invocation.recipe
    accelerator = start(recipe.train, recipe.optim, recipe.data.batch_size)

    from mimetic.data.opening import open_data, open_held_out
    from mimetic.data.picture import in_unit_range
    from mimetic.data.stream import ShardStream
    from mimetic.engine.loop import Evaluation, train
    from mimetic.tokenizers.examination import reference_figures
    from mimetic.tokenizers.files import save_tokenizer
    from mimetic.tokenizers.objective import only_valid

    index = open_data(recipe.data)
    held_out = open_held_out(recipe.evaluate_on, index) if recipe.evaluate_on else index
    built = build(recipe, index, accelerator.device)
    ranks = {"rank": accelerator.process_index, "world": accelerator.num_processes, "workers": recipe.data.workers}
    stream = ShardStream(index, recipe.data.batch_size, seed=recipe.seed, tail="drop", transform=built.training,
                         accumulate=recipe.train.accumulate, **ranks, **recipe.data.shuffling)  # fmt: skip
    if not any((invocation.out / "checkpoints").glob("step-*")):  # the same images on every rank and world
        first = ShardStream(index, min(built.start_images, len(index)), seed=recipe.seed, transform=built.training, **recipe.data.shuffling)
        built.start_codes(in_unit_range(only_valid(next(first.run(1))).to(accelerator.device)), recipe.seed)
    same_on_all_ranks(built.tokenizer.state_dict().values())  # sums on a GPU differ in their last bits, and k-means amplifies that
    evaluation = Evaluation(
        lambda: ShardStream(held_out, 2 * recipe.data.batch_size, shuffle=False, transform=built.plain, **ranks),
        built.measure,
        best=built.best,
    )
    trained = train(built.objective, stream, invocation=invocation, kind="tokenizer", accelerator=accelerator, title=built.title,
                    evaluation=evaluation if recipe.evaluate_on else None,
                    shown=next(ShardStream(held_out, 16, shuffle=False, transform=built.plain).run(1)))  # fmt: skip
    if trained and accelerator.is_main_process:
        size = built.plain.image_size
        reference = reference_figures(built.tokenizer.eval(), held_out, size, accelerator.device)
        told = {"image_size": size, "range": index.range, "reference": reference}
        save_tokenizer(built.tokenizer, invocation.out / "tokenizer", told)
        Run(invocation, "tokenizer").finish()
        on = f" --data.index {recipe.data.index}" if recipe.data.index else ""  # a mixture is no word of a command
        print(f"tokenizer in {invocation.out}/tokenizer\nnext: pretrain with it, {built.pretraining} --tokenizer.path {invocation.out}{on} "
              "(--help has an example)")  # fmt: skip
    accelerator.end_training()
