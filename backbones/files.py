"""A backbone as a folder: `model.safetensors` under timm's names and `config.json` in timm's own local-folder schema.

`timm.create_model("local-dir:FOLDER")` opens it strictly; what timm does not know lies under the key `mimetic`.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mimetic.backbones.catalog import ADAPTED, arguments_of, create_backbone
from mimetic.backbones.contract import MASK_TOKEN, Backbone
from mimetic.backbones.resize import fitted, resized
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import CheckpointError, MimeticError

WEIGHTS = "model.safetensors"
MASK = "mask_token.safetensors"  # timm's models have none, and its strict loading would refuse it among the weights
FILES = {"config.json", WEIGHTS, MASK}
# Arguments that change what weights mean and no weight's shape, or that are better named than the first weight that does not fit.
SAME = ("depth", "depths", "num_blocks", "num_heads", "shifted", "token_mixers")


def save_backbone(backbone: Backbone, folder: Path, *, mean: Sequence[float], std: Sequence[float],
                  provenance: dict[str, Any] | None = None) -> None:  # fmt: skip
    """Writes the folder; it appears whole or not at all.

    Args:
        mean: per channel in [0, 1], what the backbone's input was normalized with.
        std: likewise.
        provenance: plain values kept beside the architecture: recipe, records.
    """
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    state = {name: value.detach().cpu().contiguous() for name, value in backbone.timm_state_dict().items()}
    save_file(state, temporary / WEIGHTS)
    save_file({MASK_TOKEN: backbone.mask_token.detach().cpu().contiguous()}, temporary / MASK)
    height, width = backbone.image_size
    arguments = {name: value for name, value in backbone.timm_arguments().items() if name != "num_classes"}
    config = {
        "architecture": backbone.config["name"].removeprefix(ADAPTED),
        "num_classes": backbone.num_classes,
        "num_features": backbone.embed_dim,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [backbone.in_channels, height, width], "fixed_input_size": "img_size" in arguments, "interpolation": "bicubic",
            "crop_pct": 1.0, "mean": list(mean), "std": list(std), "num_classes": backbone.num_classes,
        },
        "mimetic": {"create_backbone": backbone.config, "mask_grid": list(backbone.mask_grid)} | (provenance or {}),
    }  # fmt: skip
    write_atomically(temporary / "config.json", json.dumps(config, indent=1) + "\n")
    handle = os.open(temporary / WEIGHTS, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def backbone_folder(path: str | Path) -> Path:
    """The folder that holds a backbone: the given one, or `backbone/` in a run folder.

    Raises:
        CheckpointError: neither is there.
    """
    for folder in (Path(path), Path(path) / "backbone"):
        if (folder / "config.json").exists() and (folder / WEIGHTS).exists():
            return folder
    raise CheckpointError(f"{path}: no backbone there (config.json and {WEIGHTS}); give a finished run or an exported folder")


def load_backbone(path: str | Path, image_size: int | Sequence[int] | None = None, in_channels: int | None = None) -> Backbone:
    """The backbone of an exported folder or a finished run, in eval mode, weights loaded strictly.

    Args:
        image_size: side or (H, W) in pixels; another than its own interpolates positions and bias tables.
        in_channels: C; another number than its own sums or inflates the stem's weights.

    Raises:
        CheckpointError: nothing there, damaged, or not written by this program.
        SettingError: an image size that the family does not allow.
    """
    folder = backbone_folder(path)
    try:
        arguments = json.loads((folder / "config.json").read_text())["mimetic"]["create_backbone"]
        overrides = arguments.pop("overrides")
        backbone = create_backbone(**arguments, **overrides)
        backbone.load_timm_state_dict(load_file(folder / WEIGHTS))
        backbone.mask_token.data.copy_(load_file(folder / MASK)[MASK_TOKEN])
    except MimeticError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder} is damaged or not of this program ({type(error).__name__}: {error})") from None
    if image_size is not None or in_channels is not None:
        backbone = resized(backbone, image_size, in_channels)
    return backbone.eval()


def copy_backbone(folder: Path, out: Path) -> None:
    """Copies the files of a backbone's folder to a new folder."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in FILES:
        shutil.copyfile(folder / name, out / name)


def transfer(source: Backbone, target: Backbone) -> list[str]:
    """Copies what was pretrained into a backbone for fine-tuning: same body, its own classifier and distillation token.

    A relative position bias that all blocks shared is copied into each of them, as BEiT's fine-tuning does. At another image
    size or for other channels, positions, bias tables and the stem are fitted; what has been fitted is returned in words.

    Raises:
        CheckpointError: the bodies differ; names the first weights that do not fit.
    """
    _refuse_another_body(source, target)
    fresh = {name for name in source.state_dict() | target.state_dict() if name.endswith((MASK_TOKEN, "dist_token"))}
    fresh |= source.head_names() | target.head_names()
    target.load_state_dict(fitted(source, target, fresh), strict=False)
    said = []
    if source.image_size != target.image_size:
        said.append("weights for {} pixels fitted to {}".format(*("x".join(map(str, net.image_size)) for net in (source, target))))
    if source.in_channels != target.in_channels:
        said.append(f"the stem for {source.in_channels} channels fitted to {target.in_channels}")
    return said


def _refuse_another_body(source: Backbone, target: Backbone) -> None:
    theirs, ours = (net.config.get("name", type(net).__name__) for net in (source, target))
    if type(source) is not type(target) or (theirs != ours and ours.startswith(ADAPTED)):
        raise CheckpointError(f"{theirs} was pretrained, here is {ours}; set backbone.name to {theirs}")
    given, wanted = arguments_of(source.config), arguments_of(target.config)
    for name in SAME:
        there, here = (list(value) if isinstance(value, tuple) else value for value in (given.get(name), wanted.get(name)))
        if there != here:
            raise CheckpointError(f"{name} {there} in the pretrained backbone, {here} here; set backbone.overrides.{name} to {there}")
