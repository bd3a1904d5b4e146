"""What a newcomer meets: bad input is one clear line that names the thing and the cure, exit code 2, and nothing left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from imagesets import grey_folder, idx_files
from PIL import Image
from safetensors.torch import load_file
from tinyruns import (
    beit_arguments,
    classify_arguments,
    dvae_arguments,
    files_of_at_most,
    finish,
    lines,
    losses,
    make_data,
    make_tokenizer,
    members,
    reset_accelerate,
    run_here,
    start,
    structured,
    wait_until,
)

from mimetic import cli
from mimetic.data.index import open_index
from mimetic.engine.checkpoints import newest
from mimetic.engine.runtime import run_entry
from mimetic.finetune import classify, logistic
from mimetic.pretrain import beit
from mimetic.tokenizers import train_dvae

MAINS = {"beit": beit.main, "classify": classify.main, "dvae": train_dvae.main, "logistic": logistic.main, "mimetic": cli.dispatch}
ARGUMENTS = {"beit": beit_arguments, "classify": classify_arguments, "dvae": dvae_arguments}
QUICK = 2.0  # CPU seconds of a start without torch: a third of that here, more on older machines; importing torch takes 3


class Entry:
    """Runs commands as their scripts do, in this process: what they print, and the code they leave with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, name: str, *arguments: str | Path) -> tuple[int, str, str]:
        reset_accelerate()
        self.monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        self.capsys.readouterr()
        code = 0
        try:
            run_entry(MAINS[name])
        except SystemExit as leaving:
            code = leaving.code
        return code, *self.capsys.readouterr()

    def refused(self, name: str, *arguments: str | Path) -> str:
        """The one line on stderr of a command that must fail."""
        code, _, err = self(name, *arguments)
        return one_line(code, err)


@pytest.fixture
def entry(monkeypatch, capsys) -> Entry:
    return Entry(monkeypatch, capsys)


def one_line(code: int, err: str) -> str:
    assert code == 2, err
    assert re.fullmatch(r"mimetic: error: .+\n", err), f"not one line: {err}"
    return err.removeprefix("mimetic: error: ").rstrip()


# Settings and data that cannot be


@pytest.fixture(scope="module")
def lands(world, tmp_path_factory) -> Path:
    """More data: `empty`, `colour`, `unlabelled`, `two-classes`, `one-class`; the world's own in several ways."""
    folder = tmp_path_factory.mktemp("lands")
    (folder / "empty").mkdir()
    from mimetic.data.pack import pack

    pack(grey_folder(folder / "flat", 40, 16), folder / "unlabelled")
    images, labels = structured(40, 16)
    pack(idx_files(folder / "idx", images, labels % 2), folder / "two-classes")
    from imagesets import encoded, folder_of, noise

    pack(idx_files(folder / "idx-again", *structured(200, 16)), folder / "repacked", samples_per_shard=50)
    shutil.copytree(world / "data", folder / "renamed")
    index = json.loads((world / "data/index.json").read_text())
    (folder / "renamed/index.json").write_text(json.dumps(index | {"classes": ["ant", "bee", "cat", "dog"]}))
    pack(folder_of(folder / "alone", {f"only/{i}.png": encoded(noise(i, 16, 16)) for i in range(24)}), folder / "one-class")
    files = {f"{'ab'[i % 2]}/{i}.png": encoded(noise(i, 16, 16, 3)) for i in range(24)}
    pack(folder_of(folder / "tree", files), folder / "colour")
    commanding = [{**index["shards"][0], "name": "pipe:touch owned"}, *index["shards"][1:]]
    for name, change in (("older", {"version": 1}), ("commanding", {"shards": commanding})):
        shutil.copytree(world / "data", folder / name)
        (folder / name / "index.json").write_text(json.dumps(index | change))
    shutil.copytree(world / "data", folder / "changed")
    with (folder / "changed/shard-00001.tar").open("ab") as shard:
        shard.write(bytes(512))
    return folder


@pytest.fixture(scope="module")
def teacher(world, tmp_path_factory) -> Path:
    return run_here("classify", classify_arguments(world, tmp_path_factory.mktemp("runs") / "teacher", train__steps=2))


