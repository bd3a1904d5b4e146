"""What a setting names, opened: one set of shards or a mixture, images to measure on, draws of some images of each class."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mimetic.data.cache import ShardCache, cache_folder
from mimetic.data.index import UNLABELLED, Index, open_index
from mimetic.data.mixture import Mixture
from mimetic.data.randomness import mix
from mimetic.engine.config import DataSettings
from mimetic.engine.errors import SettingError


def open_data(settings: DataSettings) -> Index | Mixture:
    """Opens what `data.index` or `data.mix` names.

    Raises:
        DataError: as `open_index` does.
        SettingError: sets that cannot be mixed.
    """
    cache = ShardCache(Path(settings.cache) if settings.cache else cache_folder(), int(settings.cache_gb * 1e9))
    if settings.index is not None:
        return open_index(settings.index, cache)
    assert settings.epoch_samples  # the settings see to it
    return Mixture(tuple(open_index(path, cache) for path in settings.mix), tuple(settings.mix.values()), settings.epoch_samples)


def open_labelled(settings: DataSettings) -> Index:
    """Opens `data.index` to draw labels from.

    Raises:
        DataError: as `open_index` does.
        SettingError: a mix, or no labels.
    """
    index = open_data(settings)
    if isinstance(index, Mixture):
        raise SettingError(f"data.mix names {len(settings.mix)} sets, but labels mean something else in each; give one data.index")
    if not index.classes:
        raise SettingError(f"{index.home} has no labels; pack a tree with a sub-folder for each class")
    return index


def open_held_out(path: str | Path, training: Index | Mixture, *, labelled: bool = False) -> Index:
    """Opens an index to measure on, of the same kind of images as the training's.

    Raises:
        DataError: as `open_index` does.
        SettingError: other channels, or with `labelled` other classes: label numbers would mean something else.
    """
    index = open_index(path, training.cache)
    if index.channels != training.channels:
        raise SettingError(f"{path} has {index.channels} channels, the training data {training.channels}; pack both alike, "
                           f"with --channels {training.channels}")  # fmt: skip
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
