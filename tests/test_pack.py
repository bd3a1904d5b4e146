"""Packing: every image of a source is in the shards once, whole, and where the index says; every damage is named."""

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset
from imagesets import as_npy, encoded, folder_of, grey_folder, idx_files, noise
from PIL import Image
from shardreading import assert_sound, contents, keys_of, labels
from tinyruns import files_of_at_most

from mimetic.data import index as index_module
from mimetic.data.decode import decode
from mimetic.data.index import Index, open_index
from mimetic.data.opening import draw_per_class
from mimetic.data.pack import pack
from mimetic.data.packing import channels as channels_module
from mimetic.data.packing.telling import pack_and_tell
from mimetic.engine.errors import DataError, SettingError

RGB = noise(0, 9, 7, 3)


def packed(source: Path, out: Path, **options) -> Index:
    pack(source, out, **options)
    return open_index(out)


def told(capsys: pytest.CaptureFixture[str], source: Path, out: Path, channels: int | None = None) -> str:
    """The last line of `mimetic pack`."""
    pack_and_tell(source, out, max_bad=0.5, channels=channels)
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()[-1]


# Sources


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_packed_with_their_labels_and_statistics(tmp_path, suffix):
    images, classes = noise(1, 23, 6, 5), noise(2, 23) % 4
    index = packed(idx_files(tmp_path / "src", images, classes, suffix), tmp_path / "out", samples_per_shard=10)
    assert_sound(index)
    assert [shard["samples"] for shard in index.shards] == [10, 10, 3]
    assert json.loads((tmp_path / "out/index.json").read_text())["image"]["measured"] == 23
    assert index.classes == ["0", "1", "2", "3"]
    for i, key in enumerate(keys_of(index)):
        number = int(key)
        assert index.rows["label"][i] == classes[number]
        assert (decode(index.read(i), 1)[0] == images[number]).all()
    pixels = images / 255
    assert index.channels == 1
    np.testing.assert_allclose([index.mean[0], index.std[0]], [pixels.mean(), pixels.std()], atol=1e-6)
    assert [hashlib.sha256((Path(index.home) / s["name"]).read_bytes()).hexdigest() for s in index.shards] == [
        s["sha256"] for s in index.shards
    ]


def test_idx_without_labels_is_unlabelled(tmp_path):
    index = packed(idx_files(tmp_path / "src", noise(1, 5, 4, 4)), tmp_path / "out")
    assert index.classes == []
    assert index.rows["label"].tolist() == [-1] * 5
    assert_sound(index)


def test_plain_webdataset_reads_the_shards(tmp_path):
    index = packed(grey_folder(tmp_path / "src", 7), tmp_path / "out", samples_per_shard=3)
    tars = [str(Path(index.home) / shard["name"]) for shard in index.shards]
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # webdataset leaves its files open
        samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert {sample["__key__"]: sample["png"] for sample in samples} == contents(index)


def test_sub_folders_are_classes_at_any_depth_below(tmp_path):
    names = ["dog/a.png", "dog/deep/er/b.png", "cat/a.png", "ant/z.PNG"]
    source = folder_of(tmp_path / "src", {name: encoded(noise(i, 4, 4)) for i, name in enumerate(names)})
    index = packed(source, tmp_path / "out")
    assert index.classes == ["ant", "cat", "dog"]
    assert labels(index) == {"dog/a": "dog", "dog/deep/er/b": "dog", "cat/a": "cat", "ant/z": "ant"}
    assert contents(index)["ant/z"] == (source / "ant/z.PNG").read_bytes()
    assert_sound(index)


def test_a_flat_folder_and_images_beside_sub_folders_are_unlabelled(tmp_path):
    flat = packed(grey_folder(tmp_path / "flat", 4), tmp_path / "out-flat")
    mixed = packed(folder_of(tmp_path / "mixed", {"a.png": encoded(RGB), "b/c.png": encoded(RGB)}), tmp_path / "out-mixed")
    for index in (flat, mixed):
        assert index.classes == []
        assert (index.rows["label"] == -1).all()
        assert_sound(index)


