"""The run folder: config.yaml, metrics.jsonl, records.jsonl, tensorboard/, samples/*.png, checkpoints/."""

import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

from mimetic.engine.config import Invocation, default_settings, flatten, recipe_dict, recipe_hash, write_atomically
from mimetic.engine.errors import CheckpointError, LaunchError, SettingError, disk_is_full

# Settings that change no number of a training in which all goes well: a checkpoint may be continued under others.
HARMLESS = ("data.workers", "data.max_bad", "data.cache", "data.cache_gb", "train.log_every", "train.checkpoint_every", "train.keep",
            "train.picture_every", "train.evaluate_every", "guard.bad_step", "guard.max_skips", "guard.max_rewinds",
            "expected.source", "expected.loss", "expected.masked_accuracy", "tokenizer.accept_collapsed")  # fmt: skip
FIXED = ("data.", "seed", "labels.", "backbone.name", "backbone.image_size", "backbone.overrides", "dvae.vocab_size", "dvae.stride",
         "dvae.width", "dvae.code_width", "dvae.depth", "dvae.loss", "vqkd.vocab_size", "vqkd.code_width", "vqkd.decoder_depth",
         "aggregation.", "mae.decoder_")  # fmt: skip  # no --allow admits another: weights or places would not fit
STEP = ("data.batch_size", "train.accumulate")  # may change with the number of processes, as long as a step has as many images
# Settings that name a folder, and the file in it that tells whether its content is still the same.
INPUTS = ("data.index", "evaluate_on", "evaluation.index", "tokenizer.path", "tokenizer.cache", "init.path", "distill.teacher",
          "teacher.path", "teacher.weights")  # fmt: skip
CONTENT = ("index.json", "tokens.json", "model.safetensors", "tokenizer/model.safetensors", "backbone/model.safetensors",
           "residual_cnn/model.safetensors")  # fmt: skip
