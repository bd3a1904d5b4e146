"""The stream: the same global batches on any number of ranks and workers, every sample once, resumed at any step."""

import functools
import json
import os
from collections.abc import Iterator
from multiprocessing import current_process, resource_sharer
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from imagesets import as_npy, encoded, folder_of, grey_folder, idx_files, noise

from mimetic.data.cache import ShardCache
from mimetic.data.decode import decode
from mimetic.data.index import ROW, Index, open_index
from mimetic.data.masks import BlockMasks
from mimetic.data.mixture import Mixture
from mimetic.data.pack import pack
from mimetic.data.stream import Batch, ShardStream
from mimetic.data.views import Augmentation, PretrainViews
from mimetic.engine.errors import CheckpointError, DataError, SettingError

VIEWS = PretrainViews(12, 8, Augmentation((0.3, 1.0), shift=1, jitter=0.3), BlockMasks((4, 4), 6, min_block=2))
BLANK = as_npy(np.zeros((2, 2), np.uint8))


class Blanks(Index):
    """Shards of any size whose images are all alike: only the order matters."""

    def read(self, sample: int) -> bytes:
        assert 0 <= sample < len(self)
        return BLANK


def blanks(sizes: list[int]) -> Blanks:
    keys = [f"k{i}\n".encode() for i in range(sum(sizes))]
    rows = np.zeros(len(keys), ROW)
    rows["key"] = np.cumsum([0, *map(len, keys)])[:-1]
    starts = np.cumsum([0, *sizes])
    shards = [{"name": f"{i}.tar", "samples": size} for i, size in enumerate(sizes)]
    letters = np.frombuffer(b"".join(keys), np.uint8)
    return Blanks("blanks", shards, [], 1, (0.5,), (0.5,), rows, letters, starts, "blanks", ShardCache(Path("nowhere")))


def drawn(batches: list[list[Batch]]) -> list[list[int]]:
    """Per step, the samples of all ranks in row order, -1 for fillers."""
    assert len({len(of_rank) for of_rank in batches}) == 1, "ranks disagree on the number of steps"
    steps = []
    for of_step in zip(*batches, strict=True):
        samples, valid = (torch.cat([batch[name] for batch in of_step]) for name in ("sample", "valid"))
        assert [key for batch in of_step for key in batch["keys"]] == [f"k{i}" for i in samples]
        steps.append(torch.where(valid, samples, -1).tolist())
    return steps


def global_batches(index: Index, batch_size: int, world: int, epochs: int = 1, **options) -> list[list[int]]:
    streams = [ShardStream(index, batch_size, rank=rank, world=world, **options) for rank in range(world)]
    return drawn([[batch for _ in range(epochs) for batch in stream] for stream in streams])


def flat(steps: list[list[int]]) -> list[int]:
    return [sample for step in steps for sample in step if sample >= 0]


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


sizes = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any)
seeds = st.integers(0, 2**40)
tails = st.sampled_from(["pad", "drop"])
worlds = st.integers(1, 8)
batch_sizes = st.integers(1, 6)


@st.composite
def populations(draw) -> tuple[Blanks, np.ndarray | None]:
    """An index, and a subset of it or None."""
    index = blanks(draw(sizes))
    chosen = draw(st.none() | st.lists(st.integers(0, len(index) - 1), min_size=1, unique=True))
    return index, None if chosen is None else np.array(chosen)


def count_of(index: Index, subset: np.ndarray | None) -> int:
    return len(index) if subset is None else len(subset)


# Batches


@given(populations(), batch_sizes, worlds, seeds, st.integers(0, 3), tails, st.booleans())
def test_every_sample_once_an_epoch_and_the_same_global_batches_for_every_split(population, batch_size, world, seed, epoch, tail, shuffle):
    index, subset = population
    everything = set(range(len(index)) if subset is None else subset.tolist())
    assume(tail == "pad" or batch_size * world <= len(everything))
    options = {"seed": seed, "epoch": epoch, "tail": tail, "subset": subset, "shuffle": shuffle}
    split = global_batches(index, batch_size, world, **options)
    alone = global_batches(index, batch_size * world, 1, **options)
    assert split == alone
    assert all(len(step) == batch_size * world for step in split)
    seen = flat(split)
    assert len(set(seen)) == len(seen)
    if tail == "pad":
        assert set(seen) == everything
        assert -1 not in [sample for step in split[:-1] for sample in step]
    else:
        assert len(seen) == len(everything) - len(everything) % (batch_size * world)
        assert set(seen) <= everything
        assert len(seen) == sum(map(len, split))
    if not shuffle:
        assert seen == (sorted(everything) if subset is None else subset.tolist())[: len(seen)]


