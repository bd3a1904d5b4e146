"""Every method under two processes: the same losses and the same weights as one. BEiT itself is in test_engine.py.

Run by `make launches`.
"""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_launches import difference, launched
from tinyruns import beit_arguments, losses, mae_arguments, run_here, simmim_arguments, vqkd_arguments

pytestmark = pytest.mark.timeout(900)
STEPS = {"train__steps": 12, "train__log_every": 1}


@pytest.fixture(scope="module")
def teacher(world, tmp_path_factory) -> Path:
    """A backbone to learn from."""
    return run_here("beit", beit_arguments(world, tmp_path_factory.mktemp("teacher") / "run"))


def beit2_arguments(world: Path, out: Path, **changes) -> list[str]:
    return beit_arguments(world, out, **{"aggregation__layer": 1, "aggregation__head_layers": 1} | changes)


PRETRAININGS = {"beit2": beit2_arguments, "simmim": simmim_arguments, "mae": mae_arguments}


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> dict[str, Path]:
    """One process each."""
    folder = tmp_path_factory.mktemp("alone")
    return {kind: run_here(kind, arguments(world, folder / kind, **STEPS)) for kind, arguments in PRETRAININGS.items()}


@pytest.mark.parametrize("launcher", ["ddp", "zero2"])
@pytest.mark.parametrize("kind", PRETRAININGS)
def test_a_pretraining_is_the_same_under_every_engine(kind, launcher, world, alone, tmp_path):
    done = launched(launcher, f"pretrain/{kind}.py", *PRETRAININGS[kind](world, tmp_path / "run", data__batch_size=8, **STEPS))
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == STEPS["train__steps"]
    assert losses(tmp_path / "run") == pytest.approx(losses(alone[kind]), abs=1e-4)
    assert difference(tmp_path / "run", alone[kind]) < 1e-4


def test_a_vqkd_is_the_same_under_two_processes(world, teacher, tmp_path):
    one = run_here("vqkd", vqkd_arguments(world, tmp_path / "one", teacher, **STEPS))
    done = launched("ddp", "tokenizers/train_vqkd.py", *vqkd_arguments(world, tmp_path / "two", teacher, data__batch_size=8, **STEPS))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(one), abs=1e-4)
    ours, theirs = (load_file(run / "tokenizer/model.safetensors") for run in (tmp_path / "two", one))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-4
