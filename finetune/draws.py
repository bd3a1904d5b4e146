"""Which images are trained on and which are measured on: drawn by seed, and never the same."""

import numpy as np
from numpy.typing import NDArray

from mimetic.data.index import Index
from mimetic.data.opening import draw_per_class
from mimetic.engine.errors import SettingError
from mimetic.finetune.recipe import LabelSettings

LOOK = 100  # pairs of images that are compared


def draw_apart(training: Index, labels: LabelSettings, held_out: Index, held_out_labels: LabelSettings) -> list[NDArray[np.int64]]:
    """Sample numbers of the training index and of the held-out one.

    Raises:
        SettingError: a draw asks for more than there is, or both hold an image of the same index.
    """
    drawn = [
        np.arange(len(index)) if asked.per_class is None else draw_per_class(index, asked.per_class, asked.seed, skip=asked.skip)
        for index, asked in ((training, labels), (held_out, held_out_labels))
    ]
    same = training.fingerprint == held_out.fingerprint
    if np.intersect1d(drawn[0], drawn[1]).size if same else _share_images(training, drawn[0], held_out, drawn[1]):
        raise SettingError("evaluation would be on images that are trained on; give evaluation.index other images, or disjoint draws "
                           "from one index (labels.per_class, labels.skip) of the same seed")  # fmt: skip
    return drawn


def _share_images(training: Index, drawn: NDArray[np.int64], held_out: Index, held_out_drawn: NDArray[np.int64]) -> bool:
    """Whether the same images have been packed twice: most of those that agree in key and size agree in their bytes too.

    Keys alone tell nothing, since idx files have none but numbers.
    """
    tables = [(index, samples, index.key_table(samples)) for index, samples in ((training, drawn), (held_out, held_out_drawn))]
    width = max(keys.itemsize for _, _, keys in tables)
    ours, theirs = (np.rec.fromarrays([keys.astype(f"S{width}"), index.rows["size"][samples]]) for index, samples, keys in tables)
    _, here, there = np.intersect1d(ours, theirs, return_indices=True)
    looked_at = range(0, len(here), max(1, len(here) // LOOK))
    same = sum(training.read(drawn[here[i]]) == held_out.read(held_out_drawn[there[i]]) for i in looked_at)
    return same > len(looked_at) / 2
