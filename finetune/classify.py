"""Classification: `accelerate launch finetune/classify.py --config launch/recipes/... --out runs/supervised`."""

from mimetic.engine.config import Invocation, parse
from mimetic.engine.run import Run
from mimetic.engine.runtime import run_entry, start
from mimetic.finetune.recipe import ClassifyRecipe

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


def classify(invocation: Invocation[ClassifyRecipe]) -> None:
    """Builds the parts, trains, measures, and leaves the classifier in the run folder."""
    recipe = invocation.recipe
    accelerator = start(recipe.train, recipe.optim, recipe.data.batch_size)

    import torch

    from mimetic.data.opening import open_held_out, open_labelled
    from mimetic.data.stream import ShardStream
    from mimetic.data.views import Augmentation, ClassifyViews
    from mimetic.engine.loop import Evaluation, train
    from mimetic.finetune.classifiers import build_classifier, open_classifier, save_classifier
    from mimetic.finetune.draws import draw_apart
    from mimetic.finetune.evaluate import accuracy
    from mimetic.finetune.objectives import Distill, Mixing, Supervised

    torch.manual_seed(recipe.seed)
    index = open_labelled(recipe.data)
    model, normalize = build_classifier(recipe, index)
    held_out = open_held_out(recipe.evaluation.index, index, labelled=True)
    views, size = recipe.views, model.image_size[0]
    trained_on, measured_on = draw_apart(index, recipe.labels, held_out, recipe.evaluation.labels)
    ranks = {"rank": accelerator.process_index, "world": accelerator.num_processes, "workers": recipe.data.workers}
    augmentation = Augmentation((views.crop_low, 1.0), views.shift, views.flip, views.jitter)
    stream = ShardStream(
        index, recipe.data.batch_size, seed=recipe.seed, tail="drop", subset=trained_on, transform=ClassifyViews(size, augmentation),
        accumulate=recipe.train.accumulate, **ranks, **recipe.data.shuffling,
    )  # fmt: skip
    mixing = Mixing(len(index.classes), views.mixup, views.cutmix, recipe.seed)
    if recipe.distill.teacher:
        teacher, teacher_normalize = open_classifier(recipe.distill.teacher, index.classes)
        objective: Supervised = Distill(model, normalize, mixing, views.smoothing, teacher, teacher_normalize, accelerator.device)
    else:
        objective = Supervised(model, normalize, mixing, views.smoothing)
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
