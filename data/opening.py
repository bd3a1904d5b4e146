"""What a setting names, opened: one set of shards or a mixture, images to measure on, draws of some images of each class."""

import fcntl
import hashlib
import os
import sys
from pathlib import Path

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from mimetic.data.cache import ShardCache, cache_folder
from mimetic.data.fetch import is_address, shown, spool
from mimetic.data.index import REPAIR, UNLABELLED, Index, open_index
from mimetic.data.indexing import find_tars, index_tars
from mimetic.data.mixture import Mixture
from mimetic.data.pixelrange import called
from mimetic.data.randomness import mix
from mimetic.engine.config import DataSettings
from mimetic.engine.errors import DataError, SettingError


def open_data(settings: DataSettings) -> Index | Mixture:
    """Opens what `data.index` or `data.mix` names.

    Raises:
        DataError: as `open_set` does.
        SettingError: sets that cannot be mixed, or a command that was not typed.
    """
    cache = ShardCache(Path(settings.cache).expanduser() if settings.cache else cache_folder(), int(settings.cache_gb * 1e9))
    if settings.index is not None:
        return open_set(settings.index, cache)
    assert settings.epoch_samples  # the settings see to it
    return Mixture(tuple(open_set(path, cache) for path in settings.mix), tuple(settings.mix.values()), settings.epoch_samples)


def open_set(named: str | Path, cache: ShardCache | None = None) -> Index:
    """Opens one set of shards: an `index.json`, its folder, the address of either, or tars without an index.

    Tars are a file, a pattern (`shards/*.tar`, `shards/{000..099}.tar`), or `pipe:COMMAND`, whose output is spooled to the cache. Their
    index is made at the first opening, and kept in the cache.

    Raises:
        DataError: nothing there, or damaged.
        SettingError: a command that is not on the command line.
    """
    cache, name = cache or ShardCache(cache_folder()), str(named)
    if name.startswith("pipe:"):
        if not any(name in word for word in sys.argv):
            raise SettingError(f"{name[:60]}: a command is run only where it is typed, on the command line, never from a file")
        return open_index(_indexed(list(braceexpand(name)), name, cache), cache)
    is_pattern = any(letter in name for letter in ("*[{" if is_address(name) else "*?[{")) and not os.path.exists(name)
    if not shown(name).endswith(".tar") and not is_pattern:
        return open_index(name, cache)
    if is_address(name):
        raise DataError(f"{shown(name)}: tars elsewhere need an index here: `mimetic index '{shown(name)}' --out FOLDER`, and give FOLDER")
    tars = [os.path.abspath(tar) for tar in find_tars([name])]
    return open_index(_indexed(tars, repr([(tar, (entry := os.stat(tar)).st_size, entry.st_mtime_ns) for tar in tars]), cache), cache)


def _indexed(tars: list[str], content: str, cache: ShardCache) -> Path:
    """The folder of an index of tars in the cache, made by the first of the processes that need it."""
    folder = cache.folder / "indexes" / hashlib.sha256(content.encode()).hexdigest()[:20]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if not (folder / "index.json").exists():
                print(f"making the index of {len(tars):,} tars, once: {folder}", flush=True)
                index_tars([_spooled(tar, folder / f"shard-{number:05d}.tar") for number, tar in enumerate(tars)], folder)
    except OSError as error:
        raise SettingError(f"{folder} cannot be written ({error.strerror or error}); give data.cache another folder") from None
    return folder


def _spooled(tar: str, file: Path) -> str:
    """A tar's file; what a command writes is kept in `file`."""
    if not tar.startswith("pipe:"):
        return tar
    if not file.exists():
        part = file.with_suffix(".part")
        spool(tar.removeprefix("pipe:"), part)
        part.rename(file)
    return str(file)


def open_labelled(settings: DataSettings) -> Index:
    """Opens `data.index` to draw labels from.

    Raises:
        DataError: as `open_set` does.
        SettingError: a mix, or no labels.
    """
    index = open_data(settings)
    if isinstance(index, Mixture):
        raise SettingError(f"data.mix names {len(settings.mix)} sets, but labels mean something else in each; give one data.index")
    if not index.classes:
        raise SettingError(f"{index.home} has no labels; pack a tree with a sub-folder for each class")
    if (largest := int(index.rows["label"].max())) >= len(index.classes):
        raise DataError(f"{index.home}: its index has {len(index.classes)} classes, but a sample of class number {largest}; {REPAIR}")
    return index


def open_held_out(path: str | Path, training: Index | Mixture, *, labelled: bool = False) -> Index:
    """Opens an index to measure on, of the same kind of images as the training's.

    Raises:
        DataError: as `open_set` does.
        SettingError: other channels or another pixel range, or with `labelled` other classes: label numbers would mean something else.
    """
    index = open_set(path, training.cache)
    if index.channels != training.channels:
        raise SettingError(f"{path} has {index.channels} channels, the training data {training.channels}; pack both alike, "
                           f"with --channels {training.channels}")  # fmt: skip
    if index.range != training.range:
        raise SettingError(f"{path} has {called(index.range)}, the training data {called(training.range)}; pack or index both with the "
                           "same --range")  # fmt: skip
    if labelled and index.classes != training.classes:
        told = [f"{len(classes)} classes ({', '.join(classes[:3])} ...)" for classes in (index.classes, training.classes)]
        raise SettingError(f"{path} has {told[0]}, the training data {told[1]}; both need the same sub-folders")
    return index


def draw_per_class(index: Index, count: int, seed: int, *, skip: int = 0) -> NDArray[np.int64]:
    """Samples `skip` to `skip + count` of each class in an order drawn by `seed`: disjoint draws have disjoint ranges.

    Raises:
        SettingError: a class has fewer than `skip + count` samples, or there are no labels.
    """
    labels = np.asarray(index.rows["label"])
    if not index.classes or (labels == UNLABELLED).all():
        raise SettingError(f"{index.home}: no labels to draw {count} images per class from")
    draws = []
    for label, name in enumerate(index.classes):
        members = np.flatnonzero(labels == label)
        if len(members) < skip + count:
            raise SettingError(f"{index.home}: class {name} has {len(members)} images, {skip + count} per class are asked for")
        draws.append(members[np.argsort(mix(seed, members), kind="stable")][skip : skip + count])
    return np.sort(np.concatenate(draws))
