"""Starting up: processes, devices and precision through Accelerate; ending: one clear line for what the user can cure."""

import atexit
import ctypes
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from mimetic.engine.config import OptimSettings, TrainSettings
from mimetic.engine.errors import LaunchError, MimeticError, disk_is_full

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

PATIENCE = 5  # seconds in which a launcher notices that a process has ended, and ends the others


def run_entry(main: Callable[[], None]) -> None:
    """Runs an entry script: errors that the user can cure become one line on stderr and exit code 2.

    Under a launcher the first process speaks. The others wait a moment before they do: when all stop for the same reason, the
    launcher has ended them by then, and when one stops alone, its reason is not lost.
    """
    _quiet()
    try:
        main()
        if "RANK" in os.environ:
            _end()
    except MimeticError as error:
        _leave(str(error), 2)
    except KeyboardInterrupt:
        _leave("interrupted; the same command goes on from the last checkpoint", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _leave("nobody reads the output any more", 1)
    except Exception as error:
        if "RANK" in os.environ and _peer_is_gone(error):
            time.sleep(PATIENCE)  # the peer's own line says why; here the launcher ends this process, unless the peer was elsewhere
            _leave("another process of this run has ended; the same command goes on from the last checkpoint", 1)
        if not disk_is_full(error):
            if isinstance(error, OSError) and error.filename:
                _leave(f"{error.filename}: {error.strerror}", 2)
            raise
        what = " ".join(str(error).split("\n")[0].split())
        _leave(f"the disk is full ({what}); free some space and give the same command: it goes on from the last checkpoint", 2)


def _end() -> None:
    """All that Python does at its end, short of taking the interpreter down.

    Threads of a process group outlive it, and let go of their last tensors only a moment later. For that they need the interpreter;
    if it is being taken down, the whole process is aborted (pytorch#190489), and the launcher reports a training as failed that was not.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # multiprocessing ends its processes in these steps too
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)


def _peer_is_gone(error: Exception) -> bool:
    return any(word in str(error).lower() for word in ("connection closed by peer", "connection reset by peer", "broken pipe"))


def _leave(line: str, code: int) -> None:
    rank = int(os.environ.get("RANK", 0))
    sys.stdout.flush()
    if rank:
        time.sleep(PATIENCE)
    print(f"mimetic: error: {line}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        os._exit(code)  # a peer that waits in a collective must not keep this process from ending
    sys.exit(code)


def start(train: TrainSettings, optim: OptimSettings, batch_size: int) -> "Accelerator":
    """The Accelerator of this run, on whatever the launcher set up: one process, DDP, or DeepSpeed.

    Raises:
        LaunchError: the processes that exist are not those that the launcher announced.
    """
    _end_with_launcher()
    # OpenMP's threads spin while they wait for each other. On a CPU that they share with a worker or another program, the one
    # that is missing then waits for those that spin: small steps ran ten times slower. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    accelerated = torch.cuda.is_available() or torch.accelerator.is_available()
    if not accelerated:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    given = os.environ.get("WORLD_SIZE", "1")
    announced = int(given) if given.isdecimal() else 0
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if announced < 1 or (announced > 1 and missing):
        what = f"{missing[0]} is not set" if announced > 1 else "that is no number of processes"
        raise LaunchError(f"WORLD_SIZE is {given} but {what}; start with accelerate launch or torchrun, or unset WORLD_SIZE")

    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # On CPUs accelerate has to be told twice. Under DeepSpeed it never learns the backend, and each rank believes it is process
    # 0 of 1; without DeepSpeed it needs cpu=True, or it knows of two processes and yet wraps nothing in DDP.
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    gloo = not accelerated and (announced > 1 or deepspeed)
    accelerator = Accelerator(
        cpu=not accelerated and not deepspeed,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if gloo else [],
        mixed_precision="bf16" if train.precision == "bf16" else "no",
        gradient_accumulation_steps=train.accumulate,
        step_scheduler_with_optimizer=False,
    )
    _check_world(accelerator, announced)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        if plugin.zero_stage != 1:
            raise LaunchError(f"ZeRO stage {plugin.zero_stage} is not supported yet; use launch/accelerate/zero1.yaml")
        if train.precision != "fp32":
            # DeepSpeed would cast parameters and leave inputs and buffers as they are, where autocast is meant.
            raise LaunchError(f"train.precision {train.precision} does not run under DeepSpeed yet; use fp32 or ddp.yaml")
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size
        plugin.deepspeed_config["gradient_accumulation_steps"] = train.accumulate
        plugin.deepspeed_config["gradient_clipping"] = optim.clip
        plugin.deepspeed_config["steps_per_print"] = 1 << 62
    return accelerator


def _end_with_launcher() -> None:
    """A launcher that is killed outright must not leave its processes behind, training into the same folder (Linux)."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def engine_name(accelerator: "Accelerator") -> str:
    """How gradients are shared: "one process", "DDP" or "ZeRO-1"."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return f"ZeRO-{plugin.zero_stage}"
    return "DDP" if accelerator.num_processes > 1 else "one process"


def add_up(tensor: "torch.Tensor") -> "torch.Tensor":
    """The sum over all processes."""
    import torch.distributed

    if torch.distributed.is_initialized():
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor)
    return tensor


def same_on_all_ranks(tensors: "Iterable[torch.Tensor]") -> None:
    """Gives every process the first one's values, in place."""
    import torch.distributed

    if torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)


def _check_world(accelerator: Any, announced: int) -> None:
    from accelerate.utils import DistributedType

    alone = announced > 1 and accelerator.distributed_type == DistributedType.NO
    if accelerator.num_processes != announced or alone:
        raise LaunchError(
            f"the launcher announced {announced} processes, but accelerate sees "
            f"{1 if alone else accelerator.num_processes}: each would train alone; "
            "start with a file of launch/accelerate/"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and accelerator.state.deepspeed_plugin is None:
        raise LaunchError("DeepSpeed was asked for, but ACCELERATE_USE_CPU switches it off; remove --cpu or use_cpu from the launch")


def _quiet() -> None:
    """Other people's start-up chatter hides the lines that matter."""
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("DeepSpeed", "deepspeed", "torch.distributed.run", "accelerate", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(deepspeed|accelerate|torch\.distributed|PIL)\b.*")
