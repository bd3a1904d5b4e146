"""`mimetic tokens`: the ids of N views of each image, made once, so that training need not run the tokenizer."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from mimetic.engine.config import parse
from mimetic.engine.errors import SettingError
from mimetic.pretrain.recipe import Beit2Recipe, BeitRecipe

if TYPE_CHECKING:
    import torch

EXAMPLE = "mimetic tokens runs/tokenizer shards/photos shards/photos-tokens --views 4 --config launch/recipes/beit_base_in1k.yaml"


def cache_tokens(tokenizer: str, shards: str, out: Path, *, views: int, config: Path, batch_size: int | None, workers: int | None,
                 settings: Sequence[str] = ()) -> None:  # fmt: skip
    """Makes a token cache for a recipe, or what it lacks, and says how it is used.

    Several processes share the work when a launcher starts them (torchrun): each takes its part of the shards.

    Args:
        tokenizer: as `tokenizer.path`.
        shards: as `data.index`.
        out: the folder of the cache.
        views: N.
        config: the recipe that is to be trained with it, BEiT's or, if it has a section `aggregation`, BEiT v2's: it settles the views
            and their seed.
        batch_size: images that the tokenizer gets at a time; the default is the recipe's.
        workers: processes that decode; the default is one a CPU.
        settings: `--a.b VALUE` that differ from the recipe's.

    Raises:
        MimeticError: recipe, tokenizer and images do not fit each other, or the folder holds something else.
    """
    for name, number in (("--views", views), ("--batch-size", batch_size)):
        if number is not None and number < 1:
            raise SettingError(f"{name} is {number}; it must be 1 or more")
    _refuse_what_is_said_already(settings)
    words = ["--config", str(config), "--tokenizer.path", tokenizer, "--data.index", shards, "--tokenizer.cache", "null", "--out", str(out)]
    method = "beit2" if _aggregates(config, settings) else "beit"
    recipe = parse(Beit2Recipe if method == "beit2" else BeitRecipe, example=EXAMPLE, argv=[*words, *settings]).recipe

    import torch

    from mimetic.data.index import Index
    from mimetic.data.opening import open_data
    from mimetic.data.packing.workers import count_of
    from mimetic.data.views import PretrainViews
    from mimetic.engine.objective import frozen
    from mimetic.pretrain import beit, beit2
    from mimetic.tokenizers.caching import CacheWriter, refuse_to_overwrite
    from mimetic.tokenizers.files import tokenizer_hash
    from mimetic.tokenizers.token_cache import terms_of

    workers = count_of(workers)
    refuse_to_overwrite(out)
    index = open_data(recipe.data)
    cpu = torch.device("cpu")
    objective, training, *_ = beit2.build(recipe, index, cpu) if isinstance(recipe, Beit2Recipe) else beit.build(recipe, index, cpu)
    assert isinstance(index, Index)  # the words above see to it
    assert isinstance(training, PretrainViews)
    rank, world, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), _device()
    writer = CacheWriter(out, index, training, frozen(objective.tokenizer, device)[0], device,
                         terms_of(training, index, tokenizer_hash(tokenizer), recipe.tokenizer.precision, recipe.seed),
                         count=views, batch_size=batch_size or recipe.data.batch_size, workers=workers, rank=rank, world=world)  # fmt: skip
    contents = writer.write()
    files = [file for part in contents.parts for file in part.files.values()]
    size = sum(file.bytes for file in files)
    notes = [f"{len(files)} files, {size / 1e6:,.1f} MB"]
    notes += [f"{writer.bad} images do not decode, training passes them over"] if writer.bad else []
    notes += ["other processes may still be writing theirs"] if world > 1 else []
    if rank == 0:
        print(f"{contents.views} views of {len(index):,} images in {out}: {'; '.join(notes)}\n"
              f"next: pretrain/{method}.py --config {config} --tokenizer.path {tokenizer} --data.index {shards} --tokenizer.cache {out}"
              f"{''.join(f' {word}' for word in settings)}; {contents.views} epochs see each view once")  # fmt: skip


def _refuse_what_is_said_already(settings: Sequence[str]) -> None:
    """Raises SettingError for settings that contradict the command's own words, or mean nothing here."""
    for word in settings:
        name = word.removeprefix("--").partition("=")[0]
        if name in ("tokenizer.path", "tokenizer.cache", "data.index", "data.mix", "config", "out", "resume", "allow", "dry-run"):
            raise SettingError(f"--{name} is nothing that `mimetic tokens` takes: TOKENIZER, SHARDS, OUT and --config say what it reads "
                               "and writes; leave it out")  # fmt: skip


def _aggregates(config: Path, settings: Sequence[str]) -> bool:
    """Whether a recipe has the section that only BEiT v2's has; one that cannot be read is for `parse` to refuse."""
    try:
        sections = yaml.safe_load(config.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        sections = None
    return (isinstance(sections, dict) and "aggregation" in sections) or any(word.startswith("--aggregation.") for word in settings)


def _device() -> "torch.device":
    """This process's accelerator, where there are any."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0))) if accelerator else torch.device("cpu")
