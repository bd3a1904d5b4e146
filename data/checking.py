"""Whether shards are what their index says, and every image in them decodes."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mimetic.data.decode import decode, silence_pillow
from mimetic.data.index import Index, open_index
from mimetic.data.indexing import key_bytes
from mimetic.data.packing.items import as_line
from mimetic.data.packing.tars import Sample, scan
from mimetic.data.packing.workers import Tally, run_all
from mimetic.engine.errors import MimeticError

Fault = tuple[str, str, str]  # shard, key (empty for the whole shard), what is wrong


@dataclass(frozen=True)
class Check:
    """One shard of an index to check."""

    index: str
    shard: int


def check_shards(path: str | Path, *, workers: int = 1,
                 progress: Callable[[int, int, int, int], None] = lambda *numbers: None) -> tuple[Index, list[Fault]]:  # fmt: skip
    """Holds every shard of an index against its file: length, sha256, each row, and each image decoded in full.

    Returns:
        The index, and every fault in the order of shards and samples.

    Raises:
        DataError: the index itself is missing or damaged.
    """
    index = open_index(path, sizes=False)
    size = sum(shard["bytes"] for shard in index.shards)
    tasks = [Check(str(path), number) for number in range(len(index.shards))]
    told = run_all(_check, tasks, workers, lambda images, done: progress(images, done, len(index), size))
    return index, [fault for faults in told for fault in faults]


def _check(check: Check, tally: Tally) -> list[Fault]:
    silence_pillow()
    index = open_index(check.index, sizes=False)
    shard = index.shards[check.shard]
    name = as_line(str(shard["name"]))
    try:
        file = index.path(check.shard)
        found = scan(file, name, Tally([0, 0, 0, 0], tally.lock))
    except (MimeticError, OSError) as error:
        tally.add(int(shard["samples"]), shard["bytes"])
        return [(name, "", str(error))]
    faults = []
    if found.damage:
        faults.append((name, "", found.damage))
    for what, ours, theirs in (("bytes", found.bytes, shard["bytes"]), ("sha256", found.sha256, shard["sha256"])):
        if ours != theirs:
            faults.append((name, "", f"{what} {ours}, the index says {theirs}"))
    with file.open("rb") as opened:
        for key, reason in _rows(index, check.shard, found.samples, opened.fileno(), tally):
            faults.append((name, as_line(key), as_line(reason)))
    return faults


def _rows(index: Index, shard: int, samples: list[Sample], file: int, tally: Tally) -> Iterator[tuple[str, str]]:
    """What is wrong with the samples of a shard, whose bytes are on account as their images are decoded."""
    by_offset = {sample.offset: sample for sample in samples}
    begin, end = int(index.starts[shard]), int(index.starts[shard + 1])
    size = index.shards[shard]["bytes"]
    for place in range(begin, end):
        row, key = index.rows[place], index.key_table(np.array([place]))[0]
        sample = by_offset.pop(int(row["offset"]), None)
        told = key.decode("utf-8", "replace")
        if sample is None:
            yield told, f"no image begins at byte {row['offset']:,} of the tar"
        else:
            if sample.size != row["size"]:
                yield told, f"{sample.size:,} bytes in the tar, the index says {row['size']:,}"
            if key_bytes(sample.key) != key:
                yield told, f"the key is {sample.key!a} in the tar"
            if not _is_label(sample.label, int(row["label"]), index.classes):
                yield told, f"the label is {sample.label!a} in the tar, the index says {row['label']}"
            try:
                decode(os.pread(file, sample.size, sample.offset), index.channels, index.range)
            except ValueError as error:
                yield told, f"does not decode: {' '.join(str(error).split())}"
        tally.add(1, size // (end - begin))
    listed = set(index.key_table(np.arange(begin, end)).tolist()) if by_offset else set()
    for sample in by_offset.values():
        if key_bytes(sample.key) in listed:
            yield sample.key, f"lies at byte {sample.offset:,} of the tar"


def _is_label(text: str | None, label: int, classes: list[str]) -> bool:
    if label < 0:
        return not text or text.startswith("-")
    return text is not None and (classes[label : label + 1] == [text] or text == str(label))
