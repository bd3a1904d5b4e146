"""`mimetic watch`: a run read while it is written, near and far, and frames as wide as the terminal."""

import contextlib
import fcntl
import io
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import struct
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from faulty_server import serving
from rich.cells import cell_len
from rich.console import Console
from tinyruns import beit_arguments, finish, run_here, start

from mimetic.engine.errors import DataError, SettingError
from mimetic.engine.words import duration
from mimetic.report import follow
from mimetic.report.follow import Followed
from mimetic.report.watch import Frame, watch
from mimetic.report.wording import short

PLAN = {"steps": 1000, "samples_per_step": 32, "steps_per_epoch": 250, "processes": 2, "engine": "DDP", "device": "cpu",
        "precision": "fp32", "title": "BEiT of a net"}  # fmt: skip


def line(step: int, **values: Any) -> dict[str, Any]:
    """A line of metrics: 0.5 s a step, 64 images/s, a loss that is 9 minus a thousandth of the step."""
    return {"step": step, "loss": 9 - step / 1000, "masked_accuracy": step / 10_000, "learning_rate": 1.5e-3, "grad_norm": 0.5,
            "images_per_second": 64.0, "data_wait": 0.031, "samples": step * 32, "seconds": step / 2} | values  # fmt: skip


def write(run: Path, *lines: dict[str, Any], cut: str = "", **files: Any) -> Path:
    """A run folder; `files` are further ones, `plan={...}` plan.json, `events=[...]` events.jsonl."""
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines) + cut)
    for name, content in files.items():
        if isinstance(content, list):
            (run / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in content))
        else:
            (run / f"{name}.{'yaml' if name == 'config' else 'json'}").write_text(json.dumps(content))
    return run


def event(kind: str, step: int = 0, text: str = "") -> dict[str, Any]:
    return {"time": "2026-11-27T08:00:00", "step": step, "kind": kind, "text": text}


def look(run: str | Path) -> Followed:
    followed = Followed(str(run))
    followed.look()
    return followed


def drawn(followed: Followed, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(Frame(followed))
    return console.file.getvalue()  # type: ignore[attr-defined]


def braille(frame: str) -> list[str]:
    """The rows of the first curve of a narrow frame, what was not drawn as spaces."""
    rows = [row.split("┤" if "┤" in row else "│", 1)[1] for row in frame.splitlines() if "┤" in row or "│" in row]
    return [row.replace("\u2800", " ") for row in rows[:6]]


# What is read


def test_a_last_line_that_is_cut_off_waits_for_its_end(tmp_path):
    whole = json.dumps(line(2))
    for cut in (whole[:1], whole[:-1], whole):  # without its line break, a number at its end may be half of one
        followed = look(write(tmp_path / "run", line(1), cut=cut))
        assert [each["step"] for each in followed.logs] == [1]
        write(tmp_path / "run", line(1), cut=whole + "\n")
        followed.look()
        assert [each["step"] for each in followed.logs] == [1, 2]


def test_lines_that_are_damaged_or_say_nothing_are_left_out(tmp_path):
    damaged = '\x00\x00\x00\n[1, 2]\n{"loss": 1.0}\n{"step": "x", "loss": 1}\n'
    run = write(tmp_path / "run", line(1), cut=damaged + json.dumps(line(2)) + "\n")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe{\n")
    followed = look(run)
    assert [each["step"] for each in followed.logs] == [1, 2]
    assert "step 2 ·" in drawn(followed)


def test_only_what_is_new_is_read(tmp_path, monkeypatch):
    run = write(tmp_path / "run", *map(line, range(1, 1001)))
    parsed = []
    monkeypatch.setattr(follow, "_parsed", lambda text: parsed.append(text) or json.loads(text))
    followed = look(run)
    assert len(parsed) == len(followed.column("loss")) == 1000
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line(1001)) + "\n")
    followed.look()
    followed.look()
    assert len(parsed) == len(followed.column("loss")) == 1001
    assert followed.step == 1001


