"""Arms side by side: their accuracies from the records, and the table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mimetic.engine.run import Record
from mimetic.report.intervals import wilson
from mimetic.report.page import Table
from mimetic.report.runs import RunFolder
from mimetic.report.wording import percent, plain, seconds, whole

TEST = "test_accuracy"
COLUMNS = ("Arm", "Accuracy, %", "95 % interval", "Measured on", "Labels", "Images seen", "Steps", "Seconds", "Parameters", "Seed", "Run")


@dataclass(frozen=True)
class Arm:
    """One run's newest record of one metric."""

    run: RunFolder
    record: Record

    @property
    def label(self) -> str:
        """Its name, and whether its training came to an end."""
        return self.run.label + ("" if self.run.finished else " (not finished)")

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval; None where the record does not say over how many images, or holds no share."""
        sound = self.record.count > 0 and 0 <= self.record.value <= 1
        return wilson(self.record.value, self.record.count) if sound else None

    @property
    def within(self) -> str:
        """ "78.5 to 80.1", in percent."""
        return "–" if self.interval is None else f"{percent(self.interval[0], '')} to {percent(self.interval[1], '')}"

    @property
    def labels(self) -> int | None:
        """Labelled images it learnt from."""
        return self.record.details.get("labels")


def accuracy_metrics(runs: Sequence[RunFolder]) -> list[str]:
    """Metrics of arms that are accuracies, the test's first."""
    arms = [run for run in runs if run.kind in ("classify", "reference")]
    found = {record.metric for run in arms for record in run.records if record.metric.endswith("accuracy")}
    return sorted(found, key=lambda metric: (metric != TEST, metric))


def arms_of(runs: Sequence[RunFolder], metric: str) -> list[Arm]:
    """Arms that have the metric, in the order of the runs."""
    return [Arm(run, record) for run in runs if run.kind in ("classify", "reference") and (record := run.last(metric))]


def best_first(arms: Sequence[Arm]) -> list[Arm]:
    """What is no number comes last."""
    return sorted(arms, key=lambda arm: -arm.record.value if math.isfinite(arm.record.value) else math.inf)


def arms_table(arms: Sequence[Arm]) -> Table:
    """One row per arm of one metric, the best first."""
    rows = []
    for arm in best_first(arms):
        record = arm.record
        numbers = [whole(value) for value in (record.count, arm.labels, record.samples, record.step)]
        rows.append((arm.label, percent(record.value, ""), arm.within, *numbers, seconds(record.seconds),
                     whole(record.parameters), arm.run.seed, arm.run.name))  # fmt: skip
    return Table(f"{plain(arms[0].record.metric).capitalize()}, best first", COLUMNS, tuple(rows), words=(0, len(COLUMNS) - 1))
