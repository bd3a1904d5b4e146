"""Numbers going wrong: every step's gradient is judged on the device, all processes agree, and the host hears of it without waiting.

A bad step changes no weight: the optimizer's kernel is handed the verdict. On a CPU the host knows at once. On an accelerator it
reads the verdict of a step when it has already launched the next one's gradient, just before that one is applied: so nothing
waits for the device, and at that moment the weights are still those that the bad step was computed with.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mimetic.engine.config import GuardSettings
from mimetic.engine.runtime import add_up

REMEMBERED = 64  # gradient norms whose median is what a spike is measured by


class Pulse(NamedTuple):
    """What all processes know of one step.

    Attributes:
        step: its number, counted from 0.
        bad: whether its gradient is not finite, or a spike.
        norm: of the gradient.
        limit: above which the norm is a spike; infinite while nothing is known.
        asked: whether a process was asked to stop by a signal.
    """

    step: int
    bad: bool
    norm: float
    limit: float
    asked: bool


@dataclass
class Guard:
    """Judges gradient norms, and carries the verdicts.

    Attributes:
        settings: what counts as a spike.
        device: of the norms.
        lag: steps by which the host hears later; 1 where the device works on by itself.
        norms: the last finite norms of steps that were taken, oldest first; part of a checkpoint.
    """

    settings: GuardSettings
    device: torch.device
    lag: int = 0

    def __post_init__(self) -> None:
        self.norms = torch.zeros(REMEMBERED, device=self.device)
        self.seen = torch.zeros((), device=self.device)
        self._sent: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def judge(self, step: int, norm: Tensor, asked: bool) -> Tensor:
        """1 on the device if this step's gradient must not be applied, else 0; the same on all processes."""
        norm = norm.detach().float().to(self.device)
        limit = self._limit()
        bad = (~torch.isfinite(norm) | (norm > limit)).float()
        agreed = add_up(torch.stack([bad, torch.full_like(bad, float(asked))]))  # filled there: a copy would wait for the device
        bad = (agreed[0] > 0).float()
        self._remember(norm, bad)
        self._send(step, torch.stack([bad, norm, limit, agreed[1]]))
        return bad

    def hear(self, all_of_them: bool = False) -> Pulse | None:
        """The next pulse that is known: of the last step, or on an accelerator of the one before it; None when there is none.

        Args:
            all_of_them: wait for the last step's too.
        """
        if len(self._sent) <= (0 if all_of_them else self.lag):
            return None
        step, values, event = self._sent.pop(0)
        if event is not None:
            event.synchronize()  # long past: a whole step has been launched since
        bad, norm, limit, asked = values.tolist()
        return Pulse(step, bad > 0, norm, limit, asked > 0)

    def forget(self) -> None:
        """Nothing that was sent concerns what comes now: the run went back to a checkpoint."""
        self._sent.clear()

    def state(self) -> list[float]:
        """The finite norms so far, oldest first, for a checkpoint; read when one is written anyway."""
        seen = min(int(self.seen), REMEMBERED)
        return self.norms[REMEMBERED - seen :].tolist()

    def load(self, norms: list[float]) -> None:
        """From a checkpoint."""
        self.norms.zero_()
        if norms:
            self.norms[-len(norms) :] = torch.tensor(norms, device=self.device)
        self.seen.fill_(len(norms))
        self.forget()

    def _limit(self) -> Tensor:
        if not self.settings.spike:
            return torch.full((), torch.inf, device=self.device)
        usual = self.settings.spike * self.norms.median()
        return torch.where(self.seen >= REMEMBERED, usual, torch.inf)  # the first steps know no usual

    def _remember(self, norm: Tensor, bad: Tensor) -> None:
        """A shift on the device; a bad step leaves everything as it is."""
        if self.settings.spike:
            self.norms = torch.where(bad > 0, self.norms, torch.cat([self.norms[1:], norm[None]]))
            self.seen = self.seen + (1 - bad)

    def _send(self, step: int, values: Tensor) -> None:
        if self.device.type != "cuda":
            self._sent.append((step, values, None))
            return
        pinned = torch.empty(values.shape, pin_memory=True)
        pinned.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._sent.append((step, pinned, event))