@pytest.mark.parametrize("after", [[1, 2, 3, 4], [1, 2, 3], [1, 2], []])
def test_a_run_that_goes_on_drops_what_a_kill_undid(after, tmp_path):
    run = write(tmp_path / "run", *(line(step) for step in (1, 2, 3, 4)))
    followed = look(run)
    write(run, *(line(step, loss=5.0) for step in after))
    followed.look()
    assert [(each["step"], each["loss"]) for each in followed.logs] == [(step, 5.0) for step in after]


def test_what_a_rewind_undid_is_left_out(tmp_path):
    followed = look(write(tmp_path / "run", line(1), line(2), {"step": 3, "test_accuracy": 0.1, "samples": 96}, line(3), line(2, loss=4.0)))
    assert [(each["step"], each["loss"]) for each in followed.logs] == [(1, line(1)["loss"]), (2, line(2)["loss"]), (2, 4.0)]
    assert followed.measured == []


def test_a_missing_run_is_one_line_with_the_cure(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("nowhere", "empty", "file"):
        with pytest.raises(DataError, match=rf"{name} holds no metrics\.jsonl; give a run folder, what a training was given as --out$"):
            look(tmp_path / name)
    with pytest.raises(SettingError, match=r"--every is 0; it must be above 0"):
        watch(str(tmp_path), once=False, every=0)


def test_a_run_before_its_first_line_is_waited_for(tmp_path):
    run = write(tmp_path / "run", plan=PLAN)
    (run / "metrics.jsonl").unlink()
    followed = look(run)
    assert "BEiT of a net" in drawn(followed)
    assert "no line of metrics yet" in drawn(followed)
    write(run, line(1))
    followed.look()
    assert "step 1 of 1,000" in drawn(followed)


@pytest.mark.parametrize("damaged", ["plan.json", "config.yaml", "events.jsonl", "records.jsonl"])
def test_small_files_may_be_half_written(damaged, tmp_path):
    run = write(tmp_path / "run", line(10), plan=PLAN)
    for content in (b"", b"{", b"[1]", b"\xff\xfe\x00", b'{"steps": '):
        (run / damaged).write_bytes(content)
        assert "step 10" in drawn(look(run))


def test_a_plan_that_is_being_replaced_does_not_lose_the_one_before(tmp_path):
    run = write(tmp_path / "run", line(10), plan=PLAN)
    followed = look(run)
    (run / "plan.json").write_text('{"steps": 20')
    followed.look()
    assert followed.steps == 1000


# From elsewhere


def test_over_http_only_the_new_lines_are_fetched(tmp_path):
    run = write(tmp_path / "run", *map(line, range(1, 301)), plan=PLAN, events=[event("start")])
    with serving(tmp_path) as server, contextlib.closing(Followed(f"{server.address}/run")) as followed:
        followed.look()
        assert followed.step == 300
        assert followed.state(time.time())[0] == "unknown", "it may have been dead for a week"
        assert "● no end so far" in drawn(followed)
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line(301)) + "\n")
        followed.look()
        followed.look()
        assert followed.step == 301
        assert followed.logs == [line(step) for step in range(1, 302)]
        assert followed.state(time.time())[0] == "running"
        assert followed.state(time.time() + 100)[0] == "quiet"
        assert (server.asked["run/metrics.jsonl"], server.again["run/metrics.jsonl"]) == (1, 2)
        write(run, line(1), line(2), line(3, loss=1.0))  # gone on with after a kill: shorter than what is here
        followed.look()
        assert followed.logs == [line(1), line(2), line(3, loss=1.0)]
        assert "step 3 of 1,000" in drawn(followed)
        spool = Path(followed.place._spool.name)
        assert spool.exists()
    assert not spool.exists(), "nothing is left behind"


def test_a_server_that_cannot_begin_in_the_middle_serves_too(tmp_path):
    run = write(tmp_path / "run", line(1), line(2))
    with serving(tmp_path) as server, contextlib.closing(Followed(f"{server.address}/run")) as followed:
        server.ranges = False
        followed.look()
        write(run, line(1), line(2), line(3))
        followed.look()
        assert followed.logs == [line(1), line(2), line(3)]