BEGUN = ("samples", "skipped.txt")  # what a start that failed early may leave, beside hidden files


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
        self.without = " without --resume" if invocation.resume else ""  # which would go back again
        self._board: Any = None
        self._lock: IO[str] | None = None

    def claim(self) -> None:
        """Holds a folder that a run has been in, before anything in it is read: a run that goes on changes its checkpoints.

        Raises:
            LaunchError: another process is training into it.
        """
        if self.main and (self.folder / ".lock").exists():
            self._lock = _lock(self.folder)

    def open(self, step: int, plan: dict[str, Any] | None = None) -> None:
        """Creates the folder, or continues it: lines of metrics after `step` belong to work that a kill undid.

        Args:
            step: steps that are done.
            plan: what will happen, for plan.json.

        Raises:
            SettingError: the folder holds something else, a finished run of another recipe, or cannot be written.
            LaunchError: another process is training into it.
        """
        if not self.main:
            return
        self._refuse_foreign()
        if not step and (self.folder / "finished.json").exists():
            raise SettingError(f"{self.folder} holds a finished run of another recipe or of other data; use another --out")
        try:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            self._lock = self._lock or _lock(self.folder)
        except OSError as error:
            if disk_is_full(error):
                raise
            raise SettingError(f"--out {self.folder}: {error.strerror}; give a folder that can be written") from None
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(recipe_dict(self.recipe), sort_keys=False))
        (self.folder / "finished.json").unlink(missing_ok=True)  # it goes on, with more steps perhaps
        write_atomically(self.folder / "plan.json", json.dumps(plan or {}, indent=1))
        self.undo(step)
        if not step:
            (self.folder / "events.jsonl").unlink(missing_ok=True)
        self.event("start", step, f"going on after step {step}" if step else "from the beginning")
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1 if step else None, flush_secs=20)

    def undo(self, step: int) -> None:
        """Leaves out lines of metrics and records after a step, and of an evaluation after it that a kill met: it will be done again."""
        if not self.main:
            return
        lines = {name: [line for line in read_lines(self.folder / name) if line["step"] <= step and step]
                 for name in ("metrics.jsonl", "records.jsonl")}  # fmt: skip
        if all(record["step"] != step for record in lines["records.jsonl"]):
            lines["metrics.jsonl"] = [line for line in lines["metrics.jsonl"] if line["step"] != step or "learning_rate" in line]
        for name, kept in lines.items():
            write_atomically(self.folder / name, "".join(json.dumps(line) + "\n" for line in kept))

    def event(self, kind: str, step: int, text: str) -> None:
        """Appends to events.jsonl: starts, checkpoints, bad steps, signals; these stay whatever is undone."""
        if self.main:
            _append(self.folder / "events.jsonl", {"time": _now(), "step": step, "kind": kind, "text": text})

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Appends a line to metrics.jsonl and points to TensorBoard."""
        if self.main:
            _append(self.folder / "metrics.jsonl", {"step": step} | values)
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def record(self, *records: Record) -> None:
        """Appends lines to records.jsonl, all or none, with the recipe's hash, the code's revision and the seed."""
        if self.main:
            origin = {"time": _now(), "kind": self.kind, "recipe": recipe_hash(self.recipe),
                      "revision": git_revision(), "seed": self.recipe.seed}  # fmt: skip
            _append(self.folder / "records.jsonl", *(origin | dataclasses.asdict(record) for record in records))

    def measured(self, step: int) -> bool:
        """Whether an evaluation after this step has been recorded."""
        return any(line["step"] == step for line in read_lines(self.folder / "records.jsonl"))

    def is_best(self, metric: str, records: Sequence[Record], lowest: bool = False) -> bool:
        """Whether none of the evaluations so far has a higher value of a metric than these records, or a lower one."""
        sign = -1 if lowest else 1
        before = [sign * line["value"] for line in read_lines(self.folder / "records.jsonl") if line["metric"] == metric]
        return any(record.metric == metric and sign * record.value >= max(before, default=-math.inf) for record in records)

    def picture(self, step: int, image_HWC: np.ndarray | None) -> None:
        """Saves samples/step-00000123.png and shows it in TensorBoard."""
        if self.main and image_HWC is not None:
            from PIL import Image

            Image.fromarray(image_HWC).save(self.folder / "samples" / f"step-{step:08d}.png")
            self._board.add_image("samples", image_HWC, step, dataformats="HWC")

    def skipped(self, keys: list[str]) -> None:
        """Lists samples that do not decode in skipped.txt, once each; every process lists its own."""
        if not keys:
            return
        file = self.folder / "skipped.txt"
        known = set(file.read_text().splitlines()) if file.exists() else set()
        with file.open("a") as lines:
            lines.write("".join(f"{key}\n" for key in dict.fromkeys(keys) if key not in known))

    def close(self) -> None:
        """Flushes TensorBoard and lets go of the folder."""
        if self._board is not None:
            self._board.close()
        if self._lock is not None:
            self._lock.close()

    @functools.cached_property
    def inputs(self) -> dict[str, str]:
        """What the settings of INPUTS name, by content: data and weights may change under the same path."""
        settings, found = flatten(recipe_dict(self.recipe)), {}
        mixed = {f"data.mix.{path}": path for path in getattr(self.recipe.data, "mix", {})}
        for name, place in {name: settings.get(name) for name in INPUTS}.items() | mixed.items():
            path = Path((place or os.devnull).removeprefix("transformers:"))
            files = [file for file in (path, *(path / inner for inner in CONTENT)) if file.is_file()]
            if files:
                with files[0].open("rb") as content:
                    found[name] = hashlib.file_digest(content, "sha256").hexdigest()
        return found

    def check_same_recipe(self, state: dict[str, Any], checkpoint: Path, world: int, allow: Sequence[str] = ()) -> None:
        """Refuses a checkpoint of another recipe or of other data; settings that change no number may differ.

        Args:
            state: what the checkpoint stored.
            checkpoint: its folder.
            world: processes now; they may be others, if a step has as many images as before.
            allow: settings that may differ.

        Raises:
            CheckpointError: names the settings that differ, with both values, or the input that changed.
        """
        ours = flatten(recipe_dict(self.recipe))
        theirs = self._completed(flatten(state["recipe"]), ours)
        (before, was), (now, it_is) = _images_a_step(theirs, state["world"]), _images_a_step(ours, world)
        if before != now and not set(STEP) & set(allow):
            raise CheckpointError(f"{checkpoint} had {before} images a step ({was}), this run has {now} ({it_is}); "
                                  f"{_cure(before, ours, world)}")  # fmt: skip
        names = [name for name in theirs | ours if theirs.get(name) != ours.get(name) and not is_harmless(name) and name not in STEP]
        changed = [name for name in _changed(state.get("inputs", {}), self.inputs) if name not in names]
        refused = [name for name in names + changed if name not in allow or name.startswith(FIXED)]
        if refused:
            told = "; ".join(f"{name} {theirs.get(name)} there, {ours.get(name)} here" if name in names else
                             f"{name} {ours.get(name)} is not what it was then" for name in refused)  # fmt: skip
            fixed = any(name.startswith(FIXED) for name in refused)  # weights or the position in the data would mean nothing
            cure = "" if fixed else f", or {' '.join(f'--allow {name}' for name in refused)}"
            raise CheckpointError(f"{checkpoint} is of another recipe or other data ({told}); use those, or another --out{cure}")
        if self.recipe.train.steps is not None and state["step"] > self.recipe.train.steps:
            raise CheckpointError(f"{checkpoint} has done {state['step']} steps, train.steps is {self.recipe.train.steps}; raise it")

    @property
    def finished(self) -> bool:
        """Whether this very recipe has been trained to its end in this folder, on what its settings name now.

        Raises:
            SettingError: the folder holds something else than a run.
        """
        self._refuse_foreign()
        try:
            done = json.loads((self.folder / "finished.json").read_text())
            ours = json.loads(_fixed(self.recipe))
            same = self._completed(json.loads(done["recipe"]), ours) == ours
        except (OSError, ValueError, TypeError, KeyError):  # none, or damaged: the checkpoints tell
            return False
        return same and not _changed(done.get("inputs", {}), self.inputs)

    def finish(self) -> None:
        """Marks the run as complete; the last thing written."""
        if self.main:
            done = {"recipe": _fixed(self.recipe), "inputs": self.inputs}
            lines = read_lines(self.folder / "metrics.jsonl")
            self.event("finished", lines[-1]["step"] if lines else 0, "trained to the end of the recipe")
            write_atomically(self.folder / "finished.json", json.dumps(done) + "\n")

    def _completed(self, stored: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
        """Stored settings, with the defaults of those that did not exist when they were stored."""
        defaults = default_settings(type(self.recipe))
        return {name: defaults[name] for name in ours if name not in stored and name in defaults} | stored

    def _refuse_foreign(self) -> None:
        """Nothing of anybody's is overwritten: a folder that is neither new nor a run is refused."""
        try:
            found = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
            settings = yaml.safe_load((self.folder / "config.yaml").read_text()) if "config.yaml" in found else {}
        except (OSError, ValueError, yaml.YAMLError):
            settings = {}
        if isinstance(settings, dict) and {"data", "seed"} <= settings.keys():
            return
        if foreign := sorted(name for name in found if name not in BEGUN and not name.startswith(".")):
            raise SettingError(f"--out {self.folder} holds {foreign[0]} and is no run; give a new folder, so that nothing is overwritten")


