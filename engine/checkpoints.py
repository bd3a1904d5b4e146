"""Checkpoints: `checkpoints/step-00000123/`, complete or absent, and `checkpoints/last` pointing at the newest.

Accelerate writes model, optimizer and random states for every engine. Around it: a temporary name, a manifest of hashes, fsync,
rename. The manifest is verified before anything is read back; DeepSpeed's files are pickles, so only checkpoints of one's own
run folder should ever be resumed.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimetic.engine.config import write_atomically
from mimetic.engine.errors import CheckpointError, disk_is_full

if TYPE_CHECKING:
    from accelerate import Accelerator

MANIFEST = "manifest.json"


def save(accelerator: "Accelerator", folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Saves on all ranks and returns the checkpoint's folder.

    Raises:
        CheckpointError: the disk is full; the last good checkpoint is named and untouched.
    """
    final, temporary = folder / f"step-{step:08d}", folder / f".step-{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(temporary), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _seal(temporary, state)
    except Exception as error:
        free = shutil.disk_usage(folder).free
        if not disk_is_full(error):
            raise
        last = newest(folder)
        kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final} cannot be written, the disk is full ({free >> 20} MiB free); {kept}; free some space and give the same command"
        ) from None
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _point_last(folder, final)
        older = sorted(path for path in folder.glob("step-*") if path.name < final.name)
        for old in older[: max(0, len(older) - keep + 1)]:  # a later one that was passed over is no reason to drop this one
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def newest(folder: Path, *, tell: bool = True) -> Path | None:
    """The newest checkpoint whose manifest holds; damaged ones are passed over and, with `tell`, named."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            if tell:
                print(f"passing over a damaged checkpoint: {error}", flush=True)
            continue
        return path
    return None


def verify(path: Path) -> dict[str, Any]:
    """Checks every file against the manifest and returns the stored state.

    Raises:
        CheckpointError: missing or damaged; the line names the file.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, state = dict(manifest["files"]), dict(manifest["state"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: {MANIFEST} is missing or damaged; give a folder like checkpoints/step-00000123") from None
    for name, digest in files.items():
        if not (path / name).exists() or _sha256(path / name) != digest:
            raise CheckpointError(f"{path / name} is missing or differs from what was written; use another checkpoint")
    return state


def load(accelerator: "Accelerator", path: Path, state: dict[str, Any], engine: str) -> None:
    """Restores model, optimizer and random states from a verified checkpoint.

    Raises:
        CheckpointError: written by another engine or another number of processes.
    """
    theirs, ours = (state["world"], state["engine"]), (accelerator.num_processes, engine)
    if theirs != ours:
        told = [f"{world} process{'es' if world > 1 else ''} ({name})" for world, name in (theirs, ours)]
        raise CheckpointError(f"{path} was written by {told[0]}, this run has {told[1]}; start it as it was, or use another --out")
    accelerator.load_state(str(path))


def _seal(folder: Path, state: dict[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    digests = {str(path.relative_to(folder)): _sha256(path) for path in files}
    write_atomically(folder / MANIFEST, json.dumps({"state": state, "files": digests}, indent=1))


def _point_last(folder: Path, target: Path) -> None:
    link = folder / ".last"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(folder / "last")
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
