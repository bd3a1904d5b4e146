"""What the page says first: the fine-tuned backbone against every other arm, better or worse, computed from records."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mimetic.report.intervals import mean_difference
from mimetic.report.results import TEST, Arm, arms_of
from mimetic.report.runs import RunFolder
from mimetic.report.wording import percent, signed, whole


@dataclass(frozen=True)
class Group:
    """Runs of one arm on the same terms, such as three seeds: the headline speaks of their mean, never of the best.

    Attributes:
        arms: the runs' records.
        shared: whether runs on other terms have the same arm's name.
    """

    arms: tuple[Arm, ...]
    shared: bool = False

    @property
    def first(self) -> Arm:
        """What all have in common is read from it."""
        return self.arms[0]

    @property
    def label(self) -> str:
        """The arm's name, which runs are meant where others share it, and whether all of them came to their end."""
        return self.first.run.arm + _enclosed(self.names) + self.state

    @property
    def names(self) -> str:
        """Of the runs, where the arm's name does not tell which are meant."""
        return ", ".join(arm.run.name for arm in self.arms) if self.shared else ""

    @property
    def state(self) -> str:
        """Said of unfinished runs only."""
        return "" if all(arm.run.finished for arm in self.arms) else " (not finished)"

    @property
    def values(self) -> list[float]:
        """Accuracies of the runs."""
        return [arm.record.value for arm in self.arms]

    @property
    def mean(self) -> float:
        """Of the runs."""
        return sum(self.values) / len(self.values)

    @property
    def score(self) -> str:
        """ "79.3 % (78.5 to 80.1)"; of several runs their mean and their range."""
        if len(self.arms) > 1:
            ends = percent(min(self.values), ""), percent(max(self.values), "")
            return f"{percent(self.mean)} (mean of {len(self.arms)} runs, {ends[0]} to {ends[1]})"
        return percent(self.mean) + (f" ({self.first.within})" if self.first.interval else "")


def headline(runs: Sequence[RunFolder]) -> list[str]:
    """The first sentence, then one for each other arm."""
    groups = grouped(arms_of(runs, TEST))
    ours = next((group for group in groups if _is_fine_tuned(group)), None)
    if ours is None:
        return _highest(groups)
    scratch = next((group for group in groups if _is_from_scratch(group, ours)), None)
    others = sorted((group for group in groups if group not in (ours, scratch)), key=lambda group: -group.mean)
    return [_lead(ours, scratch), *(f"{group.label}: {group.score}. {_capital(verdict(ours, group))}." for group in others)]


def grouped(arms: Sequence[Arm]) -> list[Group]:
    """Runs that only their seeds tell apart come together."""
    found: dict[tuple[object, ...], list[Arm]] = {}
    for arm in arms:
        found.setdefault((arm.run.arm, arm.record.count, arm.labels, arm.run.terms), []).append(arm)
    names = [name for name, *_ in found]
    return [Group(tuple(members), names.count(name) > 1) for (name, *_), members in found.items()]


def _test_set(arm: Arm) -> tuple[Path, object] | None:
    """Which images were measured; None where the recipe does not tell."""
    index = arm.run.setting("evaluation.index")
    return (Path(index).resolve(), arm.run.setting("evaluation.labels")) if index else None


def _is_fine_tuned(group: Group) -> bool:
    """By the recipe, which cannot be misnamed; by the arm's name where the recipe does not tell."""
    run = group.first.run
    return bool(run.setting("init.path")) or ("init" not in run.config and run.arm == "fine-tuned")


def _is_from_scratch(group: Group, ours: Group) -> bool:
    """Neither pretrained nor distilled: of that name, or with the fine-tuned run's own backbone."""
    run = group.first.run
    if run.setting("init.path") or run.setting("distill.teacher") or run.kind != "classify":
        return False
    same = "backbone" in run.config and run.config["backbone"] == ours.first.run.config.get("backbone")
    return run.arm == "from scratch" or ("init" in run.config and same)


def _lead(ours: Group, scratch: Group | None) -> str:
    """ "Fine-tuned from the pretrained backbone: 79.3 % (78.5 to 80.1) of 10,000 test images with 600 labels; ..." """
    names = [name for name in (ours.first.run.arm, ours.names) if name not in ("fine-tuned", "")]
    told = f"Fine-tuned from the pretrained backbone{_enclosed(', '.join(names))}{ours.state}: {ours.score}{_of(ours)}"
    if scratch is None:
        return f"{told}. There is no arm from scratch to hold it against."
    gap, lesson = _gap(ours, scratch), ""
    if gap and gap[1] < 0:
        lesson = " Here pretraining did harm."
    elif gap and gap[0] <= 0:
        lesson = " Here pretraining made no clear difference."
    return f"{told}; {scratch.label} {scratch.score}: {_margin(ours, scratch)}.{lesson}"


def verdict(ours: Group, theirs: Group) -> str:
    """Which of the two is better, by how much, or that nothing tells."""
    gap, we = _gap(ours, theirs), _we(ours)
    if gap is None or gap[0] > 0:
        return f"{we} has {_margin(ours, theirs)}" if gap else _margin(ours, theirs)
    if gap[1] < 0:
        return f"{we} is worse: {_margin(ours, theirs)}"
    return f"no clear difference: {we} has {_margin(ours, theirs)}"


def _margin(ours: Group, theirs: Group) -> str:
    """ "6.3 points more (5.1 to 7.5)", or why there is none."""
    gap = _gap(ours, theirs)
    if gap is None:
        return f"not compared, since {_why_not(ours, theirs)}"
    low, high = (100 * end for end in gap)
    points = 100 * (ours.mean - theirs.mean)
    told = f"{abs(points):.1f} points {'less' if points < 0 else 'more'}"
    if low <= 0 <= high:
        return f"{told} ({signed(low)} to {signed(high)}, so that it may as well be none)"
    return f"{told} ({min(abs(low), abs(high)):.1f} to {max(abs(low), abs(high)):.1f})"


def _gap(ours: Group, theirs: Group) -> tuple[float, float] | None:
    """95 % interval of the difference; None if not comparable."""
    if _why_not(ours, theirs):
        return None
    return mean_difference(ours.values, ours.first.record.count, theirs.values, theirs.first.record.count)


def _why_not(ours: Group, theirs: Group) -> str:
    """Empty where test images and number of labels are the same, so that a difference means something."""
    mine, other = ours.first, theirs.first
    sets = {str(test_set) for arm in (mine, other) if (test_set := _test_set(arm))}
    if mine.record.count != other.record.count:
        return f"it was measured on {whole(other.record.count)} test images, {_we(ours)} on {whole(mine.record.count)}"
    if mine.labels != other.labels:
        return f"it learnt from {whole(other.labels)} labels, {_we(ours)} from {whole(mine.labels)}"
    if len(sets) > 1:
        return "it was measured on other images"
    return "" if all(arm.interval for arm in (*ours.arms, *theirs.arms)) else "a record holds no share of a number of images"


def _highest(groups: Sequence[Group]) -> list[str]:
    if not groups:
        return []
    best = max(groups, key=lambda group: group.mean)
    return [f"Highest test accuracy: {best.label}, {best.score}{_of(best)}."]


def _of(group: Group) -> str:
    labels = group.first.labels
    return f" of {whole(group.first.record.count)} test images" + (f" with {whole(labels)} labels" if labels else "")


def _we(ours: Group) -> str:
    return f"fine-tuned{_enclosed(ours.names)}"


def _enclosed(text: str) -> str:
    return f" ({text})" if text else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
