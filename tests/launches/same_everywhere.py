"""`torchrun same_everywhere.py SCRIPT ARGUMENTS`: runs the script, then compares the trained weights of all ranks, bit by bit."""

import runpy
import sys
from typing import Any

import torch

from mimetic.engine import loop

train = loop.train


def train_and_compare(objective: Any, *arguments: Any, **options: Any) -> Any:
    train(objective, *arguments, **options)
    mine = torch.cat([value.double().flatten() for _, value in sorted(objective.state_dict().items())])
    all_of_them = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(all_of_them, mine)
    same = all(torch.equal(theirs, mine) for theirs in all_of_them)
    if torch.distributed.get_rank() == 0:
        print(f"{len(all_of_them)} ranks, {len(mine)} numbers: {'the same' if same else 'they differ'}", flush=True)
    return objective


loop.train = train_and_compare
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
