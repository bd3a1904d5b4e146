"""BEiT pretraining: `accelerate launch pretrain/beit.py --config launch/recipes/beit_base_in1k.yaml --out runs/beit`."""

from typing import TYPE_CHECKING

from mimetic.engine.config import Invocation, parse
from mimetic.engine.errors import SettingError
from mimetic.engine.run import Run
from mimetic.engine.runtime import run_entry, start
from mimetic.pretrain.recipe import BeitRecipe

if TYPE_CHECKING:
    import torch

    from mimetic.data.index import Index
    from mimetic.data.mixture import Mixture
    from mimetic.pretrain.mim import MaskedImageModeling

EXAMPLE = "accelerate launch pretrain/beit.py --config launch/recipes/demo_pretrained.yaml --out runs/beit"


def main() -> None:
    """Entry point."""
    invocation = parse(BeitRecipe, example=EXAMPLE)
    if Run(invocation, "pretrain").finished:
        print(f"{invocation.out} is finished: this very recipe has been trained there; its backbone is {invocation.out}/backbone")
        return
    pretrain(invocation)


def build(recipe: BeitRecipe, index: "Index | Mixture", device: "torch.device") -> "tuple[MaskedImageModeling, int]":
    """The objective, and the side in pixels of the tokenizer's view.

    Raises:
        SettingError: tokenizer, backbone and data do not fit each other.
    """
    import torch

    from mimetic.backbones.catalog import create_backbone
    from mimetic.data.views import Normalize
    from mimetic.pretrain.mim import MaskedImageModeling, TokenHead, check_grids
    from mimetic.tokenizers.files import open_tokenizer

    tokenizer, settings, views = open_tokenizer(recipe.tokenizer.path), recipe.backbone, recipe.views
    if tokenizer.in_channels != index.channels:
        raise SettingError(f"the tokenizer {recipe.tokenizer.path} reads images of {tokenizer.in_channels} channels, those of "
                           f"{recipe.data.named} have {index.channels}; train a tokenizer on them")  # fmt: skip
    torch.manual_seed(recipe.seed)
    backbone = create_backbone(settings.name, image_size=settings.image_size, in_channels=index.channels, **settings.overrides)
    backbone.grad_checkpointing = settings.grad_checkpointing
    if len({side // cells for side, cells in zip(backbone.image_size, backbone.mask_grid, strict=True)}) > 1:
        raise SettingError("backbone.overrides.patch_size must be square here: the tokenizer's cells are")
    target_size = views.target_size or backbone.mask_grid[0] * tokenizer.stride
    if target_size % tokenizer.stride:
        raise SettingError(f"views.target_size {target_size} is no multiple of the tokenizer's stride {tokenizer.stride}; use "
                           f"{backbone.mask_grid[0] * tokenizer.stride}")  # fmt: skip
    scale = check_grids(backbone, (target_size // tokenizer.stride,) * 2, tokenizer.stride)
    head = TokenHead(backbone.embed_dim, tokenizer.vocab_size, recipe.mask.count, scale)
    normalize = Normalize(tuple(views.mean or index.mean), tuple(views.std or index.std)).for_channels(index.channels)
    return MaskedImageModeling(backbone, tokenizer, head, normalize, device), target_size


def pretrain(invocation: Invocation[BeitRecipe]) -> None:
    """Builds the parts, trains, and leaves the backbone in `RUN/backbone`."""
    recipe = invocation.recipe
    accelerator = start(recipe.train, recipe.optim, recipe.data.batch_size)

    from mimetic.backbones.files import save_backbone
    from mimetic.data.masks import mask_generator
    from mimetic.data.opening import open_data, open_held_out
    from mimetic.data.stream import ShardStream
    from mimetic.data.views import Augmentation, PretrainViews
    from mimetic.engine.loop import Evaluation, train
    from mimetic.pretrain.evaluate import masked_accuracy

    index = open_data(recipe.data)
    held_out = open_held_out(recipe.evaluate_on, index) if recipe.evaluate_on else index
    views, mask = recipe.views, recipe.mask
    objective, target_size = build(recipe, index, accelerator.device)
    backbone, normalize, grid = objective.backbone, objective.normalize, (target_size // objective.tokenizer.stride,) * 2
    masks = mask_generator(grid, mask.count, kind=mask.kind, min_block=mask.min_block, aspect=mask.aspect, unit=mask.unit)
    augmentation = Augmentation((views.crop_low, views.crop_high), views.shift, views.flip, views.jitter)
    ranks = {"rank": accelerator.process_index, "world": accelerator.num_processes, "workers": recipe.data.workers}
    training = PretrainViews(backbone.image_size[0], target_size, augmentation, masks)
    stream = ShardStream(index, recipe.data.batch_size, seed=recipe.seed, tail="drop", transform=training,
                         accumulate=recipe.train.accumulate, **ranks, **recipe.data.shuffling)  # fmt: skip

    plain = PretrainViews(backbone.image_size[0], target_size, Augmentation((1.0, 1.0), flip=0.0), masks)

    evaluation = Evaluation(
        lambda: ShardStream(held_out, 2 * recipe.data.batch_size, shuffle=False, transform=plain, **ranks),
        lambda batches: masked_accuracy(objective, batches, accelerator.device),
        best="masked_accuracy",
    )

    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    title = f"BEiT pretraining of {recipe.backbone.name} ({millions:.1f} M parameters) without labels"
    trained = train(objective, stream, invocation=invocation, kind="pretrain", accelerator=accelerator, title=title,
                    evaluation=evaluation if recipe.evaluate_on else None,
                    shown=next(ShardStream(held_out, 12, shuffle=False, transform=plain).run(1)))  # fmt: skip
    if trained and accelerator.is_main_process:
        out = invocation.out / "backbone"
        save_backbone(backbone, out, **normalize.describe())
        Run(invocation, "pretrain").finish()
        print(f"pretrained backbone in {out}\nnext: fine-tune it, finetune/classify.py --init.path {invocation.out} (see --help), "
              f"or take it away, mimetic export {invocation.out} FOLDER")  # fmt: skip
    accelerator.end_training()


if __name__ == "__main__":
    run_entry(main)
