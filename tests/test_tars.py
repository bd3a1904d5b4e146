"""An index for tars that somebody else wrote: it says what webdataset would read, and the tars stay as they are."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from faulty_server import serving
from imagesets import encoded, folder_of, grey_folder, noise
from shardreading import contents, keys_of, labels, read_by_webdataset

from mimetic.data.decode import decode
from mimetic.data.index import open_index
from mimetic.data.indexing import find_tars, index_tars
from mimetic.data.pack import pack
from mimetic.data.packing.shards import tar_header
from mimetic.engine.errors import DataError, SettingError


def tar_of(path: Path, members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(begin: int, end: int, colour: bool = True) -> dict[str, bytes]:
    members = {}
    for i in range(begin, end):
        pixels = noise(i, 9, 8, 3) if colour else noise(i, 9, 8)
        members |= {f"s/{i:04d}.jpg": encoded(pixels, "jpeg"), f"s/{i:04d}.cls": str(i % 3).encode(), f"s/{i:04d}.txt": b"a caption"}
    return members


@pytest.fixture
def tars(tmp_path) -> Path:
    """Three tars of 5 samples each."""
    for number in range(3):
        tar_of(tmp_path / f"tars/part-{number:02d}.tar", samples(5 * number, 5 * number + 5))
    return tmp_path / "tars"


def test_an_index_says_what_webdataset_reads(tars):
    before = {path: path.read_bytes() for path in tars.iterdir()}
    content = index_tars([tars])
    index = open_index(tars)
    assert {path: path.read_bytes() for path in before} == before
    assert [shard["name"] for shard in index.shards] == [f"part-{i:02d}.tar" for i in range(3)]
    assert [shard["sha256"] for shard in index.shards] == [hashlib.sha256(before[path]).hexdigest() for path in sorted(before)]
    assert (content["samples"], content["rejected"], content["others"]) == (15, 0, 0)
    read = read_by_webdataset(index)
    assert contents(index) == {key: sample["jpg"] for key, sample in read.items()}
    assert labels(index) == {key: sample["cls"].decode() for key, sample in read.items()}
    assert index.channels == 3
    pixels = np.concatenate([decode(index.read(i), 3).reshape(3, -1) for i in range(15)], 1) / 255
    np.testing.assert_allclose(index.mean, pixels.mean(1), atol=1e-6)
    np.testing.assert_allclose(index.std, pixels.std(1), atol=1e-6)
    assert json.loads((tars / "index.json").read_text())["image"]["measured"] == 15


def test_processes_and_order_of_arguments_do_not_matter_and_our_own_shards_give_our_own_index(tmp_path):
    pack(grey_folder(tmp_path / "src", 20), tmp_path / "out", samples_per_shard=6)
    ours = open_index(tmp_path / "out")
    index_tars([tmp_path / "out"], tmp_path / "one")
    index_tars([tmp_path / "out/shard-{00000..00003}.tar"], tmp_path / "two", workers=2)
    for name in ("samples.npy", "keys.txt", "index.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    index = open_index(tmp_path / "one")
    assert (index.rows == ours.rows).all()
    assert keys_of(index) == keys_of(ours)
    assert (index.channels, index.mean, index.std) == (ours.channels, ours.mean, ours.std)
    assert [shard["name"] for shard in index.shards] == [f"../out/{shard['name']}" for shard in ours.shards]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_form_of_tar_keeps_its_names_and_offsets(tmp_path, form):
    stems = ["x" * 80 + "/" + "y" * 90, "plain", "./dot", "a.b/c"]
    if form != tarfile.USTAR_FORMAT:
        stems += ["n" * 300, "日本語/Grüße 🦊"]
    members = {f"{stem}.png": encoded(noise(i, 4, 4)) for i, stem in enumerate(stems)}
    tar_of(tmp_path / "t.tar", members, form)
    index_tars([tmp_path / "t.tar"])
    assert contents(open_index(tmp_path)) == {name.removesuffix(".png"): content for name, content in members.items()}


def test_tars_of_the_tar_program_are_read(tmp_path):
    if not shutil.which("tar"):
        pytest.skip("needs tar")
    source = folder_of(tmp_path / "src", {f"d/{'long' * 40}{i}.png": encoded(noise(i, 4, 4)) for i in range(3)})
    (source / "d/link.png").symlink_to("nowhere")
    (source / "d/hole.png").touch()
    os.truncate(source / "d/hole.png", 1 << 20)
    subprocess.run(["tar", "--sparse", "-cf", tmp_path / "t.tar", "-C", source, "."], check=True)
    content = index_tars([tmp_path / "t.tar"], max_bad=0.5)
    assert (content["samples"], content["others"]) == (3, 3), "two folders and a link"
    assert "hole.png\ta sparse member" in (tmp_path / "rejected.tsv").read_text()


def test_labels_are_names_unless_all_are_numbers_and_json_has_them_too(tmp_path):
    picture = encoded(noise(0, 4, 4))
    members = {"a.png": picture, "a.cls": b"7\n", "b.png": picture, "b.json": b'{"label": "cat"}', "c.png": picture,
               "c.json": b'{"label": 7, "x": 1}',
               "d.png": picture, "e.png": picture, "e.json": b'{"label": [1]}', "f.png": picture, "f.json": b"no json"}  # fmt: skip
    tar_of(tmp_path / "t.tar", members)
    index_tars([tmp_path / "t.tar"])
    index = open_index(tmp_path)
    assert index.classes == ["7", "cat"]
    assert index.rows["label"].tolist() == [0, 1, 0, -1, -1, -1]


def test_the_image_is_the_first_member_of_a_known_kind(tmp_path):
    first, second = encoded(noise(0, 4, 4)), encoded(noise(1, 4, 4))
    tar_of(tmp_path / "t.tar", {"a.seg.png": second, "a.JPG": first, "a.png": second, "b.input.png": first, "b.txt": b"x"})
    index_tars([tmp_path / "t.tar"])
    assert contents(open_index(tmp_path)) == {"a": first, "b": first}


def test_keys_that_come_again_in_another_shard_are_listed(tmp_path):
    tar_of(tmp_path / "a.tar", samples(0, 5))
    tar_of(tmp_path / "b.tar", samples(4, 9))
    with pytest.raises(DataError, match=r"1 of 10 samples are unusable, 0 are tolerated; .*b\.tar/s/0004\.jpg: the key 's/0004' has come"):
        index_tars([tmp_path])
    assert not (tmp_path / "index.json").exists()
    assert index_tars([tmp_path], max_bad=0.1)["samples"] == 9
    assert keys_of(open_index(tmp_path)) == [f"s/{i:04d}" for i in range(9)]
    assert "b.tar/s/0004.jpg\t" in (tmp_path / "rejected.tsv").read_text()


def test_a_tar_that_breaks_is_named_with_its_place_and_counts_by_what_is_lost(tars):
    os.truncate(tars / "part-01.tar", 6044)
    with pytest.raises(DataError, match=r"of \d+ samples are unusable, 0 are tolerated; .*part-01\.tar breaks at byte [\d,]+ of 6,044"):
        index_tars([tars])
    content = index_tars([tars], max_bad=0.5)
    assert content["samples"] == 11
    told = (tars / "rejected.tsv").read_text()
    assert re.search(r"part-01.tar\tbreaks at byte [\d,]+ of 6,044: ", told)
    assert len(open_index(tars)) == 11


def test_colour_counts_wherever_it_is_among_the_measured(tmp_path):
    tar_of(tmp_path / "t.tar", samples(0, 4, colour=False) | samples(4, 5))
    assert index_tars([tmp_path])["image"]["channels"] == 3
    index = open_index(tmp_path)
    pixels = np.concatenate([decode(index.read(i), 3).reshape(3, -1) for i in range(5)], 1) / 255
    np.testing.assert_allclose(index.mean, pixels.mean(1), atol=1e-6)
    assert index_tars([tmp_path], channels=1)["image"]["channels"] == 1


# Arguments


def test_shards_are_named_in_many_ways(tars, monkeypatch):
    names = [str(tars / f"part-{i:02d}.tar") for i in range(3)]
    for arguments in ([str(tars)], [str(tars / "part-*.tar")], [str(tars / "part-{00..02}.tar")], names):
        assert find_tars(arguments) == names
    assert find_tars(["s3://bucket/{a,b}.tar", "https://host/x.tar"]) == ["s3://bucket/a.tar", "s3://bucket/b.tar", "https://host/x.tar"]
    monkeypatch.chdir(tars)
    assert index_tars(["part-01.tar"])["folder"] == Path(".")
    odd = tars / "odd {a} [b]*"
    shutil.copytree(tars, odd, ignore=shutil.ignore_patterns("odd*"))
    assert len(find_tars([str(odd)])) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["{tars}/none.tar"], DataError, r"none\.tar: no such file; give tars"),
        (["{tars}/x*.tar"], DataError, r"x\*\.tar: no such file"),
        (["{tars}/part-00.tar", "{tars}"], DataError, r"part-00\.tar is named 2 times"),
        (["{tars}/empty"], DataError, r"empty: no \.tar in this folder"),
        (["{tars}/zip.tar"], DataError, r"zip\.tar is compressed \(zstd\).*unpack it: unzstd"),
        (["{tars}/a.tar.gz"], DataError, r"a\.tar\.gz is compressed, .*unpack the compression first"),
        (["{tars}/zero.tar"], DataError, r"no usable sample in 1 shard, the first: .*zero\.tar: breaks at byte 0 of 0: empty file"),
        (["{tars}/words.tar"], DataError, r"words\.tar: breaks at byte 0 of 900: "),
        (["{tars}/part-00.tar", "{tars}/other/x.tar"], SettingError, r"the shards lie in .*; say where the index goes with --out"),
        (["s3://bucket/x.tar"], SettingError, r"the shards lie in s3://; say where the index goes with --out"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_are_one_line(tars, arguments, error, message):
    (tars / "empty").mkdir()
    tar_of(tars / "other/x.tar", samples(0, 1))
    folder_of(tars, {"zip.tar": b"\x28\xb5\x2f\xfd" + bytes(99), "a.tar.gz": b"\x1f\x8b", "zero.tar": b"",
                     "words.tar": b"no tar at all" * 69 + b"xyz"})  # fmt: skip
    with pytest.raises(error, match=message) as caught:
        index_tars([argument.format(tars=tars) for argument in arguments], max_bad=1)
    assert "\n" not in str(caught.value)
    assert not (tars / "index.json").exists()


def test_the_index_of_other_shards_is_not_overwritten(tars):
    index_tars([tars])
    index_tars([tars])
    with pytest.raises(SettingError, match=r"index\.json is the index of 3 other shards, 1 are given; name another folder with --out"):
        index_tars([tars / "part-00.tar"])
    (tars / "index.json").write_text("mine")
    with pytest.raises(SettingError, match=r"index\.json is the index of 0 other shards"):
        index_tars([tars])


def test_shards_at_an_address_are_fetched_and_keep_it(tars, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with serving(tars) as server:
        for _ in range(2):
            content = index_tars([f"{server.address}/part-{{00..02}}.tar"], tmp_path / "index")
            assert content["samples"] == 15
            assert content["shards"][2]["name"] == f"{server.address}/part-02.tar"
        assert server.asked == dict.fromkeys(("part-00.tar", "part-01.tar", "part-02.tar"), 2), "what lies there may have changed"
        index = open_index(tmp_path / "index")
        assert contents(index) == contents(open_index(index_tars([tars])["folder"]))
        assert server.asked.total() == 6, "training reads the copies that indexing has left"
        with pytest.raises(DataError, match=r"part-09\.tar: the answer is 404"):
            index_tars([f"{server.address}/part-09.tar"], tmp_path / "none")


def test_headers_are_those_of_tarfile():
    for name, size in (("a/b.jpg", 0), ("x" * 100, 8**11 - 1), ("x" * 101, 5), ("é.png", 12345), ("a b\t'.png", 1 << 20)):
        member = tarfile.TarInfo(name)
        member.size = size
        assert tar_header(name, size) == member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
