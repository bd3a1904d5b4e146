"""A training step beside other people's, and beside what the machine's matrix products alone would allow.

Run: python benchmarks/step.py                          BEiT-B/16 in bf16 and fp32, and the demo's size; about 6 minutes on two cores
     python benchmarks/step.py beit --compile           ours and theirs compiled
     python benchmarks/step.py processes [--size beit]  two processes of one thread against one process of two threads
     python benchmarks/step.py --help

Ways alternate within each round; printed are medians of images/s, and medians of the ratios within a round with their range.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the product does, before torch is loaded

import torch
import torch.multiprocessing
from step_models import (
    CLIP,
    DEMO_BATCH,
    PlainViT,
    Products,
    copy_weights,
    demo_batches,
    demo_objective,
    our_loss,
    ours,
    their_loss,
    theirs,
    training_batch,
    training_step,
)
from torch import nn

from backbones import resident
from mimetic.engine.config import DataSettings, Invocation, TrainSettings
from mimetic.engine.loop import train
from mimetic.engine.optim import OptimSettings
from mimetic.engine.runtime import start
from mimetic.pretrain.recipe import BeitRecipe, TokenizerSettings
from mimetic.tokenizers.dvae import DVAE

GOALS = {"transformers": 1.25, "products": {True: 0.85}, "memory": 0.8, "plain": 1.5, "processes": 0.9}
BATCH = 8
DEMO_STEPS = 25  # of a round
Rates = dict[str, list[float]]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(rates: Rates, first: str, second: str, goal: float | None = None) -> None:
    """Prints the median over rounds, the range, and the goal."""
    found = [a / b for a, b in zip(rates[first], rates[second], strict=True)]
    told = f"{min(found):.3f} to {max(found):.3f} in {len(found)} rounds{f'; goal {goal:g}' if goal else ''}"
    print(f"  {first} / {second}: {statistics.median(found):.3f} ({told})", flush=True)


def interleave(ways: dict[str, Callable[[], object]], images: int, rounds: int) -> Rates:
    """Images/s of each way in each round, every second round backwards; a round before the first warms up."""
    rates: Rates = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name in reversed(ways) if round_ % 2 else ways:
            spent = seconds(ways[name])
            if round_:
                rates[name].append(images / spent)
    return rates


def beit(bf16: bool, rounds: int, compiled: bool) -> None:
    """BEiT-B/16, 224 pixels: ours, transformers', and the products alone."""
    torch.manual_seed(0)
    batch = training_batch(BATCH)
    objective, model = ours(batch), theirs()
    copy_weights(objective, model)
    losses = {"ours": our_loss(objective, batch), "transformers": their_loss(model, batch)}
    check_same(objective.eval(), model.eval(), losses)
    if compiled:
        objective.compile()
        model.compile()
    products = Products(BATCH, torch.bfloat16 if bf16 else torch.float32)
    steps = {"ours": training_step(objective, losses["ours"], bf16), "transformers": training_step(model, losses["transformers"], bf16)}
    rates = interleave(steps | {"products": products.run}, BATCH, rounds)
    how = f"{'bf16' if bf16 else 'fp32'}{', compiled' if compiled else ''}"
    print(f"BEiT-B/16, 224 pixels, batch {BATCH}, {how}, {torch.get_num_threads()} threads: forward, backward, clip, fused AdamW")
    for name, values in rates.items():
        work = statistics.median(values) * products.gflop / BATCH
        print(f"  {name:13} {statistics.median(values):7.2f} images/s  {work:6.0f} GFLOP/s of matrix products")
    ratio(rates, "ours", "transformers", GOALS["transformers"])
    ratio(rates, "ours", "products", GOALS["products"].get(bf16))
    ratio(rates, "transformers", "products")


@torch.no_grad()
def check_same(objective: nn.Module, model: nn.Module, losses: dict[str, Callable[[], torch.Tensor]]) -> None:
    """Refuses to time two different things: fp32, without drop path."""
    found = [loss().item() for loss in losses.values()]
    if abs(found[0] - found[1]) > 1e-4:
        raise SystemExit(f"the losses differ: {found}")
    print(f"same loss, {found[0]:.6f} and {found[1]:.6f}")


def peak(whose: str, bf16: bool) -> float:
    """MB that three steps add to this process, weights, gradients and moments included."""
    batch = training_batch(BATCH)
    import transformers  # noqa: F401  # loaded on both sides

    before = resident("VmRSS")
    module: Any = ours(batch) if whose == "ours" else theirs()
    step = training_step(module, our_loss(module, batch) if whose == "ours" else their_loss(module, batch), bf16)
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def memory(bf16: bool) -> None:
    """Peak of resident memory, each in a process of its own."""
    command = [sys.executable, __file__, "beit", "--precision", "bf16" if bf16 else "fp32", "--peak"]
    found = [float(subprocess.run([*command, whose], capture_output=True, text=True, check=True).stdout.split()[-1])
             for whose in ("ours", "transformers")]  # fmt: skip
    print(f"  peak of resident memory, weights and moments included: {found[0]:.0f} and {found[1]:.0f} MB, ratio "
          f"{found[0] / found[1]:.2f} (goal {GOALS['memory']})", flush=True)  # fmt: skip


class StoppedError(Exception):
    """Ends a training from within its stream."""


