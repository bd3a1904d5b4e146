"""Which images are trained on and which are measured on: drawn by seed, and never the same."""

import numpy as np
from numpy.typing import NDArray

from mimetic.data.index import Index, draw_per_class
from mimetic.engine.errors import SettingError
from mimetic.finetune.recipe import LabelSettings


def draw_apart(training: Index, labels: LabelSettings, held_out: Index, held_out_labels: LabelSettings) -> list[NDArray[np.int64]]:
    """Sample numbers of the training index and of the held-out one.

    Raises:
        SettingError: a draw asks for more than there is, or both hold an image of the same index.
    """
    drawn = [
        np.arange(len(index)) if asked.per_class is None else draw_per_class(index, asked.per_class, asked.seed, skip=asked.skip)
        for index, asked in ((training, labels), (held_out, held_out_labels))
    ]
    if training.fingerprint == held_out.fingerprint and np.intersect1d(drawn[0], drawn[1]).size:
        raise SettingError("evaluation would be on images that are trained on; give evaluation.index another index, or disjoint draws "
                           "(labels.per_class, labels.skip) of the same seed")  # fmt: skip
    return drawn
