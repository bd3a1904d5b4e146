"""An image tokenizer as a folder: `model.safetensors` and `tokenizer.json`."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mimetic.engine.config import write_atomically
from mimetic.engine.errors import CheckpointError
from mimetic.tokenizers.dvae import DVAE

CONFIG, WEIGHTS = "tokenizer.json", "model.safetensors"


def save_tokenizer(tokenizer: DVAE, folder: Path, provenance: dict[str, Any] | None = None) -> None:
    """Writes the folder; it appears whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in tokenizer.state_dict().items()}, temporary / WEIGHTS)
    config = {"kind": "dvae", "arguments": tokenizer.config} | (provenance or {})
    write_atomically(temporary / CONFIG, json.dumps(config, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def open_tokenizer(path: str | Path) -> DVAE:
    """A tokenizer from its folder, or from the run folder that trained it: frozen, in eval mode.

    Raises:
        CheckpointError: nothing there, or damaged.
    """
    for folder in (Path(path), Path(path) / "tokenizer"):
        if (folder / CONFIG).exists():
            break
    else:
        raise CheckpointError(f"{path}: no tokenizer there ({CONFIG}); train one with tokenizers/train_dvae.py")
    try:
        tokenizer = DVAE(**json.loads((folder / CONFIG).read_text())["arguments"])
        tokenizer.load_state_dict(load_file(folder / WEIGHTS))
    except Exception as error:
        raise CheckpointError(f"{folder} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None
    return tokenizer.eval().requires_grad_(False)
