"""Many shards in several processes, with one account of what has been done.

Processes are spawned, not forked: a fork of a process that has threads may hang. A worker ends as soon as its parent is gone.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from mimetic.engine.errors import DataError, SettingError

Task = TypeVar("Task")
Result = TypeVar("Result")
LOOK_EVERY = 0.2  # seconds
TELL_EVERY = 5.0  # seconds


class Stopped(Exception):  # noqa: N818
    """Another process has failed: what this one does is not wanted any more."""


class Tally:
    """What all processes of a job have done so far.

    Attributes:
        told: called with images and bytes after each change, where the work is done in this very process.
    """

    def __init__(self, numbers: Any, lock: Any, told: Callable[[int, int], None] | None = None) -> None:
        self.numbers, self.lock, self.told = numbers, lock, told

    def add(self, images: int, size: int) -> None:
        """Adds to the account.

        Raises:
            Stopped: the work was ended, in whichever process.
        """
        self._add(images, size, 0, 0)

    def add_bad(self, size: int, allowed: int) -> int:
        """Adds a bad image; returns how many there are by now. One more than `allowed` ends the work of all processes.

        Raises:
            Stopped: the work was ended, in whichever process: so one alone sees more than are allowed.
        """
        return self._add(1, size, 1, allowed)

    def _add(self, images: int, size: int, bad: int, allowed: int) -> int:
        with self.lock:
            if self.numbers[3]:
                raise Stopped
            for place, more in enumerate((images, size, bad)):
                self.numbers[place] += more
            total = self.numbers[2]
            if bad and total > allowed:
                self.numbers[3] = 1
        if self.told:
            self.told(self.numbers[0], self.numbers[1])
        return total

    def stop(self) -> None:
        """Ends the work of all processes at their next sample."""
        self.numbers[3] = 1


def count_of(workers: int | None) -> int:
    """How many processes `--workers` means: by default as many as there are CPUs for this one.

    Raises:
        SettingError: none.
    """
    if workers is not None:
        if workers < 1:
            raise SettingError(f"--workers is {workers}; it must be 1 or more")
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(work: Callable[[Task, Tally], Result], tasks: Sequence[Task], workers: int,
            told: Callable[[int, int], None] = lambda images, size: None, bad: int = 0) -> list[Result]:  # fmt: skip
    """`work(task, tally)` for each task, in up to `workers` processes; in this one if one is enough.

    Args:
        work: a function of a module, since other processes must find it.
        tasks: what can be pickled.
        workers: processes at the same time.
        told: called now and then with the images and bytes of the account.
        bad: where the account of bad ones begins.

    Raises:
        DataError: a worker was killed from outside; else whatever `work` raises first.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        here = Tally([0, 0, bad, 0], threading.Lock(), told)
        return [work(task, here) for task in tasks]
    context = multiprocessing.get_context("spawn")
    tally = Tally(context.RawArray("q", [0, 0, bad, 0]), context.Lock())
    with ProcessPoolExecutor(workers, context, _begin, (tally,)) as pool:
        futures = [pool.submit(_call, work, task) for task in tasks]
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, LOOK_EVERY, FIRST_COMPLETED)
                told(tally.numbers[0], tally.numbers[1])
                for failure in filter(None, (future.exception() for future in done)):
                    if isinstance(failure, Stopped):  # by one whose failure is still to come
                        continue
                    if isinstance(failure, BrokenProcessPool):
                        raise DataError(f"one of {workers} workers was killed (by lack of memory?); give fewer --workers") from None
                    raise failure
        except BaseException:
            tally.stop()
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


_tally: Tally


def _begin(tally: Tally) -> None:
    global _tally
    _tally = tally
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _call(work: Callable[[Task, Tally], Result], task: Task) -> Result:
    return work(task, _tally)


class Teller:
    """Prints how far a long job is, every few seconds: rates, and time left by bytes."""

    def __init__(self) -> None:
        self.started: tuple[float, int, int] | None = None
        self.told = 0.0

    def __call__(self, images: int, size: int, all_images: int, all_bytes: int) -> None:
        """Images and bytes that are done, and of how many (0: not known); the first call says what was there before."""
        now = time.perf_counter()
        if self.started is None:
            self.started, self.told = (now, images, size), now
        elif now - self.told > TELL_EVERY and size > self.started[2]:
            self.told = now
            seconds = now - self.started[0]
            rate = (size - self.started[2]) / seconds
            pace = f"{(images - self.started[1]) / seconds:,.0f} images/s  {rate / 1e6:,.1f} MB/s"
            total = f"/{all_images:,}" if all_images else " samples"
            left = f"  {max(0, all_bytes - size) / rate:,.0f} s left" if all_bytes else ""
            print(f"{images:,}{total}  {pace}{left}", flush=True)
