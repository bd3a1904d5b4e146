"""Which cells of the token grid are hidden from the encoder.

Legend: B batch, P Q token grid, K hidden cells per image. True = hidden.
"""

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mimetic.data.randomness import GOLDEN, mix
from mimetic.engine.errors import SettingError

ATTEMPTS = 10  # tries to place one block, as in BEiT's masking_generator.py
WORD = 16  # columns held by one word of bits
LAST = np.uint64(2**64 - 1)


class MaskGenerator(Protocol):
    """`sample(seeds_B) -> hidden_BPQ`: exactly `count` hidden cells each, a pure function of each sample's seed."""

    count: int

    def sample(self, seeds_B: NDArray[np.uint64]) -> torch.Tensor:
        """`hidden_BPQ`, bool."""
        ...


class RandomMasks:
    """Hides `count` cells drawn evenly, as SimMIM (2111.09886) and MAE (2111.06377) do.

    Args:
        grid: (P, Q) cells.
        count: K, hidden cells per image.

    Raises:
        SettingError: K does not fit the grid.
    """

    def __init__(self, grid: tuple[int, int], count: int) -> None:
        _check_count(grid, count)
        self.grid, self.count = grid, count

    def sample(self, seeds_B: NDArray[np.uint64]) -> torch.Tensor:
        """`hidden_BPQ`, bool."""
        return torch.from_numpy(_filled(np.zeros((len(seeds_B), *self.grid), dtype=bool), self.count, seeds_B))


