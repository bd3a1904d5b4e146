"""What there is to pack: the images of a folder tree, a list, tars or an idx file, with keys and labels."""

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path

from mimetic.data.packing.idx import read_images
from mimetic.data.packing.items import EXTENSIONS, Item, as_text, file_item, key_maker
from mimetic.data.packing.labels import number_labels
from mimetic.data.packing.manifests import KINDS, manifest_items
from mimetic.data.packing.tars import Scan, is_packed_tar, scan
from mimetic.data.packing.workers import Tally, run_all
from mimetic.engine.errors import DataError


@dataclass(frozen=True)
class Found:
    """What a source holds: images, class names, images that lie beside its sub-folders, and how many files of which other kinds."""

    items: list[Item]
    classes: list[str]
    beside: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def find_items(source: Path, out: Path, workers: int = 1) -> Found:
    """The images of a source, sorted by name, and its class names; the folder `out` is none of it.

    Raises:
        DataError: the source does not exist or holds no image.
    """
    if not os.path.exists(source):  # which is False for a name that is too long, where Path.exists raises
        tars = [Path(name) for name in sorted(glob(str(source))) if name.endswith(".tar")]
        if not tars:
            raise DataError(f"{source}: no such file or folder; give a folder of images or an idx file, a list (.csv .tsv .jsonl) or tars")
        return _tar_items(tars, source, workers)
    if source.is_dir() and (files := sorted(source.glob("*idx3-ubyte*"))):
        names = ", ".join(file.name for file in files)
        raise DataError(f"{source} holds idx files; name the one to pack: {names}")
    if source.is_dir():
        found = _tree_items(source, out)
        images = any(os.path.basename(item.file) != "samples.npy" for item in found.items)  # which belongs to an index
        if not images and (tars := sorted(source.glob("*.tar"))):
            found = _tar_items(tars, source, workers)
    elif source.suffix.lower() in KINDS:
        found = Found(*manifest_items(source))
    elif source.suffix.lower() == ".tar" or is_packed_tar(source):
        found = _tar_items([source], source, workers)
    else:
        found = _idx_items(source)
    if not found.items:
        raise DataError(f"{source}: no image in it{left_out(found.others)}; known are {' '.join(EXTENSIONS)} and idx files")
    return found


def _tree_items(source: Path, out: Path) -> Found:
    files, unreadable, others = _image_files(str(source), str(out))
    tops = {path.partition("/")[0] for path in files if "/" in path}
    # Images beside the sub-folders would have no class: then the tree is taken as unlabelled.
    beside = [as_text(path) for path in files if "/" not in path] if tops else []
    classes = [] if beside else sorted(tops)
    numbers = {name: number for number, name in enumerate(classes)}
    new_key = key_maker()
    items = []
    for path in files:
        label = numbers[path.partition("/")[0]] if classes else -1
        file = os.path.join(source, path)
        items.append(file_item(new_key(os.path.splitext(path)[0]), file, as_text(file), label))
    items += [Item(new_key(path), "", as_text(path), path, fault=reason) for path, reason in unreadable]
    return Found(items, [as_text(name) for name in classes], beside, others)


def _image_files(source: str, out: str) -> tuple[list[str], list[tuple[str, str]], Counter[str]]:
    """The images of a tree, relative to it and sorted; folders that cannot be read, and why; and how many other files of which kinds.

    Linked folders count, since classes are often chosen by links; hidden ones do not: they hold thumbnails and the like.
    """
    images: list[str] = []
    unreadable: list[tuple[str, str]] = []
    others: Counter[str] = Counter()
    left_out = {os.path.realpath(source), out}
    met: set[tuple[str, str]] = set()

    def is_new(folder: str) -> bool:
        # Once in each class: so links that cross lead to an end, however many paths they make, and classes may share a folder.
        place = (os.path.relpath(folder, source).partition("/")[0], os.path.realpath(folder))
        new = place not in met and place[1] not in left_out
        met.add(place)
        return new

    def cannot_be_read(error: OSError) -> None:
        unreadable.append((str(error.filename), error.strerror or str(error)))

    for folder, below, names in os.walk(source, onerror=cannot_be_read, followlinks=True):
        below[:] = [name for name in sorted(below) if not name.startswith(".") and is_new(os.path.join(folder, name))]
        inside = os.path.relpath(folder, source)
        for name in names:
            if (kind := _kind(folder, name)) in EXTENSIONS:
                images.append(name if inside == "." else f"{inside}/{name}")
            else:
                others[kind] += 1
    return sorted(images), unreadable, others


def _kind(folder: str, name: str) -> str:
    if name.startswith("."):
        return "hidden"
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return "no regular files" if os.path.exists(path) else "broken links"
    return as_text(os.path.splitext(name)[1].lower()) or "no extension"


def _idx_items(source: Path) -> Found:
    images, labels = read_images(source)
    classes = [str(i) for i in range(int(labels.max()) + 1)] if labels is not None else []
    stamp, size = source.stat().st_mtime_ns, images[0].size
    numbers = labels.tolist() if labels is not None else [-1] * len(images)
    return Found([Item(f"{i:08d}", "png", f"{source}#{i}", str(source), i, size, stamp, number, pixels_HW=images[i])
                  for i, number in enumerate(numbers)], classes)  # fmt: skip


def _tar_items(tars: list[Path], source: Path, workers: int) -> Found:
    """Samples of tars are items, and what is wrong in them are items with a fault."""
    scans = run_all(_scan, tars, workers)
    new_key = key_maker()
    items, labels, others = [], [], Counter({"of no sample": sum(found.others for found in scans)})
    for tar, found in zip(tars, scans, strict=True):
        stamp, file = tar.stat().st_mtime_ns, str(tar)
        for sample in found.samples:
            path = as_text(f"{tar}/{sample.image}")
            items.append(Item(new_key(sample.key), sample.extension, path, file, sample.offset, sample.size, stamp))
            labels.append(sample.label)
        for name, reason in found.rejected:
            items.append(Item(new_key(name), "", as_text(f"{tar}/{name}"), file, fault=reason))
            labels.append(None)
        items += [Item(new_key(file), "", as_text(file), file, fault=found.damage)] * found.lost
        labels += [None] * found.lost
    numbers, classes = number_labels(labels, str(source))
    return Found([replace(item, label=number) for item, number in zip(items, numbers.tolist(), strict=True)], classes, others=+others)


def _scan(tar: Path, tally: Tally) -> Scan:
    return scan(tar, str(tar), tally, hashed=False)


def left_out(others: Counter[str]) -> str:
    """What to say of files that were not packed; nothing if there are none."""
    if not others:
        return ""
    kinds = ", ".join(kind for kind, _ in others.most_common(3)) + (" ..." if len(others) > 3 else "")
    return f", {others.total():,} file{'s' if others.total() > 1 else ''} of other kinds left out ({kinds})"