def test_a_run_in_an_object_store_is_read_too(tmp_path):
    import fsspec

    store, path = fsspec.filesystem("memory"), "/watched/metrics.jsonl"
    with contextlib.closing(Followed("memory://watched")) as followed:
        for steps in ([1, 2], [1, 2, 3], [1, 2, 3], [1], [1, 5]):  # grows, stays, is gone on with, grows
            store.pipe_file(path, "".join(json.dumps(line(step)) + "\n" for step in steps).encode())
            followed.look()
            assert followed.logs == [line(step) for step in steps]


def test_an_address_may_need_a_query_which_is_not_shown(tmp_path):
    write(tmp_path / "run", line(1))
    with serving(tmp_path) as server, contextlib.closing(Followed(f"{server.address}/run?key=secret")) as followed:
        server.query = "key=secret"
        followed.look()
        frame = drawn(followed)
        assert followed.title == "run"
        assert f"{server.address}/run" in frame
        assert "secret" not in frame


def test_a_run_that_cannot_be_reached_for_a_while_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "PATIENCE", 0.0)
    run = write(tmp_path / "run", line(1), plan=PLAN)
    with serving(tmp_path) as server, contextlib.closing(Followed(f"{server.address}/run")) as followed:
        followed.look()
        server.faults = ["500"] * 20
        followed.look()
        assert "step 1 of 1,000" in drawn(followed)
        assert re.search(r"not reached now: http://.*metrics\.jsonl cannot be fetched: no byte for 0 s", drawn(followed, 200))
        server.faults = []
        write(run, line(1), line(2))
        followed.look()
        assert "not reached" not in drawn(followed)
        assert followed.step == 2


def test_a_run_that_is_missing_elsewhere_is_one_line_with_the_cure(tmp_path):
    told = r"nowhere/metrics\.jsonl: the answer is 404 Not Found; give the address of a run folder, what a training was given as --out$"
    with serving(tmp_path) as server, contextlib.closing(Followed(f"{server.address}/nowhere")) as followed:
        with pytest.raises(DataError, match=told):
            followed.look()
        write(tmp_path / "nowhere", line(1))
        followed.look()
        assert followed.step == 1


# What is told


def test_a_run_that_goes_on_says_how_long_and_when_it_ends(tmp_path):
    run = write(tmp_path / "run", *(line(step) for step in range(100, 401, 100)), plan=PLAN, events=[event("start")])
    os.utime(run / "metrics.jsonl", (1e9, 1e9))
    os.utime(run / "events.jsonl", (1e9, 1e9))
    followed = look(run)
    assert followed.left == pytest.approx(300)
    assert followed.ends(1e9 + 40) == pytest.approx(1e9 + 300, abs=1), "from when the last line came"
    assert followed.state(1e9 + 40) == ("running", "")
    os.utime(run / "metrics.jsonl")
    frame = drawn(look(run))
    assert "● running" in frame
    assert "step 400 of 1,000 · 12.8 k images · epoch 1.6 of 4.0 · 5 min left, ends " in frame
    assert re.search(r"━ +40 %", frame)
    assert "● running  2 processes · DDP · cpu · fp32 · /" in frame


def test_the_pace_is_the_present_one(tmp_path):
    slow = [line(step, seconds=step * 10.0) for step in range(1, 101)]
    fast = [line(step, seconds=1000 + step - 100) for step in range(101, 201)]
    assert look(write(tmp_path / "run", *slow, *fast, plan=PLAN)).left == pytest.approx(800)
    assert look(write(tmp_path / "run", line(4, seconds=8.0), plan=PLAN)).left == pytest.approx(2 * 996)


def test_without_a_plan_the_recipe_tells_the_length_or_nothing_does(tmp_path):
    run = write(tmp_path / "run", line(10), config={"train": {"steps": 50, "samples": None}})
    assert look(run).steps == 50
    assert "step 10 of 50" in drawn(look(run))
    assert look(write(run, line(10), config={"train": {"steps": None, "samples": 3200}})).steps == 100
    followed = look(write(run, line(10), config={"train": {"steps": None, "samples": None, "epochs": 3.0}}))
    assert followed.steps == 0
    assert math.isnan(followed.left)
    frame = drawn(followed)
    assert "step 10 · 320 images\n" in frame
    assert "left" not in frame
    assert "%" not in frame.split("step 10")[0]


