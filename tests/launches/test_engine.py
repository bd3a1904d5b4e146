"""One recipe under every engine, processes that disagree or do not come, bad steps of one process, and signals.

Run by `make launches`. Every launch has a bounded time, and nothing may be alive after it.
"""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from photographs import photo_world
from safetensors.torch import load_file
from test_launches import ACCELERATE, BIN, difference, launch, launched, one_line, refused
from tinyruns import beit_arguments, dvae_arguments, finish, lines, losses, members, run_here, script, start, wait_until

from mimetic.engine.checkpoints import newest
from mimetic.replay import replay

pytestmark = pytest.mark.timeout(900)
PATCH = {"patch_size": 8}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Shards of 200 crops of photographs, and a tokenizer of their cells."""
    return photo_world(tmp_path_factory.mktemp("photos"), 200, 32)


def photo_arguments(photos: Path, out: Path, **changes) -> list[str]:
    """50 steps of 16 crops of 32 pixels, colour."""
    settings = {"data__index": photos / "photos", "tokenizer__path": photos / "tokenizer", "backbone__image_size": 32, "train__steps": 50,
                "train__log_every": 1, "mask__count": 6, "train__ema_decay": 0.9}  # fmt: skip
    return beit_arguments(photos, out, overrides=PATCH, **settings | changes)


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory) -> Path:
    """One process."""
    return run_here("beit", photo_arguments(photos, tmp_path_factory.mktemp("alone") / "run"))


def checkpoint(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints/last" / name)


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


# The same training


@pytest.mark.parametrize("launcher", ["ddp", "zero1", "zero2", "zero3", "accumulated", "zero2 accumulated"])
def test_fifty_steps_of_photographs_are_the_same_under_every_engine(launcher, photos, alone, tmp_path):
    """Losses, weights, both moments, and the mean of the weights, which is what the backbone is made of."""
    name = launcher.split()[0]
    split = {"accumulated": (4, 4), "zero2 accumulated": (4, 2)}.get(launcher, (8, 1))
    arguments = photo_arguments(photos, tmp_path / "run", data__batch_size=split[0], train__accumulate=split[1])
    done = script("pretrain/beit.py", arguments) if name == "accumulated" else launched(name, "pretrain/beit.py", *arguments)
    assert done.returncode == 0, done.stderr
    if name != "accumulated":
        assert f"2 processes ({'DDP' if name == 'ddp' else f'ZeRO-{name[-1]}'})" in done.stdout
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), abs=1e-4)
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert furthest(checkpoint(tmp_path / "run", file), checkpoint(alone, file)) < 1e-4
    assert difference(tmp_path / "run", alone) < 1e-4
    ours, theirs = (lines(run)[-1]["update_ratio"] for run in (tmp_path / "run", alone))
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_saved_weights_are_those_that_deepspeed_itself_would_consolidate(stage, photos, tmp_path):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    arguments = photo_arguments(photos, tmp_path / "run", data__batch_size=8, train__steps=6, train__ema_decay=0.0)
    done = launched(f"zero{stage}", "tests/launches/deepspeeds_own.py", tmp_path / "theirs", "pretrain/beit.py", *arguments)
    assert done.returncode == 0, done.stderr
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "theirs"), tag="end")
    ours = checkpoint(tmp_path / "run", "model.safetensors")
    trained = {name.partition(":")[0] for name in checkpoint(tmp_path / "run", "optimizer.safetensors")}
    assert len(trained) > 20
    assert all(torch.equal(ours[name], theirs[name]) for name in trained)
    backbone = load_file(tmp_path / "run/backbone/model.safetensors")
    assert torch.equal(backbone["blocks.1.mlp.fc2.weight"], ours["backbone.blocks.1.mlp.fc2.weight"])


def test_bf16_under_zero_is_bf16_under_ddp(photos, tmp_path):
    for name in ("ddp", "zero2"):
        arguments = photo_arguments(photos, tmp_path / name, data__batch_size=8, train__precision="bf16", train__steps=10)
        done = launched(name, "pretrain/beit.py", *arguments)
        assert done.returncode == 0, done.stderr
    fp32 = run_here("beit", photo_arguments(photos, tmp_path / "fp32", train__steps=10))
    assert losses(tmp_path / "zero2") == pytest.approx(losses(tmp_path / "ddp"), abs=1e-3)
    assert losses(tmp_path / "zero2") == pytest.approx(losses(fp32), abs=3e-2)
    assert losses(tmp_path / "zero2") != losses(fp32)
    assert {value.dtype for value in checkpoint(tmp_path / "zero2", "model.safetensors").values()} == {torch.float32}


def test_a_dvae_is_not_trained_under_zero(world, tmp_path):
    done = launched("zero1", "tokenizers/train_dvae.py", *dvae_arguments(world, tmp_path / "run", data__batch_size=8))
    refused(done, r"DVAEObjective changes weights between steps, which ZeRO's copies would undo; start it under DDP", tmp_path / "run")


def test_a_dry_run_says_what_would_happen_and_leaves_nothing(photos, tmp_path):
    done = launched("zero2", "pretrain/beit.py", *photo_arguments(photos, tmp_path / "run", data__batch_size=8), "--dry-run")
    assert done.returncode == 0, done.stderr
    for told in (
        r"50 steps of 16 images \(800 images, 4\.0 times the 200 in the data, 12 steps each\)",
        r"2 processes \(ZeRO-2\), cpu, fp32; 16 images a step = 8 x 2 x 1 \(data\.batch_size x processes x train\.accumulate\); "
        r"learning rate 0\.002, 0\.032 per 256 images",
        r"memory of a process, estimated: \d+ MiB for weights, gradients and optimizer, \d+ MiB for 8 images; work: [\d.]+ MMAC an image",
        r"a dry run ends here; nothing was written",
    ):
        assert re.search(told, done.stdout), done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("compiled", ["one", "ddp"])
def test_a_compiled_training_follows_the_plain_one(compiled, photos, alone, tmp_path):
    arguments = photo_arguments(photos, tmp_path / "run", train__compile="true", data__batch_size=16 if compiled == "one" else 8)
    done = launched(compiled, "pretrain/beit.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "fp32, compiled;" in done.stdout
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), abs=1e-3)
    assert difference(tmp_path / "run", alone) < 1e-3


# Processes that are about to do something else, or do not come


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("optim.lr", "0.001", r"differ in their recipes: optim\.lr is 0\.002 for process 0, 0\.001 for process 1; start all of them"),
        ("code", "other", r"differ in their code: mimetic is [0-9a-f]{12} for process 0, other for process 1; install the same"),
    ],
)
def test_processes_that_differ_are_told_in_what(name, value, told, world, tmp_path):
    wrapper = ("tests/launches/one_rank_differs.py", name, value, "pretrain/beit.py")
    done = launched("torchrun", *wrapper, *beit_arguments(world, tmp_path / "run", data__batch_size=8))
    refused(done, told, tmp_path / "run")


def test_processes_with_other_data_are_told_so(world, tmp_path):
    from tinyruns import make_data

    other = make_data(tmp_path / "other", seed=7)
    wrapper = ("tests/launches/one_rank_elsewhere.py", other, "pretrain/beit.py")
    done = launched("torchrun", *wrapper, *beit_arguments(world, tmp_path / "run", data__batch_size=8))
    refused(done, r"the processes differ in their recipes: data\.index is .* for process 0, .*other for process 1", tmp_path / "run")


def alone_of_two(rank: int, port: int, world: Path, out: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    given = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return finish(start(sys.executable, "pretrain/beit.py", *beit_arguments(world, out), env=given | environment), 60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_who_did_not_come_is_named_after_a_bounded_wait(world, tmp_path):
    port, started = free_port(), time.monotonic()
    done = alone_of_two(0, port, world, tmp_path / "run", MIMETIC_PATIENCE="3")
    assert time.monotonic() - started < 40
    assert done.returncode == 2
    assert re.search(rf"process 1 of 2 did not come to 127\.0\.0\.1:{port} within 3 s; see what became of it", one_line(done.stderr))
    done = alone_of_two(1, port, world, tmp_path / "run", MIMETIC_PATIENCE="3")
    assert done.returncode == 2
    assert re.search(rf"process 1 of 2 cannot reach process 0 at 127\.0\.0\.1:{port} \(waited 3 s\); is it running", one_line(done.stderr))
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_and_settings_that_mean_nothing_are_told(world, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = alone_of_two(0, port, world, tmp_path / "run")
    assert re.search(rf"MASTER_PORT {port} is in use on \S+; choose another, such as \d+ \(", one_line(done.stderr))
    for name, value, told in (("MASTER_PORT", "http", "it must be a port"), ("MIMETIC_PATIENCE", "long", "it must be a number of seconds")):
        done = alone_of_two(0, 29500, world, tmp_path / "run", **{name: value})
        assert done.returncode == 2
        assert f"{name} is {value}; {told}" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (["--mixed_precision", "bf16"], r"the launch says mixed_precision bf16, the recipe's train\.precision says no; the recipe decides"),
    ],
)
def test_what_a_launch_settles_otherwise_than_the_recipe_is_refused(option, told, world, tmp_path):
    command = [*ACCELERATE, "--config_file", "launch/accelerate/cpu.yaml", *option, "pretrain/beit.py"]
    done = finish(start(*command, *beit_arguments(world, tmp_path / "run"), env={"PATH": f"{BIN}:/usr/bin:/bin"}))
    refused(done, told, tmp_path / "run")


def test_a_batch_that_does_not_multiply_out_is_refused(world, tmp_path):
    (tmp_path / "deepspeed.json").write_text('{"zero_optimization": {"stage": 1}, "train_batch_size": 64}')
    command = [*ACCELERATE, "--use_deepspeed", "--deepspeed_config_file", tmp_path / "deepspeed.json", "--num_processes", "2",
               "--num_machines", "1", "pretrain/beit.py", *beit_arguments(world, tmp_path / "run", data__batch_size=8)]  # fmt: skip
    done = finish(start(*command, env={"PATH": f"{BIN}:/usr/bin:/bin"}))
    told = r"DeepSpeed configuration says train_batch_size 64, the recipe 16 \(data\.batch_size x train\.accumulate x processes\)"
    refused(done, told, tmp_path / "run")


# Bad steps of one process


def poisoned(launcher: str, factor: float, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return launched(launcher, "tests/launches/poisoned_rank.py", "11", str(factor), "pretrain/beit.py", *arguments)


@pytest.mark.parametrize("launcher", ["torchrun", "zero2"])
def test_a_bad_gradient_of_one_process_stops_both_together_and_can_be_replayed(launcher, photos, tmp_path, capsys):
    done = poisoned(launcher, math.nan, *photo_arguments(photos, tmp_path / "run", data__batch_size=8))
    assert done.returncode != 0
    (told,) = (line for line in done.stderr.splitlines() if "mimetic: error:" in line)
    assert "the gradient of step 12 is not finite (guard.bad_step stop)" in told
    left = [float((tmp_path / f"run-left-{rank}").read_text()) for rank in (0, 1)]
    assert abs(left[0] - left[1]) < 1
    assert newest(tmp_path / "run/checkpoints")[1]["step"] == 10
    for rank in (0, 1):
        assert replay(tmp_path / "run/capsules/step-00000012", rank)
        assert "the same to the bit" in capsys.readouterr().out


@pytest.mark.parametrize(("launcher", "factor"), [("torchrun", math.nan), ("zero1", math.inf), ("zero2", math.nan), ("zero3", math.nan)])
def test_a_bad_gradient_of_one_process_is_left_out_by_both(launcher, factor, photos, tmp_path):
    settings = {"guard__bad_step": "skip", "train__steps": 20}
    done = poisoned(launcher, factor, *photo_arguments(photos, tmp_path / "run", data__batch_size=8, **settings))
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(tmp_path / "run", "events.jsonl") if line["kind"] == "skip"] == [12]
    moments = checkpoint(tmp_path / "run", "optimizer.safetensors")
    assert {float(value) for name, value in moments.items() if name.endswith(":step")} == {19}
    assert all(value.isfinite().all() for value in moments.values())
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "run") if "loss" in line and line["step"] != 12)


@pytest.mark.parametrize("launcher", ["torchrun", "zero2", "zero3"])
def test_both_processes_go_back_together(launcher, photos, tmp_path):
    settings = {"guard__bad_step": "rewind", "train__steps": 20, "train__checkpoint_every": 10}
    runs = [tmp_path / "run", tmp_path / "again"]
    for run in runs:
        done = poisoned(launcher, math.nan, *photo_arguments(photos, run, data__batch_size=8, **settings))
        assert done.returncode == 0, done.stderr
        (told,) = (line for line in done.stdout.splitlines() if "back to" in line)
        assert re.search(r"step 12 is not finite; back to \S+step-00000010, and on with the data after it \(1 of 3\)", told)
    assert [line["step"] for line in lines(runs[0]) if "loss" in line] == list(range(1, 21))
    assert losses(runs[0]) == losses(runs[1])
    assert difference(*runs) == 0


# Signals


def stopped_by(number: int, process: "subprocess.Popen[str]", run: Path, whom: str) -> "subprocess.CompletedProcess[str]":
    """Sends the signal when the training is on its way, to the launcher or to one of its processes."""
    wait_until(lambda: len(losses(run)) >= 12 or process.poll() is not None, step=0.002)
    assert process.poll() is None, "it ended before it could be stopped"
    os.kill(process.pid if whom == "launcher" else trainings(process)[-1], number)
    done = finish(process, 60)
    wait_until(lambda: not members(process), 20)
    return done


def trainings(process: "subprocess.Popen[str]") -> list[int]:
    """Processes that train, by number; a loader's worker is a child of one of them."""
    found = {}
    for member in members(process):
        words = Path(f"/proc/{member}/environ").read_bytes().split(b"\0")
        rank = next((word.removeprefix(b"RANK=") for word in words if word.startswith(b"RANK=")), None)
        if rank is not None:
            found.setdefault(int(rank), member)
            found[int(rank)] = min(found[int(rank)], member)
    return [found[rank] for rank in sorted(found)]


