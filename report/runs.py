"""Reading run folders: what was trained, what was measured, and whether it came to its end."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mimetic.engine.config import flatten
from mimetic.engine.errors import DataError, SettingError
from mimetic.engine.run import HARMLESS, Record, read_lines

FIELDS = {field.name for field in dataclasses.fields(Record)}


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

    @property
    def arm(self) -> str:
        """What the run is called in comparisons."""
        named = [record.details["arm"] for record in self.records if "arm" in record.details]
        return str(named[-1] if named else self.config.get("arm") or self.name)

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
    return [_read(folder, name) for folder, name in zip(unique, _names(unique), strict=True)]


def _read(folder: Path, name: str) -> RunFolder:
    config, text = _config(folder)
    lines = read_lines(folder / "records.jsonl")
    records = tuple(Record(**{key: value for key, value in line.items() if key in FIELDS}) for line in lines)
    kind = str(lines[-1].get("kind", "unknown")) if lines else _kind(config)
    logged = tuple(line for line in read_lines(folder / "metrics.jsonl") if "loss" in line and "samples" in line)
    pictures = sorted((folder / "samples").glob("*.png"))
    revisions = dict.fromkeys(str(line["revision"]) for line in lines if "revision" in line)
    finished = bool(records) if kind == "reference" else _finished(folder, config)
    recipe = str(lines[-1].get("recipe")) if lines else _recipe_hash(config)
    return RunFolder(folder, name, kind, config, text, records, logged, pictures[-1] if pictures else None, finished, recipe,
                     ", ".join(revisions))  # fmt: skip


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
    known = {"dvae": "tokenizer", "mask": "pretrain", "backbone": "classify", "evaluation": "reference"}
    return next((kind for section, kind in known.items() if section in config), "unknown")


def _finished(folder: Path, config: dict[str, Any]) -> bool:
    """The mark counts for the recipe it names: a folder may have been started again with another one."""
    try:
        marked = json.loads(json.loads((folder / "finished.json").read_text())["recipe"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return marked == {name: value for name, value in flatten(config).items() if name not in HARMLESS}


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
