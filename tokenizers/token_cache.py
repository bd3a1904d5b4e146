"""Token shards: views of images that are kept as what was drawn for them and as the tokenizer's ids, to be joined with the images again.

A folder holds `tokens.json` and, for each shard of images and each range of views, a tar such as
`tokens-00000-views-0000-0003.tar`, with the images' keys in the images' order (`mimetic.tokenizers.token_tar` has its bytes).

View v is what training without a cache sees in epoch v: the seed of both is mix(seed, v, sample). `tokens.json` names all that this
follows from (the terms), and a training that differs in any of it is refused.

Legend: B batch, P Q token grid.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mimetic.data.index import DAMAGE, Index
from mimetic.data.picture import Picture
from mimetic.data.randomness import mix
from mimetic.data.stream import Transform
from mimetic.data.views import MASK, Drawn, PretrainViews
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import DataError, SettingError
from mimetic.tokenizers.token_tar import AGAIN, read_rows, row_type

VERSION, CONTENTS = 1, "tokens.json"

Terms = dict[str, Any]


@dataclass(frozen=True)
class File:
    """A tar of tokens.

    Attributes:
        name: in the folder.
        bytes: of the whole file.
        sha256: of the whole file.
        data: bytes from an image's header to its first view.
        record: bytes from one image's header to the next one's.
    """

    name: str
    bytes: int
    sha256: str
    data: int
    record: int


@dataclass
class Part:
    """A range of views, `first` to `last` - 1, of all shards: files by number of the shard, as far as they are written."""

    first: int
    last: int
    files: dict[int, File]


@dataclass
class Contents:
    """What `tokens.json` says."""

    terms: Terms
    grid: tuple[int, int]
    parts: list[Part]

    @property
    def views(self) -> int:
        """Of each image."""
        return self.parts[-1].last if self.parts else 0

    def write(self, folder: Path) -> None:
        """Replaces the file."""
        parts = [{"views": [part.first, part.last], "files": {str(n): dataclasses.asdict(part.files[n]) for n in sorted(part.files)}}
                 for part in self.parts]  # fmt: skip
        told = {"version": VERSION, "made_with": self.terms, "grid": self.grid, "parts": parts}
        write_atomically(folder / CONTENTS, json.dumps(told, indent=1) + "\n")


def read_contents(folder: Path) -> Contents:
    """Reads `tokens.json`.

    Raises:
        DataError: missing, damaged, or of another version.
    """
    try:
        told = json.loads((folder / CONTENTS).read_text())
        if told["version"] != VERSION:
            raise DataError(f"{folder / CONTENTS} has version {told['version']}, this program reads version {VERSION}; make it anew")
        parts = [Part(int(part["views"][0]), int(part["views"][1]), {int(n): File(**file) for n, file in part["files"].items()})
                 for part in told["parts"]]  # fmt: skip
        if [part.first for part in parts] != [0, *(part.last for part in parts)][: len(parts)]:
            raise ValueError("views are missing between its parts")
        rows, columns = map(int, told["grid"])
        return Contents(dict(told["made_with"]), (rows, columns), parts)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder}: no {CONTENTS} there; make it with `mimetic tokens` (--help has an example)") from None
    except DAMAGE as error:
        raise DataError(f"{folder / CONTENTS} is damaged ({type(error).__name__}: {error}); make it anew in another folder") from None


def terms_of(views: PretrainViews, index: Index, tokenizer_hash: str, precision: str, seed: int) -> Terms:
    """All that the tokens of a view follow from, under the names of the settings."""
    augmentation = views.augmentation
    return {"tokenizer.path": tokenizer_hash, "tokenizer.precision": precision, "data.index": index.fingerprint, "seed": seed,
            "backbone.image_size": views.image_size, "views.target_size": views.target_size, "interpolation": views.target_interpolation,
            "views.crop_low": augmentation.scale[0], "views.crop_high": augmentation.scale[1],
            "views.shift": augmentation.shift, "views.flip": augmentation.flip, "views.jitter": augmentation.jitter}  # fmt: skip


def check_terms(folder: Path, theirs: Terms, ours: Terms) -> None:
    """Refuses a cache whose views are not those that the recipe would draw.

    Raises:
        SettingError: the line names each setting, and both values.
    """
    told = [f"{name} {str(theirs.get(name))[:12]} there, {str(value)[:12]} here" for name, value in ours.items()
            if theirs.get(name) != value]  # fmt: skip
    if told:
        raise SettingError(f"{folder} holds tokens of other views ({'; '.join(told)}): use what it was made with, or make tokens for this "
                           "recipe with `mimetic tokens`, in another folder")  # fmt: skip


@dataclass(frozen=True)
class TokenCache:
    """An opened cache.

    Attributes:
        folder: where it lies.
        index: of the images.
        contents: what it holds.
    """

    folder: Path
    index: Index
    contents: Contents

    @property
    def views(self) -> int:
        """Of each image."""
        return self.contents.views

    def read(self, samples_B: NDArray[np.int64], views_B: NDArray[np.int64]) -> tuple[Drawn, NDArray[np.uint16]]:
        """What was drawn for these samples in these views, and ids_BPQ.

        Raises:
            DataError: a file is gone or damaged, or holds other images.
        """
        row = row_type(self.contents.grid)
        rows_B = np.empty(len(samples_B), row)
        shards_B, keys_B = self.index.shard_of(samples_B), self.index.key_table(samples_B)
        parts_B = np.searchsorted([part.last for part in self.contents.parts], views_B, "right")
        for number, shard in sorted(set(zip(parts_B.tolist(), shards_B.tolist(), strict=True))):
            part, here = self.contents.parts[number], np.flatnonzero((parts_B == number) & (shards_B == shard))
            file, places, views = part.files[shard], samples_B[here] - self.index.starts[shard], views_B[here] - part.first
            rows_B[here] = read_rows(self.folder / file.name, row, file.data, file.record,
                                     places.tolist(), keys_B[here].tolist(), views.tolist())  # fmt: skip
        return Drawn(rows_B["box"].astype(np.int64), rows_B["flip"], rows_B["seed"]), rows_B["ids"]


def open_cache(folder: Path, index: Index, terms: Terms) -> TokenCache:
    """Opens a whole cache for what the terms say; what is in its files is checked as it is read.

    Raises:
        DataError: none there, damaged, or written in part.
        SettingError: it was made with other terms.
    """
    contents = read_contents(folder)
    check_terms(folder, contents.terms, terms)
    wanted = set(np.flatnonzero(np.diff(index.starts)).tolist())
    for part in contents.parts:
        if missing := wanted - part.files.keys():
            raise DataError(f"{folder} holds views {part.first} to {part.last - 1} of {len(wanted) - len(missing)} of {len(wanted)} "
                            f"shards; {AGAIN}")  # fmt: skip
        for path, size in ((folder / file.name, file.bytes) for file in part.files.values()):
            found = path.stat().st_size if path.exists() else 0
            if found != size:
                raise DataError(f"{path} has {found} bytes, {CONTENTS} says {size}; {AGAIN}")
    if not contents.views:
        raise DataError(f"{folder} holds no views yet; {AGAIN}")
    return TokenCache(folder, index, contents)


class CachedViews:
    """As `PretrainViews`, with `ids` (int64 BPQ) in place of `target`: epoch e sees view e mod N of N, under masks of its own."""

    def __init__(self, cache: TokenCache, views: PretrainViews) -> None:
        self.cache, self.views = cache, views

    def at(self, samples_B: NDArray[np.int64], epochs_B: NDArray[np.int64]) -> Transform:
        """The views of these samples; as `mimetic.data.stream.PlacedTransform`."""
        drawn, ids_BPQ = self.cache.read(samples_B, epochs_B % self.cache.views)

        def transform(images: Sequence[Picture], seeds_B: NDArray[np.uint64]) -> dict[str, torch.Tensor]:
            batch = self.views.made(images, drawn, ("image",)) | {"ids": torch.from_numpy(ids_BPQ.astype(np.int64))}
            return batch if self.views.masks is None else batch | {"hidden": self.views.masks.sample(mix(seeds_B, MASK))}

        return transform
