"""`mimetic tokens`: the ids of N views of each image, made once, so that training need not run the tokenizer."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import yaml

from mimetic.engine.config import parse
from mimetic.engine.errors import SettingError
from mimetic.pretrain.recipe import Beit2Recipe, BeitRecipe

if TYPE_CHECKING:
    import torch

Recipe = TypeVar("Recipe", bound=BeitRecipe)
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
        config: the recipe that is to be trained with it, which settles the views and their seed.
        batch_size: images that the tokenizer gets at a time; the default is the recipe's.
        workers: processes that decode; the default is one a CPU.
        settings: `--a.b VALUE` that differ from the recipe's.

    Raises:
        MimeticError: recipe, tokenizer and images do not fit each other, or the folder holds something else.
    """
    if views < 1 or (batch_size is not None and batch_size < 1):
        raise SettingError(f"--views is {views}, --batch-size {batch_size}; both must be 1 or more")
    second = any(word.startswith("--aggregation") for word in settings) or _has_aggregation(config)
    recipe = _parsed(Beit2Recipe if second else BeitRecipe, tokenizer, shards, out, config, settings)

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
    script = beit2 if second else beit
    objective, training, *_ = script.build(recipe, index, torch.device("cpu"))
    assert isinstance(index, Index)  # `_parsed` sees to it
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
              f"next: pretrain/{'beit2' if second else 'beit'}.py --config {config} --tokenizer.path {tokenizer} --data.index {shards} "
              f"--tokenizer.cache {out}{''.join(f' {word}' for word in settings)}; {contents.views} epochs see each view once")  # fmt: skip


def _has_aggregation(config: Path) -> bool:
    """Whether a recipe is BEiT v2's, which sees its images resized otherwise; False for what is no recipe: `parse` says why."""
    try:
        tree = yaml.safe_load(config.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(tree, dict) and "aggregation" in tree


def _parsed(recipe_class: type[Recipe], tokenizer: str, shards: str, out: Path, config: Path, settings: Sequence[str]) -> Recipe:
    """The recipe, of this tokenizer and these images.

    Raises:
        SettingError: as `parse` does, or settings contradict the command's own words.
    """
    given = {"tokenizer.path": tokenizer, "data.index": shards, "tokenizer.cache": "null", "out": str(out)}
    for word in settings:
        name = word.removeprefix("--").partition("=")[0]
        if name in (*given, "data.mix", "config", "resume", "allow", "dry-run"):
            raise SettingError(f"--{name} is nothing that `mimetic tokens` takes: TOKENIZER, SHARDS, OUT and --config say what it reads "
                               "and writes; leave it out")  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    return parse(recipe_class, example=EXAMPLE, argv=["--config", str(config), *words, *settings]).recipe


def _device() -> "torch.device":
    """This process's accelerator, where there are any."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", 0))) if accelerator else torch.device("cpu")
