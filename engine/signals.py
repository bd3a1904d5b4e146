"""Signals: the first asks the training to finish its step, save and leave; the second ends it at once."""

import os
import signal
import sys
import threading
import time
from types import FrameType

HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO = 2.0  # seconds in which the same wish may arrive twice: from a terminal or scheduler, and handed on by a launcher


class Stopped(BaseException):
    """The training was asked to stop. Not an Exception: no handler of errors on the way may take it for one.

    Args:
        number: of the signal.
        told: what the last line says.
    """

    def __init__(self, number: int, told: str) -> None:
        super().__init__(told)
        self.number, self.told = number, told


class Signals:
    """Hears SIGTERM, SIGINT and SIGUSR1 of this process.

    Attributes:
        number: of the signal that came; 0 before.
        stepping: whether a step is on its way, which is finished first, and saved. Otherwise nothing is half done, and a signal
            ends the process by raising `Stopped` where it is.
    """

    def __init__(self) -> None:
        self.number, self.stepping, self._came = 0, False, 0.0

    def listen(self) -> None:
        """From now on. A shell has what it runs in the background ignore SIGINT, and so it stays."""
        if threading.current_thread() is threading.main_thread():
            for number in HEEDED:
                if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, self._hear)

    def mortal(self) -> None:
        """The launcher is to end this process, which has nothing to say."""
        if threading.current_thread() is threading.main_thread():
            for number in HEEDED:
                signal.signal(number, signal.SIG_DFL)

    def deaf(self) -> None:
        """The process is leaving already. The first one still has something to say; the others a launcher may end at any moment."""
        if threading.current_thread() is threading.main_thread():
            for number in HEEDED:
                signal.signal(number, signal.SIG_IGN if os.environ.get("RANK", "0") == "0" else signal.SIG_DFL)

    def stopped(self, told: str) -> Stopped:
        """What to raise."""
        number = self.number or signal.SIGTERM  # none where another process was told
        return Stopped(number, f"stopped by {signal.Signals(number).name}; {told}")

    def _hear(self, number: int, _: FrameType | None) -> None:
        if self.number:
            if time.monotonic() - self._came > ECHO:
                _say(f"ended at once by a second {signal.Signals(number).name}; checkpoints from before are kept")
                os._exit(128 + number)
            return
        self.number, self._came = number, time.monotonic()
        if not self.stepping:
            raise self.stopped("the same command goes on from the last checkpoint")
        _say(f"{signal.Signals(number).name}: finishing this step, then saving; again ends at once")


def _say(line: str) -> None:
    """Once, whatever the number of processes, and without Python's buffers: the signal may have come in the middle of a print."""
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.stderr.fileno(), f"mimetic: {line}\n".encode())


SIGNALS = Signals()  # of this process
