"""What the page shows of each kind of run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimetic.engine.run import Record
from mimetic.report import plots
from mimetic.report.headline import grouped
from mimetic.report.page import Figure, Section, Table
from mimetic.report.results import TEST, accuracy_metrics, arms_of, arms_table, best_first
from mimetic.report.runs import RunFolder
from mimetic.report.wording import percent, plain, seconds, slug, whole

PRETRAIN_ROWS = ("image", "what the encoder sees (grey is hidden)", "its tokens, decoded (where the tokenizer can)",
                 "tokens predicted at hidden cells, decoded")  # fmt: skip
PIXEL_ROWS = ("image", "what the encoder sees (grey is hidden)", "pixels predicted at hidden places")
NORMALISED_ROWS = (*PIXEL_ROWS[:2], f"{PIXEL_ROWS[2]} (around the image's own means, within its own deviations: normalised targets)")
# What each way of pretraining is punished for, by the section of its recipe, the most particular first: losses of different ways share no
# picture.
PRETRAIN_LOSSES = {
    "aggregation": ("pretrain-loss-beit2", "sum of both cross entropies over hidden cells (nats, BEiT v2)"),
    "tokenizer": ("pretrain-loss", "cross entropy over hidden cells (nats)"),
    "simmim": ("pretrain-loss-simmim", "mean absolute error of hidden pixels (SimMIM)"),
    "mae": ("pretrain-loss-mae", "mean squared error of hidden pixels (MAE)"),
}  # fmt: skip
TOKENIZER_ROWS = ("image", "its tokens, decoded")
TAUGHT_ROWS = ("image", "the teacher's features (three principal components)", "what is told of them from tokens")
MEASURES = {
    "codes_used": "codes used, %", "perplexity": "perplexity, all cells", "perplexity_non_blank": "perplexity, non-blank cells",
    "reconstruction_psnr": "reconstruction PSNR, dB",
}  # fmt: skip


def results(runs: Sequence[RunFolder]) -> Section:
    """A table for each accuracy, and the first of them drawn: accuracies of different names never share a column."""
    metrics = accuracy_metrics(runs)
    tables = tuple(arms_table(arms_of(runs, metric)) for metric in metrics)
    if not metrics:
        return Section("Results")
    arms = [arm for arm in best_first(arms_of(runs, metrics[0])) if math.isfinite(arm.record.value)]
    rows = [(arm.label, arm.record.value, arm.interval, _colour(runs, arm.run)) for arm in arms]
    name = plain(metrics[0])
    values = ", ".join(f"{label} {percent(value)}" for label, value, *_ in rows)
    png = plots.intervals(f"{name} (line: 95 % interval)", rows)
    figure = Figure(f"{slug(metrics[0])}.png", png, f"{name.capitalize()} of each arm: {values}", wide=True)
    text = "Intervals are 95 % Wilson score intervals: they cover the draw of test images, not the seed of the training. "
    if any(len(group.arms) > 1 for group in grouped(arms_of(runs, TEST))):
        text += ("Where an arm's runs are averaged, their range stands beside the mean, and the interval of a difference covers the seed "
                 "of that arm too, by Student's t over the spread of its runs. ")  # fmt: skip
    text += "Seconds are of training alone, and depend on what else the machine was doing."
    return Section("Results", (text,), tables, (figure,) if rows else ())


def classify(runs: Sequence[RunFolder]) -> Section:
    """Learning curves of classifiers."""
    arms = [run for run in runs if run.kind == "classify"]
    text = ["Training values are measured on augmented batches while they are learnt from; they say how a run went, not how good it is."]
    if any(run.setting("distill.teacher") for run in arms):
        text.append("A distilled arm's loss is half from labels, half from its teacher: its height is not comparable with the others'.")
    figures = [
        _metric_curves(runs, arms, "classify-loss", "loss", "training loss (nats)"),
        _metric_curves(runs, arms, "classify-training-accuracy", "train_accuracy", "training accuracy", share=True),
        *(_evaluations(runs, arms, metric) for metric in accuracy_metrics(runs)),
    ]
    return _section("Learning to classify", text, [], figures)


def pretrain(runs: Sequence[RunFolder]) -> Section:
    """The objective's own numbers, its curves, and what it paints into the hidden cells."""
    members = [run for run in runs if run.kind == "pretrain"]
    rows = tuple(_pretrain_row(run) for run in members if run.metrics)
    columns = ("Run", "Masked accuracy, %", "Loss", "Codes predicted", "Images seen", "Steps", "Seconds", "Seed")
    level = _commonest_code(runs, members)
    figures = [
        _metric_curves(runs, members, "pretrain-masked-accuracy", "masked_accuracy", "hidden tokens predicted rightly", share=True,
                       level=level),
        *(_metric_curves(runs, [run for run in members if _way(run) == section], name, "loss", label)
          for section, (name, label) in PRETRAIN_LOSSES.items()),
        _metric_curves(runs, members, "pretrain-codes", "predicted_codes_used", "different codes predicted"),
        _metric_curves(runs, members, "pretrain-perplexity", "predicted_codes_perplexity", "perplexity of predicted codes"),
        *(_picture(run, _pretrain_rows(run), "Masked image modeling") for run in members),
    ]
    text = ["The numbers are of training, from the last line of the log; what the features are worth shows in fine-tuning."]
    tables = [Table("Where pretraining stands", columns, rows)] if rows else []
    return _section("Pretraining", text, tables + _measures(members), figures)


