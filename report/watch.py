"""`mimetic watch`: a run in the terminal, while it goes on and afterwards."""

import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from plotille import Canvas
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mimetic.engine.errors import SettingError
from mimetic.engine.words import duration
from mimetic.report.follow import Followed, number, one_line
from mimetic.report.wording import percent, plain, short

STATES = {"running": ("●", "green"), "finished": ("✔", "green"), "stopped": ("■", "red"),
          "quiet": ("●", "yellow"), "unknown": ("●", "")}  # fmt: skip
COLOURS = ("cyan", "green", "yellow", "magenta", "blue")
HELD_OUT, PUBLISHED = "●", "◆"
PUBLISHED_METRICS = ("loss", "masked_accuracy")  # as in a recipe's `expected`
# What is told in words, or has a curve of its own behind the run's own metrics.
TOLD = {"step", "loss", "samples", "seconds", "bad_samples", "skipped_steps", "rewinds", "data_wait", "macs_per_second", "matrix_share",
        "predicted_codes_used", "predicted_codes_perplexity", "update_ratio", "activation_rms"}  # fmt: skip
LAST_CURVES = ("grad_norm", "learning_rate", "images_per_second")
NAMES = {"grad_norm": "gradient norm", "images_per_second": "images/s"}
NARROWEST = 38  # letters of a curve
FACT = 30  # and of a fact with its name
LEAST_ROWS, ROWS, MOST_ROWS = 3, 6, 10  # of a curve, ROWS where there is room for any number
BESIDE = 3  # lines of a curve that are not braille
LABEL = 8  # letters left of a curve
EVENTS = 3


def watch(run: str, once: bool, every: float) -> None:
    """Shows a run until it is finished, or until Ctrl-C; once where nobody looks at a terminal.

    Args:
        run: a run folder, or the address of one.
        once: print one frame and leave.
        every: seconds between looks.

    Raises:
        SettingError: `every` is no time.
        DataError: there is no run.
    """
    if not every > 0:
        raise SettingError(f"--every is {every:g}; it must be above 0")
    console, followed = Console(highlight=False), Followed(run)
    with closing(followed), suppress(KeyboardInterrupt):  # the terminal is as it was, and whoever watches has not interrupted the run
        followed.look()
        if not once and sys.stdout.isatty() and console.is_interactive:  # rich takes a pipe for a terminal where colours are forced
            _follow(console, followed, every)
        console.print(Frame(followed))


def _follow(console: Console, followed: Followed, every: float) -> None:
    with Live(Frame(followed), console=console, screen=True, auto_refresh=False) as live:
        while followed.state(time.time())[0] != "finished":
            again = time.monotonic() + every
            while (rest := again - time.monotonic()) > 0:
                live.refresh()  # each second: the silence grows, and the terminal may have another size
                time.sleep(min(1.0, rest))
            followed.look()


@dataclass(frozen=True)
class Frame:
    """A run as it is known now, as wide as the terminal, and no higher where it fills the screen."""

    followed: Followed

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        now, width = time.time(), options.max_width
        above = [*_head(self.followed, now, width), *_facts(self.followed, width), *_remarks(self.followed)]
        below, room = _events(self.followed), None
        if console.is_alt_screen:
            room = console.height - _lines(console, options, [*above, *below])
            more = room + _lines(console, options, below)
            if room < LEAST_ROWS + BESIDE <= more:
                room, below = more, []  # a curve tells more
        yield from above
        yield from _curves(self.followed, width, room)
        yield from below


def _lines(console: Console, options: ConsoleOptions, parts: Sequence[RenderableType]) -> int:
    return len(console.render_lines(Group(*parts), options)) if parts else 0


def _head(followed: Followed, now: float, width: int) -> Iterator[RenderableType]:
    state, told = followed.state(now)
    sign, colour = STATES[state]
    words = {"quiet": f"no news for {duration(followed.silence(now))}", "unknown": "no end so far"}.get(state, state)
    yield Text(followed.title, "bold", no_wrap=True, overflow="ellipsis")
    setup = " · ".join([*followed.setup, str(followed.place)])
    yield Text.assemble((f"{sign} {words}{': ' * bool(told)}{told}", colour), (f"  {setup}", "dim"), no_wrap=not told, overflow="ellipsis")
    if followed.lost:
        yield Text(f"not reached now: {followed.lost}", "yellow")
    if not followed.logs:
        yield Text("no line of metrics yet")
        return
    if followed.steps:
        share = followed.step / followed.steps
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(1.0, share, width - 7), f"{math.floor(100 * share):3d} %")
        yield bar
    yield Text(" · ".join(_progress(followed, now, state)))


