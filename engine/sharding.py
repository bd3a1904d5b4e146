"""How weights and optimizer states are shared: whole on every process (one process, DDP), or split over them (ZeRO 1 to 3).

Either side speaks in whole tensors by parameter name. So a checkpoint does not know how many processes wrote it, nor which
engine, and any number of processes under any engine goes on from it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mimetic.engine.config import OptimSettings
from mimetic.engine.errors import SettingError
from mimetic.engine.objective import Objective
from mimetic.engine.optim import adamw
from mimetic.engine.runtime import add_up

if TYPE_CHECKING:
    from accelerate import Accelerator

MOMENTS = ("exp_avg", "exp_avg_sq", "ema")  # what an optimizer may keep beside each weight; `ema` is `optim.average_weights`'s


class Sharing(Protocol):
    """What the loop asks of an engine; every method is called on all processes together.

    Attributes:
        model: the wrapped objective: what a training batch is given to.
        optimizer: AdamW itself, over whole parameters or over this process's flat parts of them.
    """

    model: Any
    optimizer: torch.optim.Optimizer

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; `last` of its step."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of one micro-batch; after the last one of a step gradients are those of all processes."""
        ...

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, before clipping; infinite or NaN when the gradient is not finite."""
        ...

    def update(self, bad: Tensor) -> None:
        """Clips and steps, or, where `bad` (a scalar on the device) is 1, changes no weight; then forgets the gradient."""
        ...

    def parts(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """The parameter group and the weights of everything that this process's optimizer holds."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every entry of the objective's state_dict, whole, in the precision it is trained in."""
        ...

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        """`NAME:exp_avg` and so on of every trained parameter, whole, and `NAME:step`."""
        ...

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Puts both back in place."""
        ...

    def refresh(self) -> None:
        """Lets the model see what was changed in `parts`."""
        ...

    def consolidate(self) -> None:
        """Leaves the objective with whole weights on every process, for good."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds up over processes what each computed from its `parts`."""
        ...


def share(accelerator: "Accelerator", objective: Objective, settings: OptimSettings, accumulate: int) -> Sharing:
    """Wraps the objective and builds its optimizer for the engine that the launch set up.

    Raises:
        SettingError: that engine cannot train this objective.
    """
    if accelerator.state.deepspeed_plugin is not None:
        if objective.moves_weights:
            raise SettingError(f"{type(objective).__name__} changes weights between steps, which ZeRO's copies would undo; start it under "
                               "DDP (launch/accelerate/ddp.yaml)", together=True)  # fmt: skip
        return Split(accelerator, objective, settings)
    return Whole(accelerator, objective, settings, accumulate)


