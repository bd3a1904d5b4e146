"""BEiT v2 pretraining: `accelerate launch pretrain/beit2.py --config launch/recipes/beit2_base_in1k.yaml --out runs/beit2`."""

from functools import partial
from typing import TYPE_CHECKING

from mimetic.engine.config import Invocation, parse
from mimetic.engine.runtime import run_entry
from mimetic.pretrain.beit import assemble
from mimetic.pretrain.recipe import Beit2Recipe
from mimetic.pretrain.running import Pretraining, finished, run_pretraining

if TYPE_CHECKING:
    import torch

    from mimetic.data.index import Index
    from mimetic.data.mixture import Mixture

EXAMPLE = "accelerate launch pretrain/beit2.py --config launch/recipes/beit2_fashion_mnist.yaml --out runs/beit2"


def main() -> None:
    """Entry point."""
    invocation = parse(Beit2Recipe, example=EXAMPLE)
    if not finished(invocation):
        pretrain(invocation)


def pretrain(invocation: Invocation[Beit2Recipe]) -> None:
    """Trains, and leaves the backbone in `RUN/backbone`."""
    run_pretraining(invocation, build)


def build(recipe: Beit2Recipe, index: "Index | Mixture", device: "torch.device") -> Pretraining:
    """BEiT v2 for the recipe's data: both networks see the same pixels, resized bicubically.

    Raises:
        SettingError: as `assemble` does, or a backbone that patches cannot be aggregated in.
    """
    from mimetic.pretrain.aggregation import PatchAggregation

    method = partial(PatchAggregation, layer=recipe.aggregation.layer, head_layers=recipe.aggregation.head_layers)
    return assemble(recipe, index, device, "BEiT v2", method, target_interpolation="bicubic")


if __name__ == "__main__":
    run_entry(main)
