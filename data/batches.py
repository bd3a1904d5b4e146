"""Which samples make up which batch: the arithmetic of a stream, without a single image.

Legend: S samples of an optimizer step, G of a global batch (S, or S / accumulate), b of them on one rank.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mimetic.data.order import Order, Places


@dataclass(frozen=True)
class BatchPlan:
    """Batches by number, counted over epochs.

    A step holds the next S places of the order. Within it, rows are sorted by canonical stream, rank r of R takes S/R of them from
    row r*S/R on, and micro-batch m the next b of those: so what is in a step depends neither on R nor on the number of
    micro-batches, and a rank meets the same streams again and again.

    Attributes:
        order: of the samples.
        batch_size: b, samples per rank and batch.
        rank: r.
        world: R.
        tail: "pad" fills the last step of an epoch up with samples of that epoch, "drop" leaves it out.
        accumulate: micro-batches that make up a step.
    """

    order: Order
    batch_size: int
    rank: int = 0
    world: int = 1
    tail: str = "pad"
    accumulate: int = 1

    @property
    def global_batch(self) -> int:
        """G."""
        return self.batch_size * self.world

    @property
    def steps(self) -> int:
        """Batches of an epoch, on every rank."""
        whole, rest = divmod(self.order.samples, self.global_batch * self.accumulate)
        return (whole + (1 if rest and self.tail == "pad" else 0)) * self.accumulate

    def batch(self, number: int) -> tuple[Places, Places, NDArray[np.bool_]]:
        """This rank's samples (b,), the epoch of their own data set that each is in, and whether it is valid or a filler."""
        epoch, number = divmod(number, self.steps)
        step, part = divmod(number, self.accumulate)
        together = self.global_batch * self.accumulate
        turn_S = np.arange(step * together, (step + 1) * together)
        place_S = epoch * self.order.samples + turn_S % self.order.samples
        first = (self.rank * self.accumulate + part) * self.batch_size
        mine_b = np.argsort(self.order.streams_of(place_S), kind="stable")[first : first + self.batch_size]
        sample_b, epoch_b = self.order.draw(place_S[mine_b])
        return sample_b, epoch_b, turn_S[mine_b] < self.order.samples
