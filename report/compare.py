"""One page from run folders: `mimetic compare RUN... --out DIR`."""

import dataclasses
import math
import os
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mimetic.engine.config import write_atomically
from mimetic.engine.errors import SettingError, disk_is_full
from mimetic.report import sections
from mimetic.report.headline import headline
from mimetic.report.page import Page, Section, Source, Table, render_html, render_markdown
from mimetic.report.results import TEST
from mimetic.report.runs import RunFolder, read_runs
from mimetic.report.wording import percent, whole

LAUNCHED = "accelerate launch"
# Kind of run -> settings that only one script's recipe has, the most particular first, and that script's command.
SCRIPTS = {
    "tokenizer": {"dvae": f"{LAUNCHED} tokenizers/train_dvae.py", "vqkd": f"{LAUNCHED} tokenizers/train_vqkd.py"},
    "pretrain": {"aggregation": f"{LAUNCHED} pretrain/beit2.py", "tokenizer": f"{LAUNCHED} pretrain/beit.py",
                 "simmim": f"{LAUNCHED} pretrain/simmim.py", "mae": f"{LAUNCHED} pretrain/mae.py"},
    "classify": {"backbone": f"{LAUNCHED} finetune/classify.py"}, "reference": {"max_iter": "python finetune/logistic.py"},
}  # fmt: skip


def compare(runs: Sequence[Path], out: Path, *, title: str | None = None) -> Path:
    """Writes `report.html` (self-contained), `report.md` and its pictures.

    Args:
        runs: folders of tokenizers, pretrainings, classifiers and references, in any mixture, finished or not.
        out: folder to write into; made if it is missing.
        title: of the page; the default tells how many runs it compares.

    Returns:
        The path of `report.html`.

    Raises:
        DataError: a path is no run folder.
        SettingError: no run is given, or `out` cannot be written; what it holds is then left as it was.
        CheckpointError: records or metrics of a run are damaged.
    """
    page = build_page(read_runs([Path(run) for run in runs]), title)
    files = {figure.name: figure.png for figure in page.figures}
    texts = {"report.md": render_markdown(page).encode(), "report.html": render_html(page).encode()}
    try:
        _write(Path(out), files | texts)
    except OSError as error:
        cure = "free some space or give another --out" if disk_is_full(error) else "give another --out"
        raise SettingError(f"the report cannot be written to {out} ({error.strerror or error}); {cure}") from None
    return Path(out) / "report.html"


