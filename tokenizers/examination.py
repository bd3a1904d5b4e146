"""`mimetic doctor`: examines a tokenizer on shards of images and says whether it is fit to teach a network there."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimetic.data.index import Index
from mimetic.data.mixture import Mixture
from mimetic.data.opening import open_set
from mimetic.data.picture import Picture, in_unit_range
from mimetic.data.stream import ShardStream
from mimetic.data.views import ClassifyViews
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import CheckpointError, DataError, SettingError
from mimetic.engine.words import duration
from mimetic.tokenizers.contract import ImageTokenizer, only_size
from mimetic.tokenizers.doctor import collect, measure
from mimetic.tokenizers.drawings import draw
from mimetic.tokenizers.files import open_tokenizer, provenance_of, refuse_other_images, tokenizer_hash
from mimetic.tokenizers.telling import conclusion, findings, page
from mimetic.tokenizers.verdict import LIMITS, REFERENCE, judge, reference_of, too_little

BATCH, TELL_EVERY = 32, 5.0
LARGEST = 256  # pixels of a side where nobody says how large images should be


def examine(path: str, shards: str, out: Path | None = None, images: int = 512, image_size: int | None = None,
            to_json: Path | None = None) -> str:  # fmt: skip
    """Prints what was measured and the verdict, whose word it returns.

    Args:
        path: a tokenizer's folder, or the run that trained it.
        shards: images that it did not learn from, as `open_set` takes them.
        out: a folder for doctor.json, doctor.md and pictures.
        images: how many, at most.
        image_size: side in pixels; by default what the tokenizer was trained at, or else what fits the images.
        to_json: a file for doctor.json alone.

    Raises:
        CheckpointError: no tokenizer there.
        DataError: no shards there, or images on which nothing can be said.
        SettingError: images of other channels or another pixel range, a size that is no whole number of cells, or a place that cannot
            be written.
    """
    for folder in (out, to_json and to_json.parent):
        if folder is not None:
            refuse_unwritable(folder)
    tokenizer, index = open_tokenizer(path), open_set(shards)
    provenance = provenance_of(path)
    reference = reference_in(provenance, path)
    size = image_size or only_size(tokenizer) or provenance.get("image_size") or fitting_size(index, tokenizer.stride)
    refuse_what_does_not_fit(path, tokenizer, index, images, size)
    images = min(images, len(index))
    title = (f"tokenizer {path} ({tokenizer.vocab_size:,} codes, cells of {tokenizer.stride} pixels) on {images:,} of the {len(index):,} "
             f"images of {shards}, at {size}x{size} pixels: {(size // tokenizer.stride) ** 2:,} tokens each")  # fmt: skip
    print(title, flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer.to(device)  # type: ignore[attr-defined]
    seen = collect(tokenizer, read_images(index, images, size, device))
    if reason := too_little(seen):
        raise DataError(f"{shards}: {reason}")
    print(f"measuring shifts and reconstructions on the first {len(seen.image_KCHW)} images", flush=True)
    figures = measure(tokenizer, seen)
    verdict = judge(figures, reference)
    told = conclusion(verdict, path, shards)
    print(*(f"{what:<15} {found}" for what, found in findings(figures, reference)), *told, sep="\n", flush=True)
    content = json.dumps({
        "tokenizer": {"path": path, "sha256": tokenizer_hash(path), "vocab_size": tokenizer.vocab_size, "stride": tokenizer.stride,
                      "in_channels": tokenizer.in_channels},
        "data": {"index": shards, "fingerprint": index.fingerprint, "samples": len(index), "image_size": size},
        "verdict": asdict(verdict), "figures": asdict(figures), "reference": reference, "thresholds": asdict(LIMITS),
    }, indent=1) + "\n"  # fmt: skip
    if to_json is not None:
        write_all(to_json.parent, {to_json.name: content})
    if out is not None:
        pictures = draw(tokenizer, seen, figures)
        write_all(out, {"doctor.json": content, "doctor.md": page(title, figures, reference, told, list(pictures))} | pictures)
        print(f"pictures and figures: {out}/doctor.md, {out}/doctor.json", flush=True)
    return verdict.word


def refuse_what_does_not_fit(path: str, tokenizer: ImageTokenizer, index: Index, images: int, size: int) -> None:
    """Raises SettingError for images of another kind, too few of them, or a size that is no whole number of cells."""
    refuse_other_images(path, tokenizer, index)
    stride = tokenizer.stride
    if images < 2:
        raise SettingError(f"--images {images}: a tokenizer is judged on two images or more; give some hundred")
    if size < 1 or size % stride:
        raise SettingError(f"--image-size {size} is no multiple of the tokenizer's stride {stride}; use {max(1, size // stride) * stride}")
    if only_size(tokenizer) not in (None, size):
        raise SettingError(f"--image-size {size}: the tokenizer takes images of {only_size(tokenizer)} pixels alone; leave it out")


def fitting_size(index: Index, stride: int) -> int:
    """Return the largest whole number of cells that fits the smallest of the first images, up to about 256 pixels; one cell at least."""
    sizes = [Picture(index.read(sample), index.channels, index.range).shape[1:] for sample in range(min(16, len(index)))]
    return max(1, min(LARGEST, *map(min, sizes)) // stride) * stride


def read_images(index: Index | Mixture, images: int, size: int, device: torch.device) -> Iterator[Tensor]:
    """Yield image_BCHW in [0, 1], `images` in all, drawn from all over the shards: the same ones every time. Tells how far it is."""
    stream = ShardStream(index, min(BATCH, images), transform=ClassifyViews(size, None))
    started = told = time.perf_counter()
    done, bad = 0, 0
    for batch in stream.run(-(-images // stream.global_batch)):
        image_BCHW = batch["image"][batch["valid"]][: images - done]
        yield in_unit_range(image_BCHW.to(device))
        done, bad = done + len(image_BCHW), bad + len(batch["bad"])
        if (now := time.perf_counter()) - told > TELL_EVERY and done < images:
            told, rate = now, done / (now - started)
            print(f"{done:,}/{images:,} images  {rate:.3g} images/s  {duration((images - done) / rate)} left", flush=True)
    if bad:
        print(f"{bad:,} images do not decode and are left out; `mimetic check` names them", flush=True)


def reference_in(provenance: dict[str, Any], path: str) -> dict[str, Any] | None:
    """Return the figures of its own held-out images that a tokenizer's folder keeps, if it does.

    Raises:
        CheckpointError: some of them are missing.
    """
    reference = provenance.get("reference")
    if reference is not None and (missing := [name for name in REFERENCE if name not in reference]):
        raise CheckpointError(f"{path}: its reference figures lack {missing[0]}; they were written by another version: train it again")
    return reference


def reference_figures(tokenizer: ImageTokenizer, index: Index | Mixture, size: int, device: torch.device,
                      images: int = 512) -> dict[str, Any] | None:  # fmt: skip
    """Return what a training keeps of its own held-out images for the doctor to compare with; None if nothing can be said on them."""
    seen = collect(tokenizer, read_images(index, min(images, len(index)), size, device))
    return None if too_little(seen) else reference_of(measure(tokenizer, seen, shifts=False))


def refuse_unwritable(folder: Path) -> None:
    """Raises SettingError if a folder cannot be written, or made: before the long work."""
    nearest = next(place for place in (folder.resolve(), *folder.resolve().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise SettingError(f"{folder}: {nearest} is no folder that can be written; give another one")


def write_all(folder: Path, files: dict[str, str | bytes]) -> None:
    """Writes files into a folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)
