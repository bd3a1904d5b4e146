"""Sets of shards by whatever names them: an index, its folder, tars, a command that was typed."""

import shutil
import sys

import numpy as np
import pytest
from faulty_server import serving
from imagesets import encoded, folder_of, grey_folder, noise
from shardreading import contents

from mimetic.data.cache import ShardCache
from mimetic.data.index import open_index
from mimetic.data.opening import open_labelled, open_set
from mimetic.data.pack import pack
from mimetic.engine.config import DataSettings
from mimetic.engine.errors import DataError, SettingError


@pytest.fixture
def packed(tmp_path):
    pack(grey_folder(tmp_path / "src", 12), tmp_path / "shards", samples_per_shard=5)
    return tmp_path / "shards"


@pytest.fixture
def cache(tmp_path) -> ShardCache:
    return ShardCache(tmp_path / "cache")


@pytest.mark.parametrize("name", ["{}", "{}/index.json", "{}/*.tar", "{}/shard-{{00000..00002}}.tar", "{}/shard-0000?.tar"])
def test_all_names_of_a_set_give_its_samples(packed, cache, name, capsys):
    index = open_set(name.format(packed), cache)
    assert contents(index) == contents(open_index(packed))
    assert ("making the index of 3 tars" in capsys.readouterr().out) == ("tar" in name)
    assert open_set(name.format(packed), cache).fingerprint == index.fingerprint
    assert capsys.readouterr().out == "", "made once"


def test_a_set_elsewhere_is_named_by_its_address_signed_or_not(packed, tmp_path):
    with serving(packed.parent) as server:
        for query in ("", "?sig=ab"):
            server.query = query[1:]
            index = open_set(f"{server.address}/shards{query}", ShardCache(tmp_path / f"cache{len(query)}"))
            assert contents(index) == contents(open_index(packed))


def test_a_single_tar_is_a_set_and_a_changed_one_another(packed, cache):
    first = open_set(packed / "shard-00000.tar", cache)
    assert len(first) == 5
    shutil.copy(packed / "shard-00002.tar", packed / "shard-00000.tar")
    assert len(open_set(packed / "shard-00000.tar", cache)) == 2


def test_a_command_that_is_typed_is_spooled_once(packed, cache, monkeypatch, tmp_path):
    command = f"pipe:echo run >> {tmp_path}/runs; cat {packed}/shard-{{00000..00002}}.tar"
    with pytest.raises(SettingError, match=r"pipe:echo run .*: a command is run only where it is typed"):
        open_set(command, cache)
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(sys, "argv", ["beit.py", f"--data.index={command}"])
    for _ in range(2):
        assert contents(open_set(command, cache)) == contents(open_index(packed))
    assert (tmp_path / "runs").read_text().split() == ["run"] * 3


def test_what_cannot_be_opened_is_one_line(packed, cache, monkeypatch, tmp_path):
    with pytest.raises(DataError, match=r"no-\*\.tar: no such file; give tars"):
        open_set(tmp_path / "no-*.tar", cache)
    with serving(packed) as server, pytest.raises(DataError, match=r"elsewhere need an index here: `mimetic index 'http"):
        open_set(f"{server.address}/shard-{{00000..00002}}.tar", cache)
    monkeypatch.setattr(sys, "argv", ["pipe:cat nowhere.tar"])
    with pytest.raises(DataError, match=r"pipe:cat nowhere.tar ended with code 1 \(cat: .*No such file"):
        open_set("pipe:cat nowhere.tar", cache)
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"cannot be written .*; give data.cache another folder"):
        open_set(packed / "*.tar", ShardCache(tmp_path / "file/cache"))


def test_a_label_beyond_the_classes_is_told_before_training(tmp_path):
    pack(folder_of(tmp_path / "src", {f"{name}/a.png": encoded(noise(1, 4, 4)) for name in "ab"}), tmp_path / "shards")
    rows = np.load(tmp_path / "shards/samples.npy")
    rows["label"][1] = 7
    np.save(tmp_path / "shards/samples.npy", rows)
    with pytest.raises(DataError, match="its index has 2 classes, but a sample of class number 7"):
        open_labelled(DataSettings(str(tmp_path / "shards")))
