"""Before the first step: all processes agree, the checkpoint to go on from is found, and the person is told what will happen."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mimetic.engine import checkpoints
from mimetic.engine.config import Invocation, flatten, recipe_dict
from mimetic.engine.errors import CheckpointError
from mimetic.engine.meeting import agree, versions
from mimetic.engine.objective import Objective
from mimetic.engine.progress import Plan, Stream
from mimetic.engine.run import Run, is_harmless
from mimetic.engine.runtime import engine_name
from mimetic.engine.survey import Survey, matrix_rate, state_bytes, survey
from mimetic.engine.words import count, memory

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARED = ("what they see", "the run folder must be on a disk that all share")
EXAMPLE = 2  # images that work and memory are counted on


@dataclass(frozen=True)
class Start:
    """What is known before the first step.

    Attributes:
        checkpoint: the folder to go on from and its stored state; None for a fresh start.
        work: of one image.
        matrix_rate: multiply-adds per second that this process's part of the machine reaches.
        state_bytes: of weights, gradients and optimizer on one process.
        told: for plan.json.
    """

    checkpoint: tuple[Path, dict[str, Any]] | None
    work: Survey
    matrix_rate: float
    state_bytes: int
    told: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps that are done already."""
        return self.checkpoint[1]["step"] if self.checkpoint else 0


def look_ahead(accelerator: "Accelerator", objective: Objective, stream: Stream, invocation: Invocation[Any], run: Run) -> Start:
    """Finds out all of it; called on all processes together.

    Raises:
        LaunchError: the processes are not about to do the same.
        CheckpointError: no checkpoint that this recipe could go on from.
    """
    recipe, engine = invocation.recipe, engine_name(accelerator)
    settings = {name: value for name, value in flatten(recipe_dict(recipe)).items() if not is_harmless(name)}
    agree(settings, "their recipes", "start all of them with the same command")
    agree(versions(), "their code", "install the same on all machines")
    agree({"fingerprint": stream.state_dict().get("fingerprint")} | run.inputs, "their data", "give all machines the same index and files")
    checkpoint = _checkpoint(accelerator, invocation, run)
    if checkpoint is not None:
        _refuse_other_shapes(objective, checkpoint[0])
    work = survey(objective, to_device(stream.example(EXAMPLE), accelerator.device))
    rate = matrix_rate(accelerator.device, recipe.train.precision)
    held = state_bytes(objective, engine, accelerator.num_processes, recipe.train.ema_decay > 0)
    told = {"processes": accelerator.num_processes, "engine": engine, "device": accelerator.device.type, "versions": versions(),
            "precision": recipe.train.precision, "macs_per_image": work.macs, "matrix_rate": rate}  # fmt: skip
    return Start(checkpoint, work, rate, held, told)


def announce(accelerator: "Accelerator", title: str, invocation: Invocation[Any], plan: Plan, stream: Stream, start: Start) -> None:
    """What will happen, in a few lines."""
    if not accelerator.is_main_process:
        return
    recipe, world, per_step = invocation.recipe, accelerator.num_processes, plan.samples_per_step
    images, passes = plan.steps * per_step, plan.steps * per_step / stream.samples
    print(f"{title}: {plan.steps} steps of {per_step} images ({images:,} images, {passes:.1f} times the {stream.samples:,} in the data, "
          f"{plan.steps_per_epoch:g} steps each)")  # fmt: skip
    print(f"{world} process{'es' if world > 1 else ''} ({engine_name(accelerator)}), {accelerator.device.type}, {recipe.train.precision}"
          f"{', compiled' if recipe.train.compile else ''}; {per_step} images a step = {recipe.data.batch_size} x {world} x "
          f"{recipe.train.accumulate} (data.batch_size x processes x train.accumulate); "
          f"learning rate {recipe.optim.lr:g}, {recipe.optim.lr * 256 / per_step:.3g} per 256 images")  # fmt: skip
    kept = start.work.constant_bytes + start.work.saved_bytes * recipe.data.batch_size
    print(f"memory of a process, estimated: {memory(start.state_bytes)} for weights, gradients and optimizer, {memory(kept)} for "
          f"{recipe.data.batch_size} images; work: {count(start.work.macs)}MAC an image forward and backward, on a machine of "
          f"{count(start.matrix_rate)}MAC/s a process")  # fmt: skip
    going_on = f"; going on after step {start.step}" if start.step else ""
    print(f"run folder {invocation.out}{going_on}", flush=True)
    if invocation.dry_run:
        print("a dry run ends here; nothing was written", flush=True)


def _checkpoint(accelerator: "Accelerator", invocation: Invocation[Any], run: Run) -> tuple[Path, dict[str, Any]] | None:
    folder = invocation.out / "checkpoints"
    if invocation.resume:
        found: tuple[Path, dict[str, Any]] | None = (Path(invocation.resume), checkpoints.verify(Path(invocation.resume)))
    else:
        found = checkpoints.newest(folder, tell=accelerator.is_main_process)
    if found is None and (damaged := sorted(folder.glob("step-*"))):
        raise CheckpointError(f"all {len(damaged)} checkpoints in {folder} are damaged or of an earlier version; remove {invocation.out} "
                              "to start afresh")  # fmt: skip
    agree({"the newest valid checkpoint": found[1]["step"] if found else None}, *SHARED)
    if found is None:
        if invocation.resume is not None:
            raise CheckpointError(f"--resume: no valid checkpoint in {folder}; leave --resume out to start afresh")
        return None
    path, state = found
    run.check_same_recipe(state, path, accelerator.num_processes, invocation.allow)
    before = state.get("versions", {})
    if accelerator.is_main_process and (changed := {n: (before.get(n), v) for n, v in versions().items() if before.get(n) != v}):
        told = ", ".join(f"{name} {was} then, {now} now" for name, (was, now) in changed.items())
        print(f"{path} was written by other code ({told}); what follows may differ in its last digits", flush=True)
    return found


def _refuse_other_shapes(objective: Objective, path: Path) -> None:
    """A setting that `--allow` admits may still change what weights there are."""
    from safetensors import safe_open

    with safe_open(path / checkpoints.WEIGHTS, "pt") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    ours = {name: tuple(value.shape) for name, value in objective.state_dict().items()}
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise CheckpointError(f"{path} has {name} of shape {theirs.get(name)}, this run {ours.get(name)}; use another --out")


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Its tensors on the device, everything else as it is."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
