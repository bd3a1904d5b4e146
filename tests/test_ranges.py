"""Images deeper than 8 bits: what a pixel range makes of them, from packing to batches, against plain NumPy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from imagesets import as_npy, encoded, folder_of, noise
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from mimetic import cli
from mimetic.backbones.catalog import create_backbone
from mimetic.backbones.files import save_backbone
from mimetic.data.checking import check_shards
from mimetic.data.decode import decode
from mimetic.data.index import open_index
from mimetic.data.indexing import index_tars
from mimetic.data.jitter import jittered
from mimetic.data.masks import BlockMasks
from mimetic.data.mixture import Mixture
from mimetic.data.opening import open_held_out
from mimetic.data.pack import pack
from mimetic.data.picture import Picture
from mimetic.data.stream import ShardStream, pixels
from mimetic.data.views import Augmentation, ClassifyViews, Normalize, PretrainViews, resized
from mimetic.engine.errors import DataError, SettingError
from mimetic.report.attention import _read, draw_attention


def deep(seed: int, *shape: int, low: int = 0, high: int = 4096, dtype: type = np.uint16) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def expected(array: np.ndarray, low: float, high: float) -> np.ndarray:
    """(C, H, W) as the definition has it, in float64."""
    return np.clip((array.astype(np.float64) - low) / (high - low), 0, 1).transpose(2, 0, 1)


def typed(monkeypatch, capsys, *words) -> str:
    monkeypatch.setattr("sys.argv", ["mimetic", *map(str, words)])
    capsys.readouterr()
    cli.dispatch()
    return capsys.readouterr().out


def batch_of(folder: Path, **options) -> dict:
    return next(iter(ShardStream(open_index(folder), 16, shuffle=False, **options)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", ">u2", "float16", "float32", "float64"])
def test_arrays_of_every_dtype_are_mapped_as_defined(dtype):
    array = (np.random.default_rng(0).random((6, 5, 4)) * 200 + 10).astype(dtype)
    for low, high in ((0, 255), (30.5, 111), (-7, 1e5)):
        ours = decode(as_npy(array), 4, (low, high))
        assert ours.dtype == np.float32
        assert np.abs(ours - expected(array, low, high)).max() < 2e-7
        picture = Picture(as_npy(array), 4, (low, high))
        assert (picture.crop((1, 2, 3, 2)).numpy() == ours[:, 1:4, 2:4]).all()


def test_a_narrow_range_far_from_zero_keeps_its_digits():
    array = 1e6 + np.random.default_rng(0).random((8, 8, 1))
    assert np.abs(decode(as_npy(array), 1, (1e6, 1e6 + 1))[0] - (array[..., 0] - 1e6)).max() < 1e-7


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_sixteen_bit_pictures_keep_all_bits(kind):
    grey = deep(1, 9, 7, high=65536)
    for channels in (1, 3):
        ours = decode(encoded(grey, kind), channels, (100, 5000))
        assert ours.shape == (channels, 9, 7)
        assert np.abs(ours - expected(grey[..., None], 100, 5000)).max() < 2e-7


def test_pictures_of_floats_and_of_8_bits_have_the_numbers_of_the_file():
    floats = np.random.default_rng(2).normal(0, 3, (5, 6)).astype(np.float32)
    assert np.abs(decode(encoded(floats, "tiff"), 1, (-2, 4)) - expected(floats[..., None], -2, 4)).max() < 2e-7
    colours = noise(3, 16, 16, 3)
    assert np.abs(decode(encoded(colours), 3, (0, 510)) - expected(colours, 0, 510)).max() < 2e-7
    photo = encoded(colours, "jpeg")
    assert np.abs(decode(photo, 3, (0, 255)) - decode(photo, 3) / 255).max() < 2e-7
    assert np.abs(Picture(photo, 3, (0, 255)).crop((2, 3, 9, 8)).numpy() - decode(photo, 3)[:, 2:11, 3:11] / 255).max() < 2e-7


def test_deep_colours_that_would_be_cut_are_refused(tmp_path):
    rgb16 = b"P6 2 2 65535\n" + bytes(24)
    with pytest.raises(ValueError, match=r"16 bits a colour.*\.npy"):
        decode(rgb16, 3, (0, 65535))
    assert decode(b"P6 # note\n2 2 255\n" + bytes(12), 3, (0, 255)).shape == (3, 2, 2)
    tiny = Path(tmp_path / "deep.png")
    tiny.write_bytes(_png_of_16_bit_colours())
    assert decode(tiny.read_bytes(), 3).shape == (3, 2, 2)  # without a range: 8 of the 16
    with pytest.raises(ValueError, match="16 bits a colour"):
        decode(tiny.read_bytes(), 3, (0, 65535))


def _png_of_16_bit_colours() -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + bytes(range(12)) for _ in range(2))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_make_a_bad_image(tmp_path, bad):
    arrays = [np.random.default_rng(i).random((4, 4, 2)).astype(np.float32) for i in range(5)]
    arrays[3][1, 2, 0] = bad
    source = folder_of(tmp_path / "src", {f"{i}.npy": as_npy(array) for i, array in enumerate(arrays)})
    with pytest.raises(DataError, match=r"1 unreadable images, 0 are tolerated; the last: .*3\.npy .*not finite"):
        pack(source, tmp_path / "out", range=(0, 1))
    assert pack(source, tmp_path / "out", range=(0, 1), max_bad=0.2)["samples"] == 4
    assert "3.npy\tpixels that are not finite" in (tmp_path / "out/rejected.tsv").read_text()
    picture = Picture(as_npy(arrays[3]), 2, (0, 1))
    assert picture.failed
    assert picture.pixels().dtype == torch.float32
    assert not picture.pixels().any()


def test_from_packing_to_batches(tmp_path):
    arrays = [deep(i, 8, 6, 4, low=100, high=4200) for i in range(10)]
    source = folder_of(tmp_path / "src", {f"{i}.npy": as_npy(array) for i, array in enumerate(arrays)})
    content = pack(source, tmp_path / "out", range=(200, 4095), samples_per_shard=4)
    assert content["version"] == 2
    assert content["image"]["range"] == [200, 4095]
    values = np.stack(arrays)
    assert content["image"]["outside"] == round(((values < 200) | (values > 4095)).mean(), 6)
    index = open_index(tmp_path / "out")
    assert (index.range, index.channels) == ((200, 4095), 4)
    units = np.stack([expected(array, 200, 4095) for array in arrays])
    assert np.abs(np.array(index.mean) - units.mean((0, 2, 3))).max() < 1e-6
    assert np.abs(np.array(index.std) - units.std((0, 2, 3))).max() < 1e-6
    batch = batch_of(tmp_path / "out")
    assert batch["image"].dtype == torch.float32
    numbers = [int(key) for key in batch["keys"][:10]]
    assert np.abs(batch["image"][:10].numpy() - units[numbers]).max() < 2e-7
    rows, _ = pixels(index)
    assert np.abs(rows - units[numbers].reshape(10, -1)).max() < 2e-7
    assert check_shards(tmp_path / "out")[1] == []


def test_packing_and_indexing_agree_and_do_not_depend_on_workers(tmp_path):
    source = folder_of(tmp_path / "src", {f"{i}.npy": as_npy(np.random.default_rng(i).normal(0, 1, (5, 5, 3))) for i in range(12)})
    one, two = (pack(source, tmp_path / f"{n}", range=(-2, 2), samples_per_shard=5, workers=n) for n in (1, 2))
    assert (tmp_path / "1/index.json").read_bytes() == (tmp_path / "2/index.json").read_bytes()
    indexed = index_tars([tmp_path / "1"], tmp_path / "index", range=(-2, 2))
    assert indexed["image"] == one["image"] == two["image"]
    assert index_tars([tmp_path / "1"], tmp_path / "other", range=(-2, 2.5))["image"]["range"] == [-2, 2.5]
    fingerprints = {open_index(tmp_path / name).fingerprint for name in ("1", "index", "other")}
    assert len(fingerprints) >= 2


def test_an_index_without_a_range_says_nothing_of_it(tmp_path):
    source = folder_of(tmp_path / "src", {f"{i}.npy": as_npy(noise(i, 5, 5, 4)) for i in range(4)})
    assert set(pack(source, tmp_path / "out")["image"]) == {"channels", "mean", "std", "measured"}
    assert open_index(tmp_path / "out").range is None
    assert batch_of(tmp_path / "out")["image"].dtype == torch.uint8
    spoilt = json.loads((tmp_path / "out/index.json").read_text())
    for wrong in ([1, 1], [0], None, [0, float("nan")], ["0", "1"], 5):
        spoilt["image"]["range"] = wrong
        (tmp_path / "out/index.json").write_text(json.dumps(spoilt))
        with pytest.raises(DataError, match=r"index.json is damaged"):
            open_index(tmp_path / "out")


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_arrays_of_unknown_range_are_refused_with_the_command_that_would_do(tmp_path, dtype):
    arrays = [deep(i, 4, 4, 2, low=7, high=3001, dtype=dtype) for i in range(6)]
    arrays[0][0, 0, 0], arrays[1][0, 0, 1] = 7, 3000
    source = folder_of(tmp_path / "src", {f"{i}.npy": as_npy(array) for i, array in enumerate(arrays)})
    with pytest.raises(DataError, match=rf"^images of {np.dtype(dtype)} with values from 7 to 3000 \(6 looked at\): .*"
                       rf"`mimetic pack {source} {tmp_path}/out --range 7 3000`$"):  # fmt: skip
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    floats = {f"{i}.tiff": encoded(array[..., 0].astype(np.float32), "tiff") for i, array in enumerate(arrays)}
    folder_of(tmp_path / "tiff", floats)
    with pytest.raises(DataError, match=rf"^images of float32 .*`mimetic pack {tmp_path}/tiff {tmp_path}/out --range "):
        pack(tmp_path / "tiff", tmp_path / "out")
    pack(source, tmp_path / "out", range=(7, 3000))
    with pytest.raises(DataError, match=rf"`mimetic index {tmp_path}/out --range 7 3000`"):
        index_tars([tmp_path / "out"], tmp_path / "index")


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
def test_the_range_that_is_named_can_be_typed(tmp_path, scale):
    """A command line takes -1e-06 for a flag."""
    arrays = {f"{i}.npy": as_npy((scale * (deep(i, 4, 4, 2) - 2000.0)).astype(np.float32)) for i in range(4)}
    with pytest.raises(DataError) as refusal:
        pack(folder_of(tmp_path / "src", arrays), tmp_path / "out")
    command = str(refusal.value).split("`")[1].split()
    low, high = cli.parser().parse_args(command[1:]).range
    assert low < 0 < high
    assert pack(tmp_path / "src", tmp_path / "out", range=(low, high))["image"]["outside"] < 0.05


def test_the_commands_as_they_are_typed(tmp_path, monkeypatch, capsys):
    source = folder_of(tmp_path / "src", {f"{i}.png": encoded(deep(i, 6, 6, low=0, high=1000)) for i in range(20)})
    said = typed(monkeypatch, capsys, "pack", source, tmp_path / "eight", "--workers", 1)
    assert "pictures of uint16 with values from " in said
    assert f"(20 looked at) are cut to 8 bits; `mimetic pack {source} {tmp_path}/eight --range " in said
    assert open_index(tmp_path / "eight").range is None
    said = typed(monkeypatch, capsys, "pack", source, tmp_path / "out", "--range", "-100", "899.5", "--workers", 1)
    share = np.mean([deep(i, 6, 6, low=0, high=1000) > 899 for i in range(20)])
    assert f"{100 * round(share, 6):.3g} % of pixel values outside --range -100 899.5 clamped" in said
    assert "8 bits" not in said
    assert "sound, 20 images" in typed(monkeypatch, capsys, "check", tmp_path / "out")
    said = typed(monkeypatch, capsys, "index", tmp_path / "out", "--out", tmp_path / "index", "--range", "0", "1000")
    assert "0 % of pixel values outside --range 0 1000 clamped" in said
    assert batch_of(tmp_path / "index")["image"].dtype == torch.float32


def test_contradictions_are_one_line(tmp_path):
    source = folder_of(tmp_path / "src", {"0.npy": as_npy(deep(0, 4, 4, 3))})
    for wrong in ((5, 5), (5, 4), (0, float("inf")), (float("nan"), 1)):
        with pytest.raises(SettingError, match=r"--range is .*LOW, which becomes 0, must be below HIGH"):
            pack(source, tmp_path / "out", range=wrong)
    with pytest.raises(SettingError, match="--range 0 5 keeps all bits"):
        pack(source, tmp_path / "out", range=(0, 5), short_side=3)
    for name, limits in (("a", (0, 4095)), ("b", (0, 65535))):
        pack(source, tmp_path / name, range=limits)
    pack(folder_of(tmp_path / "plain", {"0.npy": as_npy(noise(0, 4, 4, 3))}), tmp_path / "c")
    a, b, c = (open_index(tmp_path / name) for name in "abc")
    with pytest.raises(SettingError, match=r"/b has the pixel range 0 65535, .*/a has the pixel range 0 4095; sets that are mixed"):
        Mixture((a, b), (1, 1), 10)
    with pytest.raises(SettingError, match=r"/c has 8-bit pixels, .*/a has the pixel range 0 4095"):
        Mixture((a, c), (1, 1), 10)
    assert Mixture((a, a), (1, 1), 10).range == (0, 4095)
    with pytest.raises(SettingError, match=r"b has the pixel range 0 65535, the training data the pixel range 0 4095"):
        open_held_out(tmp_path / "b", a)


# Views of floats

SEEDS = np.arange(8, dtype=np.uint64)


def test_views_of_floats_are_those_of_bytes_to_a_few_grey_levels():
    blocks = [torch.from_numpy(noise(i, 3, 5, 6)).repeat_interleave(8, 1).repeat_interleave(8, 2) for i in range(8)]
    faint = [image // 2 + 64 for image in blocks]  # edges overshoot, but not beyond 0 and 255
    views = PretrainViews(24, 16, Augmentation((0.3, 1.0)), BlockMasks((4, 4), 6, 2))
    ours, theirs = views([image / 255 for image in faint], SEEDS), views(faint, SEEDS)
    assert torch.equal(ours["hidden"], theirs["hidden"])
    for name in ("image", "target"):
        assert ours[name].dtype == torch.float32
        assert (ours[name] - theirs[name] / 255).abs().max() < 2.1 / 255  # torch's integer weights are a little coarse
        assert (ours[name] - theirs[name] / 255).abs().mean() < 0.5 / 255
    stark = views([image / 255 for image in blocks], SEEDS)
    assert all((stark[name].min(), stark[name].max()) == (0, 1) for name in ("image", "target"))  # where they do they are clamped


def test_floats_are_not_cut_to_8_bits_on_their_way():
    faint = [torch.rand(1, 24, 24, generator=torch.Generator().manual_seed(i)) / 1000 for i in range(4)]
    batch = ClassifyViews(12, Augmentation((0.5, 1.0), jitter=0.4))(faint, SEEDS[:4])["image"]
    assert 0 < batch.max() < 0.002
    assert len(batch.unique()) > 500
    (same,) = resized(iter(faint), 4, (24, "bicubic"))
    assert torch.equal(same, torch.stack(faint))
    assert torch.equal(Normalize((0.2,), (0.5,))(batch), (batch - 0.2) / 0.5)


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_jitter_of_floats_is_torchvisions_and_that_of_bytes(step, factor):
    image = torch.from_numpy(noise(step, 3, 20, 30))
    factors = np.ones(3)
    factors[step] = factor
    ours = jittered(image / 255, factors, np.array([step]))
    theirs = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)[step](image / 255, factor)
    assert (ours - theirs).abs().max() < 2e-3  # weights of grey: 77, 150 and 29 of 256
    integers = jittered(image, factors, np.array([step])).float() + 0.5 * (factor != 1)  # which cut off
    assert (ours - integers / 255).abs().mean() < 0.6 / 255
    assert (ours - integers / 255).abs().max() < 2 / 255


def test_jitter_of_floats_in_any_order_stays_in_range_and_leaves_more_channels_alone():
    image = torch.rand(3, 9, 9)
    for order in ((0, 1, 2), (2, 1, 0)):
        changed = jittered(image, np.array([1.8, 0.3, 1.9]), np.array(order))
        assert changed.min() >= 0
        assert changed.max() <= 1
    assert not torch.equal(jittered(image, np.array([1.8, 0.3, 1.9]), np.array([0, 1, 2])),
                           jittered(image, np.array([1.8, 0.3, 1.9]), np.array([2, 1, 0])))  # fmt: skip
    four = torch.rand(4, 9, 9)
    assert jittered(four, np.array([2, 2, 2.0]), np.arange(3)) is four


def test_bytes_take_the_path_they_took(tmp_path):
    """The same picture packed with the range 0 255 gives the same views, in floats."""
    source = folder_of(tmp_path / "src", {f"{i}.png": encoded(Image.fromarray(noise(i, 6, 7, 3)).resize((40, 40))) for i in range(6)})
    pack(source, tmp_path / "plain")
    pack(source, tmp_path / "ranged", range=(0, 255))
    transform = PretrainViews(24, 16, Augmentation((0.3, 1.0)), None)
    plain, ranged = (batch_of(tmp_path / name, transform=transform) for name in ("plain", "ranged"))
    assert plain["keys"] == ranged["keys"]
    assert (plain["image"].dtype, ranged["image"].dtype) == (torch.uint8, torch.float32)
    assert (plain["image"] / 255 - ranged["image"]).abs().max() < 2.1 / 255
    assert open_index(tmp_path / "ranged").mean == pytest.approx(open_index(tmp_path / "plain").mean, abs=2e-6)


def test_attention_looks_at_arrays_as_the_data_has_them(tmp_path):
    backbone = create_backbone("vit_tiny_patch16_224", 0, 16, 5, embed_dim=24, depth=2, num_heads=2, patch_size=4)
    save_backbone(backbone, tmp_path / "net", mean=[0.5] * 5, std=[0.25] * 5)
    array = deep(0, 16, 16, 5)
    (tmp_path / "tile.npy").write_bytes(as_npy(array))
    shown_HWC, image_BCHW = _read(tmp_path / "tile.npy", backbone, tmp_path / "net", (0, 4095))
    assert np.abs(image_BCHW[0].numpy() - (expected(array, 0, 4095) - 0.5) / 0.25).max() < 1e-5
    assert np.abs(shown_HWC.transpose(2, 0, 1) / 255 - expected(array, 0, 4095)[:3]).max() < 0.51 / 255
    (tmp_path / "wide.npy").write_bytes(as_npy(np.pad(np.repeat(np.repeat(array, 2, 0), 2, 1), ((0, 0), (10, 10), (0, 0)))))
    _, smaller_BCHW = _read(tmp_path / "wide.npy", backbone, tmp_path / "net", (0, 4095))
    assert np.corrcoef(smaller_BCHW.flatten(), image_BCHW.flatten())[0, 1] > 0.9  # the centre, made smaller
    draw_attention(tmp_path / "net", tmp_path / "tile.npy", tmp_path / "a.png", range=(0, 4095))
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.width > 500
    with pytest.raises(DataError, match=r"tile.npy is no readable image \(npy of uint16"):
        draw_attention(tmp_path / "net", tmp_path / "tile.npy", tmp_path / "a.png")
    with pytest.raises(SettingError, match=r"5 channels; a picture has 1 or 3, give a \.npy"):
        draw_attention(tmp_path / "net", tmp_path / "tile.png", tmp_path / "a.png")


def test_attention_sees_16_bits_as_data_without_a_range_does(tmp_path):
    backbone = create_backbone("vit_tiny_patch16_224", image_size=16, in_channels=1, patch_size=4, embed_dim=32, depth=1, num_heads=2)
    save_backbone(backbone, tmp_path / "backbone", mean=[0.5], std=[0.25])
    (tmp_path / "deep.png").write_bytes(encoded(deep(0, 16, 16, high=65536)))
    shown_HWC, _ = _read(tmp_path / "deep.png", backbone, tmp_path / "backbone", None)
    assert np.array_equal(shown_HWC[..., 0], deep(0, 16, 16, high=65536) >> 8)