def tokenizer(runs: Sequence[RunFolder]) -> Section:
    """Code usage first: a collapsed codebook teaches nothing."""
    members = [run for run in runs if run.kind == "tokenizer"]
    figures: list[Figure | None] = []
    for run in members:
        figures += [_code_usage(run), _metric_curves(runs, [run], f"tokenizer-loss-{slug(run.name)}", "loss", "loss")]
    for run in members:
        rows, what = (TAUGHT_ROWS, "Features told from tokens") if "vqkd" in run.config else (TOKENIZER_ROWS, "Reconstruction")
        figures.append(_picture(run, rows, what))
    return _section("Tokenizer", [], _measures(members), figures)


def others(runs: Sequence[RunFolder]) -> Section:
    """Records that belong to no section above, so that nothing recorded is silently left out."""
    rest = [run for run in runs if run.kind not in ("tokenizer", "pretrain")]
    return _section("Other measurements", [], _measures(rest), [])


def _section(title: str, text: Sequence[str], tables: Sequence[Table], figures: Sequence[Figure | None]) -> Section:
    shown = tuple(figure for figure in figures if figure)
    return Section(title, tuple(text) if shown or tables else (), tuple(tables), shown)


def _metric_curves(runs: Sequence[RunFolder], members: Sequence[RunFolder], name: str, metric: str, label: str, *,
                   share: bool = False, level: tuple[str, float] | None = None) -> Figure | None:  # fmt: skip
    """One metric of the training log against images seen, a line for each run that logged it."""
    series = []
    for run in members:
        points = [(line["samples"], line[metric]) for line in run.metrics if metric in line]
        if points:
            series.append(plots.Series(run.label, _colour(runs, run), *zip(*points, strict=True)))
    if not series:
        return None
    ends = ", ".join(f"{line.label} ends at {_value(line.ys[-1], share)}" for line in series)
    png = plots.curves(label, series, share=share, level=level)
    return Figure(f"{name}.png", png, f"{label.capitalize()} against images seen: {ends}")


def _evaluations(runs: Sequence[RunFolder], arms: Sequence[RunFolder], metric: str) -> Figure | None:
    """An accuracy over the training, if any run measured it more than once."""
    series = []
    for run in arms:
        points = [(record.samples, record.value) for record in run.records if record.metric == metric]
        if len(points) > 1:
            series.append(plots.Series(run.label, _colour(runs, run), *zip(*points, strict=True)))
    if not series:
        return None
    ends = ", ".join(f"{line.label} ends at {percent(line.ys[-1])}" for line in series)
    return Figure(f"classify-{slug(metric)}.png", plots.curves(plain(metric), series, share=True),
                  f"{plain(metric).capitalize()} against images seen: {ends}")  # fmt: skip


def _way(run: RunFolder) -> str | None:
    return next((section for section in PRETRAIN_LOSSES if section in run.config), None)


