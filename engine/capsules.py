"""Capsules: all that it takes to compute one bad step again, alone.

`RUN/capsules/step-00000123/` holds the weights before the step (`model.safetensors`), of each process its batches
(`process-0.safetensors`) and what it saw (`process-0.json`), `recipe.yaml`, and `capsule.json`: world, versions, the reason. Randomness
needs no file: every step draws from (seed, step, process). `mimetic replay` computes the step again.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from mimetic.engine.checkpoints import WEIGHTS, Tensors, copies, hash_of
from mimetic.engine.config import recipe_dict, write_atomically
from mimetic.engine.errors import CheckpointError, disk_is_full
from mimetic.engine.meeting import versions

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mimetic.engine.guard import Pulse
    from mimetic.engine.run import Run
    from mimetic.engine.sharding import Sharing

CAPSULE, RECIPE = "capsule.json", "recipe.yaml"


@dataclass
class Taken:
    """What one process computed a step from, kept until the step is known to be good.

    Attributes:
        step: its number, counted from 0.
        batches: the micro-batches, on the device.
        losses: theirs, on the device.
    """

    step: int
    batches: list[Mapping[str, Any]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def add(self, batch: Mapping[str, Any], loss: Tensor) -> None:
        """One micro-batch."""
        self.batches.append(batch)
        self.losses.append(loss)


def write_capsule(run: "Run", accelerator: "Accelerator", sharing: "Sharing", taken: Taken, pulse: "Pulse", plan_steps: int) -> Path | None:
    """Called by all processes together, before anything has changed the weights; complete or absent.

    Returns:
        The capsule, on every process; None where the disk is full.
    """
    folder = run.folder / "capsules" / f"step-{taken.step + 1:08d}"
    temporary = folder.with_name(f".{folder.name}")
    weights = copies(sharing.weights(), kept=accelerator.is_main_process)
    rank, written = accelerator.process_index, 1.0
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        _write_part(temporary, rank, taken)
        if accelerator.is_main_process:
            from safetensors.torch import save_file

            save_file(weights, temporary / WEIGHTS)
            write_atomically(temporary / RECIPE, yaml.safe_dump(recipe_dict(run.recipe), sort_keys=False))
            told = {"kind": run.kind, "step": taken.step, "steps": plan_steps,
                    "world": accelerator.num_processes, "norm": str(pulse.norm), "limit": str(pulse.limit),
                    "device": accelerator.device.type, "threads": torch.get_num_threads(), "versions": versions(),
                    "weights": hash_of(temporary / WEIGHTS)}  # fmt: skip
            write_atomically(temporary / CAPSULE, json.dumps(told, indent=1))
    except Exception as error:
        if not disk_is_full(error):
            raise
        written = 0.0
    return _finish(accelerator, temporary, folder, written)


def _write_part(folder: Path, rank: int, taken: Taken) -> None:
    from safetensors.torch import save_file

    tensors = {f"{number}.{name}": value for number, batch in enumerate(taken.batches) for name, value in batch.items()
               if isinstance(value, Tensor)}  # fmt: skip
    file = folder / f"process-{rank}.safetensors"
    save_file(copies(tensors.items(), kept=True), file)
    told = {"keys": [list(batch["keys"]) for batch in taken.batches], "losses": [float(loss).hex() for loss in taken.losses],
            "tensors": hash_of(file)}  # fmt: skip
    write_atomically(folder / f"process-{rank}.json", json.dumps(told, indent=1))


def _finish(accelerator: "Accelerator", temporary: Path, folder: Path, written: float) -> Path | None:
    from mimetic.engine.runtime import add_up

    whole = float(add_up(torch.tensor(written, device=accelerator.device))) == accelerator.num_processes
    if accelerator.is_main_process:
        if whole:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        else:
            shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    return folder if whole else None


@dataclass(frozen=True)
class Capsule:
    """A capsule, read.

    Attributes:
        told: what `capsule.json` says.
        weights: before the step.
        rank: of the process whose batches these are.
        batches: its micro-batches, without their keys.
        keys: theirs.
        losses: what the training computed from them.
    """

    told: dict[str, Any]
    weights: Tensors
    rank: int
    batches: list[dict[str, Any]]
    keys: list[list[str]]
    losses: list[float]


def read_capsule(folder: Path, rank: int | None) -> Capsule:
    """Opens a capsule, hashes checked.

    Args:
        rank: whose batches; the default is the first process with a loss that is not finite, else the first.

    Raises:
        CheckpointError: no capsule, a damaged one, or no such process in it.
    """
    from safetensors.torch import load_file

    try:
        told = json.loads((folder / CAPSULE).read_text())
        parts = [json.loads((folder / f"process-{number}.json").read_text()) for number in range(told["world"])]
        losses = [[float.fromhex(loss) for loss in part["losses"]] for part in parts]
        if not {"kind", "step", "steps", "norm", "limit", "device", "threads", "weights"} <= told.keys():
            raise KeyError
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder} holds no whole capsule; give a folder like RUN/capsules/step-00000123") from None
    if rank is None:
        rank = next((number for number, found in enumerate(losses) if not all(map(math.isfinite, found))), 0)
    if not 0 <= rank < len(parts):
        raise CheckpointError(f"--process {rank}: the capsule is of {len(parts)} processes, 0 to {len(parts) - 1}")
    file = folder / f"process-{rank}.safetensors"
    for path, digest in ((folder / WEIGHTS, told["weights"]), (file, parts[rank]["tensors"])):
        if not path.is_file() or hash_of(path) != digest:
            raise CheckpointError(f"{path} is missing or differs from what was written; the capsule cannot be replayed")
    batches: list[dict[str, Any]] = [{} for _ in losses[rank]]
    for name, value in load_file(file).items():
        number, _, field_name = name.partition(".")
        batches[int(number)][field_name] = value
    return Capsule(told, load_file(folder / WEIGHTS), rank, batches, parts[rank]["keys"], losses[rank])
