"""A run folder, or the address of one, read again and again while it is being written."""

import bisect
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from mimetic.data.fetch import fetch, is_address, joined, shown
from mimetic.engine.errors import DataError

PATIENCE = 3.0  # seconds for a file that lies elsewhere; the next look asks again
QUIET = 60.0  # seconds without a line before that is told, and at least
INTERVALS = 3  # so many times what lies between the lines of this run
RECENT = 20  # lines that tell the present pace


class Place:
    """The files of a run, on this machine or brought to it."""

    def __init__(self, run: str) -> None:
        self.run, self.far = run, is_address(run)
        self._spool = tempfile.TemporaryDirectory(prefix="mimetic-watch-") if self.far else None

    def __str__(self) -> str:
        return shown(self.run)

    def content(self, name: str, begin: int = 0) -> bytes:
        """A file from byte `begin` on. Of one that lies elsewhere what comes before is not fetched again, if it has been before.

        Raises:
            DataError: it is not there, or cannot be fetched.
        """
        file = Path(self._spool.name if self._spool else self.run) / name
        if self._spool:
            file.touch()
            os.truncate(file, begin)
            fetch(joined(self.run, name), file, patience=PATIENCE)
        try:
            with file.open("rb") as stream:
                stream.seek(begin)
                return stream.read()
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from None

    def changed(self, name: str) -> float:
        """When a file on this machine was last written, in seconds since 1970; 0 if it is missing."""
        file = Path(self.run) / name
        return file.stat().st_mtime if file.exists() else 0.0

    def close(self) -> None:
        """Removes what was brought here."""
        if self._spool:
            self._spool.cleanup()


class Lines:
    """The whole lines of a jsonl file that grows; one that is cut off, or damaged, is left out.

    Attributes:
        found: the lines, oldest first.
    """

    def __init__(self, place: Place, name: str) -> None:
        self.found: list[dict[str, Any]] = []
        self._place, self._name = place, name
        self._end, self._last = 0, b""

    def look(self) -> bool:
        """Reads what is new; returns whether anything was.

        The last line is read once more: if it is another one now, the file was written anew, as a run that goes on does to drop
        what a kill undid.

        Raises:
            DataError: the file is not there, or cannot be fetched.
        """
        begin = self._end - len(self._last)
        content = self._place.content(self._name, begin)
        anew = not content.startswith(self._last)
        if anew:
            begin, self._last, content = 0, b"", self._place.content(self._name)
        whole = content[: content.rfind(b"\n") + 1]
        fresh = whole[len(self._last) :].splitlines(keepends=True)
        kept = [] if anew else self.found
        self.found = [*kept, *filter(None, map(_parsed, fresh))] if fresh or anew else kept
        self._end, self._last = begin + len(whole), fresh[-1] if fresh else self._last
        return bool(fresh) or anew


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def number(line: dict[str, Any], name: str) -> float:
    """A value of a line; not a number where there is none."""
    value = line.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def one_line(value: Any) -> str:
    """Text of a file as a frame can show it; "" for none."""
    return "" if value is None else " ".join(str(value).split())


