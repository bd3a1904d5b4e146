"""SimMIM pretraining: `accelerate launch pretrain/simmim.py --config launch/recipes/simmim_swin_base_in1k.yaml --out runs/simmim`."""

from typing import TYPE_CHECKING

from mimetic.engine.config import Invocation, parse
from mimetic.engine.runtime import run_entry
from mimetic.pretrain.pixel_recipes import SimmimRecipe, hidden_count
from mimetic.pretrain.running import Pretraining, finished, run_pretraining

if TYPE_CHECKING:
    import torch

    from mimetic.data.index import Index
    from mimetic.data.mixture import Mixture

EXAMPLE = "accelerate launch pretrain/simmim.py --config launch/recipes/simmim_fashion_mnist.yaml --out runs/simmim"


def main() -> None:
    """Entry point."""
    invocation = parse(SimmimRecipe, example=EXAMPLE)
    if not finished(invocation):
        pretrain(invocation)


def pretrain(invocation: Invocation[SimmimRecipe]) -> None:
    """Trains, and leaves the backbone in `RUN/backbone`."""
    run_pretraining(invocation, build)


def build(recipe: SimmimRecipe, index: "Index | Mixture", device: "torch.device") -> Pretraining:
    """Backbone, decoder, and the view that is partly hidden.

    Raises:
        SettingError: backbone, squares and data do not fit each other.
    """
    import torch

    from mimetic.backbones.catalog import create_backbone
    from mimetic.data.masks import RandomMasks
    from mimetic.data.views import UNALTERED, Augmentation, MaskedViews, Normalize
    from mimetic.pretrain.pixels import SimMIM, map_stride, pixel_decoder, unit_grid

    settings, simmim, views = recipe.backbone, recipe.simmim, recipe.views
    torch.manual_seed(recipe.seed)
    backbone = create_backbone(settings.name, image_size=settings.image_size, in_channels=index.channels, **settings.overrides)
    backbone.grad_checkpointing = settings.grad_checkpointing
    grid = unit_grid(backbone, simmim.unit)
    masks = RandomMasks(grid, hidden_count("simmim.ratio", simmim.ratio, grid[0] * grid[1]))
    decoder = pixel_decoder(backbone.embed_dim, map_stride(backbone), index.channels)
    normalize = Normalize(tuple(views.mean or index.mean), tuple(views.std or index.std)).for_channels(index.channels)

    augmentation = Augmentation((views.crop_low, 1.0), views.shift, views.flip)
    training, plain = (MaskedViews(backbone.image_size[0], each, masks) for each in (augmentation, UNALTERED))
    title = f"SimMIM pretraining of {settings.name} ({sum(p.numel() for p in backbone.parameters()) / 1e6:.1f} M parameters) without labels"
    objective = SimMIM(backbone, decoder, normalize, masks.count, simmim.norm_target)
    return Pretraining(objective, training, plain, title, best="masked_loss", lowest=True)


if __name__ == "__main__":
    run_entry(main)
