"""Being asked to stop: by Ctrl-C, by a scheduler that wants the machine back, by `kill`.

The process with the terminal takes the signals. While the training process is at work, the first one only asks it to
stop; it ends its optimizer step, saves a checkpoint and says so. At any other moment, and at the second signal, the run
ends at once. Importing this module loads nothing.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

# Ctrl-C; what `kill` and most schedulers send; Slurm's notice before a preemption (`--signal=B:USR1@120`).
ASK_SECONDS = 0.5
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop.

    Args:
        signum: the signal that asked.
    """

    def __init__(self, signum: int = signal.SIGINT) -> None:
        self.signum = signum
        super().__init__(signum)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + self.signum

    def __str__(self) -> str:
        return signal.Signals(self.signum).name


class StopSignals:
    """Takes the signals for the process with the terminal, as a context; before and after, all is as it was.

    Attributes:
        received: the first signal that came within `deferred`; None: none did.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._is_deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = self._take_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """The first signal in the body is noted in `received`; the second raises `Interrupted`, as everywhere else."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    @contextmanager
    def while_ray_starts(self) -> Iterator[None]:
        """Keep the signals to this process.

        Ray takes SIGTERM for itself when it starts, and ends the process with it. Ray's own processes are to ignore
        SIGUSR1, which a scheduler may send to all processes of a job: by default it kills, and they would go before the
        training process has saved anything.
        """
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        try:
            yield
        finally:
            self._take_all()

    def _take_all(self) -> dict[int, Any]:
        return {number: signal.signal(number, self._take) for number in SIGNALS}

    def _take(self, signum: int, frame: FrameType | None) -> None:
        if not self._is_deferred or self.received is not None:
            raise Interrupted(signum)
        self.received = signum


class StopRequest:
    """The training process's side: whether it was asked to stop. Nothing is ever raised where nobody looks.

    Attributes:
        signum: the signal because of which it is to stop; None: it is not.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def listen(self, stop_asked: Callable[[], int | None]) -> None:
        """Take the signals in this process, which may be sent to all of a job, and those of the terminal's process.

        Args:
            stop_asked: says which that process has received, if any; asked by a thread, twice a second.
        """
        for number in SIGNALS:
            signal.signal(number, self._take)
        threading.Thread(target=self._ask, args=(stop_asked,), daemon=True).start()

    def _ask(self, stop_asked: Callable[[], int | None]) -> None:
        while self.signum is None:
            if (asked := stop_asked()) is not None:
                self.signum = asked
            time.sleep(ASK_SECONDS)

    def check(self) -> None:
        """Raise `Interrupted` if the process was asked to stop."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def _take(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