class BlockMasks:
    """BEiT's blockwise masking (2106.08254, algorithm 1), then filled up to exactly `count` hidden cells.

    The published algorithm stops when ten tries in a row add nothing, below its target in a third of the draws at 14x14 and
    far below it on small grids; the missing cells are then drawn evenly, so that every image has the same K and no mask is
    ever empty.

    Array code over the whole batch. A try that fails changes nothing, so the ten tries of a block are made at once and the
    first that succeeds is taken: one round per block. A row of the grid is held as the bits of a few words.

    Args:
        grid: (P, Q) cells.
        count: K, hidden cells per image.
        min_block: cells of the smallest block.
        aspect: lowest aspect ratio of a block; the highest is its inverse.

    Raises:
        SettingError: K or the block does not fit the grid.
    """

    def __init__(self, grid: tuple[int, int], count: int, min_block: int = 16, aspect: float = 0.3) -> None:
        _check_count(grid, count)
        if not 0 < min_block <= count:
            raise SettingError(f"mask.min_block is {min_block}, but mask.count is {count}; a block has 1 to {count} cells")
        if not 0 < aspect <= 1:
            raise SettingError(f"mask.aspect is {aspect}; it is the lowest aspect ratio, in (0, 1]")
        self.grid, self.count, self.min_block, self.aspect = grid, count, min_block, aspect
        self._rows, self._columns = _row_bits(grid[0]), _column_bits(grid[1])
        self._sides_211 = np.array(grid).reshape(2, 1, 1)
        self._log_aspect_211 = np.array([-1, 1]).reshape(2, 1, 1) * math.log(aspect)

    def sample(self, seeds_B: NDArray[np.uint64]) -> torch.Tensor:
        """`hidden_BPQ`, bool: each image's mask is a pure function of its own seed."""
        return torch.from_numpy(_filled(self.blocks(seeds_B), self.count, seeds_B))

    def blocks(self, seeds_B: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """The published algorithm alone: at most K hidden cells each."""
        shape_BPW = len(seeds_B), self._rows.shape[1], self._columns.shape[1]
        bits_BN = np.zeros((len(seeds_B), shape_BPW[1] * shape_BPW[2] // 4), dtype=np.uint64)
        for _ in self.place(seeds_B, bits_BN):
            pass
        words_BPW = bits_BN.view(np.uint16).reshape(shape_BPW)
        cells = words_BPW[:, : self.grid[0], :, None] >> np.arange(WORD, dtype=np.uint16) & np.uint16(1)
        return cells.reshape(len(seeds_B), self.grid[0], -1)[..., : self.grid[1]].astype(bool)

    def place(self, seeds_B: NDArray[np.uint64], bits_BN: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int_], NDArray[np.int_]]]:
        """Sets the bits of one block after another, and yields whose they are, (M,), and their heights and widths, (M, 2)."""
        streams_B, missing_B = mix(seeds_B, 1), np.full(len(seeds_B), self.count)
        active, tries = np.arange(len(seeds_B)), np.arange(ATTEMPTS, dtype=np.uint64)
        while len(active):
            missing_A1 = missing_B[active, None]
            corner_2AT, size_2AT = self._rectangles(mix(streams_B[active, None] + GOLDEN * tries), missing_A1)
            block_ATN = self._bits(corner_2AT, corner_2AT + size_2AT)
            new_AT = np.bitwise_count(block_ATN & ~bits_BN[active, None]).sum(2, dtype=np.int64)
            fits_AT = (size_2AT[0] < self.grid[0]) & (size_2AT[1] < self.grid[1])
            accept_AT = fits_AT & (new_AT > 0) & (new_AT <= missing_A1)
            taken = np.nonzero(accept_AT & (accept_AT.cumsum(1) == 1))  # the first of each row
            active = active[taken[0]]
            bits_BN[active] |= block_ATN[taken]
            missing_B[active] -= new_AT[taken]
            yield active, size_2AT.transpose(1, 2, 0)[taken]
            active = active[missing_B[active] > 0]
            tries += np.uint64(ATTEMPTS)

    def _rectangles(self, draws_BT: NDArray[np.uint64], missing_B1: NDArray[np.int_]) -> tuple[NDArray[np.int_], NDArray[np.int_]]:
        """Corners (top, left) and sizes (height, width) of candidates (2, B, T), each from four times 16 bits of its draw."""
        draws_4BT = draws_BT.view(np.uint16).reshape(*draws_BT.shape, 4).transpose(2, 0, 1) * 2.0**-16
        area_BT = self.min_block + draws_4BT[0] * (missing_B1 - self.min_block)  # below min_block when fewer remain, as published
        # the aspect ratio is log-even in [aspect, 1 / aspect]; height has its root as a factor, width as a divisor
        size_2BT = np.rint(np.sqrt(area_BT) * np.exp((draws_4BT[1] - 0.5) * self._log_aspect_211))
        # randint(0, side - block), both ends included, as published; a block without that room will be refused
        corner_2BT = draws_4BT[2:] * (self._sides_211 - size_2BT + 1)
        return corner_2BT.astype(np.int64), size_2BT.astype(np.int64)

    def _bits(self, corner_2BT: NDArray[np.int_], end_2BT: NDArray[np.int_]) -> NDArray[np.uint64]:
        """(B, T, N) words that hold the cells of a block each, row by row."""
        rows_BTP = self._rows.take(corner_2BT[0], 0, mode="clip") ^ self._rows.take(end_2BT[0], 0, mode="clip")
        columns_BTW = self._columns.take(corner_2BT[1], 0, mode="clip") ^ self._columns.take(end_2BT[1], 0, mode="clip")
        block_BTPW = rows_BTP[..., None] & columns_BTW[:, :, None]
        return block_BTPW.reshape(*block_BTPW.shape[:2], -1).view(np.uint64)


class UnitMasks:
    """Masks made of square units of several cells: Swin's are of 32 pixels, where cells have 16 (SimMIM, arXiv:2111.09886).

    Args:
        coarse: makes masks on the grid of units.
        unit: cells of a unit's side.
    """

    def __init__(self, coarse: MaskGenerator, unit: int) -> None:
        self.coarse, self.unit, self.count = coarse, unit, coarse.count * unit * unit

    def sample(self, seeds_B: NDArray[np.uint64]) -> torch.Tensor:
        """`hidden_BPQ`, bool."""
        return self.coarse.sample(seeds_B).repeat_interleave(self.unit, 1).repeat_interleave(self.unit, 2)


def mask_generator(grid: tuple[int, int], count: int, *, kind: str = "block", min_block: int = 16, aspect: float = 0.3,
                   unit: int = 1) -> MaskGenerator:  # fmt: skip
    """The generator of a recipe.

    Args:
        grid: (P, Q) cells.
        count: K, hidden cells per image.
        kind: "block" as BEiT, or "random".
        min_block: cells of the smallest block.
        aspect: lowest aspect ratio of a block; the highest is its inverse.
        unit: cells of the side of the squares that are hidden as one.

    Raises:
        SettingError: K, block or unit do not fit the grid.
    """
    area = unit * unit
    _check_count(grid, count)
    if grid[0] % unit or grid[1] % unit:
        raise SettingError(f"mask.unit is {unit} cells, which does not divide the {grid[0]}x{grid[1]} grid; give a divisor of its sides")
    if count % area:
        near = " or ".join(str(k) for k in (count // area * area, (count // area + 1) * area) if 0 < k <= grid[0] * grid[1])
        raise SettingError(f"mask.count is {count}, no multiple of the {area} cells of a unit (mask.unit {unit}); use {near}")
    if kind == "block" and min_block > count:
        raise SettingError(f"mask.min_block is {min_block}, but mask.count is {count}; a block has 1 to {count} cells")
    units = grid[0] // unit, grid[1] // unit
    coarse: MaskGenerator = RandomMasks(units, count // area)
    if kind == "block":
        coarse = BlockMasks(units, count // area, -(-min_block // area), aspect)
    return coarse if unit == 1 else UnitMasks(coarse, unit)


def _check_count(grid: tuple[int, int], count: int) -> None:
    cells = grid[0] * grid[1]
    if not 0 < count <= cells:
        raise SettingError(f"mask.count is {count}, but the {grid[0]}x{grid[1]} grid has {cells} cells; hide 1 to {cells}")


def _row_bits(rows: int) -> NDArray[np.uint16]:
    """(rows + 1, P): all bits of the rows above each; P is a multiple of 4, so that words of 64 bits can be looked at."""
    above = np.arange(-(-rows // 4) * 4) < np.arange(rows + 1)[:, None]
    return np.where(above, 2**WORD - 1, 0).astype(np.uint16)


def _column_bits(columns: int) -> NDArray[np.uint16]:
    """(columns + 1, W): one bit for every column left of each."""
    left = np.arange(columns + 1)[:, None] - WORD * np.arange(-(-columns // WORD))
    return (2 ** left.clip(0, WORD) - 1).astype(np.uint16)


def _filled(hidden_BPQ: NDArray[np.bool_], count: int, seeds_B: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Hides more cells, drawn evenly among the visible ones, until each image has `count`."""
    hidden_BN = hidden_BPQ.reshape(len(seeds_B), -1).copy()
    missing_B = count - hidden_BN.sum(1)
    short = np.flatnonzero(missing_B)
    if len(short):
        cells = np.arange(hidden_BN.shape[1], dtype=np.uint64)
        priority_BN = mix(mix(seeds_B[short], 2)[:, None] + GOLDEN * cells)
        priority_BN[hidden_BN[short]] = LAST  # hidden already
        order_BN = priority_BN.argsort(1)[:, : missing_B.max()]
        chosen, place = np.nonzero(np.arange(order_BN.shape[1]) < missing_B[short, None])
        hidden_BN[short[chosen], order_BN[chosen, place]] = True
    return hidden_BN.reshape(hidden_BPQ.shape)
