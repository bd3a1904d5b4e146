"""Hundreds of damaged inputs: every one is packed or rejected with a reason, none crashes, hangs or goes uncounted."""

import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from imagesets import as_npy, encoded, folder_of, noise
from PIL import Image, features
from shardreading import keys_of

from mimetic.data.checking import check_shards
from mimetic.data.decode import decode
from mimetic.data.index import open_index
from mimetic.data.indexing import index_tars
from mimetic.data.pack import pack
from mimetic.data.packing.structure import is_whole
from mimetic.engine.errors import DataError

SMOOTH = np.asarray(Image.fromarray(noise(0, 6, 8, 3)).resize((64, 48), Image.Resampling.BICUBIC))
MODES = ["1", "L", "P", "PA", "LA", "RGB", "RGBA", "RGBX", "CMYK", "I;16", "I", "F", "YCbCr", "LAB", "HSV"]
KINDS = {"jpeg": "jpg", "png": "png", "webp": "webp", "gif": "gif", "bmp": "bmp", "tiff": "tif", "ppm": "ppm"}


def whole() -> dict[str, bytes]:
    """A sound picture of every kind, and JPEGs of several builds."""
    files = {f"{kind}.{suffix}": encoded(SMOOTH, kind) for kind, suffix in KINDS.items()} | {"npy.npy": as_npy(SMOOTH)}
    exif = Image.Exif()
    exif[0x010E] = "thumbnail \xff\xd8\xff\xd9"
    files |= {
        "progressive.jpg": encoded(SMOOTH, "jpeg", progressive=True),
        "restarts.jpg": encoded(SMOOTH, "jpeg", restart_marker_rows=1),
        "grey.jpg": encoded(SMOOTH[..., 0].copy(), "jpeg"),
        "exif.jpg": encoded(SMOOTH, "jpeg", exif=exif),
        "4-4-4.jpg": encoded(SMOOTH, "jpeg", subsampling=0),
        "behind.jpg": encoded(SMOOTH, "jpeg") + b"more",
        "palette.png": encoded(Image.fromarray(SMOOTH).quantize(64)),
        "lossless.webp": encoded(SMOOTH, "webp", lossless=True),
    }
    return files


