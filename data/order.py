"""The order of samples: which one comes at which place of an endless sequence, in O(1) for any place.

A stream reads places one after the other, so a position in the data is a number, resuming is a seek, and the sequence does not
depend on how many processes share it. Memory grows with shards, not with samples.

Legend: N places that are asked for.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mimetic.data.randomness import mix

CANONICAL_STREAMS = 8
SHUFFLE_BLOCK = 8192
SHARDS, BLOCKS = range(2)  # what a draw is for
CYCLE = 10_000  # places that are dealt out to several sets at a time: so fine are their weights

Places = NDArray[np.int64]


class Order(Protocol):
    """Samples by place. An epoch has `samples` places; their numbers go on from one epoch to the next."""

    samples: int

    @property
    def parts(self) -> "list[InOrder | Shuffled]":
        """The order of each data set."""
        ...

    def streams_of(self, place_N: Places) -> Places:
        """The canonical stream that each place is read from."""
        ...

    def draw(self, place_N: Places) -> tuple[Places, Places]:
        """The sample at each place, and in which epoch of its own data set it is."""
        ...


class InOrder:
    """Samples as they lie, epoch after epoch.

    Args:
        samples: how many.
        shards: numbers of those that hold any.
    """

    streams, block = 1, 1

    def __init__(self, samples: int, shards: Places) -> None:
        self.samples, self.shards = samples, shards

    @property
    def parts(self) -> "list[InOrder | Shuffled]":
        """Itself."""
        return [self]

    def streams_of(self, place_N: Places) -> Places:
        """All one stream."""
        return np.zeros_like(place_N)

    def draw(self, place_N: Places) -> tuple[Places, Places]:
        """As `Order.draw`."""
        return place_N % self.samples, place_N // self.samples


class Shuffled:
    """Another permutation of all samples in every epoch.

    Shards are permuted and laid end to end, the line is cut into `streams` equal parts, each part is shuffled within blocks of
    `block` samples, and the parts are read in turn, one sample each. So a batch mixes `streams` places of the data, while each place
    is read nearly in sequence: a machine that reads some of the streams needs their shards alone, a few at a time. Every second part
    is read from its end: then neighbours meet at a cut at the same time, and the shard that lies across it is needed once.

    Args:
        sizes: samples of each shard; shards may be empty.
        seed: of the order.
        streams: the canonical streams S.
        block: samples within which a stream is shuffled.
    """

    def __init__(self, sizes: Places, seed: int, *, streams: int = CANONICAL_STREAMS, block: int = SHUFFLE_BLOCK) -> None:
        self.seed, self.streams, self.block = seed, streams, block
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.samples, self.shards = int(self.starts[-1]), np.flatnonzero(sizes)
        self.lines: dict[int, tuple[Places, Places]] = {}
        self.shuffles: dict[tuple[int, int, int], Places] = {}

    @property
    def parts(self) -> "list[InOrder | Shuffled]":
        """Itself."""
        return [self]

    def streams_of(self, place_N: Places) -> Places:
        """As `Order.streams_of`: the longer parts come first, so that the last round is cut off and yet in turn."""
        return place_N % self.samples % self.streams

    def draw(self, place_N: Places) -> tuple[Places, Places]:
        """As `Order.draw`."""
        epoch_N, place_N = np.divmod(place_N, self.samples)
        sample_N = np.empty_like(place_N)
        for epoch in np.unique(epoch_N).tolist():
            here = epoch_N == epoch
            sample_N[here] = self._sample(epoch, self._line_places(epoch, place_N[here]))
        return sample_N, epoch_N

    def _line_places(self, epoch: int, place_N: Places) -> Places:
        """Where on the epoch's line each place is read."""
        turn_N, part_N = np.divmod(place_N, self.streams)
        block_N, within_N = np.divmod(turn_N, self.block)
        group_N = block_N * self.streams + part_N
        line_N = np.empty_like(place_N)
        order = np.argsort(group_N, kind="stable")
        groups, first = np.unique(group_N[order], return_index=True)
        for group, members in zip(groups.tolist(), np.split(order, first[1:]), strict=True):
            block, part = divmod(group, self.streams)
            line_N[members] = self._shuffle(epoch, part, block)[within_N[members]]
        return line_N

    def _shuffle(self, epoch: int, part: int, block: int) -> Places:
        """The line places of one block in the order in which they are read; the blocks last used are kept."""
        known = (epoch, part, block)
        if known not in self.shuffles:
            share, longer = divmod(self.samples, self.streams)
            begin = part * share + min(part, longer)
            end = begin + share + (part < longer)
            turn = np.arange(block * self.block, min((block + 1) * self.block, end - begin))
            place = end - 1 - turn if part % 2 else begin + turn
            while len(self.shuffles) >= 2 * self.streams:
                del self.shuffles[next(iter(self.shuffles))]
            self.shuffles[known] = place[np.argsort(mix(self.seed, epoch, BLOCKS, place), kind="stable")]
        return self.shuffles[known]

    def _sample(self, epoch: int, line_N: Places) -> Places:
        """The samples at some places of an epoch's line of permuted shards."""
        if epoch not in self.lines:
            sizes = np.diff(self.starts)
            shards = np.argsort(mix(self.seed, epoch, SHARDS, np.arange(len(sizes))), kind="stable")
            while len(self.lines) >= 2:
                del self.lines[next(iter(self.lines))]
            self.lines[epoch] = shards, np.concatenate([[0], np.cumsum(sizes[shards])])
        shards, begins = self.lines[epoch]
        turn_N = np.searchsorted(begins, line_N, "right") - 1  # the last of equals: an empty shard holds no place
        return self.starts[shards[turn_N]] + line_N - begins[turn_N]


