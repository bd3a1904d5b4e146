"""Writing an index: the format that `mimetic.data.index` reads."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mimetic.data.index import ROW, VERSION
from mimetic.engine.config import write_atomically


@dataclass(frozen=True)
class Part:
    """One shard's share of an index.

    Attributes:
        name: of the shard, relative to the index, or an address.
        size: bytes of the whole shard.
        sha256: of the whole shard, in hex.
        rows: (n,) of ROW, where `key` counts from the first byte of `keys`.
        keys: each with a line feed after it.
    """

    name: str
    size: int
    sha256: str
    rows: NDArray[Any]
    keys: bytes


def write_index(folder: Path, parts: Iterable[Part], samples: int, *, classes: list[str], image: dict[str, Any],
                **more: Any) -> dict[str, Any]:  # fmt: skip
    """Writes samples.npy, keys.txt and, last, index.json; memory is that of one shard's rows.

    Args:
        folder: where the three go; an index that is there is replaced.
        parts: in shard order.
        samples: of all parts together.
        classes: names in the order of label numbers.
        image: `channels`, and `mean` and `std` per channel of pixels in [0, 1].
        more: further entries of index.json.

    Returns:
        The content of index.json.
    """
    (folder / "index.json").unlink(missing_ok=True)  # a kill in between leaves no index, rather than one that contradicts itself
    shards: list[dict[str, Any]] = []
    first, begin = 0, 0
    rows = np.lib.format.open_memmap(folder / "samples.npy", "w+", ROW, (samples,))
    with (folder / "keys.txt").open("wb") as keys:
        for part in parts:
            place = slice(first, first := first + len(part.rows))
            rows[place] = part.rows
            rows["key"][place] += np.uint64(begin)
            begin += keys.write(part.keys)
            shards.append({"name": part.name, "samples": len(part.rows), "bytes": part.size, "sha256": part.sha256})
        keys.flush()
        os.fsync(keys.fileno())
    assert first == samples
    rows.flush()
    files = {name: _described(folder / name) for name in ("samples.npy", "keys.txt")}
    summary = {"version": VERSION, "samples": samples, **more, "classes": classes, "image": image, "files": files, "shards": shards}
    write_atomically(folder / "index.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _described(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}
