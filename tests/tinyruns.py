"""Trainings of a few seconds: structured images in shards, a tokenizer seeded from them, a ViT of two blocks, and ways to run them."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from imagesets import Pixels, idx_files

from mimetic.data.index import open_index
from mimetic.data.pack import pack
from mimetic.data.stream import pixels
from mimetic.engine.config import parse
from mimetic.tokenizers.dvae import DVAE
from mimetic.tokenizers.files import save_tokenizer

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 4
TINY = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
STARTED: list["subprocess.Popen[str]"] = []
MARK = "TINYRUN"
PATIENCE = 120  # seconds that any process here may take; all of them need a few


def structured(count: int, side: int, seed: int = 0) -> tuple[Pixels, Pixels]:
    """Grey images of four classes (a disk, bars both ways, a ramp) at random places and shades, and their labels."""
    random = np.random.default_rng(seed)
    labels = (np.arange(count) % CLASSES).astype(np.uint8)
    y, x = np.mgrid[:side, :side] / side
    images = []
    for label in labels:
        a, b, low, high = random.uniform(0.25, 0.75, 2).tolist() + random.uniform([0, 140], [100, 255]).tolist()
        shape = ((x - a) ** 2 + (y - b) ** 2 < 0.06, np.abs(x - a) < 0.15, np.abs(y - b) < 0.15, a * x + (1 - a) * y)[label]
        images.append(low + (high - low) * shape + random.normal(0, 4, (side, side)))
    return np.clip(np.stack(images), 0, 255).astype(np.uint8), labels


def make_data(folder: Path, count: int = 200, side: int = 16, seed: int = 0) -> Path:
    """Shards of labelled images, several of them."""
    pack(idx_files(folder.with_name(f"{folder.name}-idx"), *structured(count, side, seed)), folder, samples_per_shard=64)
    return folder


def make_tokenizer(folder: Path, data: Path, codes: int = 16) -> Path:
    """A k-means dVAE of stride 4 that was not trained further."""
    index = open_index(data)
    rows, _ = pixels(index)
    side = int(rows.shape[1] ** 0.5)
    torch.manual_seed(0)
    dvae = DVAE(codes, 4, 1, width=16, code_width=8)
    dvae.seed_codebook(torch.from_numpy(rows).view(-1, 1, side, side))
    save_tokenizer(dvae, folder)
    return folder


def make_world(folder: Path) -> Path:
    """`data`, `held-out` (70 images) and `tokenizer` in a folder."""
    make_data(folder / "data")
    make_data(folder / "held-out", count=70, seed=1)
    make_tokenizer(folder / "tokenizer", folder / "data")
    return folder


def settings_words(settings: dict[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def beit_arguments(world: Path, out: Path, *, overrides: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    """The command line of a tiny BEiT pretraining; `train__steps=5` changes `train.steps`."""
    settings: dict[str, Any] = {
        "out": out, "data.index": world / "data", "data.batch_size": 16, "data.workers": 0, "train.steps": 20, "optim.lr": 2e-3,
        "tokenizer.path": world / "tokenizer", "backbone.name": "vit_tiny_patch16_224", "backbone.image_size": 16,
        "backbone.overrides": TINY | (overrides or {}), "mask.count": 8, "mask.min_block": 2, "views.crop_low": 0.5,
    }  # fmt: skip
    return settings_words(settings | {name.replace("__", "."): value for name, value in changes.items()})


def pixel_arguments(world: Path, out: Path, *, overrides: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    """The command line of a tiny pretraining on pixels, SimMIM's or MAE's but for their own section."""
    settings: dict[str, Any] = {
        "out": out, "data.index": world / "data", "data.batch_size": 16, "data.workers": 0, "train.steps": 20, "optim.lr": 2e-3,
        "backbone.name": "vit_tiny_patch16_224", "backbone.image_size": 16, "backbone.overrides": TINY | (overrides or {}),
        "views.crop_low": 0.5,
    }  # fmt: skip
    return settings_words(settings | {name.replace("__", "."): value for name, value in changes.items()})


def simmim_arguments(world: Path, out: Path, **changes: Any) -> list[str]:
    """The command line of a tiny SimMIM pretraining."""
    return pixel_arguments(world, out, **{"simmim__unit": 4, "simmim__ratio": 0.5} | changes)


def mae_arguments(world: Path, out: Path, **changes: Any) -> list[str]:
    """The command line of a tiny MAE pretraining."""
    decoder = {"mae__decoder_embed_dim": 16, "mae__decoder_depth": 1, "mae__decoder_num_heads": 2}
    return pixel_arguments(world, out, **decoder | changes)


def classify_arguments(world: Path, out: Path, *, overrides: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    """The command line of a tiny classification."""
    settings: dict[str, Any] = {
        "out": out, "data.index": world / "data", "data.batch_size": 16, "data.workers": 0, "train.steps": 8, "optim.lr": 2e-3,
        "evaluation.index": world / "held-out", "backbone.name": "vit_tiny_patch16_224", "backbone.image_size": 16,
        "backbone.overrides": TINY | (overrides or {}),
    }  # fmt: skip
    return settings_words(settings | {name.replace("__", "."): value for name, value in changes.items()})


def dvae_arguments(world: Path, out: Path, **changes: Any) -> list[str]:
    """The command line of a tiny tokenizer training."""
    settings: dict[str, Any] = {
        "out": out, "data.index": world / "data", "data.batch_size": 16, "data.workers": 0, "train.steps": 12, "optim.lr": 2e-3,
        "evaluate_on": world / "held-out", "dvae.vocab_size": 16, "dvae.stride": 4, "dvae.width": 16, "dvae.code_width": 8,
        "dvae.restart_every": 4, "dvae.seed_images": 100, "views.image_size": 16,
    }  # fmt: skip
    return settings_words(settings | {name.replace("__", "."): value for name, value in changes.items()})


def vqkd_arguments(world: Path, out: Path, teacher: Path | str, **changes: Any) -> list[str]:
    """The command line of a tiny VQ-KD training."""
    settings: dict[str, Any] = {
        "out": out, "data.index": world / "data", "data.batch_size": 16, "data.workers": 0, "train.steps": 12, "optim.lr": 2e-3,
        "evaluate_on": world / "held-out", "vqkd.vocab_size": 16, "vqkd.code_width": 8, "vqkd.decoder_depth": 1, "vqkd.restart_every": 4,
        "vqkd.start_images": 100, "teacher.path": teacher, "backbone.name": "vit_tiny_patch16_224", "backbone.image_size": 16,
        "backbone.overrides": TINY, "views.crop_low": 0.5,
    }  # fmt: skip
    return settings_words(settings | {name.replace("__", "."): value for name, value in changes.items()})


def as_killed_at(step: int, whole: Path, run: Path) -> Path:
    """A copy of a finished run as a kill would have left it after one of its checkpoints."""
    shutil.copytree(whole, run, symlinks=True)
    (run / "finished.json").unlink()
    for later in run.glob("checkpoints/step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    return run


def run_here(kind: str, arguments: list[str]) -> Path:
    """Trains in this process: no start to pay for. Returns the run folder."""
    from mimetic.finetune.classify import classify
    from mimetic.finetune.recipe import ClassifyRecipe
    from mimetic.pretrain import beit, beit2, mae, simmim
    from mimetic.pretrain.pixel_recipes import MaeRecipe, SimmimRecipe
    from mimetic.pretrain.recipe import Beit2Recipe, BeitRecipe
    from mimetic.tokenizers.recipe import DvaeRecipe
    from mimetic.tokenizers.train_dvae import train_dvae
    from mimetic.tokenizers.train_vqkd import train_vqkd
    from mimetic.tokenizers.vqkd_recipe import VqkdRecipe

    works: dict[str, tuple[Any, Any]] = {
        "beit": (BeitRecipe, beit.pretrain), "beit2": (Beit2Recipe, beit2.pretrain), "classify": (ClassifyRecipe, classify),
        "dvae": (DvaeRecipe, train_dvae), "vqkd": (VqkdRecipe, train_vqkd), "simmim": (SimmimRecipe, simmim.pretrain),
        "mae": (MaeRecipe, mae.pretrain),
    }  # fmt: skip
    recipe, work = works[kind]
    reset_accelerate()
    invocation = parse(recipe, example="", argv=arguments)
    work(invocation)
    return invocation.out


def reset_accelerate() -> None:
    """Accelerate sets a process up once; here one process trains several times."""
    from accelerate.state import AcceleratorState, GradientState

    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def golden() -> list[float]:
    """The losses of the golden file."""
    return [float(line) for line in (ROOT / "tests/golden/beit_20_steps.txt").read_text().split()]


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """What a run wrote down so far; a line that is being written is left out."""
    file = run / name
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.exists() else []


def losses(run: Path) -> list[float]:
    """The loss of each logged step."""
    return [line["loss"] for line in lines(run) if "loss" in line]


def start(*command: str | Path, **options: Any) -> "subprocess.Popen[str]":
    """A process in a session of its own, one thread each, untouched by launchers of whoever runs the tests."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": _heed_interrupts} | options
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH")}
    mark = f"{MARK}={os.getpid()}-{time.monotonic_ns()}"
    environment = kept | {"OMP_NUM_THREADS": "1"} | options.pop("env", {}) | dict([mark.split("=")])
    process = subprocess.Popen([str(word) for word in command], text=True, start_new_session=True, cwd=ROOT, env=environment, **options)
    process.mark = mark.encode()  # type: ignore[attr-defined]  # all its descendants bear it, whatever session they are in
    STARTED.append(process)
    return process


