"""Images whose bytes are those of another one."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mimetic.data.packing.items import Item
from mimetic.data.packing.workers import Tally, run_all
from mimetic.engine.config import write_atomically

PIECE = 4096  # images that a process reads at a time


def find_duplicates(file: Path, items: list[Item], workers: int) -> dict[int, int]:
    """Which items have the bytes of which earlier one. Only those of equal size are read.

    Args:
        file: where the answer is kept, for a start after a kill.
        items: numbered as in the answer.
        workers: processes.
    """
    with suppress(OSError, ValueError):
        return {int(later): first for later, first in json.loads(file.read_bytes()).items()}
    by_size = defaultdict(list)
    for number, item in enumerate(items):
        if item.size and not item.fault:
            by_size[item.size].append(number)
    numbers = sorted(number for group in by_size.values() if len(group) > 1 for number in group)
    pieces = [numbers[i : i + PIECE] for i in range(0, len(numbers), PIECE)]
    digests = [digest for part in run_all(_digests, [[items[i] for i in piece] for piece in pieces], workers) for digest in part]
    first: dict[bytes, int] = {}
    found = {}
    for number, digest in zip(numbers, digests, strict=True):
        if digest and first.setdefault(digest, number) != number:
            found[number] = first[digest]
    write_atomically(file, json.dumps(found))
    return found


def _digests(items: Sequence[Item], tally: Tally) -> list[bytes]:
    digests = []
    for item in items:
        try:
            digests.append(hashlib.sha256(item.read()).digest())
        except (OSError, ValueError):  # told when it is packed
            digests.append(b"")
        tally.add(1, item.size)
    return digests
