"""The page from run folders: its numbers against other people's, its words in both directions, its form."""

import base64
import errno
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image
from scipy.stats import binomtest, ttest_ind

from mimetic.engine.config import flatten
from mimetic.engine.errors import CheckpointError, DataError, MimeticError, SettingError
from mimetic.report import plots
from mimetic.report.compare import build_page, compare
from mimetic.report.headline import headline
from mimetic.report.intervals import difference, mean_difference, wilson
from mimetic.report.page import escape_markdown
from mimetic.report.runs import read_runs

NASTY = '<b>"A & B"</b> | *x* `y` $z$ _w_ {{ 1 }}'
BACKBONE = {"name": "vit_tiny_patch16_224", "image_size": 28}


def write_run(folder: Path, config: dict[str, Any], *, kind: str, records: list[dict[str, Any]], metrics: list[dict[str, Any]],
              finished: bool = True, picture: tuple[int, int] | None = None) -> Path:  # fmt: skip
    """A run folder as the training leaves it."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    origin = {"kind": kind, "recipe": "0123456789ab", "revision": "abcdef012345", "seed": config.get("seed", 0)}
    (folder / "records.jsonl").write_text("".join(json.dumps(origin | record) + "\n" for record in records))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if finished:
        (folder / "finished.json").write_text(json.dumps({"recipe": json.dumps(flatten(config), sort_keys=True)}))
    if picture:
        Image.new("RGB", picture).save(folder / "samples" / "step-00000010.png")
    return folder


def record(metric: str, value: float, count: int = 10_000, **details: Any) -> dict[str, Any]:
    """A line of records.jsonl, without its origin."""
    return {"metric": metric, "value": value, "count": count, "step": 700, "samples": 48_000, "seconds": 231.4, "parameters": 803_466,
            "details": details}  # fmt: skip


def log(**names: tuple[float, float]) -> list[dict[str, float]]:
    """Ten lines of metrics.jsonl, each metric going from one value to another, then an evaluation's line without samples."""
    ramps = {name: np.linspace(low, high, 10).tolist() for name, (low, high) in names.items()}
    values = ({name: ramp[i] for name, ramp in ramps.items()} for i in range(10))
    lines = [{"step": i + 1, "samples": 64 * (i + 1), "seconds": 2.0 * i} | line for i, line in enumerate(values)]
    return [*lines, {"step": 10, "test_accuracy": 0.5}]