def test_texts_are_one_line_whatever_they_hold(tmp_path):
    title = "one\ntwo \U0001f600 [bold]three[/bold]"
    run = write(tmp_path / "run", line(1), plan=PLAN | {"title": title}, events=[event("stop", 1, "four\n\nfive [/x]")])
    rows = drawn(look(run)).splitlines()
    assert rows[0] == "one two \U0001f600 [bold]three[/bold]"
    assert rows[1].startswith("■ stopped: four five [/x]  ")
    assert rows[-1] == "11-27 08:00  step 1  stop: four five [/x]"


def test_silence_is_told_by_what_is_usual_for_the_run(tmp_path):
    run = write(tmp_path / "run", *(line(step) for step in (100, 200, 300)), plan=PLAN)  # 50 s between lines
    os.utime(run / "metrics.jsonl", (1e9, 1e9))
    followed = look(run)
    assert followed.state(1e9 + 149) == ("running", "")
    assert followed.state(1e9 + 151) == ("quiet", "")
    assert "● no news for " in drawn(followed)
    assert re.search(r" of training left\n", drawn(followed)), "no end can be told"
    quick = write(tmp_path / "quick", line(1), line(2))
    os.utime(quick / "metrics.jsonl", (1e9, 1e9))
    assert look(quick).state(1e9 + 59)[0] == "running", "half a second is usual, a checkpoint may take longer"
    assert look(quick).silence(1e9 + 61) == pytest.approx(61)


def test_events_tell_how_it_ended(tmp_path):
    events = [event("start"), event("checkpoint", 5), event("stop", 10, "the loss is nan")]
    run = write(tmp_path / "run", line(10), plan=PLAN, events=events)
    frame = drawn(look(run))
    assert "■ stopped: the loss is nan" in frame
    assert re.search(r"last checkpoint +step 5\b", frame)
    assert "11-27 08:00  step 10  stop: the loss is nan\n" in frame
    assert "checkpoint\n" not in frame, "the last checkpoint is told once"
    events = [event("start"), event("signal", 10, "SIGTERM")]
    assert look(write(run, line(10), events=events)).state(time.time()) == ("stopped", "SIGTERM")
    assert look(write(run, line(10), events=[*events, event("start", 10)])).state(time.time()) == ("running", "")
    assert "✔ finished" in drawn(look(write(run, line(1000), events=[*events, event("start"), event("finished", 1000)])))
    assert "took 8 min 20 s" in drawn(look(run))


def test_a_finished_run_of_before_is_known_by_its_mark_until_it_starts_again(tmp_path):
    run = write(tmp_path / "run", line(10), finished={"recipe": ""})
    assert look(run).state(time.time())[0] == "finished"
    assert look(write(run, line(10), events=[event("start")])).state(time.time())[0] == "running"


def test_what_is_known_is_told_and_nothing_else(tmp_path):
    new = {"macs_per_second": 1.25e12, "matrix_share": 0.41, "predicted_codes_used": 812.0, "predicted_codes_perplexity": 301.25,
           "update_ratio": 1.5e-3, "activation_rms": 0.75, "bad_samples": 3, "skipped_steps": 2, "rewinds": 0}  # fmt: skip
    records = [{"metric": "masked_accuracy", "value": 0.1, "details": {"vocab_size": 8192}}]
    measured = {"step": 20, "masked_accuracy": 0.25, "codes_used": 1.0, "samples": 640, "seconds": 10.0}
    run = write(tmp_path / "run", line(10), line(20, images_per_second=96.0, **new), measured, records=records)
    frame = " ".join(drawn(look(run), 140).split())
    for told in ("images/s 96 ",
                 "median images/s 80 ", "data wait 3.1 % ", "multiply-adds/s 1.25 T ", "of matrix rate 41.0 % ",
                 "learning rate 0.0015 ", "gradient norm 0.5 ", "codes used 812 of 8,192 ",
                 "code perplexity 301.2 ", "bad samples 3 ",
                 "skipped steps 2 ", "update ratio 0.0015 ", "activation rms 0.75 ",
                 "held out: masked accuracy 0.25, codes used 100.0 % (step 20) "):  # fmt: skip
        assert told in frame, told
    assert "rewinds" not in frame
    assert "published" not in frame
    old = " ".join(drawn(look(write(tmp_path / "old", line(10))), 140).split())
    assert "bad samples 0 " in old
    assert not re.search("multiply|matrix|codes|skipped|checkpoint|nan", old)
    dvae = write(tmp_path / "dvae", line(1, **new), config={"dvae": {"vocab_size": 16}})
    assert "codes used 812 of 16 " in " ".join(drawn(look(dvae)).split())


