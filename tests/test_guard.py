"""Bad steps: found, agreed on, put into a capsule, and stopped at, left out, or gone back from; nothing else is touched."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from poison import poisoned
from safetensors.torch import load_file, save_file
from tinyruns import beit_arguments, classify_arguments, dvae_arguments, flip_byte, lines, losses, run_here

from mimetic.engine.capsules import read_capsule
from mimetic.engine.checkpoints import newest
from mimetic.engine.config import GuardSettings
from mimetic.engine.errors import CheckpointError, MimeticError, SettingError
from mimetic.engine.guard import REMEMBERED, Guard
from mimetic.replay import replay

CPU = torch.device("cpu")
LOGGED = {"train__log_every": 1, "train__checkpoint_every": 5, "overrides": {"drop_path_rate": 0.2}}


@contextmanager
def poison(steps: dict[int, float]) -> Iterator[None]:
    cure = poisoned(steps)
    try:
        yield
    finally:
        cure()


def kinds(run: Path) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in lines(run, "events.jsonl") if line["kind"] not in ("checkpoint", "start", "finished")]


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory) -> Path:
    """A run whose 8th step is infinite."""
    run = tmp_path_factory.mktemp("guard") / "stopped"
    with poison({7: math.inf}), pytest.raises(MimeticError) as told:
        run_here("beit", beit_arguments(world, run, **LOGGED))
    assert re.match(
        r"the gradient of step 8 is not finite \(guard\.bad_step stop\); checkpoints from before are kept; see what happened with: "
        r"mimetic replay .*/stopped/capsules/step-00000008; lower optim\.lr \(0\.002\)", str(told.value))  # fmt: skip
    assert told.value.together
    return run


def test_a_run_that_stops_has_changed_nothing_by_the_bad_step(stopped):
    assert [line["step"] for line in lines(stopped)] == list(range(1, 8))
    assert all(math.isfinite(loss) for loss in losses(stopped))
    assert newest(stopped / "checkpoints")[1]["step"] == 5
    assert kinds(stopped) == [("bad step", 8), ("stop", 8)]


def test_a_stopped_run_goes_on_as_if_nothing_had_been(stopped, world, tmp_path):
    """The poison is gone: the same command ends as a run that never met it."""
    whole = run_here("beit", beit_arguments(world, tmp_path / "whole", **LOGGED))
    run_here("beit", beit_arguments(world, stopped, **LOGGED))
    assert losses(stopped) == losses(whole)
    ours, theirs = (load_file(run / "backbone/model.safetensors") for run in (stopped, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_capsule_replays_the_same_loss_to_the_bit(stopped, capsys):
    capsule = read_capsule(stopped / "capsules/step-00000008", None)
    assert [len(keys) for keys in capsule.keys] == [16]
    assert math.isfinite(capsule.losses[0])
    assert replay(stopped / "capsules/step-00000008", None)
    said = capsys.readouterr().out
    assert "the same to the bit" in said
    assert re.match(r"step 8 of a pretrain run, process 0 of 1: gradient norm (inf|nan), limit inf\n", said)
    assert re.search(r"micro-batch 1 of 1 \(16 images: \S+, \S+, \S+, \.\.\.\): loss", said)


@pytest.mark.parametrize("kind", ["classify", "dvae", "accumulated"])
def test_capsules_of_every_training_replay(kind, world, tmp_path, capsys):
    """With mixup, restarts of codes at the very step, drop path, and several micro-batches."""
    arguments = {
        "classify": classify_arguments(world, tmp_path / "run", views__mixup=0.8, overrides={"drop_path_rate": 0.3}),
        "dvae": dvae_arguments(world, tmp_path / "run"),
        "accumulated": beit_arguments(world, tmp_path / "run", train__accumulate=3, data__batch_size=5, overrides={"drop_path_rate": 0.3}),
    }[kind]
    with poison({4: math.nan}), pytest.raises(MimeticError, match="the gradient of step 5 is not finite"):
        run_here("beit" if kind == "accumulated" else kind, arguments)
    assert replay(tmp_path / "run/capsules/step-00000005", None)
    assert capsys.readouterr().out.count("the same to the bit") == (3 if kind == "accumulated" else 1)


def test_a_replay_that_differs_says_so_and_one_of_broken_weights_names_the_module(stopped, tmp_path, capsys, world):
    with poison({3: math.nan}), pytest.raises(MimeticError):
        run_here("beit", beit_arguments(world, tmp_path / "run"))
    folder = tmp_path / "run/capsules/step-00000004"
    weights = load_file(folder / "model.safetensors")
    weights["backbone.blocks.1.mlp.fc1.bias"][3] = math.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="differs from what was written; the capsule cannot be replayed"):
        replay(folder, None)
    told = json.loads((folder / "capsule.json").read_text())
    from mimetic.engine.checkpoints import hash_of

    (folder / "capsule.json").write_text(json.dumps(told | {"weights": hash_of(folder / "model.safetensors")}))
    assert not replay(folder, None)
    said = capsys.readouterr().out
    assert "NOT the same" in said
    assert "the first output that is not finite is that of backbone.blocks.1.mlp.fc1 (" in said
    assert "this process's own gradient is not finite in" in said


def test_a_damaged_capsule_is_refused(stopped, tmp_path):
    with pytest.raises(CheckpointError, match="holds no whole capsule; give a folder like RUN/capsules/step-00000123"):
        replay(tmp_path, None)
    with pytest.raises(CheckpointError, match="--process 3: the capsule is of 1 processes, 0 to 0"):
        replay(stopped / "capsules/step-00000008", 3)
    flip_byte(stopped / "capsules/step-00000008/process-0.safetensors")
    with pytest.raises(CheckpointError, match=r"process-0\.safetensors is missing or differs"):
        replay(stopped / "capsules/step-00000008", None)


def test_a_step_that_is_left_out_counts_for_nothing(world, tmp_path):
    """The same weights as a training in which that one gradient was never there."""
    settings = LOGGED | {"guard__bad_step": "skip", "train__steps": 12}
    with poison({7: math.nan}):
        run = run_here("beit", beit_arguments(world, tmp_path / "run", **settings))
    assert [line["step"] for line in lines(run)] == list(range(1, 13))
    before, after = (next(line for line in lines(run) if line["step"] == step) for step in (7, 9))
    assert math.isnan(next(line for line in lines(run) if line["step"] == 8)["loss"]), "no number of it is made up"
    assert "skipped_steps" not in before
    assert after["skipped_steps"] == 1
    assert kinds(run) == [("bad step", 8), ("skip", 8)]
    moments = load_file(run / "checkpoints/last/optimizer.safetensors")
    assert {float(value) for name, value in moments.items() if name.endswith(":step")} == {11}
    assert (run / "capsules/step-00000008/capsule.json").exists()


def test_steps_are_left_out_within_a_budget(world, tmp_path):
    settings = LOGGED | {"guard__bad_step": "skip", "guard__max_skips": 2}
    with poison(dict.fromkeys((3, 6, 8), math.inf)), pytest.raises(MimeticError, match=r"step 9 .*and guard\.max_skips 2 used up"):
        run_here("beit", beit_arguments(world, tmp_path / "run", **settings))
    assert kinds(tmp_path / "run") == [("bad step", 4), ("skip", 4), ("bad step", 7), ("skip", 7), ("bad step", 9), ("stop", 9)]


def test_a_run_goes_back_and_on_with_the_data_after_the_bad_step(world, tmp_path):
    seen = []
    from mimetic.engine.loop import _Loop

    own = _Loop.next_batch
    _Loop.next_batch = lambda self, *rest: seen.append((self.step, own(self, *rest))) or seen[-1][1]
    try:
        with poison({12: math.nan}):
            run = run_here("beit", beit_arguments(world, tmp_path / "run", guard__bad_step="rewind", **LOGGED))
    finally:
        _Loop.next_batch = own
    assert [step for step, _ in seen] == [*range(13), *range(10, 20)]
    plain = run_here("beit", beit_arguments(world, tmp_path / "plain", **LOGGED | {"train__steps": 23}))
    keys = [batch["keys"] for _, batch in seen]
    assert len({str(batch) for batch in keys}) == 23, "no batch comes twice"
    assert newest(run / "checkpoints")[1]["stream"] == newest(plain / "checkpoints")[1]["stream"], "23 batches are read for 20 steps"
    assert [line["step"] for line in lines(run)] == list(range(1, 21))
    assert kinds(run) == [("bad step", 13), ("rewind", 13)]
    (went,) = (line["text"] for line in lines(run, "events.jsonl") if line["kind"] == "rewind")
    assert re.search(r"back to \S+/step-00000010, and on with the data after it \(1 of 3\)", went)


def test_going_back_again_at_once_goes_further_back_and_has_a_budget(world, tmp_path):
    settings = LOGGED | {"guard__bad_step": "rewind", "train__keep": 3}
    with poison({12: math.nan}):
        first = beit_arguments(world, tmp_path / "run", **settings | {"guard__max_rewinds": 0})
        with pytest.raises(MimeticError, match=r"step 13 .*and guard\.max_rewinds 0 used up"):
            run_here("beit", first)
    with poison({2: math.nan}), pytest.raises(MimeticError, match=r"step 3 .*and no checkpoint to go back to"):
        run_here("beit", beit_arguments(world, tmp_path / "early", **settings))
    from mimetic.engine.loop import _Loop

    went = []
    own = _Loop.rewind

    def rewind(self, path, state):
        went.append(state["step"])
        own(self, path, state)
        cures.append(poisoned({self.step: math.nan}) if len(went) == 1 else None)

    cures: list = []
    _Loop.rewind = rewind
    with poison({12: math.nan}):
        try:
            run_here("beit", beit_arguments(world, tmp_path / "twice", **settings))
        finally:
            _Loop.rewind = own
            cures[0]()  # the last poison first
    assert went == [10, 5], "the newest brought it to the bad step again"


def test_a_step_that_is_left_out_leaves_statistics_and_means_alone(world, tmp_path):
    """BatchNorm's are those of the sound steps, the mean of the weights stays, and codes are not restarted."""
    settings = {"backbone__name": "residual_cnn", "guard__bad_step": "skip", "train__log_every": 1, "train__checkpoint_every": 1,
                "train__keep": 50, "train__ema_decay": 0.9, "train__steps": 6}  # fmt: skip
    arguments = classify_arguments(world, tmp_path / "run", **settings)
    place = arguments.index("--backbone.overrides")
    del arguments[place : place + 2]
    with poison({3: math.nan}):
        run = run_here("classify", arguments)
    for file in ("model.safetensors", "optimizer.safetensors"):
        before, after = (load_file(run / f"checkpoints/step-{step:08d}/{file}") for step in (3, 4))
        assert any(name.endswith(("running_mean", ":ema")) for name in before)
        assert not [name for name in before if not torch.equal(before[name], after[name])]
    dvae = dvae_arguments(world, tmp_path / "dvae", guard__bad_step="skip", train__checkpoint_every=1, train__keep=50)
    with poison({8: math.nan}):  # a step after which codes are restarted
        run = run_here("dvae", dvae)
    before, after = (load_file(run / f"checkpoints/step-{step:08d}/model.safetensors") for step in (8, 9))
    assert not [name for name in before if not torch.equal(before[name], after[name])]


