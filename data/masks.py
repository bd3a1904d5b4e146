"""Which cells of the token grid are hidden from the encoder.

Legend: B batch, P Q token grid, K hidden cells per image. True = hidden.
"""

import math
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mimetic.data.randomness import uniform
from mimetic.engine.errors import SettingError

ATTEMPTS = 10  # tries to place one block, as in BEiT's masking_generator.py


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
    ever empty. Array code over the whole batch: each iteration is one try for every image that still needs cells.

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

    def sample(self, seeds_B: NDArray[np.uint64]) -> torch.Tensor:
        """`hidden_BPQ`, bool: each image's mask is a pure function of its own seed."""
        return torch.from_numpy(_filled(self.blocks(seeds_B), self.count, seeds_B))

    def blocks(self, seeds_B: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """The published algorithm alone: at most K hidden cells each."""
        rows, columns = self.grid
        hidden_BPQ = np.zeros((len(seeds_B), rows, columns), dtype=bool)
        failures_B = np.zeros(len(seeds_B), dtype=int)
        y, x = np.arange(rows)[None, :, None], np.arange(columns)[None, None, :]
        turn = 0
        while (active_B := (failures_B < ATTEMPTS) & (hidden_BPQ.sum((1, 2)) < self.count)).any():
            top, left, height, width = self._rectangles(seeds_B, turn, self.count - hidden_BPQ.sum((1, 2)))
            inside_BPQ = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
            new_B = (inside_BPQ & ~hidden_BPQ).sum((1, 2))
            fits_B = (height < rows)[:, 0, 0] & (width < columns)[:, 0, 0]
            accept_B = active_B & fits_B & (new_B > 0) & (new_B <= self.count - hidden_BPQ.sum((1, 2)))
            hidden_BPQ |= inside_BPQ & accept_B[:, None, None]
            failures_B = np.where(accept_B, 0, failures_B + 1)
            turn += 1
        return hidden_BPQ

    def _rectangles(self, seeds_B: NDArray[np.uint64], turn: int, remaining_B: NDArray[np.int_]) -> tuple[NDArray, ...]:
        """Top, left, height and width of one candidate per image, each of shape (B, 1, 1)."""
        area_u, aspect_u, top_u, left_u = uniform(seeds_B, 1, turn, np.arange(4)[:, None])
        area_B = self.min_block + area_u * (remaining_B - self.min_block)  # below min_block when fewer remain, as published
        aspect_B = np.exp((2 * aspect_u - 1) * -math.log(self.aspect))
        height_B, width_B = np.round(np.sqrt(area_B * aspect_B)), np.round(np.sqrt(area_B / aspect_B))
        # randint(0, side - block), both ends included, as published
        top_B = np.floor(top_u * (self.grid[0] - height_B + 1))
        left_B = np.floor(left_u * (self.grid[1] - width_B + 1))
        return tuple(value[:, None, None] for value in (top_B, left_B, height_B, width_B))


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


def _filled(hidden_BPQ: NDArray[np.bool_], count: int, seeds_B: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Hides more cells, drawn evenly among the visible ones, until each image has `count`."""
    missing_B = count - hidden_BPQ.sum((1, 2))
    priority_BN = uniform(seeds_B[:, None], 2, np.arange(hidden_BPQ[0].size)[None])
    priority_BN[hidden_BPQ.reshape(len(seeds_B), -1)] = 2.0  # hidden already: last in line
    rank_BN = priority_BN.argsort(1).argsort(1)
    return hidden_BPQ | (rank_BN < missing_B[:, None]).reshape(hidden_BPQ.shape)