EXPECTED = {"source": "unilm#383", "loss": {"3200": 8.75, "16000": 8.0}, "masked_accuracy": {"16000": 0.049}}


def test_what_was_published_is_compared_at_the_same_number_of_images_only(tmp_path):
    run = write(tmp_path / "run", *(line(step) for step in range(10, 91, 10)), config={"expected": EXPECTED})
    frame = drawn(look(run), 140)
    assert "published after 3,200 images (unilm#383): loss 8.75\n" in frame
    assert "published after 16 k images (unilm#383): masked accuracy 0.049\n" in frame
    assert "here" not in frame
    assert "◆" not in frame
    for step, there in ((95, "8.905"), (80, "8.88")):  # 100 is asked for; 95 is nearer than 120, 80 is as near
        frame = drawn(look(write(run, line(10), line(step), line(120), line(140))), 140)
        assert f"published after 3,200 images (unilm#383): loss 8.75, here {there}\n" in frame
    assert frame.count("◆") == 2, "in the legend and where it belongs"
    frame = drawn(look(write(run, *(line(step) for step in range(10, 601, 10)))), 140)
    assert "published after 16 k images (unilm#383): loss 8, here 8.5; masked accuracy 0.049, here 0.05\n" in frame
    assert frame.count("◆") == 2 + 3


@pytest.mark.parametrize("expected", [None, 3, [], {"loss": 3}, {"loss": {"many": 6.0}}, {"loss": {"3200": None}}, {"loss": {}}])
def test_an_expected_curve_that_is_none_is_no_matter(expected, tmp_path):
    assert "published" not in drawn(look(write(tmp_path / "run", line(10), config={"expected": expected})))


# Curves


def test_a_curve_goes_where_its_values_go(tmp_path):
    run = write(tmp_path / "run", *({"step": step, "loss": 9 - step, "samples": step} for step in range(1, 9)))
    rows = braille(drawn(look(run), 60))
    begins = [next(place for place, sign in enumerate(row) if sign != " ") for row in rows]
    assert begins == sorted(begins), "a loss that falls is drawn from the upper left"
    assert begins[0] == 0
    assert rows[0].rstrip() != rows[0]
    assert rows[-1].rstrip(" ") == rows[-1], "to the lower right"
    assert re.search(r"\n +8 ┤", drawn(look(run), 60))
    assert re.search(r"\n +1 ┤", drawn(look(run), 60))


def test_values_that_are_no_numbers_leave_gaps_and_are_named(tmp_path):
    bad = {20: math.nan, 21: math.inf, 22: -math.inf, 23: None, 24: "x"}
    run = write(tmp_path / "run", *({"step": s, "loss": bad.get(s, 1.0 + s % 2), "samples": s} for s in range(1, 61)))
    frame = drawn(look(run), 60)
    columns = ["".join(column).strip() for column in zip(*braille(frame), strict=True)]
    gap = [place for place, column in enumerate(columns) if not column]
    assert gap == [16, 17, 18, 19], "from step 19 (dot 18 / 59 of 101) to step 25; two dots a column"
    assert re.search(r"\n +2 ┤", frame), "infinity is no end of the axis"
    write(run, {"step": 1, "loss": 1.0, "samples": 1}, {"step": 2, "loss": math.nan, "samples": 2})
    assert re.search(r"\nloss  nan +\n", drawn(look(run), 60))
    write(run, {"step": 1, "loss": math.nan, "samples": 1})
    assert "loss  nan" in drawn(look(run), 60)


