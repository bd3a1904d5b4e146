"""Images of more than 8 bits that are to be packed without a pixel range: what their values are, and what to do about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimetic.data.decode import NPY_MAGIC, is_deep, is_sixteen_bits, open_array, open_picture
from mimetic.data.packing.items import Item
from mimetic.data.packing.moments import evenly, how_many_measured
from mimetic.data.pixelrange import as_typed
from mimetic.engine.errors import DataError

MAY_BE_DEEP = ("npy", "png", "tif", "tiff", "pgm", "pnm")


@dataclass
class Depth:
    """Images of one kind: their dtype, `images` among those `of` the set that were looked at, and the range of their values."""

    dtype: str
    of: int
    images: int = 0
    low: float = float("inf")
    high: float = -float("inf")

    def __str__(self) -> str:
        return f"of {self.dtype} with values from {self.low:.7g} to {self.high:.7g} ({self.images} looked at)"


def refuse_unknown_range(items: Sequence[Item], command: str, told: Callable[[str], None]) -> None:
    """Looks at some images before any is taken without a pixel range.

    Args:
        items: of them all.
        command: what `--range` is to be added to.
        told: takes a line for the user where 16-bit pictures are going to be cut to 8 bits.

    Raises:
        DataError: most images are arrays of more than 8 bits or pictures of 32; the line names their values and the range that would
            do. A few are no reason: they are rejected as they are packed.
    """
    unknown, sixteen_bits = _looked_at(items)
    if unknown and 2 * unknown.images > unknown.of:
        raise DataError(f"images {unknown}: say which values become 0 and 1, `{command} --range {_range_of(unknown)}`")
    if sixteen_bits:
        told(f"pictures {sixteen_bits} are cut to 8 bits; `{command} --range {_range_of(sixteen_bits)}` keeps them all")


def _looked_at(items: Sequence[Item]) -> tuple[Depth | None, Depth | None]:
    """Images that need a range and pictures of 16 bits, None where there are none."""
    may_be = [item for item in items if item.extension.lower() in MAY_BE_DEEP and item.pixels_HW is None]
    found: dict[bool, Depth] = {}
    places = evenly(len(may_be), how_many_measured(len(may_be), sum(item.size for item in may_be))).tolist()
    of = max(1, round(len(places) * len(items) / max(1, len(may_be))))
    for place in places:
        try:
            with may_be[place].open() as file:
                if not is_deep(file):
                    continue
            raw, needs_range = _read(may_be[place].read())
        except (OSError, ValueError):  # told when it is packed
            continue
        if (finite := raw[np.isfinite(raw)]).size:
            depth = found.setdefault(needs_range, Depth(raw.dtype.name, of))
            depth.images += 1
            depth.low, depth.high = min(depth.low, float(finite.min())), max(depth.high, float(finite.max()))
    return found.get(True), found.get(False)


def _read(content: bytes) -> tuple[NDArray[Any], bool]:
    """An image's own numbers, and whether they need a range: pictures of 16 bits are cut to 8 without one."""
    if content.startswith(NPY_MAGIC):
        return open_array(content), True
    picture = open_picture(content)
    return np.asarray(picture), not is_sixteen_bits(picture)


def _range_of(depth: Depth) -> str:
    return as_typed((depth.low, depth.high if depth.high > depth.low else depth.low + 1))
