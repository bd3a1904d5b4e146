"""Trainings that are killed again and again at chosen moments, and what has to be the same at their end."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tinyruns import PATIENCE, finish, kill, lines, losses, members, start, wait_until

from mimetic.engine.checkpoints import MOMENTS, WEIGHTS, newest, verify

BIN = Path(sys.executable).parent
ACCELERATE = [BIN / "accelerate", "launch", "--config_file"]
LAUNCHERS: dict[str, list[Path | str]] = {
    "one": [sys.executable],
    "ddp": [BIN / "torchrun", "--standalone", "--nproc_per_node", "2"],
    "zero1": [*ACCELERATE, "launch/accelerate/zero1.yaml", "--num_processes", "2"],
    "zero2": [*ACCELERATE, "launch/accelerate/zero2.yaml", "--num_processes", "2"],
}
STEPS, EVALUATE_EVERY, CHECKPOINT_EVERY = 48, 16, 3
OFTEN = {"train__steps": STEPS, "train__log_every": 1, "train__checkpoint_every": CHECKPOINT_EVERY}
CLOCKED = {"images_per_second", "macs_per_second", "matrix_share", "data_wait", "seconds"}  # numbers that differ from run to run
AT_THE_END = ["saved", "measured", "leaving"]
TRIES = 4


def dice_of(test: str) -> random.Random:
    """The choices of one test."""
    return random.Random(f"{os.environ['FAULTS_SEED']} {test}")


@dataclass(frozen=True)
class Training:
    """A command that trains into a run folder, and the folder in it that it leaves."""

    launcher: str
    command: list[str]
    run: Path
    leaves: str

    @property
    def said(self) -> Path:
        """What it wrote to the terminal, over all starts."""
        return self.run.with_name(f"{self.run.name}.log")

    def start(self) -> "subprocess.Popen[str]":
        words = list(LAUNCHERS[self.launcher])
        if self.launcher.startswith("zero"):
            words += ["--main_process_port", str(free_port())]
        with self.said.open("a") as log:
            return start(*words, *self.command, stdout=log, stderr=log, env={"PATH": f"{BIN}:/usr/bin:/bin"})

    def finish(self) -> Path:
        """To its end, without a fault; nothing may be alive after it."""
        process = self.start()
        done = finish(process)
        wait_until(lambda: not members(process), 20)
        assert done.returncode == 0, self.said.read_text()[-5000:]
        assert (self.run / "finished.json").exists()
        return self.run

    def killed(self, dice: random.Random, kind: str, victim: str = "all") -> bool:
        """Starts it and kills it at a moment of some kind; returns whether the kill met a training that was not at its end."""
        due, delay = moment(self, dice, kind)
        already = len(losses(self.run))
        process = self.start()
        wait_until(lambda: due() or process.poll() is not None, step=0.0005)
        time.sleep(delay)
        alive = process.poll() is None
        if victim == "all":
            kill_writer(process, self.run)
            end(process)
        else:
            kill_one_rank(process, dice)
            gone(process)
        finished = (self.run / "finished.json").exists()
        hit = alive and not finished
        half = [path.name for path in (self.run / "checkpoints").glob(".step-*")]
        print(f"{self.run.name}: {kind}, {delay * 1e3:.0f} ms, {victim}: {'killed' if hit else 'MISSED'}, losses before {already}, "
              f"now {len(losses(self.run))}, half-written {half}", flush=True)  # fmt: skip
        assert hit or (alive and finished) or process.returncode == 0, self.said.read_text()[-5000:]
        return hit

    def killed_for_sure(self, dice: random.Random, kind: str, victim: str = "all") -> None:
        """A run that reached its end before it was killed is put back to where it was, and started again."""
        before = self.run.with_name(f"{self.run.name}.before")
        for _ in range(TRIES):
            shutil.rmtree(before, ignore_errors=True)
            if self.run.exists():
                shutil.copytree(self.run, before, symlinks=True)
            if self.killed(dice, kind, victim):
                return
            shutil.rmtree(self.run)
            if before.exists():
                before.rename(self.run)
        raise AssertionError(f"{kind}: it was at its end {TRIES} times before it could be killed")


def moment(training: Training, dice: random.Random, kind: str) -> tuple[Callable[[], bool], float]:
    """When to kill: a condition to wait for, and seconds after it.

    Args:
        kind: start (in the first two seconds, or around the first steps), step (after some more steps), writing (a
            checkpoint is being written), evaluation (right after the checkpoint that comes before one), saved (the last checkpoint is
            there), measured (the last record is), leaving (the folder that the run leaves is being written).
    """
    run, checkpoints = training.run, training.run / "checkpoints"
    known = newest(checkpoints, tell=False)
    done = known[1]["step"] if known else 0
    last = checkpoints / f"step-{STEPS:08d}"
    evaluation = min(STEPS, (done // EVALUATE_EVERY + 1) * EVALUATE_EVERY)
    folder = run / training.leaves
    if done == STEPS and kind in ("step", "writing", "evaluation", "saved"):
        kind = "leaving"
    if kind == "start":
        if dice.random() < 0.5:
            return (lambda: True), dice.uniform(0, 2)
        before = writer_of(run)
        return (lambda: writer_of(run) != before), dice.uniform(0, 0.5)
    if kind == "step":
        target = min(STEPS - 1, len(losses(run)) + dice.randint(1, 6))  # lines of before the last kill are there until it goes on
        return (lambda: len(losses(run)) >= target), dice.uniform(0, 0.03)
    if kind == "writing":
        before, seen, wanted = half_written(checkpoints), set(), dice.randint(1, 2)

        def due() -> bool:
            seen.update(half_written(checkpoints) - before)
            return len(seen) >= wanted

        return due, dice.uniform(0, 0.004)
    if kind == "evaluation":
        return (checkpoints / f"step-{evaluation:08d}").exists, dice.uniform(0, 0.03)
    if kind == "saved":
        return last.exists, dice.uniform(0, 0.005)
    if kind == "measured":
        return (lambda: any(line["step"] == STEPS for line in lines(run, "records.jsonl"))), dice.choice([0, dice.uniform(0, 0.005)])
    assert kind == "leaving", kind
    return (lambda: folder.exists() or folder.with_name(f".{folder.name}.writing").exists()), dice.uniform(0, 0.002)


def half_written(checkpoints: Path) -> set[tuple[str, int]]:
    """Checkpoints that are being written, told from those that an earlier kill left."""
    found = set()
    for path in checkpoints.glob(".step-*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def end(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to it and all its descendants, and nothing is left of it."""
    kill(process)
    gone(process)


