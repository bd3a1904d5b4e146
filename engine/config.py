"""Recipes: frozen dataclasses that yaml files and the command line map onto.

This file and the recipes built from it import nothing heavy, so that `--help` and a misspelt setting answer at once, before
torch is loaded. Unknown settings are errors at any depth.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
import sys
import tempfile
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from mimetic.engine import ranges
from mimetic.engine.errors import SettingError

R = TypeVar("R")
TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "dict": "settings and their values"}


@dataclass(frozen=True)
class DataSettings:
    """What is read, and in which portions.

    Args:
        index: An `index.json` made by `mimetic pack` or `mimetic index`, the folder that holds it, or the address of either.
        mix: Instead of one index, several by weight: {PATH: WEIGHT, ...}. Each is walked in its own exact order.
        epoch_samples: Samples that count as an epoch of a mix.
        batch_size: Images per process and micro-batch.
        workers: Processes per rank that decode and augment; 0 does it in the training process. Changes no number.
        max_bad: Share of the samples that may fail to decode before the run stops; 0 is strict.
        canonical_streams: Places of the data that are read in turn. More mix better; a multiple of the number of machines keeps each
            machine to its own shards.
        shuffle_block: Samples within which each stream is shuffled. More mix better, and take more of the cache.
        cache: Folder for shards that lie elsewhere; the default is ~/.cache/mimetic/shards.
        cache_gb: What that folder may take.
    """

    index: str | None = None
    mix: dict[str, float] = dataclasses.field(default_factory=dict)
    epoch_samples: int | None = None
    batch_size: int = 64
    workers: int = 1
    max_bad: float = 0.01
    canonical_streams: int = 8
    shuffle_block: int = 8192
    cache: str | None = None
    cache_gb: float = 100.0

    def __post_init__(self) -> None:
        if (self.index is None) == (not self.mix):
            raise SettingError("give data.index, the shards to train on (made by `mimetic pack`), or several with their weights as data.mix"
                               if self.index is None else "data.index and data.mix are both given; put the index into the mix")  # fmt: skip
        if bool(self.mix) != (self.epoch_samples is not None):
            raise SettingError(f"data.mix has {len(self.mix)} sets, data.epoch_samples is {self.epoch_samples}; sets that are mixed end at "
                               "different times, so give both: how many samples count as an epoch")  # fmt: skip
        for name, weight in self.mix.items():
            if not 0 < weight < float("inf"):
                raise SettingError(f"data.mix gives {name} the weight {weight}; it must be above 0")
        ranges.require(self, "data", batch_size=ranges.COUNT, workers=ranges.NOT_NEGATIVE, max_bad=ranges.SHARE, epoch_samples=ranges.COUNT,
                       canonical_streams=ranges.SOME, shuffle_block=ranges.SOME, cache_gb=ranges.GIGABYTES)  # fmt: skip

    @property
    def shuffling(self) -> dict[str, Any]:
        """What fixes the order of samples, beside the seed: arguments of a stream."""
        return {"canonical_streams": self.canonical_streams, "shuffle_block": self.shuffle_block}


@dataclass(frozen=True)
class TrainSettings:
    """How long to train, and what to keep. Give exactly one of steps, epochs, samples.

    Args:
        steps: Optimizer steps.
        epochs: Passes over the data.
        samples: Images seen.
        accumulate: Micro-batches per optimizer step.
        precision: fp32 or bf16 (autocast; weights, gradients and optimizer stay in fp32).
        compile: Compile the objective with torch.compile: a minute or more at the start, faster steps where small operations dominate.
        ema_decay: Decay of a running mean of the weights, which is then what is evaluated and saved; 0 keeps none. It starts
            short: after t steps the decay is at most (1 + t) / (10 + t).
        log_every: Steps between lines of metrics; the default gives about 100 lines a run.
        checkpoint_every: Steps between checkpoints; the default gives about 10 a run.
        keep: Checkpoints kept, newest first; the best one is kept beside them.
        picture_every: Steps between pictures; the default gives about 4 a run.
        evaluate_every: Steps between evaluations; the default evaluates at the end only.
    """

    steps: int | None = None
    epochs: float | None = None
    samples: int | None = None
    accumulate: int = 1
    precision: str = "fp32"
    compile: bool = False
    ema_decay: float = 0.0
    log_every: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    picture_every: int | None = None
    evaluate_every: int | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.steps, self.epochs, self.samples)) != 1:
            raise SettingError("give exactly one of train.steps, train.epochs, train.samples "
                               "(unset the recipe's with, say, --train.samples null)")  # fmt: skip
        if self.precision not in ("fp32", "bf16"):
            raise SettingError(f"train.precision is {self.precision!r}; it must be fp32 or bf16")
        ranges.require(self, "train", steps=ranges.COUNT, epochs=ranges.POSITIVE, samples=ranges.COUNT, accumulate=ranges.COUNT,
                       ema_decay=ranges.BELOW_ONE,
                       log_every=ranges.COUNT, checkpoint_every=ranges.COUNT, keep=ranges.COUNT, picture_every=ranges.COUNT,
                       evaluate_every=ranges.COUNT)  # fmt: skip


@dataclass(frozen=True)
class OptimSettings:
    """AdamW with linear warm-up and cosine decay.

    Args:
        lr: Peak learning rate, absolute, as used (no scaling rule is applied to it).
        min_lr: Learning rate at the end.
        warmup_lr: Learning rate of the first step.
        warmup: Share of the training that warms up, in [0, 1).
        weight_decay: Decay of matrices; vectors, positions, tokens and bias tables have none.
        beta1: AdamW's first beta.
        beta2: AdamW's second beta.
        eps: AdamW's epsilon.
        clip: Largest norm of the whole gradient; 0 switches clipping off.
        layer_decay: Each block's learning rate is this times the next one's (BEiT, 2106.08254); 1 switches it off.
    """

    lr: float
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup: float = 0.05
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 3.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        ranges.require(self, "optim", lr=ranges.POSITIVE, min_lr=ranges.NOT_NEGATIVE, warmup_lr=ranges.NOT_NEGATIVE,
                       warmup=ranges.BELOW_ONE, weight_decay=ranges.NOT_NEGATIVE, beta1=ranges.BELOW_ONE, beta2=ranges.BELOW_ONE,
                       eps=ranges.POSITIVE, clip=ranges.NOT_NEGATIVE, layer_decay=ranges.SOME_SHARE)  # fmt: skip


@dataclass(frozen=True)
class GuardSettings:
    """What happens when a step's gradient is not finite, or far larger than those before it.

    Such a step never changes the weights, and leaves a capsule in the run folder that `mimetic replay` runs again.

    Args:
        bad_step: stop (all processes, with the capsule named), skip (leave that step out), or rewind (to the last good checkpoint,
            and on with the data after the bad step).
        spike: A gradient norm of more than so many times the median of the last 64 is bad too; 0 looks for numbers that are not
            finite only.
        max_skips: Steps that may be skipped in the whole run; one more stops it.
        max_rewinds: Rewinds likewise.
    """

    bad_step: str = "stop"
    spike: float = 0.0
    max_skips: int = 10
    max_rewinds: int = 3

    def __post_init__(self) -> None:
        if self.bad_step not in ("stop", "skip", "rewind"):
            raise SettingError(f"guard.bad_step is {self.bad_step!r}; it must be stop, skip or rewind")
        if 0 < self.spike <= 1:
            raise SettingError(f"guard.spike is {self.spike}; it must be above 1, since every second norm is above the median, or 0")
        ranges.require(self, "guard", spike=ranges.NOT_NEGATIVE, max_skips=ranges.NOT_NEGATIVE, max_rewinds=ranges.NOT_NEGATIVE)


@dataclass(frozen=True)
class BackboneSettings:
    """Which backbone, and how it departs from the catalog.

    Args:
        name: A name of the catalog (`mimetic models`); they are timm's. `timm:NAME` takes any other net of timm's.
        image_size: Side of the square input in pixels; the default is the name's own.
        overrides: Arguments that differ from the catalog's, under timm's names: embed_dim, depth, num_heads, patch_size, ...
        grad_checkpointing: Compute each block's inside again for its gradient: a third slower, in far less memory.
    """

    name: str = "beit_base_patch16_224"
    image_size: int | None = None
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        ranges.require(self, "backbone", image_size=ranges.COUNT)
        if self.grad_checkpointing and (self.name.startswith("timm:") or self.name == "residual_cnn"):
            raise SettingError(f"backbone.grad_checkpointing is true, but {self.name} has no blocks of ours to recompute; set it to false")


@dataclass(frozen=True)
class Expected:
    """What others published for this very setting. It changes no number; `mimetic watch` puts it beside the run.

    Args:
        source: Where it was published, and what was different there.
        loss: Training loss by images seen: {IMAGES: LOSS, ...}.
        masked_accuracy: The same of masked accuracy, in [0, 1].
    """

    source: str = ""
    loss: dict[int, float] = dataclasses.field(default_factory=dict)
    masked_accuracy: dict[int, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Invocation(Generic[R]):
    """One start of an entry script: the recipe, and where the run goes.

    Attributes:
        resume: None (go on if the run folder holds a checkpoint, else start), "" (go on, or fail), or a checkpoint folder.
        allow: settings that may differ from those of the checkpoint that the run goes on from.
        dry_run: stop before the first step, with nothing written.
    """

    recipe: R
    out: Path
    resume: str | None = None
    allow: tuple[str, ...] = ()
    dry_run: bool = False


def parse(recipe_class: type[R], *, example: str, argv: Sequence[str] | None = None) -> Invocation[R]:
    """Reads `--config FILE`, `--a.b VALUE` and `--out RUN` into a recipe.

    Raises:
        SettingError: unknown or misspelt setting (with the nearest known one), wrong type, unreadable yaml.
    """
    from jsonargparse import ArgumentParser

    argv = sys.argv[1:] if argv is None else list(argv)
    parser = ArgumentParser(
        description=(recipe_class.__doc__ or "").split("\n\n")[0], epilog=f"example: {example}", exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="A recipe in yaml; settings on the command line override it.")
    parser.add_argument("--out", type=str, required=True, help="The run folder; the same command again goes on with it.")
    parser.add_argument(
        "--resume", nargs="?", const="", type=str, metavar="CHECKPOINT",
        help="Refuse to start afresh: go on from the newest checkpoint of the run folder, or from this one.",
    )  # fmt: skip
    parser.add_argument(
        "--allow", action="append", default=[], type=str, metavar="SETTING",
        help="Go on although this setting differs from the checkpoint's; once for each.",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="Say what would happen, and what it takes, and stop.")
    parser.add_class_arguments(recipe_class)
    known = sorted(known_settings(recipe_class))
    for file in _config_files(argv):
        _refuse_unknown_keys(file, known)
    try:
        values = parser.instantiate(parser.parse_args(argv))
    except SettingError:
        raise
    except Exception as error:  # jsonargparse raises argparse's, yaml's and its own kinds
        raise SettingError(_one_line(str(error), known)) from None
    if not values.out.strip():
        raise SettingError("--out is empty; name the run folder")
    for name in values.allow:
        if not _is_known(name, known):
            raise SettingError(f"--allow {name}: no such setting{did_you_mean(name, known)}")
    fields = {field.name: values[field.name] for field in dataclasses.fields(recipe_class)}  # type: ignore[arg-type]
    return Invocation(recipe_class(**fields), Path(values.out), values.resume, tuple(values.allow), values.dry_run)


def known_settings(recipe_class: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted name that a recipe class knows; free dictionaries end in `.*`."""
    for name, hint in typing.get_type_hints(recipe_class).items():
        if dataclasses.is_dataclass(hint):
            yield from known_settings(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}.*" if typing.get_origin(hint) is dict else f"{prefix}{name}"