def test_why_a_tree_with_images_beside_its_sub_folders_has_no_labels_is_told(tmp_path, capsys):
    files = {f"{folder}/{i}.png": encoded(RGB) for folder in "ab" for i in range(2)}
    source = folder_of(tmp_path / "src", files)
    assert "4 images, 2 classes, 1 shard: " in told(capsys, source, tmp_path / "out")
    folder_of(source, {"cover.bmp": encoded(RGB, "bmp")})
    assert "5 images, no labels (cover.bmp lies beside the sub-folders; move it into one to have classes), " in told(
        capsys, source, tmp_path / "out"
    )
    folder_of(source, {f"{i}.png": encoded(RGB) for i in range(2)})
    assert "no labels (0.png and 2 more lie beside the sub-folders; move them into one" in told(capsys, source, tmp_path / "out")
    assert "7 images, no labels, 1 shard: " in told(capsys, grey_folder(tmp_path / "flat", 7), tmp_path / "out")


def test_files_of_other_kinds_are_counted(tmp_path, capsys):
    source = folder_of(grey_folder(tmp_path / "src", 3), {f"{i}.HEIC": b"photo" for i in range(9)})
    assert "3 images, no labels, 1 shard, 9 files of other kinds left out (.heic): " in told(capsys, source, tmp_path / "out")
    folder_of(source, dict.fromkeys(["a.txt", "b.txt", "README", ".DS_Store", "._0000.png", "._0001.png", ".git/HEAD"], b"x"))
    (source / "gone.png").symlink_to("nowhere")
    assert ", 16 files of other kinds left out (.heic, hidden, .txt ...): " in told(capsys, source, tmp_path / "out")
    with pytest.raises(DataError, match=r"no image in it, 1 file of other kinds left out \(no extension\); known are \.png"):
        pack(folder_of(tmp_path / "none", {"README": b"x"}), tmp_path / "out")


def test_shards_inside_the_source_are_no_images(tmp_path, capsys):
    source = grey_folder(tmp_path / "src", 3)
    first, second = (told(capsys, source, source / "shards") for _ in range(2))
    assert first == second
    assert first.startswith("3 images, no labels, 1 shard: ")


def test_a_tree_keeps_its_bytes_in_every_format(tmp_path):
    kinds = {"jpg": "jpeg", "jpeg": "jpeg", "jpe": "jpeg", "jfif": "jpeg", "png": "png", "bmp": "bmp", "tif": "tiff", "tiff": "tiff",
             "gif": "gif", "webp": "webp", "ppm": "ppm", "pgm": "ppm", "pnm": "ppm"}  # fmt: skip
    files = {f"c/{suffix}.{suffix}": encoded(RGB, kind) for suffix, kind in kinds.items()} | {"c/npy.npy": as_npy(RGB)}
    index = packed(folder_of(tmp_path / "src", files), tmp_path / "out")
    assert contents(index) == {name.partition(".")[0]: content for name, content in files.items()}
    assert_sound(index)


def test_neighbours_in_a_shard_are_not_of_one_class(tmp_path):
    files = {f"{name}/{i}.png": encoded(noise(i, 2, 2)) for name in "abcd" for i in range(25)}
    rows = packed(folder_of(tmp_path / "src", files), tmp_path / "out").rows["label"]
    assert (rows[1:] == rows[:-1]).mean() < 0.4  # 0.25 by chance, 0.97 in the order of the folders


# Keys


