"""Writes beit_20_steps.txt, the losses that tests hold every engine to: `python tests/golden/write.py`.

Only when the numbers are meant to change; the commit that changes them says why.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import tinyruns

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        world = tinyruns.make_world(Path(folder) / "world")
        run = tinyruns.run_here("beit", tinyruns.beit_arguments(world, Path(folder) / "run"))
        losses = tinyruns.losses(run)
    assert len(losses) == 20
    Path(__file__).with_name("beit_20_steps.txt").write_text("".join(f"{loss:.6f}\n" for loss in losses))
