"""An index for tars that somebody else wrote, which stay as they are."""

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np

from mimetic.data.cache import ShardCache, cache_folder
from mimetic.data.decode import channels_of, silence_pillow, whole
from mimetic.data.fetch import is_address
from mimetic.data.packing.depths import MAY_BE_DEEP, refuse_unknown_range
from mimetic.data.packing.items import Item, as_line, as_text, counted
from mimetic.data.packing.labels import number_labels
from mimetic.data.packing.moments import Moments, evenly, how_many_measured, pixels_to_measure
from mimetic.data.packing.shards import make_part
from mimetic.data.packing.tars import Sample, Scan, is_packed_tar, local_file, scan
from mimetic.data.packing.workers import Tally, run_all
from mimetic.data.packing.writing import Part, write_index
from mimetic.data.pixelrange import Range, pixel_range
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import DataError, SettingError

MOST_SHARDS = 1_000_000


def index_tars(
    shards: Sequence[str | Path], out: Path | None = None, *, workers: int = 1, max_bad: float = 0.01, channels: int | None = None,
    range: Range | None = None, progress: Callable[[int, int, int, int], None] = lambda *numbers: None,
    told: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Writes `index.json`, `samples.npy`, `keys.txt`, and `rejected.tsv` if a sample is left out.

    Args:
        shards: tars, folders of tars, globs, brace ranges, or addresses (`scheme://...`).
        out: the folder of the index; by default that of the shards, if all lie in one.
        workers: processes.
        max_bad: share of the samples that may be unusable; they are left out, and listed.
        channels: of every image; by default 3 if any of those that are measured is coloured.
        range: the pixel values that become 0 and 1, of images that are read deeper than 8 bits.
        progress: called with samples and bytes that are done, and of how many (0 where that is not known).
        told: called with a line for the user when 16-bit pictures are going to be cut to 8 bits for want of a range.

    Returns:
        The content of index.json; and `folder` where it is, and `others`, how many members belong to no sample.

    Raises:
        DataError: no such shard, one that is compressed, arrays of more than 8 bits without a range, or more than `max_bad`
            unusable samples.
        SettingError: no folder for the index, or one that holds the index of other shards.
    """
    if not 0 <= max_bad <= 1:
        raise SettingError(f"--max-bad is {max_bad}; it must be a share in [0, 1]")
    if channels is not None and channels < 1:
        raise SettingError(f"--channels is {channels}; 1 is grey, 3 is colour, arrays may have more")
    range = pixel_range(range)
    places = find_tars([str(shard) for shard in shards])
    folder = Path(out) if out else _common_folder(places)
    names = [place if is_address(place) else os.path.relpath(place, folder) for place in places]
    _refuse_another_index(folder, names)
    size = sum(os.path.getsize(place) for place in places if not is_address(place))
    scans = run_all(_scan, places, workers, lambda samples, done: progress(samples, done, 0, size))
    rejected = _judge(places, scans, max_bad)
    numbers, classes = number_labels([sample.label for found in scans for sample in found.samples], str(folder))
    if range is None:
        refuse_unknown_range(_may_be_deep(places, scans), f"mimetic index {' '.join(map(str, shards))}", told)
    image = _measure(places, scans, channels, range, workers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rejected.tsv").unlink(missing_ok=True)
        if rejected:
            write_atomically(folder / "rejected.tsv", "".join(f"{as_line(path)}\t{as_line(reason)}\n" for path, reason in rejected))
        content = write_index(folder, _parts(names, scans, numbers.tolist()), len(numbers), classes=classes, image=image,
                              rejected=sum(len(found.rejected) + found.lost for found in scans))  # fmt: skip
    except OSError as error:
        raise SettingError(f"{folder} cannot be written ({error.strerror}); give another folder with --out") from None
    return content | {"folder": folder, "others": sum(found.others for found in scans)}


def find_tars(shards: Sequence[str]) -> list[str]:
    """Files and addresses, in the order given; those of a folder or a pattern are sorted.

    Raises:
        DataError: one is not there, named twice, or compressed.
    """
    found = [place for shard in shards for place in _expanded(shard)]
    if len(found) > MOST_SHARDS:
        raise SettingError(f"more than {MOST_SHARDS:,} shards; give smaller ranges")
    for place, count in Counter(found).items():
        if count > 1:
            raise DataError(f"{place} is named {count} times; name each shard once")
        if is_packed_tar(Path(place)):
            raise DataError(f"{place} is compressed, so that no sample in it can be sought; unpack the compression first")
    return found


def _expanded(shard: str) -> Iterator[str]:
    if "{" in shard and not os.path.exists(shard):
        try:
            words = list(islice(braceexpand.braceexpand(shard), MOST_SHARDS + 1))
        except ValueError as error:
            raise SettingError(f"{shard}: {error}; a range is written shard-{{00000..00009}}.tar") from None
    else:
        words = [shard]
    for word in words:
        if "://" in word:
            yield word
        elif os.path.isdir(word):
            tars = sorted(glob(os.path.join(glob_literal(word), "*.tar")))
            if not tars:
                raise DataError(f"{word}: no .tar in this folder; give tars, or `mimetic pack` a folder of images")
            yield from tars
        elif os.path.exists(word):
            yield word
        elif has_magic(word) and (matching := sorted(glob(word))):
            yield from matching
        else:
            raise DataError(f"{word}: no such file; give tars, a folder of tars, a pattern in quotes or an address")


def glob_literal(folder: str) -> str:
    """A folder's name without meaning to `glob`."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in folder)


def _common_folder(places: Sequence[str]) -> Path:
    folders = {os.path.dirname(place) if not is_address(place) else place.partition("://")[0] + "://" for place in places}
    if len(folders) > 1 or "://" in next(iter(folders)):
        raise SettingError(f"the shards lie in {', '.join(sorted(folders)[:3])}; say where the index goes with --out FOLDER")
    return Path(folders.pop() or ".")


def _refuse_another_index(folder: Path, names: list[str]) -> None:
    file = folder / "index.json"
    if not os.path.lexists(file):
        return
    try:
        there = [shard["name"] for shard in json.loads(file.read_bytes())["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        there = []
    if sorted(there) != sorted(names):
        raise SettingError(f"{file} is the index of {len(there)} other shards, {len(names)} are given; name another folder with --out")


def _scan(place: str, tally: Tally) -> Scan:
    found = scan(local_file(place), place, tally)
    if is_address(place):
        ShardCache(cache_folder()).name_by_content(place, found.sha256)
    return found


def _judge(places: list[str], scans: list[Scan], max_bad: float) -> list[tuple[str, str]]:
    """What is to be listed; samples whose key has come in an earlier shard are taken out of the scans."""
    hashes = np.array([hash(sample.key) for found in scans for sample in found.samples], np.int64)
    again = np.ones(len(hashes), bool)
    again[np.unique(hashes, return_index=True)[1]] = False
    begin, rejected = 0, []
    for place, found in zip(places, scans, strict=True):
        repeated = again[begin : (begin := begin + len(found.samples))]
        found.rejected += [(sample.image, f"the key {sample.key!a} has come in an earlier shard")
                           for sample, is_again in zip(found.samples, repeated, strict=True) if is_again]  # fmt: skip
        found.samples = [sample for sample, is_again in zip(found.samples, repeated, strict=True) if not is_again]
        rejected += [(as_text(place), found.damage)] * bool(found.damage)
        rejected += [(as_text(f"{place}/{name}"), reason) for name, reason in found.rejected]
    bad = sum(len(found.rejected) + found.lost for found in scans)
    samples = bad + sum(len(found.samples) for found in scans)
    if samples == bad:
        first = ": ".join(rejected[0]) if rejected else places[0]
        raise DataError(f"no usable sample in {counted(len(places), 'shard')}, the first: {first}")
    if bad > (allowed := int(max_bad * samples + 1e-9)):
        worst = max(zip(places, scans, strict=True), key=lambda pair: pair[1].lost)
        told = f"{worst[0]} {worst[1].damage}" if worst[1].damage else ": ".join(rejected[-1])
        raise DataError(f"{bad:,} of {samples:,} samples are unusable, {allowed} are tolerated; {told}; mend the shards or raise --max-bad")
    return rejected


def _parts(names: list[str], scans: list[Scan], labels: list[int]) -> Iterator[Part]:
    begin = 0
    for name, found in zip(names, scans, strict=True):
        rows = [(sample.offset, sample.size, labels[begin + i]) for i, sample in enumerate(found.samples)]
        begin += len(rows)
        yield make_part(name, found.bytes, found.sha256, rows, [key_bytes(sample.key) for sample in found.samples])


def key_bytes(key: str) -> bytes:
    """A key of a tar as it is in keys.txt: one line each."""
    return key.encode("utf-8", "surrogateescape").replace(b"\n", b"_")


@dataclass(frozen=True)
class Look:
    """Images of a shard to measure."""

    place: str
    bytes: int
    sha256: str
    samples: list[Sample]
    channels: int | None
    range: Range | None


def _may_be_deep(places: list[str], scans: list[Scan]) -> list[Item]:
    """Some of the images that may have more than 8 bits, evenly spread."""
    samples = [(i, sample) for i, found in enumerate(scans) for sample in found.samples if sample.extension in MAY_BE_DEEP]
    chosen = [samples[i] for i in evenly(len(samples), how_many_measured(len(samples), sum(sample.size for _, sample in samples)))]
    files = {i: str(local_file(places[i], scans[i].bytes, scans[i].sha256)) for i, _ in chosen}
    return [Item(sample.key, sample.extension, places[i], files[i], sample.offset, sample.size) for i, sample in chosen]


def _measure(places: list[str], scans: list[Scan], channels: int | None, range: Range | None, workers: int) -> dict[str, Any]:
    """What index.json says of images: from some of them, evenly spread."""
    starts = np.cumsum([0, *(len(found.samples) for found in scans)])
    size = sum(sample.size for found in scans for sample in found.samples)
    chosen = evenly(int(starts[-1]), how_many_measured(int(starts[-1]), size))
    looks = []
    for place, found, begin, end in zip(places, scans, starts[:-1], starts[1:], strict=True):
        if len(here := chosen[(begin <= chosen) & (chosen < end)] - begin):
            looks.append(Look(place, found.bytes, found.sha256, [found.samples[i] for i in here], channels, range))
    by_channels: dict[int, Moments] = {}
    for part in run_all(_look, looks, workers):
        for number, moments in part.items():
            by_channels.setdefault(number, Moments(number)).merge(moments)
    if not by_channels:
        raise DataError(f"{places[0]} ...: none of the {sum(len(look.samples) for look in looks)} images looked at can be decoded")
    most = max(by_channels, key=lambda number: by_channels[number].images)
    common = most if most not in (1, 3) else max(number for number in by_channels if number in (1, 3))
    moments = by_channels[common]
    if common == 3 and (grey := by_channels.get(1)):
        moments.merge(Moments(3, grey.images, grey.pixels, grey.total * 3, grey.squares * 3, grey.values * 3, grey.outside * 3))
    return moments.summary(range)


def _look(look: Look, tally: Tally) -> dict[int, Moments]:
    """Moments of images by how many channels they have."""
    silence_pillow()
    by_channels: dict[int, Moments] = {}
    with local_file(look.place, look.bytes, look.sha256).open("rb") as file:
        for sample in look.samples:
            content = os.pread(file.fileno(), sample.size, sample.offset)
            channels = look.channels or channels_of(io.BytesIO(content))
            moments = by_channels.setdefault(channels, Moments(channels))
            try:
                if look.range is None:
                    moments.add(pixels_to_measure(content, channels))
                else:
                    moments.add_deep(whole(content, channels, deep=True), look.range)
            except ValueError:  # `mimetic check` names them
                continue
            tally.add(0, 0)
    return {channels: moments for channels, moments in by_channels.items() if moments.images}
