"""Several processes under real launchers: the same losses, exact counts, kills, and one line for what a user can cure.

Run by `make launches`. Every launch has a bounded time, and nothing may be alive after it.
"""

import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tinyruns import (
    beit_arguments,
    classify_arguments,
    dvae_arguments,
    finish,
    golden,
    kill,
    lines,
    losses,
    members,
    run_here,
    script,
    start,
    wait_until,
)

from mimetic.engine.checkpoints import newest

pytestmark = pytest.mark.timeout(900)  # DeepSpeed compiles its communication on the first start
BIN = Path(sys.executable).parent
ACCELERATE = [BIN / "accelerate", "launch"]
LAUNCHERS: dict[str, list[Path | str]] = {
    "ddp": [*ACCELERATE, "--config_file", "launch/accelerate/ddp.yaml", "--num_processes", "2"],
    **{f"zero{n}": [*ACCELERATE, "--config_file", f"launch/accelerate/zero{n}.yaml", "--num_processes", "2"] for n in (1, 2, 3)},
    "torchrun": [BIN / "torchrun", "--nproc_per_node", "2"],
    "one": [*ACCELERATE, "--config_file", "launch/accelerate/cpu.yaml"],
}
ENGINES = {"ddp": "2 processes (DDP)", "zero1": "2 processes (ZeRO-1)", "torchrun": "2 processes (DDP)", "one": "1 process (one process)"}


def launch(launcher: str, *command: str | Path, **options) -> "subprocess.Popen[str]":
    return start(*LAUNCHERS[launcher], *command, env={"PATH": f"{BIN}:/usr/bin:/bin"}, **options)


def launched(launcher: str, *command: str | Path) -> "subprocess.CompletedProcess[str]":
    """To its end; nothing may be left of it a moment later."""
    process = launch(launcher, *command)
    done = finish(process, 240)
    wait_until(lambda: not members(process), 20)
    return done


def killed(launcher: str, run: Path, arguments: list[str], first: int, last: int) -> int:
    """Kills launcher and processes at a random moment between two steps; returns the newest checkpoint's step."""
    seed = time.time_ns()
    dice = random.Random(seed)
    step, moment = dice.randint(first, last), dice.uniform(0, 0.03)
    process = launch(launcher, "pretrain/beit.py", *arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(losses(run)) >= step or process.poll() is not None, step=0.002)
    assert process.poll() is None, "it ended before it could be killed"
    time.sleep(moment)
    kill(process)
    process.wait()
    wait_until(lambda: not members(process), 20)
    assert not (run / "finished.json").exists(), "it ended before it could be killed"
    print(f"seed {seed}: killed {moment * 1e3:.0f} ms after step {step} was logged; {len(losses(run))} losses are on the disk")
    return newest(run / "checkpoints")[1]["step"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "backbone/model.safetensors")