@given(populations(), st.integers(1, 12), st.data())
def test_resuming_at_any_step_goes_on_alike_on_any_world(population, global_batch, data):
    index, subset = population
    tail = data.draw(tails)
    assume(tail == "pad" or global_batch <= count_of(index, subset))
    seed, shuffle = data.draw(seeds), data.draw(st.booleans())
    options = {"seed": seed, "tail": tail, "subset": subset, "shuffle": shuffle}
    whole = global_batches(index, global_batch, 1, epochs=3, **options)
    stop = data.draw(st.integers(0, len(whole)))

    def streams() -> list[ShardStream]:
        world = data.draw(st.sampled_from(divisors(global_batch)))
        return [ShardStream(index, global_batch // world, rank=rank, world=world, **options) for rank in range(world)]

    first, second = streams(), streams()
    begun = drawn([list(stream.run(stop)) for stream in first])
    for stream in second:
        stream.load_state_dict(first[0].state_dict())
    assert {str(stream.state_dict()) for stream in first + second} == {str(first[0].state_dict())}
    assert begun + drawn([list(stream.run(len(whole))) for stream in second]) == whole


@given(sizes, st.integers(1, 8), st.integers(1, 8), seeds, st.data())
def test_another_global_batch_goes_on_if_it_divides_the_position_and_is_refused_with_one_that_would(shard_sizes, old, new, seed, data):
    index = blanks(shard_sizes)
    whole = flat(global_batches(index, old, 1, seed=seed))
    first, second = ShardStream(index, old, seed=seed), ShardStream(index, new, seed=seed)
    stop = data.draw(st.integers(0, len(first) - 1))
    for _ in first.run(stop):
        pass
    state = first.state_dict()
    assert state["samples"] == stop * old
    if stop * old % new == 0:
        second.load_state_dict(state)
        assert sorted(flat(drawn([list(second)]))) == sorted(whole[stop * old :])
        return
    with pytest.raises(CheckpointError, match=f"sample {stop * old} .* {new} does not divide") as caught:
        second.load_state_dict(state)
    ShardStream(index, int(str(caught.value).rsplit(" ", 1)[1]), seed=seed).load_state_dict(state)


def test_the_order_differs_between_epochs_and_seeds():
    for index in (blanks([84]), blanks([7] * 12)):
        orders = {str(global_batches(index, 4, 1, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)}
        assert len(orders) == 16
    two_epochs = global_batches(index, 4, 1, epochs=2, seed=1)
    assert two_epochs[:21] == global_batches(index, 4, 1, seed=1)
    assert two_epochs[21:] == global_batches(index, 4, 1, seed=1, epoch=1)


# Real shards, workers


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("stream")
    pack(idx_files(folder / "src", noise(1, 23, 14, 11), noise(2, 23) % 3), folder / "out", samples_per_shard=5)
    return open_index(folder / "out")


def same(a: Batch, b: Batch) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y

    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


def test_workers_change_nothing(index):
    def all_batches(workers: int) -> Iterator[Batch]:
        return ShardStream(index, 3, rank=1, world=2, workers=workers, seed=5, transform=VIEWS).run(8)

    pairs = list(zip(all_batches(0), all_batches(2), strict=True))
    assert len(pairs) == 8
    assert all(same(*pair) for pair in pairs)
    assert set(pairs[0][0]) == {"keys", "sample", "valid", "bad", "label", "image", "target", "hidden"}


def test_state_counts_batches_handed_out_not_prefetched_ones(index):
    stream = ShardStream(index, 2, world=2, workers=2, seed=5, transform=VIEWS)
    batches = stream.run(12)
    for step in range(1, 4):
        next(batches)
        assert stream.state_dict()["samples"] == step * 4
    batches.close()
    resumed = ShardStream(index, 2, world=2, workers=0, seed=5, transform=VIEWS)
    resumed.load_state_dict(stream.state_dict())
    expected = list(ShardStream(index, 2, world=2, seed=5, transform=VIEWS).run(12))[3:]
    assert all(same(*pair) for pair in zip(resumed.run(12), expected, strict=True))


def test_resuming_with_workers_gives_the_same_tensors(index):
    expected = list(ShardStream(index, 4, seed=5, transform=VIEWS).run(9))
    stream = ShardStream(index, 4, workers=2, seed=5, transform=VIEWS)
    stream.load_state_dict(ShardStream(index, 4, seed=5, epoch=1).state_dict())
    assert stream.state_dict()["epoch"] == 1
    assert all(same(*pair) for pair in zip(stream.run(9), expected[6:], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_no_global_generator_is_touched(index, workers):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    list(ShardStream(index, 8, workers=workers, transform=VIEWS))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


def test_crop_flip_jitter_and_mask_belong_to_seed_epoch_and_sample(index):
    def by_sample(batch_size: int, world: int, epoch: int, seed: int = 5) -> dict[int, bytes]:
        found = {}
        for rank in range(world):
            for batch in ShardStream(index, batch_size, rank=rank, world=world, seed=seed, epoch=epoch, transform=VIEWS):
                for i in torch.nonzero(batch["valid"])[:, 0].tolist():
                    tensors = (batch[name][i].numpy().tobytes() for name in ("image", "target", "hidden"))
                    found[int(batch["sample"][i])] = b"".join(tensors)
        return found

    reference = by_sample(23, 1, epoch=2)
    assert len(reference) == 23
    assert by_sample(2, 3, epoch=2) == reference
    assert by_sample(5, 1, epoch=2) == reference
    for other in (by_sample(23, 1, epoch=3), by_sample(23, 1, epoch=2, seed=6)):
        assert all(other[sample] != reference[sample] for sample in reference)


def test_an_interrupt_while_a_tensor_is_handed_over_leaves_the_workers_silent(index, monkeypatch, capfd):
    def hang_up(ticket: tuple[Any, Any]) -> None:
        Client(ticket[0], authkey=current_process().authkey).close()
        raise KeyboardInterrupt

    monkeypatch.setattr(resource_sharer._resource_sharer, "get_connection", hang_up)
    with pytest.raises(KeyboardInterrupt):
        next(iter(ShardStream(index, 4, workers=1)))
    assert capfd.readouterr() == ("", "")


def test_labels_and_images_are_those_of_the_index(index):
    for batch in ShardStream(index, 4, seed=1):
        assert batch["image"].shape == (4, 1, 14, 11)
        for image, sample, label in zip(batch["image"], batch["sample"], batch["label"], strict=True):
            assert np.array_equal(image, decode(index.read(int(sample)), 1))
            assert label == index.rows["label"][int(sample)]


def test_images_of_different_sizes_come_as_a_list_without_a_transform(tmp_path):
    pack(folder_of(tmp_path / "src", {f"{i}.npy": as_npy(noise(i, 4, 3 + i)) for i in range(3)}), tmp_path / "out")
    (batch,) = ShardStream(open_index(tmp_path / "out"), 3)
    assert sorted(image.shape for image in batch["image"]) == [(1, 4, 3), (1, 4, 4), (1, 4, 5)]


# Damage


@pytest.fixture
def own_shards(tmp_path) -> Path:
    pack(grey_folder(tmp_path / "src", 10), tmp_path / "out", samples_per_shard=4)
    return tmp_path / "out"


def scribble(index: Index, sample: int) -> str:
    """Overwrites an image inside its shard, as a failing disk would; returns its key."""
    row = index.rows[sample]
    with index.path(int(index.shard_of(np.int64(sample)))).open("r+b") as file:
        file.seek(int(row["offset"]))
        file.write(b"\xa5" * int(row["size"]))
    return index.keys(np.array([sample]))[0]


@pytest.mark.parametrize("transform", [None, VIEWS])
def test_an_image_that_does_not_decode_is_marked_and_listed_once(own_shards, transform):
    index = open_index(own_shards)
    key = scribble(index, 5)
    batches = list(ShardStream(index, 4, transform=transform)) + list(ShardStream(index, 4, epoch=1, transform=transform))
    assert [bad for batch in batches for bad in batch["bad"]] == [key] * 2
    seen = [int(s) for batch in batches for s, valid in zip(batch["sample"], batch["valid"], strict=True) if valid]
    assert sorted(seen) == sorted([*range(5), *range(6, 10)] * 2)


def test_a_damaged_image_that_also_fills_up_the_last_batch_counts_once(own_shards):
    index = open_index(own_shards)
    key = scribble(index, 0)
    batches = list(ShardStream(index, 4, shuffle=False))
    assert batches[-1]["sample"].tolist() == [8, 9, 0, 1]
    assert [batch["bad"] for batch in batches] == [[key], [], []]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_shard_stops_with_one_line_that_names_it(own_shards, workers):
    index = open_index(own_shards)
    os.truncate(own_shards / "shard-00001.tar", 600)
    with pytest.raises(DataError, match=r"shard-00001\.tar: sample \d{4} has \d+ of \d+ bytes") as caught:
        list(ShardStream(index, 4, workers=workers, transform=VIEWS))
    assert "\n" not in str(caught.value)


def test_a_missing_shard_stops_with_its_name(own_shards):
    index = open_index(own_shards)
    (own_shards / "shard-00002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00002\.tar: No such file"):
        list(ShardStream(index, 4))


# Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 6, "world": 2, "tail": "drop"}, "data.batch_size 6 x 2 processes = 12 is more than the 10 samples .* to 5"),
        ({"tail": "keep"}, "tail is 'keep'; it must be pad or drop"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"workers": -1}, "workers -1"),
        ({"subset": np.array([], dtype=np.int64)}, "a subset of 0 samples"),
        ({"subset": np.array([3, 3])}, "once each"),
        ({"subset": np.array([10])}, "0 to 9"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_with_the_numbers(options, message):
    with pytest.raises(SettingError, match=message):
        ShardStream(blanks([10]), **{"batch_size": 2} | options)


@pytest.mark.parametrize("change", [{"seed": 1}, {"shuffle": False}, {"tail": "drop"}, {"subset": np.arange(9)}, {"fingerprint": "x"}])
def test_a_position_in_other_data_is_refused(change):
    state = ShardStream(blanks([10]), 2).state_dict()
    index = blanks([10])
    if "fingerprint" in change:
        object.__setattr__(index, "fingerprint", change.pop("fingerprint"))
    with pytest.raises(CheckpointError, match="start a new run folder"):
        ShardStream(index, 2, **change).load_state_dict(state)


def test_the_position_is_plain_and_small():
    state = ShardStream(blanks([10]), 2, epoch=3).state_dict()
    assert json.loads(json.dumps(state)) == state
    assert (state["epoch"], state["samples"]) == (3, 0)


def test_streams_are_told_apart_only_by_what_matters():
    stream = functools.partial(ShardStream, blanks([10]), 2)
    assert stream(workers=0).state_dict() == stream(workers=2).state_dict()
    assert stream(rank=0, world=3).state_dict() == stream(rank=2, world=3).state_dict()


def test_mixtures_of_other_weights_and_subsets_of_another_order_are_other_data(index):
    def state(**options: Any) -> dict[str, Any]:
        return ShardStream(index, 2, **options).state_dict()

    with pytest.raises(CheckpointError, match="subset"):
        ShardStream(index, 2, subset=np.array([2, 1]), shuffle=False).load_state_dict(state(subset=np.array([1, 2]), shuffle=False))
    mixtures = [Mixture((index, index), weights, 20) for weights in ((1, 1), (1, 2))]
    with pytest.raises(CheckpointError, match="fingerprint"):
        ShardStream(mixtures[0], 2).load_state_dict(ShardStream(mixtures[1], 2).state_dict())


def test_what_a_mixture_says_of_itself(index, tmp_path):
    pack(idx_files(tmp_path / "src", noise(3, 9, 14, 11)), tmp_path / "out")
    other = open_index(tmp_path / "out")
    mixture = Mixture((index, other), (3, 1), 1000)
    assert mixture.mean[0] == pytest.approx(0.75 * index.mean[0] + 0.25 * other.mean[0], abs=1e-6)
    samples = np.array([0, 22, 23, 31])
    assert mixture.keys(samples) == index.keys(samples[:2]) + other.keys(samples[2:] - 23)
    assert [mixture.read(i) for i in samples] == [index.read(0), index.read(22), other.read(0), other.read(8)]
    stream = ShardStream(mixture, 8, transform=VIEWS)
    assert len(stream) == 125
    met = torch.cat([batch["sample"] for batch in stream])
    assert (met < 23).float().mean() == pytest.approx(0.75, abs=0.05)
    pack(folder_of(tmp_path / "tree", {"a.png": encoded(noise(1, 4, 4, 3))}), tmp_path / "colour")
    with pytest.raises(SettingError, match=r"has 3 channels, .* has 1; sets that are mixed need the same"):
        Mixture((index, open_index(tmp_path / "colour")), (1, 1), 10)
    with pytest.raises(SettingError, match=r"the weight 1e-06 of .*, less than one sample in 10,000; raise it or leave"):
        Mixture((index, other), (1, 1e-6), 10)
    with pytest.raises(SettingError, match="sets are mixed as a whole"):
        ShardStream(mixture, 2, subset=np.array([1]))
