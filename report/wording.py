"""Numbers and names as they are printed."""

import math
import re

MINUS = "\u2212"


def percent(share: float, unit: str = " %") -> str:
    """ "79.3 %"."""
    return f"{100 * share:.1f}{unit}" if math.isfinite(share) else "not a number"


def signed(points: float) -> str:
    """With its sign, a true minus."""
    return f"{points:+.1f}".replace("-", MINUS)


def whole(number: float | None) -> str:
    """ "10,000"; a dash for what is unknown or has no meaning."""
    return f"{number:,.0f}" if number else "–"


def seconds(number: float) -> str:
    """Whole seconds, or tenths below ten."""
    return "–" if not number else f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def plain(metric: str) -> str:
    """ "test accuracy"."""
    return metric.replace("_", " ")


def slug(name: str) -> str:
    """A file name: letters, digits and single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "run"


def short(number: float) -> str:
    """ "9,600"; "384 M" from ten thousand on."""
    for least, unit, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if math.isfinite(number) and abs(number) >= least:
            return f"{number / unit:.4g} {suffix}"
    return f"{number:,.0f}" if number == number // 1 or abs(number) >= 100 else f"{number:.3g}"