LONG = {"train__steps": 200, "train__checkpoint_every": 1000, "data__workers": 1}


@pytest.mark.parametrize(
    ("launcher", "number", "whom"),
    [("ddp", signal.SIGTERM, "launcher"), ("ddp", signal.SIGINT, "launcher"), ("torchrun", signal.SIGUSR1, "one process"),
     ("zero2", signal.SIGTERM, "launcher")],
)  # fmt: skip
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_bits(launcher, number, whom, photos, tmp_path):
    whole, broken = (photo_arguments(photos, tmp_path / name, data__batch_size=8, **LONG) for name in ("whole", "broken"))
    done = stopped_by(number, launch(launcher, "pretrain/beit.py", *broken), tmp_path / "broken", whom)
    assert done.returncode != 0
    (told,) = (line for line in done.stderr.splitlines() if "mimetic: stopped by" in line)
    saved = re.search(r"saved after step (\d+); the same command goes on from there", told)
    assert saved, told
    assert [int(path.name[-8:]) for path in (tmp_path / "broken/checkpoints").glob("step-*")] == [int(saved[1])]
    done = launched(launcher, "pretrain/beit.py", *broken)
    assert done.returncode == 0, done.stderr
    assert f"going on after step {saved[1]}\n" in done.stdout
    assert launched(launcher, "pretrain/beit.py", *whole).returncode == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert difference(tmp_path / "broken", tmp_path / "whole") == 0


def test_a_launcher_that_hands_nothing_on_leaves_no_orphan_and_a_checkpoint(photos, tmp_path):
    """`accelerate launch` of one process dies of SIGTERM alone."""
    process = launch("one", "pretrain/beit.py", *photo_arguments(photos, tmp_path / "run", **LONG))
    stopped_by(signal.SIGTERM, process, tmp_path / "run", "launcher")
    assert newest(tmp_path / "run/checkpoints")[1]["step"] >= 12
    assert not (tmp_path / "run/finished.json").exists()


def test_launchers_killed_outright_leave_no_orphan(photos, tmp_path):
    process = launch("torchrun", "pretrain/beit.py", *photo_arguments(photos, tmp_path / "run", data__batch_size=8, **LONG))
    wait_until(lambda: len(losses(tmp_path / "run")) >= 12 or process.poll() is not None, step=0.002)
    process.kill()
    process.communicate(timeout=60)
    wait_until(lambda: not members(process), 30)
    assert newest(tmp_path / "run/checkpoints")[1]["step"] >= 12