def test_dots_and_collisions_give_distinct_keys(tmp_path):
    names = ["a.b.png", "a_b.png", "a.b.jpg", "a_b-1.png", "v1.0/x.png", "v1_0/x.png"]
    source = folder_of(tmp_path / "src", {name: encoded(noise(i, 4, 4)) for i, name in enumerate(names)})
    index = packed(source, tmp_path / "out")
    assert_sound(index)
    assert sorted(contents(index).values()) == sorted((source / name).read_bytes() for name in names)


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff"])
def test_unicode_and_long_names_keep_their_offsets(tmp_path, kind):
    stems = ["日本語/Grüße 🦊", "é" * 60 + "/" + "ü" * 60, "x" * 120 + "/" + "y" * 120 + "/" + "z" * 90, "x/" + "k" * 94]
    source = folder_of(tmp_path / "src", {f"{stem}.{kind}": encoded(noise(i, 5, 4), kind) for i, stem in enumerate(stems)})
    index = packed(source, tmp_path / "out")
    assert_sound(index)
    assert contents(index) == {stem: (source / f"{stem}.{kind}").read_bytes() for stem in stems}
    assert labels(index) == {stem: stem.partition("/")[0] for stem in stems}


def test_names_that_are_no_utf8_are_packed(tmp_path):
    (tmp_path / "src").mkdir()
    good, bad = encoded(noise(1, 4, 4)), b"no picture"
    for name, content in ((b"a\xff.png", good), (b"b\xfe.png", bad), (b"c.png", good)):
        Path(os.fsdecode(os.fsencode(tmp_path / "src") + b"/" + name)).write_bytes(content)
    index = packed(tmp_path / "src", tmp_path / "out", max_bad=0.5)
    assert_sound(index)
    assert set(contents(index)) == {"a\ufffd", "c"}
    assert "b\ufffd.png" in (tmp_path / "out" / "rejected.tsv").read_text()


def test_hidden_files_are_left_out_and_linked_folders_are_not(tmp_path):
    good = encoded(noise(1, 4, 4))
    elsewhere = folder_of(tmp_path / "elsewhere", {"w.png": good})
    files = {"a/x.png": good, "a/._x.png": b"resource fork", "a/.thumbnails/x.png": good, ".cache/y.png": good, "a/notes.txt": b"text"}
    (folder_of(tmp_path / "src", files) / "b").symlink_to(elsewhere)
    index = packed(tmp_path / "src", tmp_path / "out", max_bad=0)
    assert labels(index) == {"a/x": "a", "b/w": "b"}


def test_links_that_lead_back_or_cross_come_to_an_end(tmp_path):
    source = folder_of(tmp_path / "src", {"a/x.png": encoded(RGB), "b/y.png": encoded(RGB)})
    for link, target in (("self", "."), ("a/self", "."), ("a/up", ".."), ("a/cross", "../b"), ("b/cross", "../a")):
        (source / link).symlink_to(target)
    assert labels(packed(source, tmp_path / "out")) == {"a/x": "a", "a/cross/y": "a", "b/y": "b", "b/cross/x": "b"}
    hub = folder_of(tmp_path / "hub", {f"c/{i}/x.png": encoded(RGB) for i in range(12)})
    for i in range(12):
        for j in range(12):
            (hub / f"c/{i}/to-{j}").symlink_to(f"../{j}")  # 12! paths
    assert len(packed(hub, tmp_path / "out")) == 12


# Pixels


def test_one_grey_picture_makes_no_colour_set_grey(tmp_path):
    for grey in range(5):  # at each place of the order in turn, so once at the first
        files = {f"{i}.png": encoded(noise(i, 6, 6) if i == grey else noise(i, 6, 6, 3)) for i in range(5)}
        index = packed(folder_of(tmp_path / "src", files), tmp_path / "out")
        assert index.channels == 3
        pixels = np.stack([decode(index.read(i), 3) for i in range(5)]) / 255
        np.testing.assert_allclose(index.mean, pixels.mean((0, 2, 3)), atol=1e-6)
        np.testing.assert_allclose(index.std, pixels.std((0, 2, 3)), atol=1e-6)


def test_arrays_keep_their_channels_and_say_which_dtype_is_wanted(tmp_path):
    arrays = [noise(i, 6, 5, 5) for i in range(6)]
    files = {f"{i}.npy": as_npy(array) for i, array in enumerate(arrays)} | {"f.npy": as_npy(np.zeros((6, 5, 7), np.float32))}
    index = packed(folder_of(tmp_path / "src", files), tmp_path / "out", max_bad=0.2)
    assert index.channels == 5
    for i, key in enumerate(keys_of(index)):
        assert (decode(index.read(i), 5) == arrays[int(key)].transpose(2, 0, 1)).all()
    assert "npy of float32 (6, 5, 7); it must be uint8 (H, W, C)" in (tmp_path / "out" / "rejected.tsv").read_text()