def test_fine_tuning_at_another_size_or_on_other_channels_fits_the_weights_and_says_so(entry, pretrained, world, lands, tmp_path):
    arguments = {"init__path": pretrained, "train__steps": 2}
    code, out, err = entry("classify", *classify_arguments(world, tmp_path / "larger", backbone__image_size=24, **arguments))
    assert (code, err) == (0, "")
    assert f"{pretrained}: weights for 16x16 pixels fitted to 24x24\n" in out
    colour = {"data__index": lands / "colour", "evaluation__index": lands / "colour", "labels__per_class": 4, "data__batch_size": 4,
              "evaluation__labels__per_class": 4, "evaluation__labels__skip": 4}  # fmt: skip
    code, out, err = entry("classify", *classify_arguments(world, tmp_path / "colour", **arguments, **colour))
    assert (code, err) == (0, "")
    assert f"{pretrained}: the stem for 1 channels fitted to 3\n" in out


@pytest.fixture(scope="module")
def pretrained(world, tmp_path_factory) -> Path:
    return run_here("beit", beit_arguments(world, tmp_path_factory.mktemp("runs") / "pretrained", train__steps=4))


DISTILLED = {"backbone__name": "deit_tiny_distilled_patch16_224"}
REFUSED = {  # name: (script, changed settings, what the line must say); {world} and the like are folders
    "data missing": ("beit", {"data__index": "{lands}/nowhere"}, r"nowhere: no index\.json there; make one with `mimetic pack SRC"),
    "data empty": ("beit", {"data__index": "{lands}/empty"}, r"empty: no index\.json there; make one with `mimetic pack"),
    "no data": ("beit", {"data__index": "null"}, r"give data\.index, the shards to train on .*or several .* data\.mix"),
    "data and a mix": ("beit", {"data__mix": {"x": 1.0}}, r"data\.index and data\.mix are both given; put the index into the mix"),
    "a mix without an epoch": ("beit", {"data__index": "null", "data__mix": {"x": 1.0}}, r"mix has 1 sets, data\.epoch_samples is None"),
    "a mix without weight": ("beit", {"data__index": "null", "data__mix": {"x": 0.0}, "data__epoch_samples": 9}, r"x the weight 0\.0"),
    "labels of a mix": ("classify", {"data__index": "null", "data__mix": {"{data}": 1.0}, "data__epoch_samples": 99}, r"one data\.index"),
    "no streams": ("beit", {"data__canonical_streams": 0}, r"data\.canonical_streams is 0; it must be in \[1, 2"),
    "an index of another version": ("beit", {"data__index": "{lands}/older"}, r"json: index version 1, .* reads version 2; pack"),
    "a shard that changed": ("beit", {"data__index": "{lands}/changed"}, r"00001\.tar: \d+ bytes, the index says \d+; .*index the tars"),
    "an index with a command": ("beit", {"data__index": "{lands}/commanding"}, r"an index never runs a command"),
    "held-out data missing": ("beit", {"evaluate_on": "{lands}/nowhere"}, r"nowhere: no index\.json there"),
    "held-out data of other channels": ("beit", {"evaluate_on": "{lands}/colour"}, r"colour has 3 channels, .*data 1"),
    "more hidden than cells": ("beit", {"mask__count": 17}, r"mask\.count is 17, but the 4x4 grid has 16 cells; hide 1 to 16"),
    "block larger than the mask": ("beit", {"mask__min_block": 9}, r"mask\.min_block is 9, but mask\.count is 8"),
    "hidden cells no multiple of the unit": ("beit", {"mask__count": 6, "mask__unit": 2}, r"mask\.count is 6, .* use 4 or 8"),
    "checkpointing a net of timm's": ("beit", {"backbone__name": "timm:test_vit", "backbone__grad_checkpointing": "true"},
                                      r"grad_checkpointing is true, but timm:test_vit has no blocks"),
    "image no multiple of the patch": ("beit", {"backbone__image_size": 18}, r"image_size 18x18 is no multiple of patch_size 4x4"),
    "token grid unlike the patches": ("beit", {"views__target_size": 24}, r"token grid is 6x6; .* grid 4x4 .* set .* 16"),
    "target no multiple of the stride": ("beit", {"views__target_size": 18}, r"views\.target_size 18 .* 4.* 16"),
    "backbone unknown": ("beit", {"backbone__name": "vit_tinny_patch16_224"}, r"tinny.* \(did you mean vit_tiny_patch16_224\?\)"),
    "override misspelt": ("beit", {"overrides": {"num_head": 2}}, r"no override 'num_head' \(did you mean num_heads\?\)"),
    "heads do not divide": ("beit", {"overrides": {"num_heads": 5}}, r"embed_dim 32 is no multiple of num_heads 5"),
    "tokenizer missing": ("beit", {"tokenizer__path": "{lands}/nowhere"}, r"nowhere: no tokenizer there .*tokenizers/train_dvae\.py"),
    "tokenizer of other channels": ("beit", {"data__index": "{lands}/colour", "data__batch_size": 4}, r"tokenizer .*1 channel.*3"),
    "batch larger than the data": ("beit", {"data__batch_size": 300}, r"300 x 1 processes = 300 is more than the 200 .* to 200"),
    "nothing to resume": ("beit", {"resume": ""}, r"--resume: no valid checkpoint in .*checkpoints; leave --resume out"),
    "checkpoint missing": ("beit", {"resume": "{lands}/nowhere"}, r"nowhere: manifest\.json is missing .*; give a folder like"),
    "no whole step": ("beit", {"train__steps": "null", "train__samples": 3}, r"no whole step of 16 images; raise train\.samples"),
    "labels missing": ("classify", {"data__index": "{lands}/unlabelled"}, r"unlabelled has no labels; pack a tree with"),
    "too few labels": ("classify", {"labels__per_class": 51}, r"class 0 has 50 images, 51 per class are asked for"),
    "other classes": ("classify", {"evaluation__index": "{lands}/two-classes"}, r"has 2 classes .*the training data 4 classes"),
    "test data missing": ("classify", {"evaluation__index": "{lands}/nowhere"}, r"nowhere: no index\.json there"),
    "init missing": ("classify", {"init__path": "{lands}/nowhere"}, r"nowhere: no backbone there"),
    "init of another depth": ("classify", {"init__path": "{pretrained}", "overrides": {"depth": 3}}, r"depth 2 in .*, 3 here"),
    "teacher missing": ("classify", {"distill__teacher": "{lands}/nowhere", **DISTILLED}, r"nowhere: no backbone there .* finished run"),
    "teacher without classes": ("classify", {"distill__teacher": "{pretrained}", **DISTILLED}, r"without a classifier; a teacher is a run"),
    "teacher of other classes": (
        "classify",
        {
            "distill__teacher": "{teacher}", **DISTILLED, "data__batch_size": 4,
            "data__index": "{lands}/two-classes", "labels__per_class": 4,
            "evaluation__index": "{lands}/two-classes", "evaluation__labels__per_class": 1, "evaluation__labels__skip": 4,
        },
        r"trained for 4 classes.* 2 classes",
    ),
    "evaluation on training images": ("classify", {"evaluation__index": "{data}"}, r"images that are trained on; .* disjoint draws"),
    "a skip without a draw": ("classify", {"labels__skip": 3}, r"labels\.skip is 3 but labels\.per_class is not set"),
    "dead codes restarted never": ("dvae", {"dvae__restart_every": 0}, r"dvae\.restart_every is 0; it must be 1 or more"),
    "beta above 1": ("beit", {"optim__beta2": 1.5}, r"optim\.beta2 is 1\.5; it must be in \[0, 1\)"),
    "no heads": ("beit", {"backbone__overrides__num_heads": 0}, r"no multiple of num_heads 0"),
    "mean of three channels": ("beit", {"views__mean": "[0.5,0.5,0.5]", "views__std": "[0.5,0.5,0.5]"}, r"3 values, images have 1 chan"),
    "teacher of another size": ("classify", {"distill__teacher": "{teacher}", **DISTILLED, "backbone__image_size": 20}, r"16x16.* 20x20"),
    "student without a token": ("classify", {"distill__teacher": "{teacher}"}, r"needs a backbone with a distillation token"),
    "initialised and distilled": ("classify", {"init__path": "x", "distill__teacher": "y"}, r"path and distill\.teacher are both set"),
    "stride does not divide": ("dvae", {"views__image_size": 18}, r"image_size 18 is no multiple of dvae\.stride 4; use 16"),
    "more codes than cells": ("dvae", {"dvae__vocab_size": 4000, "dvae__seed_images": 100}, r"1600 cells cannot seed 4000 codes"),
    "gradient reversed": ("beit", {"optim__clip": -1}, r"optim\.clip is -1\.0; it must be 0 or more"),
    "no spread": ("beit", {"views__mean": "[0.5]", "views__std": "[0]"}, r"views\.std is \[0\.0\]; it must be above 0"),
    "a mean alone": ("classify", {"views__mean": "[0.5]"}, r"views\.mean and views\.std belong together"),
    "crop upside down": ("beit", {"views__crop_low": 0.9, "views__crop_high": 0.2}, r"crop_low is 0\.9, views\.crop_high 0\.2"),
    "smoothing negative": ("classify", {"views__smoothing": -1}, r"views\.smoothing is -1\.0; it must be in \[0, 1\)"),
    "pictures never": ("beit", {"train__picture_every": -3}, r"train\.picture_every is -3; it must be 1 or more"),
    "tolerance negative": ("beit", {"data__max_bad": -1}, r"data\.max_bad is -1\.0; it must be in \[0, 1\]"),
    "seed too large": ("dvae", {"seed": 1 << 40}, r"seed is 1099511627776; it must be in \[0, 4294967295\]"),
    "no size": ("dvae", {"views__image_size": 0}, r"views\.image_size is 0; it must be 1 or more"),
    "no blocks": ("beit", {"overrides": {"depth": 0}}, r"depth 0, .*: depth must be 1 or more"),
    "depth in words": ("beit", {"overrides": {"depth": "four"}}, r"vit_tiny_patch16_224 cannot be built with .*'depth': 'four'"),
    "oblong patches": ("beit", {"overrides": {"patch_size": [4, 8]}}, r"patch_size must be square"),
    "init of other heads": ("classify", {"init__path": "{pretrained}", "overrides": {"num_heads": 4}}, r"num_heads 2 in .*, 4 here"),
    "one class": (
        "classify", {"data__index": "{lands}/one-class", "evaluation__index": "{lands}/one-class", "labels__per_class": 16,
                     "evaluation__labels__per_class": 4, "evaluation__labels__skip": 16}, r"has one class, only; a classifier"),
    "teacher of classes with other names": (
        "classify", {"distill__teacher": "{teacher}", **DISTILLED, "data__index": "{lands}/renamed", "labels__per_class": 8,
                     "evaluation__index": "{lands}/renamed", "evaluation__labels__per_class": 4, "evaluation__labels__skip": 8},
        r"trained for 4 classes \(0, 1, 2 \.\.\.\), the data has 4 classes \(ant, bee, cat"),
    "evaluation on training images packed again": ("classify", {"evaluation__index": "{lands}/repacked"}, r"images that are trained on"),
    "held-out tokens missing": ("dvae", {"evaluate_on": "{lands}/nowhere"}, r"nowhere: no index\.json there"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_and_data_are_one_line_and_leave_nothing(case, entry, request, world, lands, tmp_path):
    name, changes, message = REFUSED[case]
    places = {"lands": lands, "data": world / "data"}
    for place in ("pretrained", "teacher"):
        if f"{{{place}}}" in str(changes):
            places[place] = request.getfixturevalue(place)
    told = {key: value.format(**places) if isinstance(value, str) else value for key, value in changes.items()}
    told |= {key: {name.format(**places): weight for name, weight in value.items()} for key, value in told.items() if key == "data__mix"}
    arguments = [word for word in ARGUMENTS[name](world, tmp_path / "run", **told) if word]
    line = entry.refused(name, *arguments)
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_out_that_is_a_file_is_refused_and_kept(entry, world, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    assert re.search(r"--out .*notes\.txt: .*; give a folder that can be written", entry.refused("beit", *beit_arguments(world, file)))
    assert file.read_text() == "mine"


def test_pixels_that_differ_in_size_are_refused(entry, world, tmp_path):
    small = make_data(tmp_path / "small", 40, side=12)
    line = entry.refused("logistic", "--data.index", world / "data", "--evaluation.index", small, "--out", tmp_path / "run")
    assert re.search(r"small have 144 pixels, those of .*data 256; resize them", line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exprt", "a", "b"], r"unknown command exprt \(did you mean export\?\); mimetic --help lists them"),
        (["pack", "{out}/nowhere", "{out}/shards"], r"nowhere: no such file or folder; give a folder of images or an idx file"),
        (["pack", "{lands}/empty", "{out}/shards"], r"empty.*no image"),
        (["pack", "{lands}/flat", "{lands}/flat"], r"holds .*, which is no shard: give a new folder"),
        (["export", "{out}/nowhere", "{out}/exported"], r"nowhere: no backbone there .*give a finished run or an exported folder"),
        (["export", "{lands}/flat", "{out}/exported", "--to", "tim"], r"invalid choice: 'tim'.*see mimetic export --help"),
        (["compare", "{out}/nowhere", "--out", "{out}/report"], r"nowhere"),
        (["watch", "{out}/nowhere"], r"nowhere holds no metrics\.jsonl; give a run folder"),
        (["watch", "{lands}/flat", "--every", "0"], r"--every is 0; it must be above 0"),
        (["compare", "--out", "{out}/report"], r"required: RUN; see mimetic compare --help"),
        (["demo", "--budget", "tiny"], r"invalid choice: 'tiny'"),
    ],
)
def test_bad_commands_are_one_line_and_leave_nothing(arguments, message, entry, lands, tmp_path):
    line = entry.refused("mimetic", *(word.format(out=tmp_path, lands=lands) for word in arguments))
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir())


def test_every_help_answers_with_an_example_and_without_torch():
    doors = [["mimetic", name, "--help"] for name in cli.COMMANDS] + [["mimetic", "--help"], ["mimetic"]]
    doors += [[name, "--help"] for name in MAINS if name != "mimetic"]
    program = f"""
import contextlib, io, sys
from mimetic import cli
from mimetic.finetune import classify, logistic
from mimetic.pretrain import beit
from mimetic.tokenizers import train_dvae
mains = {{"beit": beit.main, "classify": classify.main, "dvae": train_dvae.main, "logistic": logistic.main, "mimetic": cli.main}}
for name, *arguments in {doors!r}:
    sys.argv = [name, *arguments]
    code, said = 0, io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            mains[name]()
    except SystemExit as leaving:
        code = leaving.code
    assert not code, (sys.argv, code)
    assert "example: " in said.getvalue(), sys.argv
assert not {{"torch", "accelerate", "sklearn", "matplotlib"}} & set(sys.modules)
"""
    done = finish(start(sys.executable, "-c", program))
    assert done.returncode == 0, done.stderr


# Speed, and real processes


def cpu_seconds(process: "subprocess.Popen[str]") -> tuple[int, float]:
    """Exit code and user time of a process that is about to end: wall clock would measure the neighbours."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime


def test_typos_and_finished_runs_are_answered_at_once(world, pretrained, tmp_path):
    misspelt = [*beit_arguments(world, tmp_path / "run"), "--views.fliep", "1"]
    again = beit_arguments(world, pretrained, train__steps=4)
    processes = [start(sys.executable, "pretrain/beit.py", *arguments) for arguments in (misspelt, again)]
    (code, typo), (finished, done) = (cpu_seconds(process) for process in processes)
    assert one_line(code, processes[0].stderr.read()) == "unknown setting --views.fliep (did you mean views.flip?)"
    assert finished == 0
    assert processes[1].stdout.read() == (
        f"{pretrained} is finished: this very recipe has been trained there; its backbone is {pretrained}/backbone\n"
    )
    assert max(typo, done) < QUICK, (typo, done)
    for process in processes:
        process.stdout.close()
        process.stderr.close()


def test_one_run_folder_takes_one_process_and_few_lines_tell_what_happens(entry, world, tmp_path):
    arguments = beit_arguments(world, tmp_path / "run", train__steps=100_000, train__checkpoint_every=50, data__workers=1)
    process = start(sys.executable, "pretrain/beit.py", *arguments)
    wait_until(lambda: (tmp_path / "run/checkpoints/last").exists() or process.poll() is not None)
    line = entry.refused("beit", *arguments)
    assert line == f"{tmp_path}/run is in use by process {process.pid}; wait for it or end it, or use another --out"
    assert process.poll() is None, "the run itself goes on"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    done = finish(process, 60)
    assert done.returncode == 130
    told = (r"mimetic: SIGINT: finishing this step, then saving; again ends at once\n"
            r"mimetic: stopped by SIGINT; saved after step (\d+); the same command goes on from there\n")
    assert (saved := re.fullmatch(told, done.stderr)), done.stderr
    assert newest(tmp_path / "run/checkpoints")[1]["step"] == int(saved[1])
    said = done.stdout.splitlines()
    first = next(number for number, line in enumerate(said) if line.startswith("step 1/"))
    assert first < 20
    assert "100000 steps of 16 images" in said[0]
    assert re.search(r"loss \d+\.\d{3} .* images/s .* left$", said[first])
    wait_until(lambda: not members(process), 30)


# Starts that failed, and other recipes


def test_a_start_that_failed_blocks_nothing(entry, world, tmp_path):
    entry.refused("beit", *beit_arguments(world, tmp_path / "run", mask__count=17))
    entry.refused("beit", *beit_arguments(world, tmp_path / "run", backbone__name="vit"))
    code, out, err = entry("beit", *beit_arguments(world, tmp_path / "run", train__steps=2))
    assert (code, err) == (0, "")
    assert "step 2/2" in out
    assert len(losses(tmp_path / "run")) == 2


def test_another_recipe_in_a_used_folder_is_refused_and_harmless_changes_are_not(entry, world, pretrained):
    before = {path: path.read_bytes() for path in sorted(pretrained.rglob("*")) if path.is_file()}
    line = entry.refused("beit", *beit_arguments(world, pretrained, train__steps=4, optim__lr=1e-3))
    told = (r"step-00000004 is of another recipe or other data \(optim\.lr 0\.002 there, 0\.001 here\); use those, or another --out, "
            r"or --allow optim\.lr")  # fmt: skip
    assert re.search(told, line), line
    other = beit_arguments(world, pretrained, train__steps=4, backbone__name="deit_tiny_patch16_224", mask__count=7)
    line = entry.refused("beit", *other)
    assert "backbone.name vit_tiny_patch16_224 there, deit_tiny_patch16_224 here" in line
    assert "mask.count 8 there, 7 here" in line
    line = entry.refused("beit", *beit_arguments(world, pretrained, train__steps=4, overrides={"drop_path_rate": 0.1}))
    assert "backbone.overrides.drop_path_rate None there, 0.1 here" in line
    assert {path: path.read_bytes() for path in sorted(pretrained.rglob("*")) if path.is_file()} == before
    harmless = {"data__workers": 1, "train__log_every": 2, "expected__source": "a paper", "expected__loss": {"64": 2.5}}
    code, out, _ = entry("beit", *beit_arguments(world, pretrained, train__steps=4, **harmless))
    assert code == 0
    assert "is finished" in out


# Images that do not decode


def spoil(data: Path, samples: int) -> list[str]:
    """Overwrites the first bytes of some images where they lie in the shard; returns their keys."""
    index = open_index(data)
    chosen = np.arange(samples)
    for row, shard in zip(index.rows[:samples], index.shard_of(chosen).tolist(), strict=True):
        with index.path(shard).open("r+b") as file:
            file.seek(int(row["offset"]))
            file.write(b"junk" * 4)
    return index.keys(chosen)


def test_images_that_do_not_decode_are_counted_up_to_a_share(entry, world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    spoilt = spoil(tmp_path / "data", 2)  # of 200: 1 %, as many as data.max_bad tolerates
    code, _, err = entry("beit", *beit_arguments(world, tmp_path / "run", data__index=tmp_path / "data", train__steps=36))
    assert (code, err) == (0, "")
    assert lines(tmp_path / "run")[-1]["bad_samples"] in (5, 6), "2 in each of 3 epochs, but for what an epoch leaves out"
    assert sorted((tmp_path / "run/skipped.txt").read_text().split()) == sorted(spoilt)
    spoil(tmp_path / "data", 30)
    line = entry.refused("beit", *beit_arguments(world, tmp_path / "more", data__index=tmp_path / "data", train__steps=36))
    told = re.fullmatch(r"(\d+) of the (\d+) images read so far did not decode \((.+)%\), data\.max_bad tolerates 1\.0% .*", line)
    assert told, line
    assert float(told[3]) == pytest.approx(100 * int(told[1]) / int(told[2]), abs=0.06)
    code, _, err = entry("beit", *beit_arguments(world, tmp_path / "more", data__index=tmp_path / "data", data__max_bad=0.2))
    assert (code, err) == (0, ""), "the corrected command works in the same folder"
    assert losses(tmp_path / "more")[-1] > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_large_pictures_are_read_in_silence(entry, world, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)  # of 16x16: Pillow warns beyond, and stops beyond twice that
    code, _, err = entry("beit", *beit_arguments(world, tmp_path / "run", train__steps=2, data__workers=workers))
    assert (code, err) == (0, "")
    assert not (tmp_path / "run/skipped.txt").exists(), "warnings are errors here"


def test_held_out_images_that_do_not_decode_are_listed_up_to_a_share_and_nothing_is_trained_twice(entry, world, tmp_path):
    shutil.copytree(world / "held-out", tmp_path / "data")
    spoilt = spoil(tmp_path / "data", 2)  # of 70
    few = classify_arguments(world, tmp_path / "few", evaluation__index=tmp_path / "data", data__max_bad=0.03)
    code, out, err = entry("classify", *few)
    assert (code, err) == (0, "")
    assert "2 of the 70 held-out images did not decode" in out
    assert [line["count"] for line in lines(tmp_path / "few", "records.jsonl")] == [68]
    assert sorted((tmp_path / "few/skipped.txt").read_text().split()) == sorted(spoilt)

    spoil(tmp_path / "data", 30)
    line = entry.refused("classify", *classify_arguments(world, tmp_path / "many", evaluation__index=tmp_path / "data"))
    assert re.fullmatch(r"30 of the 70 held-out images .*skipped\.txt; data\.max_bad tolerates 1\.0%; pack .*", line), line
    trained = (tmp_path / "many/checkpoints/last/model.safetensors").read_bytes()
    mended = classify_arguments(world, tmp_path / "many", evaluation__index=tmp_path / "data", data__max_bad=0.5)
    code, out, _ = entry("classify", *mended)
    assert code == 0
    assert "going on after step 8" in out
    assert "step 8/8" not in out, "the training is not repeated"
    assert [line["count"] for line in lines(tmp_path / "many", "records.jsonl")] == [40]
    assert (tmp_path / "many/checkpoints/last/model.safetensors").read_bytes() == trained


# Folders and inputs that changed


def test_a_tokenizer_that_changed_under_its_path_is_no_continuation(entry, world, tmp_path):
    tokenizer = shutil.copytree(world / "tokenizer", tmp_path / "tokenizer")
    arguments = beit_arguments(world, tmp_path / "run", train__steps=4, tokenizer__path=tokenizer)
    assert entry("beit", *arguments)[0] == 0
    make_tokenizer(tokenizer, world / "data", codes=17)
    line = entry.refused("beit", *arguments)
    told = r"step-00000004 .*\(tokenizer\.path .*tokenizer is not what it was then\); use those, .* or --allow tokenizer\.path"
    assert re.search(told, line), line


def test_a_folder_that_is_no_run_is_left_alone(entry, world, tmp_path):
    (tmp_path / "mine/backbone").mkdir(parents=True)
    (tmp_path / "mine/backbone/notes.txt").write_text("mine")
    line = entry.refused("beit", *beit_arguments(world, tmp_path / "mine"))
    assert re.search(r"mine holds backbone and is no run; give a new folder", line), line
    assert [path.name for path in (tmp_path / "mine").rglob("*")] == ["backbone", "notes.txt"]


def test_a_finished_run_without_its_checkpoints_is_not_trained_over(entry, world, pretrained, tmp_path):
    run = shutil.copytree(pretrained, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    line = entry.refused("beit", *beit_arguments(world, run, train__steps=4, optim__lr=1e-3))
    assert re.search(r"run holds a finished run of another recipe or of other data; use another --out", line), line
    assert "is finished" in entry("beit", *beit_arguments(world, run, train__steps=4))[1]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_trained_over(entry, world, pretrained, tmp_path):
    run = shutil.copytree(pretrained, tmp_path / "run", symlinks=True)
    (run / "finished.json").write_text("[]")
    damaged = list((run / "checkpoints").glob("step-*/manifest.json"))
    for manifest in damaged:
        manifest.write_text('{"files": {}, "state": 5}')
    line = entry.refused("beit", *beit_arguments(world, run, train__steps=4))
    told = rf"all {len(damaged)} checkpoints in .*run/checkpoints are damaged or of an earlier version; remove .*run to start afresh"
    assert re.search(told, line), line
    assert lines(run) == lines(pretrained)


def test_output_that_nobody_reads_ends_the_run_in_one_line(world, tmp_path):
    process = start(sys.executable, "pretrain/beit.py", *beit_arguments(world, tmp_path / "run", train__steps=100_000, train__log_every=1))
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr.read() == "mimetic: error: nobody reads the output any more\n"
    process.stderr.close()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE is two but that is no number of processes; .* or unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE is 2 but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, r"WORLD_SIZE is 2 but MASTER_ADDR is not set"),
    ],
)
def test_a_launch_that_announces_what_it_does_not_set_up_is_refused(variables, message, world, tmp_path):
    done = finish(start(sys.executable, "pretrain/beit.py", *beit_arguments(world, tmp_path / "run"), env=variables))
    assert re.search(message, one_line(done.returncode, done.stderr))
    assert not (tmp_path / "run").exists()


THREADS_AT_WORK = """
import threading

import torch

from mimetic.data.index import open_index
from mimetic.engine.runtime import run_entry


def work() -> None:
    numbers = torch.randn(100_000)
    while True:
        numbers + numbers  # lets the interpreter go, and needs it again


def main() -> None:
    for _ in range(4):
        threading.Thread(target=work, daemon=True).start()
    print("trained")


run_entry(main)
"""


def test_threads_that_outlive_the_training_do_not_abort_a_launched_process(tmp_path):
    """Those of a process group do; without `RANK`, this very script is aborted."""
    (tmp_path / "entry.py").write_text(THREADS_AT_WORK)
    done = finish(start(sys.executable, tmp_path / "entry.py", env={"RANK": "0"}))
    assert (done.returncode, done.stdout, done.stderr) == (0, "trained\n", "")


# A full disk


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of one megabyte, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_named_and_the_last_checkpoint_kept(entry, world, small_disk, tmp_path):
    arguments = beit_arguments(world, small_disk / "run", train__steps=8, train__checkpoint_every=2, train__picture_every=100)
    (small_disk / "ballast").write_bytes(bytes(200_000))
    line = entry.refused("beit", *arguments)
    told = re.fullmatch(
        r"(.*/checkpoints/step-\d+) cannot be written, the disk is full \(0 MiB free\); the last good checkpoint is (.*/step-\d+); "
        r"free some space and give the same command", line)  # fmt: skip
    assert told, line
    assert Path(told[2]).exists()
    assert not Path(told[1]).exists()
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    code, out, err = entry("beit", *arguments)
    assert (code, err) == (0, "")
    assert f"going on after step {int(told[2][-8:])}\n" in out
    assert [line["step"] for line in lines(small_disk / "run")] == list(range(1, 9))
    whole = run_here("beit", beit_arguments(world, tmp_path / "whole", train__steps=8, train__checkpoint_every=2, train__picture_every=100))
    ours, theirs = (load_file(run / "backbone/model.safetensors") for run in (small_disk / "run", whole))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_disk_that_is_full_at_the_very_end_or_start_is_one_line_too(entry, world, pretrained, tmp_path):
    run = shutil.copytree(pretrained, tmp_path / "run", symlinks=True)
    (run / "finished.json").unlink()
    shutil.rmtree(run / "backbone")
    arguments = beit_arguments(world, run, train__steps=4)
    for size in (50_000, 100):  # too little for the backbone; for config.yaml
        with files_of_at_most(size):
            line = entry.refused("beit", *arguments)
        assert re.match(r"the disk is full \(.*File too large.*\); free some space and give the same command: it goes on from", line), line
    shutil.rmtree(run / "checkpoints/step-00000004")
    with files_of_at_most(50_000):  # too little for a checkpoint
        line = entry.refused("beit", *arguments)
    assert re.search(r"step-00000004 cannot be written, the disk is full .*; the last good checkpoint is .*step-00000003; ", line), line
    code, _, err = entry("beit", *arguments)
    assert (code, err) == (0, "")
    assert (run / "backbone/config.json").exists()


SIGNAL_AT_ITS_WORST = """
import os, signal

from mimetic.engine import runtime
from mimetic.engine.signals import SIGNALS

signals, known = [signal.SIGTERM], runtime._peer_is_gone


def gone(error):
    if signals:
        os.kill(os.getpid(), signals.pop())
    return known(error)


def main():
    raise RuntimeError("Connection closed by peer [127.0.0.1]:35244")


os.environ["RANK"] = "0"
runtime._peer_is_gone = gone
SIGNALS.listen()
runtime.run_entry(main)
"""


def test_a_launcher_may_end_a_process_whose_peer_has_gone_at_any_moment():
    """As it does when another one has ended: what that one said is the reason, and nothing is to be said beside it."""
    done = finish(start(sys.executable, "-c", SIGNAL_AT_ITS_WORST))
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")
