"""`torchrun poisoned_rank.py STEP FACTOR SCRIPT ARGUMENTS`: runs the script; at that step (from 0) rank 1's gradient is multiplied.

Each process notes when it leaves, in `OUT-left-RANK`.
"""

import atexit
import os
import runpy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from poison import poisoned

_, step, factor, *sys.argv = sys.argv
rank, out = int(os.environ["RANK"]), sys.argv[sys.argv.index("--out") + 1]
leave = os._exit


def note(code: int | None = None) -> None:
    Path(f"{out}-left-{rank}").write_text(str(time.time()))
    if code is not None:
        leave(code)


os._exit = note  # type: ignore[assignment]
atexit.register(note)
poisoned({int(step): float(factor)}, rank=1, own_rank=rank)
runpy.run_path(sys.argv[0], run_name="__main__")