def test_a_coloured_picture_counts_wherever_it_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(channels_module, "LOOK", 2)
    for coloured in range(5):
        files = {f"{i}.png": encoded(noise(i, 6, 6, 3) if i == coloured else noise(i, 6, 6)) for i in range(5)}
        assert packed(folder_of(tmp_path / "src", files), tmp_path / "out").channels == 3


def test_an_odd_array_among_photos_is_rejected_not_they(tmp_path):
    odd = as_npy(noise(1, 6, 6, 5))
    source = folder_of(tmp_path / "src", {f"{i}.png": encoded(noise(i, 6, 6, 3)) for i in range(9)} | {"odd.npy": odd})
    assert packed(source, tmp_path / "out", max_bad=0.1).channels == 3
    assert (tmp_path / "out" / "rejected.tsv").read_text() == f"{source}/odd.npy\t5 channels, where 3 are wanted\n"
    source = folder_of(tmp_path / "arrays", {f"{i}.npy": odd for i in range(9)} | {"odd.png": encoded(GREY)})
    assert packed(source, tmp_path / "out", max_bad=0.1).channels == 5
    assert (tmp_path / "out" / "rejected.tsv").read_text() == f"{source}/odd.png\t3 channels, where 5 are wanted\n"


@pytest.mark.parametrize("kind", ["tree", "idx"])
def test_a_grey_set_is_packed_like_a_coloured_one_on_request(tmp_path, kind):
    source = idx_files(tmp_path / "src", noise(1, 6, 6, 6)) if kind == "idx" else grey_folder(tmp_path / "src", 6)
    grey, asked = packed(source, tmp_path / "grey"), packed(source, tmp_path / "asked", channels=3)
    assert (grey.channels, asked.channels) == (1, 3)
    assert contents(grey) == contents(asked)
    assert (asked.mean, asked.std) == (grey.mean * 3, grey.std * 3)
    with pytest.raises(DataError, match="3 channels, where 5 are wanted"):
        pack(source, tmp_path / "out", channels=5)
    with pytest.raises(SettingError, match="--channels is 0"):
        pack(source, tmp_path / "out", channels=0)


def test_a_coloured_set_is_packed_grey_on_request(tmp_path):
    index = packed(folder_of(tmp_path / "src", {"a.png": encoded(RGB)}), tmp_path / "out", channels=1)
    assert index.channels == 1
    assert index.mean[0] == pytest.approx(np.asarray(Image.fromarray(RGB).convert("L")).mean() / 255, abs=1e-6)


