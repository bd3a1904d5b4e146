"""Other people's files of DALL-E's dVAE into a tokenizer folder. No code that a file brings along is ever run.

OpenAI published `encoder.pkl` and `decoder.pkl` as pickled modules of its package `dall_e`. They are read by torch's own unpickler for
weights, which knows no `eval` and no imports; the handful of classes that they name stand for an inert record of attributes, so that
neither their code nor the package is needed. Tensors are taken out of that by name, and must be exactly those of the network.
"""

import hashlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mimetic.engine.errors import CheckpointError, SettingError
from mimetic.tokenizers.dalle import DalleTokenizer, DalleVAE
from mimetic.tokenizers.files import CONFIG, WEIGHTS, provenance_of, save_tokenizer

State = dict[str, Tensor]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MODULES = ("dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.decoder.Decoder", "dall_e.decoder.DecoderBlock",
           "dall_e.utils.Conv2d", "torch.nn.modules.container.Sequential", "torch.nn.modules.activation.ReLU",
           "torch.nn.modules.linear.Identity", "torch.nn.modules.pooling.MaxPool2d", "torch.nn.modules.upsampling.Upsample")  # fmt: skip
IN_FOLDER = ("model.safetensors", "pytorch_model.bin", "encoder.pkl")  # what a folder is looked through for
FORMATS = ("OpenAI's encoder.pkl (decoder.pkl beside it), a checkpoint of transformers' FLAVA with its image codebook, or safetensors with "
           "the names of the package dall_e")  # fmt: skip


def import_tokenizer(file: Path, out: Path, decoder: Path | None = None) -> DalleTokenizer:
    """Writes the tokenizer that a file holds into a folder, and says what it is.

    Args:
        file: one of FORMATS, or a folder that holds it.
        out: the folder, new or of an earlier import.
        decoder: the file of the decoder; by default the `decoder.pkl` beside an `encoder.pkl`. Without one the tokenizer has no `decode`.

    Raises:
        CheckpointError: no such file, of no known format, with code in it, or not this network.
        SettingError: `out` holds something else, or cannot be written.
    """
    out = out.absolute()
    _check_free(out)
    file = _within(file)
    beside = file.with_name("decoder.pkl")
    decoder = decoder or (beside if file.name == "encoder.pkl" and beside.exists() else None)
    sources = [file] if decoder is None else [file, decoder]
    states, formats = zip(*map(read_state, sources), strict=True)
    if decoder is not None and not all(name.startswith("decoder.") for name in states[1]):
        raise CheckpointError(f"{decoder} holds an encoder; give the file of a decoder, or leave --decoder out")
    tokenizer = built({name: tensor for state in states for name, tensor in state.items()}, " and ".join(map(str, sources)))
    told = [{"file": source.name, "sha256": _sha256(source), "format": kind} for source, kind in zip(sources, formats, strict=True)]
    try:
        save_tokenizer(tokenizer, out, {"source": told})
    except OSError as error:
        raise SettingError(f"{out} cannot be written ({error.strerror or error}); free some space, or name another folder") from None
    parts = "encoder and decoder" if isinstance(tokenizer, DalleVAE) else "the encoder alone: it cannot draw what its ids stand for"
    print(f"tokenizer of {tokenizer.vocab_size} codes, stride {tokenizer.stride}, {tokenizer.in_channels} channels, in {out} ({parts})")
    return tokenizer


def read_state(file: Path) -> tuple[State, str]:
    """The tensors of a file under our names, `encoder.*` and `decoder.*`, and what kind of file it is; nothing in it is executed.

    Raises:
        CheckpointError: as for `import_tokenizer`.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; it may be {FORMATS}")
    with file.open("rb") as head:
        is_safetensors = head.read(9)[8:] == b"{"
    found, kind = _safetensors(file) if is_safetensors else _pickled(file)
    state = _renamed(found)
    if not state:
        raise CheckpointError(f"{file} holds no tokenizer that is known here; it may be {FORMATS}")
    return {name: _numbers(file, name, tensor) for name, tensor in state.items()}, kind


def built(state: State, named: str) -> DalleTokenizer:
    """The tokenizer that has these tensors, its sizes read off them.

    Raises:
        CheckpointError: they are not all of one such network's; the first that is missing, too many or of another shape is named.
    """
    kind, arguments = _sizes(state, named)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in kind(**arguments).state_dict().items()}
    for name in (*expected, *state):
        found = tuple(state[name].shape) if name in state else "missing"
        if expected.get(name, "not expected") != found:
            raise CheckpointError(f"{named} is not DALL-E's dVAE: {name} is {found}, and {expected.get(name, 'not expected')} in a network "
                                  f"of its first layer's size; it may be {FORMATS}")  # fmt: skip
    tokenizer = kind(**arguments)
    tokenizer.load_state_dict(state)
    return tokenizer.eval().requires_grad_(False)


def _sizes(state: State, named: str) -> tuple[type[DalleTokenizer], dict[str, Any]]:
    first, last = state.get("encoder.input.weight"), state.get("encoder.output.conv.weight")
    blocks = sum(bool(re.fullmatch(r"encoder\.group_1\.block_\d+\.res_path\.conv_1\.weight", name)) for name in state)
    if first is None or last is None or first.ndim != 4 or len(first) % 4 or not min(first.numel(), last.numel(), blocks):
        raise CheckpointError(f"{named} holds no encoder of DALL-E's dVAE; give the file of the encoder first, a decoder with --decoder")
    arguments = {"vocab_size": len(last), "in_channels": first.shape[1], "n_hid": len(first), "n_blk_per_group": blocks}
    table = state.get("decoder.input.weight")
    return (DalleTokenizer, arguments) if table is None else (DalleVAE, arguments | {"n_init": len(table)})


def _renamed(found: State) -> State:
    """From the names of dall_e, of FLAVA's codebook within a model or alone, or of a module that holds both halves."""
    if any(name.startswith("image_codebook.") for name in found):
        found = {name.removeprefix("image_codebook."): tensor for name, tensor in found.items() if name.startswith("image_codebook.")}
    named = re.compile(r"(?:(encoder|decoder)\.)?blocks\.(.+)\.(w|weight|b|bias)")
    state: State = {}
    for name, tensor in found.items():
        if match := named.fullmatch(name):
            side, path, kind = match.groups()
            path = path.replace(".group.", ".").replace(".res_path.path.", ".res_path.")
            state[f"{side or _side(found)}.{path}.{'weight' if kind[0] == 'w' else 'bias'}"] = tensor
    return state


