"""Block masks against the published algorithm, run here in plain Python, and exactly K cells in every case."""

import math
import random
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mimetic.data.masks import BlockMasks, RandomMasks, mask_generator
from mimetic.data.randomness import mix, uniform
from mimetic.engine.errors import SettingError

SEEDS = mix(7, np.arange(3000))
GRIDS = [((14, 14), 75, 16), ((7, 7), 20, 4), ((8, 12), 40, 6), ((3, 10), 14, 4), ((10, 40), 150, 16)]
every_grid = pytest.mark.parametrize(("grid", "count", "min_block"), GRIDS, ids=str)
steady = settings(deadline=None, derandomize=True, max_examples=150)


def published_mask(generator: random.Random, grid: tuple[int, int], count: int, min_block: int,
                   aspect: float = 0.3) -> tuple[np.ndarray, list[tuple[int, int]]]:  # fmt: skip
    """Algorithm 1 of 2106.08254 as its authors wrote it: blocks one by one, ten tries for each; and the blocks' sizes."""
    rows, columns = grid
    mask, sizes = np.zeros(grid, dtype=bool), []
    low, high = math.log(aspect), math.log(1 / aspect)
    while (hidden := int(mask.sum())) < count:
        for _ in range(10):
            area = generator.uniform(min_block, count - hidden)
            ratio = math.exp(generator.uniform(low, high))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if width < columns and height < rows:
                top, left = generator.randint(0, rows - height), generator.randint(0, columns - width)
                block = mask[top : top + height, left : left + width]
                if 0 < height * width - int(block.sum()) <= count - hidden:
                    block[:] = True
                    sizes.append((height, width))
                    break
        else:
            break
    return mask, sizes


@cache
def published_masks(grid, count, min_block, aspect=0.3) -> list[tuple[np.ndarray, list[tuple[int, int]]]]:
    generator = random.Random(11)
    return [published_mask(generator, grid, count, min_block, aspect) for _ in range(len(SEEDS))]


