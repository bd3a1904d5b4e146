"""Figures, each one set of axes in a small PNG, so that a page can put two beside each other and a phone one below the other."""

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Okabe and Ito's palette, told apart under the common colour blindnesses (jfly.uni-koeln.de/color); its yellow is too pale here.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
MARKERS = "osD^vPX*"  # a second sign beside the colour, for prints in grey
GREY = "#666666"
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333", "xtick.color": "#555555", "ytick.color": "#555555", "axes.grid": True, "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8, "axes.axisbelow": True, "figure.facecolor": "white", "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.4g} %")
LONGEST = 40  # letters of a name in a figure; tables have it whole


@dataclass(frozen=True)
class Series:
    """A line: `colour` is the same number for the same run in every figure."""

    label: str
    colour: int
    xs: Sequence[float]
    ys: Sequence[float]


def curves(y_label: str, series: Sequence[Series], *, share: bool = False, level: tuple[str, float] | None = None) -> bytes:
    """Lines against images seen.

    Args:
        y_label: with its unit.
        share: y is in [0, 1] and printed in percent.
        level: label and height of a dashed line to compare with.
    """

    def draw(axes: Axes) -> None:
        for line in series:
            ys = [y if math.isfinite(y) else math.nan for y in line.ys]
            colour, few = COLOURS[line.colour % len(COLOURS)], max(1, len(ys) // 6)
            axes.plot(line.xs, ys, color=colour, lw=1.7, marker=MARKERS[line.colour % len(MARKERS)], ms=4.5,
                      markevery=(line.colour % few, few), label=_short(line.label))  # fmt: skip
        if level:
            axes.axhline(level[1], color=GREY, ls=(0, (5, 3)), lw=1.2, label=_short(level[0], 2 * LONGEST))
        axes.set(xlabel="images seen in training", ylabel=y_label, xlim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        if share:
            axes.set_ylim(bottom=None if axes.dataLim.y0 > axes.dataLim.y1 / 2 else 0)  # from 0 where most of the height is used
            axes.yaxis.set_major_formatter(PERCENT)

    return _png(draw, (5.2, 3.7), legend=len(series) + bool(level) > 1)


def intervals(x_label: str, rows: Sequence[tuple[str, float, tuple[float, float] | None, int]]) -> bytes:
    """Shares as dots with their 95 % intervals; rows of (name, share, interval, colour), the first on top."""

    def draw(axes: Axes) -> None:
        for place, (_, value, within, colour) in enumerate(rows):
            low, high = within or (value, value)
            shade = COLOURS[colour % len(COLOURS)]
            axes.plot([low, high], [place, place], color=shade, lw=2.4, solid_capstyle="butt")
            axes.plot([value], [place], color=shade, marker=MARKERS[colour % len(MARKERS)], ms=8)
            axes.annotate(f"{100 * value:.1f} %", (value, place), (0, 8), textcoords="offset points", ha="center", color="#222222")
        axes.set(xlabel=x_label, ylim=(len(rows) - 0.5, -0.7))
        axes.set_yticks(range(len(rows)), [textwrap.fill(_short(name), 22) for name, *_ in rows], color="#222222")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(PERCENT)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.08)
        axes.grid(axis="y", visible=False)

    return _png(draw, (5.8, 0.8 + 0.46 * len(rows)))


def code_ranks(counts: Sequence[int]) -> bytes:
    """Share of each code among all cells, the commonest first, on a log scale; unused codes leave their place empty."""
    shares = np.sort(np.asarray(counts, dtype=float))[::-1] / max(1, sum(counts))
    used = int((shares > 0).sum())

    def draw(axes: Axes) -> None:
        ranks, floor = np.arange(1, used + 1), shares[used - 1] / 3
        axes.fill_between(ranks, shares[:used], floor, step="mid", color=COLOURS[0], alpha=0.3, lw=0)
        axes.step(ranks, shares[:used], where="mid", color=COLOURS[0], lw=1.6, label="measured")
        axes.axhline(1 / len(shares), color=COLOURS[1], ls=(0, (5, 3)), lw=1.4, label=f"all codes equally common (1 in {len(shares):,})")
        if used < len(shares):
            axes.axvspan(used + 0.5, len(shares) + 0.5, color="#eeeeee", lw=0, label=f"{len(shares) - used:,} codes never used")
        axes.set(yscale="log", xlabel="codes, the commonest first", ylabel="share of all cells (log scale)",
                 xlim=(0.5, len(shares) + 0.5), ylim=(floor, 1.4))  # fmt: skip
        axes.yaxis.set_major_formatter(PERCENT)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    return _png(draw, (5.2, 3.7), legend=True)


def _png(draw: Callable[[Axes], None], inches: tuple[float, float], *, legend: bool = False) -> bytes:
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # an arm may be named in any script
        canvas = Canvas(figsize=inches, layout="constrained")
        axes = canvas.add_subplot()
        draw(axes)
        if legend:
            handles, labels = axes.get_legend_handles_labels()
            short = max(map(len, labels), default=0) < 20
            canvas.legend(handles, labels, loc="outside upper left", ncols=3 if short else 2 if len(labels) > 4 else 1, fontsize=8.5)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=170, metadata={"Software": None})
    return buffer.getvalue()


def _short(name: str, longest: int = LONGEST) -> str:
    """One line; it keeps both ends, since names may differ in either. A leading underscore would hide it from the legend."""
    line = " ".join(name.split())
    line = line if len(line) <= longest else f"{line[: longest // 2]}…{line[longest // 2 + 1 - longest :]}"
    return f" {line}" if line.startswith("_") else line
