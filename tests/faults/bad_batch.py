"""`bad_batch.py KEY SCRIPT ARGUMENTS`: runs the script; the loss of every training batch with the sample KEY is infinite."""

import math
import runpy
import sys

from mimetic.pretrain.mim import MaskedImageModeling

_, key, *sys.argv = sys.argv
forward = MaskedImageModeling.forward


def spoilt(self, batch):
    output = forward(self, batch)
    return output._replace(loss=output.loss * math.inf) if self.training and key in batch.get("keys", ()) else output


MaskedImageModeling.forward = spoilt
runpy.run_path(sys.argv[0], run_name="__main__")
