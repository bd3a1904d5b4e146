"""The house: which folder may import which, and doors that answer before anything heavy is loaded."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NO_PACKAGE = {"tests", "benchmarks", "docs", "build", "dist", "runs"}
FOLDERS = sorted(
    path.name
    for path in ROOT.iterdir()
    if path.is_dir() and path.name not in NO_PACKAGE and not path.name.startswith((".", "__")) and path.suffix != ".egg-info"
)
CONTRACT = {"engine.config", "engine.errors"}  # all of the engine that data and backbones may know
MAY_IMPORT = {
    "engine": set(),
    "data": CONTRACT,
    "backbones": CONTRACT,
    "tokenizers": {"engine", "data", "backbones"},
    "pretrain": {"engine", "data", "backbones", "tokenizers"},
    "finetune": {"engine", "data", "backbones"},
    "export": {"engine", "backbones"},
    "report": {"engine", "backbones", "data.fetch",  # a run that is watched may lie elsewhere
               "data.decode", "data.picture", "data.pixelrange"},  # images that are looked at are read as data is
    "launch": set(),
}
ENTRY_SCRIPTS = ["pretrain/beit.py", "pretrain/beit2.py", "pretrain/simmim.py", "pretrain/mae.py", "finetune/classify.py",
                 "tokenizers/train_dvae.py", "tokenizers/train_vqkd.py"]  # fmt: skip
HEAVY = {"torch", "torchvision", "accelerate", "deepspeed", "webdataset", "PIL", "sklearn", "timm", "transformers"}


def imported(tree: ast.AST) -> set[str]:
    """Every module that is named in an import, at any depth."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def ours(names: set[str]) -> set[str]:
    return {name.removeprefix("mimetic.") for name in names if name.startswith("mimetic.")}


def allowed(name: str, folder: str) -> bool:
    return any(f"{name}.".startswith(f"{permitted}.") for permitted in MAY_IMPORT[folder] | {folder})


def test_every_folder_is_a_package_and_the_other_way_round():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    inner = {path.parent.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    named = {".".join(["mimetic", *folder.parts]) for folder in inner} | {"mimetic", *(f"mimetic.{folder}" for folder in FOLDERS)}
    assert sorted(packages) == sorted(named)
    assert sorted(FOLDERS) == sorted(MAY_IMPORT)


def test_no_folder_hides_a_package_of_its_name():
    assert not [path for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")]


def test_no_file_is_named_as_a_module_of_somebody_else():
    """A script's own folder comes first on the path: `export/onnx.py` would hide onnx."""
    taken = sys.stdlib_module_names | {name for name in importlib.metadata.packages_distributions() if name != "mimetic"}
    assert {"torch", "webdataset", "json", "logging"} <= taken
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 20
    assert not [path for path in files if path.stem in taken]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_lies_below(folder):
    for file in (ROOT / folder).rglob("*.py"):
        names = imported(ast.parse(file.read_text()))
        assert not [name for name in names if name.startswith(".")], f"{file}: imports are written in full"
        assert not [name for name in names if name.split(".")[0] in set(FOLDERS) - {"tokenizers"}], f"{file}: without mimetic."
        assert not {name for name in ours(names) if not allowed(name, folder)}, file


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, cwd=ROOT)


def run_watched(script: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Runs a script as `python SCRIPT` does, and tells which heavy modules it had loaded when it left."""
    program = f"""
import runpy, sys
sys.path[0] = {str((ROOT / script).parent)!r}
sys.argv = [{script!r}, *{list(arguments)!r}]
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:
    print("loaded", *(name for name in {sorted(HEAVY)!r} if name in sys.modules), file=sys.stderr)
"""
    done = run("-c", program)
    assert "loaded" in done.stderr, done.stderr
    return done, set(done.stderr.strip().splitlines()[-1].split()[1:])


@pytest.mark.parametrize("script", ENTRY_SCRIPTS)
def test_help_answers_before_anything_heavy_is_loaded(script):
    done, loaded = run_watched(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "example: " in done.stdout
    assert "--data.batch_size" in done.stdout
    assert not loaded


@pytest.mark.parametrize("script", ENTRY_SCRIPTS)
def test_a_misspelt_setting_is_one_line_and_exit_code_2(script, tmp_path):
    arguments = ["--out", str(tmp_path / "run"), "--data.index", "x", "--train.stepz", "3", "--optim.lr", "1"]
    done = run(script, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["mimetic: error: unknown setting --train.stepz (did you mean train.steps?)"]
    assert not (tmp_path / "run").exists()
    _, loaded = run_watched(script, *arguments)
    assert not loaded


def test_the_doors_at_the_root_open_before_anything_heavy_is_loaded():
    for file in ROOT.glob("*.py"):
        name = "mimetic" if file.stem == "__init__" else f"mimetic.{file.stem}"
        done = run("-c", f"import sys, {name}; print(*(heavy for heavy in {sorted(HEAVY)!r} if heavy in sys.modules))")
        assert (done.returncode, done.stdout, done.stderr) == (0, "\n", ""), name


def test_the_readme_quotes_the_record_and_its_pictures_exist():
    readme = (ROOT / "README.md").read_text()
    headline = (ROOT / "docs/demo/report.md").read_text().split("\n\n")[2]
    assert f"> {headline}\n" in readme
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (ROOT / link).exists(), link
