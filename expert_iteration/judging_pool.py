"""Processes that score responses one by one, each within a time limit: what hangs is killed and replaced.

The library for this, pebble, starts its processes through `multiprocessing`, which first runs the parent's main module
again in each: Ray's worker, for a second. Here a process is a fresh interpreter with a socket, and a thread waits for
it, so that no process holds a lock that others need when it is killed.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from expert_iteration.errors import UserError
from expert_iteration.judging_worker import READY, REFUSED
from expert_iteration.scoring import Scored, Scorer

if TYPE_CHECKING:
    from expert_iteration.tasks import Problem

START_SECONDS = 300.0  # for what a user's module imports
LONGEST_SECONDS = 2e6  # poll(2) takes milliseconds in an int


class WorkerLostError(Exception):
    """A worker had to be killed, or has died; says why."""


class JudgingPool:
    """Scores responses in processes that start with the first of them.

    They end with `close`, when the pool is forgotten, and with this process, however it ends.

    Args:
        scorer: travels there.
        workers: processes.
        timeout: seconds for a response. The start of a process does not count.
    """

    def __init__(self, scorer: Scorer, workers: int, timeout: float) -> None:
        self._scorer = scorer
        self._timeout = timeout
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="judging")
        self._idle: SimpleQueue[_Worker | None] = SimpleQueue()
        for _ in range(workers):
            self._idle.put(None)  # one that is not started
        self._running: set[_Worker] = set()
        self._stop = weakref.finalize(self, _stop, self._threads, self._running)

    def score(self, problems: Sequence[Problem], responses: Sequence[str]) -> Iterator[Scored]:
        """Score each response alone, in order. Whoever does not want the rest any more closes the pool.

        Raises:
            UserError: from the functions, or they cannot be loaded in another process.
        """
        return self._threads.map(self._score_one, problems, responses)

    def _score_one(self, problem: Problem, response: str) -> Scored:
        worker = self._idle.get()  # there is one, as there are as many threads
        try:
            if worker is None:
                worker = self._start()
            return worker.score(problem, response, self._timeout)
        except WorkerLostError as error:
            self._forget(worker)
            worker = None
            return Scored(math.nan, None if self._scorer.correct is None else False, str(error))
        finally:
            self._idle.put(worker)

    def _start(self) -> _Worker:
        worker = _Worker()
        self._running.add(worker)
        try:
            worker.load(self._scorer)
        except (WorkerLostError, UserError):
            self._forget(worker)
            raise
        return worker

    def _forget(self, worker: _Worker | None) -> None:
        if worker is not None:
            self._running.discard(worker)
            worker.kill()

    def close(self) -> None:
        """End the processes; nothing can be scored any more."""
        self._stop()


def _stop(threads: ThreadPoolExecutor, running: set[_Worker]) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    while running:
        running.pop().kill()


class _Worker:
    """A process and the socket to it."""

    def __init__(self) -> None:
        here, there = socket.socketpair()
        self._connection = Connection(here.detach())
        path = os.pathsep.join(filter(None, sys.path))
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "expert_iteration.judging_worker", str(there.fileno()), str(os.getpid())],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                # Workers share the cores, unless the user has said otherwise.
                env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
                # Ctrl-C is not for it, and what a reward function starts there can be killed with it.
                start_new_session=True,
            )

    def load(self, scorer: Scorer) -> None:
        """Have it load the functions.

        Raises:
            UserError: it cannot.
            WorkerLostError: it has died.
        """
        with suppress(OSError):  # its end shows in what follows
            self._connection.send_bytes(pickle.dumps(scorer))
        kind, content = self._receive(START_SECONDS, f"The functions were not loaded within {START_SECONDS:g} s.")
        if kind != READY:
            raise UserError(f"The reward cannot be loaded in a process of its own (reward.workers):\n{content}")

    def score(self, problem: Problem, response: str, timeout: float) -> Scored:
        """Have it score a response.

        Raises:
            UserError: from the functions.
            WorkerLostError: it took too long, or has died.
        """
        with suppress(OSError):
            self._connection.send((problem, response))
        kind, content = self._receive(timeout, f"The response was not judged within {timeout:g} s (reward.timeout).")
        if kind == REFUSED:
            raise UserError(content)
        return content

    def _receive(self, timeout: float, complaint: str) -> tuple[str, Any]:
        try:
            if not self._connection.poll(min(timeout, LONGEST_SECONDS)):
                raise WorkerLostError(complaint)
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerLostError(f"The process with the reward function has ended{self._exit_code()}.") from error

    def _exit_code(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            return f" (exit code {self._process.wait(1.0)})"
        return ""

    def kill(self) -> None:
        """End it, and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
