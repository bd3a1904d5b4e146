"""`accelerate launch deepspeeds_own.py FOLDER SCRIPT ARGUMENTS`: at the end of the training DeepSpeed saves its own checkpoint too."""

import runpy
import sys
from typing import Any

from mimetic.engine import sharding

_, folder, *sys.argv = sys.argv
own = sharding.Split.consolidate


def save_and_consolidate(self: Any) -> None:
    self.model.save_checkpoint(folder, tag="end")
    own(self)


sharding.Split.consolidate = save_and_consolidate  # type: ignore[method-assign]
runpy.run_path(sys.argv[0], run_name="__main__")
