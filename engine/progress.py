"""How long a training is and what falls due when; the sums between two lines of metrics; the line that a person reads."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mimetic.engine.errors import SettingError
from mimetic.engine.objective import StepOutput
from mimetic.engine.runtime import add_up
from mimetic.engine.words import count, duration

if TYPE_CHECKING:
    from accelerate import Accelerator


class Stream(Protocol):
    """What the loop needs of a shard stream (`mimetic.data.stream.ShardStream`)."""

    samples: int
    global_batch: int

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def run(self, stop: int) -> Iterator[dict[str, Any]]:
        """Batches from the present position to batch number `stop`."""
        ...

    def example(self, images: int) -> dict[str, Any]:
        """The first images of the present batch; the position stays."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        ...


@dataclass(frozen=True)
class Plan:
    """The length of the training and what happens when, in optimizer steps."""

    steps: int
    samples_per_step: int
    steps_per_epoch: float
    log_every: int
    checkpoint_every: int
    picture_every: int
    evaluate_every: int

    @classmethod
    def of(cls, recipe: Any, stream: Stream) -> "Plan":
        """From the recipe's one duration and the stream's global batch."""
        train = recipe.train
        per_step, per_epoch = stream.global_batch * train.accumulate, len(stream) / train.accumulate
        if train.steps is not None:
            steps = train.steps
        elif train.epochs is not None:
            steps = int(train.epochs * per_epoch)
        else:
            steps = train.samples // per_step
        if steps < 1:
            raise SettingError(f"the training has no whole step of {per_step} images; raise train.samples or train.epochs")
        return cls(
            steps, per_step, per_epoch, train.log_every or max(1, steps // 100), train.checkpoint_every or max(1, -(-steps // 10)),
            train.picture_every or max(1, -(-steps // 4)), train.evaluate_every or steps,
        )  # fmt: skip

    def due(self, every: int, step: int) -> bool:
        """Whether something that happens `every` so many steps, and at the end, happens after this step."""
        return step % every == 0 or step == self.steps

    def saves(self, step: int) -> bool:
        """Before each evaluation too: what was measured can be had."""
        return self.due(self.checkpoint_every, step) or self.due(self.evaluate_every, step)

    def logs(self, step: int) -> bool:
        """The first step and the tenth too: they tell at once whether and how fast it learns.

        Before each checkpoint as well: a resumed run logs the same means.
        """
        return step in (1, 10) or self.due(self.log_every, step) or self.saves(step)


@dataclass
class Meter:
    """Sums of metrics since the last line; they stay on the device until the line is due."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, torch.Tensor] = field(default_factory=dict)
    good: torch.Tensor | float = 0.0  # micro-batches that were not bad, on the device
    batches: int = 0
    waiting: float = 0.0
    bad: int = 0
    since: float = field(default_factory=time.perf_counter)

    def add(self, outputs: Sequence[StepOutput], bad: torch.Tensor) -> None:
        """The micro-batches of a step; where `bad` is 1 they count for nothing."""
        self.batches += len(outputs)
        self.good = self.good + len(outputs) * (1 - bad)
        for output in outputs:
            for name, value in {"loss": output.loss, **output.metrics}.items():
                self.sums[name] = self.sums.get(name, 0) + torch.where(bad > 0, 0, value.detach().float())
            for name, value in output.counts.items():
                self.counts[name] = self.counts.get(name, 0) + torch.where(bad > 0, 0, value.detach().float())

    def read(self, accelerator: "Accelerator") -> dict[str, float]:
        """Means over batches and ranks, and per histogram how many codes occur and their perplexity. The one wait for the device."""
        means = add_up(torch.stack([total / self.good for total in self.sums.values()])) / accelerator.num_processes
        values = dict(zip(self.sums, means.tolist(), strict=True))
        values["bad"] = float(add_up(torch.tensor(float(self.bad), device=accelerator.device)))
        for name, histogram in self.counts.items():
            share = add_up(histogram).double().cpu()
            share = share / share.sum().clamp(min=1)
            values |= {f"{name}_used": float((share > 0).sum()), f"{name}_perplexity": float(torch.special.entr(share).sum().exp())}
        return values


class Clock:
    """The person's line: what is being learned, how fast, and how long the whole run still takes."""

    def __init__(self, step: int) -> None:
        self.first, self.started, self.told = step, time.perf_counter(), 0.0

    def tell(self, accelerator: "Accelerator", step: int, steps: int, values: dict[str, float]) -> None:
        """Prints it, at most every five seconds."""
        now = time.perf_counter()
        if not accelerator.is_main_process or (now - self.told < 5 and step not in (1, 10, steps)):
            return
        self.told = now
        left = (now - self.started) / max(1, step - self.first) * (steps - step)
        learned = "  ".join(f"{name} {values[name]:.3f}" for name in values if name == "loss" or "accuracy" in name)
        print(f"step {step}/{steps}  {learned}  {values['images_per_second']:.0f} images/s  {count(values['macs_per_second'])}MAC/s "
              f"({values['matrix_share']:.0%} of the matrix rate)  data wait {values['data_wait']:.0%}  {duration(left)} left",
              flush=True)  # fmt: skip
