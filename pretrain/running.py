"""What every pretraining does around its method: opens data, trains, measures on held-out images, leaves the backbone."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from mimetic.engine.config import Invocation
from mimetic.engine.run import Run
from mimetic.engine.runtime import start

if TYPE_CHECKING:
    import torch

    from mimetic.data.index import Index
    from mimetic.data.mixture import Mixture
    from mimetic.data.stream import PlacedTransform, Transform


class Pretraining(NamedTuple):
    """A method, built for its data.

    Attributes:
        objective: with `backbone` and `normalize`.
        training: the views it learns from.
        plain: the views it is measured on: the whole picture, unaltered.
        title: what the first line says is going to happen.
        best: the metric whose highest value marks the best checkpoint.
        lowest: its lowest value does, as of a loss.
    """

    objective: Any
    training: "Transform | PlacedTransform"
    plain: "Transform"
    title: str
    best: str
    lowest: bool = False


Build = Callable[[Any, "Index | Mixture", "torch.device"], Pretraining]


def finished(invocation: Invocation[Any]) -> bool:
    """Whether this very recipe has been trained there; says so."""
    if done := Run(invocation, "pretrain").finished:
        print(f"{invocation.out} is finished: this very recipe has been trained there; its backbone is {invocation.out}/backbone")
    return done


def run_pretraining(invocation: Invocation[Any], build: Build) -> None:
    """Builds the parts, trains, and leaves the backbone in `RUN/backbone`."""
    recipe = invocation.recipe
    accelerator = start(recipe.train, recipe.optim, recipe.data.batch_size)

    from mimetic.backbones.files import save_backbone
    from mimetic.data.opening import open_data, open_held_out
    from mimetic.data.stream import ShardStream
    from mimetic.engine.loop import Evaluation, train
    from mimetic.pretrain.evaluate import evaluate
    from mimetic.pretrain.screening import LOOKED_AT, look_at_tokenizer

    index = open_data(recipe.data)
    held_out = open_held_out(recipe.evaluate_on, index) if recipe.evaluate_on else index
    objective, training, plain, title, best, lowest = build(recipe, index, accelerator.device)
    ranks = {"rank": accelerator.process_index, "world": accelerator.num_processes, "workers": recipe.data.workers}
    stream = ShardStream(index, recipe.data.batch_size, seed=recipe.seed, tail="drop", transform=training,
                         accumulate=recipe.train.accumulate, **ranks, **recipe.data.shuffling)  # fmt: skip
    evaluation = Evaluation(
        lambda: ShardStream(held_out, 2 * recipe.data.batch_size, shuffle=False, transform=plain, **ranks),
        lambda batches: evaluate(objective, batches, accelerator.device),
        best=best,
        lowest=lowest,
    )

    def look() -> None:  # at no more shards than training reads
        images = ShardStream(held_out, LOOKED_AT, seed=recipe.seed, transform=plain, **recipe.data.shuffling)
        look_at_tokenizer(objective.tokenizer, recipe.tokenizer, images, accelerator.device, accelerator.is_main_process)

    trained = train(objective, stream, invocation=invocation, kind="pretrain", accelerator=accelerator, title=title,
                    evaluation=evaluation if recipe.evaluate_on else None, look=look if hasattr(recipe, "tokenizer") else None,
                    shown=next(ShardStream(held_out, 12, shuffle=False, transform=plain).run(1)))  # fmt: skip
    if trained and accelerator.is_main_process:
        out = invocation.out / "backbone"
        save_backbone(objective.backbone, out, **objective.normalize.describe())
        Run(invocation, "pretrain").finish()
        print(f"pretrained backbone in {out}\nnext: fine-tune it, finetune/classify.py --init.path {invocation.out} (see --help), "
              f"or take it away, mimetic export {invocation.out} FOLDER")  # fmt: skip
    accelerator.end_training()