def gone(process: "subprocess.Popen[str]") -> None:
    """It ends soon by itself, and nothing is left of it."""
    process.wait(PATIENCE)
    wait_until(lambda: not members(process), 30)


def kill_writer(process: "subprocess.Popen[str]", run: Path) -> None:
    """SIGKILL at once to the process that writes into the run folder: to look for all others takes longer than a checkpoint."""
    with contextlib.suppress(OSError, ValueError):
        writer = int(writer_of(run))
        if process.mark in Path(f"/proc/{writer}/environ").read_bytes().split(b"\0"):  # type: ignore[attr-defined]  # ours, and alive
            os.kill(writer, signal.SIGKILL)


def writer_of(run: Path) -> str:
    """The process that wrote into the run folder last."""
    with contextlib.suppress(OSError):
        return (run / ".lock").read_text()
    return ""


def kill_one_rank(process: "subprocess.Popen[str]", dice: random.Random) -> None:
    """SIGKILL to one of the processes that train; the launcher has to end the others. All, if they do not exist yet."""
    ranks = []
    for member in members(process):
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{member}/environ").read_bytes().split(b"\0")
            parent = int(Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and any(word.startswith(b"RANK=") for word in environment):
                ranks.append(member)
    if ranks:
        os.kill(dice.choice(sorted(ranks)), signal.SIGKILL)
    else:
        kill(process)


def series(dice: random.Random, kills: int, ends: list[str]) -> list[str]:
    """Kinds of moments for so many kills of one run, one after the other: all kinds on the way in some order, then those at the end."""
    on_the_way = kills - len(ends)
    kinds = (["writing", "step", "evaluation", "start"] * kills)[:on_the_way]
    dice.shuffle(kinds)
    return kinds + ends


def same_end(run: Path, whole: Path, leaves: str) -> None:
    """Not a bit differs from the run that nobody killed, every step and every measurement was logged once, and nothing lies about."""
    ours, theirs = ((folder / "checkpoints/last").resolve() for folder in (run, whole))
    assert ours.name == theirs.name == f"step-{STEPS:08d}"
    state, wanted = verify(ours), verify(theirs)
    assert {**state, "seconds": 0} == {**wanted, "seconds": 0}
    for name in (WEIGHTS, MOMENTS):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert content(run / leaves) == content(whole / leaves)
    assert [line["step"] for line in lines(run) if "loss" in line] == list(range(1, STEPS + 1))
    assert unclocked(run, "metrics.jsonl") == unclocked(whole, "metrics.jsonl")
    assert unclocked(run, "records.jsonl") == unclocked(whole, "records.jsonl")
    assert len(lines(whole, "records.jsonl")) > 1
    best, wanted_best = (folder / "checkpoints/best" for folder in (run, whole))
    assert best.readlink() == wanted_best.readlink()
    assert verify(best)["step"] == verify(wanted_best)["step"], "the best one is there"
    assert not [*(run / "checkpoints").glob(".step-*"), *run.glob(".*.writing")]


def unclocked(run: Path, name: str) -> list[dict]:
    """Lines without what a clock decides; NaN compares as text."""
    return [json.dumps({key: value for key, value in line.items() if key not in CLOCKED | {"time"}}) for line in lines(run, name)]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert found, folder
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
