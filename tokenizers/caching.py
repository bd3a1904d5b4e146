"""Making a token cache: each view of each image is drawn as training draws it, encoded, and kept.

A file (one shard, a range of views) is written when it is whole, and entered in `tokens.json`; the same command goes on with those that
are not there, and writes damaged ones anew. Batches never cross a file or a view, and the last one is filled up, so what is in a
file depends neither on where a killed job went on nor on how many processes share the work.

Legend: N images of a shard, P Q token grid.
"""

import fcntl
import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mimetic.data.index import Index
from mimetic.data.packing.workers import TELL_EVERY
from mimetic.data.picture import Picture, in_unit_range
from mimetic.data.stream import ShardStream
from mimetic.data.views import PretrainViews
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import DataError, SettingError, disk_is_full
from mimetic.engine.words import duration, memory
from mimetic.tokenizers.contract import ImageTokenizer
from mimetic.tokenizers.token_cache import CONTENTS, Contents, File, Part, Terms, check_terms, read_contents
from mimetic.tokenizers.token_tar import layout_of, row_type, tar_of

VIEWS_A_FILE = 16  # at most: they are held in memory, lost with a kill, and of an image read together
LARGEST_VOCABULARY = 1 << 16  # what 16 bits can tell apart


class Task(NamedTuple):
    """A file to write: views `first` to `last` - 1 of a shard, which is the one numbered `part` in `tokens.json`."""

    part: int
    first: int
    last: int
    shard: int

    @property
    def name(self) -> str:
        """Of the file."""
        return f"tokens-{self.shard:05d}-views-{self.first:04d}-{self.last - 1:04d}.tar"


