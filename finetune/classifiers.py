"""Building, saving and opening classifiers: a backbone of the catalog with its head, or the residual CNN."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mimetic.backbones.catalog import create_backbone
from mimetic.backbones.contract import Backbone
from mimetic.backbones.files import backbone_folder, load_backbone, save_backbone, transfer
from mimetic.data.index import Index
from mimetic.data.views import Normalize
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import CheckpointError, SettingError
from mimetic.finetune.recipe import ClassifyRecipe
from mimetic.finetune.teacher import NAME, ResidualCNN


def build_classifier(recipe: ClassifyRecipe, index: Index) -> tuple[Any, Normalize]:
    """The model of a recipe, with pretrained weights if it names some, and the normalization that belongs to it.

    Raises:
        SettingError: settings that do not go together.
        CheckpointError: pretrained weights that do not fit.
    """
    settings, views = recipe.backbone, recipe.views
    if len(index.classes) == 1:
        raise SettingError(f"{index.home} has one class, {index.classes[0]}; a classifier tells two or more apart")
    mean, std = views.mean or list(index.mean), views.std or list(index.std)
    if settings.name == NAME:
        if recipe.init.path:
            raise SettingError(f"init.path cannot initialise {NAME}; name the backbone that was pretrained")
        size = settings.image_size
        if not size:
            raise SettingError(f"{NAME} has no image size of its own; set backbone.image_size")
        if unknown := sorted(set(settings.overrides) - {"width", "blocks"}):
            raise SettingError(f"{NAME} has no override {unknown[0]!r}; it has width, blocks")
        network = ResidualCNN(index.channels, len(index.classes), size, **settings.overrides)
        return network, Normalize(tuple(mean), tuple(std)).for_channels(index.channels)
    model = create_backbone(settings.name, len(index.classes), settings.image_size, index.channels, **settings.overrides)
    model.grad_checkpointing = settings.grad_checkpointing
    if recipe.init.path:
        for fitted in transfer(load_backbone(recipe.init.path), model):
            if os.environ.get("RANK", "0") == "0":
                print(f"{recipe.init.path}: {fitted}", flush=True)
        saved_mean, saved_std = normalization(recipe.init.path)
        if len(saved_mean) == index.channels:
            mean, std = views.mean or saved_mean, views.std or saved_std
    model.mask_token.requires_grad_(False)  # sees no hidden cell here; DDP would wait for its gradient
    return model, Normalize(tuple(mean), tuple(std)).for_channels(index.channels)


def normalization(path: str | Path) -> tuple[list[float], list[float]]:
    """Mean and std that a saved backbone was trained with."""
    config = json.loads((backbone_folder(path) / "config.json").read_text())
    return config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"]


def save_classifier(model: Any, normalize: Normalize, run: Path, provenance: dict[str, Any]) -> Path:
    """Writes `RUN/backbone` (timm's schema, classifier included), or `RUN/residual_cnn`; returns the folder."""
    mean, std = normalize.describe().values()
    if isinstance(model, Backbone):
        save_backbone(model, run / "backbone", mean=mean, std=std, provenance=provenance)
        return run / "backbone"
    folder, temporary = run / NAME, run / f".{NAME}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, temporary / "model.safetensors")
    config = {"arguments": model.config, "mean": mean, "std": std} | provenance
    write_atomically(temporary / "config.json", json.dumps(config, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


def open_classifier(run: str | Path, classes: list[str]) -> tuple[Any, Normalize]:
    """A trained classifier of a finished run, in eval mode, and its normalization.

    Raises:
        SettingError: it tells other classes apart than these.
        CheckpointError: the run is not finished, damaged, or has no classifier.
    """
    folder = Path(run) / NAME
    if not folder.exists():
        backbone = load_backbone(run)
        if not backbone.num_classes:
            raise CheckpointError(f"{run} holds a backbone without a classifier; a teacher is a run of finetune/classify.py")
        config = json.loads((backbone_folder(run) / "config.json").read_text())
        _refuse_other_classes(run, config["mimetic"].get("classes"), classes)
        mean, std = normalization(run)
        return backbone, Normalize(tuple(mean), tuple(std))
    try:
        config = json.loads((folder / "config.json").read_text())
        model = ResidualCNN(**config["arguments"])
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except Exception as error:
        raise CheckpointError(f"{folder} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None
    _refuse_other_classes(run, config.get("classes"), classes)
    return model.eval(), Normalize(tuple(config["mean"]), tuple(config["std"]))


def _refuse_other_classes(run: str | Path, theirs: list[str] | None, ours: list[str]) -> None:
    if theirs != ours:
        told = [f"{len(classes or [])} classes ({', '.join((classes or [])[:3])} ...)" for classes in (theirs, ours)]
        raise SettingError(f"{run} was trained for {told[0]}, the data has {told[1]}; train a teacher on the same classes")