def test_one_spike_does_not_flatten_a_curve_and_is_still_seen(tmp_path):
    lines = [{"step": s, "loss": 1e6 if s == 500 else s / 1000, "samples": s} for s in range(1, 1001)]
    frame = drawn(look(write(tmp_path / "run", *lines)), 60)
    rows = braille(frame)
    top = float(re.search(r">([\d.]+) ┤", frame)[1])
    assert top < 5
    assert len(rows[0].strip()) in (1, 2), "the spike reaches the top"
    assert sum(bool(row.strip()) for row in rows) == 6
    assert ">" not in drawn(look(write(tmp_path / "calm", *lines[:400])), 60)


def test_a_stroke_goes_from_the_least_to_the_largest(tmp_path):
    lines = [{"step": s, "loss": s % 2, "samples": s} for s in range(1, 1001)]
    rows = braille(drawn(look(write(tmp_path / "run", *lines)), 60))
    assert not any(" " in row for row in rows), "two values in turn fill the whole height"


def test_held_out_values_are_marked_on_the_curve_of_the_same_name(tmp_path):
    measured = {"step": 50, "masked_accuracy": 0.005, "samples": 1600, "seconds": 25.0}
    run = write(tmp_path / "run", *map(line, range(10, 51, 10)), measured, *map(line, range(60, 101, 10)))
    frame = drawn(look(run), 80)
    assert re.search(r"masked accuracy  0\.01  ● held out", frame)
    assert frame.count("●") == 3, "the state, the legend, the mark"
    assert not re.search(r"loss  8\.9  ●", frame)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_lines_are_drawn_too(count, tmp_path):
    frame = drawn(look(write(tmp_path / "run", *map(line, range(1, count + 1)))), 60)
    assert "\u2800" in frame
    assert any(row.strip() for row in braille(frame))


def test_a_run_has_curves_of_its_own_metrics(tmp_path):
    lines = [{"step": s, "loss": 1.0, "reconstruction": 0.5, "train_accuracy": 0.1, "grad_norm": 1.0, "samples": s} for s in (1, 2)]
    frame = drawn(look(write(tmp_path / "run", *lines)), 60)
    named = re.findall(r"^(\w[\w ]*?)  \S+ *$", frame, re.MULTILINE)
    assert named == ["loss", "reconstruction", "train accuracy", "gradient norm"]


