"""Checkpoints: kept, pruned, written whole or not at all, beside the training; damaged ones are passed over, whatever the damage."""

import contextlib
import io
import math
import random
import re
import shutil
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from poison import poisoned
from tinyruns import as_killed_at, beit_arguments, classify_arguments, dvae_arguments, files_of_at_most, lines, losses, run_here

from mimetic.engine import checkpoints
from mimetic.engine.checkpoints import MANIFEST, MOMENTS, WEIGHTS, Keeper, copies, newest, verify
from mimetic.engine.errors import CheckpointError
from mimetic.engine.loop import _Loop
from mimetic.engine.run import Run

DAMAGES = 300
SAVED = {"train__steps": 6, "train__checkpoint_every": 2, "train__log_every": 1, "train__keep": 3}
FILES = {WEIGHTS: {"weight": torch.arange(100.0)}, MOMENTS: {"weight:exp_avg": torch.ones(100)}}


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    """A run with checkpoints after steps 2, 4 and 6."""
    return run_here("beit", beit_arguments(world, tmp_path_factory.mktemp("runs") / "trained", **SAVED))


def found(folder: Path) -> tuple[str, str]:
    """The name of the newest checkpoint, and what was said on the way to it."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        path, state = newest(folder)
    assert state["step"] == int(path.name[-8:])
    return path.name, said.getvalue()


def saved(folder: Path, *steps: int, keep: int = 2) -> Keeper:
    keeper = Keeper(folder, keep)
    for step in steps:
        keeper.save(step, FILES, {"step": step})
    keeper.wait()
    return keeper


def names(folder: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in folder.glob("step-*"))


class Gone(BaseException):
    """The process ends here."""


# Damage


def flip(file: Path, dice: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def cut(file: Path, dice: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: dice.randrange(file.stat().st_size)])


def lose_a_block(file: Path, dice: random.Random) -> None:
    content = bytearray(file.read_bytes())
    start, length = dice.randrange(len(content)), dice.randint(1, 4096)
    content[start : start + length] = bytes(255 - byte for byte in content[start : start + length])
    file.write_bytes(content)


def grow(file: Path, dice: random.Random) -> None:
    with file.open("ab") as end:
        end.write(dice.randbytes(dice.randint(1, 100)))


def become_a_folder(file: Path, dice: random.Random) -> None:
    file.unlink()
    file.mkdir()


def become_unreadable(file: Path, dice: random.Random) -> None:
    """Reading it is an input/output error."""
    file.unlink()
    file.symlink_to("/proc/self/mem")


WAYS: list[Callable[[Path, random.Random], None]] = [
    flip, flip, flip, cut, cut, lose_a_block, grow, lambda file, _: file.write_bytes(b""), lambda file, _: file.unlink(),
    become_a_folder, become_unreadable,
]  # fmt: skip


def test_no_damaged_checkpoint_is_ever_taken(trained, tmp_path):
    dice = random.Random(0)
    for number in range(DAMAGES):
        folder = shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints", symlinks=True)
        damaged = ["step-00000006", "step-00000004"][: dice.randint(1, 2)]
        files = [folder / name / dice.choice([MANIFEST, MANIFEST, WEIGHTS, MOMENTS]) for name in damaged]
        for file in files:
            before, way = file.read_bytes(), dice.choice(WAYS)
            way(file, dice)
            told = f"damage {number}, {way.__name__} of {file}: "
            assert not file.is_file() or way is become_unreadable or file.read_bytes() != before, told
        name, said = found(folder)
        assert name == ("step-00000004" if len(damaged) == 1 else "step-00000002"), told
        for file in files:
            assert re.search(rf"passing over a damaged checkpoint: {file.parent}\b.*{file.name} ", said), told + said
        assert said.count("\n") == len(damaged), told + said
        shutil.rmtree(folder)


def test_every_byte_of_a_manifest_counts(tmp_path):
    """Every bit of every byte: no flip may go unnoticed, not even one that changes no value, such as 1e-05 to 1E-05."""
    Keeper(tmp_path, 2)._write(7, FILES, {"step": 7, "lr": 1e-05, "name": "é"}, None)
    file = tmp_path / "step-00000007" / MANIFEST
    sound = file.read_bytes()
    for place in range(8 * len(sound)):
        content = bytearray(sound)
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=MANIFEST):
            verify(file.parent)
    file.write_bytes(sound)
    assert verify(file.parent)["step"] == 7


@pytest.mark.parametrize("link", ["last", "best"])
def test_links_that_lead_nowhere_hide_no_checkpoint(link, tmp_path):
    keeper = saved(tmp_path, 1, 2)
    keeper.mark_best(1)
    (tmp_path / link).unlink()
    (tmp_path / link).symlink_to("step-00000099")
    assert found(tmp_path) == ("step-00000002", "")
    saved(tmp_path, 3)
    assert (tmp_path / "last").readlink() == Path("step-00000003")
    assert verify(tmp_path / "last")["step"] == 3


@pytest.mark.parametrize("damage", [flip, cut, become_unreadable])
@pytest.mark.parametrize("file", [MANIFEST, WEIGHTS, MOMENTS])
def test_a_run_goes_on_from_the_checkpoint_before_to_the_same_bits(damage, file, trained, world, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    (run / "finished.json").unlink()
    shutil.rmtree(run / "backbone")
    damage(run / "checkpoints/last" / file, random.Random(1))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run_here("beit", beit_arguments(world, run, **SAVED))
    assert said.getvalue().count("passing over a damaged checkpoint: ") == 1
    assert "going on after step 4\n" in said.getvalue()
    for name in (f"checkpoints/last/{WEIGHTS}", f"checkpoints/last/{MOMENTS}", "backbone/model.safetensors"):
        assert (run / name).read_bytes() == (trained / name).read_bytes()
    assert [line["step"] for line in lines(run)] == list(range(1, 7))
    assert losses(run) == losses(trained)
    assert verify(run / "checkpoints/last")["step"] == 6


# Going on


@pytest.mark.parametrize("kind", ["beit", "classify", "dvae"])
def test_every_kind_of_training_goes_on_to_the_same_bits(kind, world, tmp_path):
    """Moments of weights that lie in memory with their channels last too."""
    arguments = {"beit": beit_arguments, "classify": classify_arguments, "dvae": dvae_arguments}[kind]
    settings = SAVED | {"train__ema_decay": 0.9}
    whole = run_here(kind, arguments(world, tmp_path / "whole", **settings))
    run = as_killed_at(2, whole, tmp_path / "run")
    run_here(kind, arguments(world, run, **settings))
    for name in (WEIGHTS, MOMENTS):
        assert (run / "checkpoints/last" / name).read_bytes() == (whole / "checkpoints/last" / name).read_bytes()
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("moment", ["Run.metrics", "Run.record", "Keeper.mark_best"])
def test_an_evaluation_that_a_kill_met_is_done_again_and_told_once(moment, world, tmp_path, monkeypatch):
    settings = SAVED | {"train__evaluate_every": 3}
    whole = run_here("classify", classify_arguments(world, tmp_path / "whole", **settings))
    arguments = classify_arguments(world, tmp_path / "run", **settings)
    kind, method = {"Run": Run, "Keeper": Keeper}[moment.partition(".")[0]], moment.partition(".")[2]
    own, best = getattr(kind, method), verify(whole / "checkpoints/best")["step"]

    def kill(self, *given):
        if method == "record" or (best in given and (method == "mark_best" or "test_accuracy" in given[1])):
            raise Gone
        own(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(kind, method, kill)
        with pytest.raises(Gone):
            run_here("classify", arguments)
    run = run_here("classify", arguments)
    for name in ("metrics.jsonl", "records.jsonl"):
        ours, theirs = ([(line["step"], line.get("loss"), line.get("value"), line.get("test_accuracy")) for line in lines(folder, name)]
                        for folder in (run, whole))  # fmt: skip
        assert ours == theirs
    assert (run / "checkpoints/best").readlink() == (whole / "checkpoints/best").readlink()


def test_a_kill_after_going_back_twice_takes_no_checkpoint_from_before(world, tmp_path, monkeypatch):
    """The second time it goes further back; the checkpoint in between is of steps that were undone."""
    settings = SAVED | {"train__steps": 14, "train__checkpoint_every": 5, "guard__bad_step": "rewind"}
    arguments, rewind, cures = beit_arguments(world, tmp_path / "run", **settings), _Loop.rewind, [poisoned({12: math.nan})]

    def again(self: _Loop, path: Path, state: dict) -> None:
        rewind(self, path, state)
        cures.append(poisoned({self.step: math.nan} if self.step == 10 else {}))

    def kill(self: _Loop, number: int) -> float:
        if len(cures) == 3 and number == 7:
            raise Gone
        return rate(self, number)

    rate = _Loop.rate
    with monkeypatch.context() as patched:
        patched.setattr(_Loop, "rewind", again)
        patched.setattr(_Loop, "rate", kill)
        with pytest.raises(Gone):
            run_here("beit", arguments)
    for cure in reversed(cures):
        cure()
    assert len(losses(tmp_path / "run")) == 7
    assert found(tmp_path / "run/checkpoints") == ("step-00000006", "")
    run_here("beit", arguments)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 15))


# Keeping


def test_the_newest_and_the_best_are_kept(tmp_path):
    keeper = Keeper(tmp_path, keep=2)
    for step, best, kept in [(1, 0, [1]), (2, 2, [1, 2]), (3, 0, [1, 2, 3]), (4, 0, [2, 3, 4]), (5, 5, [2, 4, 5]), (6, 0, [4, 5, 6]),
                             (7, 0, [5, 6, 7]), (8, 0, [5, 7, 8])]:  # fmt: skip
        keeper.save(step, FILES, {"step": step})
        if best:
            keeper.mark_best(best)
        keeper.wait()
        assert names(tmp_path) == kept, step
        assert verify(tmp_path / "last")["step"] == step
    assert verify(tmp_path / "best")["step"] == 5
    keeper.mark_best(6)
    assert verify(tmp_path / "best")["step"] == 5, "what is no longer there is not pointed at"


def test_copies_are_whole_and_the_keepers_own():
    weight = torch.arange(6.0).view(2, 3).T.requires_grad_()
    kept = copies([("weight", weight)], kept=True)["weight"]
    with torch.no_grad():
        weight += 1
    assert kept.is_contiguous()
    assert torch.equal(kept, weight - 1)
    assert copies([("weight", weight)], kept=False) == {}


# Written whole or not at all


@contextlib.contextmanager
def gone_before_line(number: int) -> Iterator[None]:
    """Ends what goes on in engine/checkpoints.py before its so-manieth line."""
    passed = 0

    def trace(frame, event, _):
        nonlocal passed
        if frame.f_code.co_filename != checkpoints.__file__:
            return None
        if event == "line":
            passed += 1
            if passed == number:
                raise Gone
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # files that it had open
def test_a_process_that_ends_at_any_line_of_a_save_loses_nothing(tmp_path):
    ends = []
    for number in range(1, 1000):
        folder = tmp_path / str(number)
        saved(folder, 1, 2)
        try:
            with gone_before_line(number):
                Keeper(folder, 2)._write(3, FILES, {"step": 3}, None)
        except Gone:
            name, said = found(folder)
            ends.append(name)
            assert said == "", "half a checkpoint has no name"
            assert name in ("step-00000002", "step-00000003")
            saved(folder, 3)
            assert found(folder) == ("step-00000003", "")
            assert names(folder) == [2, 3]
            assert not list(folder.glob(".step-*"))
        else:
            break
    assert ends.count("step-00000002") > 20
    assert ends.count("step-00000003") > 10
    assert ends == sorted(ends)


@pytest.mark.parametrize("failing", ["_write_tensors", "write_atomically", "_point", "_digest"])
def test_an_error_in_the_middle_of_a_save_leaves_the_earlier_ones_and_is_raised(failing, tmp_path, monkeypatch):
    keeper = saved(tmp_path, 1, 2)

    def fail(*_):
        raise ValueError("no such luck")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, failing, fail)
        keeper.save(3, FILES, {"step": 3})
        with pytest.raises(ValueError, match="no such luck"):
            keeper.wait()
        keeper.wait()  # once
    assert keeper.failure is None
    assert {1, 2} <= set(names(tmp_path))
    assert not list(tmp_path.glob(".step-*"))
    keeper.save(4, FILES, {"step": 4})
    keeper.wait()
    assert found(tmp_path) == ("step-00000004", "")


@contextlib.contextmanager
def disk_with(free: int) -> Iterator[None]:
    usage = namedtuple("usage", "total used free")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoints.shutil, "disk_usage", lambda _: usage(1 << 30, (1 << 30) - free, free))
        yield


@pytest.mark.parametrize("full", [files_of_at_most(300), disk_with(free=1 << 16)], ids=["a write fails", "too little is free"])
def test_a_full_disk_is_told_and_leaves_the_earlier_checkpoint(full, tmp_path):
    called: list[int] = []
    keeper = saved(tmp_path, 1, 2)
    with full:
        keeper.save(3, FILES, {"step": 3}, then=lambda: called.append(3))
        keeper.wait()
    assert re.match(rf"{tmp_path}/step-00000003 cannot be written, the disk is full \(\d+ MiB free\)", keeper.failure)
    assert found(tmp_path) == ("step-00000002", "")
    assert names(tmp_path) == [1, 2]
    assert not list(tmp_path.glob(".step-*"))
    assert (tmp_path / "last").readlink() == Path("step-00000002")
    keeper.save(4, FILES, {"step": 4}, then=lambda: called.append(4))
    keeper.wait()
    assert keeper.failure is None
    assert called == [4]
    assert found(tmp_path) == ("step-00000004", "")


def test_training_goes_on_while_a_checkpoint_is_written(trained, world, tmp_path, monkeypatch):
    """The one of step 2 is not written before step 4 has been taken; it holds the weights of step 2 all the same."""
    run, write, waited = tmp_path / "run", checkpoints._write_tensors, []

    def slow(path: Path, tensors: checkpoints.Tensors) -> str:
        if path.parent.name == ".step-00000002":
            limit = time.monotonic() + 20
            while len(losses(run)) < 4 and time.monotonic() < limit:
                time.sleep(0.005)
            waited.append(len(losses(run)))
        return write(path, tensors)

    monkeypatch.setattr(checkpoints, "_write_tensors", slow)
    run_here("beit", beit_arguments(world, run, **SAVED))
    assert waited == [4, 4], "step 4's own checkpoint waits for this one"
    for step in (2, 4, 6):
        for name in (WEIGHTS, MOMENTS):
            ours, theirs = (folder / f"checkpoints/step-{step:08d}" / name for folder in (run, trained))
            assert ours.read_bytes() == theirs.read_bytes()
