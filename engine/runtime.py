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
from mimetic.engine.meeting import announced_world, meet
from mimetic.engine.signals import SIGNALS, Stopped

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from mimetic.engine.objective import Objective

GRACE = 0.3  # seconds in which the first process comes out of the collective that they all were in
PATIENCE = 5  # seconds in which a launcher notices that a process has ended, and ends the others


def run_entry(main: Callable[[], None]) -> None:
    """Runs an entry script: errors that the user can cure become one line on stderr and exit code 2.

    Under a launcher the first process speaks. The others wait a moment before they do: when all stop for the same reason, the
    launcher has ended them by then, and when one stops alone, its reason is not lost.
    """
    try:
        _run(main)
    except Stopped as stopped:  # came while another error was being told
        if _peer_is_gone(stopped.__context__):
            os._exit(128 + stopped.number)  # the launcher's, because of the peer, whose own line says why
        _leave(stopped.told, 128 + stopped.number, together=True)


def _run(main: Callable[[], None]) -> None:
    _quiet()
    try:
        main()
        if "RANK" in os.environ:
            _end()
    except MimeticError as error:
        _leave(f"error: {error}", 2, together=error.together)
    except Stopped as stopped:
        _leave(stopped.told, 128 + stopped.number, together=True)
    except KeyboardInterrupt:
        _leave("error: interrupted; the same command goes on from the last checkpoint", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _leave("error: nobody reads the output any more", 1)
    except Exception as error:
        if SIGNALS.number and _peer_is_gone(error):  # what breaks while processes leave is not news
            _leave(SIGNALS.stopped("the same command goes on from the last checkpoint").told, 128 + SIGNALS.number, together=True)
        if "RANK" in os.environ and _peer_is_gone(error):
            SIGNALS.mortal()
            time.sleep(PATIENCE)  # the peer's own line says why; here the launcher ends this process, unless the peer was elsewhere
            _leave("error: another process of this run has ended; the same command goes on from the last checkpoint", 1)
        if not disk_is_full(error):
            if isinstance(error, OSError) and error.filename:
                _leave(f"error: {error.filename}: {error.strerror}", 2)
            raise
        what = " ".join(str(error).split("\n")[0].split())
        _leave(f"error: the disk is full ({what}); free some space and give the same command: it goes on from the last checkpoint", 2)


def _end() -> None:
    """All that Python does at its end, short of taking the interpreter down.

    Threads of a process group outlive it, and let go of their last tensors only a moment later. For that they need the interpreter;
    if it is being taken down, the whole process is aborted (pytorch#190489), and the launcher reports a training as failed that was not.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # multiprocessing ends its processes in these steps too
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)


def _peer_is_gone(error: BaseException | None) -> bool:
    return any(word in str(error).lower() for word in ("connection closed by peer", "connection reset by peer", "broken pipe"))


def _leave(line: str, code: int, together: bool = False) -> None:
    rank = int(os.environ.get("RANK", 0))
    SIGNALS.deaf()  # the launcher may be ending this process already
    sys.stdout.flush()
    if rank:
        time.sleep(GRACE if together else PATIENCE)
    if not (rank and together):
        print(f"mimetic: {line}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        os._exit(code)  # a peer that waits in a collective must not keep this process from ending
    sys.exit(code)


def start(train: TrainSettings, optim: OptimSettings, batch_size: int) -> "Accelerator":
    """The Accelerator of this run, on whatever the launcher set up: one process, DDP, or DeepSpeed.

    Raises:
        LaunchError: the processes that exist are not those that the launcher announced, do not find each other, or the launch
            settles what the recipe settles otherwise.
    """
    _end_with_launcher()
    SIGNALS.listen()
    # OpenMP's threads spin while they wait for each other. On a CPU that they share with a worker or another program, the one
    # that is missing then waits for those that spin: small steps ran ten times slower. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    accelerated = torch.cuda.is_available() or torch.accelerator.is_available()
    if not accelerated:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    announced = announced_world()
    _refuse_ignored(train)

    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import InitProcessGroupKwargs

    # On CPUs accelerate has to be told twice. Under DeepSpeed it never learns the backend, and each rank believes it is process
    # 0 of 1; without DeepSpeed it needs cpu=True, or it knows of two processes and yet wraps nothing in DDP.
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    several = announced > 1 or deepspeed
    if several:
        meet("nccl" if torch.cuda.is_available() else "gloo", announced)
    handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if several and not accelerated:
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(cpu=not accelerated and not deepspeed, kwargs_handlers=handlers)
    _check_world(accelerator, announced)
    if accelerator.state.deepspeed_plugin is not None:
        _configure_deepspeed(accelerator.state.deepspeed_plugin, train, optim, batch_size, announced)
    return accelerator


def _refuse_ignored(train: TrainSettings) -> None:
    """What a launch file says and the recipe settles: where the two differ, one of them would be ignored."""
    told = {
        "mixed_precision": ("ACCELERATE_MIXED_PRECISION", "no", {"fp32": "no"}.get(train.precision, train.precision), "train.precision"),
        "gradient_accumulation_steps": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", str(train.accumulate), "train.accumulate"),
        "dynamo_backend": ("ACCELERATE_DYNAMO_BACKEND", "NO", "NO", "train.compile"),  # by itself, and once
    }
    for other in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(other, "false").lower() == "true":
            raise LaunchError(f"the launch asks for {other.removeprefix('ACCELERATE_USE_')}, which is not supported; use DDP or ZeRO, "
                              "the files of launch/accelerate/")  # fmt: skip
    for name, (variable, unset, ours, setting) in told.items():
        given = os.environ.get(variable, unset)
        if given.upper() not in (unset.upper(), ours.upper()):
            raise LaunchError(f"the launch says {name} {given.lower()}, the recipe's {setting} says {ours.lower()}; the recipe decides: "
                              f"leave {name} out of the launch, or set {setting}")  # fmt: skip


def _configure_deepspeed(plugin: Any, train: TrainSettings, optim: OptimSettings, batch_size: int, world: int) -> None:
    config, stage = plugin.deepspeed_config, plugin.zero_stage
    if stage not in (1, 2, 3):
        raise LaunchError(f"ZeRO stage {stage} splits nothing; use 1, 2 or 3, or DDP (launch/accelerate/ddp.yaml)")
    ours = {"train_micro_batch_size_per_gpu": batch_size, "gradient_accumulation_steps": train.accumulate, "gradient_clipping": optim.clip,
            "train_batch_size": batch_size * train.accumulate * world}  # fmt: skip
    settings = {"train_micro_batch_size_per_gpu": "data.batch_size", "gradient_accumulation_steps": "train.accumulate",
                "gradient_clipping": "optim.clip", "train_batch_size": "data.batch_size x train.accumulate x processes"}  # fmt: skip
    for name, value in ours.items():
        given = config.get(name, "auto")
        if given not in ("auto", None, value) and not (name == "gradient_accumulation_steps" and given == 1):
            raise LaunchError(f"the DeepSpeed configuration says {name} {given}, the recipe {value} ({settings[name]}); the recipe "
                              "decides: leave it out there, or set it to auto")  # fmt: skip
    for name in ("optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast"):
        given = config.get(name)
        if given and not (isinstance(given, dict) and given.get("enabled") in (False, "auto")):
            raise LaunchError(f"the DeepSpeed configuration sets {name}, which the recipe decides (optim, train.precision); leave it out")
    config.update(ours, steps_per_print=1 << 62, zero_force_ds_cpu_optimizer=False)
    config["train_batch_size"] = "auto"  # accelerate multiplies by itself


def autocast(objective: "Objective", device: "torch.device", precision: str) -> None:
    """Lets its forward compute matrix products in the precision; weights stay in fp32, under every engine alike."""
    import torch

    if precision == "bf16":
        objective.forward = torch.autocast(device.type, torch.bfloat16)(objective.forward)  # type: ignore[method-assign]


def _end_with_launcher() -> None:
    """A launcher that ends must not leave its processes behind, training into the same folder: they save and leave (Linux).

    `accelerate launch` of one process does not even hand a SIGTERM on.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


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
