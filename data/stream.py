"""The shard stream: exact global batches on any number of ranks and workers.

The sequence of global batches is a function of seed, epoch and two constants (canonical streams, shuffle block), and of
nothing else. Rank r of R takes rows [r*b, (r+1)*b) of each global batch of R*b samples. The order is `mimetic.data.order`'s, its
cutting into batches `mimetic.data.batches`'s; here images are read.
"""

import hashlib
import signal
import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from mimetic.data.batches import BatchPlan
from mimetic.data.decode import silence_pillow
from mimetic.data.index import Index
from mimetic.data.mixture import Mixture
from mimetic.data.order import CANONICAL_STREAMS, SHUFFLE_BLOCK
from mimetic.data.picture import Picture, in_unit_range
from mimetic.data.randomness import mix
from mimetic.data.readahead import read_ahead
from mimetic.engine.errors import CheckpointError, MimeticError, SettingError

Batch = dict[str, Any]


class Transform(Protocol):
    """Images and their seeds to the tensors of a batch; it runs in the workers."""

    def __call__(self, images: Sequence[Picture], seeds_B: NDArray[np.uint64]) -> dict[str, torch.Tensor]:
        """Args are pictures of any size and one seed each; every tensor returned is B long."""


@runtime_checkable
class PlacedTransform(Protocol):
    """A transform that must know which samples it gets, since something is kept for them elsewhere."""

    def at(self, samples_B: NDArray[np.int64], epochs_B: NDArray[np.int64]) -> Transform:
        """The transform of these samples, each in an epoch."""


