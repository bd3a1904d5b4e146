"""JPEGs read by libjpeg-turbo against Pillow: whole, in boxes, at fractions of their size, turned, odd and damaged."""

import io
from itertools import pairwise

import numpy as np
import pytest
import simplejpeg
import torch
import torch.nn.functional as F
from imagesets import encoded, folder_of, noise
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images

from mimetic.data.decode import decode
from mimetic.data.index import open_index
from mimetic.data.jpeg import UPRIGHT, Jpeg
from mimetic.data.pack import pack
from mimetic.data.picture import Picture
from mimetic.data.stream import ShardStream
from mimetic.data.views import Augmentation, PretrainViews

PHOTO = load_sample_images().images[0][:203, :301]  # sides that no block of 8 or 16 divides
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def by_pillow(content: bytes, mode: str = "RGB") -> torch.Tensor:
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert(mode)
    array = np.array(picture)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def as_jpeg(picture: np.ndarray | Image.Image = PHOTO, **options) -> bytes:
    return encoded(picture, "jpeg", **options)


def turned(orientation: int, picture: np.ndarray | Image.Image = PHOTO, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return as_jpeg(picture, exif=exif, **options)


COLOUR = Image.fromarray(PHOTO)
KINDS = {
    "4:2:0": as_jpeg(), "4:2:2": as_jpeg(subsampling=1), "4:4:4": as_jpeg(subsampling=0), "progressive": as_jpeg(progressive=True),
    "restarts": as_jpeg(restart_marker_rows=2), "rgb": as_jpeg(keep_rgb=True), "grey": as_jpeg(COLOUR.convert("L")),
    "cmyk": as_jpeg(COLOUR.convert("CMYK")), "coarse": as_jpeg(quality=1), "tiny": as_jpeg(PHOTO[:1, :1]), "strip": as_jpeg(PHOTO[:2]),
    "turned": turned(6), "mirrored": turned(7), "nonsense orientation": turned(9), "xmp": as_jpeg(xmp=XMP),
    "trailing rubbish": as_jpeg() + b"rubbish",
}  # fmt: skip


@pytest.mark.parametrize("content", KINDS.values(), ids=KINDS)
def test_whole_pictures_are_pillows_to_the_last_bit(content):
    for channels, mode in ((3, "RGB"), (1, "L")):
        expected = by_pillow(content, mode)
        picture = Picture(content, channels)
        assert torch.equal(torch.from_numpy(decode(content, channels)), expected)
        assert picture.shape == expected.shape
        assert torch.equal(picture.pixels(), expected)
        height, width = expected.shape[1:]
        top, left = height // 3, width // 4
        box = (top, left, height - top, (width - left + 1) // 2)
        assert torch.equal(picture.crop(box), expected[:, top:, left : left + box[3]])
        assert not picture.failed
    with pytest.raises(ValueError, match="3 channels, where 5 are wanted"):
        decode(content, 5)


def test_most_kinds_are_read_without_pillow():
    assert {name for name, content in KINDS.items() if Jpeg.of(content, 3) is None} == {"cmyk"}
    assert {name for name, content in KINDS.items() if Jpeg.of(content, 1)} == {"grey"}


def test_orientation_by_xmp_is_noticed():
    assert Picture(KINDS["xmp"], 3).shape == (3, 301, 203)


def test_what_libjpeg_turns_down_is_left_to_pillow(monkeypatch):
    """Arithmetic coding or 12 bits, where a build lacks them; and warnings about files that are whole."""
    content, box = turned(6), (7, 9, 150, 101)
    expected = Picture(content, 3).crop(box)

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("Unsupported marker type 0xc9")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", refuse)
    picture = Picture(content, 3)
    assert torch.equal(picture.crop(box, 10), expected)
    assert torch.equal(torch.from_numpy(decode(content, 3)), by_pillow(content))
    assert not picture.failed


# At fractions of the size


@pytest.mark.parametrize(
    ("smallest", "eighths"), [(None, 8), (200, 8), (100, 8), (99, 4), (75, 4), (74, 3), (50, 3), (49, 2), (24, 1), (1, 1)]
)
def test_the_smallest_size_that_is_large_enough_is_decoded(monkeypatch, smallest, eighths):
    sizes = []
    whole = simplejpeg.decode_jpeg

    def watched(*args: object, **options: object) -> np.ndarray:
        sizes.append((array := whole(*args, **options)).shape)
        return array

    monkeypatch.setattr(simplejpeg, "decode_jpeg", watched)
    crop = Picture(KINDS["4:2:0"], 3).crop((1, 50, 200, 240), smallest)
    assert sizes == [(-(-203 * eighths // 8), -(-301 * eighths // 8), 3)]
    assert min(crop.shape[1:]) >= (smallest or 200)
    assert abs(crop.shape[1] - 200 * eighths / 8) <= 1


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_box_lies_where_it_was_drawn_however_the_file_is_turned(orientation):
    content = turned(orientation, PHOTO[:200, :296], quality=95)
    whole = by_pillow(content).float()
    height, width = whole.shape[1:]
    for top, left, h, w in ((0, 0, height, width), (16, 40, 144, 128), (height - 160, width - 128, 160, 128)):
        for fraction in (2, 4):  # which divides all edges
            crop = Picture(content, 3).crop((top, left, h, w), min(h, w) // fraction - 1).float()
            assert crop.shape == (3, h // fraction, w // fraction)
            corners = [(top + y, left + x) for y in (0, -fraction, fraction) for x in (0, -fraction, fraction)]
            parts = [whole[:, y : y + h, x : x + w] for y, x in corners if 0 <= y <= height - h and 0 <= x <= width - w]
            errors = [float((crop - F.avg_pool2d(part, fraction)).abs().mean()) for part in parts]
            assert errors[0] < 4
            assert all(error > 1.3 * errors[0] for error in errors[1:])


def test_edges_go_to_the_nearest_pixel_of_a_reduced_picture():
    picture, smooth = Picture(as_jpeg(COLOUR.filter(ImageFilter.GaussianBlur(8)), quality=95), 3), []
    for shift in range(5):
        smooth.append(picture.crop((20 + shift, 20, 140, 140), 30))
        assert smooth[-1].shape == (3, 35, 35)
    assert [torch.equal(a, b) for a, b in pairwise(smooth)] == [True, False, True, True]


# Limits and damage


def test_too_many_pixels_are_refused_by_the_header_in_pillows_words(monkeypatch):
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"^Image size \(61103 pixels\) exceeds limit of 2000 pixels; cut it into tiles$"):
        decode(KINDS["4:2:0"], 3)
    assert Picture(KINDS["4:2:0"], 3).failed


@pytest.mark.parametrize("kind", ["4:2:0", "progressive", "grey", "rgb", "restarts", "turned"])
def test_cut_off_files_are_errors_and_black(kind):
    content = KINDS[kind]
    for length in {*range(0, len(content) - 1, len(content) // 60), len(content) - 2, len(content) - 1}:
        with pytest.raises(ValueError, match=r"."):
            decode(content[:length], 3)
        for smallest in (None, 20):
            picture = Picture(content[:length], 3)
            height, width = picture.shape[1:]
            crop = picture.crop((0, 0, height, width), smallest)
            assert picture.failed
            assert crop.shape == (3, 8, 8)
            assert not crop.any()


@pytest.mark.filterwarnings("ignore")  # Pillow may warn of what it finds in the rubble
@pytest.mark.parametrize("kind", ["4:2:0", "progressive", "cmyk", "turned"])
def test_flipped_bits_are_pillows_to_judge_and_end_nothing(kind):
    random = np.random.default_rng(3)
    verdicts = []
    for _ in range(120):
        content = bytearray(KINDS[kind])
        header = random.random() < 0.5
        for place in random.integers(2, 700 if header else len(content), random.integers(1, 4)):
            content[place] ^= 1 << random.integers(8)
        content = bytes(content)
        try:
            expected = by_pillow(content)
        except Exception:
            expected = None
        picture = Picture(content, 3)
        crop = picture.pixels()
        assert picture.failed == (expected is None)
        assert expected is None or torch.equal(crop, expected)
        reduced = Picture(content, 3)
        reduced.crop((0, 0, *reduced.shape[1:]), 20)
        assert reduced.failed == picture.failed
        verdicts.append(picture.failed)
    assert any(verdicts)
    assert not all(verdicts)


@pytest.mark.parametrize("transform", [None, PretrainViews(32, 16, Augmentation((0.3, 1.0), jitter=0.4), None)])
def test_a_batch_survives_a_jpeg_that_was_damaged_after_packing(tmp_path, transform):
    pack(folder_of(tmp_path / "src", {f"{i}.jpg": KINDS["4:2:0"] for i in range(4)}), tmp_path / "out")
    index = open_index(tmp_path / "out")
    row = index.rows[2]
    with (tmp_path / "out" / "shard-00000.tar").open("r+b") as file:
        file.seek(int(row["offset"]) + int(row["size"]) // 2)
        file.write(bytes(int(row["size"]) // 2))
    (batch,) = ShardStream(index, 4, shuffle=False, transform=transform)
    assert batch["bad"] == index.keys(np.array([2]))
    assert batch["valid"].tolist() == [True, True, False, True]
    images = batch["image"]
    assert not images[2].any()
    assert all(images[i].any() for i in (0, 1, 3))


def test_tensors_of_pictures_that_are_no_jpegs_are_cut_alike():
    pixels = noise(1, 20, 30, 3)
    crop = Picture(encoded(pixels), 3).crop((3, 4, 10, 12), 2)
    assert (crop.permute(1, 2, 0).numpy() == pixels[3:13, 4:16]).all()
