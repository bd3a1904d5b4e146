"""`torchrun poisoned_rank.py STEP FACTOR SCRIPT ARGUMENTS`: runs the script; at that step (from 0) rank 1's gradient is multiplied.

Each process notes when it stops, in `OUT-left-RANK`.
"""

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from poison import poisoned

from mimetic.engine import runtime

_, step, factor, *sys.argv = sys.argv
rank, out = int(os.environ["RANK"]), sys.argv[sys.argv.index("--out") + 1]
leave = runtime._leave


def note_and_leave(*words: Any, **options: Any) -> None:
    Path(f"{out}-left-{rank}").write_text(str(time.time()))
    leave(*words, **options)


runtime._leave = note_and_leave
poisoned({int(step): float(factor)}, rank=1, own_rank=rank)
runpy.run_path(sys.argv[0], run_name="__main__")