def default_settings(recipe_class: Any, prefix: str = "") -> dict[str, Any]:
    """The default of every setting that has one, by dotted name: what a recipe stored before the setting existed means."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(recipe_class)
    for field in dataclasses.fields(recipe_class):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= default_settings(hints[field.name], f"{prefix}{field.name}.")
        elif field.default is not dataclasses.MISSING:
            found[f"{prefix}{field.name}"] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[f"{prefix}{field.name}"] = field.default_factory()
    return found


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def recipe_dict(recipe: Any) -> dict[str, Any]:
    """The recipe as plain values, as stored in config.yaml and in every checkpoint."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def recipe_hash(recipe: Any) -> str:
    """Twelve hexadecimal digits that name a recipe in records."""
    return hashlib.sha256(json.dumps(recipe_dict(recipe), sort_keys=True).encode()).hexdigest()[:12]


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes under a temporary name, syncs, renames: a reader never meets half a file, not even after a kill."""
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` when something known is near, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def _config_files(argv: list[str]) -> Iterator[Path]:
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == "--config" and following:
            yield Path(following)
        elif word.startswith("--config="):
            yield Path(word.removeprefix("--config="))


def _refuse_unknown_keys(file: Path, known: list[str]) -> None:
    try:
        tree = yaml.safe_load(file.read_text())
    except OSError as error:
        raise SettingError(f"--config {file}: {error.strerror}; recipes lie in launch/recipes/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"--config {file} is not yaml: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise SettingError(f"--config {file} holds no settings; write them as `section:` and `  name: value`")
    for name, value in flatten(tree).items():
        emptied = (value == {} or (value is None and "." not in name)) and any(other.startswith(f"{name}.") for other in known)
        if emptied:  # a section whose every line is commented out
            continue
        if any(other.startswith(f"{name}.") for other in known):
            raise SettingError(f"{file}: {name} is {value}, but it is a section; write `{name}:` and its settings below, indented")
        if not _is_known(name, known):
            raise SettingError(f"{file}: unknown setting {name}{did_you_mean(name, known)}")


def _is_known(name: str, known: list[str]) -> bool:
    return name in known or any(name == other[:-2] or name.startswith(other[:-1]) for other in known if other.endswith(".*"))


def _one_line(message: str, known: list[str]) -> str:
    unknown = re.search(r"(?:unrecognized arguments:|Unrecognized arguments:)\s*--(\S+?)(?:=|\s|$)", message)
    if unknown:
        return f"unknown setting --{unknown[1]}{did_you_mean(unknown[1], [*known, 'config', 'out', 'resume', 'allow', 'dry-run'])}"
    outside = re.search(r"Group '(\S+)' does not accept option '(\S+)'", message)
    if outside:
        name = f"{outside[1]}.{outside[2]}"
        return f"unknown setting {name}{did_you_mean(name, known)}"
    flat = " ".join(message.split())
    mistyped = re.search(r"""Parser key "(\S+)":.*?Expected a <class '(\w+)'>.*(?:Given|Got) value: (.*)$""", flat)
    if mistyped:
        return f"{mistyped[1]} is {mistyped[3]}; it must be {TYPES.get(mistyped[2], mistyped[2])}"
    return flat