def arm(folder: Path, name: str, value: float, *, init: str | None = None, teacher: str | None = None, count: int = 10_000,
        labels: int = 600, finished: bool = True, metric: str = "test_accuracy", seed: int = 0,
        **settings: Any) -> Path:  # fmt: skip
    """A classifier's run folder; `settings` are sections of its recipe."""
    config = {"arm": name, "seed": seed, "backbone": BACKBONE, "init": {"path": init}, "distill": {"teacher": teacher},
              "evaluation": {"index": "test"}, "labels": {"per_class": labels // 10, "seed": seed}} | settings  # fmt: skip
    records = [record(metric, value - 0.05, count, arm=name, labels=labels), record(metric, value, count, arm=name, labels=labels)]
    return write_run(folder, config, kind="classify", records=records, metrics=log(loss=(2.3, 0.4), train_accuracy=(0.1, 0.9)),
                     finished=finished)  # fmt: skip


def reference(folder: Path, name: str, value: float) -> Path:
    """A plain reference: config and records only."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("C: 1.0\n")
    line = {"kind": "reference", "recipe": "x", "revision": "abcdef012345"} | record("test_accuracy", value, arm=name, labels=600)
    (folder / "records.jsonl").write_text(json.dumps(line | {"step": 0, "samples": 0}) + "\n")
    return folder


def tokenizer(folder: Path) -> Path:
    """A tokenizer of 8 codes, 3 of them used."""
    records = [record("codes_used", 3 / 8, vocab_size=8, counts=[70, 0, 20, 0, 10, 0, 0, 0]), record("perplexity", 2.23)]
    config = {"dvae": {"vocab_size": 8}, "seed": 0}
    return write_run(folder, config, kind="tokenizer", records=records, metrics=log(loss=(1, 0.2)), picture=(96, 16))


def pretraining(folder: Path, tokenizer_path: Path) -> Path:
    """It leaves no records."""
    config = {"tokenizer": {"path": str(tokenizer_path)}, "mask": {"count": 20}, "seed": 0}
    metrics = log(loss=(5, 2.5), masked_accuracy=(0.0, 0.41), predicted_codes_used=(1, 5), predicted_codes_perplexity=(1, 3))
    return write_run(folder, config, kind="pretrain", records=[], metrics=metrics, picture=(64, 32))


def on_pixels(folder: Path, section: str, **settings: Any) -> Path:
    """A SimMIM or MAE pretraining, without records."""
    config = {section: settings, "backbone": BACKBONE, "seed": 0}
    return write_run(folder, config, kind="pretrain", records=[], metrics=log(loss=(0.9, 0.3)), picture=(64, 32))


def told(runs: list[Path]) -> list[str]:
    """The page's first sentences."""
    return headline(read_runs(runs))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One page of all kinds of runs, one of them unfinished, one nastily named; returns its folder."""
    root = tmp_path_factory.mktemp("runs")
    runs = [
        tokenizer(root / "tokenizer"), pretraining(root / "beit", root / "tokenizer"), arm(root / "ft", "fine-tuned", 0.793, init="beit"),
        arm(root / "scratch", "from scratch", 0.730), arm(root / "deit", "DeiT-distilled", 0.768, teacher="cnn", finished=False),
        arm(root / "odd", NASTY, 0.701), arm(root / "_vali", "_validated", 0.912, metric="validation_accuracy"),
        reference(root / "logreg", "logistic regression", 0.781),
    ]  # fmt: skip
    out = root / "new" / "out"
    assert compare(runs, out) == out / "report.html"
    return out


class Reader(HTMLParser):
    """Collects tags, the cells of tables, and checks that every tag is closed."""

    VOID = ("meta", "img", "br", "link", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "td":
            self.cells[-1] += data


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (1, 10), (7930, 10_000), (5, 5), (500, 1000), (9_999, 10_000)])
def test_wilson_is_scipys(hits: int, count: int) -> None:
    theirs = binomtest(hits, count).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson(hits / count, count) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_difference_is_newcombes_example() -> None:
    # Newcombe 1998, table II (a), method 10: 56/70 against 48/80
    assert difference(56 / 70, 70, 48 / 80, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_difference_covers() -> None:
    generator, shares, count = np.random.default_rng(0), (0.79, 0.73), 300
    drawn = generator.binomial(count, shares, size=(2000, 2)) / count
    inside = [low <= shares[0] - shares[1] <= high for low, high in (difference(a, count, b, count) for a, b in drawn)]
    assert 0.93 < np.mean(inside) < 0.97


def test_mean_difference_of_single_runs_is_their_difference() -> None:
    assert mean_difference([0.793], 10_000, [0.730], 9_000) == difference(0.793, 10_000, 0.730, 9_000)


def test_mean_difference_forgets_no_test_images() -> None:
    # four copies of nothing new: the seeds add no spread, and twenty images remain twenty
    ours, theirs = (binomtest(hits, 20).proportion_ci(confidence_level=0.95, method="wilson") for hits in (15, 14))
    below, above = np.hypot(0.75 - ours.low, theirs.high - 0.7), np.hypot(ours.high - 0.75, 0.7 - theirs.low)
    assert mean_difference([0.75, 0.75], 20, [0.7, 0.7], 20) == pytest.approx((0.05 - below, 0.05 + above), abs=1e-12)


def test_mean_difference_of_endless_images_is_welchs() -> None:
    ours, theirs = [0.78, 0.80, 0.81], [0.72, 0.75]
    welch = ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert mean_difference(ours, 10**12, theirs, 10**12) == pytest.approx((welch.low, welch.high), abs=1e-6)


@pytest.mark.parametrize(("runs", "seeds", "count"), [(2, 0.03, 10_000), (3, 0.03, 10_000), (3, 0.01, 10_000), (2, 0.03, 300)])
def test_mean_difference_covers(runs: int, seeds: float, count: int) -> None:
    # the images favour or harm all runs of an arm alike; a run's seed favours or harms it alone
    generator, shares = np.random.default_rng(0), np.array([[0.79], [0.73]])
    images = generator.normal(scale=np.sqrt(shares * (1 - shares) / count), size=(2000, 2, 1))
    measured = shares + images + generator.normal(scale=seeds, size=(2000, 2, runs))
    ends = [mean_difference(ours, count, theirs, count) for ours, theirs in measured.tolist()]
    assert 0.93 < np.mean([low <= 0.06 <= high for low, high in ends]) < 0.99


def test_headline_better(tmp_path: Path) -> None:
    said = told([arm(tmp_path / "a", "from scratch", 0.730), arm(tmp_path / "b", "fine-tuned", 0.793, init="x")])
    assert said == ["Fine-tuned from the pretrained backbone: 79.3 % (78.5 to 80.1) of 10,000 test images with 600 labels; "
                    "from scratch 73.0 % (72.1 to 73.9): 6.3 points more (5.1 to 7.5)."]  # fmt: skip


def test_headline_worse_says_so(tmp_path: Path) -> None:
    runs = [arm(tmp_path / "a", "from scratch", 0.793), arm(tmp_path / "b", "fine-tuned", 0.730, init="x"),
            reference(tmp_path / "c", "logistic regression", 0.781)]  # fmt: skip
    lead, against = told(runs)
    assert "6.3 points less (5.1 to 7.5)" in lead
    assert lead.endswith("Here pretraining did harm.")
    assert against == "logistic regression: 78.1 % (77.3 to 78.9). Fine-tuned is worse: 5.1 points less (3.9 to 6.3)."


def test_headline_claims_nothing_within_chance(tmp_path: Path) -> None:
    lead = told([arm(tmp_path / "a", "from scratch", 0.730), arm(tmp_path / "b", "fine-tuned", 0.733, init="x")])[0]
    assert "0.3 points more (−0.9 to +1.5, so that it may as well be none)" in lead
    assert lead.endswith("Here pretraining made no clear difference.")


@pytest.mark.parametrize(
    ("other", "why"), [({"count": 200}, "measured on 200 test images"), ({"labels": 60_000}, "learnt from 60,000 labels")]
)
def test_headline_compares_only_the_comparable(tmp_path: Path, other: dict[str, int], why: str) -> None:
    lead = told([arm(tmp_path / "a", "from scratch", 0.5, **other), arm(tmp_path / "b", "fine-tuned", 0.7, init="x")])[0]
    assert "points" not in lead
    assert "not compared" in lead
    assert why in lead


def test_headline_speaks_of_the_mean_of_seeds(tmp_path: Path) -> None:
    tuned = [arm(tmp_path / f"f{i}", "fine-tuned", value, init="x", seed=i) for i, value in enumerate((0.78, 0.80))]
    plain = [arm(tmp_path / f"s{i}", "from scratch", value, seed=i) for i, value in enumerate((0.72, 0.74))]
    lead = told([*plain, *tuned])[0]
    assert "79.0 % (mean of 2 runs, 78.0 to 80.0)" in lead
    # 2 * 0.01**2 of the seeds, 0.36e-4 of the images: Student's t for 2.8 degrees of freedom is 3.32
    assert "6.0 points more (0.9 to 11.1)" in lead
    page = build_page(read_runs([*plain, *tuned]))
    assert "covers the seed of that arm too" in page.sections[0].text[0]
    assert "covers the seed of that arm too" not in build_page(read_runs([plain[0], tuned[0]])).sections[0].text[0]


def test_repeats_of_a_whole_pipeline_are_averaged(tmp_path: Path) -> None:
    runs = [arm(tmp_path / f"seed-{i}", "fine-tuned", 0.7 + i / 100, init=f"seed-{i}/pretrained", seed=i,
                data={"index": "train" if i else "./train", "workers": i}, train={"epochs": 40.0, "log_every": i},
                ) for i in range(3)]  # fmt: skip
    assert "71.0 % (mean of 3 runs, 70.0 to 72.0)" in told(runs)[0]


@pytest.mark.parametrize("other", [
    {"init": None}, {"optim": {"lr": 1e-3}}, {"backbone": BACKBONE | {"name": "vit_small_patch16_224"}}, {"data": {"index": "other"}},
    {"evaluation": {"index": "other"}},
])  # fmt: skip
def test_unlike_runs_of_one_name_are_told_apart(tmp_path: Path, other: dict[str, Any]) -> None:
    alike: dict[str, Any] = {"init": "x", "optim": {"lr": 1e-2}, "data": {"index": "train"}}
    runs = [arm(tmp_path / "h1", "fine-tuned", 0.79, **alike), arm(tmp_path / "h2", "fine-tuned", 0.73, **(alike | other))]
    page = build_page(read_runs(runs))
    assert page.headline[0].startswith("Fine-tuned from the pretrained backbone (h1): 79.0 % (78.2 to 79.8) of 10,000 test images")
    assert "fine-tuned (h2)" in " ".join(page.headline)
    assert [row[0] for row in page.sections[0].tables[0].rows] == ["fine-tuned (h1)", "fine-tuned (h2)"]
    drawn = [figure.alt for section in page.sections for figure in section.figures]
    assert len(drawn) == 4
    assert all("fine-tuned (h1)" in alt and "fine-tuned (h2)" in alt for alt in drawn)


def test_groups_of_one_name_list_their_runs(tmp_path: Path) -> None:
    runs = [arm(tmp_path / name, "mine", 0.7, init="x", seed=seed, optim={"lr": rate})
            for name, seed, rate in (("a", 0, 0.1), ("b", 1, 0.1), ("c", 0, 0.2))]  # fmt: skip
    lead, other = told(runs)
    assert lead.startswith("Fine-tuned from the pretrained backbone (mine, a, b): 70.0 % (mean of 2 runs, 70.0 to 70.0)")
    assert other.startswith("mine (c): 70.0 % (69.1 to 70.9). No clear difference: fine-tuned (a, b) has 0.0 points more")


def test_pictures_keep_what_tells_long_names_apart() -> None:
    rows = [[(f"fine-tuned from the pretrained backbone ({name})", 0.5, None, 0)] for name in ("h1", "h2")]
    assert plots.intervals("accuracy", rows[0]) != plots.intervals("accuracy", rows[1])


def test_the_recipe_outweighs_the_name(tmp_path: Path) -> None:
    runs = [arm(tmp_path / "a", "fine-tuned", 0.9), arm(tmp_path / "b", "mine", 0.8, init="x")]
    assert told(runs)[0].startswith("Fine-tuned from the pretrained backbone (mine): 80.0 %")


def test_headline_without_arms(tmp_path: Path) -> None:
    page = build_page(read_runs([tokenizer(tmp_path / "t"), pretraining(tmp_path / "p", tmp_path / "t")]))
    assert page.headline == ["t uses 37.5 % of its 8 codes.", "p predicts 41.0 % of the hidden tokens rightly after 640 images."]


def test_pretrainings_on_pixels_claim_no_tokens(tmp_path: Path) -> None:
    plain, normalised = on_pixels(tmp_path / "simmim", "simmim", unit=32), on_pixels(tmp_path / "mae", "mae", norm_pix_loss=True)
    compare([plain, normalised], tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert "No run has a test accuracy yet." in text
    assert "Mean absolute error of hidden pixels (simmim) against images seen: simmim ends at 0.3" in text
    assert "Mean squared error of hidden pixels (mae) against images seen: mae ends at 0.3" in text
    assert not [word for word in ("nats", "tokens predicted", "decoded", "predicts one and the same code") if word in text]
    assert "Rows from the top: image; what the encoder sees (grey is hidden); pixels predicted at hidden places.\n" in text
    assert "pixels predicted at hidden places (around the image's own means" in text
    for name in ("simmim", "mae"):
        assert f"accelerate launch pretrain/{name}.py --config {tmp_path / name}/config.yaml" in text


def test_beit_v2_and_vqkd_are_told_as_what_they_are(tmp_path: Path) -> None:
    """The sum of two losses is in no picture with one of them, and what a teacher sees is no reconstruction."""
    beit2 = {"tokenizer": {"path": "t"}, "aggregation": {"layer": 9}, "mask": {"count": 75}, "backbone": BACKBONE, "seed": 0}
    vqkd = {"vqkd": {"vocab_size": 8}, "teacher": {"path": "x"}, "backbone": BACKBONE, "seed": 0}
    runs = [pretraining(tmp_path / "beit", tmp_path / "t"),
            write_run(tmp_path / "v2", beit2, kind="pretrain", records=[], metrics=log(loss=(8.0, 6.0)), picture=(64, 32)),
            write_run(tmp_path / "taught", vqkd, kind="tokenizer", records=[], metrics=log(loss=(0.9, 0.3)), picture=(64, 32))]  # fmt: skip
    compare(runs, tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert re.search(r"Sum of both cross entropies [^]]* against images seen: v2 ends at 6]", text)
    assert "Cross entropy over hidden cells (nats) against images seen: beit ends at 2.5]" in text
    assert "Features told from tokens of taught. Rows from the top: image; the teacher's features" in text
    assert "Reconstruction" not in text


def test_the_commonest_code_is_told_beside_pretrainings_on_pixels_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []
    own = plots.curves
    monkeypatch.setattr(plots, "curves", lambda *given, **named: levels.append(named.get("level")) or own(*given, **named))
    runs = [tokenizer(tmp_path / "t"), pretraining(tmp_path / "beit", tmp_path / "t"), on_pixels(tmp_path / "mae", "mae")]
    compare(runs, tmp_path / "out")
    assert [level for level in levels if level] == [("always the code commonest on held-out images", 0.7)]


def test_page_is_one_file(everything: Path) -> None:
    text = (everything / "report.html").read_text()
    tags = Reader(text).tags
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    assert not re.search(r"@import|url\(", text)
    addresses = [attrs[name] for _, attrs in tags for name in ("src", "href", "srcset") if name in attrs]
    assert len(addresses) >= 10
    for address in addresses:
        assert address is not None
        assert address.startswith("data:image/png;base64,")
        Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).verify()
    assert all(attrs.get("alt") for tag, attrs in tags if tag == "img")


def test_pictures_lie_beside_the_markdown(everything: Path) -> None:
    named = re.findall(r"\]\(([^)]+\.png)\)", (everything / "report.md").read_text())
    assert len(named) == len(set(named))
    assert set(named) == {path.name for path in everything.glob("*.png")}
    for name in named:
        with Image.open(everything / name) as image:
            assert image.width >= 64
            image.load()


def test_both_forms_have_the_same_cells(everything: Path) -> None:
    html = Reader((everything / "report.html").read_text()).cells
    reader = Reader(MarkdownIt("commonmark").enable("table").render((everything / "report.md").read_text()))
    assert reader.cells == html
    assert not {"script", "b"} & {tag for tag, _ in reader.tags}
    row = html.index("fine-tuned")
    assert html[row : row + 11] == ["fine-tuned", "79.3", "78.5 to 80.1", "10,000", "600", "48,000", "700", "231", "803,466", "0", "ft"]


def test_names_are_escaped(everything: Path) -> None:
    html = (everything / "report.html").read_text()
    assert "<b>&" not in html
    assert '<b>"A' not in html
    assert NASTY in Reader(html).cells
    assert escape_markdown("a|b\n# c_d*") == r"a\|b # c\_d\*"


def test_metrics_are_never_mixed(everything: Path) -> None:
    text = (everything / "report.md").read_text()
    test, validation = text[text.index("## Results") : text.index("![")].split("Validation accuracy, best first:")
    assert ("91.2" in test, "91.2" in validation) == (False, True)
    assert ("79.3" in test, "79.3" in validation) == (True, False)


def test_what_is_missing_is_told(everything: Path) -> None:
    text = (everything / "report.html").read_text()
    assert "DeiT-distilled (not finished)" in Reader(text).cells
    assert "deit is not finished: its log ends at step 10, 640 images." in text
    assert "No record of a test accuracy in _vali: not finished, or it has another metric?" in text
    assert "3 of 8 codes used (37.5" in text


def test_a_mark_of_another_recipe_is_none(tmp_path: Path) -> None:
    folder = arm(tmp_path / "a", "fine-tuned", 0.7, init="x")
    assert read_runs([folder])[0].finished
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("seed: 0", "seed: 1"))
    assert not read_runs([folder])[0].finished


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    begun = write_run(tmp_path / "begun", {"backbone": {}, "arm": "x"}, kind="classify", records=[], metrics=[], finished=False)
    broken = write_run(tmp_path / "nan", {"mask": {}}, kind="pretrain", records=[], metrics=log(loss=(5, float("nan"))), finished=False)
    strange = write_run(tmp_path / "strange", {"a": 1}, kind="", records=[], metrics=[], finished=False)
    text = compare([begun, broken, strange], tmp_path / "out").read_text()
    assert "No run has a test accuracy yet." in text
    assert "begun is not finished: it has no training log." in text
    assert "The loss of nan is no finite number at step 1." in text
    assert "strange has no record, and its settings do not tell" in text


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = read_runs([tokenizer(tmp_path / "a" / "tok"), tokenizer(tmp_path / "b" / "tok"), tmp_path / "a" / ".." / "a" / "tok"])
    assert [run.name for run in runs] == ["a/tok", "b/tok"]
    names = [figure.name for figure in build_page(read_runs([tokenizer(tmp_path / "c d"), tokenizer(tmp_path / "c-d")])).figures]
    assert len(set(names)) == len(names) == 6


def test_errors_are_one_line_with_a_cure(tmp_path: Path) -> None:
    run = tokenizer(tmp_path / "t")
    with pytest.raises(DataError, match=r"nowhere is no run folder, it does not exist; name the folder"):
        compare([run, tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(DataError, match=r"no run folder, it has no config\.yaml"):
        compare([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match=r"cannot be written to .*file.* give another --out"):
        compare([run], tmp_path / "file")
    with pytest.raises(SettingError, match="name run folders"):
        compare([], tmp_path / "out")
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(MimeticError, match="is damaged"):
        compare([run], tmp_path / "out")


@pytest.mark.parametrize("line", [
    '{"metric": 5}', '{"metric": 5, "value": 1}', '{"metric": "m", "value": "0.7"}', '{"metric": "m", "value": null}', "[]", "5",
    '{"metric": "m", "value": 1, "count": "all"}', '{"metric": "m", "value": 1, "details": {"labels": "few"}}', '{"value": 1}',
])  # fmt: skip
def test_a_damaged_record_is_one_line(tmp_path: Path, line: str) -> None:
    run = arm(tmp_path / "a", "fine-tuned", 0.7, init="x")
    with (run / "records.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(CheckpointError, match=r"a/records\.jsonl: line 3 is damaged; remove it$"):
        compare([run], tmp_path / "out")


@pytest.mark.parametrize("line", ['{"step": 1, "samples": 64, "loss": "high"}', "[]"])
def test_a_damaged_log_is_one_line(tmp_path: Path, line: str) -> None:
    run = arm(tmp_path / "a", "fine-tuned", 0.7, init="x")
    (run / "metrics.jsonl").write_text(f"{line}\n")
    with pytest.raises(CheckpointError, match=r"a/metrics\.jsonl: line 1 is damaged; remove it$"):
        compare([run], tmp_path / "out")


def test_a_full_disk_leaves_the_old_report_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, out = [arm(tmp_path / "a", "fine-tuned", 0.7, init="x")], tmp_path / "out"
    compare(runs, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    written: list[int] = []

    def full(handle: int) -> None:
        written.append(handle)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    runs.append(arm(tmp_path / "b", "from scratch", 0.6))
    with pytest.raises(SettingError, match=r"cannot be written to .*out \(No space left on device\); free some space or give another"):
        compare(runs, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("out", ["/proc", "/proc/report", "a" * 300, "file/report", "dangling"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, out: str) -> None:
    run = tokenizer(tmp_path / "t")
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("/proc/nowhere")
    with pytest.raises(SettingError, match=rf"cannot be written to .*{out} \([A-Z][^\n]+\); give another --out$"):
        compare([run], tmp_path / out)