def _progress(followed: Followed, now: float, state: str) -> Iterator[str]:
    yield f"step {followed.step:,}" + (f" of {followed.steps:,}" if followed.steps else "")
    yield f"{short(number(followed.last, 'samples'))} images"
    if followed.epochs:
        done, length = followed.epochs
        yield f"epoch {done:.1f} of {length:.1f}"
    if state == "finished":
        yield f"took {duration(number(followed.last, 'seconds'))}"
    elif math.isfinite(followed.left):
        going = state in ("running", "unknown")
        ends = time.strftime("%a %d %b %H:%M", time.localtime(followed.ends(now)))
        yield f"{duration(followed.left)} left, ends {ends}" if going else f"{duration(followed.left)} of training left"


def _facts(followed: Followed, width: int) -> Iterator[RenderableType]:
    facts = list(_told(followed)) if followed.logs else []
    columns = min(3, max(1, width // FACT))
    table = Table.grid(padding=(0, 1), expand=True)
    for _ in range(columns):
        table.add_column(style="dim", no_wrap=True)
        table.add_column(ratio=1)
    down = -(-len(facts) // columns)
    for row in range(down):
        table.add_row(*(word for fact in facts[row::down] for word in fact))
    if facts:
        yield Text()
        yield table


def _told(followed: Followed) -> Iterator[tuple[str, str]]:
    """Name and value: what the newest line says, and the median speed."""
    last = followed.last
    yield from ((plain(name), f"{number(last, name):.4g}") for name in last if name == "loss" or "accuracy" in name)
    speeds = [speed for speed in followed.column("images_per_second") if math.isfinite(speed)]
    if speeds:
        yield "images/s", short(number(last, "images_per_second"))
        yield "median images/s", short(statistics.median(speeds))
    vocabulary = f" of {followed.vocabulary:,}" if followed.vocabulary else ""
    for name, label, shown in (
        ("data_wait", "data wait", percent), ("macs_per_second", "multiply-adds/s", short), ("matrix_share", "of matrix rate", percent),
        ("learning_rate", "learning rate", "{:.3g}".format), ("grad_norm", "gradient norm", "{:.3g}".format),
        ("update_ratio", "update ratio", "{:.3g}".format), ("activation_rms", "activation rms", "{:.3g}".format),
        ("predicted_codes_used", "codes used", lambda used: f"{used:,.0f}{vocabulary}"),
        ("predicted_codes_perplexity", "code perplexity", "{:.4g}".format),
    ):  # fmt: skip
        if name in last:
            yield label, shown(number(last, name))
    yield "bad samples", short(number({"bad_samples": 0} | last, "bad_samples"))
    for name in ("skipped_steps", "rewinds"):
        if last.get(name):
            yield plain(name), short(number(last, name))
    if kept := [event for event in followed.events if event.get("kind") == "checkpoint"]:
        yield "last checkpoint", f"step {number(kept[-1], 'step'):,.0f}"


def _remarks(followed: Followed) -> Iterator[RenderableType]:
    """Held-out measures, and what others published."""
    newest = {name: (number(line, name), line["step"]) for line in followed.measured for name in line if name not in TOLD}
    if newest:
        values = ", ".join(f"{plain(name)} {_measured(name, value)}" for name, (value, _) in newest.items())
        yield Text(f"held out: {values} (step {max(step for _, step in newest.values()):,})")
    yield from (Text(line, "yellow") for line in _published(followed))


def _measured(name: str, value: float) -> str:
    """A share of the codes looks like a count of them."""
    return percent(value) if name == "codes_used" else f"{value:.4g}"


def _published(followed: Followed) -> Iterator[str]:
    """The last point that the run has come to, else the next one; compared at the same number of images only."""
    told: dict[float, list[str]] = {}
    for metric in PUBLISHED_METRICS:
        points = followed.published(metric)
        reached = [point for point in points if followed.at(metric, point[0]) is not None]
        for samples, value in reached[-1:] or points[:1]:
            here = f", here {followed.at(metric, samples):.4g}" if reached else ""
            told.setdefault(samples, []).append(f"{plain(metric)} {value:.4g}{here}")
    for samples, values in told.items():
        yield f"published after {short(samples)} images ({followed.source}): {'; '.join(values)}"


def _events(followed: Followed) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for event in [event for event in followed.events if event.get("kind") != "checkpoint"][-EVENTS:]:
        step, told = number(event, "step"), [told for name in ("kind", "text") if (told := one_line(event.get(name)))]
        words = [f"step {step:,.0f}"] if math.isfinite(step) else []
        line = Text(str(event.get("time", ""))[5:16].replace("T", " "), "dim", no_wrap=True, overflow="ellipsis")
        lines.append(line.append("  ".join(["", *words, ": ".join(told)]), "not dim"))
    return [Text(), *lines] if lines else []


def _curves(followed: Followed, width: int, room: int | None) -> Iterator[RenderableType]:
    """As many as there is room for, in lines, the most telling first."""
    own = [name for name in followed.last if name not in TOLD and name not in LAST_CURVES]
    names = [name for name in ("loss", *own, *LAST_CURVES) if name in followed.last]
    columns = min(len(names), max(1, (width + 2) // (NARROWEST + 2)))
    if not columns:
        return
    rows, high = -(-len(names) // columns), ROWS
    if room is not None:
        rows = max(1, min(rows, room // (LEAST_ROWS + BESIDE)))
        high = min(MOST_ROWS, room // rows - BESIDE)
    if high < LEAST_ROWS:
        return
    wide = (width - 2 * (columns - 1)) // columns
    grid = Table.grid(padding=(0, 2))
    curves = [_curve(followed, name, COLOURS[place % len(COLOURS)], wide, high) for place, name in enumerate(names[: rows * columns])]
    for row in range(rows):
        grid.add_row(*curves[row * columns : (row + 1) * columns])
    yield grid


def _curve(followed: Followed, name: str, colour: str, width: int, height: int) -> Text:
    """A blank line, the name with the newest value, `height` lines of braille, and the images seen below."""
    seen, across = followed.column("samples"), width - LABEL - 1
    bins = list(_binned(seen, followed.column(name), 2 * across))
    marks = {HELD_OUT: [(number(line, "samples"), number(line, name)) for line in followed.measured if name in line],
             PUBLISHED: [point for point in followed.published(name) if point[0] <= seen[-1]]}  # fmt: skip
    ends = _range([y for _, *ys, _ in bins for y in ys] + [y for points in marks.values() for _, y in points])
    drawn = _drawn(bins, marks, (seen[0], seen[-1]), ends, across, height, colour)
    first, last = short(seen[0]), f"{short(seen[-1])} images"
    below = Text(f"{'':{LABEL}} {first}{last:>{across - len(first)}}", "dim")
    return Text("\n", no_wrap=True, overflow="crop").join([Text(), _named(name, number(followed.last, name), marks), *drawn, below])


def _named(name: str, newest: float, marks: dict[str, list[tuple[float, float]]]) -> Text:
    legend = "".join(f"  {sign} {word}" for sign, word in ((HELD_OUT, "held out"), (PUBLISHED, "published")) if marks[sign])
    value = (f"  {newest:.4g}", "" if math.isfinite(newest) else "bold red")
    return Text.assemble((NAMES.get(name) or plain(name), "bold"), value, (legend, "dim"))


def _binned(xs: Sequence[float], ys: Sequence[float], bins: int) -> Iterator[tuple[float, float, float, float]]:
    """Equal numbers of lines as (x, least y, largest y, mean y); not a number where none of them is finite."""
    bins = min(bins, len(xs))
    for place in range(bins):
        first, last = place * len(xs) // bins, (place + 1) * len(xs) // bins
        values = [y for y in ys[first:last] if math.isfinite(y)] or [math.nan]
        yield xs[(first + last - 1) // 2], min(values), max(values), statistics.fmean(values)


def _range(values: Iterable[float]) -> tuple[float, float]:
    """Ends of the axis: a few values far above all others must not flatten the rest."""
    ordered = sorted(value for value in values if math.isfinite(value)) or [0.0]
    low, most = ordered[0], ordered[(len(ordered) - 1) * 49 // 50]
    high = min(ordered[-1], most + 3 * (most - low)) if most > low else ordered[-1]
    return (low, high) if high > low else (low - (abs(low) or 1.0) / 2, low + (abs(low) or 1.0) / 2)


def _drawn(bins: Sequence[tuple[float, float, float, float]], marks: dict[str, list[tuple[float, float]]], xs: tuple[float, float],
           ys: tuple[float, float], width: int, height: int, colour: str) -> Iterator[Text]:  # fmt: skip
    """Lines of braille with the axis at their left: the mean, and from the least to the largest."""
    right = xs[0] + ((xs[1] - xs[0]) or 1.0) * 2 * width / (2 * width - 1)  # the last dot is inside
    canvas = Canvas(width, height, xs[0], ys[0], right, ys[0] + (ys[1] - ys[0]) * 4 * height / (4 * height - 1))
    before: Any = None
    for x, least, largest, mean in bins:
        if math.isfinite(mean):
            least, largest, mean = (min(y, ys[1]) for y in (least, largest, mean))
            canvas.line(x, least, x, largest)
            canvas.line(*(before or (x, mean)), x, mean)
        before = (x, mean) if math.isfinite(mean) else None
    for sign, points in marks.items():
        for x, y in points:
            if math.isfinite(y) and xs[0] <= x <= xs[1]:
                canvas.text(x, min(y, ys[1]), sign)
    beyond = ">" * any(largest > ys[1] for _, _, largest, _ in bins)
    for place, line in enumerate(canvas.plot("\n").split("\n")):
        label = {0: _label(ys[1], beyond), height - 1: _label(ys[0])}.get(place, "")
        row = Text.assemble((f"{label:>{LABEL - 1}} ┤" if label else f"{'':{LABEL}}│", "dim"), (line, colour))
        row.highlight_words([HELD_OUT, PUBLISHED], "bold")
        yield row


def _label(value: float, sign: str = "") -> str:
    """With as many digits as there is room for."""
    told = [f"{sign}{value:.{digits}g}" for digits in (4, 3, 2, 1)]
    return next((label for label in told if len(label) < LABEL), told[-1])