def damaged(files: dict[str, bytes]) -> dict[str, bytes]:
    """Files cut at many places, filled up with zeros, with flipped bits, under wrong names, and rubbish."""
    made = {}
    random = np.random.default_rng(0)
    for name, content in files.items():
        stem, _, suffix = name.partition(".")
        cuts = {0, 1, 2, 3, 8, 20, len(content) // 4, len(content) // 2, len(content) - 200, len(content) - 3}
        for cut in sorted(cut for cut in cuts if 0 <= cut < len(content)):
            made[f"{stem}/cut-{cut}.{suffix}"] = content[:cut]
            made[f"{stem}/zeros-{cut}.{suffix}"] = content[:cut] + bytes(len(content) - cut)
        for number in range(12):
            flipped = bytearray(content)
            for place in random.integers(0, min(len(content), 200 if number < 6 else len(content)), 3):
                flipped[place] ^= 1 << random.integers(8)
            made[f"{stem}/flip-{number}.{suffix}"] = bytes(flipped)
    made |= {f"rubbish/{suffix}.{suffix}": random.bytes(300) for suffix in KINDS.values()}
    made |= {"rubbish/ff.jpg": b"\xff\xd8" + b"\xff" * 1_000_000, "rubbish/html.jpg": b"<!DOCTYPE html><html>404</html>",
             "wrong/png.jpg": files["png.png"], "wrong/jpeg.png": files["jpeg.jpg"], "wrong/npy.jpg": files["npy.npy"]}  # fmt: skip
    return made


def bombs() -> dict[str, bytes]:
    """Pictures that say they are of billions of pixels."""
    jpeg = bytearray(encoded(SMOOTH, "jpeg"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"
    png = bytearray(encoded(SMOOTH))
    png[16:24] = (100_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    bmp = bytearray(encoded(SMOOTH, "bmp"))
    bmp[18:26] = (100_000).to_bytes(4, "little") * 2
    gif = encoded(SMOOTH, "gif")
    npy = as_npy(SMOOTH).replace(b"(48, 64, 3)", b"(99999999,)")
    return {"bomb.jpg": bytes(jpeg), "bomb.png": bytes(png), "bomb.bmp": bytes(bmp), "bomb.ppm": b"P6 100000 100000 255\n" + bytes(99),
            "bomb.gif": gif[:6] + b"\xff" * 4 + gif[10:], "bomb.npy": npy}  # fmt: skip


def listed(out: Path) -> list[tuple[str, str]]:
    return [tuple(line.split("\t")) for line in (out / "rejected.tsv").read_text().splitlines()]


@pytest.mark.timeout(60)
def test_hundreds_of_damaged_files_are_packed_or_rejected_and_none_goes_uncounted(tmp_path, capfd):
    sound = whole()
    assert all(decode(content, 3).shape == (3, 48, 64) for content in sound.values())
    files = {f"sound/{name}": content for name, content in sound.items()} | damaged(sound) | bombs_below("bombs")
    assert len(files) > 400
    source = folder_of(tmp_path / "src", {f"x/{name}": content for name, content in files.items()})
    content = pack(source, tmp_path / "out", max_bad=1, channels=3, samples_per_shard=100)
    told = listed(tmp_path / "out")
    assert content["samples"] + content["rejected"] == len(files)
    assert content["rejected"] == len(told) == len({path for path, _ in told})
    assert all(reason for _, reason in told)
    index = open_index(tmp_path / "out")
    keys = set(keys_of(index))
    assert {f"x/sound/{name.replace('.', '_')}"[: -len(name.rpartition('.')[2]) - 1] for name in sound} <= keys
    gone = {path.partition("/src/x/")[2] for path, _ in told}
    assert {name for name in files if name.startswith(("bombs/", "rubbish/"))} <= gone
    cut = {name for name in files if "/cut-" in name}
    undetected = cut - gone
    assert all(decode(files[name], 3).shape for name in undetected), "only what still decodes is packed"
    behind = {name for name in undetected if name.startswith("behind/")}
    assert len(undetected - behind) <= 6, sorted(undetected)  # a GIF without its last byte, and the like
    capfd.readouterr()  # libtiff talks on stderr


def bombs_below(folder: str) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in bombs().items()}


def test_what_the_structure_passes_is_whole_and_what_it_does_not_is_decoded(tmp_path):
    for name, content in whole().items():
        assert is_whole(content) == (name.rpartition(".")[2] in ("jpg", "png", "webp")), name
        if name.rpartition(".")[2] in ("jpg", "png", "webp") and name != "behind.jpg":
            assert not [cut for cut in range(len(content)) if is_whole(content[:cut])], name
    for name, content in bombs().items():
        assert not is_whole(content), name
    png = encoded(SMOOTH)
    for place in range(8, len(png), 7):
        assert not is_whole(png[:place] + bytes([png[place] ^ 4]) + png[place + 1 :]), "PNG has checksums"


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_odd_modes_are_packed_or_rejected_with_a_reason(mode, tmp_path):
    picture = Image.fromarray(SMOOTH)
    if mode == "I;16":
        picture = Image.fromarray(SMOOTH[..., 0].astype(np.uint16) << 8)
    elif mode == "PA":
        picture = picture.convert("P").convert("PA")
    elif mode in ("LAB", "RGBX"):
        from PIL import ImageCms

        lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        picture = ImageCms.applyTransform(picture, lab) if mode == "LAB" else picture.convert("RGBX")
    else:
        picture = picture.convert(mode)
    files = {"sound.png": encoded(SMOOTH)}
    for kind, suffix in KINDS.items():
        if kind != "webp" or features.check("webp"):
            try:
                files[f"{suffix}.{suffix}"] = encoded(picture, kind)
            except (OSError, ValueError, KeyError):
                continue  # Pillow cannot write it
    content = pack(folder_of(tmp_path / "src", files), tmp_path / "out", max_bad=0.9)
    assert content["samples"] + content["rejected"] == len(files)
    _, faults = check_shards(tmp_path / "out")
    assert not faults, "what is packed decodes"
    if content["rejected"]:
        assert mode in ("I", "F", "LAB", "HSV", "PA"), listed(tmp_path / "out")


# Tars


def member(name: str, content: bytes = b"", **attributes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + content + bytes(-len(content) % 512)


END = bytes(1024)
FIRST_SAMPLE = 2700  # bytes: picture and label, each with its header, and the picture behind them
NOT_BROKEN = {"kinds", "traversal", "names", "twice", "again", "no-image", "odd-labels", "long-name", "sparse", "pax"}


def with_size(header: bytes, field: bytes) -> bytes:
    """A header whose size field is other, with a checksum that is right."""
    changed = bytearray(header[:512])
    changed[124:136] = field
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def broken_tars() -> dict[str, bytes]:
    """Name and bytes; each begins with two sound samples."""
    picture = encoded(noise(1, 8, 8))
    sound = member("a.png", picture) + member("a.cls", b"1") + member("b.png", picture)
    tail = member("c.png", picture) + member("d.png", picture)
    header = member("c.png", picture)
    made = {f"cut-{cut}": (sound + tail + END)[:cut] for cut in range(0, len(sound + tail), 173)}
    made |= {
        "checksum": sound + bytes([header[0] ^ 1]) + header[1:] + tail + END,
        "garbage": sound + np.random.default_rng(0).bytes(1536) + tail + END,
        "negative": sound + with_size(header, b"\xff" * 12) + tail + END,
        "negative-far": sound + with_size(header, b"\xff" * 8 + (-2048).to_bytes(4, "big", signed=True)) + tail + END,
        "giant": sound + with_size(header, b"\x80" + bytes(3) + b"\x7f" * 8) + tail + END,
        "octal": sound + with_size(header, b"nonsense\0\0\0\0") + tail + END,
        "pax": sound + member("x", b"9999999 path=y\n", type=tarfile.XHDTYPE) + tail + END,
        "pax-zero": sound + member("x", b"0 path=y\n", type=tarfile.XHDTYPE) + tail + END,
        "pax-size": sound + member("x", b"13 size=-999\n", type=tarfile.XHDTYPE) + tail + END,
        "pax-chain": sound + member("x", b"9 a=bcde\n", type=tarfile.XHDTYPE) * 3000 + tail + END,
        "long-name": sound + member("x", b"n" * 5000, type=tarfile.GNUTYPE_LONGNAME) + tail + END,
        "long-name-cut": sound + member("x", b"n" * 5000, type=tarfile.GNUTYPE_LONGNAME)[:1000],
        "sparse": sound + member("s.png", b"", type=tarfile.GNUTYPE_SPARSE) + tail + END,
        "together": sound + END + tail + END,
        "no-end": sound + tail,
        "kinds": sound + b"".join(member(f"k{kind!r}.png", type=kind) for kind in (
            tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"Z")) + tail + END,
        "traversal": sound + b"".join(member(name, picture) for name in ("../../escape.png", "/abs/olute.png", "..png")) + tail + END,
        "names": sound + b"".join(member(name, picture) for name in (
            "new\nline.png", "\udcff.png", "é" * 300 + ".png", "sp ace.png", ".hidden.png", "._b.png", "__MACOSX__/a.png", "none",
        )) + tail + END,
        "twice": sound + member("c.png", picture) + member("c.png", picture) + member("e.png", picture) + END,
        "again": sound + member("a.png", picture) + tail + END,
        "no-image": sound + member("t.txt", b"x") + member("t.cls", b"1") + member("u.jpg", b"") + tail + END,
        "odd-labels": sound + member("l.png", picture) + member("l.cls", b"\xff\xfe") + member("m.png", picture)
        + member("m.json", b"[" * 9999) + END,
    }  # fmt: skip
    return made


@pytest.mark.timeout(60)
def test_every_broken_tar_is_indexed_or_refused_and_nothing_in_it_goes_uncounted(tmp_path):
    tars = broken_tars()
    assert len(tars) > 35
    for name, content in tars.items():
        folder = folder_of(tmp_path / name, {"t.tar": content})
        if name.startswith("cut-") and int(name[4:]) < FIRST_SAMPLE:
            with pytest.raises(DataError, match=r"^no usable sample in 1 shard, the first: .*t\.tar: breaks at byte .*$"):
                index_tars([folder], max_bad=1)
            continue
        found = index_tars([folder], max_bad=1)
        told = listed(folder) if found["rejected"] else []
        index = open_index(folder)
        assert found["samples"] == len(index) >= 1, name
        assert not (tmp_path / "escape.png").exists()
        for i in range(len(index)):
            assert decode(index.read(i), 1).shape == (1, 8, 8)
        broken = [reason for path, reason in told if path.endswith("t.tar")]
        assert bool(broken) == (name not in NOT_BROKEN), (name, told)
        _, faults = check_shards(folder)
        assert [reason for _, _, reason in faults] == broken


def test_what_is_odd_in_a_tar_is_told(tmp_path):
    tars = broken_tars()

    def reasons(name: str) -> dict[str, str]:
        folder = folder_of(tmp_path / name, {"t.tar": tars[name]})
        found = index_tars([folder], max_bad=1)
        assert found["rejected"] == len(listed(folder)) if (folder / "rejected.tsv").exists() else not found["rejected"]
        return {path.partition("t.tar/")[2]: reason for path, reason in (listed(folder) if found["rejected"] else [])}

    assert reasons("twice") == {"c.png": "'c.png' comes twice in it"}
    assert reasons("again") == {"a.png": "the key 'a' comes again"}
    assert reasons("no-image") == {"t": "no image among its members (cls txt)", "u.jpg": "the image is empty"}
    assert reasons("names") == {}
    assert keys_of(open_index(tmp_path / "names")) == ["a", "b", "new_line", "\ufffd", "é" * 300, "sp ace", "c", "d"]
    assert index_tars([tmp_path / "names"])["others"] == 4
    assert reasons("traversal") == {}
    assert "../../escape" in keys_of(open_index(tmp_path / "traversal"))


def test_a_broken_tar_is_packed_up_to_its_damage_or_refused(tmp_path):
    content = broken_tars()["garbage"]
    source = folder_of(tmp_path / "src", {"t.tar": content})
    with pytest.raises(DataError, match=r"t\.tar/b \(cut off: the tar breaks at byte 3,072 of \d,\d+: no tar header there\)"):
        pack(source, tmp_path / "out")
    found = pack(source, tmp_path / "out", max_bad=0.9)
    assert found["samples"] == 1, "b may go on behind the damage"
    assert found["rejected"] >= 2
    with tarfile.open(tmp_path / "out/shard-00000.tar") as tar:
        assert tar.getnames() == ["a.png", "a.cls"]
