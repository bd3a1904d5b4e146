"""Recipes: what is not known is refused by name at any depth, and what is stored names the run."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mimetic.data.cache import LIMIT
from mimetic.data.order import CANONICAL_STREAMS, SHUFFLE_BLOCK
from mimetic.engine.config import (
    DataSettings,
    OptimSettings,
    TrainSettings,
    did_you_mean,
    flatten,
    known_settings,
    parse,
    recipe_dict,
    recipe_hash,
    write_atomically,
)
from mimetic.engine.errors import SettingError


@dataclass(frozen=True)
class Draw:
    """Deeply nested settings.

    Args:
        per_class: Images per class.
    """

    per_class: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """Nested settings.

    Args:
        labels: A draw.
        metric: A name.
        extras: Free names.
    """

    labels: Draw = Draw()
    metric: str = "accuracy"
    extras: dict[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A recipe for tests.

    Args:
        seed: Of everything.
    """

    data: DataSettings
    train: TrainSettings
    optim: OptimSettings
    evaluation: Evaluation = Evaluation()
    seed: int = 0


NEEDED = ["--out", "run", "--data.index", "shards", "--train.steps", "5", "--optim.lr", "1e-3"]


def parsed(*argv: str, needed: list[str] = NEEDED):
    return parse(Recipe, example="python x.py --out run", argv=[*needed, *argv])


def yaml_file(folder: Path, text: str) -> str:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return str(file)


GOOD = "data: {index: there, batch_size: 32}\ntrain:\n  epochs: 2\noptim: {lr: 2.0e-3}\n"


def test_the_command_line_overrides_the_yaml_which_overrides_the_defaults(tmp_path):
    argv = ["--config", yaml_file(tmp_path, GOOD), "--out", "runs/x", "--data.batch_size", "8", "--evaluation.labels.per_class=3"]
    invocation = parsed(*argv, needed=[])
    assert invocation.out == Path("runs/x")
    assert invocation.resume is None
    recipe = invocation.recipe
    assert recipe.data == DataSettings(index="there", batch_size=8)
    assert recipe.train == TrainSettings(epochs=2)
    assert recipe.optim.lr == 2e-3
    assert recipe.evaluation.labels.per_class == 3


def test_free_dictionaries_take_any_name(tmp_path):
    file = yaml_file(tmp_path, GOOD + "evaluation: {extras: {depth: 4, name: x}}\n")
    recipe = parsed("--config", file, "--out", "r", needed=[]).recipe
    assert recipe.evaluation.extras == {"depth": 4, "name": "x"}


def test_resume_is_absent_bare_or_a_checkpoint():
    assert parsed().resume is None
    assert parsed("--resume").resume == ""
    assert parsed("--resume", "runs/a/checkpoints/step-7").resume == "runs/a/checkpoints/step-7"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.batchsize", "3"], r"unknown setting --data\.batchsize \(did you mean data\.batch_size\?\)"),
        (["--train.epoch=3"], r"unknown setting --train\.epoch \(did you mean train\.epochs\?\)"),
        (["--evaluation.labels.perclass", "3"], r"unknown setting .*perclass \(did you mean evaluation\.labels\.per_class\?\)"),
        (["--sede", "3"], r"unknown setting --sede \(did you mean seed\?\)"),
        (["--data.batch", "3"], r"unknown setting --data\.batch \("),  # no abbreviations: a later setting could change their meaning
        (["--qqqq.zzzz", "3"], r"unknown setting --qqqq\.zzzz$"),
    ],
)
def test_a_misspelt_setting_on_the_command_line_is_refused_with_the_nearest(argv, message):
    with pytest.raises(SettingError, match=message) as caught:
        parsed(*argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {indx: x}", r"unknown setting data\.indx \(did you mean data\.index\?\)"),
        ("evaluation: {labels: {per_clas: 1}}", r"unknown setting evaluation\.labels\.per_clas \(did you mean evaluation\.labels"),
        ("dta: {index: x}", r"unknown setting dta\.index \(did you mean data\.index\?\)"),
        ("dta: {}", r"unknown setting dta$"),
        ("sed: 3", r"unknown setting sed \(did you mean seed\?\)"),
        ("- a\n- b", "holds no settings"),
        ("", "holds no settings"),
        ("data: {index: [", "is not yaml"),
    ],
)
def test_a_yaml_file_with_something_unknown_is_named(tmp_path, text, message):
    file = yaml_file(tmp_path, text)
    with pytest.raises(SettingError, match=message) as caught:
        parsed("--config", file)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingError, match=message):
        parsed(f"--config={file}")


