"""The one training loop: every entry script builds an objective and a stream, and calls `train`."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mimetic.engine import checkpoints
from mimetic.engine.config import Invocation, recipe_dict
from mimetic.engine.errors import CheckpointError, DataError, LaunchError, MimeticError, SettingError
from mimetic.engine.objective import Objective, StepOutput
from mimetic.engine.optim import adamw, learning_rate, set_learning_rate
from mimetic.engine.run import Record, Run
from mimetic.engine.runtime import add_up, engine_name, same_on_all_ranks

if TYPE_CHECKING:
    from accelerate import Accelerator

Batches = Iterator[dict[str, Any]]


class Stream(Protocol):
    """What the loop needs of a shard stream (`mimetic.data.stream.ShardStream`)."""

    samples: int
    global_batch: int

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def run(self, stop: int) -> Iterator[dict[str, Any]]:
        """Batches from the present position to batch number `stop`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What is measured while a run goes on, and at its end.

    Attributes:
        stream: opens held-out images of this rank, padded and in order.
        measure: records from the batches of that stream, on the device; called on all ranks, the objective in eval mode.
    """

    stream: Callable[[], Stream]
    measure: Callable[[Batches], list[Record]]


@dataclass(frozen=True)
class Plan:
    """The length of the training and what happens when, in optimizer steps."""

    steps: int
    samples_per_step: int
    log_every: int
    checkpoint_every: int
    picture_every: int
    evaluate_every: int

    @classmethod
    def of(cls, recipe: Any, stream: Stream) -> "Plan":
        """From the recipe's one duration and the stream's global batch."""
        train = recipe.train
        per_step = stream.global_batch * train.accumulate
        if train.steps is not None:
            steps = train.steps
        elif train.epochs is not None:
            steps = int(train.epochs * len(stream) / train.accumulate)
        else:
            steps = train.samples // per_step
        if steps < 1:
            raise SettingError(f"the training has no whole step of {per_step} images; raise train.samples or train.epochs")
        return cls(
            steps, per_step, train.log_every or max(1, steps // 100), train.checkpoint_every or max(1, -(-steps // 10)),
            train.picture_every or max(1, -(-steps // 4)), train.evaluate_every or steps,
        )  # fmt: skip

    def due(self, every: int, step: int) -> bool:
        """Whether something that happens `every` so many steps, and at the end, happens after this step."""
        return step % every == 0 or step == self.steps

    def logs(self, step: int) -> bool:
        """The first step and the tenth too: they tell at once whether and how fast it learns.

        Before each checkpoint as well: what is saved has been seen to be finite, and a resumed run logs the same means.
        """
        return step in (1, 10) or self.due(self.log_every, step) or self.due(self.checkpoint_every, step)


@dataclass
class Meter:
    """Sums of metrics since the last line; they stay on the device until the line is due."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, torch.Tensor] = field(default_factory=dict)
    batches: int = 0
    waiting: float = 0.0
    bad: int = 0
    since: float = field(default_factory=time.perf_counter)

    def add(self, output: StepOutput) -> None:
        """One micro-batch."""
        self.batches += 1
        for name, value in {"loss": output.loss, **output.metrics}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        for name, value in output.counts.items():
            self.counts[name] = self.counts.get(name, 0) + value.detach().float()

    def read(self, accelerator: "Accelerator") -> dict[str, float]:
        """Means over batches and ranks, and per histogram how many codes occur and their perplexity. The one wait for the device."""
        scalars = torch.stack([*(total / self.batches for total in self.sums.values()),
                               torch.tensor(float(self.bad), device=accelerator.device)])  # fmt: skip
        means = (add_up(scalars) / accelerator.num_processes).tolist()
        values = dict(zip([*self.sums, "bad"], means, strict=True))
        values["bad"] *= accelerator.num_processes
        for name, histogram in self.counts.items():
            share = add_up(histogram).double().cpu()
            share = share / share.sum().clamp(min=1)
            values |= {f"{name}_used": float((share > 0).sum()), f"{name}_perplexity": float(torch.special.entr(share).sum().exp())}
        return values


