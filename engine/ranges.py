"""Which numbers a setting may have, and which settings need each other; recipes refuse the rest before anything is loaded."""

import math
from typing import Any, NamedTuple

from mimetic.engine.errors import SettingError


class Range(NamedTuple):
    """Values that a setting may have: from `low` to `high`, the ends included unless said otherwise."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # low itself is refused
    below: bool = False  # high itself is refused

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        return f"in {'(' if self.above else '['}{self.low:.10g}, {self.high:.10g}{')' if self.below else ']'}"


COUNT, POSITIVE, NOT_NEGATIVE = Range(1), Range(0, above=True), Range(0)
SHARE, SOME_SHARE, BELOW_ONE = Range(0, 1), Range(0, 1, above=True), Range(0, 1, below=True)
SOME, GIGABYTES = Range(1, 1 << 31), Range(0, 1e9, above=True)
SEED = Range(0, (1 << 32) - 1)


def require(settings: Any, section: str = "", **allowed: Range) -> None:
    """Refuses numbers that mean nothing; None stands for a default and passes.

    Args:
        section: how the settings are reached, such as "optim".
        allowed: range of each setting, by its name. A list is judged value by value.

    Raises:
        SettingError: names the first setting outside its range, its value and the range.
    """
    for name, (low, high, above, below) in allowed.items():
        value = getattr(settings, name)
        for each in value if isinstance(value, list) else () if value is None else (value,):
            if not low <= each <= high or (above and each == low) or (below and each == high):
                raise SettingError(f"{section}{'.' * bool(section)}{name} is {value}; it must be {allowed[name]}")


def require_together(settings: Any, section: str, one: str, other: str) -> None:
    """Refuses one of two settings without the other.

    Raises:
        SettingError: names both.
    """
    if (getattr(settings, one) is None) != (getattr(settings, other) is None):
        raise SettingError(f"{section}.{one} and {section}.{other} belong together; give both or neither")