def test_large_pictures_are_read_in_silence_and_huge_ones_rejected(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns beyond, and stops beyond twice that
    files = {"small.png": noise(1, 10, 10), "large.png": noise(2, 40, 40), "huge.png": noise(3, 50, 50)}
    source = folder_of(tmp_path / "src", {name: encoded(pixels) for name, pixels in files.items()})
    assert "2 images, no labels, 1 shard, 1 unreadable" in told(capsys, source, tmp_path / "out")
    reason = "Image size (2500 pixels) exceeds limit of 2000 pixels; cut it into tiles"
    assert (tmp_path / "out" / "rejected.tsv").read_text() == f"{source}/huge.png\t{reason}\n"


GREY = noise(3, 9, 7)
PALETTE = Image.fromarray(RGB).quantize(16)


@pytest.mark.parametrize(
    ("picture", "options", "expected"),
    [
        (Image.fromarray(GREY), {}, np.repeat(GREY[..., None], 3, 2)),
        (Image.fromarray(np.dstack([GREY, 255 - GREY])), {}, np.repeat(GREY[..., None], 3, 2)),
        (Image.fromarray(np.dstack([RGB, GREY])), {}, RGB),
        (PALETTE, {}, np.asarray(PALETTE.convert("RGB"))),
        (PALETTE, {"transparency": bytes(range(16))}, np.asarray(PALETTE.convert("RGB"))),
        (Image.fromarray(GREY.astype(np.uint16) * 256 + 77), {}, np.repeat(GREY[..., None], 3, 2)),
        (Image.fromarray(GREY > 127), {}, np.repeat(((GREY > 127) * 255)[..., None], 3, 2)),
    ],
    ids=["grey", "grey-alpha", "alpha", "palette", "palette-transparent", "16-bit", "1-bit"],
)
def test_pictures_of_every_mode_come_as_rgb(picture, options, expected):
    assert (decode(encoded(picture, **options), 3) == expected.transpose(2, 0, 1)).all()


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    for kind in ("png", "tiff", "ppm"):
        assert (decode(encoded(ramp, kind), 1)[0] == ramp // 256).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pictures_without_a_known_range_are_refused(dtype):
    with pytest.raises(ValueError, match="32-bit"):
        decode(encoded(GREY.astype(dtype), "tiff"), 1)


@pytest.mark.parametrize(("orientation", "turned"), [(1, RGB), (2, RGB[:, ::-1]), (3, np.rot90(RGB, 2)), (6, np.rot90(RGB, -1)),
                                                     (8, np.rot90(RGB))])  # fmt: skip
def test_exif_orientation_is_applied(orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (decode(encoded(RGB, exif=exif), 3) == turned.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("array", [np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)])
def test_arrays_of_wrong_shape_are_refused(array):
    with pytest.raises(ValueError, match=r"npy of|channels"):
        decode(as_npy(array), 3)


@pytest.mark.filterwarnings("ignore")  # Pillow may warn of what it finds in the rubble
@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "tiff", "webp", "bmp", "npy"])
def test_damage_never_raises_anything_but_value_error(kind, capfd):
    whole = as_npy(RGB) if kind == "npy" else encoded(RGB, kind)
    random = np.random.default_rng(5)
    failures = 0
    for _ in range(150):
        content = bytearray(whole[: random.integers(len(whole))] if random.random() < 0.3 else whole)
        for place in random.integers(0, min(len(content), 100) or 1, random.integers(1, 4)):
            content[place : place + 1] = random.bytes(1)
        try:
            assert decode(bytes(content), 3).shape[0] == 3
        except ValueError:
            failures += 1
    assert failures > 20
    capfd.readouterr()  # libtiff talks on stderr


# Bad images


def test_bad_images_are_counted_listed_and_left_out(tmp_path):
    source = grey_folder(tmp_path / "src", 20)
    (source / "0003.png").write_bytes(b"")
    (source / "0007.png").write_bytes((source / "0007.png").read_bytes()[:60])
    content = pack(source, tmp_path / "out", max_bad=0.1)
    index = open_index(tmp_path / "out")
    assert (content["samples"], content["rejected"]) == (18, 2)
    assert set(contents(index)) == {f"{i:04d}" for i in range(20)} - {"0003", "0007"}
    lines = (tmp_path / "out" / "rejected.tsv").read_text().splitlines()
    assert {line.split("\t")[0] for line in lines} == {str(source / "0003.png"), str(source / "0007.png")}
    assert all(line.split("\t")[1] for line in lines)
    assert_sound(index)


def test_too_many_bad_images_stop_with_both_numbers_and_leave_nothing(tmp_path):
    source = grey_folder(tmp_path / "src", 20)
    for i in (2, 4):
        (source / f"{i:04d}.png").write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"2 unreadable images, 1 are tolerated.*000[24]\.png.*--max-bad"):
        pack(source, tmp_path / "out", max_bad=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_tolerated_share_is_not_lost_to_rounding(tmp_path):
    source = grey_folder(tmp_path / "src", 100, side=2)
    for i in range(29):
        (source / f"{i:04d}.png").write_bytes(b"rubbish")
    assert pack(source, tmp_path / "out", max_bad=0.29)["rejected"] == 29  # 0.29 * 100 is 28.999999999999996


def test_a_class_whose_only_image_is_bad_keeps_its_number(tmp_path):
    files = {"a/1.png": encoded(RGB), "b/1.png": b"rubbish", "c/1.png": encoded(RGB)}
    index = packed(folder_of(tmp_path / "src", files), tmp_path / "out", max_bad=0.5)
    assert index.classes == ["a", "b", "c"]
    assert labels(index) == {"a/1": "a", "c/1": "c"}
    with pytest.raises(SettingError, match="class b has 0 images, 1 per class"):
        draw_per_class(index, 1, seed=0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no such file or folder"),
        ({"notes.txt": b"text"}, "no image in it"),
        ({"a.png": b"rubbish", "b.png": b""}, "none of 2 images can be read"),
        ({"t10k-images-idx3-ubyte.gz": b"x", "train-images-idx3-ubyte": b"x"}, r"name the one to pack: t10k.*train"),
    ],
    ids=["missing", "empty", "all-unreadable", "folder-of-idx"],
)
def test_sources_without_an_image_are_named(tmp_path, files, message):
    with pytest.raises(DataError, match=message) as caught:
        pack(folder_of(tmp_path / "src", files), tmp_path / "out", max_bad=1)
    assert str(tmp_path / "src") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_damaged_idx_files_are_named(tmp_path):
    images = idx_files(tmp_path / "a", noise(1, 5, 4, 4), noise(2, 4))
    with pytest.raises(DataError, match="has 4 labels, train-images-idx3-ubyte has 5 images"):
        pack(images, tmp_path / "out")
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(DataError, match="cut off: 79 values, its header says 80"):
        pack(images, tmp_path / "out")
    gz = idx_files(tmp_path / "b", noise(1, 5, 4, 4), suffix=".gz")
    gz.write_bytes(gz.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"idx3-ubyte\.gz"):
        pack(gz, tmp_path / "out")
    with pytest.raises(DataError, match=r"shape \(4,\)"):
        pack(tmp_path / "a" / "train-labels-idx1-ubyte", tmp_path / "out")
    with pytest.raises(DataError, match="no idx file"):
        pack(folder_of(tmp_path / "c", {"photo.png": encoded(RGB)}) / "photo.png", tmp_path / "out")