@pytest.mark.parametrize("text", ["evaluation:\n", "evaluation: {}\n", "evaluation: {labels: {}}\n", "evaluation: {extras: {}}\n"])
def test_a_section_whose_every_line_is_commented_out_keeps_its_defaults(tmp_path, text):
    assert parsed("--config", yaml_file(tmp_path, GOOD + text), "--out", "r", needed=[]).recipe.evaluation == Evaluation()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"data: 5\n", r"recipe\.yaml: data is 5, but it is a section; write `data:` and its settings below, indented"),
        (b"\xff\xfe\x00BM", r"recipe\.yaml is not yaml: "),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, content, message):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(SettingError, match=message):
        parsed("--config", str(tmp_path / "recipe.yaml"))


def test_a_missing_yaml_file_is_named():
    with pytest.raises(SettingError, match=r"nowhere\.yaml: No such file"):
        parsed("--config", "nowhere.yaml")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.batch_size", "many"], r"data\.batch_size is many; it must be a whole number$"),
        (["--train.steps", "many"], r"train\.steps is many; it must be a whole number$"),
        (["--out", " "], r"--out is empty; name the run folder"),
        (["--optim.lr", "-1"], r"optim\.lr is -1\.0; it must be above 0"),
        (["--optim.warmup", "1"], r"optim\.warmup is 1\.0"),
        (["--optim.layer_decay", "0"], r"optim\.layer_decay is 0\.0"),
        (["--train.precision", "fp8"], r"train\.precision is 'fp8'; it must be fp32 or bf16"),
        (["--train.accumulate", "0"], r"train\.accumulate is 0"),
        (["--train.epochs", "3"], r"exactly one of train\.steps, train\.epochs, train\.samples"),
        (["--train.steps", "null"], r"exactly one of train\.steps, train\.epochs, train\.samples"),
    ],
)
def test_values_that_cannot_be_are_refused_in_one_line(argv, message):
    with pytest.raises(SettingError, match=message) as caught:
        parsed(*argv)
    assert "\n" not in str(caught.value)


def test_what_is_needed_is_asked_for():
    with pytest.raises(SettingError, match="out"):
        parsed(needed=NEEDED[2:])
    with pytest.raises(SettingError, match=r"data\.index"):
        parsed(needed=NEEDED[:2] + NEEDED[4:])


def test_a_recipes_duration_can_be_replaced(tmp_path):
    file = yaml_file(tmp_path, GOOD)
    recipe = parsed("--config", file, "--out", "r", "--train.epochs", "null", "--train.samples", "100", needed=[]).recipe
    assert recipe.train == TrainSettings(samples=100)


def test_known_settings_and_flatten_speak_the_same_names():
    recipe = parsed().recipe
    names = {name for name in known_settings(Recipe) if not name.endswith(".*")}
    assert {"data.index", "train.steps", "optim.lr", "evaluation.labels.per_class", "seed"} <= names
    assert names | {"evaluation.extras", "data.mix"} == set(flatten(recipe_dict(recipe)))


def test_equal_recipes_have_equal_hashes_in_every_process_and_others_differ():
    recipe = parsed("--data.batch_size", "8").recipe
    assert recipe_hash(recipe) == recipe_hash(parsed("--data.batch_size=8", "--seed", "0").recipe)
    changed = [dataclasses.replace(recipe, seed=1), parsed("--evaluation.labels.per_class", "1").recipe, parsed("--optim.lr=2e-3").recipe]
    assert len({recipe_hash(r) for r in [recipe, *changed]}) == 4
    program = "from mimetic.engine.config import *; print(recipe_hash(OptimSettings(lr=1e-3)))"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == recipe_hash(OptimSettings(lr=1e-3))


def test_a_stored_recipe_reads_back_as_the_same(tmp_path):
    recipe = parsed("--evaluation.labels.per_class", "4", "--optim.weight_decay", "1e-2").recipe
    file = yaml_file(tmp_path, json.dumps(recipe_dict(recipe)))  # json is yaml
    assert parsed("--config", file, "--out", "r", needed=[]).recipe == recipe


def test_did_you_mean_names_the_nearest_or_nothing():
    assert did_you_mean("train.step", ["train.steps", "data.index"]) == " (did you mean train.steps?)"
    assert did_you_mean("xyz", ["train.steps"]) == ""


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "index.json"
    write_atomically(file, "old")
    assert file.stat().st_mode & 0o777 == 0o644

    def fails(*_):
        raise OSError("disk")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fails)
            with pytest.raises(OSError, match="disk"):
                write_atomically(file, b"new")
        assert file.read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["index.json"]
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new"


def test_defaults_of_the_data_are_those_of_the_stream_and_of_the_cache():
    settings = DataSettings("shards")
    assert settings.shuffling == {"canonical_streams": CANONICAL_STREAMS, "shuffle_block": SHUFFLE_BLOCK}
    assert settings.cache_gb * 1e9 == LIMIT