def train(objective: Objective, stream: Stream, *, invocation: Invocation[Any], kind: str, accelerator: "Accelerator",
          title: str, evaluation: Evaluation | None = None, shown: Mapping[str, Any] | None = None) -> Objective:  # fmt: skip
    """Trains to the end of the recipe, from the newest checkpoint of the run folder if there is one.

    Args:
        objective: model and loss, not yet wrapped.
        stream: training batches of this rank.
        kind: of the run, for its records: "pretrain", "classify", "tokenizer".
        title: what the first line says is going to happen.
        evaluation: what is measured on held-out images.
        shown: the batch that pictures are made of, such as held-out images; the default is the training batch at hand.

    Returns:
        The unwrapped objective, trained; the run folder holds the rest.
    """
    recipe, plan = invocation.recipe, Plan.of(invocation.recipe, stream)
    run = Run(invocation, kind, main=accelerator.is_main_process)
    optimizer = adamw(objective, recipe.optim)
    model, optimizer = accelerator.prepare(objective, optimizer)
    torch.manual_seed(recipe.seed + 1 + accelerator.process_index)  # drop path and the like differ between ranks
    try:
        run.claim()
        step, spent, bad = _resume(accelerator, invocation, run, stream)
        _announce(accelerator, title, recipe, plan, stream, step, invocation.out)
        loop = _Loop(accelerator, model, objective, optimizer, stream, recipe, plan, run, step, spent, shown, bad)
        run.open(step)
        accelerator.wait_for_everyone()  # the folder is there for all
        loop.walk(evaluation)
    finally:
        run.close()
    return objective


