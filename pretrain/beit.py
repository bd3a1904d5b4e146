"""BEiT pretraining: `accelerate launch pretrain/beit.py --config launch/recipes/beit_base_in1k.yaml --out runs/beit`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mimetic.engine.config import Invocation, parse
from mimetic.engine.errors import SettingError
from mimetic.engine.runtime import run_entry
from mimetic.pretrain.recipe import BeitRecipe
from mimetic.pretrain.running import Pretraining, finished, run_pretraining

if TYPE_CHECKING:
    import torch

    from mimetic.data.index import Index
    from mimetic.data.mixture import Mixture
    from mimetic.data.views import PretrainViews
    from mimetic.pretrain.mim import MaskedImageModeling
    from mimetic.tokenizers.token_cache import CachedViews

EXAMPLE = "accelerate launch pretrain/beit.py --config launch/recipes/demo_pretrained.yaml --out runs/beit"


def main() -> None:
    """Entry point."""
    invocation = parse(BeitRecipe, example=EXAMPLE)
    if not finished(invocation):
        pretrain(invocation)


def pretrain(invocation: Invocation[BeitRecipe]) -> None:
    """Trains, and leaves the backbone in `RUN/backbone`."""
    run_pretraining(invocation, build)


def build(recipe: BeitRecipe, index: "Index | Mixture", device: "torch.device") -> Pretraining:
    """BEiT for the recipe's data; raises what `assemble` does."""
    from mimetic.pretrain.mim import MaskedImageModeling

    return assemble(recipe, index, device, "BEiT", MaskedImageModeling)


def assemble(recipe: BeitRecipe, index: "Index | Mixture", device: "torch.device", called: str,
             method: "Callable[..., MaskedImageModeling]", target_interpolation: str = "lanczos") -> Pretraining:  # fmt: skip
    """Tokenizer, backbone, head, and the views that they see.

    Args:
        called: the method's name.
        method: makes the objective of backbone, tokenizer, head, normalization and device.
        target_interpolation: how the tokenizer's view is resized, "lanczos" or "bicubic".

    Raises:
        SettingError: tokenizer, backbone and data do not fit each other.
    """
    import torch

    from mimetic.backbones.catalog import create_backbone
    from mimetic.data.masks import mask_generator
    from mimetic.data.views import UNALTERED, Augmentation, Normalize, PretrainViews
    from mimetic.pretrain.mim import TokenHead, check_grids
    from mimetic.tokenizers.contract import only_size
    from mimetic.tokenizers.files import open_tokenizer, refuse_other_images

    tokenizer = open_tokenizer(recipe.tokenizer.path, recipe.tokenizer.precision)
    settings, views, mask = recipe.backbone, recipe.views, recipe.mask
    refuse_other_images(recipe.tokenizer.path, tokenizer, index)
    torch.manual_seed(recipe.seed)
    backbone = create_backbone(settings.name, image_size=settings.image_size, in_channels=index.channels, **settings.overrides)
    backbone.grad_checkpointing = settings.grad_checkpointing
    if len({side // cells for side, cells in zip(backbone.image_size, backbone.mask_grid, strict=True)}) > 1:
        raise SettingError("backbone.overrides.patch_size must be square here: the tokenizer's cells are")
    target_size = views.target_size or backbone.mask_grid[0] * tokenizer.stride
    if target_size % tokenizer.stride:
        raise SettingError(f"views.target_size {target_size} is no multiple of the tokenizer's stride {tokenizer.stride}; use "
                           f"{backbone.mask_grid[0] * tokenizer.stride}")  # fmt: skip
    if (side := only_size(tokenizer)) not in (None, target_size):
        raise SettingError(f"the tokenizer {recipe.tokenizer.path} takes images of {side} pixels alone and would get {target_size}; take a "
                           f"backbone of {side // tokenizer.stride} cells a side and views.target_size {side}, or train a tokenizer at "
                           f"{target_size} pixels")  # fmt: skip
    grid = (target_size // tokenizer.stride,) * 2
    head = TokenHead(backbone.embed_dim, tokenizer.vocab_size, mask.count, check_grids(backbone, grid, tokenizer.stride))
    normalize = Normalize(tuple(views.mean or index.mean), tuple(views.std or index.std)).for_channels(index.channels)

    masks = mask_generator(grid, mask.count, kind=mask.kind, min_block=mask.min_block, aspect=mask.aspect, unit=mask.unit)
    augmentation = Augmentation((views.crop_low, views.crop_high), views.shift, views.flip, views.jitter)
    training, plain = (PretrainViews(backbone.image_size[0], target_size, each, masks, target_interpolation)
                       for each in (augmentation, UNALTERED))  # fmt: skip
    cached = _cached(recipe, training, index) if recipe.tokenizer.cache else None
    size = sum(p.numel() for p in backbone.parameters()) / 1e6
    title = f"{called} pretraining of {settings.name} ({size:.1f} M parameters) without labels"
    title += f", on {cached.cache.views} cached views of each image" if cached else ""
    objective = method(backbone, tokenizer, head, normalize, device)
    return Pretraining(objective, cached or training, plain, title, best="masked_accuracy")


def _cached(recipe: BeitRecipe, views: "PretrainViews", index: "Index | Mixture") -> "CachedViews":
    """The views of a token cache that was made for this very recipe.

    Raises:
        SettingError: it was made for another one, or the recipe mixes data.
        DataError: it is damaged, or written in part.
    """
    from mimetic.data.mixture import Mixture
    from mimetic.tokenizers.files import tokenizer_hash
    from mimetic.tokenizers.token_cache import CachedViews, open_cache, terms_of

    assert recipe.tokenizer.cache
    if isinstance(index, Mixture):
        raise SettingError(f"tokenizer.cache holds the tokens of one set of shards, data.mix names {len(index.indexes)}; give one "
                           "data.index, or leave tokenizer.cache out")  # fmt: skip
    terms = terms_of(views, index, tokenizer_hash(recipe.tokenizer.path), recipe.tokenizer.precision, recipe.seed)
    return CachedViews(open_cache(Path(recipe.tokenizer.cache), index, terms), views)


if __name__ == "__main__":
    run_entry(main)