def placed(grid, count, min_block) -> list[list[tuple[int, int]]]:
    """The sizes of the blocks of each of our masks, in their order."""
    masks, sizes = BlockMasks(grid, count, min_block), [[] for _ in SEEDS]
    bits = np.zeros((len(SEEDS), -(-grid[0] // 4) * -(-grid[1] // 16)), dtype=np.uint64)
    for images, blocks in masks.place(SEEDS, bits):
        for image, block in zip(images, blocks.tolist(), strict=True):
            sizes[image].append(tuple(block))
    return sizes


def as_frequent(ours: list, theirs: list) -> float:
    """The p-value of a chi-square test that both come from one distribution; values seen less than ten times count as one."""
    tallies = Counter(ours), Counter(theirs)
    common = [value for value in sorted({*ours, *theirs}) if sum(tally[value] for tally in tallies) >= 10]
    table = np.array([[tally[value] for value in common] for tally in tallies])
    rest = np.array([len(ours), len(theirs)])[:, None] - table.sum(1, keepdims=True)
    table = np.hstack([table, rest]) if rest.any() else table
    return stats.chi2_contingency(table).pvalue if table.shape[1] > 1 else 1.0


def block_p_values(ours: list[list[tuple[int, int]]], theirs: list[list[tuple[int, int]]]) -> dict[str, float]:
    """How well the numbers of blocks, and shapes and areas of first and of later blocks agree.

    Blocks of one mask depend on each other, so that each test takes one block of a mask.
    """
    values = {"blocks": as_frequent([len(s) for s in ours], [len(s) for s in theirs])}
    for place in (0, 1, 2):
        mine, published = ([sizes[place] for sizes in masks if len(sizes) > place] for masks in (ours, theirs))
        if min(len(mine), len(published)) >= 500:
            values[f"shape of block {place}"] = as_frequent(mine, published)
            values[f"area of block {place}"] = as_frequent([h * w for h, w in mine], [h * w for h, w in published])
            values[f"aspect of block {place}"] = stats.ks_2samp(*([h / w for h, w in s] for s in (mine, published)), method="asymp").pvalue
    return values


@every_grid
def test_the_blocks_themselves_are_the_published_ones(grid, count, min_block):
    theirs = [sizes for _, sizes in published_masks(grid, count, min_block)]
    values = block_p_values(placed(grid, count, min_block), theirs)
    assert len(values) >= 4
    assert min(values.values()) > 0.001, values


@pytest.mark.parametrize("change", [{"aspect": 0.35}, {"min_block": 14}, {"count": 73}], ids=str)
def test_these_tests_notice_a_slightly_different_algorithm(change):
    setting = {"grid": (14, 14), "count": 75, "min_block": 16}
    theirs = [sizes for _, sizes in published_masks(**setting | change)]
    assert min(block_p_values(placed(**setting), theirs).values()) < 1e-5


def test_cells_are_hidden_as_often_as_published_and_another_range_of_aspects_is_noticed():
    ours = BlockMasks((14, 14), 75, 16).blocks(SEEDS)
    for aspect, same in ((0.3, True), (0.9, False)):
        theirs = np.stack([mask for mask, _ in published_masks((14, 14), 75, 16, aspect)])
        assert (cell_p_value(ours, theirs) > 0.001) == same


def cell_p_value(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of Hotelling's test that each row and column is hidden as often; cells of a mask depend on each other."""
    halves = [np.hstack([masks.mean(2), masks.mean(1)[:, :-1]]) for masks in (ours, theirs)]  # rows fix the last column
    difference = halves[0].mean(0) - halves[1].mean(0)
    spread = sum(np.cov(half.T) / len(half) for half in halves)
    return float(stats.chi2.sf(difference @ np.linalg.solve(spread, difference), len(difference)))


@every_grid
def test_blocks_are_distributed_as_the_published_algorithm_has_it(grid, count, min_block):
    ours = BlockMasks(grid, count, min_block).blocks(SEEDS)
    theirs = np.stack([mask for mask, _ in published_masks(grid, count, min_block)])
    assert as_frequent(ours.sum((1, 2)).tolist(), theirs.sum((1, 2)).tolist()) > 0.001
    for statistic in (edges, largest_row, corner):
        assert stats.ks_2samp(statistic(ours), statistic(theirs), method="asymp").pvalue > 0.001
    shares = ours.mean(0), theirs.mean(0)
    error = np.sqrt(sum(share * (1 - share) for share in shares) / len(SEEDS))
    assert (np.abs(shares[0] - shares[1]) < 4.5 * error).all()


def edges(masks: np.ndarray) -> np.ndarray:
    """Borders between hidden and visible cells: few for blocks, many for scattered cells."""
    return np.diff(masks, axis=1).sum((1, 2)) + np.diff(masks, axis=2).sum((1, 2))


def largest_row(masks: np.ndarray) -> np.ndarray:
    return masks.sum(2).max(1)


def corner(masks: np.ndarray) -> np.ndarray:
    return masks[:, : masks.shape[1] // 2, : masks.shape[2] // 2].sum((1, 2))


def test_about_two_thirds_of_published_masks_are_full_at_14x14():
    full = (BlockMasks((14, 14), 75, 16).blocks(SEEDS).sum((1, 2)) == 75).mean()
    assert abs(full - 0.666) < 0.03  # of 20,000 masks of the published algorithm, 66.6 %


@st.composite
def settings_that_fit(draw) -> tuple[tuple[int, int], int, int, float]:
    grid = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    count = draw(st.integers(1, grid[0] * grid[1]))
    return grid, count, draw(st.integers(1, count)), draw(st.floats(0.05, 1))


@steady
@given(settings_that_fit(), st.integers(0, 2**63))
def test_every_mask_has_exactly_k_cells_and_holds_the_blocks(setting, seed):
    masks, seeds = BlockMasks(*setting), mix(seed, np.arange(8))
    hidden = masks.sample(seeds)
    assert hidden.dtype == torch.bool
    assert hidden.shape == (8, *setting[0])
    assert (hidden.sum((1, 2)) == setting[1]).all()
    assert (hidden.numpy() | masks.blocks(seeds) == hidden.numpy()).all()


@every_grid
def test_a_mask_is_a_function_of_its_own_seed(grid, count, min_block):
    masks = BlockMasks(grid, count, min_block)
    together = masks.sample(SEEDS[:60])
    alone = torch.cat([masks.sample(SEEDS[i : i + 1]) for i in range(60)])
    shuffled = masks.sample(SEEDS[59::-1])
    assert torch.equal(together, alone)
    assert torch.equal(together, shuffled.flip(0))
    assert len({mask.numpy().tobytes() for mask in together}) > 55


def test_missing_cells_are_filled_in_evenly():
    masks = BlockMasks((4, 4), 12, 12)  # a block of 12 hardly fits, so that most masks are all filling
    empty = masks.blocks(SEEDS).sum((1, 2)) == 0
    assert empty.sum() > 100
    cells = masks.sample(SEEDS).numpy()[empty].sum(0)
    expected = empty.sum() * 12 / 16
    assert (np.abs(cells - expected) < 4.5 * np.sqrt(expected / 4)).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (((4, 4), 17, 4), "mask.count is 17, but the 4x4 grid has 16 cells"),
        (((4, 4), 0, 1), "mask.count is 0, but the 4x4 grid has 16 cells"),
        (((4, 4), 6, 16), "mask.min_block is 16, but mask.count is 6"),
        (((4, 4), 6, 0), "mask.min_block is 0, but mask.count is 6"),
        (((4, 4), 6, 4, 0.0), "mask.aspect is 0.0"),
        (((4, 4), 6, 4, 1.5), "mask.aspect is 1.5"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_with_both_numbers(setting, message):
    with pytest.raises(SettingError, match=message):
        BlockMasks(*setting)


# The random numbers underneath


def test_draws_are_uniform_and_independent_of_each_other():
    draws = uniform(mix(3, 0, np.arange(20000))[:, None], 5, np.arange(4))
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 0.001
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < 0.03  # neighbours in the index


def test_a_hash_depends_on_every_word_and_on_their_order():
    hashes = {int(mix(a, b, c)) for a in range(12) for b in range(12) for c in range(12)}
    assert len(hashes) == 12**3
    assert mix(1, np.arange(3)).tolist() == [int(mix(1, i)) for i in range(3)]
    assert int(mix(-1, 2**63)) == int(mix(2**64 - 1, 2**63))


def test_the_hash_is_splitmix64():
    """First outputs of the reference generator seeded with 1234567 (Vigna's splitmix64.c)."""
    state, golden = 1234567, 0x9E3779B97F4A7C15
    first = [int(mix((state + i * golden) % 2**64)) for i in range(3)]
    assert first == [6457827717110365317, 3203168211198807973, 9817491932198370423]


# Units of several cells


@pytest.mark.parametrize(("kind", "unit", "count"), [("random", 2, 116), ("block", 2, 76), ("random", 7, 49), ("random", 1, 29)])
def test_units_are_hidden_whole(kind, unit, count):
    masks = mask_generator((14, 14), count, kind=kind, unit=unit)
    hidden_BPQ = masks.sample(SEEDS[:200])
    assert masks.count == count
    assert (hidden_BPQ.sum((1, 2)) == count).all()
    units = hidden_BPQ.view(200, 14 // unit, unit, 14 // unit, unit)
    assert torch.equal(units.float().mean((2, 4)), units.any(4).any(2).float()), "all cells of a unit or none"
    assert torch.equal(hidden_BPQ[50:60], masks.sample(SEEDS[50:60])), "a mask is its seed's own"


def test_units_of_one_cell_are_the_plain_masks():
    assert torch.equal(mask_generator((7, 7), 20, kind="random").sample(SEEDS[:9]), RandomMasks((7, 7), 20).sample(SEEDS[:9]))
    assert torch.equal(mask_generator((7, 7), 20, min_block=4).sample(SEEDS[:9]), BlockMasks((7, 7), 20, 4).sample(SEEDS[:9]))


@pytest.mark.parametrize(
    ("count", "unit", "words"),
    [
        (117, 2, r"mask\.count is 117, no multiple of the 4 cells of a unit \(mask\.unit 2\); use 116 or 120"),
        (120, 4, r"mask\.unit is 4 cells, which does not divide the 14x14 grid"),
        (200, 2, r"mask\.count is 200, but the 14x14 grid has 196 cells"),
    ],
)
def test_units_that_do_not_fit_are_refused(count, unit, words):
    with pytest.raises(SettingError, match=words):
        mask_generator((14, 14), count, unit=unit)