class Followed:
    """What is known of a run; `look` brings it up to date.

    Attributes:
        place: where it lies.
        logs: lines of training, oldest first, without those that a rewind undid.
        measured: lines of evaluations on held-out images.
        events: lines of events.jsonl.
        lost: why the last look brought nothing, or "".
    """

    def __init__(self, run: str) -> None:
        self.place = Place(run)
        self.logs: list[dict[str, Any]] = []
        self.measured: list[dict[str, Any]] = []
        self.lost = ""
        self._began, self._news = time.time(), 0.0
        self._plan: dict[str, Any] = {}
        self._config: dict[str, Any] = {}
        self._finished = False
        self._columns: dict[str, list[float]] = {}
        self._metrics, self._events, self._records = (Lines(self.place, f"{name}.jsonl") for name in ("metrics", "events", "records"))

    def look(self) -> None:
        """Reads what is new. A run that has been read before and cannot be reached now is kept as it was, and `lost` says why.

        Raises:
            DataError: there is no run.
        """
        known, missing = bool(self._metrics.found), ""
        try:
            fresh = self._metrics.look()
        except DataError as error:
            fresh, missing = False, str(error).partition(";")[0]
        self.lost = missing if known else ""
        if self.lost:
            return
        for lines in (self._events, self._records):
            with suppress(DataError):
                fresh = lines.look() or fresh
        self._plan, self._config = self._settings("plan.json", self._plan), self._settings("config.yaml", self._config)
        if missing and not self._plan and not self._config:
            found = f"{missing}; give the address of" if self.place.far else f"{self.place} holds no metrics.jsonl; give"
            raise DataError(f"{found} a run folder, what a training was given as --out")
        with suppress(DataError):
            self._finished = bool(self.place.content("finished.json"))
        self._sort()
        if not self.place.far:
            self._news = max(self.place.changed("metrics.jsonl"), self.place.changed("events.jsonl"))
        elif fresh and known:
            self._news = time.time()

    def _settings(self, name: str, before: dict[str, Any]) -> dict[str, Any]:
        try:
            content = self.place.content(name)
            settings = json.loads(content) if name.endswith(".json") else yaml.safe_load(content)
        except (DataError, ValueError, yaml.YAMLError):
            return before
        return settings if isinstance(settings, dict) else before

    def _sort(self) -> None:
        kept: list[dict[str, Any]] = []
        for line in self._metrics.found:
            if math.isfinite(number(line, "step")):
                while kept and kept[-1]["step"] > line["step"]:
                    kept.pop()
                kept.append(line)
        self.logs = [line for line in kept if "loss" in line and math.isfinite(number(line, "samples"))]
        self.measured = [line for line in kept if "loss" not in line]
        self._columns = {}

    def column(self, name: str) -> list[float]:
        """A value of all lines of training."""
        if name not in self._columns:  # a long run has a hundred thousand lines, and is drawn each second
            self._columns[name] = [number(line, name) for line in self.logs]
        return self._columns[name]

    @property
    def events(self) -> list[dict[str, Any]]:
        """Oldest first."""
        return self._events.found

    @property
    def last(self) -> dict[str, Any]:
        """The newest line of training."""
        return self.logs[-1] if self.logs else {}

    @property
    def title(self) -> str:
        """What is being trained, as the run announced it; else the name of its folder."""
        folder = str(self.place) if self.place.far else str(Path(self.place.run).resolve())
        return one_line(self._plan.get("title")) or folder.rstrip("/").rpartition("/")[2]

    @property
    def setup(self) -> list[str]:
        """Engine, device and the like, as far as they are known."""
        processes = self._plan.get("processes", 1)
        told = [f"{processes} processes" if processes != 1 else "", *(self._plan.get(name) for name in ("engine", "device", "precision"))]
        return [str(word) for word in told if word]

    @property
    def vocabulary(self) -> int | None:
        """V, how many codes there are, where it is known."""
        details = [line.get("details") for line in self._records.found]
        settings = (self._config.get(section) for section in ("dvae", "vqkd"))
        sizes = [found.get("vocab_size") for found in (*details, *settings) if isinstance(found, dict)]
        return next((size for size in sizes if isinstance(size, int)), None)

    @property
    def step(self) -> int:
        """Of the newest line of training."""
        return int(self.last.get("step", 0))

    @property
    def steps(self) -> int:
        """Of the whole run; 0 where nothing tells."""
        train = self._config.get("train")
        train = train if isinstance(train, dict) else {}
        samples, seen = number(train, "samples"), number(self.last, "samples")
        told = self._plan.get("steps") or train.get("steps") or (samples * self.step // seen if self.step and seen > 0 else 0)
        return int(told) if isinstance(told, int | float) and math.isfinite(told) else 0

    @property
    def epochs(self) -> tuple[float, float] | None:
        """Done, and in all."""
        length = self._plan.get("steps_per_epoch")
        return (self.step / length, self.steps / length) if length else None

    @property
    def left(self) -> float:
        """Seconds of training that are left at the present pace; not a number where nothing tells."""
        recent = self.logs[-RECENT:]
        if not self.steps or not recent:
            return math.nan
        first = recent[0] if len(recent) > 1 else {"step": 0, "seconds": 0.0}
        gone, walked = number(recent[-1], "seconds") - number(first, "seconds"), recent[-1]["step"] - first["step"]
        return max(0.0, gone / walked * (self.steps - self.step)) if walked > 0 else math.nan

    def silence(self, now: float) -> float:
        """Seconds without news; 0 as long as there is nothing unusual in that."""
        marks = [number(line, "seconds") for line in self.logs[-RECENT:]]
        usual = statistics.median(after - before for before, after in itertools.pairwise(marks)) if len(marks) > 1 else 0.0
        waited = now - (self._news or self._began)
        return waited if waited > max(QUIET, INTERVALS * usual) else 0.0

    def state(self, now: float) -> tuple[str, str]:
        """One of finished, stopped, quiet, running, and unknown (elsewhere, before any news); and what is told of it."""
        turns = [event for event in self.events if event.get("kind") in ("start", "signal", "stop", "finished")]
        turn = str(turns[-1].get("kind")) if turns else ""
        if turn == "finished" or (not turn and self._finished):
            return "finished", ""
        if turn in ("stop", "signal"):
            return "stopped", one_line(turns[-1].get("text"))
        return ("quiet" if self.silence(now) else "running" if self._news else "unknown"), ""

    def ends(self, now: float) -> float:
        """When it will be finished, in seconds since 1970."""
        return (self._news or now) + self.left

    def published(self, metric: str) -> list[tuple[float, float]]:
        """(images seen, value) of the recipe's expected curve, in order."""
        expected = self._config.get("expected")
        points = expected.get(metric) if isinstance(expected, dict) else None
        with suppress(TypeError, ValueError):
            return sorted((float(samples), float(value)) for samples, value in points.items()) if isinstance(points, dict) else []
        return []

    @property
    def source(self) -> str:
        """Of the expected curve."""
        expected = self._config.get("expected")
        return str(expected.get("source", "")) if isinstance(expected, dict) else ""

    def at(self, metric: str, samples: float) -> float | None:
        """A metric's value on the line nearest to so many images; None if the run has not come so far."""
        seen = self.column("samples")
        after = bisect.bisect_left(seen, samples)
        if after == len(seen):
            return None
        near = after if not after or seen[after] - samples <= samples - seen[after - 1] else after - 1
        return number(self.logs[near], metric)

    def close(self) -> None:
        """Removes what was brought here."""
        self.place.close()
