"""Which samples make up which batch: the arithmetic of a stream, without a single image.

Legend: G samples of a global batch, b of them on one rank.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mimetic.data.order import Order, Places


@dataclass(frozen=True)
class BatchPlan:
    """Batches by number, counted over epochs.

    A global batch holds the next G places of the order. Within it, rows are sorted by canonical stream, and rank r of R takes rows
    [r*b, (r+1)*b): so the sequence of global batches does not depend on R, and a rank meets the same streams again and again.

    Attributes:
        order: of the samples.
        batch_size: b, samples per rank and batch.
        rank: r.
        world: R.
        tail: "pad" fills the last batch of an epoch up with samples of that epoch, "drop" leaves it out.
    """

    order: Order
    batch_size: int
    rank: int = 0
    world: int = 1
    tail: str = "pad"

    @property
    def global_batch(self) -> int:
        """G."""
        return self.batch_size * self.world

    @property
    def steps(self) -> int:
        """Batches of an epoch, on every rank."""
        whole, rest = divmod(self.order.samples, self.global_batch)
        return whole + (1 if rest and self.tail == "pad" else 0)

    def batch(self, step: int) -> tuple[Places, Places, NDArray[np.bool_]]:
        """This rank's samples (b,), the epoch of their own data set that each is in, and whether it is valid or a filler."""
        epoch, number = divmod(step, self.steps)
        turn_G = np.arange(number * self.global_batch, (number + 1) * self.global_batch)
        place_G = epoch * self.order.samples + turn_G % self.order.samples
        mine_b = np.argsort(self.order.streams_of(place_G), kind="stable")[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        sample_b, epoch_b = self.order.draw(place_G[mine_b])
        return sample_b, epoch_b, turn_G[mine_b] < self.order.samples
