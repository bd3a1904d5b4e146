"""Checkpoints: `checkpoints/step-00000123/`, complete or absent; `last` and `best` point at two of them.

A checkpoint holds whole tensors by name, whatever engine and number of processes trained them: `model.safetensors` (weights in
fp32), `optimizer.safetensors`, and `manifest.json` with everything else and the hash of every file. Nothing in it is a pickle.
Randomness needs no file: every step draws from (seed, step, process).

Training waits for a copy in memory; a thread writes it under a temporary name, syncs, and renames.
"""

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimetic.engine.config import write_atomically
from mimetic.engine.errors import CheckpointError, disk_is_full

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"
SLACK = 1 << 16  # bytes beside the tensors: the manifest, and room for lines of metrics
Tensors = dict[str, "Tensor"]


class Keeper:
    """Writes checkpoints into one folder, one at a time, and keeps the last ones and the best.

    Args:
        folder: `RUN/checkpoints`.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.failure: str | None = None  # why the last one could not be written
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, files: dict[str, Tensors], state: dict[str, Any], then: Callable[[], None] | None = None) -> None:
        """Begins to write. The tensors belong to the keeper from now on: they lie in the host's memory and nobody changes them.

        Args:
            then: called when the checkpoint is complete.

        Raises:
            Exception: what went wrong with the one before, if it was not a full disk.
        """
        self.wait()
        self.failure = None
        self._thread = threading.Thread(target=self._write, args=(step, files, state, then), name=f"checkpoint {step}")
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is written, or has failed: `failure` tells then.

        Raises:
            Exception: what went wrong, if it was not a full disk.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def mark_best(self, step: int) -> None:
        """Points `best` at the checkpoint of a step, if it has been written."""
        self.wait()
        if (self.folder / _name(step)).exists():
            _point(self.folder, "best", self.folder / _name(step))

    def steps(self) -> list[int]:
        """Of the checkpoints that there are, sound or not."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def forget_after(self, step: int) -> None:
        """Removes the checkpoints of later steps: the run has gone back behind them, and a start after a kill must not take them."""
        self.forget([later for later in self.steps() if later > step])

    def forget(self, steps: Iterable[int]) -> None:
        """Removes the checkpoints of some steps, and links to them."""
        self.wait()
        for step in steps:
            shutil.rmtree(self.folder / _name(step), ignore_errors=True)
        for link in (self.folder / "last", self.folder / "best"):
            if link.is_symlink() and not link.exists():
                link.unlink()

    def _write(self, step: int, files: dict[str, Tensors], state: dict[str, Any], then: Callable[[], None] | None) -> None:
        final, temporary = self.folder / _name(step), self.folder / f".{_name(step)}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            self._require_room(files)
            digests = {name: _write_tensors(temporary / name, tensors) for name, tensors in files.items()}
            body = {"state": state, "files": digests}
            write_atomically(temporary / MANIFEST, _text({"sha256": _digest(body)} | body))
            _sync(temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            _point(self.folder, "last", final)
            self._prune(final)
            if then is not None:
                then()
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if disk_is_full(error):
                self.failure = f"{final} cannot be written, the disk is full ({shutil.disk_usage(self.folder).free >> 20} MiB free)"
            else:
                self._error = error

    def _require_room(self, files: dict[str, Tensors]) -> None:
        """A disk that is filled to the last byte would stop the lines of metrics too."""
        needed = SLACK + sum(value.numel() * value.element_size() for tensors in files.values() for value in tensors.values())
        if shutil.disk_usage(self.folder).free < needed:
            raise OSError(errno.ENOSPC, f"{needed >> 20} MiB are needed")

    def _prune(self, final: Path) -> None:
        """The newest stay, and the best. A later one that was passed over as damaged is no reason to drop this one."""
        best = self.folder / "best"
        spared = best.resolve().name if best.is_symlink() else ""
        older = sorted(path for path in self.folder.glob("step-*") if path.name < final.name and path.name != spared)
        for old in older[: max(0, len(older) - self.keep + 1)]:
            shutil.rmtree(old, ignore_errors=True)


def _write_tensors(path: Path, tensors: Tensors) -> str:
    """Writes a safetensors file, synced to the disk, and returns its hash; Python's lock is free meanwhile, and training goes on."""
    from safetensors.torch import save_file

    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def copies(tensors: Iterable[tuple[str, "Tensor"]], kept: bool) -> Tensors:
    """Host copies that training cannot change; walks through all even where none is kept, since gathering takes all processes."""
    found: Tensors = {}
    for name, value in tensors:
        if kept:
            value = value.detach()
            found[name] = value.to("cpu", copy=True).contiguous()
    return found


def newest(folder: Path, *, tell: bool = True, before: int | None = None) -> tuple[Path, dict[str, Any]] | None:
    """The latest checkpoint whose files are all what was written, with its state; damaged ones are passed over, and named if `tell`.

    Args:
        before: only checkpoints of earlier steps than this.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        if before is not None and path.name >= _name(before):
            continue
        try:
            return path, verify(path)
        except CheckpointError as error:
            if tell:
                print(f"passing over a damaged checkpoint: {error}", flush=True)
    return None


def verify(path: Path) -> dict[str, Any]:
    """Checks the manifest against its own hash and every file against the manifest, and returns the stored state.

    Raises:
        CheckpointError: missing or damaged; the line names the file.
    """
    try:
        written = (path / MANIFEST).read_text()
        manifest = json.loads(written)
        same = written == _text(manifest)  # a flipped bit may change no value: 1E-05 for 1e-05
        if manifest.keys() == {"state", "files"}:
            raise CheckpointError(f"{path} was written by an earlier version, whose checkpoints this one does not read; use another --out")
        told = manifest.pop("sha256")
        files, state = dict(manifest["files"]), dict(manifest["state"])
        if not same or told != _digest(manifest):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: {MANIFEST} is missing or damaged; give a folder like checkpoints/step-00000123") from None
    for name, digest in files.items():
        try:
            same = (path / name).is_file() and hash_of(path / name) == digest
        except OSError:  # a bad disk
            same = False
        if not same:
            raise CheckpointError(f"{path / name} is missing or differs from what was written; use another checkpoint")
    return state


def read(path: Path) -> tuple[Tensors, Tensors]:
    """Weights and optimizer states of a verified checkpoint."""
    from safetensors.torch import load_file

    return load_file(path / WEIGHTS), load_file(path / MOMENTS)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _point(folder: Path, name: str, target: Path) -> None:
    link = folder / f".{name}"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(folder / name)
    _sync(folder)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def hash_of(path: Path) -> str:
    """Sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