def test_damage_in_the_header_of_idx_files_is_named(tmp_path):
    images = idx_files(tmp_path / "a", noise(1, 5, 4, 4), noise(2, 5, 1))
    with pytest.raises(DataError, match=r"labels-idx1-ubyte: an idx file of shape \(5, 1\); labels have 1 dimension"):
        pack(images, tmp_path / "out")
    images.write_bytes(images.read_bytes()[:9])
    with pytest.raises(DataError, match="images-idx3-ubyte is cut off: 9 bytes, its header alone has 16"):
        pack(images, tmp_path / "out")
    with pytest.raises(DataError, match=r"images-idx3-ubyte: an idx file of shape \(0, 4, 4\)"):
        pack(idx_files(tmp_path / "empty", noise(1, 0, 4, 4), noise(1, 0)), tmp_path / "out")
    gz = idx_files(tmp_path / "b", noise(1, 5, 4, 4), suffix=".gz")
    content = gz.read_bytes()
    gz.write_bytes(content[:10] + bytes(255 - byte for byte in content[10:20]) + content[20:])
    with pytest.raises(DataError, match=r"idx3-ubyte\.gz: Error -3"):
        pack(gz, tmp_path / "out")


# The folder that is written


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_equal_images_give_equal_bytes(tmp_path):
    names = ["b/2.png", "a/1.png", "a/3.jpg"]
    for copy, order in (("one", names), ("two", names[::-1])):
        folder_of(tmp_path / copy, {name: encoded(noise(len(name), 5, 5), "png" if "png" in name else "jpeg") for name in order})
        os.utime(tmp_path / copy / "a/1.png", (1, len(copy) * 1e9))
        pack(tmp_path / copy, tmp_path / f"out-{copy}", samples_per_shard=2)
    assert hashes(tmp_path / "out-one") == hashes(tmp_path / "out-two")
    assert len(hashes(tmp_path / "out-one")) == 5


