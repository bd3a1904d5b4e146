"""Processes finding each other, within a bounded time, and making sure that they are about to do the same."""

import functools
import hashlib
import os
import platform
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from mimetic.engine.errors import LaunchError

PATIENCE = "MIMETIC_PATIENCE"  # environment variable: seconds in which all processes must have come
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def announced_world() -> int:
    """The number of processes that the launcher says there are; 1 without a launcher.

    Raises:
        LaunchError: what it says is no number, or tells no process how to find the others.
    """
    given = os.environ.get("WORLD_SIZE", "1")
    world = int(given) if given.isdecimal() else 0
    missing = [name for name in NEEDED if name not in os.environ]
    if world < 1 or (world > 1 and missing):
        what = f"{missing[0]} is not set" if world > 1 else "that is no number of processes"
        raise LaunchError(f"WORLD_SIZE is {given} but {what}; start with accelerate launch or torchrun, or unset WORLD_SIZE")
    for name in ("RANK", "LOCAL_RANK"):
        if not os.environ.get(name, "0").isdecimal():
            raise LaunchError(f"{name} is {os.environ[name]}, which is no number of a process; start with accelerate launch or torchrun")
    return world


def meet(backend: str, world: int) -> None:
    """Sets up the process group once everybody is there.

    Raises:
        LaunchError: the meeting place cannot be opened or reached, or somebody did not come in time.
    """
    import torch.distributed
    from torch.distributed import PrefixStore, TCPStore

    rank, place, patience = int(os.environ.get("RANK", 0)), _place(), _patience()
    host, port = place.rsplit(":", 1)
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun holds the place open by itself
    if not opens and not _answers(host, int(port), patience):
        raise LaunchError(f"process {rank} of {world} cannot reach process 0 at {place} (waited {patience} s); is it running, is "
                          f"MASTER_ADDR its address, and is the port open? {PATIENCE} sets how long to wait")  # fmt: skip
    try:
        store: Any = TCPStore(host, int(port), world, opens, timedelta(seconds=patience), wait_for_workers=False)
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise LaunchError(f"MASTER_ADDR {host}: process 0 cannot open a port there; it must be an address of this machine, "
                              f"{socket.gethostname()} ({str(error).splitlines()[0]})") from None  # fmt: skip
        raise LaunchError(f"MASTER_PORT {port} is in use on {socket.gethostname()}; choose another, such as {_free_port()} "
                          "(accelerate launch --main_process_port, torchrun --master_port)") from None  # fmt: skip
    store = PrefixStore(f"mimetic/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    _wait_for_all(store, rank, world, place, patience)
    torch.distributed.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=world)


def _wait_for_all(store: Any, rank: int, world: int, place: str, patience: int) -> None:
    store.set(f"here/{rank}", socket.gethostname())
    try:
        store.wait([f"here/{other}" for other in range(world)], timedelta(seconds=patience))
    except RuntimeError:
        absent = [other for other in range(world) if not store.check([f"here/{other}"])]
        named = ", ".join(map(str, absent[:8])) + (" and more" if len(absent) > 8 else "")
        raise LaunchError(f"process{'es' if len(absent) > 1 else ''} {named} of {world} did not come to {place} within {patience} s; see "
                          f"what became of {'them' if len(absent) > 1 else 'it'}; {PATIENCE} sets how long to wait") from None  # fmt: skip


def _place() -> str:
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
    if not port.isdecimal() or not 0 <= int(port) < 1 << 16:
        raise LaunchError(f"MASTER_PORT is {port}; it must be a port, 1 to 65535")
    return f"{host}:{port}"


def _patience() -> int:
    given = os.environ.get(PATIENCE, "300")
    if not given.isdecimal() or not int(given):
        raise LaunchError(f"{PATIENCE} is {given}; it must be a number of seconds")
    return int(given)


def _answers(host: str, port: int, patience: int) -> bool:
    """Whether somebody listens there, or begins to in time; torch's own client says the same in forty lines."""
    until = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, until - time.monotonic())).close()
            return True
        except OSError:
            if time.monotonic() > until:
                return False
            time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def agree(facts: Mapping[str, Any], what: str, cure: str) -> None:
    """All processes compare what they have; names are theirs to choose.

    Args:
        facts: of this process.
        what: that they are about, for the line.
        cure: what to do when they differ.

    Raises:
        LaunchError: the first facts that differ, with both values and whose they are; on all processes.
    """
    import torch.distributed

    if not torch.distributed.is_initialized():
        return
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, dict(facts))
    for rank, other in enumerate(found):
        names = [name for name in {**found[0], **other} if found[0].get(name) != other.get(name)]
        if names:
            told = "; ".join(f"{name} is {found[0].get(name)} for process 0, {other.get(name)} for process {rank}" for name in names[:3])
            raise LaunchError(f"the processes differ in {what}: {told}; {cure}", together=True)


@functools.cache
def versions() -> dict[str, str]:
    """Of what decides numbers: Python, torch, and this package's own code by content."""
    import torch

    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for folder in ("backbones", "data", "engine", "finetune", "pretrain", "tokenizers"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return {"python": platform.python_version(), "torch": torch.__version__, "mimetic": digest.hexdigest()[:12]}
