"""The order of samples and its cutting into batches, without images: held against a plain computation of the whole epoch."""

import copy

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mimetic.data.batches import BatchPlan
from mimetic.data.order import CYCLE, Chosen, InOrder, Mixed, Order, Shuffled, shares
from mimetic.data.randomness import mix

sizes = st.lists(st.integers(0, 20) | st.just(1) | st.just(0), min_size=1, max_size=8).filter(any)
seeds = st.integers(0, 2**40)
epochs = st.integers(0, 3)
streams = st.integers(1, 9)
blocks = st.integers(1, 30)
worlds = st.integers(1, 8)
batch_sizes = st.integers(1, 7)
tails = st.sampled_from(["pad", "drop"])


def whole_epoch(sizes: list[int], seed: int, epoch: int, streams: int, block: int) -> list[int]:
    """All samples of an epoch, by the words of `Shuffled`'s docstring and nothing clever."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shards = sorted(range(len(sizes)), key=lambda shard: int(mix(seed, epoch, 0, shard)))
    line = [sample for shard in shards for sample in range(starts[shard], starts[shard + 1])]
    parts, begin = [], 0
    for part in range(streams):
        length = len(line) // streams + (part < len(line) % streams)
        places = list(range(begin, begin + length))[:: -1 if part % 2 else 1]
        cut = [places[i : i + block] for i in range(0, length, block)]
        parts.append([line[place] for piece in cut for place in sorted(piece, key=lambda place: int(mix(seed, epoch, 1, place)))])
        begin += length
    return [part[turn] for turn in range(len(parts[0])) for part in parts if turn < len(part)]


@st.composite
def orders(draw) -> Order:
    """Any order: in sequence, shuffled, of some samples only, mixed."""

    def one() -> Order:
        shards = np.array(draw(sizes))
        kind = draw(st.sampled_from(["in order", "shuffled", "chosen"]))
        if kind == "in order":
            return InOrder(int(shards.sum()), np.flatnonzero(shards))
        shuffled = Shuffled(shards, draw(seeds), streams=draw(streams), block=draw(blocks))
        return shuffled if kind == "shuffled" else Chosen(np.arange(shuffled.samples) * 3, shuffled)

    if draw(st.booleans()):
        return one()
    parts = [one() for _ in range(draw(st.integers(1, 3)))]
    offsets = np.cumsum([0, *(3 * part.samples for part in parts[:-1])]).tolist()
    weights = draw(st.lists(st.floats(0.05, 10), min_size=len(parts), max_size=len(parts)))
    return Mixed(parts, offsets, weights, draw(seeds), draw(st.integers(1, 90)))


def rows(plan: BatchPlan, step: int) -> list[tuple[int, int, bool]]:
    return [(int(sample), int(epoch), bool(valid)) for sample, epoch, valid in zip(*plan.batch(step), strict=True)]


# One epoch


@settings(max_examples=300)
@given(sizes, seeds, epochs, streams, blocks)
def test_any_place_is_drawn_as_the_whole_epoch_has_it(sizes, seed, epoch, streams, block):
    expected = whole_epoch(sizes, seed, epoch, streams, block)
    assert sorted(expected) == list(range(sum(sizes)))
    order = Shuffled(np.array(sizes), seed, streams=streams, block=block)
    places = epoch * order.samples + np.random.default_rng(seed).permutation(order.samples)
    drawn, epochs = order.draw(places)
    assert drawn.tolist() == [expected[place % order.samples] for place in places]
    assert set(epochs.tolist()) == {epoch}
    assert order.streams_of(places).tolist() == [place % order.samples % streams for place in places]


@given(sizes, seeds, streams, blocks)
def test_a_stream_reads_a_stretch_of_the_line_of_shards(sizes, seed, streams, block):
    """So a machine that reads some streams needs their shards alone."""
    order = Shuffled(np.array(sizes), seed, streams=streams, block=block)
    places = np.arange(order.samples)
    line = np.concatenate([np.arange(order.starts[shard], order.starts[shard + 1]) for shard in order_of_shards(sizes, seed)])
    stream_of = dict(zip(order.draw(places)[0].tolist(), order.streams_of(places).tolist(), strict=True))
    along = [stream_of[sample] for sample in line.tolist()]
    assert along == sorted(along)
    counts = np.bincount(along, minlength=streams)
    assert counts.max() - counts.min() <= 1


def order_of_shards(sizes: list[int], seed: int) -> list[int]:
    return sorted(range(len(sizes)), key=lambda shard: int(mix(seed, 0, 0, shard)))


def distinct(labels: np.ndarray, batch: int) -> float:
    """Mean number of labels in a batch."""
    batches = labels[: len(labels) // batch * batch].reshape(-1, batch)
    return float(np.mean([len(np.unique(row)) for row in batches]))


def epoch_of(sizes: np.ndarray, epoch: int, **options: int) -> np.ndarray:
    order = Shuffled(sizes, 3, **options)
    return order.draw(epoch * order.samples + np.arange(order.samples))[0]


def test_shards_of_one_class_each_are_mixed_within_batches():
    sizes = np.full(10, 600)
    labels = np.repeat(np.arange(10), sizes)
    mixed = labels[epoch_of(sizes, 0)]
    by_chance = np.random.default_rng(0).permutation(labels)
    assert distinct(labels, 64) < 1.5
    assert distinct(mixed, 64) > 0.95 * distinct(by_chance, 64)
    assert abs(np.corrcoef(np.arange(6000), mixed)[0, 1]) < 0.05


def test_many_shards_of_one_class_each_are_mixed_by_streams_and_blocks():
    sizes = np.full(256, 1024)
    first, second = epoch_of(sizes, 0), epoch_of(sizes, 1)
    assert distinct(first // 1024, 256) > 45  # 8 streams, each of about 8 shards at a time; evenly drawn would be 162
    assert distinct(epoch_of(sizes, 0, streams=64) // 1024, 256) > 140
    place, place_again = np.argsort(first), np.argsort(second)
    assert abs(np.corrcoef(place, place_again)[0, 1]) < 0.1
    assert 0.28 < np.abs(place - place_again).mean() / len(first) < 0.38  # a third by chance


@given(st.lists(st.integers(5, 20), min_size=2, max_size=8), seeds, st.integers(2, 4))
def test_a_shard_is_read_in_one_go_wherever_the_line_is_cut(sizes, seed, streams):
    """Two streams that share a shard read it at the same time, so a small cache need not fetch it twice."""
    order = Shuffled(np.array(sizes), seed, streams=streams, block=1)
    turn_of = np.argsort(order.draw(np.arange(order.samples))[0]) // streams
    for begin, size in zip(order.starts, sizes, strict=False):
        assert (np.diff(np.unique(turn_of[begin : begin + size])) <= 1).all()


# Batches


@settings(max_examples=300)
@given(orders(), worlds, batch_sizes, tails, epochs)
def test_every_sample_comes_once_an_epoch_and_every_rank_has_as_many_steps(order, world, batch_size, tail, epoch):
    assume(tail == "pad" or batch_size * world <= order.samples)
    plans = [BatchPlan(order, batch_size, rank, world, tail) for rank in range(world)]
    (steps,) = {plan.steps for plan in plans}
    assert steps == (-(-order.samples // (batch_size * world)) if tail == "pad" else order.samples // (batch_size * world))
    met = [rows(plan, epoch * steps + step) for step in range(steps) for plan in plans]
    valid = [(sample, own_epoch) for batch in met for sample, own_epoch, is_valid in batch if is_valid]
    fillers = sum(len(batch) for batch in met) - len(valid)
    assert fillers == (steps * batch_size * world - order.samples if tail == "pad" else 0)
    expected = list(zip(*(values.tolist() for values in order.draw(epoch * order.samples + np.arange(order.samples))), strict=True))
    assert sorted(valid) == sorted(expected if tail == "pad" else expected[: len(valid)])
    if not isinstance(order, Mixed):
        assert len(set(valid)) == len(valid)


@settings(max_examples=300)
@given(orders(), batch_sizes, worlds, tails, st.data())
def test_global_batches_do_not_depend_on_ranks_workers_or_where_reading_began(order, batch_size, world, tail, data):
    global_batch = batch_size * world
    assume(tail == "pad" or global_batch <= order.samples)
    alone = BatchPlan(copy.deepcopy(order), global_batch, 0, 1, tail)
    steps = 2 * alone.steps + 1
    expected = [rows(alone, step) for step in range(steps)]
    workers = data.draw(st.integers(0, 4), "workers")
    resumed = data.draw(st.integers(0, steps - 1), "resumed at")
    found: dict[int, list] = {}
    for worker in range(max(1, workers)):  # each has an order of its own, and meets every so many batches of it
        for rank in range(world):
            plan = BatchPlan(copy.deepcopy(order), batch_size, rank, world, tail)
            for step in range(resumed + worker, steps, max(1, workers)):
                found.setdefault(step, []).extend(rows(plan, step))
    assert [found[step] for step in range(resumed, steps)] == expected[resumed:]


@settings(max_examples=300)
@given(orders(), st.integers(1, 24), st.integers(1, 24), st.data())
def test_a_change_of_world_in_mid_epoch_loses_and_repeats_nothing(order, old, new, data):
    """Samples consumed are a prefix of the epoch whatever the global batch, if it divides them."""
    before, after = BatchPlan(order, old), BatchPlan(order, new)
    step = data.draw(st.integers(0, before.steps - 1).filter(lambda step: step * old % new == 0))
    met = [row for number in range(step) for row in rows(before, number)]
    met += [row for number in range(step * old // new, after.steps) for row in rows(after, number) if row[2]]
    assert sorted(met) == sorted((*row, True) for row in zip(*(v.tolist() for v in order.draw(np.arange(order.samples))), strict=True))


@given(st.integers(1, 6), st.integers(1, 4), seeds, st.integers(1, 5))
def test_ranks_keep_to_their_own_streams_where_the_numbers_divide(world, streams_each, seed, rows_each):
    streams = world * streams_each
    order = Shuffled(np.full(7, 40), seed, streams=streams, block=16)
    place_of = np.argsort(order.draw(np.arange(order.samples))[0])
    for rank in range(world):
        plan = BatchPlan(order, streams_each * rows_each, rank, world, "drop")
        for step in range(plan.steps):
            assert set((place_of[plan.batch(step)[0]] % streams).tolist()) == set(range(rank * streams_each, (rank + 1) * streams_each))


# Mixtures


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_shares_are_the_weights_to_within_one_place_in_a_cycle(weights):
    dealt = shares(weights)
    assert dealt.sum() == CYCLE
    assert np.abs(dealt - np.array(weights) / sum(weights) * CYCLE).max() <= 1


@pytest.mark.parametrize("weights", [[1.0], [3.0, 1.0], [0.5, 0.25, 0.25]])
def test_each_set_of_a_mixture_is_walked_in_its_own_order_and_wraps_on_its_own(weights):
    orders = [Shuffled(np.array([11, 0, 7 + n]), n, streams=3, block=4) for n in range(len(weights))]
    offsets = [1000 * n for n in range(len(weights))]
    mixed = Mixed(list(orders), offsets, weights, 5, 100)
    samples, epochs = mixed.draw(np.arange(2 * CYCLE))
    for number, order in enumerate(orders):
        here = samples // 1000 == number
        own, own_epochs = order.draw(np.arange(here.sum()))
        assert (samples[here] - 1000 * number).tolist() == own.tolist()
        assert epochs[here].tolist() == own_epochs.tolist()
        assert here.sum() == 2 * CYCLE * weights[number] / sum(weights)
    assert samples[:CYCLE].tolist() != samples[CYCLE:].tolist()