@pytest.mark.parametrize("width", [40, 60, 80, 140, 200])
def test_a_frame_is_as_wide_as_the_terminal(width, tmp_path):
    lines = [line(step, learning_rate=0.00149912, grad_norm=-0.000250312) for step in range(1, 200)]
    run = write(tmp_path / "run", *lines, {"step": 199, "masked_accuracy": 0.01, "samples": 6368, "seconds": 99.0},
                plan=PLAN | {"title": "a long title " * 12}, config={"expected": EXPECTED},
                events=[event("start"), event("bad step", 3, "many words " * 30)])  # fmt: skip
    rows = drawn(look(run), width).splitlines()
    assert max(map(cell_len, rows)) <= width
    assert max(cell_len(row.rstrip()) for row in rows if "┤" in row) > width - 8, "curves fill it"
    assert {row.index(axis) for row in rows for axis in "┤│" if axis in row} == {8}, "whatever the numbers beside it"
    curves = [row.count("┤") for row in rows if "┤" in row]
    assert max(curves) == max(1, (width + 2) // 40)
    assert sum(curves) == 2 * 5, "loss, masked accuracy, gradient norm, learning rate, images/s"


@pytest.mark.parametrize(
    ("height", "curves", "highest", "events"),
    [(12, 0, 0, True), (15, 0, 0, True), (16, 1, 3, False), (20, 1, 5, True), (40, 4, 4, True), (57, 5, 6, True), (100, 5, 10, True)],
)
def test_a_screen_is_filled_and_not_more(height, curves, highest, events, tmp_path):
    run = write(tmp_path / "run", *map(line, range(1, 101)), plan=PLAN, events=[event("start", 1, "two processes")])
    console = Console(file=io.StringIO(), width=60, height=height, force_terminal=True, color_system=None)
    console.set_alt_screen()
    console.print(Frame(look(run)))
    rows = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(rows) <= height
    assert sum("┤" in row for row in rows) == 2 * curves
    assert max(len(part) for part in "".join("│" if "│" in row or "┤" in row else " " for row in rows).split(" ")) == highest
    assert ("two processes" in rows[-1]) == events, "a curve tells more"


def test_a_hundred_thousand_lines_are_fast(tmp_path):
    run = write(tmp_path / "run", *map(line, range(1, 100_001)), plan=PLAN | {"steps": 200_000})
    began = time.process_time()
    followed = look(run)
    drawn(followed)
    first = time.process_time() - began
    followed.look()
    assert "step 100,000 of 200,000" in drawn(followed)
    began = time.process_time()
    drawn(followed)
    again = time.process_time() - began
    assert first < 10, "1.2 s here"
    assert again < 1.5, "0.1 s here, and each second"


# The command


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    """A real one of 40 steps that was gone on with after step 20."""
    folder = tmp_path_factory.mktemp("runs") / "beit"
    changes = {"train__steps": 40, "train__checkpoint_every": 20, "train__log_every": 5, "evaluate_on": world / "held-out"}
    arguments = beit_arguments(world, folder, **changes)
    run_here("beit", arguments)
    (folder / "finished.json").unlink()
    shutil.rmtree(folder / "checkpoints/step-00000040")
    run_here("beit", arguments)
    return folder


def test_a_real_run_is_drawn_from_its_files(run):
    frame = " ".join(drawn(look(run), 80).split())
    assert "✔ finished" in frame
    assert frame.startswith("BEiT pretraining of vit_tiny_patch16_224")
    assert "step 40 of 40 · 640 images · epoch 3.3 of 3.3 · took" in frame
    assert re.search(r"last checkpoint step 40 .* start: going on after step 20 .* finished: trained to the end", frame)
    assert re.search(r"codes used \d+ of 16 ", frame)
    assert re.search(r"held out: masked accuracy 0\.\d+, masked loss \d\.\d+ \(step 40\)", frame)
    assert "masked accuracy 0." in frame
    assert len(look(run).logs) == len({each["step"] for each in look(run).logs}) == 9


def test_a_run_elsewhere_is_the_same_frame(run):
    with serving(run.parent) as server, contextlib.closing(Followed(f"{server.address}/{run.name}")) as followed:
        followed.look()
        here = drawn(look(run), 80).splitlines()
        assert drawn(followed, 80).splitlines()[2:] == here[2:]


def test_piped_output_is_one_frame_without_torch_and_at_once(run):
    program = f"""
import sys
from mimetic import cli
sys.argv = ["mimetic", "watch", {str(run)!r}]
cli.main()
print(*(name for name in ("torch", "numpy", "matplotlib", "accelerate", "fsspec") if name in sys.modules), file=sys.stderr)
"""
    done = finish(start(sys.executable, "-c", program))
    assert (done.returncode, done.stderr) == (0, "\n")
    assert "✔ finished" in done.stdout
    assert "\x1b" not in done.stdout
    assert max(map(cell_len, done.stdout.splitlines())) <= 80


def test_a_pipe_is_no_terminal_where_colours_are_forced(run):
    done = finish(start(sys.executable, "-m", "mimetic.cli", "watch", write(run.parent / "other", line(1)), env={"FORCE_COLOR": "1"}), 30)
    assert done.returncode == 0, "one frame, although the run is not finished"
    assert "\x1b[1m" in done.stdout
    assert CLEAN[0] not in done.stdout


def test_a_missing_run_is_refused_with_exit_code_2(tmp_path):
    done = finish(start(sys.executable, "-m", "mimetic.cli", "watch", tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"mimetic: error: {tmp_path} holds no metrics.jsonl; give a run folder, what a training was given as --out\n"


class Terminal:
    """`mimetic watch` in a terminal of its own."""

    def __init__(self, rows: int, columns: int, *arguments: str | Path) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process = start(sys.executable, "-m", "mimetic.cli", "watch", *arguments, stdin=slave, stdout=slave, stderr=slave,
                             env={"TERM": "xterm-256color"})  # fmt: skip
        os.close(slave)
        self.shown = ""

    def until(self, words: str, patience: float = 30) -> None:
        """Reads on until the terminal has shown these words."""
        limit = time.monotonic() + patience
        while words not in self.shown:
            assert time.monotonic() < limit, f"no {words!r} in\n{self.shown}"
            self.read()

    def read(self) -> bool:
        if not select.select([self.master], [], [], 0.1)[0]:
            return True
        try:
            piece = os.read(self.master, 1 << 16)
        except OSError:  # the other end is closed
            return False
        self.shown += piece.decode("utf-8", "replace")
        return bool(piece)

    def end(self) -> int:
        while self.process.poll() is None or (self.read() and select.select([self.master], [], [], 0.1)[0]):
            self.read()
        os.close(self.master)
        return self.process.returncode


CLEAN = ("\x1b[?1049h", "\x1b[?1049l", "\x1b[?25l", "\x1b[?25h")  # another screen and back, the cursor hidden and shown


def test_a_terminal_is_followed_until_ctrl_c_and_left_clean(tmp_path):
    run = write(tmp_path / "run", *map(line, range(1, 101)), plan=PLAN, events=[event("start")])
    watching = Terminal(24, 60, run, "--every", "0.1")
    watching.until("step 100 of 1,000")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line(101)) + "\n")
    watching.until("step 101 of 1,000")
    watching.process.send_signal(signal.SIGINT)
    assert watching.end() == 0
    shown = watching.shown
    assert all(shown.count(code) == 1 for code in CLEAN)
    assert "Traceback" not in shown
    assert "error" not in shown
    after = shown[shown.index(CLEAN[1]) :]
    assert "step" not in after, "nothing is left on the screen"
    frames = shown[: shown.index(CLEAN[1])].split("\x1b[H")[1:]
    whole = [frame for frame in frames if frame.count("\n") == 23]
    assert whole, "as high as the terminal"
    assert max(frame.count("\n") for frame in frames) == 23, "and no higher"
    assert "images\x1b" in whole[0], "a curve to its end"
    assert "step 0  start" in whole[0], "and the events below"


def test_a_run_that_finishes_leaves_its_last_frame(tmp_path):
    run = write(tmp_path / "run", line(1), plan=PLAN, events=[event("start")])
    watching = Terminal(40, 80, run, "--every", "0.1")
    watching.until("step 1 of 1,000")
    write(run, line(1), line(1000), events=[event("start"), event("finished", 1000)])
    assert watching.end() == 0
    after = watching.shown[watching.shown.index(CLEAN[1]) :]
    assert "finished" in after
    assert "step 1,000 of 1,000" in after


def test_once_is_one_frame_in_a_terminal_too(tmp_path):
    run = write(tmp_path / "run", line(1), plan=PLAN)
    watching = Terminal(40, 80, run, "--once")
    assert watching.end() == 0
    assert watching.shown.count("step 1 of 1,000") == 1
    assert CLEAN[0] not in watching.shown


# Words


def test_numbers_are_short():
    told = {0: "0", 9600: "9,600", 12_800: "12.8 k", 384_000_000: "384 M", 1.25e12: "1.25 T", 2.5e9: "2.5 G", 0.123456: "0.123",
            99.5: "99.5", 1234.5: "1,234", math.nan: "nan", math.inf: "inf"}  # fmt: skip
    assert {number: short(number) for number in told} == told | {math.nan: "nan"}


def test_durations_have_two_units():
    told = {0: "0 s", 0.4: "0 s", 59.6: "1 min", 200: "3 min 20 s", 3600: "1 h", 5400: "1 h 30 min", 90_061: "1 d 1 h"}
    assert {number: duration(number) for number in told} == told
