"""A backbone as a folder: `model.safetensors` under timm's names and `config.json` in timm's own local-folder schema.

`timm.create_model("local-dir:FOLDER")` opens it strictly; what timm does not know lies under the key `mimetic`.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mimetic.backbones.catalog import arguments_of, create_backbone
from mimetic.backbones.contract import MASK_TOKEN, Backbone
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import CheckpointError, MimeticError

WEIGHTS = "model.safetensors"
MASK = "mask_token.safetensors"  # timm's models have none, and its strict loading would refuse it among the weights
FILES = {"config.json", WEIGHTS, MASK}


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
    config = {
        "architecture": backbone.config["name"],
        "num_classes": backbone.num_classes,
        "num_features": backbone.embed_dim,
        "model_args": {name: value for name, value in backbone.timm_arguments().items() if name != "num_classes"},
        "pretrained_cfg": {
            "input_size": [backbone.in_channels, height, width], "fixed_input_size": True, "interpolation": "bicubic",
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


def load_backbone(path: str | Path) -> Backbone:
    """The backbone of an exported folder or a finished run, in eval mode, weights loaded strictly.

    Raises:
        CheckpointError: nothing there, damaged, or not written by this program.
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
    return backbone.eval()


def copy_backbone(folder: Path, out: Path) -> None:
    """Copies the files of a backbone's folder to a new folder."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in FILES:
        shutil.copyfile(folder / name, out / name)


def transfer(source: Backbone, target: Backbone) -> None:
    """Copies what was pretrained into a backbone for fine-tuning: same body, its own classifier and distillation token.

    A relative position bias that all blocks shared is copied into each of them, as BEiT's fine-tuning does.

    Raises:
        CheckpointError: the bodies differ; names the first weights that do not fit.
    """
    if source.num_depths != target.num_depths:
        theirs, ours = source.num_depths - 2, target.num_depths - 2  # stem and head are depths of their own
        raise CheckpointError(f"depth {theirs} in the pretrained backbone, {ours} here; set backbone.overrides.depth to {theirs}")
    heads, here = (arguments_of(net.config).get("num_heads") for net in (source, target))
    if heads != here:  # no shape would tell
        raise CheckpointError(f"num_heads {heads} in the pretrained backbone, {here} here; set backbone.overrides.num_heads to {heads}")
    given, wanted = source.state_dict(), target.state_dict()
    for name in [name for name in given if name.startswith("rel_pos_bias.") and name not in wanted]:
        if blocks := [other for other in wanted if other.endswith(f".attn.{name}")]:
            table = given.pop(name)
            given |= dict.fromkeys(blocks, table)
    fresh = ("head", "head_dist", f"patch_embed.{MASK_TOKEN}", "patch_embed.dist_token")
    taken = {}
    for name, value in wanted.items():
        if name.startswith(fresh):
            continue
        if name == "patch_embed.pos_embed" and name in given and len(value[0]) == len(given[name][0]) + 1:
            # DeiT's distillation token comes second and has a position of its own, which starts as it was initialised.
            taken[name] = torch.cat([given[name][:, :1], value[:, 1:2], given[name][:, 1:]], 1)
        elif name not in given or given[name].shape != value.shape:
            there = tuple(given[name].shape) if name in given else "nothing"
            raise CheckpointError(f"{name}: {there} in the pretrained backbone, {tuple(value.shape)} here; {_cure(source, target)}")
        else:
            taken[name] = given[name]
    for name in given:
        if name not in taken and not name.startswith(fresh):
            raise CheckpointError(f"{name}: {tuple(given[name].shape)} in the pretrained backbone, nothing here; {_cure(source, target)}")
    target.load_state_dict(taken, strict=False)


def _cure(source: Backbone, target: Backbone) -> str:
    """What makes a backbone's body that of a pretrained one."""
    if source.in_channels != target.in_channels:
        return f"it was pretrained on {source.in_channels} channels, these images have {target.in_channels}; pack them with as many"
    if source.image_size != target.image_size:
        theirs, ours = ("x".join(map(str, net.image_size)) for net in (source, target))
        return f"it was pretrained on {theirs} pixels, here are {ours}; set backbone.image_size to {source.image_size[0]}"
    return "give backbone.overrides the values it was pretrained with"