def is_harmless(name: str) -> bool:
    """Whether a dotted setting, or an entry of one, changes no number of the training."""
    return name in HARMLESS or name.startswith(tuple(f"{setting}." for setting in HARMLESS))


def _images_a_step(settings: dict[str, Any], world: int) -> tuple[int, str]:
    batch, micro_batches = (settings[name] for name in STEP)
    return batch * world * micro_batches, f"{batch} x {world} process{'es' if world > 1 else ''} x {micro_batches}"


def _cure(images: int, ours: dict[str, Any], world: int) -> str:
    """Which settings give as many images a step on this many processes."""
    if images % world:
        return f"no batch size gives that on {world} processes; use a number of processes that divides {images}"
    each, batch = images // world, ours[STEP[0]]
    if each % batch == 0:
        return f"--train.accumulate {each // batch} keeps them"
    return f"--data.batch_size {each} --train.accumulate 1 keeps them"


def _changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Names of inputs that have another content; one that is gone is no other content."""
    return [name for name in before if name in now and before[name] != now[name]]


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


def _fixed(recipe: Any) -> str:
    fixed = {name: value for name, value in flatten(recipe_dict(recipe)).items() if not is_harmless(name)}
    return json.dumps(fixed, sort_keys=True)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")


def _append(path: Path, *lines: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
