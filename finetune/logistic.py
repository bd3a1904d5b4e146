"""A plain reference: logistic regression on pixels, on the same labelled images and the same test set."""

import time
import warnings
from dataclasses import dataclass

from mimetic.engine import ranges
from mimetic.engine.config import DataSettings, Invocation, parse
from mimetic.engine.errors import SettingError
from mimetic.engine.run import Record, Run
from mimetic.engine.runtime import run_entry
from mimetic.finetune.recipe import EvaluationSettings, LabelSettings

EXAMPLE = "python finetune/logistic.py --config launch/recipes/demo_logistic.yaml --out runs/logistic"


@dataclass(frozen=True)
class LogisticRecipe:
    """Fits scikit-learn's logistic regression to pixels in [0, 1].

    Args:
        max_iter: Iterations of its solver at most.
        arm: What this run is called in comparisons.
        seed: Kept in the record; nothing here is random but the draw of labels.
    """

    data: DataSettings
    evaluation: EvaluationSettings
    labels: LabelSettings = LabelSettings()
    max_iter: int = 2000
    arm: str = "logistic regression"
    seed: int = 0

    def __post_init__(self) -> None:
        ranges.require(self, max_iter=ranges.COUNT, seed=ranges.SEED)


def main() -> None:
    """Entry point."""
    invocation = parse(LogisticRecipe, example=EXAMPLE)
    if Run(invocation, "reference").finished:
        print(f"{invocation.out} is finished: reused")
        return
    fit(invocation)


def fit(invocation: Invocation[LogisticRecipe]) -> None:
    """Fits, measures and records."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    from mimetic.data.opening import open_held_out, open_labelled
    from mimetic.data.stream import pixels
    from mimetic.finetune.draws import draw_apart

    recipe, started = invocation.recipe, time.perf_counter()
    training = open_labelled(recipe.data)
    held_out = open_held_out(recipe.evaluation.index, training, labelled=True)
    drawn = draw_apart(training, recipe.labels, held_out, recipe.evaluation.labels)
    (train_ND, train_N), (test_ND, test_N) = (pixels(index, subset) for index, subset in zip((training, held_out), drawn, strict=True))
    if train_ND.shape[1] != test_ND.shape[1]:
        raise SettingError(f"images of {held_out.home} have {test_ND.shape[1]} pixels, those of {training.home} {train_ND.shape[1]}; "
                           "resize them to compare pixels")  # fmt: skip
    run = Run(invocation, "reference")
    run.open(0)
    print(f"{recipe.arm} on {len(train_N):,} labelled images", flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told in our own words
        model = LogisticRegression(max_iter=recipe.max_iter).fit(train_ND, train_N)
    if model.n_iter_.max() >= recipe.max_iter:
        print(f"stopped after max_iter {recipe.max_iter} iterations, before it converged", flush=True)
    value = float((model.predict(test_ND) == test_N).mean())
    details = {"arm": recipe.arm, "labels": len(train_N), "backbone": "pixels"}
    parameters = model.coef_.size + model.intercept_.size
    run.record(Record(recipe.evaluation.metric, value, len(test_N), samples=len(train_N), seconds=round(time.perf_counter() - started, 1),
                      parameters=parameters, details=details))  # fmt: skip
    run.close()
    run.finish()
    print(f"{recipe.evaluation.metric} {value:.4f} over {len(test_N)}\nrecord in {invocation.out}/records.jsonl")


if __name__ == "__main__":
    run_entry(main)