def test_names_that_mean_something_to_writers_are_plain_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in ("100%d", "pipe:x/%05d", "at 10:30"):
        assert_sound(packed(grey_folder(tmp_path / "src", 3), Path(out), samples_per_shard=2))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    pack(tmp_path / "src", Path("."))
    assert len(open_index(tmp_path / "here")) == 3


def test_what_is_no_shard_of_ours_is_never_overwritten(tmp_path):
    source = grey_folder(tmp_path / "data" / "raw", 3)
    with pytest.raises(SettingError, match="raw"):
        pack(source, tmp_path / "data")
    pack(source, tmp_path / "out")
    pack(source, tmp_path / "out")  # its own shards it replaces
    (tmp_path / "out" / "my notes.txt").write_text("dear")
    with pytest.raises(SettingError, match=r"my notes\.txt.*new folder"):
        pack(source, tmp_path / "out")
    assert (tmp_path / "out" / "my notes.txt").read_text() == "dear"
    shutil.copy(tmp_path / "out" / "shard-00000.tar", folder_of(tmp_path / "theirs", {"shard-00000.tar": b""}))
    with pytest.raises(SettingError, match=r"no index\.json"):
        pack(source, tmp_path / "theirs")
    with pytest.raises(SettingError, match="is a file"):
        pack(source, tmp_path / "out" / "index.json")
    with pytest.raises(SettingError, match="--max-bad is 2"):
        pack(source, tmp_path / "new", max_bad=2)


def test_an_interrupted_run_leaves_the_old_shards(tmp_path):
    source = grey_folder(tmp_path / "src", 6)
    pack(source, tmp_path / "out")
    before = hashes(tmp_path / "out")

    def interrupted(images, *_):
        if images == 3:
            raise KeyboardInterrupt

    folder_of(source, {"0006.png": encoded(noise(6, 8, 8))})
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", progress=interrupted)
    assert hashes(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src"]
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out", progress=interrupted, samples_per_shard=2)
    assert hashes(tmp_path / "out") == before
    done = tmp_path / ".out.packing/done"
    assert len(list(done.glob("*.json"))) == 1, "a shard that is finished is kept"
    assert len(packed(source, tmp_path / "out", samples_per_shard=2)) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src"]


def test_a_run_killed_between_its_renames_gives_the_old_shards_back(tmp_path):
    source = grey_folder(tmp_path / "src", 6)
    pack(source, tmp_path / "out")
    before = hashes(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    with pytest.raises(DataError, match="no such file or folder"):
        pack(tmp_path / "misspelt", tmp_path / "out")
    assert hashes(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "src"]


@pytest.mark.parametrize(
    ("out", "reason"),
    [("file/x", "file is a file"), ("file/deep/x", "file is a file"), ("x" * 300, "File name too long"), ("x" * 250, "File name too long"),
     ("new/" + "x" * 250, "File name too long"), ("/proc/xx", "cannot be written")],
    ids=["in-a-file", "below-a-file", "long", "long-while-packing", "long-in-a-new-folder", "no-disk"],
)  # fmt: skip
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, out, reason):
    source = grey_folder(tmp_path / "src", 3)
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match=reason) as caught:
        pack(source, tmp_path / out)
    assert str(tmp_path / out) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "src"]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's, when it cannot end a shard
@pytest.mark.parametrize(("size", "samples_per_shard"), [(2_000, 500), (11_000, 1)], ids=["a-shard", "the-table"])
def test_a_full_disk_is_named_and_nothing_left_behind(tmp_path, size, samples_per_shard):
    source = grey_folder(tmp_path / "src", 500, side=2)
    with files_of_at_most(size), pytest.raises(DataError, match="new/out: the disk is full; nothing was left behind: free some space"):
        pack(source, tmp_path / "new" / "out", samples_per_shard=samples_per_shard)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


# The index


@pytest.fixture
def shards(tmp_path):
    pack(grey_folder(tmp_path / "src", 7), tmp_path / "out", samples_per_shard=3)
    return tmp_path / "out"


