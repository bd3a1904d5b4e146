"""The scale of activations, measured inside steps that are logged anyway."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mimetic.engine.objective import Objective


class ActivationScale:
    """The largest root mean square of what any module puts out: what grows before numbers break.

    Attributes:
        largest: of the last micro-batch that was listened to, on the device of this process; None before.
    """

    def __init__(self, objective: Objective) -> None:
        self.modules = [module for name, module in objective.named_modules() if name]
        self.largest: Tensor | None = None

    @contextmanager
    def listening(self, now: bool) -> Iterator[None]:
        """Around a forward; where not `now`, nothing is measured."""
        if not now:
            yield
            return
        self.largest = None
        hooks = [module.register_forward_hook(self._note) for module in self.modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, _: Any, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            scale = output.detach().float().square().mean().sqrt()
            self.largest = scale if self.largest is None else torch.maximum(self.largest, scale)
