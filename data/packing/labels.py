"""Labels that are written as text: numbers where all are numbers, else class names."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mimetic.data.index import UNLABELLED
from mimetic.engine.errors import DataError

MOST_CLASSES = 1_000_000  # a number beyond is somebody's identifier


def number_labels(texts: Sequence[str | None], where: str) -> tuple[NDArray[np.int32], list[str]]:
    """Label numbers (-1 for None and "", and for negative numbers), and the names of the classes in their order.

    Args:
        texts: one a sample.
        where: they are from, for the error.

    Raises:
        DataError: numbers that cannot be those of classes.
    """
    distinct = {text for text in texts if text}
    if not distinct:
        return np.full(len(texts), UNLABELLED, np.int32), []
    if all(len(text) < 20 and text.removeprefix("-").isdecimal() for text in distinct):
        largest = max(int(text) for text in distinct)
        if largest >= MOST_CLASSES:
            raise DataError(f"{where}: label {largest} is beyond {MOST_CLASSES:,} classes; give names or smaller numbers")
        numbers = {text: max(int(text), UNLABELLED) for text in distinct}
        classes = [str(number) for number in range(largest + 1)]
    else:
        classes = sorted(distinct)
        numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[text] if text else UNLABELLED for text in texts], np.int32), classes
