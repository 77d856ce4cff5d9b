"""A process that scores one response after the other for a `JudgingPool`: `python -m expert_iteration.judging_worker`.

Started with the file descriptor of a socket and the process id of its parent. First comes a pickled `Scorer`, which is
answered when all that its functions need is imported, so that their first response has no less time than the others;
then pairs of problem and response, each of which is answered. Its end of the socket closes with its parent.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from expert_iteration.errors import UserError
from expert_iteration.scoring import Scorer

READY, SCORED, REFUSED = "ready", "scored", "refused"
PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
# Modules whose functions import libraries when they are first called, which their `prepare()` does beforehand.
PREPARED = ("expert_iteration.math_answers", "expert_iteration.ifeval")


def main() -> None:
    """Serve until the parent closes its end, or is gone."""
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    _die_with(parent)
    connection = Connection(descriptor)
    try:
        _serve(connection)
    except (EOFError, ConnectionResetError, BrokenPipeError):
        os._exit(0)  # without waiting for what a reward function has started


def _die_with(parent: int) -> None:
    """Have the kernel end this process with its parent, also in the middle of a function that never returns.

    Exactly: with the parent's thread that started it, which a pool keeps as long as it lives. Elsewhere than on Linux
    a worker ends when it next looks at its socket.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(0)


def _serve(connection: Connection) -> None:
    try:
        scorer = _load(connection.recv_bytes())
    except EOFError:
        raise
    except Exception:
        connection.send((REFUSED, traceback.format_exc()))
        return
    connection.send((READY, None))
    while True:
        problem, response = connection.recv()
        answer: tuple[str, Any]
        try:
            answer = SCORED, scorer.score([problem], [response])[0]
        except UserError as error:
            answer = REFUSED, str(error)
        connection.send(answer)


def _load(pickled: bytes) -> Scorer:
    unpickler = _Unpickler(io.BytesIO(pickled))
    scorer: Scorer = unpickler.load()
    for module in unpickler.modules.intersection(PREPARED):
        vars(importlib.import_module(module))["prepare"]()
    return scorer


class _Unpickler(pickle.Unpickler):
    """Notes the modules of the functions and classes that it meets, also inside of partial functions and sums."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.modules: set[str] = set()

    def find_class(self, module_name: str, global_name: str) -> Any:
        """As in `pickle`."""
        self.modules.add(module_name)
        return super().find_class(module_name, global_name)


if __name__ == "__main__":
    main()
