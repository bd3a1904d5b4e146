"""SIGKILL at random moments of everything that takes long: the same command goes on, and ends with the same bits.

Run by `make faults`. FAULTS_SEED repeats the choices of a run. Every kill that counts has met a process that was not at its end.
"""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from killing import AT_THE_END, EVALUATE_EVERY, OFTEN, TRIES, Training, content, dice_of, end, same_end, series
from tinyruns import beit_arguments, classify_arguments, dvae_arguments, finish, lines, script, start, wait_until

from mimetic.data.index import open_index

DROPPED = {"drop_path_rate": 0.3}
HALF = {"data__batch_size": 8}  # on each of two processes
# What is trained, under which launcher, how many kills, at what moments at the end, and who is killed.
KILLED = {
    "tokenizer": ("dvae", "one", {}, 8, AT_THE_END, "all"),
    "pretraining": ("beit", "one", {"data__workers": 1, "train__ema_decay": 0.9, "overrides": DROPPED}, 10, AT_THE_END, "all"),
    "pretraining by two": ("beit", "ddp", HALF | {"overrides": DROPPED}, 7, AT_THE_END, "all"),
    "one of two": ("beit", "ddp", HALF | {"data__workers": 1, "overrides": DROPPED}, 4, [], "one rank"),
    "ZeRO-1": ("beit", "zero1", HALF | {"overrides": DROPPED}, 4, ["leaving"], "all"),
    "fine-tuning": ("classify", "one", {"views__mixup": 0.8, "overrides": DROPPED}, 8, AT_THE_END, "all"),
}
EXPORTS = 8
SCRIPTS = {"dvae": "tokenizers/train_dvae.py", "beit": "pretrain/beit.py", "classify": "finetune/classify.py"}


def training(kind: str, launcher: str, world: Path, run: Path, settings: dict, before: tuple[str, ...] = ()) -> Training:
    """One with an evaluation every few steps."""
    arguments = {"dvae": dvae_arguments, "beit": beit_arguments, "classify": classify_arguments}[kind]
    settings = OFTEN | {"train__evaluate_every": EVALUATE_EVERY} | settings
    if kind == "beit":
        settings["evaluate_on"] = world / "held-out"
    leaves = "tokenizer" if kind == "dvae" else "backbone"
    return Training(launcher, [*before, SCRIPTS[kind], *arguments(world, run, **settings)], run, leaves)


def test_the_suite_kills_often_enough():
    """Each case below makes its own, and counts none that missed."""
    assert sum(kills for _, _, _, kills, _, _ in KILLED.values()) + EXPORTS >= 40


@pytest.mark.parametrize("case", KILLED)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(case, world, tmp_path):
    kind, launcher, settings, kills, ends, victim = KILLED[case]
    dice = dice_of(case)
    whole = training(kind, launcher, world, tmp_path / "whole", settings).finish()
    broken = training(kind, launcher, world, tmp_path / "broken", settings)
    for moment in series(dice, kills, ends):
        broken.killed_for_sure(dice, moment, victim)
    same_end(broken.finish(), whole, broken.leaves)


@pytest.mark.parametrize("bad_step", ["skip", "rewind"])
def test_a_run_with_a_bad_batch_is_killed_and_ends_with_the_same_bits(bad_step, world, tmp_path):
    """The batch is bad whenever it comes."""
    dice, index = dice_of(bad_step), open_index(world / "data")
    bad = ("tests/faults/bad_batch.py", index.keys(np.array([dice.randrange(len(index))]))[0])
    settings = {"guard__bad_step": bad_step, "guard__max_rewinds": 10, "overrides": DROPPED}
    whole = training("beit", "one", world, tmp_path / "whole", settings, bad).finish()
    events = [line["kind"] for line in lines(whole, "events.jsonl")]
    assert events.count(bad_step) >= 2, "it comes again in the later epochs"
    broken = training("beit", "one", world, tmp_path / "broken", settings, bad)
    for moment in series(dice, 4, []):
        broken.killed_for_sure(dice, moment)
    same_end(broken.finish(), whole, "backbone")


# Exports


def test_a_killed_export_is_completed_by_the_same_command(world, tmp_path):
    """It leaves nothing under the name that was asked for, or the whole folder."""
    dice, run, out = dice_of("export"), tmp_path / "run", tmp_path / "out"
    assert script("pretrain/beit.py", beit_arguments(world, run, train__steps=2)).returncode == 0
    command = [sys.executable, "-m", "mimetic.cli", "export", str(run), str(out), "--to"]
    began = time.monotonic()
    whole = exported([*command, "timm"], out)
    took = time.monotonic() - began
    left = set()
    for number in range(EXPORTS):
        if number % 2:
            shutil.rmtree(out, ignore_errors=True)
        left.add(killed_export([*command, "timm"], out, dice, took if number % 4 < 2 else None))
        if out.exists():
            assert content(out) == whole, "half an export under the name that was asked for"
    assert exported([*command, "timm"], out) == whole
    assert not list(tmp_path.glob(".out*")), "what the kills left is cleaned up"
    assert True in left, "at least one kill met a folder that was not checked yet"


def killed_export(command: list[str], out: Path, dice: random.Random, took: float | None) -> bool:
    """At any moment, or, without `took`, while the folder is there that is not checked yet; returns whether it left that."""
    unchecked = out.with_name(f".{out.name}.unchecked")
    shutil.rmtree(unchecked, ignore_errors=True)
    for _ in range(TRIES):
        process = start(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if took is None:
            wait_until(lambda ends=process: unchecked.exists() or ends.poll() is not None, step=0.0005)
            time.sleep(dice.uniform(0, 0.1))
        else:
            time.sleep(dice.uniform(0, 0.9 * took))
        alive = process.poll() is None
        process.kill()
        end(process)
        print(f"export {'killed' if alive else 'MISSED'}: {out.exists()=}, {unchecked.exists()=}")
        if alive:
            return unchecked.exists()
    raise AssertionError(f"it was at its end {TRIES} times before it could be killed")


def exported(command: list[str], out: Path) -> dict[str, bytes]:
    done = finish(start(*command))
    assert done.returncode == 0, done.stderr
    return content(out)