class ShardStream:
    """Batches of one rank, epoch after epoch, from any position.

    A batch is a dict: `keys` (list), `sample` (int64 numbers in the index), `valid` (bool; False marks fillers of the last
    batch and samples that do not decode), `label` (int64, -1 where there is none), `bad` (keys that did not decode), and what
    the transform returns; without a transform `image`, stacked where all sizes agree and a list otherwise. Pixels are uint8, or
    float32 in [0, 1] if the source has a pixel range.

    Args:
        source: an index, or several as a mixture.
        batch_size: samples per rank and batch.
        subset: sample numbers to use instead of all.
        tail: "pad" fills up the last batch of an epoch, each valid sample comes once; "drop" leaves the remainder out.
        canonical_streams: places of the data that are read in turn. More mix better and take more of the cache; a number that the
            machines divide keeps each machine to its own shards.
        shuffle_block: samples within which each of them is shuffled.
        accumulate: batches that make up an optimizer step: together they hold what one batch of their size would.

    Raises:
        SettingError: settings that contradict each other or the data.
    """

    def __init__(
        self, source: Index | Mixture, batch_size: int, *, rank: int = 0, world: int = 1, workers: int = 0, seed: int = 0, epoch: int = 0,
        shuffle: bool = True, tail: str = "pad", subset: NDArray[np.int64] | None = None,
        transform: Transform | PlacedTransform | None = None, canonical_streams: int = CANONICAL_STREAMS,
        shuffle_block: int = SHUFFLE_BLOCK, accumulate: int = 1,
    ) -> None:  # fmt: skip
        if tail not in ("pad", "drop"):
            raise SettingError(f"tail is {tail!r}; it must be pad or drop")
        if batch_size < 1 or workers < 0 or not 0 <= rank < world:
            raise SettingError(f"batch_size {batch_size}, workers {workers}, rank {rank} of {world}: these cannot be")
        if canonical_streams < 1 or shuffle_block < 1:
            raise SettingError(f"data.canonical_streams is {canonical_streams}, data.shuffle_block {shuffle_block}; both are 1 or more")
        subset = None if subset is None else _checked(subset, len(source))
        order = source.order(seed, shuffle=shuffle, streams=canonical_streams, block=shuffle_block, members=subset)
        self.plan = BatchPlan(order, batch_size, rank, world, tail, accumulate)
        self.samples, self.global_batch, self.steps = order.samples, self.plan.global_batch, self.plan.steps
        if not self.steps:
            parts = f" x {accumulate} micro-batches" if accumulate > 1 else ""
            raise SettingError(
                f"data.batch_size {batch_size} x {world} processes{parts} = {self.global_batch * accumulate} is more than the "
                f"{self.samples} samples of {source.home}; lower data.batch_size to {max(1, self.samples // world // accumulate)}"
            )
        self._batches = _Batches(source, self.plan, seed, transform)
        self._source, self._workers, self._step = source, workers, epoch * self.steps
        chosen = None if subset is None else hashlib.sha256(subset.tobytes()).hexdigest()[:16]
        self._identity = {"seed": seed, "fingerprint": source.fingerprint, "subset": chosen, "shuffle": shuffle, "tail": tail,
                          "canonical_streams": canonical_streams, "shuffle_block": shuffle_block}  # fmt: skip

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        """From the present position to the end of its epoch; the next call walks the next epoch."""
        return self.run((self._step // self.steps + 1) * self.steps)

    def run(self, stop: int) -> Iterator[Batch]:
        """From the present position to batch number `stop`, counted over epochs, with one set of workers."""
        loader = DataLoader(
            self._batches, batch_size=None, sampler=range(self._step, stop), num_workers=self._workers,
            prefetch_factor=4 if self._workers else None, pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker, generator=torch.Generator(),  # else it draws from the global one, and resuming draws again
        )  # fmt: skip
        batches = iter(loader)  # before the threads of the read-ahead: workers are forked
        try:
            with read_ahead(self._source, self.plan, self._step, stop) as ahead:
                for batch in batches:
                    if isinstance(batch, MimeticError):
                        raise batch
                    self._step += 1  # handed out, not prefetched
                    ahead.reached(self._step)
                    yield batch
        finally:
            del batches  # an error keeps this frame alive, and the workers with it: the program would wait for them at its end

    def state_dict(self) -> dict[str, Any]:
        """The position, as samples handed out to all ranks, and what fixes the order."""
        epoch, batch = divmod(self._step, self.steps)
        return {"epoch": epoch, "samples": batch * self.global_batch} | self._identity

    def example(self, images: int) -> Batch:
        """The first images of the present batch; the position stays."""
        return self._batches.batch(self._step, images)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position in O(1), whatever the number of workers, of ranks and of micro-batches, if a step divides it.

        Raises:
            CheckpointError: other data, another order, or a step that does not divide the position.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise CheckpointError(f"the checkpoint's data has {name} {state.get(name)}, this run {value}; start a new run folder")
        together = self.global_batch * self.plan.accumulate
        if state["samples"] % together:
            raise CheckpointError(
                f"the checkpoint stands at sample {state['samples']} of its epoch, which the global batch {together} "
                f"does not divide; use one that does, such as {np.gcd(state['samples'], together)}"
            )
        batch = state["samples"] // self.global_batch
        self._step = state["epoch"] * self.steps + batch


class _Batches(Dataset[Batch | MimeticError]):
    """Batch number -> batch. Any worker can make any batch, so their number changes nothing.

    An error is handed over as a value: raised in a worker it would arrive as a traceback in many lines.
    """

    def __init__(self, source: Index | Mixture, plan: BatchPlan, seed: int, transform: Transform | PlacedTransform | None) -> None:
        self.source, self.plan, self.seed, self.transform = source, plan, seed, transform

    def __getitem__(self, step: int) -> Batch | MimeticError:
        try:
            return self.batch(step)
        except MimeticError as error:
            return error

    def batch(self, step: int, images: int | None = None) -> Batch:
        """A batch, or its first images.

        Raises:
            MimeticError: the data cannot be read.
        """
        samples, epochs, valid = self.plan.batch(step)
        samples, epochs, valid = samples[:images], epochs[:images], valid[:images]
        pictures = [Picture(self.source.read(int(sample)), self.source.channels, self.source.range) for sample in samples]
        transform = self.transform.at(samples, epochs) if isinstance(self.transform, PlacedTransform) else self.transform
        tensors = (transform(pictures, mix(self.seed, epochs, samples)) if transform
                   else {"image": _stacked([picture.pixels() for picture in pictures])})  # fmt: skip
        bad = self._bad(pictures, samples, valid)  # after the transform: it is there that pixels are read
        return {"keys": self.source.keys(samples), "bad": bad, "sample": torch.from_numpy(samples), "valid": torch.from_numpy(valid),
                "label": torch.from_numpy(self.source.labels(samples))} | tensors  # fmt: skip

    def _bad(self, pictures: list[Picture], samples: NDArray[np.int64], valid: NDArray[np.bool_]) -> list[str]:
        """Those that did not decode keep their place in the order and count for nothing."""
        failed = np.array([picture.failed for picture in pictures])
        bad = self.source.keys(samples[failed & valid])
        valid[failed] = False
        return bad


def _checked(subset: NDArray[np.int64], samples: int) -> NDArray[np.int64]:
    subset = np.asarray(subset, dtype=np.int64)
    if not len(subset) or subset.min() < 0 or subset.max() >= samples or len(np.unique(subset)) < len(subset):
        raise SettingError(f"a subset of {len(subset)} samples: it must name some of the {samples}, 0 to {samples - 1}, once each")
    return subset


def _stacked(images: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    return torch.stack(images) if len({image.shape for image in images}) == 1 else images


def _start_worker(_: int) -> None:
    """One thread, and deaf to what asks the training to stop, which may be sent to all processes: its step still needs batches."""
    torch.set_num_threads(1)
    silence_pillow()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _unless_left


def _unless_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, (ConnectionError, EOFError)):  # nobody is there any more to take the tensors that a thread hands over
        sys.__excepthook__(kind, error, trace)


def pixels(index: Index, subset: NDArray[np.int64] | None = None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All pixels of the samples as rows in [0, 1], (N, C*H*W), and their labels (N,): for models without views.

    Raises:
        SettingError: the images differ in size.
    """
    rows: list[NDArray[np.float32]] = []
    labels: list[NDArray[np.int64]] = []
    for batch in ShardStream(index, 256, shuffle=False, subset=subset):
        image, valid_B = batch["image"], batch["valid"]
        if not isinstance(image, torch.Tensor) or (rows and image[0].numel() != len(rows[0][0])):
            raise SettingError(f"{index.home}: images differ in size; resize them to compare pixels")
        rows.append(in_unit_range(image[valid_B].flatten(1)).numpy())
        labels.append(batch["label"][valid_B].numpy())
    return np.concatenate(rows), np.concatenate(labels)