class CacheWriter:
    """Writes a cache, or what it lacks.

    Args:
        folder: new, or a cache for these very terms.
        index: of the images.
        views: as the training has them.
        tokenizer: on the device where it is to run.
        device: that one.
        terms: as `terms_of` has them; their seed is the training's.
        count: views that each image shall have.
        batch_size: images that the tokenizer gets at a time.
        workers: processes that decode.
        rank: this process's number, of those that share the work.
        world: how many they are.

    Raises:
        SettingError: the folder holds something else, or the tokenizer has too many codes.
    """

    def __init__(
        self, folder: Path, index: Index, views: PretrainViews, tokenizer: ImageTokenizer, device: torch.device, terms: Terms, *,
        count: int, batch_size: int, workers: int = 0, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        if tokenizer.vocab_size > LARGEST_VOCABULARY:
            raise SettingError(f"the tokenizer has {tokenizer.vocab_size} codes, a cache of 16-bit ids holds {LARGEST_VOCABULARY}; "
                               "train with this tokenizer without tokenizer.cache")  # fmt: skip
        self.folder, self.index, self.views, self.tokenizer, self.device = folder, index, views, tokenizer, device
        self.terms, self.count, self.batch_size, self.workers, self.rank, self.world = terms, count, batch_size, workers, rank, world
        side = views.target_size // tokenizer.stride
        self.grid, self.row = (side, side), row_type((side, side))
        self.shards: list[int] = np.flatnonzero(np.diff(index.starts)).tolist()  # those that hold any image
        self.bad = 0

    def write(self) -> Contents:
        """Sees to it that each image has at least `count` views; returns what there is then."""
        with _alone(self.folder, self.rank):
            with self._agreed() as contents:
                tasks = self._tasks(contents)
            if tasks:
                self._tell(tasks)
            with self._agreed() as contents:
                contents.write(self.folder)
            progress = _Progress(sum(map(self._images, tasks)))
            for task in tasks:
                rows_NV = np.zeros((self._samples(task), task.last - task.first), self.row)
                for more in self._fill(task, rows_NV):
                    progress.add(more)
                self._keep(task, rows_NV)
            return read_contents(self.folder)

    @contextmanager
    def _agreed(self) -> Iterator[Contents]:
        """What is in the folder, with a range for the views that are to come, for this process alone to change.

        Raises:
            SettingError: it was made with other terms, or begun with more views.
        """
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            contents = read_contents(self.folder) if (self.folder / CONTENTS).exists() else Contents(self.terms, self.grid, [])
            check_terms(self.folder, contents.terms, self.terms)
            while contents.parts and not contents.parts[-1].files:
                contents.parts.pop()  # begun, and nothing of it written: it may as well be another number
            if contents.views > self.count and len(contents.parts[-1].files) < len(self.shards):
                raise SettingError(f"{self.folder} was begun with {contents.views} views, and is not complete; --views is {self.count}: "
                                   f"give {contents.views} or more, or another folder")  # fmt: skip
            while contents.views < self.count:
                contents.parts.append(Part(contents.views, min(self.count, contents.views + VIEWS_A_FILE), {}))
            yield contents

    def _tasks(self, contents: Contents) -> list[Task]:
        """Files of this process's shards that are not there, or not what was written."""
        tasks = [(part.files.get(shard), Task(number, part.first, part.last, shard))
                 for number, part in enumerate(contents.parts) for shard in self.shards[self.rank :: self.world]]  # fmt: skip
        return [task for file, task in tasks if file is None or not self._is_whole(file)]

    def _is_whole(self, file: File) -> bool:
        path = self.folder / file.name
        if not path.exists() or path.stat().st_size != file.bytes:
            return False
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256

    def _samples(self, task: Task) -> int:
        return int(self.index.starts[task.shard + 1] - self.index.starts[task.shard])

    def _images(self, task: Task) -> int:
        return self._samples(task) * (task.last - task.first)

    def _stream(self, task: Task) -> ShardStream:
        samples = np.arange(self.index.starts[task.shard], self.index.starts[task.shard + 1])
        return ShardStream(self.index, self.batch_size, workers=self.workers, seed=self.terms["seed"], epoch=task.first, shuffle=False,
                           subset=samples, transform=_Kept(self.views))  # fmt: skip

    def _tell(self, tasks: Sequence[Task]) -> None:
        """What it will take, from a batch that is timed.

        Raises:
            DataError: the disk has less room than that.
        """
        stream, began = self._stream(tasks[0]), time.perf_counter()
        batch = stream.example(self.batch_size)
        decoded = time.perf_counter()
        self._encode(batch)  # kernels are chosen
        warm = time.perf_counter()
        self._encode(batch)
        encoding, decoding = time.perf_counter() - warm, decoded - began
        each = max(encoding, decoding / self.workers) if self.workers else encoding + decoding
        batches = sum(-(-self._samples(task) // self.batch_size) * (task.last - task.first) for task in tasks)
        size = sum(self._samples(task) * layout_of(self._keys(task), task.last - task.first, self.row).record for task in tasks)
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise DataError(f"{self.folder}: the tokens take {memory(size)}, the disk has {memory(free)} left; free some "
                            "space, or give fewer --views")  # fmt: skip
        shared = f", the share of process {self.rank} of {self.world}" if self.world > 1 else ""
        print(f"tokens of {sum(map(self._images, tasks)):,} views in {len(tasks)} files, {size / 1e6:,.1f} MB{shared}; a batch of "
              f"{self.batch_size} takes {each:.3f} s on {self.device.type}: about {duration(each * batches)}", flush=True)  # fmt: skip

    def _encode(self, batch: dict[str, Any]) -> NDArray[np.int64]:
        return self.tokenizer.encode(in_unit_range(batch["target"].to(self.device))).cpu().numpy()

    def _fill(self, task: Task, rows_NV: NDArray[Any]) -> Iterator[int]:
        """Draws and encodes the views of a shard; yields how many each batch brought."""
        stream = self._stream(task)
        for number, batch in enumerate(stream.run(task.last * stream.steps)):
            view, place = divmod(number, stream.steps)
            first = place * self.batch_size
            rows_B = rows_NV[first : first + self.batch_size, view]
            real = len(rows_B)  # what follows fills the batch up
            rows_B["ids"] = self._encode(batch)[:real]
            rows_B["box"], rows_B["flip"] = batch["boxes"][:real], batch["flips"][:real]
            rows_B["seed"] = batch["seeds"][:real].numpy().view(np.uint64)
            self.bad += len(batch["bad"]) if task.first + view == 0 else 0
            yield real

    def _keys(self, task: Task) -> NDArray[np.bytes_]:
        return self.index.key_table(np.arange(self.index.starts[task.shard], self.index.starts[task.shard + 1]))

    def _keep(self, task: Task, rows_NV: NDArray[Any]) -> None:
        """Writes the tar, then enters it.

        Raises:
            DataError: the disk is full.
        """
        keys_N = self._keys(task)
        layout = layout_of(keys_N, rows_NV.shape[1], self.row)
        content = tar_of(keys_N, rows_NV, layout)
        for left in self.folder.glob(f".{task.name}.*"):
            left.unlink()  # by a process that was killed
        try:
            write_atomically(self.folder / task.name, content)
            with self._agreed() as contents:
                file = File(task.name, len(content), hashlib.sha256(content).hexdigest(), layout.data, layout.record)
                contents.parts[task.part].files[task.shard] = file
                contents.write(self.folder)
        except OSError as error:
            if disk_is_full(error):
                raise DataError(f"{self.folder}: the disk is full; free some space and give the same command: it goes on") from None
            raise


class _Progress:
    """Prints every few seconds how far the work is."""

    def __init__(self, views: int) -> None:
        self.views, self.done, self.began = views, 0, time.perf_counter()
        self.told = self.began

    def add(self, views: int) -> None:
        """Views that are done."""
        self.done, now = self.done + views, time.perf_counter()
        if now - self.told > TELL_EVERY:
            self.told, rate = now, self.done / (now - self.began)
            left = duration((self.views - self.done) / rate)
            print(f"{self.done:,}/{self.views:,} views  {rate:,.1f} views/s  {left} left", flush=True)


class _Kept:
    """`target`, and what was drawn for it: `boxes` (B, 4), `flips` (B,) and `seeds` (B,), their 64 bits as int64."""

    def __init__(self, views: PretrainViews) -> None:
        self.views = views

    def __call__(self, images: Sequence[Picture], seeds_B: NDArray[np.uint64]) -> dict[str, torch.Tensor]:
        """As `mimetic.data.stream.Transform`."""
        drawn = self.views.augmentation.draw(images, seeds_B)
        return self.views.made(images, drawn, ("target",)) | {
            "boxes": torch.from_numpy(drawn.boxes_B4), "flips": torch.from_numpy(drawn.flips_B),
            "seeds": torch.from_numpy(drawn.seeds_B.view(np.int64)),
        }  # fmt: skip


@contextmanager
def _alone(folder: Path, rank: int) -> Iterator[None]:
    """Holds the folder, created if need be; processes of one job each hold their own number.

    Raises:
        SettingError: it cannot be written, holds something else, or another job is at work.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".process-{rank}").open("w")
    except OSError as error:
        raise SettingError(f"{folder} cannot be written ({error.strerror}); give another folder") from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: workers inherit that, and outlive a killed process
        except OSError:
            raise SettingError(f"{folder} is being written by another process; wait for it or end it, or give another folder") from None
        yield


def refuse_to_overwrite(folder: Path) -> None:
    """Refuses a folder that holds anything but tokens.

    Raises:
        SettingError: the line names what is in the way.
    """
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"{folder} is a file; give a new folder")
    found = sorted(path.name for path in folder.glob("*") if not path.name.startswith(".")) if folder.exists() else []
    if found and CONTENTS not in found:
        raise SettingError(f"{folder} holds {found[0]} and no {CONTENTS}; give a new folder, so that nothing of yours is overwritten")
