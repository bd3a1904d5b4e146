"""The run folder: config.yaml, metrics.jsonl, records.jsonl, tensorboard/, samples/*.png, checkpoints/."""

import dataclasses
import fcntl
import json
import os
import subprocess
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from mimetic.engine.config import Invocation, flatten, recipe_dict, recipe_hash, write_atomically
from mimetic.engine.errors import CheckpointError, LaunchError, SettingError

# Settings that change no number of the training: a checkpoint may be continued under others.
HARMLESS = ("data.workers", "data.max_bad", "train.log_every", "train.checkpoint_every", "train.keep", "train.picture_every",
            "train.evaluate_every")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Record:
    """One evaluation: what tables and reports are made from.

    Attributes:
        metric: what was measured, such as "test_accuracy".
        value: its value.
        count: over how many samples; 0 where that has no meaning.
        step: optimizer steps at the time.
        samples: images seen in training.
        seconds: of training, over all starts of the run.
        parameters: of the model that was trained.
        details: anything else worth a column.
    """

    metric: str
    value: float
    count: int = 0
    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    parameters: int = 0
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


class Run:
    """Writes one run folder; on processes other than the main one every method but `skipped` does nothing.

    Nothing is created before `open`: a start that fails before its first step leaves nothing behind. One process at a time
    may hold a folder.
    """

    def __init__(self, invocation: Invocation[Any], kind: str, *, main: bool = True) -> None:
        self.folder, self.recipe, self.kind, self.main = invocation.out, invocation.recipe, kind, main
        self._board: Any = None
        self._lock: IO[str] | None = None
        self._skipped: set[str] = set()

    def open(self, step: int) -> None:
        """Creates the folder, or continues it: lines of metrics after `step` belong to work that a kill undid."""
        if not self.main:
            return
        try:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise SettingError(f"--out {self.folder}: {error.strerror}; give a folder that can be written") from None
        self._lock = _lock(self.folder)
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(recipe_dict(self.recipe), sort_keys=False))
        for name in ("metrics.jsonl", "records.jsonl"):
            kept = [line for line in read_lines(self.folder / name) if line["step"] <= step and step]
            write_atomically(self.folder / name, "".join(json.dumps(line) + "\n" for line in kept))
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1 if step else None, flush_secs=20)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Appends a line to metrics.jsonl and points to TensorBoard."""
        if self.main:
            _append(self.folder / "metrics.jsonl", {"step": step} | values)
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def record(self, record: Record) -> None:
        """Appends a line to records.jsonl, with the recipe's hash, the code's revision and the seed."""
        if self.main:
            origin = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "kind": self.kind, "recipe": recipe_hash(self.recipe),
                      "revision": git_revision(), "seed": self.recipe.seed}  # fmt: skip
            _append(self.folder / "records.jsonl", origin | dataclasses.asdict(record))

    def picture(self, step: int, image_HWC: np.ndarray | None) -> None:
        """Saves samples/step-00000123.png and shows it in TensorBoard."""
        if self.main and image_HWC is not None:
            from PIL import Image

            Image.fromarray(image_HWC).save(self.folder / "samples" / f"step-{step:08d}.png")
            self._board.add_image("samples", image_HWC, step, dataformats="HWC")

    def skipped(self, keys: list[str]) -> None:
        """Lists samples that do not decode in skipped.txt, once each; every process lists its own."""
        fresh = [key for key in dict.fromkeys(keys) if key not in self._skipped]
        if fresh:
            self._skipped.update(fresh)
            with (self.folder / "skipped.txt").open("a") as file:
                file.write("".join(f"{key}\n" for key in fresh))

    def close(self) -> None:
        """Flushes TensorBoard and lets go of the folder."""
        if self._board is not None:
            self._board.close()
        if self._lock is not None:
            self._lock.close()

    def check_same_recipe(self, stored: dict[str, Any], checkpoint: Path) -> None:
        """Refuses a checkpoint of another recipe; settings that change no number may differ.

        Raises:
            CheckpointError: names the first settings that differ, with both values.
        """
        theirs, ours = flatten(stored), flatten(recipe_dict(self.recipe))
        names = [name for name in theirs | ours if theirs.get(name) != ours.get(name) and name not in HARMLESS]
        if names:
            told = "; ".join(f"{name} {theirs.get(name)} there, {ours.get(name)} here" for name in names[:3])
            raise CheckpointError(f"{checkpoint} is of another recipe ({told}); use that recipe or another --out")

    @property
    def finished(self) -> bool:
        """Whether this very recipe has been trained to its end in this folder."""
        file = self.folder / "finished.json"
        return file.exists() and json.loads(file.read_text())["recipe"] == _fixed_hash(self.recipe)

    def finish(self) -> None:
        """Marks the run as complete; the last thing written."""
        if self.main:
            write_atomically(self.folder / "finished.json", json.dumps({"recipe": _fixed_hash(self.recipe)}) + "\n")


def _lock(folder: Path) -> IO[str]:
    """Holds the folder for this process; the system lets go when the process ends, however it ends."""
    file = (folder / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: workers inherit that, and outlive a killed process
    except OSError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise LaunchError(f"{folder} is in use by process {holder}; wait for it or end it, or use another --out") from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a jsonl file; none if it is missing. A last line that a kill cut off is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    parsed = []
    for number, line in enumerate(lines):
        try:
            parsed.append(json.loads(line))
        except ValueError:
            if number + 1 < len(lines):
                raise CheckpointError(f"{path}: line {number + 1} is damaged; remove it") from None
    return parsed


def git_revision() -> str:
    """The code's git revision, with a plus sign when it has been changed since; "unknown" without git or outside a checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # an installed copy may lie inside somebody else's repository
        return "unknown"
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def _fixed_hash(recipe: Any) -> str:
    fixed = {name: value for name, value in flatten(recipe_dict(recipe)).items() if name not in HARMLESS}
    return json.dumps(fixed, sort_keys=True)


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
