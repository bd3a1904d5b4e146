"""Reading run folders: what was trained, what was measured, and whether it came to its end."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mimetic.engine.config import flatten
from mimetic.engine.errors import CheckpointError, DataError, SettingError
from mimetic.engine.run import Record, is_harmless, read_lines

NUMBER = int | float
# What the page reads of a record and of its details, and what it must be.
FIELDS = {"metric": str, "value": NUMBER, "details": dict} | dict.fromkeys(("count", "step", "samples", "seconds", "parameters"), NUMBER)
DETAILS = {"labels": NUMBER | None, "vocab_size": NUMBER | None, "counts": list | None}
# Repeats of one training differ in what they draw, and each may start from its own repeat of a pretraining or a teacher.
SEEDS = ("seed", "labels.seed")
ORIGINS = ("init.path", "distill.teacher")
INDICES = ("data.index", "evaluation.index")


@dataclass(frozen=True)
class RunFolder:
    """One run folder, read.

    Attributes:
        folder: as the user named it.
        name: tells it from the other runs of the page.
        kind: "tokenizer", "pretrain", "classify", "reference", or "unknown".
        config: the resolved recipe.
        config_text: the same, as it lies in config.yaml.
        records: evaluations, oldest first.
        metrics: lines of the training log, oldest first; those of evaluations have no loss and are left out.
        picture: the newest of samples/*.png.
        finished: whether this very recipe was trained to its end.
        recipe: hash of the recipe.
        revision: git revisions that wrote records, oldest first; empty where there is no record.
        shared: whether another classifier or reference of the page has its arm's name.
    """

    folder: Path
    name: str
    kind: str
    config: dict[str, Any]
    config_text: str
    records: tuple[Record, ...]
    metrics: tuple[dict[str, Any], ...]
    picture: Path | None
    finished: bool
    recipe: str
    revision: str
    shared: bool = False

    @property
    def arm(self) -> str:
        """What the run is called in comparisons."""
        named = [record.details["arm"] for record in self.records if "arm" in record.details]
        return str(named[-1] if named else self.config.get("arm") or self.name)

    @property
    def label(self) -> str:
        """Its arm, with its own name where other runs share the arm."""
        return f"{self.arm} ({self.name})" if self.shared else self.arm

    @property
    def terms(self) -> str:
        """What runs must have in common for their mean to mean something: the recipe, but for seeds and what changes no number."""
        settings = {name: value for name, value in flatten(self.config).items() if name not in SEEDS and not is_harmless(name)}
        origins = {name: bool(settings.get(name)) for name in ORIGINS}
        indices = {name: str(Path(str(settings[name])).resolve()) for name in INDICES if settings.get(name)}
        return json.dumps(settings | origins | indices, sort_keys=True, default=str)

    @property
    def seed(self) -> str:
        """Of the recipe; a dash where it has none."""
        return str(self.config.get("seed", "–"))

    def last(self, metric: str) -> Record | None:
        """The newest record of a metric."""
        found = [record for record in self.records if record.metric == metric]
        return found[-1] if found else None

    def setting(self, name: str) -> Any:
        """A dotted setting of the recipe, such as `init.path`; None where it is missing."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def read_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """Reads run folders in the order given; one that is named twice is read once.

    Raises:
        SettingError: no folder is given.
        DataError: a path is no run folder.
        CheckpointError: a line of its records or metrics is damaged.
    """
    if not folders:
        raise SettingError("no run is given; name run folders: mimetic compare RUN... --out DIR")
    unique = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    runs = [_read(folder, name) for folder, name in zip(unique, _names(unique), strict=True)]
    arms = [run.arm for run in runs if run.kind in ("classify", "reference")]
    return [dataclasses.replace(run, shared=arms.count(run.arm) > 1) for run in runs]


def _read(folder: Path, name: str) -> RunFolder:
    config, text = _config(folder)
    lines = _lines(folder / "records.jsonl", _is_record)
    records = tuple(Record(**{key: value for key, value in line.items() if key in FIELDS}) for line in lines)
    kind = str(lines[-1].get("kind", "unknown")) if lines else _kind(config)
    logged = tuple(line for line in _lines(folder / "metrics.jsonl", _is_log) if "loss" in line and "samples" in line)
    pictures = sorted((folder / "samples").glob("*.png"))
    revisions = dict.fromkeys(str(line["revision"]) for line in lines if "revision" in line)
    finished = bool(records) if kind == "reference" else _finished(folder, config)
    recipe = str(lines[-1].get("recipe")) if lines else _recipe_hash(config)
    return RunFolder(folder, name, kind, config, text, records, logged, pictures[-1] if pictures else None, finished, recipe,
                     ", ".join(revisions))  # fmt: skip


def _lines(file: Path, sound: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    lines = read_lines(file)
    for number, line in enumerate(lines, 1):
        if not (isinstance(line, dict) and sound(line)):
            raise CheckpointError(f"{file}: line {number} is damaged; remove it")
    return lines


def _is_record(line: dict[str, Any]) -> bool:
    return {"metric", "value"} <= line.keys() and _fits(line, FIELDS) and _fits(line.get("details", {}), DETAILS)


def _is_log(line: dict[str, Any]) -> bool:
    return all(isinstance(value, NUMBER) for value in line.values())


def _fits(values: dict[str, Any], kinds: dict[str, Any]) -> bool:
    return all(isinstance(values[name], kind) for name, kind in kinds.items() if name in values)


def _config(folder: Path) -> tuple[dict[str, Any], str]:
    file = folder / "config.yaml"
    try:
        text = file.read_text()
        config = yaml.safe_load(text)
    except (FileNotFoundError, NotADirectoryError):
        found = "has no config.yaml" if folder.exists() else "does not exist"
        raise DataError(f"{folder} is no run folder, it {found}; name the folder that a training was given as --out") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); check its permissions") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        raise DataError(f"{file} is damaged (no yaml of settings); leave {folder} out, or give its training command again")
    return config, text


def _kind(config: dict[str, Any]) -> str:
    """Only records name the kind; a run without any is known by its settings."""
    known = {"dvae": "tokenizer", "vqkd": "tokenizer", "mask": "pretrain", "simmim": "pretrain", "mae": "pretrain", "backbone": "classify",
             "evaluation": "reference"}  # fmt: skip
    return next((kind for section, kind in known.items() if section in config), "unknown")


def _finished(folder: Path, config: dict[str, Any]) -> bool:
    """The mark counts for the recipe it names: a folder may have been started again with another one."""
    try:
        marked = json.loads(json.loads((folder / "finished.json").read_text())["recipe"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return marked == {name: value for name, value in flatten(config).items() if not is_harmless(name)}


def _recipe_hash(config: dict[str, Any]) -> str:
    """As `mimetic.engine.config.recipe_hash`, from the resolved settings."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell all of them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = [os.sep.join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
