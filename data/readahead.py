"""Shards from elsewhere are fetched before they are read."""

import copy
import os
import threading
from collections import OrderedDict, deque
from queue import SimpleQueue

from mimetic.data.batches import BatchPlan
from mimetic.data.fetch import is_address
from mimetic.data.index import Index, located
from mimetic.data.mixture import Mixture
from mimetic.engine.errors import MimeticError, SettingError

FETCHERS = 4  # shards that a process fetches at a time
FARTHEST = 4096  # batches that the plan is walked ahead


class ReadAhead:
    """Walks the plan ahead of the reader, and fetches what it is going to meet into the cache.

    What is ahead of all readers of a machine takes no more than a fourth of the cache. Copies give way by age: between the fetch of a
    shard and its reading, as much again may be fetched behind it, and what is read meanwhile must stay too. Failures are left to
    the reader, who meets them in turn and says so.

    Args:
        source: the samples' shards.
        plan: of this rank.
        begin: the batch that is read next.
        stop: the batch after the last.
    """

    def __init__(self, source: Index | Mixture, plan: BatchPlan, begin: int, stop: int) -> None:
        self.source, self.begin, self.stop = source, begin, stop
        self.plan = copy.deepcopy(plan)  # its order remembers what it drew last, and the reader draws from another thread
        self.budget = source.cache.limit // 4 // readers(plan)
        self.shards = sum(len(index.shards) for index in source.indexes)
        self.wanted: SimpleQueue[tuple[Index, int] | None] = SimpleQueue()
        self.ahead: deque[tuple[int, int]] = deque()  # batch that first needs a shard, and the shard's bytes
        self.turned, self.reading, self.closed = threading.Condition(), begin, False

    def __enter__(self) -> "ReadAhead":
        works = (self._walk, *[self._fetch] * FETCHERS)
        self.walker, *fetchers = (threading.Thread(target=work, name="read-ahead", daemon=True) for work in works)
        for thread in (self.walker, *fetchers):
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.turned:
            self.closed = True
            self.turned.notify_all()
        for _fetcher in range(FETCHERS):
            self.wanted.put(None)
        self.walker.join()  # a thread in the middle of its arithmetic would not survive the interpreter's end

    def reached(self, step: int) -> None:
        """Tells which batch is being read now."""
        with self.turned:
            self.reading = step
            self.turned.notify_all()

    def _walk(self) -> None:
        met: OrderedDict[tuple[str, int], int] = OrderedDict()
        kept = 0
        for step in range(self.begin, self.stop):
            if len(met) == self.shards or not self._has_room(step - FARTHEST, 0):
                return
            for index, shard in self.source.shards_of(self.plan.batch(step)[0]):
                known, size = (index.home, shard), index.shards[shard]["bytes"]
                if known in met:
                    met.move_to_end(known)
                    continue
                if not self._has_room(step, size):
                    return
                met[known] = size
                kept += size
                while kept > self.budget and len(met) > 1:  # it may have been evicted since
                    kept -= met.popitem(last=False)[1]
                if is_address(located(index.home, index.shards[shard]["name"])):
                    self.wanted.put((index, shard))

    def _has_room(self, step: int, size: int) -> bool:
        """Waits until a shard of `size` may be fetched for batch `step`; False if the reader has left."""
        with self.turned:
            while not self.closed:
                while self.ahead and self.ahead[0][0] <= self.reading:
                    self.ahead.popleft()
                if step <= self.reading or (size and sum(known[1] for known in self.ahead) + size <= self.budget):
                    if size:
                        self.ahead.append((step, size))
                    return True
                self.turned.wait()
        return False

    def _fetch(self) -> None:
        while (wanted := self.wanted.get()) and not self.closed:
            index, shard = wanted
            try:
                index.path(shard)
            except MimeticError:
                continue  # the reader meets it too


class NothingAhead:
    """All shards are on this machine."""

    def __enter__(self) -> "NothingAhead":
        return self

    def __exit__(self, *_: object) -> None: ...

    def reached(self, step: int) -> None:
        """Nobody needs to know."""


def read_ahead(source: Index | Mixture, plan: BatchPlan, begin: int, stop: int) -> ReadAhead | NothingAhead:
    """The read-ahead of a stream, for a `with`.

    Raises:
        SettingError: the cache does not hold what is read at the same time.
    """
    elsewhere = [
        index.shards[shard]["bytes"]
        for index, order in zip(source.indexes, plan.order.parts, strict=True)
        for shard in order.shards
        if is_address(located(index.home, index.shards[shard]["name"]))
    ]
    if not elsewhere:
        return NothingAhead()
    needed, limit = min(sum(elsewhere), 2 * read_at_once(source, plan)), source.cache.limit
    if needed > limit:
        raise SettingError(
            f"data.cache_gb is {limit / 1e9:.3g}, but the shards that this machine reads at the same time and those next in line have "
            f"{needed / 1e9:.3g} GB; raise it, or lower data.canonical_streams or data.shuffle_block"
        )
    return ReadAhead(source, plan, begin, stop)


def readers(plan: BatchPlan) -> int:
    """Processes of this run on one machine, as the launcher says; without one, all may be here."""
    return min(plan.world, int(os.environ.get("LOCAL_WORLD_SIZE", plan.world)))


def read_at_once(source: Index | Mixture, plan: BatchPlan) -> int:
    """Bytes of the shards that the processes of one machine read at the same time, about: what its streams' shuffle blocks span."""
    total = 0
    for index, order in zip(source.indexes, plan.order.parts, strict=True):
        streams = order.streams if plan.global_batch * plan.accumulate % order.streams else -(-order.streams * readers(plan) // plan.world)
        spanned = order.block / (order.samples / len(order.shards)) + 1
        mean = sum(index.shards[shard]["bytes"] for shard in order.shards) / len(order.shards)
        total += int(min(streams * spanned, len(order.shards)) * mean)
    return total
