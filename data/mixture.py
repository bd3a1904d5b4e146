"""Several data sets as one, by weight."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mimetic.data.cache import ShardCache
from mimetic.data.index import UNLABELLED, Index
from mimetic.data.order import CYCLE, Mixed, Order, shares
from mimetic.data.pixelrange import Range, called
from mimetic.engine.errors import SettingError


@dataclass(frozen=True)
class Mixture:
    """Indexes and their weights; it reads as an index does, its samples are numbered through the sets.

    Attributes:
        indexes: of each set.
        weights: share of each set in what is read, of any scale.
        epoch_samples: samples of what counts as an epoch.

    Raises:
        SettingError: sets of different channels or pixel ranges, or a weight that no sample follows from.
    """

    indexes: tuple[Index, ...]
    weights: tuple[float, ...]
    epoch_samples: int

    def __post_init__(self) -> None:
        first = self.indexes[0]
        for index, weight, share in zip(self.indexes, self.weights, shares(list(self.weights)), strict=True):
            if index.channels != first.channels:
                raise SettingError(f"{index.home} has {index.channels} channels, {first.home} has {first.channels}; sets that are mixed "
                                   "need the same, pack them with --channels")  # fmt: skip
            if index.range != first.range:
                raise SettingError(f"{index.home} has {called(index.range)}, {first.home} has {called(first.range)}; sets that are mixed "
                                   "need the same, pack or index them with the same --range")  # fmt: skip
            if not share:
                raise SettingError(f"data.index gives {index.home} the weight {weight} of {sum(self.weights)}, less than one sample in "
                                   f"{CYCLE:,}; raise it or leave the set out")  # fmt: skip

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """The first sample number of each set, and how many there are."""
        return np.cumsum([0, *map(len, self.indexes)])

    @property
    def cache(self) -> ShardCache:
        """Of shards that lie elsewhere."""
        return self.indexes[0].cache

    @property
    def home(self) -> str:
        """What a message calls it."""
        return " + ".join(index.home for index in self.indexes)

    @property
    def channels(self) -> int:
        """Of every image."""
        return self.indexes[0].channels

    @property
    def range(self) -> Range | None:
        """Of pixels, the same in every set."""
        return self.indexes[0].range

    @property
    def classes(self) -> list[str]:
        """None: a label number means something else in each set."""
        return []

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of what is read."""
        return tuple(self._by_weight([index.mean for index in self.indexes]).round(6).tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, of what is read."""
        squares = self._by_weight([np.square(index.mean) + np.square(index.std) for index in self.indexes])
        return tuple(np.sqrt(squares - np.square(self.mean)).round(6).tolist())

    @property
    def fingerprint(self) -> str:
        """Names this very content."""
        named = [(index.fingerprint, weight) for index, weight in zip(self.indexes, self.weights, strict=True)]
        return hashlib.sha256(repr((named, self.epoch_samples)).encode()).hexdigest()[:16]

    def order(self, seed: int, *, shuffle: bool, streams: int, block: int, members: NDArray[np.int64] | None = None) -> Order:
        """Each set in an order of its own, dealt out by weight.

        Raises:
            SettingError: `members` are asked for.
        """
        if members is not None:
            raise SettingError(f"some samples of {self.home} are asked for, but sets are mixed as a whole; give one index")
        orders = [index.order(seed, shuffle=shuffle, streams=streams, block=block) for index in self.indexes]
        return Mixed(orders, self.offsets[:-1].tolist(), list(self.weights), seed, self.epoch_samples)

    def labels(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Nothing but -1, see `classes`."""
        return np.full(len(samples), UNLABELLED, np.int64)

    def keys(self, samples: NDArray[np.int64]) -> list[str]:
        """The keys of samples, as text."""
        keys = [""] * len(samples)
        for index, here, within in self._by_set(samples):
            for place, key in zip(here.tolist(), index.keys(within), strict=True):
                keys[place] = key
        return keys

    def read(self, sample: int) -> bytes:
        """As `Index.read`."""
        ((index, _, within),) = self._by_set(np.array([sample]))
        return index.read(int(within[0]))

    def shards_of(self, samples: NDArray[np.int64]) -> list[tuple[Index, int]]:
        """The shards that hold any of the samples."""
        return [found for index, _, within in self._by_set(samples) for found in index.shards_of(within)]

    def _by_set(self, samples: NDArray[np.int64]) -> Iterator[tuple[Index, NDArray[np.int64], NDArray[np.int64]]]:
        """The sets that hold any of the samples: the index, which of the samples, and their numbers there."""
        numbers = np.searchsorted(self.offsets, samples, "right") - 1
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            yield self.indexes[number], here, samples[here] - self.offsets[number]

    def _by_weight(self, values: list) -> NDArray[np.float64]:
        return np.average(np.array(values), axis=0, weights=self.weights)
