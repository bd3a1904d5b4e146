"""`mimetic replay`: computes a bad step again, alone, from its capsule, and shows where its numbers went wrong."""

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimetic.engine.config import parse
from mimetic.engine.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from mimetic.engine.capsules import Capsule
    from mimetic.engine.objective import Objective

SHOWN = 8


def replay(folder: Path, process: int | None) -> bool:
    """Prints each micro-batch's loss beside the one that training had, and what the modules put out.

    Args:
        folder: `RUN/capsules/step-00000123`.
        process: whose batches; the default is the first one with a loss that is not finite, else the first.

    Returns:
        Whether all losses are the same to the bit.

    Raises:
        CheckpointError: the capsule is damaged.
    """
    import torch

    from mimetic.engine.capsules import read_capsule
    from mimetic.engine.objective import reseed
    from mimetic.engine.runtime import autocast

    capsule = read_capsule(folder, process)
    told = capsule.told
    print(f"step {told['step'] + 1} of a {told['kind']} run, process {capsule.rank} of {told['world']}: gradient norm {told['norm']}, "
          f"limit {told['limit']}")  # fmt: skip
    device = torch.device(told["device"] if told["device"] == "cpu" or torch.accelerator.is_available() else "cpu")
    torch.set_num_threads(told["threads"])
    objective, recipe = _build(folder, told["kind"], device)
    objective.load_state_dict(capsule.weights)
    objective.to(device).train()
    autocast(objective, device, recipe.train.precision)
    if recipe.train.compile:
        print("the training was compiled, this is not: last digits may differ")
    watched = _Watched(objective)
    reseed(recipe.seed, told["step"], capsule.rank)
    objective.begin_step(told["step"], told["steps"])
    losses = []
    for batch, keys in zip(capsule.batches, capsule.keys, strict=True):
        loss = objective({name: value.to(device) for name, value in batch.items()} | {"keys": keys, "bad": []}).loss
        (loss / len(capsule.batches)).backward()
        losses.append(float(loss.detach()))
    same = _tell_losses(capsule, losses)
    watched.tell()
    _tell_gradients(objective)
    return same


def _build(folder: Path, kind: str, device: "torch.device") -> "tuple[Objective, Any]":
    """What the recipe trains: its own section tells the script."""
    import yaml

    from mimetic.data.opening import open_data, open_labelled
    from mimetic.engine.capsules import RECIPE
    from mimetic.finetune import classify
    from mimetic.finetune.recipe import ClassifyRecipe
    from mimetic.pretrain import beit, beit2, mae, simmim
    from mimetic.pretrain.pixel_recipes import MaeRecipe, SimmimRecipe
    from mimetic.pretrain.recipe import Beit2Recipe, BeitRecipe
    from mimetic.tokenizers import train_dvae, train_vqkd
    from mimetic.tokenizers.recipe import DvaeRecipe
    from mimetic.tokenizers.vqkd_recipe import VqkdRecipe

    scripts: dict[str, tuple[Any, Any]] = {  # sections of recipes, the most particular first
        "dvae": (DvaeRecipe, lambda recipe: train_dvae.build(recipe, open_data(recipe.data), device)),
        "vqkd": (VqkdRecipe, lambda recipe: train_vqkd.build(recipe, open_data(recipe.data), device)),
        "labels": (ClassifyRecipe, lambda recipe: classify.build(recipe, open_labelled(recipe.data), device)),
        "simmim": (SimmimRecipe, lambda recipe: simmim.build(recipe, open_data(recipe.data), device).objective),
        "mae": (MaeRecipe, lambda recipe: mae.build(recipe, open_data(recipe.data), device).objective),
        "aggregation": (Beit2Recipe, lambda recipe: beit2.build(recipe, open_data(recipe.data), device).objective),
        "tokenizer": (BeitRecipe, lambda recipe: beit.build(recipe, open_data(recipe.data), device).objective),
    }
    settings = yaml.safe_load((folder / RECIPE).read_text())
    for section, (recipe_class, build) in scripts.items():
        if section in settings:
            recipe = parse(recipe_class, example="", argv=["--config", str(folder / RECIPE), "--out", str(folder)]).recipe
            return build(recipe), recipe
    raise CheckpointError(f"{folder} is of a {kind} run that this version cannot replay")


class _Watched:
    """Hears what every module puts out."""

    def __init__(self, objective: "Objective") -> None:
        self.scales: dict[str, float] = {}
        for name, module in objective.named_modules():
            if name:
                module.register_forward_hook(lambda _, __, output, name=name: self._note(name, output))

    def _note(self, name: str, output: Any) -> None:
        import torch

        tensors = [value for value in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(value, torch.Tensor)]
        if tensors and tensors[0].is_floating_point():
            self.scales[name] = float(tensors[0].detach().float().square().mean().sqrt())

    def tell(self) -> None:
        """The first module whose output is not finite, or those of the largest."""
        broken = [name for name, scale in self.scales.items() if not math.isfinite(scale)]
        if broken:
            print(f"the first output that is not finite is that of {broken[0]} ({len(broken)} of {len(self.scales)} modules)")
            return
        print("all outputs are finite; the largest, by root mean square:")
        for name, scale in sorted(self.scales.items(), key=lambda pair: -pair[1])[:SHOWN]:
            print(f"  {scale:12.4g}  {name}")


def _tell_losses(capsule: "Capsule", losses: list[float]) -> bool:
    same = True
    for number, (then, now) in enumerate(zip(capsule.losses, losses, strict=True)):
        equal = struct.pack("d", then) == struct.pack("d", now) or (math.isnan(then) and math.isnan(now))
        same &= equal
        keys = capsule.keys[number]
        named = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        print(f"micro-batch {number + 1} of {len(losses)} ({len(keys)} images: {named}): loss {then:.9g} then, {now:.9g} now, "
              f"{'the same to the bit' if equal else 'NOT the same'}")  # fmt: skip
    return same


def _tell_gradients(objective: "Objective") -> None:
    norms = {name: float(p.grad.float().norm()) for name, p in objective.named_parameters() if p.grad is not None}
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if broken:
        named = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
        print(f"this process's own gradient is not finite in {len(broken)} of {len(norms)} parameters: {named}")
        return
    print(f"this process's own gradient is finite, its norm {math.hypot(*norms.values()):.4g}; the largest:")
    for name, norm in sorted(norms.items(), key=lambda pair: -pair[1])[:SHOWN]:
        print(f"  {norm:12.4g}  {name}")
