"""Images into WebDataset shards with an index.

A source is a folder tree of images (sub-folders are the classes; a flat folder has none), a list of images, tars, or an idx file.
What goes where is planned before anything is written: inputs in a fixed shuffled order, so that neighbours in a shard are not of
one class, cut into shards. So equal input gives equal shards, however many processes write them, and a start after a kill goes on
with the shards that are missing.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mimetic.data.decode import silence_pillow
from mimetic.data.packing.channels import channels_of_most
from mimetic.data.packing.depths import refuse_unknown_range
from mimetic.data.packing.duplicates import find_duplicates
from mimetic.data.packing.items import as_line
from mimetic.data.packing.moments import Moments
from mimetic.data.packing.outfolder import in_one_line, put_back, refuse_to_overwrite, working_folder
from mimetic.data.packing.plan import Options, Side, plan_shards, shuffled, split, start_over_if_changed
from mimetic.data.packing.reencode import Encoding
from mimetic.data.packing.shards import Shard, part_of, read_account, too_many, write_shard
from mimetic.data.packing.sources import Found, find_items
from mimetic.data.packing.workers import run_all
from mimetic.data.packing.writing import write_index
from mimetic.data.pixelrange import Range, pixel_range
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import DataError, SettingError

Progress = Callable[[int, int, int, int], None]


def pack(
    source: Path, out: Path, *, samples_per_shard: int | None = None, max_bad: float = 0.01, channels: int | None = None,
    workers: int = 1, short_side: int | None = None, format: str | None = None, quality: int | None = None,
    dedup: bool = False, val: float | None = None, range: Range | None = None, progress: Progress = lambda *numbers: None,
    told: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Writes `out/shard-00000.tar`, ..., `samples.npy`, `keys.txt`, `index.json`, and `rejected.tsv` if not every input is packed.

    The folder appears whole or not at all: everything is written beside it, and renamed at the end. Killed or interrupted, the same
    call goes on with the shards that are missing, unless source or settings have changed. Unless `channels` says otherwise, images
    have three if any is coloured and one if all are grey; where most of the first few hundred (in the shuffled order) are arrays
    of another number, they have that.

    Args:
        source: see `find_items`.
        out: a new folder, or one with shards of ours, which are replaced.
        samples_per_shard: inputs of a shard; by default 8192, or what makes 256 MiB of images of mean size.
        max_bad: share of the inputs that may be unreadable; they are left out, and listed.
        channels: of every image.
        workers: processes; more than one needs a caller that can be imported (`if __name__ == "__main__"`).
        short_side, format, quality: see `Encoding`; without them the bytes of images stay as they are.
        dedup: leave out images whose bytes are those of an earlier one.
        val: share of the keys whose samples go to `out/val`, all others to `out/train`; a key's side depends on the key alone.
        range: the pixel values that become 0 and 1, of images that are read deeper than 8 bits. Every image is decoded then; pixels
            that are not finite make an image unreadable, values outside the range are clamped and counted.
        progress: called with images and bytes that are done, and of how many.
        told: called with a line for the user when 16-bit pictures are going to be cut to 8 bits for want of a range.

    Returns:
        The content of index.json (of `out/train`, with that of `out/val` as `val`); and `beside`, the images beside the sub-folders,
        for which there are no classes; and `others`, how many files of each other kind were left out.

    Raises:
        DataError: nothing to pack, arrays of more than 8 bits without a range, more than `max_bad` of the images cannot be read, or
            the disk is full.
        SettingError: `out` exists and holds anything but shards of ours, it cannot be written, or another process packs it.
    """
    source, out = Path(source), Path(out).resolve()
    options = Options(samples_per_shard, max_bad, channels, Encoding(short_side, format, quality), dedup, val, pixel_range(range))
    work, replaced = (out.with_name(f".{out.name}.{state}") for state in ("packing", "replaced"))
    with in_one_line(out), warnings.catch_warnings():
        silence_pillow()
        put_back(replaced, out)
        refuse_to_overwrite(out)
        found = find_items(source, out, workers)
        if options.range is None:
            refuse_unknown_range(found.items, f"mimetic pack {source} {out}", told)
        with working_folder(work, out):
            shutil.rmtree(replaced, ignore_errors=True)  # left by a kill
            contents = _pack_sides(found, work, options, workers, progress)
            try:
                if out.exists():
                    out.rename(replaced)
                (work / "result").rename(out)
            finally:
                put_back(replaced, out)
                shutil.rmtree(replaced, ignore_errors=True)
    return contents[0] | ({"val": contents[1]} if val else {}) | {"beside": found.beside, "others": found.others}


def _pack_sides(found: Found, work: Path, options: Options, workers: int, progress: Progress) -> list[dict[str, Any]]:
    """Fills `work/result`; what a killed start has left there of the same plan is kept."""
    start_over_if_changed(work, found.items, found.classes, options)
    duplicates = find_duplicates(work / "duplicates.json", found.items, workers) if options.dedup else {}
    sides = split(found.items, duplicates, work / "result", options.val)
    channels = options.channels or channels_of_most([item for side in sides for item in shuffled(side)])
    if options.encoding.changes and channels not in (1, 3):
        raise SettingError(f"images have {channels} channels; --short-side and --format are for pictures, of 1 or 3 channels")
    allowed = int(options.max_bad * len(found.items) + 1e-9)
    for side in sides:
        side.folder.mkdir(exist_ok=True, parents=True)
        side.shards = plan_shards(side, work / "done", channels, allowed, options)
    shards = [shard for side in sides for shard in side.shards]
    finished = {shard.tar: account for shard in shards if (account := read_account(shard)) is not None}
    missing = [shard for shard in shards if shard.tar not in finished]
    there = [item for shard in shards if shard.tar in finished for item in shard.items]
    images, size = len(there), sum(item.size for item in there)
    total = sum(len(shard.items) for shard in shards), sum(item.size for shard in shards for item in shard.items)
    bad = [rejected for account in finished.values() for rejected in account["rejected"]]
    if len(bad) > allowed:  # than were allowed when they were written
        raise too_many(len(bad), allowed, *bad[-1])
    progress(images, size, *total)
    run_all(write_shard, missing, workers, lambda more, bytes_more: progress(images + more, size + bytes_more, *total), len(bad))
    return [_finish(side, found.classes, channels, options.range) for side in sides]


def _finish(side: Side, classes: list[str], channels: int, range: Range | None) -> dict[str, Any]:
    """The index of a side whose shards are written."""
    moments, samples = Moments(channels), 0
    for left_by_a_kill in side.folder.glob(".*"):
        left_by_a_kill.unlink()
    rejected = [(as_line(item.path), f"duplicate of {as_line(path)}") for item, path in side.duplicates]

    def accounts() -> Iterator[tuple[Shard, dict[str, Any]]]:
        return ((shard, account) for shard in side.shards if (account := read_account(shard)))

    for _, account in accounts():
        moments.merge(Moments(**account["moments"]))
        samples += len(account["rows"])
        rejected += account["rejected"]
    bad = len(rejected) - len(side.duplicates)
    if not samples or not moments.images:
        path, reason = rejected[len(side.duplicates)]
        raise DataError(f"none of {bad} images can be read, the first: {path} ({reason})")
    if rejected:
        write_atomically(side.folder / "rejected.tsv", "".join(f"{path}\t{reason}\n" for path, reason in rejected))
    parts = (part_of(shard, account) for shard, account in accounts() if account["rows"])
    return write_index(side.folder, parts, samples, classes=classes, image=moments.summary(range), rejected=bad,
                       duplicates=len(side.duplicates))  # fmt: skip
