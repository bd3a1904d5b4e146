"""What docs/LOG.md says of the demo: learning rates chosen on a validation draw, and runs with other seeds.

Run: python benchmarks/demo_evidence.py rates    after `make demo`: each arm at each rate and layer decay of one grid
     python benchmarks/demo_evidence.py seeds    tokenizer, longer pretraining and both arms, three times from nothing

Trainings have one thread each; two run at a time, or all seeds. Both commands write below runs/evidence, go on where they were,
and print a table from the records. The validation draw is disjoint from the 600 labelled images and from the test set.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev

OUT = Path("runs/evidence")
RATES, LAYER_DECAYS = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), (1.0, 0.65)
ARMS = ("from_scratch", "distilled", "fine_tuned")
VALIDATION = ["--evaluation.index", "runs/demo/shards/train", "--evaluation.metric", "validation_accuracy",
              "--evaluation.labels.per_class", "400", "--evaluation.labels.skip", "60"]  # fmt: skip
SEEDS, LONGER = (1, 2, 3), 400_000


def train(script: str, recipe: str, out: Path, *more: str) -> Path:
    """One training in a process of its own, on one thread; what is finished is reused."""
    command = [sys.executable, script, "--config", f"launch/recipes/demo_{recipe}.yaml", "--data.workers", "0", *more, "--out", str(out)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f"{out.name}.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return out


def last(run: Path, metric: str) -> float:
    """The newest value of a metric in a run's records."""
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    return next(line["value"] for line in reversed(lines) if line["metric"] == metric)


def rates() -> None:
    """Each arm at each rate and layer decay, with the demo's own pretrained backbone and teacher."""
    jobs = {setting: OUT / "rates" / "-".join(map(str, setting)) for setting in product(ARMS, LAYER_DECAYS, RATES)}

    def job(setting: tuple[str, float, float]) -> None:
        arm, decay, rate = setting
        train("finetune/classify.py", arm, jobs[setting], "--optim.lr", str(rate), "--optim.layer_decay", str(decay), *VALIDATION)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(job, jobs))
    print("| validation accuracy, % | layer decay | " + " | ".join(f"{rate:g}" for rate in RATES) + " |")
    print("|---" * (2 + len(RATES)) + "|")
    for arm, decay in product(ARMS, LAYER_DECAYS):
        accuracies = (f"{100 * last(jobs[arm, decay, rate], 'validation_accuracy'):.1f}" for rate in RATES)
        print(f"| {arm} | {decay:g} | " + " | ".join(accuracies) + " |")


def one_seed(seed: int) -> Path:
    """Tokenizer, pretraining and the two arms that are compared, all with this seed; the labelled images are drawn by it too."""
    out = OUT / f"seed-{seed}"
    same = ["--seed", str(seed)]
    drawn = [*same, "--labels.seed", str(seed)]
    train("tokenizers/train_dvae.py", "tokenizer", out / "tokenizer", *same)
    train("pretrain/beit.py", "pretrained", out / "pretrained", *same, "--tokenizer.path", str(out / "tokenizer"),
          "--train.samples", str(LONGER))  # fmt: skip
    train("finetune/classify.py", "from_scratch", out / "from_scratch", *drawn)
    train("finetune/classify.py", "fine_tuned", out / "fine_tuned", *drawn, "--init.path", str(out / "pretrained"))
    train("finetune/logistic.py", "logistic", out / "logistic", "--labels.seed", str(seed))
    return out


def seeds() -> None:
    """Three runs from nothing."""
    with ThreadPoolExecutor(len(SEEDS)) as pool:
        folders = list(pool.map(one_seed, SEEDS))
    print("| seed | from scratch | fine-tuned | difference | logistic regression | masked accuracy |\n|---|---|---|---|---|---|")
    differences = []
    for seed, out in zip(SEEDS, folders, strict=True):
        scratch, tuned, plain = (100 * last(out / arm, "test_accuracy") for arm in ("from_scratch", "fine_tuned", "logistic"))
        differences.append(tuned - scratch)
        masked = last(out / "pretrained", "masked_accuracy")
        print(f"| {seed} | {scratch:.1f} | {tuned:.1f} | {differences[-1]:+.1f} | {plain:.1f} | {masked:.3f} |")
    print(f"difference: {mean(differences):+.1f} points, standard deviation {stdev(differences):.1f}")


if __name__ == "__main__":
    if sys.argv[1:] not in (["rates"], ["seeds"]):
        sys.exit(__doc__)
    {"rates": rates, "seeds": seeds}[sys.argv[1]]()