def test_an_index_opens_by_file_or_folder(shards):
    assert open_index(shards).fingerprint == open_index(shards / "index.json").fingerprint


def damage_json(folder: Path, **changes) -> None:
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "index.json").unlink(), "no index.json there; make one with `mimetic pack"),
        (lambda f: (f / "index.json").write_text('{"version": 2, "sam'), "index.json is damaged"),
        (lambda f: (f / "index.json").write_text("[]"), "index.json is damaged"),
        (lambda f: damage_json(f, version=1), "index version 1, this program reads version 2"),
        (lambda f: damage_json(f, shards=[{}]), "index.json is damaged"),
        (lambda f: damage_json(f, shards=[]), "samples.npy holds"),
        (lambda f: (f / "samples.npy").unlink(), "index.json is damaged"),
        (lambda f: (f / "samples.npy").write_bytes(b""), "index.json is damaged"),
        (lambda f: (f / "samples.npy").write_bytes((f / "samples.npy").read_bytes()[:-5]), "index.json is damaged"),
        (lambda f: np.save(f / "samples.npy", np.zeros(7)), "samples.npy has 184 bytes, not"),
        (lambda f: np.save(f / "samples.npy", np.load(f / "samples.npy")[:-1]), r"samples.npy has \d+ bytes, not \d+"),
        (lambda f: (f / "shard-00001.tar").unlink(), r"shard-00001.tar: 0 bytes, the index says \d+"),
        (lambda f: os.truncate(f / "shard-00001.tar", 700), r"shard-00001.tar: 700 bytes, the index says \d+"),
    ],
)  # fmt: skip
def test_damage_is_named_when_the_index_is_opened(shards, damage, message):
    damage(shards)
    with pytest.raises(DataError, match=message) as caught:
        open_index(shards)
    assert str(shards) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shard_that_shrinks_or_vanishes_later_is_named_when_it_is_read(shards):
    index = open_index(shards)
    os.truncate(shards / "shard-00001.tar", 700)
    with pytest.raises(DataError, match=r"shard-00001.tar: sample \d{4} has \d+ of \d+ bytes"):
        index.read(4)
    (shards / "shard-00002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00002.tar: No such file"):
        index.read(6)


def test_shards_packed_anew_are_read_anew(tmp_path):
    for seed in (1, 2):
        source = folder_of(tmp_path / "src", {"a.png": encoded(noise(seed, 8, 8))})
        index = packed(source, tmp_path / "out")
        assert index.read(0) == (source / "a.png").read_bytes()


def test_few_shards_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "OPEN_SHARDS", 3)
    source = grey_folder(tmp_path / "src", 12, side=2)
    index = packed(source, tmp_path / "out", samples_per_shard=1)
    opened = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    for _ in range(2):
        assert contents(index) == {path.stem: path.read_bytes() for path in source.iterdir()}
    assert len(index_module._descriptors) == 3
    if opened:
        assert len(os.listdir("/proc/self/fd")) <= opened + 3


# Draws


def test_draws_per_class_are_even_repeatable_and_disjoint(tmp_path):
    images, classes = noise(1, 60, 2, 2), (np.arange(60) % 3).astype(np.uint8)
    index = packed(idx_files(tmp_path / "src", images, classes), tmp_path / "out")
    first, second = draw_per_class(index, 8, seed=4), draw_per_class(index, 12, seed=4, skip=8)
    assert np.bincount(index.rows["label"][first]).tolist() == [8, 8, 8]
    assert sorted([*first, *second]) == list(range(60))
    assert (draw_per_class(index, 8, seed=4) == first).all()
    assert (draw_per_class(index, 8, seed=5) != first).any()
    with pytest.raises(SettingError, match="class 0 has 20 images, 21 per class"):
        draw_per_class(index, 8, seed=4, skip=13)


def test_unlabelled_images_cannot_be_drawn_per_class(shards):
    with pytest.raises(SettingError, match="no labels"):
        draw_per_class(open_index(shards), 1, seed=0)