@dataclass
class _Loop:
    accelerator: Any
    model: Any
    objective: Objective
    optimizer: Any
    stream: Stream
    recipe: Any
    plan: Plan
    run: Run
    step: int
    spent: float  # seconds of training before this start
    shown: Mapping[str, Any] | None
    bad: int = 0

    def walk(self, evaluation: Evaluation | None) -> None:
        """All remaining steps; logs, pictures, checkpoints and evaluations as they fall due."""
        if evaluation and self.step and self.plan.due(self.plan.evaluate_every, self.step) and not self.measured():
            self.evaluate(evaluation, self.spent)  # a kill came between a checkpoint and its evaluation
        started, meter, plan = time.perf_counter(), Meter(), self.plan
        clock = _Clock(self.step)
        batches = self.stream.run(plan.steps * self.recipe.train.accumulate)
        while self.step < plan.steps:
            batch, norm = self.one_step(batches, meter)
            self.step += 1
            seconds = self.spent + time.perf_counter() - started
            if plan.logs(self.step):
                self.log(meter, norm, seconds, clock)
                meter = Meter()
            paused = time.perf_counter()
            if plan.due(plan.picture_every, self.step) and self.accelerator.is_main_process:
                self.run.picture(self.step, self.objective.pictures(_to_device(self.shown or batch, self.accelerator.device)))
            if plan.due(plan.checkpoint_every, self.step):
                self.checkpoint(seconds)
            if evaluation and plan.due(plan.evaluate_every, self.step):
                self.evaluate(evaluation, seconds)
                clock = _Clock(self.step)
            meter.since += time.perf_counter() - paused

    def one_step(self, batches: Iterator[dict[str, Any]], meter: Meter) -> tuple[Mapping[str, Any], Any]:
        """One optimizer step of `accumulate` micro-batches; returns the last batch and the gradient's norm."""
        set_learning_rate(self.optimizer, learning_rate(self.recipe.optim, self.step / self.plan.steps))
        self.objective.begin_step(self.step, self.plan.steps)
        norm = None
        for _ in range(self.recipe.train.accumulate):
            asked = time.perf_counter()
            batch = _to_device(next(batches), self.accelerator.device)
            meter.waiting += time.perf_counter() - asked
            meter.bad += len(batch["bad"])
            self.run.skipped(batch["bad"])
            with self.accelerator.accumulate(self.model):
                output = self.model(batch)
                self.accelerator.backward(output.loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optim.clip or math.inf)
                self.optimizer.step()
                self.optimizer.zero_grad()
            meter.add(output)
        return batch, norm

    def log(self, meter: Meter, norm: Any, seconds: float, clock: "_Clock") -> None:
        """One line of metrics, to the file and to the person; stops all ranks together on NaN and on too many bad samples."""
        values = meter.read(self.accelerator)
        self.bad += int(values.pop("bad"))
        elapsed = time.perf_counter() - meter.since
        images = meter.batches * self.stream.global_batch
        values |= {
            "learning_rate": learning_rate(self.recipe.optim, (self.step - 1) / self.plan.steps), "grad_norm": float(norm or 0.0),
            "images_per_second": images / elapsed, "data_wait": meter.waiting / elapsed,
            "samples": self.step * self.plan.samples_per_step, "seconds": seconds,
        }  # fmt: skip
        if self.bad:
            values["bad_samples"] = self.bad
        self.run.metrics(self.step, values)
        clock.tell(self.accelerator, self.step, self.plan.steps, values)
        if not math.isfinite(values["loss"]):
            raise MimeticError(
                f"the loss is {values['loss']} at step {self.step}; lower optim.lr ({self.recipe.optim.lr}) or optim.clip, or use "
                "train.precision fp32; checkpoints from before are kept"
            )
        read, tolerated = self.step * self.plan.samples_per_step, self.recipe.data.max_bad
        epochs = math.ceil(read / (len(self.stream) * self.stream.global_batch))  # a bad sample comes again in each
        if self.bad > tolerated * self.stream.samples * epochs + 1e-9:
            raise DataError(
                f"{self.bad} of the {read} images read so far did not decode ({self.bad / read:.1%}), data.max_bad tolerates "
                f"{tolerated:.1%} of the data; their keys are in {self.run.folder}/skipped.txt; pack the images again, or raise it"
            )

    def measured(self) -> bool:
        """Whether this step's evaluation has been recorded; the main process knows."""
        known = torch.tensor(float(self.accelerator.is_main_process and self.run.measured(self.step)), device=self.accelerator.device)
        return bool(add_up(known))

    def evaluate(self, evaluation: Evaluation, seconds: float) -> None:
        """Records what is measured, beside step, samples, seconds and parameters."""
        same_on_all_ranks(self.objective.buffers())  # BatchNorm's statistics are each rank's own; rank 0's are what is saved
        self.objective.eval()
        with torch.no_grad():
            records = evaluation.measure(self.held_out(evaluation.stream()))
        self.objective.train()
        parameters = sum(p.numel() for p in self.objective.parameters())
        samples = self.step * self.plan.samples_per_step
        progress: dict[str, Any] = {"step": self.step, "samples": samples, "seconds": round(seconds, 1), "parameters": parameters}
        self.run.record(*(replace(record, **progress) for record in records))
        for r in records:
            self.run.metrics(self.step, {r.metric: r.value, "samples": samples, "seconds": seconds})
            if self.accelerator.is_main_process:
                print(f"{r.metric} {r.value:.4f}" + (f" over {r.count:,} images" if r.count else ""), flush=True)

    def held_out(self, stream: Stream) -> Batches:
        """Its batches on the device. What does not decode is listed, and ends the run when it is more than data.max_bad of them.

        Raises:
            DataError: too many held-out images do not decode, on all ranks together.
        """
        bad = 0
        for batch in stream:
            bad += len(batch["bad"])
            self.run.skipped(batch["bad"])
            yield _to_device(batch, self.accelerator.device)
        bad = int(add_up(torch.tensor(float(bad), device=self.accelerator.device)))
        tolerated = self.recipe.data.max_bad
        told = f"{bad} of the {stream.samples:,} held-out images did not decode, their keys are in {self.run.folder}/skipped.txt"
        if bad > tolerated * stream.samples + 1e-9 or bad == stream.samples:
            raise DataError(f"{told}; data.max_bad tolerates {tolerated:.1%}; pack the images again, or raise it")
        if bad and self.accelerator.is_main_process:
            print(f"{told}; measured without them", flush=True)

    def checkpoint(self, seconds: float) -> None:
        """Everything that the same command needs to go on."""
        state = {
            "step": self.step, "seconds": seconds, "bad": self.bad, "stream": self.stream.state_dict(),
            "recipe": recipe_dict(self.recipe), "inputs": self.run.inputs, "world": self.accelerator.num_processes,
            "engine": engine_name(self.accelerator),
        }  # fmt: skip
        checkpoints.save(self.accelerator, self.run.folder / "checkpoints", self.step, state, self.recipe.train.keep)