class TimedStream:
    """Feeds the real loop, takes the time that it keeps each batch for, and times the plain loop between rounds."""

    samples, global_batch = 1 << 20, DEMO_BATCH

    def __init__(self, batches: Iterator[dict[str, Any]], plain: Callable[[], object], rounds: int) -> None:
        self.batches, self.plain, self.rounds = batches, plain, rounds
        self.rates: Rates = {"ours": [], "plain": []}

    def __len__(self) -> int:
        return self.samples // self.global_batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.run(len(self))

    def example(self, images: int) -> dict[str, Any]:
        """What one step's work is counted on before the first."""
        return {name: value[:images] for name, value in next(self.batches).items()}

    def run(self, stop: int) -> Iterator[dict[str, Any]]:
        """All rounds, then the end."""
        for round_ in range(self.rounds + 1):
            started = time.perf_counter()
            for _ in range(DEMO_STEPS):
                yield next(self.batches)
            spent = {"ours": time.perf_counter() - started, "plain": seconds(self.plain)}
            if round_:
                for name, value in spent.items():
                    self.rates[name].append(DEMO_STEPS * self.global_batch / value)
        raise StoppedError

    def state_dict(self) -> dict[str, Any]:
        """At the start: nothing is resumed here."""
        return {"epoch": 0, "samples": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is resumed here."""


def demo(bf16: bool, rounds: int) -> None:
    """The demo's ViT: `mimetic.engine.loop.train` itself, with meters and log lines, against a loop of ten lines around timm's modules."""
    dvae = DVAE(256, 4, 1).eval().requires_grad_(False)
    batches, model = demo_batches(), PlainViT(dvae)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05, fused=True)

    def plain() -> None:
        for _ in range(DEMO_STEPS):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(next(batches))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        loss.item()

    stream = TimedStream(batches, plain, rounds)
    precision = "bf16" if bf16 else "fp32"
    settings, optim = TrainSettings(steps=10_000, log_every=DEMO_STEPS, precision=precision), OptimSettings(lr=1e-3)
    recipe = BeitRecipe(DataSettings(index="noise", batch_size=DEMO_BATCH), settings, optim, TokenizerSettings("none"))
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(StoppedError):
        train(demo_objective(dvae), stream, invocation=Invocation(recipe, Path(folder), None), kind="pretrain",
              accelerator=start(settings, optim, DEMO_BATCH), title="the demo's size")  # fmt: skip
    print(f"ViT of width 96, depth 4, 49 tokens, batch {DEMO_BATCH}, {precision}, the dVAE's time included on both sides")
    for name, values in stream.rates.items():
        print(f"  {name:13} {statistics.median(values):7.0f} images/s")
    ratio(stream.rates, "ours", "plain", GOALS["plain"])


def one_of_them(rank: int, world: int, size: str, port: int, result: Any) -> None:
    """A process of `processes`: warms up, and tells images/s of all together."""
    torch.set_num_threads(2 // world)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    images, steps = (BATCH, 5) if size == "beit" else (DEMO_BATCH, 50)
    if size == "beit":
        batch = training_batch(images // world)
        objective = ours(batch)
    else:
        dvae = DVAE(256, 4, 1)
        batch = {name: value[: images // world] for name, value in next(demo_batches(1)).items()}
        objective = demo_objective(dvae)
    step_module: Any = objective
    if world > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
        step_module = nn.parallel.DistributedDataParallel(objective)
    step = training_step(objective, lambda: step_module(batch).loss, bf16=size == "beit")
    step(), step()
    if world > 1:
        torch.distributed.barrier()
    spent = seconds(lambda: [step() for _ in range(steps)])
    if rank == 0:
        result.put(images * steps / spent)
    if world > 1:
        torch.distributed.destroy_process_group()


def processes(size: str, rounds: int) -> None:
    """Two processes of one thread each (DDP over gloo, half the batch each) and one process with two threads, in turn."""
    rates: Rates = {"two processes": [], "one process": []}
    for round_ in range(rounds):
        for world, name in ((2, "two processes"), (1, "one process")):
            result = torch.multiprocessing.get_context("spawn").SimpleQueue()
            torch.multiprocessing.spawn(one_of_them, (world, size, 29600 + os.getpid() % 300 + round_, result), nprocs=world)
            rates[name].append(result.get())
    print(f"{'BEiT-B/16 in bf16, batch 8' if size == 'beit' else 'the demo size in fp32, batch 64'} in all")
    for name, values in rates.items():
        print(f"  {name:13} {statistics.median(values):7.1f} images/s")
    ratio(rates, "two processes", "one process", GOALS["processes"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["beit", "demo", "processes"], help="default: beit and demo")
    parser.add_argument("--precision", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"], help="of beit and demo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of beit and demo")
    parser.add_argument("--compile", action="store_true", help="beit: torch.compile ours and theirs")
    parser.add_argument("--size", choices=["demo", "beit"], default="demo", help="of processes")
    parser.add_argument("--peak", choices=["ours", "transformers"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    if given.peak:
        print(peak(given.peak, given.precision == ["bf16"]))
        return
    if given.what in (None, "beit"):
        for precision in given.precision:
            beit(precision == "bf16", given.rounds, given.compile)
            if not given.compile:
                memory(precision == "bf16")
    if given.what in (None, "demo"):
        for precision in given.precision:
            demo(precision == "bf16", 2 * given.rounds)
    if given.what == "processes":
        processes(given.size, given.rounds)


if __name__ == "__main__":
    main()
