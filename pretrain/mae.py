"""MAE pretraining: `accelerate launch pretrain/mae.py --config launch/recipes/mae_vit_base_in1k.yaml --out runs/mae`."""

from typing import TYPE_CHECKING

from mimetic.engine.config import Invocation, parse
from mimetic.engine.errors import SettingError
from mimetic.engine.runtime import run_entry
from mimetic.pretrain.pixel_recipes import MaeRecipe, hidden_count
from mimetic.pretrain.running import Pretraining, finished, run_pretraining

if TYPE_CHECKING:
    import torch

    from mimetic.data.index import Index
    from mimetic.data.mixture import Mixture

EXAMPLE = "accelerate launch pretrain/mae.py --config launch/recipes/mae_fashion_mnist.yaml --out runs/mae"


def main() -> None:
    """Entry point."""
    invocation = parse(MaeRecipe, example=EXAMPLE)
    if not finished(invocation):
        pretrain(invocation)


def pretrain(invocation: Invocation[MaeRecipe]) -> None:
    """Trains, and leaves the encoder in `RUN/backbone`."""
    run_pretraining(invocation, build)


def build(recipe: MaeRecipe, index: "Index | Mixture", device: "torch.device") -> Pretraining:
    """Encoder, decoder, and the view that is partly hidden.

    Raises:
        SettingError: the backbone cannot encode visible patches alone, or nothing would be visible.
    """
    import torch

    from mimetic.backbones.catalog import create_backbone
    from mimetic.backbones.vit import ViT
    from mimetic.data.masks import RandomMasks
    from mimetic.data.views import UNALTERED, Augmentation, MaskedViews, Normalize
    from mimetic.pretrain.autoencoder import MAE, Decoder

    settings, mae, views = recipe.backbone, recipe.mae, recipe.views
    torch.manual_seed(recipe.seed)
    backbone = create_backbone(settings.name, image_size=settings.image_size, in_channels=index.channels, **settings.overrides)
    if not isinstance(backbone, ViT):
        raise SettingError(f"MAE encodes visible patches alone, which {settings.name} cannot; set backbone.name to a ViT "
                           "(mimetic models 'vit*'), or pretrain it with pretrain/simmim.py")  # fmt: skip
    backbone.grad_checkpointing = settings.grad_checkpointing
    grid = backbone.mask_grid
    masks = RandomMasks(grid, hidden_count("mae.ratio", mae.ratio, grid[0] * grid[1]))
    outputs = backbone.patch_size[0] * backbone.patch_size[1] * index.channels
    decoder = Decoder(backbone.embed_dim, grid, outputs, mae.decoder_embed_dim, mae.decoder_depth, mae.decoder_num_heads)
    normalize = Normalize(tuple(views.mean or index.mean), tuple(views.std or index.std)).for_channels(index.channels)

    augmentation = Augmentation((views.crop_low, 1.0), views.shift, views.flip)
    training, plain = (MaskedViews(backbone.image_size[0], each, masks) for each in (augmentation, UNALTERED))
    title = f"MAE pretraining of {settings.name} ({sum(p.numel() for p in backbone.parameters()) / 1e6:.1f} M parameters) without labels"
    objective = MAE(backbone, decoder, normalize, masks.count, mae.norm_pix_loss)
    return Pretraining(objective, training, plain, title, best="masked_loss", lowest=True)


if __name__ == "__main__":
    run_entry(main)
