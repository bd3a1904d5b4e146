"""One rank of a stream in a process of its own: prints its batches as JSON lines, for tests/test_processes.py."""

import json
import sys
from typing import Any

from mimetic.data.cache import ShardCache, cache_folder
from mimetic.data.index import open_index
from mimetic.data.mixture import Mixture
from mimetic.data.stream import ShardStream


def read(sets: list[str], options: dict[str, Any], state: dict[str, Any] | None, stop: int) -> None:
    """Reads from a position (or the beginning) to batch `stop`; the last line is the position then."""
    indexes = tuple(open_index(path, ShardCache(cache_folder())) for path in sets)
    source = indexes[0] if len(indexes) == 1 else Mixture(indexes, tuple(range(1, len(indexes) + 1)), 50)
    stream = ShardStream(source, **options)
    if state:
        stream.load_state_dict(state)
    for batch in stream.run(stop):
        print(json.dumps(list(zip(batch["keys"], batch["valid"].tolist(), batch["image"].flatten(1).sum(1).tolist(), strict=True))))
    print(json.dumps(stream.state_dict()))


if __name__ == "__main__":
    read(**json.loads(sys.argv[1]))
