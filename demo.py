"""`mimetic demo`: the whole pipeline on Fashion-MNIST, as the commands that a user would type.

Every stage is one entry script with one recipe of launch/recipes; each knows by itself whether it is done, or where to go on.
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mimetic.data.fashion_mnist import find_fashion_mnist
from mimetic.engine.errors import MimeticError

RECIPES = Path(__file__).parent / "launch" / "recipes"
SMALL = {  # what a quick look changes
    "tokenizer": ["--train.samples", "6400"],
    "pretrain": ["--train.samples", "6400"],
    "classify": ["--train.epochs", "6"],
}


@dataclass(frozen=True)
class Stage:
    """One command, and what it is for."""

    title: str
    command: list[str]
    output: Path


def demo(out: Path, budget: str) -> None:
    """Runs every stage; what is done is reused.

    Args:
        out: where shards, runs and report.html go.
        budget: "full", or "small" for a quick look whose numbers mean little.

    Raises:
        MimeticError: a stage failed; it has said why.
    """
    small = budget == "small"
    runs = out / "small" if small else out
    stages = list(plan(out, runs, small))
    print(f"mimetic demo: {len(stages)} stages on Fashion-MNIST, {'2' if small else 'about 13'} minutes on two cores, all in {out}")
    print("60,000 images without labels train a tokenizer and pretrain a small ViT; 600 labels then train five classifiers.")
    print("Stop it whenever you like: the same command goes on from there.", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for number, stage in enumerate(stages, 1):
        print(f"\n[{number}/{len(stages)}] {stage.title}", flush=True)
        if stage.command[0] == "mimetic" and stage.command[1] == "pack" and (stage.output / "index.json").exists():
            print(f"{stage.output} is there already: reused", flush=True)
            continue
        print(f"$ {shlex.join(stage.command)}", flush=True)
        _run(stage)
    print(f"\ndone in {(time.perf_counter() - started) / 60:.1f} minutes")
    blocks = (out / "report.md").read_text().split("\n\n")
    print("\n\n".join(block for block in blocks if block.startswith(("**", "| Arm"))))
    print(f"the comparison: {out}/report.html\nthe pretrained backbone: {runs}/exported (mimetic.load_backbone, or timm's local-dir:)")


def plan(out: Path, runs: Path, small: bool) -> Iterator[Stage]:
    """The stages in order."""
    source, shards = find_fashion_mnist(), out / "shards"
    for name, file in (("train", "train-images-idx3-ubyte.gz"), ("test", "t10k-images-idx3-ubyte.gz")):
        yield Stage(f"pack the {name} images", ["mimetic", "pack", str(source / file), str(shards / name)], shards / name)
    data = ["--data.index", str(shards / "train")]
    test = str(shards / "test")

    def script(path: str, recipe: str, kind: str, *more: str) -> Stage:
        name = recipe.removeprefix("demo_").replace("_", "-")
        command = ["python", path, "--config", f"launch/recipes/{recipe}.yaml", *data, *more, "--out", str(runs / name)]
        return Stage(TITLES[name], command + (SMALL.get(kind, []) if small else []), runs / name)

    on_test = ("--evaluation.index", test)
    yield script("tokenizers/train_dvae.py", "demo_tokenizer", "tokenizer", "--evaluate_on", test)
    yield script("pretrain/beit.py", "demo_pretrained", "pretrain", "--tokenizer.path", str(runs / "tokenizer"),
                 "--evaluate_on", test)  # fmt: skip
    yield script("finetune/logistic.py", "demo_logistic", "", *on_test)
    yield script("finetune/classify.py", "demo_teacher", "classify", *on_test)
    yield script("finetune/classify.py", "demo_from_scratch", "classify", *on_test)
    yield script("finetune/classify.py", "demo_distilled", "classify", *on_test, "--distill.teacher", str(runs / "teacher"))
    yield script("finetune/classify.py", "demo_fine_tuned", "classify", *on_test, "--init.path", str(runs / "pretrained"))
    exported = ["mimetic", "export", str(runs / "pretrained"), str(runs / "exported")]
    yield Stage("export the pretrained backbone", exported, runs / "exported")
    folders = [str(runs / name) for name in ("tokenizer", "pretrained", "from-scratch", "distilled", "fine-tuned", "logistic", "teacher")]
    yield Stage("write the comparison", ["mimetic", "compare", *folders, "--out", str(out)], out)


TITLES = {
    "tokenizer": "train the image tokenizer, a dVAE, without labels",
    "pretrained": "pretrain a ViT by masked image modeling, without labels",
    "logistic": "reference: logistic regression on the pixels of the 600 labelled images",
    "teacher": "train the CNN teacher on the 600 labelled images",
    "from-scratch": "train the ViT from scratch on the same images",
    "distilled": "train the ViT with a distillation token (DeiT) on the same images",
    "fine-tuned": "fine-tune the pretrained ViT on the same images",
}


def _run(stage: Stage) -> None:
    word, *rest = stage.command
    if word == "mimetic":
        command = [sys.executable, "-m", "mimetic.cli", *rest]
    else:
        script, *arguments = rest
        recipe = arguments.index("--config") + 1
        arguments[recipe] = str(RECIPES / Path(arguments[recipe]).name)
        command = [sys.executable, "-m", "mimetic." + script.removesuffix(".py").replace("/", "."), *arguments]
    code = subprocess.run(command, check=False, preexec_fn=_ends_with(os.getpid())).returncode
    if code == -signal.SIGINT or code == 130:
        raise KeyboardInterrupt
    if code:
        raise MimeticError(f"the stage {stage.title!r} ended with code {code}; mend what it says and give the same command again")


def _ends_with(parent: int) -> Callable[[], None] | None:
    """A demo killed outright must not leave a training behind that writes into the same folder: PR_SET_PDEATHSIG."""

    def ask() -> None:
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it could be asked
            os._exit(1)

    return ask if sys.platform == "linux" else None