def _pretrain_rows(run: RunFolder) -> tuple[str, ...]:
    if run.setting("simmim.norm_target") or run.setting("mae.norm_pix_loss"):
        return NORMALISED_ROWS
    return PIXEL_ROWS if run.config.keys() & {"simmim", "mae"} else PRETRAIN_ROWS


def _pretrain_row(run: RunFolder) -> tuple[str, ...]:
    line = run.metrics[-1]
    name = run.name + ("" if run.finished else " (not finished)")
    accuracy = percent(line["masked_accuracy"], "") if "masked_accuracy" in line else "–"
    return (name, accuracy, f"{line['loss']:.3f}", whole(line.get("predicted_codes_used")), whole(line["samples"]),
            whole(line.get("step")), seconds(line.get("seconds", 0)), run.seed)  # fmt: skip


def _commonest_code(runs: Sequence[RunFolder], members: Sequence[RunFolder]) -> tuple[str, float] | None:
    """What always guessing the commonest code would score, if the one tokenizer of all these runs is on the page."""
    paths = {Path(str(path)).resolve() for run in members if (path := run.setting("tokenizer.path"))}
    used = [run for run in runs if run.kind == "tokenizer" and paths == {run.folder.resolve()}]
    counts = _counts(used[0]) if used else None
    return ("always the code commonest on held-out images", max(counts) / sum(counts)) if counts else None


def _counts(run: RunFolder) -> list[int] | None:
    record = run.last("codes_used")
    counts = record.details.get("counts") if record else None
    return counts if counts and sum(counts) else None


def _code_usage(run: RunFolder) -> Figure | None:
    counts = _counts(run)
    if not counts:
        return None
    used, perplexity, textured = sum(count > 0 for count in counts), run.last("perplexity"), run.last("perplexity_non_blank")
    told = f"{run.name}: {used:,} of {len(counts):,} codes used ({percent(used / len(counts))})"
    if perplexity:
        told += f"; perplexity {perplexity.value:.1f} over all cells"
    if textured:
        told += f", {textured.value:.1f} over non-blank cells"
    alt = f"Share of each code, the commonest first. {told}"
    return Figure(f"codes-{slug(run.name)}.png", plots.code_ranks(counts), alt, f"{told}.")


def _picture(run: RunFolder, rows: tuple[str, ...], what: str) -> Figure | None:
    if run.picture is None:
        return None
    step = run.picture.stem.removeprefix("step-").lstrip("0")
    caption = f"{what}: {run.name}, newest picture (step {step})."
    png = run.picture.read_bytes()
    alt = f"{what} of {run.name}. Rows from the top: {'; '.join(rows)}"
    return Figure(f"samples-{slug(run.name)}.png", png, alt, caption, rows, wide=True)


def _measures(members: Sequence[RunFolder]) -> list[Table]:
    """The newest record of every metric that is no arm's accuracy."""
    rows = []
    for run in members:
        arm = run.kind in ("classify", "reference")
        newest: dict[str, Record] = {record.metric: record for record in run.records}
        rows += [_measure_row(run, record) for name, record in newest.items() if not (arm and name.endswith("accuracy"))]
    columns = ("Run", "Measure", "Value", "Measured on", "Images seen", "Seconds", "Parameters")
    return [Table("Measured", columns, tuple(rows), words=(0, 1))] if rows else []


def _measure_row(run: RunFolder, record: Record) -> tuple[str, ...]:
    share = record.metric == "codes_used" or record.metric.endswith("accuracy")
    name = MEASURES.get(record.metric, plain(record.metric) + (", %" if share else ""))
    value = percent(record.value, "") if share else f"{record.value:,.1f}" if record.metric in MEASURES else _value(record.value, False)
    state = "" if run.finished else " (not finished)"
    numbers = whole(record.count), whole(record.samples), seconds(record.seconds), whole(record.parameters)
    return (run.name + state, name, value, *numbers)


def _value(value: Any, share: bool) -> str:
    return percent(value) if share else f"{value:.3g}" if abs(value) < 10 else f"{value:,.1f}"


def _colour(runs: Sequence[RunFolder], run: RunFolder) -> int:
    """A run has one colour all over the page; counted within its kind, arms and references together."""
    family = ("classify", "reference")
    peers = [other for other in runs if other.kind == run.kind or {other.kind, run.kind} <= set(family)]
    return peers.index(run)
