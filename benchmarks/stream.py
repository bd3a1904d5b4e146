"""How a stream behaves at a size that no test can have: an index of 100 million samples, and 256 machines over a billion.

python benchmarks/stream.py              an index of 10,000 shards: opening, memory, resuming at step 1,000,000 (needs 4 GB in /tmp)
python benchmarks/stream.py --simulate   what each machine fetches and keeps, how well batches are mixed, what 16 lost machines change:
                                         the stream's own planning code, without images (some minutes); --plot FILE draws it
"""

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mimetic.data.batches import BatchPlan
from mimetic.data.index import ROW
from mimetic.data.order import Shuffled
from mimetic.data.packing.writing import Part, write_index

CHILD = """
import os, resource, sys, time
import numpy
began = time.perf_counter()
from mimetic.data.index import open_index
def rss(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
before, started = rss(), time.perf_counter()
index = open_index(sys.argv[1])
print(f"opening {len(index):,} samples in {len(index.shards):,} shards: {time.perf_counter() - started:.2f} s, "
      f"{rss():.0f} MB in the process, {rss() - before:.0f} of them by opening")
from mimetic.data.stream import ShardStream
stream = ShardStream(index, 64, rank=3, world=8, seed=1)
steps, loaded = len(stream), rss()
state = stream.state_dict() | {"epoch": 1_000_000 // steps, "samples": 1_000_000 % steps * 512}
started = time.perf_counter()
stream.load_state_dict(state)
batch = next(iter(stream))
print(f"resuming at step 1,000,000 of {steps:,} an epoch, to the first batch: {time.perf_counter() - started:.2f} s; "
      f"{rss():.0f} MB, {loaded:.0f} of them Python, torch and the index")
"""


