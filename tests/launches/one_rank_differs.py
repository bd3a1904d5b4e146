"""`torchrun one_rank_differs.py NAME VALUE SCRIPT ARGUMENTS`: runs the script; rank 1 has another value of a setting, or other code."""

import os
import runpy
import sys

_, name, value, *sys.argv = sys.argv
if os.environ["RANK"] == "1":
    if name == "code":
        from mimetic.engine import starting

        own = starting.versions
        starting.versions = lambda: own() | {"mimetic": value}  # type: ignore[assignment]
    else:
        sys.argv += [f"--{name}", value]
runpy.run_path(sys.argv[0], run_name="__main__")
