"""Classification: `accelerate launch finetune/classify.py --config launch/recipes/... --out runs/supervised`."""

from typing import TYPE_CHECKING

from mimetic.engine.config import Invocation, parse
from mimetic.engine.run import Run
from mimetic.engine.runtime import run_entry, start
from mimetic.finetune.recipe import ClassifyRecipe

if TYPE_CHECKING:
    import torch

    from mimetic.data.index import Index
    from mimetic.finetune.objectives import Supervised

EXAMPLE = (
    "accelerate launch finetune/classify.py --config launch/recipes/demo_fine_tuned.yaml --init.path runs/beit "
    "--arm fine-tuned --out runs/fine-tuned"
)


def main() -> None:
    """Entry point."""
    invocation = parse(ClassifyRecipe, example=EXAMPLE)
    if Run(invocation, "classify").finished:
        print(f"{invocation.out} is finished: this very recipe has been trained there; its records are {invocation.out}/records.jsonl")
        return
    classify(invocation)


def build(recipe: ClassifyRecipe, index: "Index", device: "torch.device") -> "Supervised":
    """The objective: a classifier with its loss, and its teacher if it has one."""
    import torch

    from mimetic.finetune.classifiers import build_classifier, open_classifier
    from mimetic.finetune.objectives import Distill, Mixing, Supervised

    torch.manual_seed(recipe.seed)
    model, normalize = build_classifier(recipe, index)
    mixing = Mixing(len(index.classes), recipe.views.mixup, recipe.views.cutmix, recipe.seed)
    if not recipe.distill.teacher:
        return Supervised(model, normalize, mixing, recipe.views.smoothing)
    teacher, teacher_normalize = open_classifier(recipe.distill.teacher, index.classes)
    return Distill(model, normalize, mixing, recipe.views.smoothing, teacher, teacher_normalize, device)


def classify(invocation: Invocation[ClassifyRecipe]) -> None:
    """Builds the parts, trains, measures, and leaves the classifier in the run folder."""
    recipe = invocation.recipe
    accelerator = start(recipe.train, recipe.optim, recipe.data.batch_size)

    from mimetic.data.opening import open_held_out, open_labelled
    from mimetic.data.stream import ShardStream
    from mimetic.data.views import Augmentation, ClassifyViews
    from mimetic.engine.loop import Evaluation, train
    from mimetic.finetune.classifiers import save_classifier
    from mimetic.finetune.draws import draw_apart
    from mimetic.finetune.evaluate import accuracy

    index = open_labelled(recipe.data)
    objective = build(recipe, index, accelerator.device)
    model, normalize = objective.model, objective.normalize
    held_out = open_held_out(recipe.evaluation.index, index, labelled=True)
    views, size = recipe.views, model.image_size[0]
    trained_on, measured_on = draw_apart(index, recipe.labels, held_out, recipe.evaluation.labels)
    ranks = {"rank": accelerator.process_index, "world": accelerator.num_processes, "workers": recipe.data.workers}
    augmentation = Augmentation((views.crop_low, 1.0), views.shift, views.flip, views.jitter)
    stream = ShardStream(
        index, recipe.data.batch_size, seed=recipe.seed, tail="drop", subset=trained_on, transform=ClassifyViews(size, augmentation),
        accumulate=recipe.train.accumulate, **ranks, **recipe.data.shuffling,
    )  # fmt: skip
    details = {"arm": recipe.arm, "labels": stream.samples, "backbone": recipe.backbone.name}

    evaluation = Evaluation(
        lambda: ShardStream(
            held_out, 2 * recipe.data.batch_size, shuffle=False, subset=measured_on, transform=ClassifyViews(size, None), **ranks
        ),
        lambda batches: [accuracy(model, normalize, batches, accelerator.device, recipe.evaluation.metric, details)],
        best=recipe.evaluation.metric,
    )

    title = f"{recipe.arm}: {recipe.backbone.name} on {stream.samples:,} labelled images of {len(index.classes)} classes"
    trained = train(objective, stream, invocation=invocation, kind="classify", accelerator=accelerator, title=title, evaluation=evaluation)
    if trained and accelerator.is_main_process:
        folder = save_classifier(model, normalize, invocation.out, {"classes": index.classes})
        Run(invocation, "classify").finish()
        print(f"classifier in {folder}\nnext: mimetic compare {invocation.out} ... --out report")
    accelerator.end_training()


if __name__ == "__main__":
    run_entry(main)