# The judgement itself


def test_a_spike_is_measured_by_the_median_of_sound_steps():
    guard = Guard(GuardSettings(spike=4.0), CPU)
    random = torch.Generator().manual_seed(0)
    norms = (torch.rand(REMEMBERED + 20, generator=random) + 0.5).tolist()
    for step, norm in enumerate(norms):
        assert guard.judge(step, torch.tensor(norm), False) == 0
        assert guard.hear().bad is False
    usual = sorted(norms[-REMEMBERED:])[(REMEMBERED - 1) // 2]
    assert guard.judge(100, torch.tensor(3.99 * usual), False) == 0
    assert guard.judge(101, torch.tensor(10 * usual), False) == 1
    guard.hear()
    pulse = guard.hear()
    assert (pulse.step, pulse.bad, pulse.norm) == (101, True, pytest.approx(10 * usual))
    usual = sorted([*norms, 3.99 * usual][-REMEMBERED:])[(REMEMBERED - 1) // 2]
    assert pulse.limit == pytest.approx(4 * usual)
    assert guard.state() == pytest.approx([*norms, 3.99 * sorted(norms[-REMEMBERED:])[(REMEMBERED - 1) // 2]][-REMEMBERED:])


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad_from_the_first_step(norm):
    guard = Guard(GuardSettings(), CPU)
    assert guard.judge(0, torch.tensor(norm), False) == 1
    assert guard.hear().bad


def test_a_resumed_guard_judges_as_the_one_before():
    first, second = Guard(GuardSettings(spike=3.0), CPU), Guard(GuardSettings(spike=3.0), CPU)
    for step in range(30):
        first.judge(step, torch.tensor(1.0 + step % 3), False)
    second.load(first.state())
    for step in range(30, 2 * REMEMBERED):
        norm = torch.tensor(50.0 if step == 120 else 1.0 + step % 3)
        assert first.judge(step, norm, False) == second.judge(step, norm, False) == (step == 120)
    assert first.state() == second.state()


def test_an_accelerator_hears_one_step_later_and_all_before_a_checkpoint():
    guard = Guard(GuardSettings(), CPU, lag=1)
    guard.judge(0, torch.tensor(1.0), False)
    assert guard.hear() is None
    guard.judge(1, torch.tensor(math.nan), True)
    assert guard.hear().step == 0
    assert guard.hear() is None
    pulse = guard.hear(all_of_them=True)
    assert (pulse.step, pulse.bad, pulse.asked) == (1, True, True)
    assert guard.hear(all_of_them=True) is None


def test_a_training_that_hears_later_ends_the_same(world, tmp_path, monkeypatch):
    """As on an accelerator: the bad step is heard of when the next gradient is there, and is still left out."""
    settings = LOGGED | {"guard__bad_step": "skip"}
    ends = []
    for lag in (0, 1):
        monkeypatch.setattr("mimetic.engine.loop.Guard", lambda *given, lag=lag, **_: Guard(*given, lag=lag))
        with poison({7: math.nan}):
            run = run_here("beit", beit_arguments(world, tmp_path / f"lag-{lag}", **settings))
        ends.append(load_file(run / "backbone/model.safetensors"))
        assert kinds(run) == [("bad step", 8), ("skip", 8)]
        assert replay(run / "capsules/step-00000008", None)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bad_step": "ignore"}, "guard.bad_step is 'ignore'; it must be stop, skip or rewind"),
        ({"spike": 0.5}, "guard.spike is 0.5; it must be above 1"),
        ({"max_skips": -1}, "guard.max_skips is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(SettingError, match=re.escape(message)):
        GuardSettings(**settings)