class Whole:
    """One process, or DDP (arXiv 2006.15704): every process holds everything."""

    def __init__(self, accelerator: "Accelerator", objective: Objective, settings: OptimSettings, accumulate: int) -> None:
        from torch.nn.parallel import DistributedDataParallel

        self.accelerator, self.objective, self.clip, self.accumulate = accelerator, objective, settings.clip, accumulate
        unchanging = [name for name in dict(objective.named_buffers()) if name not in objective.state_dict()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, unchanging)  # else sent round at every step
        self.optimizer: torch.optim.Optimizer = adamw(objective, settings)
        self.model = accelerator.prepare_model(objective)
        self.trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last or self.model is self.objective else self.model.no_sync()

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss / self.accumulate).backward()

    def gradient_norm(self) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(self.trained.values(), self.clip or torch.inf)

    def update(self, bad: Tensor) -> None:
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # the fused kernel looks at it, as it does for a GradScaler
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parts(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                yield group, parameter

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.objective.state_dict().items()

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state[parameter].items():
                yield f"{name}:{key}", value

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        self.objective.load_state_dict(weights)
        for name, parameter in self.trained.items():
            state = {"step": moments[f"{name}:step"].to(parameter.device, copy=True)} if f"{name}:step" in moments else {}
            for key in MOMENTS:
                if f"{name}:{key}" in moments:  # in memory like the weights, channels last or not: the fused kernel walks along both
                    state[key] = torch.empty_like(parameter, requires_grad=False).copy_(moments[f"{name}:{key}"])
            self.optimizer.state[parameter] = state

    def refresh(self) -> None:
        pass

    def consolidate(self) -> None:
        pass

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


class Split:
    """DeepSpeed's ZeRO (arXiv 1910.02054): stage 1 splits the optimizer's states, 2 the gradients too, 3 the weights too."""

    def __init__(self, accelerator: "Accelerator", objective: Objective, settings: OptimSettings) -> None:
        self.names = list(objective.state_dict())
        self.model, _ = accelerator.prepare(objective, adamw(objective, settings))
        self.objective, self.zero = objective, self.model.optimizer
        self.optimizer = self.zero.optimizer
        self.stage = accelerator.state.deepspeed_plugin.zero_stage
        self.trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}

    @property
    def _flat(self) -> list[Tensor]:
        """This process's parts of the weights, a flat fp32 tensor per group or sub-group."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.model.backward(loss)  # divides by the number of micro-batches, and knows the last one, by itself
        if not last:
            self.model.step()  # counts

    def gradient_norm(self) -> Tensor:
        if self.stage < 3:
            return self.zero.scaled_global_norm()
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return combine_grad_norm_groups(self.zero._get_norm_groups())

    def update(self, bad: Tensor) -> None:
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # for a spike; what is not finite DeepSpeed leaves out by itself
        self.model.step()

    def parts(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for place, flat in enumerate(self._flat):
            yield self.optimizer.param_groups[self.zero.sub_group_to_group_id[place] if self.stage == 3 else place], flat

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        held = dict(self.objective.named_parameters(remove_duplicate=False)) | dict(self.objective.named_buffers())
        for name in self.names:
            value = held[name]
            if value.requires_grad:
                yield name, safe_get_full_fp32_param(value)
            else:
                with self._gathered([value]):
                    yield name, value.detach().clone()

    def moments(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        state = self.optimizer.state[self._flat[0]]
        for name, parameter in self.trained.items() if state else ():
            yield f"{name}:step", state["step"]
            for key in MOMENTS:
                if key in state:
                    yield f"{name}:{key}", safe_get_full_optimizer_state(parameter, key)

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        keys = [key for key in MOMENTS if any(name.endswith(f":{key}") for name in moments)]
        self._prepare_states(keys, next((value for name, value in moments.items() if name.endswith(":step")), torch.zeros(())))
        held = dict(self.objective.named_parameters(remove_duplicate=False)) | dict(self.objective.named_buffers())
        for name in self.names:
            value = held[name]
            if value.requires_grad:
                safe_set_full_fp32_param(value, weights[name].to(value.device))
            else:
                with self._gathered([value], writer=0), torch.no_grad():
                    value.copy_(weights[name])
        for name, parameter in self.trained.items():
            for key in keys:
                safe_set_full_optimizer_state(parameter, moments[f"{name}:{key}"].to(parameter.device), key)
        self.refresh()

    def _prepare_states(self, keys: list[str], step: Tensor) -> None:
        """Makes room for the optimizer's states, which exist only after its first step."""
        for flat in self._flat:
            state = self.optimizer.state[flat]
            state["step"] = step.to(flat.device, copy=True)
            for key in keys:
                state.setdefault(key, torch.zeros_like(flat))
        self._link()

    def _link(self) -> None:
        """DeepSpeed finds a parameter's states by views that it makes at the first group's first step, when others have none yet."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def refresh(self) -> None:
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        self.zero._partition_all_parameters()
        for number in range(len(self._flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(number)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def consolidate(self) -> None:
        if self.stage == 3:
            self._gathered(list(self.objective.parameters())).__enter__()

    def sum(self, tensor: Tensor) -> Tensor:
        return add_up(tensor)

    def _gathered(self, tensors: list[Any], writer: int | None = None) -> Any:
        """Whole inside the context; what process `writer` writes there is everybody's."""
        import deepspeed

        return deepspeed.zero.GatheredParameters([tensor for tensor in tensors if hasattr(tensor, "ds_id")], modifier_rank=writer)


@contextmanager
def averaged(sharing: Sharing) -> Iterator[None]:
    """Inside, the model has the running mean of its weights, where one is kept."""
    exchange(sharing)
    yield
    exchange(sharing)  # not after an error: the run ends, and the others may not come along


def exchange(sharing: Sharing) -> None:
    """The running mean of the weights in the place of the weights, and they in its place, where a mean is kept."""
    state = sharing.optimizer.state
    kept = [(weights, state[weights]["ema"]) for _, weights in sharing.parts() if "ema" in state[weights]]
    with torch.no_grad():
        for weights, mean in kept:
            before = weights.clone()
            weights.copy_(mean)
            mean.copy_(before)
    if kept:
        sharing.refresh()
