"""`torchrun one_rank_elsewhere.py DATA SCRIPT ARGUMENTS`: runs the script, but rank 1 reads DATA, as if its disk were another."""

import os
import runpy
import sys

_, data, script, *arguments = sys.argv
if os.environ["RANK"] == "1":
    arguments[arguments.index("--data.index") + 1] = data
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
