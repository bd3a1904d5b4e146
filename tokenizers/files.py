"""An image tokenizer as a folder: `model.safetensors` and `tokenizer.json`, which says what it is and bears the weights' sha256."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save

from mimetic.data.pixelrange import as_typed, called, pixel_range
from mimetic.engine.config import write_atomically
from mimetic.engine.errors import CheckpointError, SettingError
from mimetic.tokenizers.contract import EncodesInAnyPrecision, ImageTokenizer
from mimetic.tokenizers.dalle import DalleTokenizer, DalleVAE
from mimetic.tokenizers.dvae import DVAE
from mimetic.tokenizers.published import DALLE, published_tokenizer
from mimetic.tokenizers.vqkd import VQKD

if TYPE_CHECKING:
    from mimetic.data.index import Index
    from mimetic.data.mixture import Mixture

CONFIG, WEIGHTS = "tokenizer.json", "model.safetensors"
OWN = ("kind", "arguments", "sha256")  # of CONFIG; everything else is provenance
KINDS: dict[str, type] = {  # what `tokenizer.json` may name; `KIND(**arguments)` has the shapes of the weights
    "dvae": DVAE,
    "vqkd": VQKD,
    "dalle": DalleVAE,
    "dalle-encoder": DalleTokenizer,
}


def save_tokenizer(tokenizer: Any, folder: Path, provenance: dict[str, Any] | None = None) -> None:
    """Writes the folder; it appears whole or not at all.

    Args:
        tokenizer: of one of KINDS, with its constructor's arguments as `config`.
        folder: is written anew.
        provenance: plain values to keep beside: where the weights come from.
    """
    kind = next(name for name, known in KINDS.items() if type(tokenizer) is known)
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    content = save({name: value.detach().cpu().contiguous() for name, value in tokenizer.state_dict().items()})
    write_atomically(temporary / WEIGHTS, content)
    config = {"kind": kind, "arguments": tokenizer.config, "sha256": hashlib.sha256(content).hexdigest()} | (provenance or {})
    write_atomically(temporary / CONFIG, json.dumps(config, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def open_tokenizer(path: str | Path, precision: str = "fp32") -> ImageTokenizer:
    """A tokenizer from its folder, from the run folder that trained it, or by its name, "dalle": frozen, in eval mode.

    Args:
        precision: "fp32", or "bf16": faster, and where two codes are nearly as likely it may choose the other one.

    Raises:
        SettingError: it has no such precision.
        CheckpointError: nothing there, of a kind that is not known, or damaged.
    """
    folder = find_tokenizer(path)
    try:
        config = json.loads((folder / CONFIG).read_text())
        kind, arguments = config["kind"], config["arguments"]
        content = (folder / WEIGHTS).read_bytes()
    except Exception as error:
        raise _damaged(folder, error) from None
    if kind not in list(KINDS):  # it may be anything
        raise CheckpointError(f"{folder}: a tokenizer of kind {str(kind)[:40]!r}; this version opens {', '.join(KINDS)}")
    if hashlib.sha256(content).hexdigest() != config.get("sha256", hashlib.sha256(content).hexdigest()):
        raise CheckpointError(f"{folder / WEIGHTS} has sha256 {hashlib.sha256(content).hexdigest()[:12]}..., {CONFIG} says "
                              f"{str(config['sha256'])[:12]}...: it was damaged or replaced; copy or train it again")  # fmt: skip
    try:
        tokenizer = KINDS[kind](**arguments)
        tokenizer.load_state_dict(load(content))
    except Exception as error:
        raise _damaged(folder, error) from None
    if precision != "fp32":
        if precision != "bf16" or not isinstance(tokenizer, EncodesInAnyPrecision):
            raise SettingError(f"precision {precision}: the tokenizer {path}, of kind {kind}, encodes in fp32{_or_bf16(tokenizer)}")
        tokenizer.encode_in(torch.bfloat16)
    return tokenizer.eval().requires_grad_(False)


def find_tokenizer(path: str | Path) -> Path:
    """The folder that holds a tokenizer: itself, within the run that trained it, or, of one with a name, in the user's own folder.

    Raises:
        CheckpointError: there is none.
    """
    for folder in (Path(path), Path(path) / "tokenizer"):
        if (folder / CONFIG).exists():
            return folder
    if str(path) == DALLE:
        return published_tokenizer(DALLE)
    raise CheckpointError(f"{path}: no tokenizer there ({CONFIG}); train one with tokenizers/train_dvae.py, or take {DALLE!r}")


def tokenizer_hash(path: str | Path) -> str:
    """Names a tokenizer by its content: sha256 over what it is and its weights, whatever its folder is called."""
    folder = find_tokenizer(path)
    try:
        config = json.loads((folder / CONFIG).read_text())
        told = json.dumps([config["kind"], config["arguments"]], sort_keys=True)
        return hashlib.sha256(told.encode() + hashlib.sha256((folder / WEIGHTS).read_bytes()).digest()).hexdigest()
    except Exception as error:
        raise _damaged(folder, error) from None


def provenance_of(path: str | Path) -> dict[str, Any]:
    """What `save_tokenizer` was given to keep beside the weights.

    Raises:
        CheckpointError: no tokenizer there, or damaged.
    """
    folder = find_tokenizer(path)
    try:
        found = {name: value for name, value in json.loads((folder / CONFIG).read_text()).items() if name not in OWN}
        for name, kind in (("image_size", int), ("reference", dict | None)):
            if name in found and not isinstance(found[name], kind):
                raise ValueError(f"{name} is {found[name]!r}")
        return found | ({"range": pixel_range(found["range"])} if "range" in found else {})
    except Exception as error:
        raise _damaged(folder, error) from None


def refuse_other_images(path: str | Path, tokenizer: ImageTokenizer, index: "Index | Mixture") -> None:
    """Refuses images that the tokenizer's numbers mean nothing for; of one that does not tell its pixel range, any range will do.

    Raises:
        SettingError: other channels, or another pixel range than it learned from.
        CheckpointError: no tokenizer there, or damaged.
    """
    channels = tokenizer.in_channels
    if channels != index.channels:
        raise SettingError(f"the tokenizer {path} reads images of {channels} channels, those of {index.home} have {index.channels}; "
                           f"pack them with --channels {channels}, or train a tokenizer on them")  # fmt: skip
    told = provenance_of(path)
    if "range" in told and told["range"] != index.range:
        learned = told["range"]
        cure = f"pack or index them with --range {as_typed(learned)}" if learned else "pack them without --range"
        raise SettingError(f"the tokenizer {path} learned from {called(learned)}, {index.home} has {called(index.range)}; {cure}, or train "
                           "a tokenizer on them")  # fmt: skip


def _or_bf16(tokenizer: ImageTokenizer) -> str:
    return " or bf16" if isinstance(tokenizer, EncodesInAnyPrecision) else " only"


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
