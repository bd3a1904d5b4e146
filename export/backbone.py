"""Takes a backbone away: written in timm's own schema, and compared with what was trained before the folder is named."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimetic.backbones.catalog import ADAPTED, create_backbone
from mimetic.backbones.contract import Backbone
from mimetic.backbones.files import FILES, backbone_folder, copy_backbone, load_backbone, save_backbone
from mimetic.engine.checkpoints import MANIFEST, newest, read, verify
from mimetic.engine.errors import CheckpointError, SettingError

TOLERANCE = 1e-4

OURS = """\
import mimetic, torch
backbone = mimetic.load_backbone({out!r})
features = backbone.forward_features(torch.rand(1, {channels}, {height}, {width})).map_BDhw
"""
TIMMS = """\
import timm, torch
model = timm.create_model({out!r}, pretrained=True)
features = model.forward_features(torch.rand(1, {channels}, {height}, {width}))
"""


def export_backbone(run: Path, out: Path, to: str) -> None:
    """Writes the backbone of `run` to `out`, opens it there as a stranger would, compares, and prints how to open it.

    The printed lines have just been run, in a process of their own, on the very folder.

    Args:
        run: a finished run, one that is not (its newest checkpoint), a checkpoint, or an exported folder.
        to: "safetensors" opens it with this program; "timm" also with timm, strictly.

    Raises:
        CheckpointError: nothing to export, or what was read back differs from what was trained.
        SettingError: `out` exists and is no exported backbone; timm is asked for but not installed.
    """
    out = out.resolve() if out.is_symlink() else out
    _refuse_foreign(out)
    if to == "timm" and importlib.util.find_spec("timm") is None:
        raise SettingError("--to timm opens the folder with timm to check it; pip install timm, or use --to safetensors")
    unchecked = out.with_name(f".{out.name}.unchecked")
    try:
        trained = _write(run, out, unchecked)
        snippet = _checked(trained, unchecked, out, to)
        shutil.rmtree(out, ignore_errors=True)
        unchecked.rename(out)
    finally:
        shutil.rmtree(unchecked, ignore_errors=True)
    _run_snippet(snippet)
    print(f"exported and checked: {out} gives the same features\nopen it with:\n\n{snippet}")


def _write(run: Path, out: Path, unchecked: Path) -> Backbone:
    """Writes what the run has of a backbone, and returns it as it was trained: the finished one, or that of a checkpoint."""
    saved = _checkpoint_of(run)
    if saved is None:
        folder = backbone_folder(run)
        trained = load_backbone(folder)
        print(f"exporting {trained.config['name']} of {run} to {out} in timm's schema", flush=True)
        copy_backbone(folder, unchecked)
        return trained
    path, state = saved
    trained = _from_checkpoint(path, state)
    print(f"exporting {trained.config['name']} after step {state['step']:,} ({path}) to {out} in timm's schema", flush=True)
    save_backbone(trained, unchecked, mean=state["model"]["mean"], std=state["model"]["std"])
    return trained


def _checkpoint_of(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that is meant: the given one, or the newest of a run that is not finished; None for a finished one."""
    if (run / MANIFEST).exists():
        return run, verify(run)
    return None if (run / "finished.json").exists() else newest(run / "checkpoints")


def _from_checkpoint(path: Path, state: dict[str, Any]) -> Backbone:
    """In fp32; the mean of the weights where the run keeps one.

    Raises:
        CheckpointError: the run trains no backbone.
    """
    model = state.get("model")
    if not model:
        raise CheckpointError(f"{path} is of a run that trains no backbone; give one of pretraining or fine-tuning")
    weights, moments = read(path)
    means = {name.removesuffix(":ema"): value for name, value in moments.items() if name.endswith(":ema")}
    prefix, overrides = model["prefix"], model["create_backbone"]["overrides"]
    backbone = create_backbone(**{k: v for k, v in model["create_backbone"].items() if k != "overrides"}, **overrides)
    backbone.load_state_dict({name.removeprefix(prefix): value for name, value in (weights | means).items() if name.startswith(prefix)})
    return backbone.eval()


def _checked(trained: Backbone, unchecked: Path, out: Path, to: str) -> str:
    """Compares what was written with what was trained; returns the lines that open it."""
    height, width = trained.image_size
    fields = {"channels": trained.in_channels, "height": height, "width": width}
    image_BCHW = torch.randn(2, trained.in_channels, height, width, generator=torch.Generator().manual_seed(0))
    tokens = _tokens(trained, image_BCHW)
    _compare(tokens, _tokens(load_backbone(unchecked), image_BCHW), f"{out} read back")
    snippet = OURS.format(out=str(out), **fields)
    if to == "timm":
        snippet = TIMMS.format(out=f"local-dir:{out}", **fields)
        _compare(tokens, _timm_tokens(unchecked, trained, image_BCHW), f"{out} opened by timm")
    return snippet


def _tokens(backbone: Backbone, image_BCHW: Tensor) -> Tensor:
    """Patch tokens (B, N, D) after the final norm."""
    with torch.no_grad():
        return backbone.eval().forward_features(image_BCHW).map_BDhw.flatten(2).transpose(1, 2)


def _timm_tokens(out: Path, trained: Backbone, image_BCHW: Tensor) -> Tensor:
    import timm

    try:
        model: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    except (TypeError, RuntimeError) as error:  # an entry of timm's that sets this argument itself, or a net that timm does not have
        changed = ", ".join(trained.config["overrides"])
        raise CheckpointError(f"timm cannot build {trained.config['name']} with other {changed} ({error}); --to safetensors can") from None
    with torch.no_grad():
        x, expected = model.forward_features(image_BCHW), _tokens(trained, image_BCHW)
        if x.dim() == 4:  # channels last or first
            x = x.flatten(1, 2) if x.shape[-1] == trained.embed_dim else x.flatten(2).mT
        x = x[:, x.shape[1] - expected.shape[1] :]
        if trained.config["name"].startswith(ADAPTED):
            return x  # its map is timm's own, normed or not
        # Where timm norms after the mean, it keeps the norm in the head; our map is always normed.
        norm = model.head.norm if hasattr(getattr(model, "head", None), "norm") else getattr(model, "fc_norm", torch.nn.Identity())
        return norm(x.mT[..., None])[..., 0].mT if type(norm).__name__ == "LayerNorm2d" else norm(x)


def _refuse_foreign(out: Path) -> None:
    if out.is_file() or (out.exists() and not {path.name for path in out.iterdir()} <= FILES):
        raise SettingError(f"{out} exists and is no exported backbone; give a new folder, so that nothing of yours is overwritten")


def _compare(trained: Tensor, exported: Tensor, what: str) -> None:
    difference = (trained - exported).abs().max().item()
    if not difference <= TOLERANCE:
        raise CheckpointError(f"{what}: features differ from the trained ones by {difference:.2e}, {TOLERANCE} is tolerated")


def _run_snippet(snippet: str) -> None:
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckpointError(f"the exported folder does not open: {done.stderr.strip().splitlines()[-1]}")

