"""The stream in real processes with real workers: what the planner's properties promise (tests/test_order.py) holds there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from imagesets import grey_folder, idx_files, noise

from mimetic.data.pack import pack

READER = Path(__file__).with_name("read_shards.py")
GLOBAL_BATCH = 8
Rows = list[list[Any]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[str]:
    """Two sets of shards: 53 images in shards of 7, 20 in shards of 3."""
    folder = tmp_path_factory.mktemp("sets")
    pack(idx_files(folder / "idx", noise(1, 53, 8, 8)), folder / "first", samples_per_shard=7)
    pack(grey_folder(folder / "tree", 20), folder / "second", samples_per_shard=3)
    return [str(folder / "first"), str(folder / "second")]


def batches(sets: list[str], world: int, workers: int, stop: int, *, state: dict | None = None, **options: Any) -> tuple[list[Rows], dict]:
    """Global batches read by `world` processes at once, and where they stand then."""
    asked = [
        {"sets": sets, "state": state, "stop": stop,
         "options": {"batch_size": GLOBAL_BATCH // world, "rank": rank, "world": world, "workers": workers, "seed": 4, **options}}
        for rank in range(world)
    ]  # fmt: skip
    processes = [subprocess.Popen([sys.executable, READER, json.dumps(one)], stdout=subprocess.PIPE, text=True) for one in asked]
    try:
        told = [[json.loads(line) for line in process.communicate(timeout=120)[0].splitlines()] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world
    (position,) = {json.dumps(lines[-1]) for lines in told}
    assert len({len(lines) for lines in told}) == 1, "every rank has as many steps"
    return [[row for lines in told for row in lines[step]] for step in range(len(told[0]) - 1)], json.loads(position)


@pytest.fixture(scope="module")
def alone(sets) -> list[Rows]:
    """Two epochs and a bit in one process without workers."""
    return batches(sets[:1], 1, 0, 17)[0]


@pytest.mark.parametrize(("world", "workers"), [(1, 3), (2, 2), (4, 1)])
def test_ranks_and_workers_change_nothing(sets, alone, world, workers):
    assert batches(sets[:1], world, workers, 17)[0] == alone
    for epoch in (alone[:7], alone[7:14]):
        assert len({key for batch in epoch for key, valid, _ in batch if valid}) == 53
        assert sum(valid for batch in epoch for _, valid, _ in batch) == 53


@pytest.mark.parametrize(("before", "after"), [((1, 2), (4, 0)), ((4, 1), (2, 2))])
def test_a_run_goes_on_with_other_ranks_and_workers(sets, alone, before, after):
    first, state = batches(sets[:1], *before, 10)
    assert state["epoch"] == 1
    assert first + batches(sets[:1], *after, 17, state=state)[0] == alone


def test_a_mixture_is_the_same_in_any_number_of_processes_and_goes_on_with_another(sets):
    expected, _ = batches(sets, 1, 0, 14)
    first, state = batches(sets, 2, 1, 5)
    assert first + batches(sets, 4, 0, 14, state=state)[0] == expected