class _Clock:
    """The person's line: what is being learned, how fast, and how long the whole run still takes."""

    def __init__(self, step: int) -> None:
        self.first, self.started, self.told = step, time.perf_counter(), 0.0

    def tell(self, accelerator: "Accelerator", step: int, steps: int, values: dict[str, float]) -> None:
        now = time.perf_counter()
        if not accelerator.is_main_process or (now - self.told < 5 and step not in (1, 10, steps)):
            return
        self.told = now
        left = (now - self.started) / (step - self.first) * (steps - step)
        learned = "  ".join(f"{name} {values[name]:.3f}" for name in values if name == "loss" or "accuracy" in name)
        print(f"step {step}/{steps}  {learned}  {values['images_per_second']:.0f} images/s  "
              f"data wait {values['data_wait']:.0%}  {duration(left)} left", flush=True)  # fmt: skip


def duration(seconds: float) -> str:
    """`3 min 20 s`, as a person says it."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _announce(accelerator: "Accelerator", title: str, recipe: Any, plan: Plan, stream: Stream, step: int, out: Path) -> None:
    if accelerator.is_main_process:
        print(f"{title}: {plan.steps} steps of {plan.samples_per_step} images ({plan.steps * plan.samples_per_step:,} images, "
              f"{plan.steps * plan.samples_per_step / stream.samples:.1f} times the {stream.samples:,} in the data)")  # fmt: skip
        print(f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''} ({engine_name(accelerator)}), "
              f"{accelerator.device.type}, {recipe.train.precision}, learning rate {recipe.optim.lr:g}; run folder {out}"
              + (f"; going on after step {step}" if step else ""), flush=True)  # fmt: skip


def _resume(accelerator: "Accelerator", invocation: Invocation[Any], run: Run, stream: Stream) -> tuple[int, float, int]:
    """Step, seconds and bad samples so far: all 0 for a fresh start."""
    folder = invocation.out / "checkpoints"
    path = Path(invocation.resume) if invocation.resume else checkpoints.newest(folder, tell=accelerator.is_main_process)
    if path is None and (damaged := sorted(folder.glob("step-*"))):
        raise CheckpointError(f"all {len(damaged)} checkpoints in {folder} are damaged; remove {invocation.out} to start afresh")
    state: dict[str, Any] = checkpoints.verify(path) if path else {"step": 0}
    _agree(accelerator, state["step"])
    if path is None:
        if invocation.resume is not None:
            raise CheckpointError(f"--resume: no valid checkpoint in {folder}; leave --resume out to start afresh")
        return 0, 0.0, 0
    run.check_same_recipe(state["recipe"], state.get("inputs", {}), path)
    stream.load_state_dict(state["stream"])
    checkpoints.load(accelerator, path, state, engine_name(accelerator))
    return state["step"], state["seconds"], state["bad"]


def _agree(accelerator: "Accelerator", step: int) -> None:
    """All ranks must go on from the same checkpoint: a folder that only some of them see would mix gradients of different steps."""
    steps = torch.zeros(accelerator.num_processes, device=accelerator.device)
    steps[accelerator.process_index] = step
    found = [int(step) for step in add_up(steps).tolist()]
    if len(set(found)) > 1:
        raise LaunchError(f"the processes see different checkpoints (steps {found}); the run folder must be on a disk that all share")


def _to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