def difference(run: Path, other: Path) -> float:
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> dict[str, Path]:
    """The golden recipe once under each launcher, 16 images a step everywhere, and once in this process."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name in ENGINES:
        arguments = beit_arguments(world, folder / name, data__batch_size=16 if name == "one" else 8, train__checkpoint_every=2)
        done = launched(name, "pretrain/beit.py", *arguments)
        assert done.returncode == 0, done.stderr
        assert ENGINES[name] in done.stdout
        before_first = done.stdout.partition("step 1/20")[0].splitlines() + done.stderr.splitlines()
        assert len(before_first) < 20, before_first
        found[name] = folder / name
    return found | {"here": run_here("beit", beit_arguments(world, folder / "here"))}


@pytest.mark.parametrize("launcher", ENGINES)
def test_every_launcher_follows_the_golden_losses(runs, launcher):
    assert losses(runs[launcher]) == pytest.approx(golden(), abs=1e-3)
    assert losses(runs[launcher]) == pytest.approx(losses(runs["here"]), abs=1e-4)
    assert difference(runs[launcher], runs["here"]) < 1e-4


def test_two_killed_processes_go_on_to_the_same_bits(world, tmp_path):
    """With drop path, which each rank draws for itself, and a worker each."""
    settings = {"data__batch_size": 8, "data__workers": 1, "train__steps": 40, "train__checkpoint_every": 3, "train__log_every": 1}
    whole, broken = (
        beit_arguments(world, tmp_path / name, overrides={"drop_path_rate": 0.3}, **settings) for name in ("whole", "broken")
    )
    assert launched("torchrun", "pretrain/beit.py", *whole).returncode == 0
    step = killed("torchrun", tmp_path / "broken", broken, 7, 25)
    done = launched("torchrun", "pretrain/beit.py", *broken)
    assert done.returncode == 0, done.stderr
    assert f"going on after step {step}\n" in done.stdout
    assert [line["step"] for line in lines(tmp_path / "broken")] == list(range(1, 41))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert difference(tmp_path / "broken", tmp_path / "whole") == 0


def test_zero1_goes_on_after_a_kill(world, runs, tmp_path):
    arguments = beit_arguments(world, tmp_path / "run", data__batch_size=8, train__checkpoint_every=2)
    step = killed("zero1", tmp_path / "run", arguments, 5, 12)
    done = launched("zero1", "pretrain/beit.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"going on after step {step}\n" in done.stdout
    assert losses(tmp_path / "run") == losses(runs["zero1"])
    assert difference(tmp_path / "run", runs["zero1"]) == 0


def test_a_checkpoint_of_two_processes_is_gone_on_from_by_one_with_as_many_images_a_step(world, runs, tmp_path):
    run = shutil.copytree(runs["ddp"], tmp_path / "run", symlinks=True)
    (run / "finished.json").unlink()
    shutil.rmtree(run / "checkpoints/step-00000020")
    done = script("pretrain/beit.py", beit_arguments(world, run, data__batch_size=8, train__checkpoint_every=2))
    assert done.returncode == 2
    told = (r"step-00000018 had 16 images a step \(8 x 2 processes x 1\), this run has 8 \(8 x 1 process x 1\); "
            r"--train\.accumulate 2 keeps them")  # fmt: skip
    assert re.search(told, one_line(done.stderr)), done.stderr
    done = script("pretrain/beit.py", beit_arguments(world, run, train__checkpoint_every=2))
    assert done.returncode == 0, done.stderr
    assert "going on after step 18\n" in done.stdout
    assert losses(run) == pytest.approx(losses(runs["ddp"]), abs=1e-4)
    assert difference(run, runs["ddp"]) < 1e-4


def one_line(err: str) -> str:
    assert re.fullmatch(r"mimetic: error: .+\n", err), f"not one line: {err}"
    return err


def test_two_processes_count_every_held_out_image_once(world, tmp_path):
    arguments = classify_arguments(world, tmp_path / "run", data__batch_size=8, data__workers=1)
    done = launched("torchrun", "tests/launches/same_everywhere.py", "finetune/classify.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert re.search(r"2 ranks, \d{4,} numbers: the same\n", done.stdout)
    alone = run_here("classify", classify_arguments(world, tmp_path / "alone"))
    (ours,), (theirs,) = lines(tmp_path / "run", "records.jsonl"), lines(alone, "records.jsonl")
    assert (ours["count"], theirs["count"]) == (70, 70)
    assert ours["value"] == theirs["value"]
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), abs=1e-4)


def test_two_processes_train_one_tokenizer(world, tmp_path):
    """Restarts of dead codes included."""
    arguments = dvae_arguments(world, tmp_path / "run", data__batch_size=8)
    done = launched("torchrun", "tests/launches/same_everywhere.py", "tokenizers/train_dvae.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert re.search(r"2 ranks, \d{4,} numbers: the same\n", done.stdout)
    records = {line["metric"]: line for line in lines(tmp_path / "run", "records.jsonl")}
    assert {record["count"] for record in records.values()} == {70}
    assert sum(records["codes_used"]["details"]["counts"]) == 70 * 16


# What a user can cure


def refused(done: "subprocess.CompletedProcess[str]", message: str, run: Path) -> None:
    """Our line once, no traceback of ours (the launchers have their own), no exit code 0, nothing left behind."""
    assert done.returncode not in (0, None)
    ours = [line for line in done.stderr.splitlines() if "mimetic: error:" in line]
    assert len(ours) == 1, done.stderr
    assert re.search(message, ours[0]), ours[0]
    assert not re.search(r"\[rank\d\]|/(engine|pretrain|finetune|tokenizers|data)/\w+\.py\"", done.stderr), done.stderr
    assert "step 1" not in done.stdout
    assert not run.exists()


def test_a_misspelt_setting_is_told_once(world, tmp_path):
    done = launched("ddp", "pretrain/beit.py", *beit_arguments(world, tmp_path / "run"), "--views.fliep", "1")
    refused(done, r"unknown setting --views\.fliep \(did you mean views\.flip\?\)$", tmp_path / "run")


def test_a_contradiction_is_told_once(world, tmp_path):
    done = launched("zero1", "pretrain/beit.py", *beit_arguments(world, tmp_path / "run", mask__count=17))
    refused(done, r"mask\.count is 17, but the 4x4 grid has 16 cells; hide 1 to 16$", tmp_path / "run")


def test_what_one_rank_alone_meets_is_told_and_ends_all(world, tmp_path):
    elsewhere = shutil.copytree(world / "data", tmp_path / "elsewhere")
    (elsewhere / "shard-00001.tar").unlink()
    wrapper = ("tests/launches/one_rank_elsewhere.py", elsewhere, "pretrain/beit.py")
    done = launched("torchrun", *wrapper, *beit_arguments(world, tmp_path / "run", data__batch_size=8))
    refused(done, r"elsewhere/shard-00001\.tar: 0 bytes, the index says \d+; the shard has changed: pack it again ", tmp_path / "run")


def test_a_world_that_was_only_announced_is_refused(world, tmp_path):
    process = start(sys.executable, "pretrain/beit.py", *beit_arguments(world, tmp_path / "run"), env={"WORLD_SIZE": "2"})
    done = finish(process)
    assert done.returncode == 2
    assert "WORLD_SIZE is 2 but RANK is not set; start with accelerate launch or torchrun, or unset WORLD_SIZE" in one_line(done.stderr)
    assert not (tmp_path / "run").exists()
