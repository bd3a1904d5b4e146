"""Colour jitter: torchvision's adjustments, in whole numbers of 16 bits and in the order in which decoders leave pixels.

Every step is clamped to 0...255 and cut off to a whole number, as torchvision does with uint8 tensors; factors are rounded to
1/256 (1/128 beyond a half), so that each step is within a grey level of torchvision's. Floats are adjusted as torchvision does.

Legend: C channels, H W pixels, N numbers in a line (colours of neighbouring pixels, one after the other).
"""

import numpy as np
import torch
from numpy.typing import NDArray

Numbers = NDArray[np.int16]

BRIGHTNESS, CONTRAST, SATURATION = range(3)  # places of the factors
BLACK, WHITE = np.int16(0), np.int16(255)
GREY = np.array((77, 150, 29), dtype=np.uint16)  # / 256: what red, green and blue weigh in grey (ITU-R BT.601)
PIECE = 3 * 2**15  # numbers worked on at a time: they and what is made of them stay in a core's cache
LINE = 3 * 2**8  # numbers added up side by side
_WEIGHTS = np.tile(GREY, PIECE // 3)
_RED_ONLY = np.tile(np.array((1, 0, 0), dtype=np.uint16), PIECE // 3)


def jittered(image_CHW: torch.Tensor, factors: NDArray[np.float64], order: NDArray[np.int_]) -> torch.Tensor:
    """(C, H, W), adjusted in the order given by factors of brightness, contrast and saturation, each in [0, 2].

    Images are uint8, or float32 in [0, 1]. Grey images have no saturation, and other than one or three channels no colour that could
    be adjusted.
    """
    channels, height, width = image_CHW.shape
    if channels not in (1, 3):
        return image_CHW
    steps = [int(step) for step in order if channels == 3 or step != SATURATION]
    if image_CHW.is_floating_point():
        return _adjust_floats(image_CHW, steps, factors)
    values_N = image_CHW.permute(1, 2, 0).numpy().copy(order="C").reshape(-1)
    cut = steps.index(CONTRAST) if CONTRAST in steps else len(steps)
    for some in (steps[:cut], steps[cut:]):  # contrast has to see all numbers before it changes one
        if some:
            _adjust(values_N, some, factors, channels)
    return torch.from_numpy(values_N.reshape(height, width, channels)).permute(2, 0, 1)


def _adjust(values_N: NDArray[np.uint8], steps: list[int], factors: NDArray[np.float64], channels: int) -> None:
    """Takes the steps piece by piece, in place."""
    room = np.empty((3, min(PIECE, len(values_N))), dtype=np.int16)
    mean = _mean_grey(values_N, channels) if CONTRAST in steps else 0.0
    for start in range(0, len(values_N), PIECE):
        there = values_N[start : start + PIECE]
        piece, change, spare = room[:, : len(there)]
        piece[:] = there
        for step in steps:
            bits = 8 if abs(factors[step] - 1) < 0.5 else 7  # so that 255 times the strength fits 16 bits
            strength = round((factors[step] - 1) * 2**bits)
            if step == SATURATION:
                np.subtract(piece, _grey(piece, change, spare), out=change)
                change *= strength
            else:
                np.multiply(piece, strength, out=change)
            if step == CONTRAST:
                change -= round(mean * strength)
            change >>= bits
            piece += change
            if strength > 0:  # otherwise all values move towards grey or black
                np.clip(piece, BLACK, WHITE, out=piece)
        there[:] = piece


def _adjust_floats(image_CHW: torch.Tensor, steps: list[int], factors: NDArray[np.float64]) -> torch.Tensor:
    """Each step moves all values away from black, from the mean grey level or from each pixel's own, or towards it."""
    weights = torch.tensor(GREY / 256 if len(image_CHW) == 3 else [1.0], dtype=image_CHW.dtype)[:, None, None]
    for step in steps:
        grey_1HW = (image_CHW * weights).sum(0, keepdim=True)
        origin = {BRIGHTNESS: torch.zeros(()), CONTRAST: grey_1HW.mean(), SATURATION: grey_1HW}[step]
        image_CHW = (origin + float(factors[step]) * (image_CHW - origin)).clamp(0, 1)
    return image_CHW


def _mean_grey(values_N: NDArray[np.uint8], channels: int) -> float:
    """The mean of grey levels, which torchvision cuts off to whole numbers: all fractions are taken to be as common."""
    lines = values_N[: len(values_N) // LINE * LINE].reshape(-1, LINE)
    sums = [lines[i : i + 256].sum(0, dtype=np.uint16) for i in range(0, len(lines), 256)]  # 256 times 255 fits
    sums_C = np.sum([np.zeros(LINE, np.uint16), *sums], 0, dtype=np.int64).reshape(-1, channels).sum(0)
    rest_C = values_N[lines.size :].reshape(-1, channels).sum(0, dtype=np.int64)
    means_C = (sums_C + rest_C) / (len(values_N) // channels)
    return max(0.0, float(means_C @ GREY) / 256 - 0.5) if channels == 3 else float(means_C[0])


def _grey(piece_N: Numbers, grey_N: Numbers, spare_N: Numbers) -> Numbers:
    """Each pixel's grey level at the places of all its three colours, in the room of `grey_N`.

    Adding up neighbours gives a pixel's sum at the place of its red; the others are blanked, and the sum passed on to green and
    blue. So all steps run along the line, where a loop over pixels would take every third number.
    """
    weighted, grey = spare_N.view(np.uint16), grey_N.view(np.uint16)
    np.multiply(piece_N.view(np.uint16), _WEIGHTS[: len(piece_N)], out=weighted)
    np.add(weighted[:-1], weighted[1:], out=grey[:-1])
    grey[:-2] += weighted[2:]
    grey[-2:] = 0
    grey >>= 8
    grey *= _RED_ONLY[: len(piece_N)]
    weighted[0] = grey[0]
    np.add(grey[1:], grey[:-1], out=weighted[1:])
    np.add(weighted[2:], grey[:-2], out=grey[2:])
    grey[:2] = weighted[:2]
    return grey_N