def _heed_interrupts() -> None:
    """Tests that run in the background of a shell inherit SIGINT ignored, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: "subprocess.Popen[str]", patience: float = PATIENCE) -> "subprocess.CompletedProcess[str]":
    """Waits, within bounds; ends the process and its descendants if it takes longer."""
    try:
        out, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        raise AssertionError(f"still running after {patience} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def script(path: str, arguments: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """`python SCRIPT ARGUMENTS`, to its end."""
    return finish(start(sys.executable, path, *arguments, **options))


def end_all() -> None:
    """A test that fails must not leave a training behind."""
    while STARTED:
        if (process := STARTED.pop()).poll() is None:
            kill(process)
            process.wait()


def kill(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to the process and all its descendants."""
    for member in members(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def members(process: "subprocess.Popen[str]") -> list[int]:
    """Ids of what is alive of the process that `start` began, and of its descendants."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone since, or not ours
            if process.mark in (folder / "environ").read_bytes().split(b"\0"):  # type: ignore[attr-defined]
                found.append(int(folder.name))
    return found


def wait_until(true: Any, patience: float = PATIENCE, step: float = 0.005) -> None:
    """Returns when `true()` is; fails when it takes too long."""
    limit = time.monotonic() + patience
    while not true():
        assert time.monotonic() < limit, f"nothing after {patience} s"
        time.sleep(step)


def flip_byte(file: Path) -> None:
    """The damage of a bad disk."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A write beyond fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