class Chosen:
    """An order over some samples of a set.

    Args:
        members: sample numbers.
        order: of so many samples; what it draws are places in `members`.
    """

    def __init__(self, members: Places, order: Order) -> None:
        self.members, self.order, self.samples = members, order, order.samples

    @property
    def parts(self) -> "list[InOrder | Shuffled]":
        """As `Order.parts`."""
        return self.order.parts

    def streams_of(self, place_N: Places) -> Places:
        """As `Order.streams_of`."""
        return self.order.streams_of(place_N)

    def draw(self, place_N: Places) -> tuple[Places, Places]:
        """As `Order.draw`."""
        member_N, epoch_N = self.order.draw(place_N)
        return self.members[member_N], epoch_N


class Mixed:
    """Several data sets by weight. Each is walked in its own order, epoch after epoch of its own; an epoch here is a stated number.

    Places are dealt out in cycles of CYCLE, of which each set has its exact share, shuffled within the cycle.

    Args:
        orders: of each set; sample numbers of a set go on from those of the sets before it.
        offsets: the first sample number of each set.
        weights: of each set, of any scale.
        seed: of the dealing.
        samples: places of an epoch.
    """

    def __init__(self, orders: list[Order], offsets: list[int], weights: list[float], seed: int, samples: int) -> None:
        self.orders, self.offsets, self.shares, self.seed, self.samples = orders, offsets, shares(weights), seed, samples
        self.cycles: dict[int, tuple[Places, Places]] = {}

    @property
    def parts(self) -> "list[InOrder | Shuffled]":
        """As `Order.parts`."""
        return [part for order in self.orders for part in order.parts]

    def streams_of(self, place_N: Places) -> Places:
        """As `Order.streams_of`."""
        return self._by_set(place_N, lambda order, turn_N: (order.streams_of(turn_N), turn_N))[0]

    def draw(self, place_N: Places) -> tuple[Places, Places]:
        """As `Order.draw`."""
        return self._by_set(place_N, lambda order, turn_N: order.draw(turn_N), self.offsets)

    def _by_set(self, place_N: Places, of: Callable[[Order, Places], tuple[Places, Places]],
                offsets: list[int] | None = None) -> tuple[Places, Places]:  # fmt: skip
        set_N, turn_N = self._dealt(place_N)
        first_N, second_N = np.empty_like(place_N), np.empty_like(place_N)
        for number, order in enumerate(self.orders):
            here = set_N == number
            first_N[here], second_N[here] = of(order, turn_N[here])
            if offsets:
                first_N[here] += offsets[number]
        return first_N, second_N

    def _dealt(self, place_N: Places) -> tuple[Places, Places]:
        """Which set each place belongs to, and how many places that set had before."""
        cycle_N, within_N = np.divmod(place_N, self.shares.sum())
        set_N, turn_N = np.empty_like(place_N), np.empty_like(place_N)
        for cycle in np.unique(cycle_N).tolist():
            here = cycle_N == cycle
            sets, turns = self._cycle(cycle)
            set_N[here], turn_N[here] = sets[within_N[here]], turns[within_N[here]]
        turn_N += cycle_N * self.shares[set_N]
        return set_N, turn_N

    def _cycle(self, cycle: int) -> tuple[Places, Places]:
        if cycle not in self.cycles:
            places = self.shares.sum()
            sets = np.repeat(np.arange(len(self.shares)), self.shares)
            sets = sets[np.argsort(mix(self.seed, cycle, np.arange(places)), kind="stable")]
            by_set = np.argsort(sets, kind="stable")
            turns = np.empty_like(by_set)
            turns[by_set] = np.arange(places) - np.repeat(np.cumsum(self.shares) - self.shares, self.shares)
            while len(self.cycles) >= 2:
                del self.cycles[next(iter(self.cycles))]
            self.cycles[cycle] = sets, turns
        return self.cycles[cycle]


def shares(weights: list[float]) -> Places:
    """Places of each set in a cycle: CYCLE by weight, the largest remainders rounded up."""
    exact = np.array(weights) / sum(weights) * CYCLE
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: CYCLE - whole.sum()]] += 1
    return whole