def scale(shards: int, samples: int) -> None:
    """Makes a real index over shards that hold one picture each, which every sample of theirs is; opens it in a fresh process."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(buffer, "png")
    picture = buffer.getvalue()
    content = bytes(512) + picture
    digest, each = hashlib.sha256(content).hexdigest(), samples // shards
    with tempfile.TemporaryDirectory() as folder:

        def parts() -> Iterator[Part]:
            rows = np.zeros(each, ROW)
            rows["offset"], rows["size"], rows["label"], rows["key"] = 512, len(picture), -1, np.arange(each) * 10
            for shard in range(shards):
                Path(folder, f"shard-{shard:05d}.tar").write_bytes(content)
                keys = b"".join(b"%09d\n" % key for key in range(shard * each, (shard + 1) * each))
                yield Part(f"shard-{shard:05d}.tar", len(content), digest, rows, keys)

        started = time.perf_counter()
        write_index(Path(folder), parts(), samples, classes=[], image={"channels": 1, "mean": [0.5], "std": [0.5]})
        sizes = {name: os.path.getsize(Path(folder, name)) / 1e6 for name in ("index.json", "samples.npy", "keys.txt")}
        told = ", ".join(f"{name} {size:,.0f} MB" for name, size in sizes.items())
        print(f"wrote the index in {time.perf_counter() - started:.0f} s: {told}", flush=True)
        subprocess.run([sys.executable, "-c", CHILD, folder], check=True)


@dataclass
class Walk:
    """What machines meet between two steps of an epoch.

    Attributes:
        first: (machines, shards) step at which a machine first reads a shard, -1 where it never does.
        last: (machines, shards) step at which it last does.
        shards_in_batch: distinct shards in each of some global batches.
        effective: 1 / the sum of squared shares of the shards in them: to how many samples a batch comes if shards are all alike inside.
    """

    first: NDArray[np.int32]
    last: NDArray[np.int32]
    shards_in_batch: list[int]
    effective: list[float]

    def fetched(self, weight: NDArray[np.float64]) -> NDArray[np.float64]:
        """Bytes that each machine fetches, if it keeps what it reads again."""
        return (self.first >= 0) @ weight

    def kept(self, weight: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
        """(machines, steps) bytes of the shards that each machine is in the middle of."""
        held = np.zeros((len(self.first), steps + 1))
        for machine, (first, last) in enumerate(zip(self.first, self.last, strict=True)):
            met = first >= 0
            np.add.at(held[machine], first[met], weight[met])
            np.add.at(held[machine], last[met] + 1, -weight[met])
        return held.cumsum(1)[:, :-1]


def walk(order: Shuffled, machines: int, rows: int, begin: int, stop: int) -> Walk:
    """Reads batches `begin` to `stop` of an epoch: `rows` samples on each machine, whatever its ranks and workers share them by."""
    shards = len(order.starts) - 1
    found = Walk(np.full((machines, shards), -1, np.int32), np.full((machines, shards), -1, np.int32), [], [])
    plan = BatchPlan(order, rows * machines, tail="drop")  # in one piece: machine m has rows [m * rows, (m + 1) * rows)
    machine_of = np.repeat(np.arange(machines), rows)
    told = time.perf_counter()
    for step in range(begin, stop):
        shard_of = np.searchsorted(order.starts, plan.batch(step)[0], "right") - 1
        found.last[machine_of, shard_of] = step
        new = found.first[machine_of, shard_of] < 0
        found.first[machine_of[new], shard_of[new]] = step
        if step % 100 == 0:
            counts = np.bincount(shard_of)
            found.shards_in_batch.append(int((counts > 0).sum()))
            found.effective.append(float(1 / np.square(counts / len(shard_of)).sum()))
        if sys.stderr.isatty() and time.perf_counter() - told > 1:
            told = time.perf_counter()
            print(f"\r{machines} machines: step {step:,} of {stop:,}", end="", file=sys.stderr, flush=True)
    return found


def simulate(arguments: argparse.Namespace) -> None:
    """One epoch on all machines, and one that goes on with fewer after its middle."""
    random = np.random.default_rng(0)
    sizes = random.integers(8_000, 12_001, arguments.shards) * arguments.samples // (10_000 * arguments.shards)
    weight = sizes * 50e3  # bytes
    order = Shuffled(sizes, 1, streams=arguments.streams, block=arguments.block)
    ranks, batch = arguments.ranks, arguments.batch
    machines, rows = arguments.machines, ranks * batch
    steps = order.samples // (machines * rows)
    print(f"{machines} machines x {ranks} ranks x {arguments.workers} workers, {batch} images a rank: batches of {machines * rows:,}, "
          f"{steps:,} steps an epoch;\n{order.samples:,} samples of 50 kB in {arguments.shards:,} shards (ragged), "
          f"{order.streams} canonical streams, shuffle block {order.block:,}", flush=True)  # fmt: skip
    whole = walk(order, machines, rows, 0, steps)
    kept = whole.kept(weight, steps)
    tell("all machines", whole, kept, weight, machines, steps * machines * rows / order.samples)
    full = distinct_by_chance(sizes, machines * rows)
    print(f"  a batch has samples of {np.mean(whole.shards_in_batch):,.0f} shards (a full shuffle: {full:,.0f}); if shards were all alike "
          f"inside, it would count for {np.mean(whole.effective):,.0f} samples (a full shuffle: "
          f"{effective_by_chance(sizes, machines * rows):,.0f})")  # fmt: skip

    fewer = max(1, machines - arguments.lost)
    common = np.lcm(machines * rows, fewer * rows)
    middle = max(1, round(order.samples / 2 / common)) * common  # both global batches divide it
    if middle < order.samples:
        begin, stop = middle // (fewer * rows), order.samples // (fewer * rows)
        rest = walk(order, fewer, rows, begin, stop)
        kept_rest = rest.kept(weight, stop)[:, begin:]
        share = (stop - begin) * fewer * rows / order.samples
        print(f"{arguments.lost} machines lost after {middle:,} samples ({middle / order.samples:.0%}), which both global batches divide:")
        tell(f"the other {fewer}", rest, kept_rest, weight, fewer, share)
        if arguments.plot:
            draw(arguments.plot, whole, kept, rest, kept_rest, weight, middle / order.samples)
        same = np.array_equal(*(np.sort(samples_of(order, count * rows, middle, common)) for count in (machines, fewer)))
        print(f"the {common:,} samples after the loss are {'the same' if same else 'OTHERS'}, on {machines} machines and on {fewer}")


def samples_of(order: Shuffled, batch: int, begin: int, count: int) -> NDArray[np.int64]:
    """So many samples from a place on, read in global batches of a size that divides both."""
    plan = BatchPlan(order, batch, tail="drop")
    return np.concatenate([plan.batch(step)[0] for step in range(begin // batch, (begin + count) // batch)])


def tell(who: str, found: Walk, kept: NDArray[np.float64], weight: NDArray[np.float64], machines: int, share: float) -> None:
    """Prints what machines fetch, beside the least that they could."""
    ratio = found.fetched(weight) / (weight.sum() * share / machines)
    print(f"  {who}: each fetches {found.fetched(weight).mean() / 1e12:.3f} TB, {ratio.mean():.3f} of its share (least {ratio.min():.3f}, "
          f"most {ratio.max():.3f}); is in the middle of {kept.mean() / 1e9:.2f} GB (most {kept.max() / 1e9:.2f})", flush=True)  # fmt: skip


def distinct_by_chance(sizes: NDArray[np.int64], batch: int) -> float:
    """Expected number of distinct shards in a batch of a full shuffle."""
    return float((1 - (1 - sizes / sizes.sum()) ** batch).sum())


def effective_by_chance(sizes: NDArray[np.int64], batch: int) -> float:
    """`Walk.effective` of a full shuffle."""
    return float(1 / (1 / batch + (1 - 1 / batch) * np.square(sizes / sizes.sum()).sum()))


def draw(path: Path, whole: Walk, kept: NDArray, rest: Walk, kept_rest: NDArray, weight: NDArray, middle: float) -> None:
    """Bytes by machine, and the cache over the epoch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    total = weight.sum()
    left.plot(whole.fetched(weight) / (total / len(kept)), ".", ms=3, label=f"{len(kept)} machines, whole epoch")
    share = total * (1 - middle) / len(kept_rest)
    left.plot(rest.fetched(weight) / share, ".", ms=3, label=f"{len(kept_rest)} machines, rest of the epoch")
    left.axhline(1, color="0.6", lw=0.8)
    left.set(xlabel="machine", ylabel="bytes fetched / its share", ylim=(0, None), title="what each machine fetches")
    left.legend(frameon=False)
    for values, begin, name in ((kept, 0.0, "all machines"), (kept_rest, middle, "after the loss")):
        along = np.linspace(begin, 1, values.shape[1])
        right.plot(along, np.median(values, 0) / 1e9, lw=1, label=f"{name}, median machine")
        right.plot(along, values.max(0) / 1e9, lw=0.5, label=f"{name}, most of any")
    right.set(xlabel="share of the epoch", ylabel="GB", ylim=(0, None), title="shards that a machine is in the middle of")
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    print(f"picture in {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--shards", type=int)
    parser.add_argument("--machines", type=int, default=256)
    parser.add_argument("--lost", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32, help="images of a rank")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--block", type=int, default=8192)
    arguments = parser.parse_args()
    if arguments.simulate:
        arguments.samples, arguments.shards = arguments.samples or 10**9, arguments.shards or 100_000
        simulate(arguments)
    else:
        scale(arguments.shards or 10_000, arguments.samples or 10**8)


if __name__ == "__main__":
    main()