def _side(found: State) -> str:
    """An encoder's first kernel has 7x7 pixels, a decoder's 1x1."""
    first = found.get("blocks.input.w", found.get("blocks.input.weight"))
    return "decoder" if first is not None and first.shape[2:] == (1, 1) else "encoder"


def _safetensors(file: Path) -> tuple[State, str]:
    try:
        with safe_open(file, framework="pt") as content:
            return {name: content.get_tensor(name) for name in content.keys() if "blocks." in name}, "safetensors"  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({_line(error)}); get it again") from None


def _pickled(file: Path) -> tuple[State, str]:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_Recorded, name) for name in MODULES]):
            warnings.simplefilter("ignore")  # that the pickle is of another protocol: it is refused where that matters
            content = torch.load(file, map_location="cpu", weights_only=True)
        return dict(_tensors(content)), "pickled module" if type(content) is _Recorded else "pickled state"
    except Exception as error:  # the reader meets whatever bytes there are
        told = str(error) or type(error).__name__
    if asked := re.search(r"GLOBAL (\S+) was not|GLOBAL (\S+) whose", told):
        raise CheckpointError(f"{file} is refused: it asks for {(asked[1] or asked[2])[:80]}, which no tokenizer needs; nothing of it was "
                              f"run. Get the file from where it was published; it may be {FORMATS}")  # fmt: skip
    if "persistent_load" in told:
        raise CheckpointError(f"{file} is a module in torch's format of before 2020, which cannot be read without running it; save its "
                              "state_dict instead, as safetensors")  # fmt: skip
    reason = _line(told.rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0])
    raise CheckpointError(f"{file} cannot be read as weights ({reason}); it may be {FORMATS}")


class _Recorded:
    """What a pickled module becomes: its attributes, and nothing that could act on them."""


def _tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of a state dict, or of a recorded module."""
    if isinstance(content, dict):
        yield from ((name, value) for name, value in content.items() if type(name) is str and isinstance(value, Tensor))
    elif type(content) is _Recorded:
        yield from _of_module(content, "", set())


def _of_module(module: _Recorded, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Each module once: a few that hold each other several times would make more names than can be walked."""
    attributes = {} if id(module) in seen else module.__dict__
    seen.add(id(module))
    for name, value in dict(attributes.get("_parameters") or {}).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
    for name, value in dict(attributes.get("_modules") or {}).items():
        if type(value) is _Recorded:
            yield from _of_module(value, f"{prefix}{name}.", seen)


def _numbers(file: Path, name: str, found: Tensor) -> Tensor:
    """A tensor's numbers in fp32; refuses what is no plain array of them, such as one number that pretends to be a terabyte."""
    plain = type(found) in (Tensor, torch.nn.Parameter) and found.layout == torch.strided and not found.is_nested
    if not plain or found.dtype not in FLOATS:
        raise CheckpointError(f"{file}: {name} is {found.dtype}, {found.layout}, not a plain array of floats; get the file again")
    tensor = Tensor.detach(found)  # without attributes from the file, which would hide methods of their name
    if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{file}: {name} claims {tensor.numel():,} numbers and does not hold them; get the file again")
    if not tensor.isfinite().all():
        raise CheckpointError(f"{file}: {name} holds numbers that are not finite; get the file again")
    return tensor.to(torch.float32, copy=True).contiguous()


def _check_free(out: Path) -> None:
    """A folder is written anew as a whole: it must not be somebody's, such as the one that the weights are read from."""
    found = {path.name for path in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    ours = {CONFIG, WEIGHTS} if CONFIG in found and "source" in provenance_of(out) else set()
    if others := found - ours:
        raise SettingError(f"{out} is no folder of an earlier import alone (there is {min(others)}); name a new folder")


def _within(file: Path) -> Path:
    if not file.is_dir():
        return file
    for name in IN_FOLDER:
        if (file / name).is_file():
            return file / name
    raise CheckpointError(f"{file} holds none of {', '.join(IN_FOLDER)}; give the file itself")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _line(error: object) -> str:
    return " ".join(str(error).split())[:160]
