"""Pixel ranges: which values of deeper pixels than 8 bits become 0 and 1."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimetic.engine.errors import SettingError

Range = tuple[float, float]


def pixel_range(values: Sequence[float] | None) -> Range | None:
    """(LOW, HIGH) of what was given as `--range`.

    Raises:
        SettingError: LOW is not below HIGH, or one is not finite.
    """
    if values is None:
        return None
    low, high = (float(value) for value in values)
    if not low < high or not math.isfinite(high - low):
        raise SettingError(f"--range is {as_typed((low, high))}; LOW, which becomes 0, must be below HIGH, which becomes 1")
    return low, high


def mapped(raw: NDArray[Any], limits: Range) -> NDArray[np.float32]:
    """float32 in [0, 1] of the same shape and order in memory: (raw - LOW) / (HIGH - LOW), clamped.

    16 bits fit float32 without loss; what is wider is taken off LOW as float64.
    """
    low, high = limits
    kind = np.float32 if raw.dtype.itemsize <= 2 else np.float64
    values = np.subtract(raw, kind(low), dtype=kind)
    values /= kind(high - low)
    return np.clip(values, 0, 1, out=values).astype(np.float32, copy=False)


def outside(raw: NDArray[Any], limits: Range) -> int:
    """How many values lie below LOW or above HIGH."""
    return int(np.count_nonzero(raw < limits[0]) + np.count_nonzero(raw > limits[1]))


def called(limits: Range | None) -> str:
    """What a set's pixels are, as a message says it."""
    return f"the pixel range {as_typed(limits)}" if limits else "8-bit pixels"


def as_typed(limits: Range) -> str:
    """As it is typed after `--range`: without exponents, since a command line takes -1e-05 for a flag."""
    return " ".join(np.format_float_positional(float(value), 7, unique=False, fractional=False, trim="-") for value in limits)
