"""Shards read by others: tarfile, and webdataset's own reader."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from webdataset import tariterators

from mimetic.data.index import UNLABELLED, Index
from mimetic.data.packing.items import EXTENSIONS


def keys_of(index: Index) -> list[str]:
    return index.keys(np.arange(len(index)))


def contents(index: Index) -> dict[str, bytes]:
    return {key: index.read(i) for i, key in enumerate(keys_of(index))}


def labels(index: Index) -> dict[str, str]:
    return {key: index.classes[label] for key, label in zip(keys_of(index), index.rows["label"].tolist(), strict=True)}


def read_by_webdataset(index: Index) -> dict[str, dict[str, bytes]]:
    samples = {}
    for shard in index.shards:
        with Path(index.home, shard["name"]).open("rb") as file:
            members = tariterators.tar_file_expander([{"url": shard["name"], "stream": file}])
            for sample in tariterators.group_by_keys(members):
                assert sample["__key__"] not in samples
                samples[sample["__key__"]] = {name: value for name, value in sample.items() if not name.startswith("__")}
    return samples


def scan(tar: Path) -> Iterator[tuple[int, int, int, str]]:
    """Where each sample of a shard lies by tarfile's account: (offset, size, label, key)."""
    image: tuple[str, int, int] | None = None
    label = UNLABELLED
    with tarfile.open(tar, "r:") as members:
        for member in filter(tarfile.TarInfo.isfile, members):
            key, _, extension = member.name.rpartition("/")[2].partition(".")
            key = member.name[: len(member.name) - len(extension) - 1] if extension else key
            if image and key != image[0]:
                yield image[1], image[2], label, image[0]
                image, label = None, UNLABELLED
            if extension == "cls":
                stream = members.extractfile(member)
                label = int(stream.read()) if stream else UNLABELLED
            else:
                image = (key, member.offset_data, member.size)
    if image:
        yield image[1], image[2], label, image[0]


def assert_sound(index: Index) -> None:
    """The index, a scan of the tars by tarfile, and webdataset's own reader agree on every sample."""
    scanned = [row for shard in index.shards for row in scan(Path(index.home, shard["name"]))]
    keys = keys_of(index)
    assert scanned == [(*row.tolist()[:3], key) for row, key in zip(index.rows, keys, strict=True)]
    read = read_by_webdataset(index)
    ours = contents(index)
    assert read.keys() == ours.keys()
    assert len(ours) == len(index)
    for key, row in zip(keys, index.rows, strict=True):
        sample = dict(read[key])
        assert int(sample.pop("cls", b"-1")) == row["label"]
        assert list(sample.values()) == [ours[key]]
        assert all(f".{name}" in EXTENSIONS for name in sample)
