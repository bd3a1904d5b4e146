"""Killed in one world and gone on in another: the same data once, in the same steps, and nearly the same numbers."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from killing import EVALUATE_EVERY, OFTEN, STEPS, Training, dice_of
from safetensors.torch import load_file
from tinyruns import beit_arguments, lines, losses

TOLERANCE = 1e-4
TWO, ONE = {"data__batch_size": 8}, {"data__batch_size": 16}
ACCUMULATED = {"data__batch_size": 8, "train__accumulate": 2}
CHAINS = {
    "two, one of sixteen, two": [("ddp", TWO), ("one", ONE), ("ddp", TWO)],
    "two, one that accumulates, two": [("ddp", TWO), ("one", ACCUMULATED), ("ddp", TWO)],
    "DDP, ZeRO-2, one": [("ddp", TWO), ("zero2", TWO), ("one", ONE)],
}


def training(launcher: str, settings: dict, world: Path, run: Path) -> Training:
    noted = ["tests/faults/keys_seen.py", str(run.with_name(f"{run.name}-keys.jsonl")), "pretrain/beit.py"]
    settings = OFTEN | {"train__evaluate_every": EVALUATE_EVERY} | settings
    return Training(launcher, [*noted, *beit_arguments(world, run, **settings)], run, "backbone")


def keys_of_steps(run: Path) -> list[list[str]]:
    """The keys of each step's batch, sorted, from the last start that took this step."""
    found: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for line in map(json.loads, run.with_name(f"{run.name}-keys.jsonl").read_text().splitlines()):
        found[line["step"]][line["start"]] += line["keys"]
    assert sorted(found) == list(range(STEPS))
    return [sorted(list(starts.values())[-1]) for _, starts in sorted(found.items())]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    return training("ddp", TWO, world, tmp_path_factory.mktemp("worlds") / "whole").finish()


@pytest.mark.parametrize("chain", CHAINS)
def test_another_world_goes_on_with_the_same_data_and_nearly_the_same_numbers(chain, whole, world, tmp_path):
    dice, run, first, middle, last = dice_of(chain), tmp_path / "run", *CHAINS[chain]
    for launcher, settings in (first, middle):
        killed = training(launcher, settings, world, run)
        killed.killed_for_sure(dice, "step")
        killed.killed_for_sure(dice, "evaluation")  # after 16 steps, and after 32
    training(*last, world, run).finish()
    starts = [line["step"] for line in lines(run, "events.jsonl") if line["kind"] == "start"]
    assert starts[-3] >= EVALUATE_EVERY, "the second world goes on from the first one's checkpoint"
    assert starts[-1] >= 2 * EVALUATE_EVERY, "and the third from the second's"

    seen = keys_of_steps(run)
    assert seen == keys_of_steps(whole)
    assert all(len(set(keys)) == 16 for keys in seen)
    assert [line["step"] for line in lines(run)] == list(range(1, STEPS + 1))
    assert losses(run) == pytest.approx(losses(whole), abs=TOLERANCE)
    for file in ("checkpoints/last/model.safetensors", "backbone/model.safetensors"):
        ours, theirs = load_file(run / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < TOLERANCE
