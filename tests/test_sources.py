"""What can be packed: lists, tars and trees; what is asked for on the way: a split, no duplicates, other sizes and formats."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from imagesets import as_npy, encoded, folder_of, grey_folder, idx_files, noise
from PIL import Image
from shardreading import assert_sound, contents, keys_of, labels

from mimetic.data.decode import decode
from mimetic.data.index import Index, open_index
from mimetic.data.pack import pack
from mimetic.data.packing.items import key_maker
from mimetic.data.packing.moments import LARGE, evenly, how_many_measured, pixels_to_measure
from mimetic.data.packing.plan import MOST_SAMPLES
from mimetic.engine.errors import DataError, SettingError

RGB = noise(0, 9, 7, 3)


def packed(source: Path, out: Path, **options) -> Index:
    pack(source, out, **options)
    return open_index(out)


def rejected(out: Path) -> dict[str, str]:
    file = out / "rejected.tsv"
    return dict(line.split("\t") for line in file.read_text().splitlines()) if file.exists() else {}


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


# Lists


def listed(folder: Path, text: str, name: str = "list.csv", count: int = 4) -> Path:
    folder_of(folder / "img", {f"{i}.png": encoded(noise(i, 5, 5, 3)) for i in range(count)})
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return folder / name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "label, path\ncat,img/0.png\ndog,img/1.png\n,img/2.png\n"),
        ("list.TSV", "\ufefffilename\tlabel\nimg/0.png\tcat\nimg/1.png\tdog\nimg/2.png\t\n"),
        ("list.jsonl", '{"image": "img/0.png", "label": "cat"}\n\n{"image": "img/1.png", "label": "dog"}\n'
                       '{"file": "img/2.png", "label": null}\n'),
    ],
)
def test_lists_name_images_and_classes(tmp_path, name, text):
    index = packed(listed(tmp_path / "src", text, name), tmp_path / "out", max_bad=0)
    assert_sound(index)
    assert index.classes == ["cat", "dog"]
    found = dict(zip(keys_of(index), index.rows["label"].tolist(), strict=True))
    assert found == {"img/0": 0, "img/1": 1, "img/2": -1}
    assert contents(index)["img/1"] == (tmp_path / "src/img/1.png").read_bytes()


def test_label_numbers_and_keys_of_a_list_are_kept(tmp_path):
    index = packed(listed(tmp_path / "src", "path,label,key\nimg/0.png,3,first\nimg/1.png,0,second.one\n"), tmp_path / "out")
    assert index.classes == ["0", "1", "2", "3"]
    assert labels(index) == {"first": "3", "second_one": "0"}
    absolute = listed(tmp_path / "abs", f"path\n{tmp_path}/src/img/0.png\n../src/img/1.png\n")
    index = packed(absolute, tmp_path / "out-abs", max_bad=0)
    assert_sound(index)
    assert not [key for key in keys_of(index) if key.startswith(("/", "."))], "a key leads nowhere"


def test_lines_that_name_no_image_are_rejected_and_counted(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    text = "\n".join(["path,label,key", "img/0.png,a,one", "img/9.png,a,", ",b,", "img,b,", f"{tmp_path}/pipe.png,b,", "list.csv,b,",
                      "img/1.png,b,one", "img/\udcff.png,a,", '"img/2.png",b,two'])  # fmt: skip
    source = listed(tmp_path / "src", text)
    content = pack(source, tmp_path / "out", max_bad=0.8)
    assert (content["samples"], content["rejected"]) == (2, 7)
    reasons = sorted(rejected(tmp_path / "out").values())
    assert reasons[0].startswith(".csv: known are .png")
    missing, irregular = ["No such file or directory"] * 2, ["no regular file"] * 2
    assert reasons[1:] == [*missing, "no path in this line", *irregular, "the key one comes again"]
    with pytest.raises(DataError, match=r"7 unreadable|1 unreadable images, 0 are tolerated"):
        pack(source, tmp_path / "strict", max_bad=0)


def test_damaged_lines_of_json_are_rejected(tmp_path):
    lines = ['{"path": "img/0.png"}', '{"path": "img/1.png"', "[1]", "nonsense", '{"path": 3}', '{"label": 3}', "[" * 100_000]
    content = pack(listed(tmp_path / "src", "\n".join(lines), "list.jsonl"), tmp_path / "out", max_bad=0.9)
    assert (content["samples"], content["rejected"]) == (1, 6)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "id,label\n1,2\n", r"a\.csv has no column of paths: found id, label; name it path or image"),
        ("a.jsonl", '{"id": 3}\n', r"a\.jsonl has no column of paths: found id;"),
        ("a.csv", "", r"a\.csv has no column of paths: found nothing"),
        ("a.csv", "path\n", r"a\.csv: no image in it"),
        ("a.csv", f"path\n{'x' * 200_000}\n", r"a\.csv is no table: field larger"),
        ("a.csv", "path,label\nimg/0.png,99999999\n", r"label 99999999 is beyond 1,000,000 classes"),
        ("a.txt", "img/0.png", r"a\.txt is no idx file of bytes, no tar, no \.csv"),
    ],
)
def test_lists_that_cannot_be_read_are_one_line(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message) as caught:
        pack(listed(tmp_path / "src", text, name), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# Tars


def test_tars_are_packed_again_with_their_labels(tmp_path):
    first = [(f"a/{i}.{kind}", content) for i in range(3) for kind, content in (("jpg", encoded(noise(i, 5, 5), "jpeg")), ("cls", b"2"))]
    second = [("a/0.PNG", encoded(noise(7, 5, 5))), ("a/0.json", b'{"label": 1}'), ("notes", b"x"), ("b.txt", b"no image")]
    folder = tmp_path / "tars"
    tar_of(folder / "one.tar", first)
    tar_of(folder / "two.tar", second)
    for source in (folder, folder / "*.tar"):
        index = packed(source, tmp_path / "out", max_bad=0.3)
        assert_sound(index)
        assert labels(index) == {"a/0": "2", "a/1": "2", "a/2": "2", "a/0-1": "1"}
        assert contents(index)["a/0-1"] == second[0][1]
        assert rejected(tmp_path / "out") == {f"{folder}/two.tar/b": "no image among its members (txt)"}
    again = packed(tmp_path / "out", tmp_path / "again")
    assert contents(again) == contents(index)
    assert (again.rows["label"][np.argsort(keys_of(again))] == index.rows["label"][np.argsort(keys_of(index))]).all()


def test_compressed_tars_are_refused_with_the_cure(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b" + bytes(40))
    with pytest.raises(DataError, match=r"a\.tar\.gz is compressed \(gzip\).*unpack it: gunzip"):
        pack(tmp_path / "a.tar.gz", tmp_path / "out")


# Names and folders


def test_keys_are_one_line_inside_the_shard_and_differ(tmp_path):
    new_key = key_maker()
    names = ["a", "a", "a", "a-1", "../../etc/passwd", "/etc/passwd", "x\ny", "x\ry", "__meta__/x", "", ".", "a\0b", "\udcff", "é" * 300]
    keys = [new_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert keys[:5] == ["a", "a-1", "a-2", "a-1-1", "_/__/etc/passwd"]
    for key in keys:
        assert key
        assert not key.startswith(("/", "__"))
        assert not set(key) & set("\n\r\0.")


def test_odd_names_and_files_are_packed_or_counted(tmp_path):
    good = encoded(RGB)
    source = folder_of(tmp_path / "src", {"with space/new\nline.png": good, "with space/tab\t.png": good, "__meta__/x.png": good,
                                          "c/" + "x" * 240 + ".png": good, "c/bad\nname\t.png": b"rubbish"})  # fmt: skip
    (source / "c/folder.png").mkdir()
    os.mkfifo(source / "c/pipe.png")
    content = pack(source, tmp_path / "out", max_bad=0.3)
    assert (content["samples"], content["rejected"]) == (4, 1)
    assert content["others"] == {"no regular files": 1}
    assert_sound(open_index(tmp_path / "out"))
    assert list(rejected(tmp_path / "out")) == [f"{source}/c/bad\\nname\\t.png"]


def test_folders_and_files_that_cannot_be_read_are_rejected_and_counted(tmp_path, monkeypatch):
    source = folder_of(tmp_path / "src", {f"{folder}/{i}.png": encoded(noise(i, 4, 4)) for folder in "ab" for i in range(3)})
    real = os.scandir

    def scandir(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root may read everything

    class Opened(io.FileIO):
        def __init__(self, path, *arguments):
            if str(path).endswith("a/1.png"):
                raise PermissionError(13, "Permission denied", str(path))
            super().__init__(path, *arguments)

    monkeypatch.setattr(io, "FileIO", Opened)
    content = pack(source, tmp_path / "out", max_bad=0.6)
    assert (content["samples"], content["rejected"]) == (2, 2)
    assert rejected(tmp_path / "out") == {f"{source}/a/1.png": "Permission denied", f"{source}/b": "Permission denied"}


# Shards


def test_shards_are_of_bounded_bytes_unless_asked(tmp_path, monkeypatch):
    assert MOST_SAMPLES == 8192
    monkeypatch.setattr("mimetic.data.packing.plan.MOST_BYTES", 3000)
    index = packed(idx_files(tmp_path / "src", noise(1, 20, 20, 20)), tmp_path / "out")  # 400 bytes each
    assert [shard["samples"] for shard in index.shards] == [7, 7, 6]


def test_a_rejected_image_shifts_no_other(tmp_path):
    source = grey_folder(tmp_path / "src", 12)
    whole = packed(source, tmp_path / "whole", samples_per_shard=3)
    names = {shard["name"]: keys_of(whole)[3 * i : 3 * i + 3] for i, shard in enumerate(whole.shards)}
    for key in [*names["shard-00001.tar"], names["shard-00002.tar"][0]]:
        (source / f"{key}.png").write_bytes(b"rubbish")
    index = packed(source, tmp_path / "out", samples_per_shard=3, max_bad=0.5)
    assert_sound(index)
    assert [shard["name"] for shard in index.shards] == [f"shard-0000{i}.tar" for i in (0, 2, 3)], "an empty one is left out"
    assert [shard["samples"] for shard in index.shards] == [3, 2, 3]
    assert index.shards[0] == whole.shards[0]
    assert index.shards[2] == whole.shards[3]


# Duplicates and splits


@pytest.mark.parametrize("workers", [1, 2])
def test_duplicates_are_left_out_and_counted_apart(tmp_path, workers):
    files = {f"{folder}/{i}.png": encoded(noise(i, 6, 6)) for folder in "ab" for i in range(5)}
    files |= {"a/empty1.png": b"", "a/empty2.png": b"", "a/x.png": b"rubbish", "b/x.png": b"rubbish"}
    source = folder_of(tmp_path / "src", files)
    content = pack(source, tmp_path / "out", dedup=True, max_bad=0.5, workers=workers, samples_per_shard=4)
    assert (content["samples"], content["rejected"], content["duplicates"]) == (5, 3, 6)
    told = rejected(tmp_path / "out")
    assert told[f"{source}/b/3.png"] == f"duplicate of {source}/a/3.png"
    index = open_index(tmp_path / "out")
    assert_sound(index)
    assert sorted(keys_of(index)) == [f"a/{i}" for i in range(5)]
    assert pack(source, tmp_path / "all", max_bad=0.5)["samples"] == 10


def test_a_split_depends_on_the_key_alone(tmp_path):
    source = folder_of(tmp_path / "src", {f"{'ab'[i % 2]}/{i}.png": encoded(noise(i, 4, 4)) for i in range(60)})
    (source / "a/bad.png").write_bytes(b"rubbish")
    sides = []
    for _ in range(2):
        content = pack(source, tmp_path / "out", val=0.25, max_bad=0.1)
        sides.append({name: set(keys_of(open_index(tmp_path / "out" / name))) for name in ("train", "val")})
        folder_of(source, {f"{'ab'[i % 2]}/{i}.png": encoded(noise(i, 4, 4)) for i in range(60, 80)})
    assert content["samples"] + content["val"]["samples"] == 80
    for name in ("train", "val"):
        assert sides[0][name] < sides[1][name]
        index = open_index(tmp_path / "out" / name)
        assert_sound(index)
        assert index.classes == ["a", "b"]
    assert 10 <= len(sides[1]["val"]) <= 30
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]
    with pytest.raises(DataError, match=r"--val 1e-09 leaves no image of 81 for val; use a larger share"):
        pack(source, tmp_path / "none", val=1e-9)
    (tmp_path / "out/val/mine.txt").touch()
    with pytest.raises(SettingError, match=r"holds val/mine\.txt, which is no shard"):
        pack(source, tmp_path / "out")


# Other sizes and formats


def test_larger_pictures_are_made_smaller_and_smaller_ones_stay(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = np.dstack([np.tile(np.linspace(0, 255, 80, dtype=np.uint8), (60, 1))] * 3)
    files = {"wide.png": encoded(ramp), "turned.jpg": encoded(ramp, "jpeg", exif=exif, quality=95), "small.webp": encoded(RGB, "webp"),
             "tall.bmp": encoded(ramp.swapaxes(0, 1).copy(), "bmp")}  # fmt: skip
    source = folder_of(tmp_path / "src", files)
    index = packed(source, tmp_path / "out", short_side=30)
    ours = contents(index)
    assert_sound(index)
    sizes = {key: Image.open(io.BytesIO(content)).size for key, content in ours.items()}
    assert sizes == {"wide": (40, 30), "turned": (30, 40), "small": (7, 9), "tall": (30, 40)}
    assert ours["small"] == files["small.webp"]
    for key, kind in {"wide": "PNG", "turned": "JPEG", "tall": "PNG"}.items():
        assert Image.open(io.BytesIO(ours[key])).format == kind
    wide = decode(ours["wide"], 3)[0]
    assert np.abs(wide.astype(int) - np.linspace(1.6, 253.4, 40)).max() < 3, "the ramp, antialiased"
    assert decode(ours["turned"], 3)[0][:, 5].argmax() > 35, "upright"


@pytest.mark.parametrize("form", ["jpeg", "png", "webp"])
def test_formats_are_changed_on_request(tmp_path, form):
    files = {"a.png": encoded(RGB), "b.jpg": encoded(RGB, "jpeg"), "c.webp": encoded(RGB, "webp"), "d.npy": as_npy(RGB),
             "e.png": encoded(Image.fromarray(RGB).convert("RGBA")),
             "f.tif": encoded(noise(1, 9, 7).astype(np.uint16) << 8, "tiff")}  # fmt: skip
    index = packed(folder_of(tmp_path / "src", files), tmp_path / "out", format=form)
    assert_sound(index)
    assert {Image.open(io.BytesIO(content)).format.lower() for content in contents(index).values()} == {form}
    same = {"jpeg": "b.jpg", "png": "a.png", "webp": "c.webp"}[form]
    assert contents(index)[same[0]] == files[same], "what is of this format already stays as it is"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_side": 0}, "--short-side is 0"), ({"format": "gif"}, "--format is gif; use jpeg, png, webp"),
        ({"quality": 80}, "--quality is for JPEG and WebP"), ({"format": "png", "quality": 80}, "--quality is for JPEG and WebP"),
        ({"format": "jpeg", "quality": 101}, r"--quality is 101; it must be in \[1, 100\]"), ({"val": 1.0}, "--val is 1.0"),
        ({"short_side": 8, "channels": 5}, "--channels is 5; --short-side and --format are for pictures"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_one_line(tmp_path, options, message):
    with pytest.raises(SettingError, match=message):
        pack(grey_folder(tmp_path / "src", 3), tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_statistics_of_many_images_come_from_some_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr("mimetic.data.packing.moments.MEASURED", 16)
    index = packed(grey_folder(tmp_path / "src", 50), tmp_path / "out", samples_per_shard=7)
    assert json.loads((tmp_path / "out/index.json").read_text())["image"]["measured"] == 16
    assert abs(index.mean[0] - 0.5) < 0.03


def test_few_large_images_are_measured_and_large_photographs_at_a_part_of_their_size(tmp_path):
    sets = {(10, 10): 10, (9000, 9000 * 48_000): 512, (9000, 9000 << 20): 64, (50, 50 << 30): 50}
    assert {given: how_many_measured(*given) for given in sets} == sets
    assert evenly(10, 5).tolist() == [0, 2, 4, 6, 8]
    smooth = np.asarray(Image.fromarray(noise(1, 12, 16, 3)).resize((1600, 1200), Image.Resampling.BICUBIC)).astype(int)
    content = encoded((smooth + noise(2, 1200, 1600, 3) // 8).clip(0, 255).astype(np.uint8), "jpeg", quality=95)
    assert len(content) > LARGE
    whole, part = decode(content, 3), pixels_to_measure(content, 3)
    assert part.shape == (3, 600, 800)
    np.testing.assert_allclose(part.mean((1, 2)), whole.mean((1, 2)), atol=1)
    np.testing.assert_allclose(part.std((1, 2)), whole.std((1, 2)), rtol=0.05)
    with pytest.raises(ValueError, match="truncated"):
        pixels_to_measure(content[:-1000], 3)
