"""An index that says what cannot be, or was damaged, is one line, whatever the damage."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from imagesets import grey_folder

from mimetic.data.index import ROW, Index, open_index
from mimetic.data.pack import pack
from mimetic.engine.errors import DataError


@pytest.fixture
def packed(tmp_path) -> Path:
    pack(grey_folder(tmp_path / "src", 12), tmp_path / "shards", samples_per_shard=5)
    return tmp_path / "shards"


NONSENSE = [None, -1, "x", 1.5, [], {}, 10**30, True]
PLACES = ["image.channels", "shards.0.samples", "shards.1.bytes", "shards.0.sha256", "shards.2.name", "image.mean", "image.std", "classes",
          "files.keys~txt.bytes", "files", "shards", "image", "version"]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_nonsense_in_an_index_is_one_line(packed, place):
    for value in NONSENSE:
        if (place, value) in (("classes", []), ("shards.2.name", "x")):
            continue
        whole = (packed / "index.json").read_text()
        content = json.loads(whole)
        *way, last = [int(word) if word.isdecimal() else word.replace("~", ".") for word in place.split(".")]
        inner = content
        for word in way:
            inner = inner[word]
        inner[last] = value
        (packed / "index.json").write_text(json.dumps(content))
        with pytest.raises(DataError) as caught:
            read_all(open_index(packed))
        assert "\n" not in str(caught.value)
        (packed / "index.json").write_text(whole)


def read_all(index: Index) -> list[str]:
    return index.keys(np.arange(len(index))) + [str(len(index.read(i))) for i in range(len(index))]


def test_hundreds_of_random_damages_are_one_line_or_none(packed):
    """Flipped bytes and lost ends: everything either reads as before, reads otherwise in a place of its own, or is refused."""
    random, refused = np.random.default_rng(0), 0
    for name in ("index.json", "samples.npy", "keys.txt"):
        whole = (packed / name).read_bytes()
        for _ in range(120):
            damaged = bytearray(whole[: random.integers(len(whole))] if random.random() < 0.3 else whole)
            for place in random.integers(len(damaged), size=3) if damaged else ():
                damaged[place] = random.integers(256)
            (packed / name).write_bytes(damaged)
            told = ""
            try:
                assert len(read_all(open_index(packed))) == 24
            except DataError as error:
                told = str(error)
            refused += bool(told)
            assert "\n" not in told
        (packed / name).write_bytes(whole)
    assert refused > 150


def test_keys_that_do_not_fit_are_refused(packed):
    rows = np.load(packed / "samples.npy")
    rows["key"][5] = 1 << 40
    np.save(packed / "samples.npy", rows)
    with pytest.raises(DataError, match=r"samples.npy and keys.txt do not fit together"):
        open_index(packed).keys(np.arange(12))


@pytest.mark.parametrize("name", ["keys.txt", "samples.npy"])
def test_a_file_beside_the_index_that_was_cut_is_told_with_both_lengths(packed, name):
    size = (packed / name).stat().st_size
    (packed / name).write_bytes((packed / name).read_bytes()[:-7])
    with pytest.raises(DataError, match=rf"{name} has {size - 7} bytes, not {size}"):
        open_index(packed)


def test_an_index_is_sent_to_another_process_without_its_rows(packed):
    index = open_index(packed)
    rows = np.lib.format.open_memmap(packed / "large.npy", "w+", ROW, (1_000_000,))
    rows.flush()
    large = Index(index.home, index.shards, [], 1, (0.5,), (0.5,), np.lib.format.open_memmap(packed / "large.npy", mode="r"),
                  index.key_bytes, index.starts, "x", index.cache)  # fmt: skip
    sent = pickle.dumps(large)
    assert len(sent) < 5000
    assert len(pickle.loads(sent)) == 1_000_000
    assert read_all(pickle.loads(pickle.dumps(index))) == read_all(index)
