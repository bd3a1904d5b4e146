"""The one training loop: every entry script builds an objective and a stream, and calls `train`."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mimetic.engine import checkpoints
from mimetic.engine.activations import ActivationScale
from mimetic.engine.capsules import Taken, write_capsule
from mimetic.engine.config import Invocation, recipe_dict
from mimetic.engine.errors import CheckpointError, DataError, MimeticError
from mimetic.engine.guard import Guard, Pulse
from mimetic.engine.meeting import agree, versions
from mimetic.engine.objective import Objective, reseed
from mimetic.engine.optim import ema_decay, learning_rate, set_rates, update_and_weight_squares
from mimetic.engine.progress import Clock, Meter, Plan, Stream
from mimetic.engine.run import Record, Run
from mimetic.engine.runtime import add_up, autocast, engine_name, same_on_all_ranks
from mimetic.engine.sharding import Sharing, averaged, exchange, share
from mimetic.engine.signals import SIGNALS
from mimetic.engine.starting import SHARED, Start, announce, look_ahead, to_device

if TYPE_CHECKING:
    from accelerate import Accelerator

Batches = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
    """What is measured while a run goes on, and at its end.

    Attributes:
        stream: opens held-out images of this rank, padded and in order.
        measure: records from the batches of that stream, on the device; called on all ranks, the objective in eval mode.
        best: the metric whose highest value marks the best checkpoint.
        lowest: its lowest value does, as of a loss.
    """

    stream: Callable[[], Stream]
    measure: Callable[[Batches], list[Record]]
    best: str = ""
    lowest: bool = False


def train(objective: Objective, stream: Stream, *, invocation: Invocation[Any], kind: str, accelerator: "Accelerator",
          title: str, evaluation: Evaluation | None = None, shown: Mapping[str, Any] | None = None,
          look: Callable[[], None] | None = None) -> bool:  # fmt: skip
    """Trains to the end of the recipe, from the newest checkpoint of the run folder if there is one.

    Args:
        objective: model and loss, not yet wrapped; trained in place, with whole weights at the end.
        stream: training batches of this rank.
        kind: of the run, for its records: "pretrain", "classify", "tokenizer".
        title: what the first line says is going to happen.
        evaluation: what is measured on held-out images.
        shown: the batch that pictures are made of, such as held-out images; the default is the training batch at hand.
        look: called once it is said what will happen, if no checkpoint is there to go on from: what it raises stops the start, with
            nothing left behind.

    Returns:
        Whether it was trained; a dry run only says what would happen.
    """
    recipe, plan = invocation.recipe, Plan.of(invocation.recipe, stream)
    run = Run(invocation, kind, main=accelerator.is_main_process)
    try:
        run.claim()
        objective.to(accelerator.device)
        autocast(objective, accelerator.device, recipe.train.precision)
        start = look_ahead(accelerator, objective, stream, invocation, run)
        announce(accelerator, title, invocation, plan, stream, start)
        if look and start.checkpoint is None:
            look()
        if invocation.dry_run:
            return False
        sharing = share(accelerator, objective, recipe.optim, recipe.train.accumulate)
        loop = _Loop(accelerator, sharing, objective, stream, recipe, plan, run, start, shown, evaluation)
        run.open(start.step, {"title": title, "steps": plan.steps, "samples_per_step": plan.samples_per_step,
                              "steps_per_epoch": plan.steps_per_epoch} | start.told)  # fmt: skip
        accelerator.wait_for_everyone()  # the folder is there for all
        loop.walk()
    finally:
        run.close()
    return True


class _Loop:
    """The state of a training, and its steps.

    Attributes:
        step: steps that are done; also the number, counted from 0, of the one at hand.
        seconds: of training, over all starts of the run.
    """

    def __init__(self, accelerator: "Accelerator", sharing: Sharing, objective: Objective, stream: Stream, recipe: Any, plan: Plan,
                 run: Run, start: Start, shown: Mapping[str, Any] | None, evaluation: Evaluation | None) -> None:  # fmt: skip
        self.accelerator, self.sharing, self.objective, self.stream = accelerator, sharing, objective, stream
        self.recipe, self.plan, self.run, self.work, self.shown, self.evaluation = recipe, plan, run, start, shown, evaluation
        self.device = accelerator.device
        self.guard = Guard(recipe.guard, self.device, lag=1 if self.device.type == "cuda" else 0)
        self.keeper = checkpoints.Keeper(run.folder / "checkpoints", recipe.train.keep)
        self.scale = ActivationScale(objective)
        saved = objective.state_dict()
        self.statistics = [b for name, b in objective.named_buffers() if name in saved]  # BatchNorm's, mostly
        self.taken: list[Taken] = []  # steps whose verdict is not known yet
        self.went_back_to: int | None = None
        self.asked = self.save_soon = False
        self.step, self.bad, self.skips, self.rewinds, self.before = 0, 0, 0, 0, 0.0
        self.abandoned = [step for step in self.keeper.steps() if step > start.step]  # of a branch that --resume CHECKPOINT leaves
        if start.checkpoint is not None:
            state = self.restore(*start.checkpoint)
            self.stream.load_state_dict(state["stream"])
            self.before, self.bad, self.skips, self.rewinds = (state[name] for name in ("seconds", "bad", "skips", "rewinds"))
        self.started = time.perf_counter()
        if recipe.train.compile:
            objective.compile()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    # The walk

    def walk(self) -> None:
        """All remaining steps; at the end the objective has the weights that are kept."""
        try:
            if self.evaluation and self.step and self.plan.due(self.plan.evaluate_every, self.step) and not self.measured():
                self.evaluate(self.evaluation)  # a kill came between a checkpoint and its evaluation
            while self.step < self.plan.steps:
                self.on()
            self.keeper.wait()
            if self.keeper.failure:
                raise CheckpointError(self.unsaved())
            if self.recipe.train.ema_decay:
                exchange(self.sharing)  # the mean is what is kept
            self.sharing.consolidate()
        finally:
            SIGNALS.stepping = False
            self.keeper.wait()

    def on(self) -> None:
        """Step after step, to the end of the training or until a bad step sends it back to a checkpoint."""
        meter, clock, plan, parts = Meter(), Clock(self.step), self.plan, self.recipe.train.accumulate
        batches = self.stream.run(self.batches_read() + (plan.steps - self.step) * parts)
        while self.step < plan.steps:
            SIGNALS.stepping = True
            batch = self.one_step(batches, meter)
            if batch is None:
                return
            saves = plan.saves(self.step) or self.asked or self.save_soon
            if plan.logs(self.step) or saves:
                self.log(meter, clock)
                meter = Meter()
            paused = time.perf_counter()
            if saves and self.save():
                return
            if plan.due(plan.picture_every, self.step):
                self.picture(batch)
            if self.evaluation and plan.due(plan.evaluate_every, self.step):
                self.evaluate(self.evaluation)
                clock = Clock(self.step)
            meter.since += time.perf_counter() - paused

    def batches_read(self) -> int:
        """Batches of this rank that lie behind, counted over epochs."""
        position = self.stream.state_dict()
        return position["epoch"] * len(self.stream) + position["samples"] // self.stream.global_batch

    def one_step(self, batches: Batches, meter: Meter) -> Mapping[str, Any] | None:
        """One optimizer step of `accumulate` micro-batches; returns the last of them, or None when the run went back instead."""
        train, number = self.recipe.train, self.step
        set_rates(self.sharing.optimizer, self.rate(number), ema_decay(train.ema_decay, number))
        reseed(self.recipe.seed, number, self.accelerator.process_index)
        self.objective.begin_step(number, self.plan.steps)
        taken, statistics = Taken(number), [buffer.clone() for buffer in self.statistics]
        outputs, listening = [], self.plan.logs(number + 1) and not train.compile  # hooks would have it compiled anew
        for micro in range(train.accumulate):
            batch = self.next_batch(batches, meter)
            last = micro + 1 == train.accumulate
            with self.sharing.micro_batch(last), self.scale.listening(listening):
                outputs.append(self.sharing.model(batch))
                self.sharing.backward(outputs[-1].loss, last)
            taken.add(batch, outputs[-1].loss.detach())
        self.norm = self.sharing.gradient_norm()
        self.taken.append(taken)
        bad = self.guard.judge(number, self.norm, bool(SIGNALS.number))
        meter.add(outputs, bad)
        for buffer, before in zip(self.statistics, statistics, strict=True):
            buffer.copy_(torch.where(bad > 0, before, buffer))
        if self.hear():
            return None
        self.sharing.update(bad)
        if self.objective.wants_end_step:  # rarely, so it may wait for the device
            if self.hear(all_of_them=True):
                return None
            self.objective.end_step(sound=not float(bad))
        self.step += 1
        return batch

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return learning_rate(self.recipe.optim, step / self.plan.steps)

    def next_batch(self, batches: Batches, meter: Meter) -> dict[str, Any]:
        """The next micro-batch, on the device."""
        asked = time.perf_counter()
        batch = to_device(next(batches), self.device)
        meter.waiting += time.perf_counter() - asked
        meter.bad += len(batch["bad"])
        self.run.skipped(batch["bad"])
        return batch

    # Numbers going wrong

    def hear(self, all_of_them: bool = False) -> bool:
        """Takes note of what is known of the last steps; returns whether the run went back to a checkpoint."""
        while (pulse := self.guard.hear(all_of_them)) is not None:
            taken = self.taken.pop(0)
            self.asked |= pulse.asked
            if pulse.bad and self.bad_step(pulse, taken):
                return True
        return False

    def bad_step(self, pulse: Pulse, taken: Taken) -> bool:
        """Writes its capsule; stops, goes on without it, or goes back, on all processes together. Returns whether it went back.

        Raises:
            MimeticError: the run stops here.
        """
        guard, step = self.recipe.guard, pulse.step + 1
        what = (f"the gradient's norm is {pulse.norm:.3g} at step {step}, over {guard.spike:g} times the median of the last ones"
                if math.isfinite(pulse.norm) else f"the gradient of step {step} is not finite")  # fmt: skip
        capsule = write_capsule(self.run, self.accelerator, self.sharing, taken, pulse, self.plan.steps)
        replay = f"see what happened with: mimetic replay {capsule}" if capsule else "the disk is too full for a capsule"
        self.run.event("bad step", step, f"{what}; {replay}")
        used_up = ""
        if guard.bad_step == "skip":
            if self.skips < guard.max_skips:
                self.skips += 1
                self.tell("skip", step, f"{what}; it is left out ({self.skips} of {guard.max_skips}); {replay}")
                return False
            used_up = f" and guard.max_skips {guard.max_skips} used up"
        if guard.bad_step == "rewind":
            if self.rewinds < guard.max_rewinds and (found := self.earlier()):
                self.rewinds += 1
                self.rewind(*found)
                told = f"back to {found[0]}, and on with the data after it ({self.rewinds} of {guard.max_rewinds})"
                self.tell("rewind", step, f"{what}; {told}; {replay}")
                return True
            used_up = (f" and guard.max_rewinds {guard.max_rewinds} used up" if self.rewinds >= guard.max_rewinds
                       else " and no checkpoint to go back to")  # fmt: skip
        self.run.event("stop", step, what)
        raise MimeticError(f"{what} (guard.bad_step {guard.bad_step}{used_up}); checkpoints from before are kept; {replay}; lower optim.lr "
                           f"({self.recipe.optim.lr:g}) or optim.clip, use train.precision fp32, or let the run pass over it by itself: "
                           "guard.bad_step skip or rewind", together=True)  # fmt: skip

    def earlier(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest valid checkpoint, or the one before it if the run went back to the newest already."""
        self.keeper.wait()
        self.accelerator.wait_for_everyone()
        folder = self.keeper.folder
        found = checkpoints.newest(folder, tell=self.accelerator.is_main_process)
        if found and found[1]["step"] == self.went_back_to:
            found = checkpoints.newest(folder, tell=False, before=self.went_back_to) or found
        agree({"the checkpoint to go back to": found[1]["step"] if found else None}, *SHARED)
        return found

    def rewind(self, path: Path, state: dict[str, Any]) -> None:
        """Weights, optimizer and step from a checkpoint; the stream stays where it is, behind the bad step."""
        self.sharing.update(torch.ones((), device=self.device))  # forgets the gradient
        self.went_back_to = self.restore(path, state)["step"]
        self.taken.clear()
        self.run.undo(self.step)
        if self.accelerator.is_main_process:
            self.keeper.forget_after(self.step)
        self.save_soon = True  # a kill from now on must not meet the bad data again

    def tell(self, kind: str, step: int, line: str) -> None:
        """An event, to its file and to the person."""
        self.run.event(kind, step, line)
        if self.accelerator.is_main_process:
            print(line, flush=True)

    # Saving

    def restore(self, path: Path, state: dict[str, Any]) -> dict[str, Any]:
        """Weights, optimizer and step; returns the state."""
        weights, moments = checkpoints.read(path)
        if not self.recipe.train.ema_decay:  # no longer kept
            moments = {name: value for name, value in moments.items() if not name.endswith(":ema")}
        self.sharing.load(weights, moments)
        self.guard.load(state["norms"])
        self.step = state["step"]
        return state

    def save(self) -> bool:
        """Copies everything that the same command needs to go on, and lets it be written; returns whether the run went back instead.

        Raises:
            Stopped: a signal had asked for it; it is written.
        """
        if self.hear(all_of_them=True):
            return True
        main = self.accelerator.is_main_process
        self.keeper.wait()  # one copy at a time in the host's memory
        files = {checkpoints.WEIGHTS: checkpoints.copies(self.sharing.weights(), main),
                 checkpoints.MOMENTS: checkpoints.copies(self.sharing.moments(), main)}  # fmt: skip
        state = {
            "step": self.step, "seconds": self.seconds, "bad": self.bad, "skips": self.skips, "rewinds": self.rewinds,
            "norms": self.guard.state(), "stream": self.stream.state_dict(), "recipe": recipe_dict(self.recipe), "inputs": self.run.inputs,
            "world": self.accelerator.num_processes, "engine": engine_name(self.accelerator), "versions": versions(),
            "model": self.objective.describe(),
        }  # fmt: skip
        self.save_soon = False
        if main:
            if self.keeper.failure:
                self.tell("checkpoint", self.step, self.unsaved("free some space; training goes on, and tries again at the next one"))
            self.keeper.save(self.step, files, state, then=lambda: self.run.event("checkpoint", state["step"], "written"))
            self.forget_abandoned()
        if self.asked:
            self.leave()
        return False

    def forget_abandoned(self) -> None:
        """After `--resume CHECKPOINT`, and once there is a checkpoint of this branch: nothing must go on from later ones of the other."""
        if self.abandoned:
            self.keeper.wait()
            if not self.keeper.failure:
                self.keeper.forget(step for step in self.abandoned if step != self.step)
                self.abandoned = []

    def unsaved(self, cure: str = "free some space and give the same command") -> str:
        """Why, and what there is instead."""
        found = checkpoints.newest(self.keeper.folder, tell=False)
        kept = f"the last good checkpoint is {found[0]}" if found else "there is no earlier checkpoint"
        return f"{self.keeper.failure}; {kept}; {cure}"

    def leave(self) -> None:
        """Once the checkpoint is written, on all processes.

        Raises:
            Stopped: always.
        """
        self.keeper.wait()
        self.accelerator.wait_for_everyone()
        told = f"saved after step {self.step}; the same command goes on from there{self.run.without}"
        saved = self.unsaved() if self.keeper.failure else told
        self.run.event("signal", self.step, saved)
        raise SIGNALS.stopped(saved)

    # Looking

    def log(self, meter: Meter, clock: Clock) -> None:
        """One line of metrics, to the file and to the person; stops all ranks together on too many bad samples."""
        update, weights = self.sharing.sum(update_and_weight_squares(self.sharing.optimizer, self.sharing.parts()).to(self.device)).tolist()
        values = meter.read(self.accelerator)
        self.bad += int(values.pop("bad"))
        elapsed = time.perf_counter() - meter.since
        rate = meter.batches * self.stream.global_batch / elapsed
        macs = rate * self.work.work.macs
        values |= {
            "learning_rate": self.rate(self.step - 1), "grad_norm": float(self.norm),
            "update_ratio": math.sqrt(update / max(weights, 1e-30)), "images_per_second": rate, "macs_per_second": macs,
            "matrix_share": macs / self.accelerator.num_processes / self.work.matrix_rate,
            "data_wait": meter.waiting / elapsed, "samples": self.step * self.plan.samples_per_step, "seconds": self.seconds,
        }  # fmt: skip
        if self.scale.largest is not None:
            values["activation_rms"] = float(self.scale.largest)
        values |= {name: number for name, number in
                   (("bad_samples", self.bad), ("skipped_steps", self.skips), ("rewinds", self.rewinds)) if number}  # fmt: skip
        self.run.metrics(self.step, values)
        clock.tell(self.accelerator, self.step, self.plan.steps, values)
        read, tolerated = self.step * self.plan.samples_per_step, self.recipe.data.max_bad
        epochs = math.ceil(read / (len(self.stream) * self.stream.global_batch))  # a bad sample comes again in each
        if self.bad > tolerated * self.stream.samples * epochs + 1e-9:
            raise DataError(
                f"{self.bad} of the {read} images read so far did not decode ({self.bad / read:.1%}), data.max_bad tolerates "
                f"{tolerated:.1%} of the data; their keys are in {self.run.folder}/skipped.txt; pack the images again, or raise it",
                together=True,
            )

    def picture(self, batch: Mapping[str, Any]) -> None:
        """Drawn on all processes, since gathering weights may take all of them; kept on the first."""
        self.run.picture(self.step, self.objective.pictures(to_device(self.shown or batch, self.device)))

    def measured(self) -> bool:
        """Whether this step's evaluation has been recorded; the main process knows."""
        known = torch.tensor(float(self.accelerator.is_main_process and self.run.measured(self.step)), device=self.device)
        return bool(add_up(known))

    def evaluate(self, evaluation: Evaluation) -> None:
        """Records what is measured, beside step, samples, seconds and parameters, with the mean of the weights where one is kept.

        Raises:
            Stopped: a signal came; what is measured was saved before.
        """
        if float(add_up(torch.tensor(float(bool(SIGNALS.number)), device=self.device))):
            self.leave()
        SIGNALS.stepping = False  # from here on a signal ends the process at once
        self.keeper.wait()  # loader workers are forked, and threads do not go along
        same_on_all_ranks(self.objective.buffers())  # BatchNorm's statistics are each rank's own; rank 0's are what is saved
        self.objective.eval()
        with averaged(self.sharing), torch.no_grad():
            records = evaluation.measure(self.held_out(evaluation.stream()))
        self.objective.train()
        parameters = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in self.objective.parameters())
        samples = self.step * self.plan.samples_per_step
        progress: dict[str, Any] = {"step": self.step, "samples": samples, "seconds": round(self.seconds, 1), "parameters": parameters}
        for r in records:
            self.run.metrics(self.step, {r.metric: r.value, "samples": samples, "seconds": self.seconds})
            if self.accelerator.is_main_process:
                print(f"{r.metric} {r.value:.4f}" + (f" over {r.count:,} images" if r.count else ""), flush=True)
        if self.accelerator.is_main_process and self.run.is_best(evaluation.best, records, evaluation.lowest):
            self.keeper.mark_best(self.step)
        self.run.record(*(replace(record, **progress) for record in records))  # last: a start after a kill takes it for all of this

    def held_out(self, stream: Stream) -> Batches:
        """Its batches on the device. What does not decode is listed, and ends the run when it is more than data.max_bad of them.

        Raises:
            DataError: too many held-out images do not decode, on all ranks together.
        """
        bad = 0
        for batch in stream:
            bad += len(batch["bad"])
            self.run.skipped(batch["bad"])
            yield to_device(batch, self.device)
        bad = int(add_up(torch.tensor(float(bad), device=self.device)))
        tolerated = self.recipe.data.max_bad
        told = f"{bad} of the {stream.samples:,} held-out images did not decode, their keys are in {self.run.folder}/skipped.txt"
        if bad > tolerated * stream.samples + 1e-9 or bad == stream.samples:
            raise DataError(f"{told}; data.max_bad tolerates {tolerated:.1%}; pack the images again, or raise it", together=True)
        if bad and self.accelerator.is_main_process:
            print(f"{told}; measured without them", flush=True)
