"""Pickles that run something when a reader lets them: each touches a witness file."""

import collections
import io
import os
import pickle
import struct
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch


def global_pickle(path: str, name: str, argument: str) -> bytes:
    """Protocol 2: calls path.name(argument)."""
    text = argument.encode()
    return b"\x80\x02c" + f"{path}\n{name}\n".encode() + b"X" + struct.pack("<I", len(text)) + text + b"\x85R."


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Smuggler:
    """Comes back with a state that its class would act on."""

    def __setstate__(self, state: Any) -> None:
        Path(state["witness"]).touch()


def attacks(witness: Path) -> dict[str, bytes]:
    """Pickles that touch the witness when they are loaded by a reader that allows it."""
    touch, code = f"touch {witness}", f"__import__('pathlib').Path({str(witness)!r}).touch()"
    smuggled = Smuggler()
    smuggled.witness = str(witness)  # type: ignore[attr-defined]
    nested = collections.OrderedDict({"blocks.input.w": torch.zeros(1), "inner": [({"deep": Calls(eval, code)},)]})
    # opcodes by hand: STACK_GLOBAL, INST, OBJ, and a state for the class that modules are recorded as
    stack_global = b"\x80\x04\x8c\x02os\x8c\x06system\x93" + b"X" + struct.pack("<I", len(touch)) + touch.encode() + b"\x85R."
    inst = b"(" + b"S'" + touch.encode() + b"'\n" + b"ios\nsystem\n."
    obj = b"(cos\nsystem\nS'" + touch.encode() + b"'\no."
    of_module = b"\x80\x02cdall_e.encoder\nEncoder\n)\x81}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsbX" + struct.pack("<I", len(touch))
    build = of_module + touch.encode() + b"b."
    reduce_module = b"\x80\x02cdall_e.encoder\nEncoder\ncbuiltins\neval\nX" + struct.pack("<I", len(code)) + code.encode() + b"\x86R."
    typed = b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\neval\nctorch\nTensor\nX" + struct.pack("<I", len(code))
    rebuild = typed + code.encode() + b"\x85}tR."
    return {
        "os.system": pickle.dumps(Calls(os.system, touch), 2),
        "posix.system": global_pickle("posix", "system", touch),
        "builtins.eval": global_pickle("builtins", "eval", code),
        "builtins.exec": global_pickle("builtins", "exec", code),
        "__builtin__.eval": global_pickle("__builtin__", "eval", code),
        "subprocess": pickle.dumps(Calls(subprocess.getoutput, touch), 2),
        "getattr chain": pickle.dumps(Calls(getattr, Calls(__import__, "os"), "system"), 2),
        "runpy": global_pickle("runpy", "run_path", str(witness.with_name("evil.py"))),
        "importlib": global_pickle("importlib", "import_module", "evil"),
        "torch.hub": global_pickle("torch.hub", "load", str(witness.parent)),
        "torch.load": global_pickle("torch.serialization", "load", str(witness.with_name("os.system"))),
        "torch._utils": global_pickle("torch._utils", "_import_dotted_name", "os.system"),
        "numpy": pickle.dumps(Calls(np.load, str(witness.with_name("evil.npy")), None, True), 2),
        "codecs": global_pickle("codecs", "open", str(witness)),
        "dotted name": global_pickle("torch.nn.modules.container", "Sequential.__init__.__globals__", code),
        "__setstate__": pickle.dumps(smuggled, 2),
        "nested": pickle.dumps(nested, 2),
        "protocol 5": pickle.dumps(Calls(eval, code), 5),
        "STACK_GLOBAL": stack_global,
        "INST": inst,
        "OBJ": obj,
        "BUILD": build,
        "REDUCE of a module": reduce_module,
        "REDUCE within torch": rebuild,
        "a class that dall_e does not have": global_pickle("dall_e.utils", "os.system", touch),
    }


def as_zip(content: bytes) -> bytes:
    """What torch.save writes now."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return file.getvalue()


def as_legacy(content: bytes) -> bytes:
    """What torch.save wrote before 2020: four pickles, then storages."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    return b"".join(pickle.dumps(each, 2) for each in head) + content + pickle.dumps([], 2)