def _write(out: Path, files: dict[str, bytes]) -> None:
    """All files or none: they take their places once everything that needs space is done, the page last."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".report.") as beside:
        for name, content in files.items():
            write_atomically(Path(beside) / name, content)
        for name in files:
            os.replace(Path(beside) / name, out / name)


def build_page(runs: Sequence[RunFolder], title: str | None = None) -> Page:
    """Everything that the page says, before it is given a form."""
    parts = (sections.results, sections.classify, sections.pretrain, sections.tokenizer, sections.others)
    found = [part(runs) for part in parts]
    shown = [section for section in found if section.tables or section.figures]
    number = f"{len(runs)} run{'s' if len(runs) != 1 else ''}"
    made = f"Made by mimetic from {number} on {time.strftime('%d %B %Y').lstrip('0')}"
    lead = headline(runs) or _without_arms(runs)
    sources = [Source(run.name, _command(run), run.config_text) for run in runs]
    return Page(title or f"mimetic: {number} compared", made, lead, notes(runs), _distinct_names(shown), _repeat(runs), sources)


def notes(runs: Sequence[RunFolder]) -> list[str]:
    """What is missing or doubtful, told plainly."""
    found = [note for run in runs for note in (*_gaps(run), *_doubts(run))]
    loose = [run.name for run in runs if "+" in run.revision or "unknown" in run.revision]
    if loose:
        found.append(f"No git revision holds the code of {', '.join(loose)} (a + marks uncommitted changes): not exactly repeatable.")
    return found


def _gaps(run: RunFolder) -> list[str]:
    found = []
    if not run.finished and run.kind != "reference":
        last = run.metrics[-1] if run.metrics else None
        where = f"its log ends at step {whole(last.get('step'))}, {whole(last['samples'])} images" if last else "it has no training log"
        found.append(f"{run.name} is not finished: {where}.")
    if run.kind in ("classify", "reference") and run.last(TEST) is None:
        found.append(f"No record of a test accuracy in {run.name}: not finished{', or it has another metric' if run.records else ''}?")
    if run.kind == "tokenizer" and run.last("codes_used") is None:
        found.append(f"No record of code usage in {run.name}: not finished, or trained without evaluate_on?")
    if run.kind in ("tokenizer", "pretrain") and run.picture is None:
        found.append(f"No picture in {run.name}/samples.")
    if run.kind == "unknown":
        found.append(f"{run.name} has no record, and its settings do not tell what kind of run it is.")
    return found


def _doubts(run: RunFolder) -> list[str]:
    found = []
    last = run.metrics[-1] if run.metrics else {}
    skips, rewinds = last.get("skipped_steps", 0), last.get("rewinds", 0)
    if skips:
        found.append(f"{whole(skips)} steps of {run.name} were left out, their gradients not finite or far too large (see its capsules).")
    if rewinds:
        found.append(f"{run.name} went back to a checkpoint {whole(rewinds)} times, and on with the data after a bad step.")
    broken = next((line for line in run.metrics if not math.isfinite(line["loss"])), None)
    if broken and not skips:
        found.append(f"The loss of {run.name} is no finite number at step {whole(broken.get('step'))}.")
    if bad := last.get("bad_samples"):
        found.append(f"{whole(bad)} samples did not decode while {run.name} was trained.")
    if run.kind == "pretrain" and run.metrics and run.metrics[-1].get("predicted_codes_used") == 1:
        found.append(f"{run.name} predicts one and the same code everywhere at the end: it has not learnt to tell images apart.")
    return found


def _without_arms(runs: Sequence[RunFolder]) -> list[str]:
    """First sentences of a page that has no test accuracy."""
    told = []
    for run in runs:
        used, line = run.last("codes_used"), run.metrics[-1] if run.metrics else {}
        if run.kind == "pretrain" and "masked_accuracy" in line:
            rightly = percent(line["masked_accuracy"])
            told.append(f"{run.name} predicts {rightly} of the hidden tokens rightly after {whole(line['samples'])} images.")
        if run.kind == "tokenizer" and used:
            size = used.details.get("vocab_size")
            told.append(f"{run.name} uses {percent(used.value)} of its {f'{whole(size)} ' if size else ''}codes.")
    return told or ["No run has a test accuracy yet."]


def _repeat(runs: Sequence[RunFolder]) -> Table:
    columns = ("Run", "Arm", "Kind", "Folder", "Recipe", "Git revision", "State", "Seed")
    rows = tuple(
        (run.name, run.arm if run.kind in ("classify", "reference") else "–", run.kind, str(run.folder), run.recipe,
         run.revision or "not recorded", "finished" if run.finished else "not finished", run.seed)
        for run in runs
    )  # fmt: skip
    return Table("Where each run comes from", columns, rows, words=tuple(range(len(columns) - 1)))


def _command(run: RunFolder) -> str:
    """What trains the same recipe again; empty for kinds that no script of ours trains."""
    script = next((script for setting, script in SCRIPTS.get(run.kind, {}).items() if setting in run.config), None)
    if script is None:
        return ""
    config, folder = shlex.quote(str(run.folder / "config.yaml")), shlex.quote(f"{run.folder}-again")
    return f"{script} --config {config} --out {folder}"


def _distinct_names(shown: Sequence[Section]) -> list[Section]:
    """Two run names may make one file name: the second gets a number."""
    taken: set[str] = set()
    renamed = []
    for section in shown:
        figures = []
        for figure in section.figures:
            stem, number, name = figure.name.removesuffix(".png"), 1, figure.name
            while name in taken:
                number += 1
                name = f"{stem}-{number}.png"
            taken.add(name)
            figures.append(dataclasses.replace(figure, name=name))
        renamed.append(dataclasses.replace(section, figures=tuple(figures)))
    return renamed
