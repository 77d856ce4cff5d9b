"""The processes of data-parallel training: rank 0 is the training process, every other rank a Ray actor.

Rank 0 leads. It has the others do what it does itself (`RankGroup.together`); between such calls they are idle, so that
no collective operation waits for data. Importing this module does not load torch: the ranks load what they need, at the
same time as the training process.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from expert_iteration import timeline
from expert_iteration.cluster import start_actor
from expert_iteration.errors import UserError
from expert_iteration.remote import ProcessDiedError, wait_aloud
from expert_iteration.run_directory import log_file, process_name
from expert_iteration.screen import redirect_output

if TYPE_CHECKING:
    from expert_iteration.learner import Learner

LOAD_SECONDS = 1800.0
COLLECTIVE_SECONDS = 600.0  # after which a rank that waits for the others gives up
GRACE_SECONDS = 5.0  # for the cause of a broken connection to become known
TAIL_LINES = 20

Load = Callable[[], Any]
Build = Callable[[Any, int, "RankGroup | None"], "Learner"]
Work = Callable[[Any], Any]


class Meeting(NamedTuple):
    """Where the ranks find each other, and how they will talk."""

    host: str
    port: int
    num_ranks: int
    backend: str


class TrainRank:
    """One of the ranks 1, 2, ... in a process of its own.

    Args:
        log_path: where this process's output goes.
    """

    def __init__(self, log_path: str) -> None:
        redirect_output(log_path)
        self._loaded: Any = None
        self._learner: Any = None

    def load(self, load: Load) -> None:
        """Load what takes long, before the ranks meet."""
        with _errors_in_log():
            self._loaded = load()

    def join(self, meeting: Meeting, rank: int) -> None:
        """Meet the others."""
        with _errors_in_log():
            _join(meeting, rank, store=None)

    def build(self, build: Build, rank: int) -> None:
        """Build this rank's learner from what was loaded; collective."""
        with _errors_in_log():
            self._learner = build(self._loaded, rank, None)

    def run(self, work: Work) -> Any:
        """`work(learner)`; whatever it raises is fatal for the group."""
        with _errors_in_log():
            return work(self._learner)


class RankGroup:
    """All ranks, as rank 0 holds them: starts the others, leads them, and ends with them.

    When a rank fails or its process dies, the others may wait for it for ever in a collective operation. So the first
    failure ends the group: rank 0 kills the other ranks, which breaks its own connections, and raises what happened.

    Args:
        load: what each of the other ranks loads while rank 0 does the same; its result goes to `build`.
        options: Ray's options for the ranks from 1 on.
        run_dir: their logs are logs/trainer-1.log and so on.
        backend: of torch.distributed: "gloo" on a CPU; "cpu:gloo,cuda:nccl" on accelerators.

    Attributes:
        size: number of ranks, with rank 0.
        actors: the other ranks' actors.
    """

    def __init__(self, load: Load, options: Sequence[dict[str, Any]], run_dir: Path, backend: str) -> None:
        self.size = len(options) + 1
        self._logs = {
            name: log_file(run_dir, name)
            for name in (process_name(timeline.TRAINER, rank, self.size) for rank in range(1, self.size))
        }
        self.actors = [
            start_actor(TrainRank, given, log) for given, log in zip(options, self._logs.values(), strict=True)
        ]
        self._loading = [actor.load.remote(load) for actor in self.actors]
        self._backend = backend

    def join(self, say: Callable[[str], None]) -> None:
        """Wait until all have loaded, and meet.

        Args:
            say: shows a line to the user.

        Raises:
            ProcessDiedError: a rank failed.
            UserError: a rank met a mistake in the configuration or on its host.
            TimeoutError: a rank takes longer than half an hour.
        """
        since = time.monotonic()
        with self._leading(self._loading):
            for name, loading in zip(self._logs, self._loading, strict=True):
                if not wait_aloud(loading, say, _describe_loading(name), since, LOAD_SECONDS):
                    raise TimeoutError(
                        f"{name} has not loaded its model after {LOAD_SECONDS:g} s ({self._logs[name]})."
                    )
        store, meeting = _open_meeting(self.size, self._backend)
        with self._leading([actor.join.remote(meeting, rank) for rank, actor in enumerate(self.actors, 1)]):
            _join(meeting, 0, store)

    def build(self, build: Build, loaded: Any) -> Learner:
        """Build a learner on every rank from what it has loaded.

        Args:
            build: (what was loaded, rank, this group on rank 0 and None on the others) -> the rank's learner; it may
                communicate.
            loaded: what rank 0 has loaded.

        Returns:
            Rank 0's.
        """
        with self._leading([actor.build.remote(build, rank) for rank, actor in enumerate(self.actors, 1)]):
            return build(loaded, 0, self)

    @contextmanager
    def together(self, work: Work | Sequence[Work]) -> Iterator[list[Any]]:
        """Have the other ranks work while the body does rank 0's part; on leaving, all are done.

        Args:
            work: called with the rank's learner; a sequence has one for each rank from 1 on.

        Yields:
            A list that holds what the calls returned, by rank, once the body was left.

        Raises:
            ProcessDiedError: a rank failed or its process died, also while the body waited for it; says which, why, and
                the last lines of its log. The group has ended.
            UserError: as `join`.
            TimeoutError: a rank was not done ten minutes after rank 0.
        """
        works = [work] * len(self.actors) if callable(work) else work
        calls = [actor.run.remote(own) for actor, own in zip(self.actors, works, strict=True)]
        results: list[Any] = []
        with self._leading(calls) as watch:
            yield results
        results.extend(watch.results[name] for name in self._logs)

    def leave(self) -> None:
        """End rank 0's part in the group; for the end of a run, when the actors have been stopped."""
        import torch.distributed as dist

        if (group := dist.group.WORLD) is not None:
            # The others are gone: NCCL would wait for them to take their leave.
            group.abort()
            dist.destroy_process_group()

    @contextmanager
    def _leading(self, calls: Sequence[Any]) -> Iterator[_Watch]:
        watch = _Watch(dict(zip(calls, self._logs, strict=True)), self._end)
        watch.start()
        try:
            yield watch
            watch.join(COLLECTIVE_SECONDS)
            if watch.is_alive():
                raise TimeoutError(f"{watch.late()} did not finish within {COLLECTIVE_SECONDS:g} s of rank 0.")
        except BaseException as error:
            # What rank 0 meets when another rank breaks off is not what is to be told.
            if _is_broken_connection(error):
                watch.join(2 * GRACE_SECONDS)
            self._end()
            if watch.failure is not None and _is_broken_connection(error):
                raise self._explain(*watch.failure) from watch.failure[1]
            raise
        if watch.failure is not None:
            self._end()
            raise self._explain(*watch.failure) from watch.failure[1]

    def _end(self) -> None:
        """Kill the other ranks, and get rank 0 out of whatever it waits for."""
        import ray
        import torch.distributed as dist

        for actor in self.actors:
            ray.kill(actor)
        # Gloo notices that its peers are gone; NCCL's kernels would wait on.
        if (group := dist.group.WORLD) is not None:
            group.abort()

    def _explain(self, name: str, error: BaseException) -> Exception:
        from ray.exceptions import RayActorError, RayTaskError

        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, UserError):
            return UserError(f"{name}: {cause}")
        log = self._logs[name]
        what = "has died" if isinstance(error, RayActorError) else f"has failed with {type(cause).__name__}"
        return ProcessDiedError(f"The process of {name} {what} ({log}): {cause}\n{_tail(log)}")


class _Watch(threading.Thread):
    """Waits for calls to the other ranks while rank 0 works, and acts at once when one fails.

    Args:
        calls: Ray calls, with the name of the process that each was sent to.
        end: called at a failure.

    Attributes:
        results: by name.
        failure: the name and the error of the rank that failed first, as far as can be told; None without one.
    """

    def __init__(self, calls: dict[Any, str], end: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._pending = calls
        self._end = end
        self.results: dict[str, Any] = {}
        self.failure: tuple[str, BaseException] | None = None

    def run(self) -> None:
        """Until all calls have returned, or one has failed and the reason is known."""
        import ray

        deadline: float | None = None
        while self._pending:
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            done, _ = ray.wait(list(self._pending), timeout=timeout)
            if not done:
                break
            name = self._pending.pop(done[0])
            try:
                self.results[name] = ray.get(done[0])
            except Exception as error:
                # A rank that lost its connection says only that another has gone; that one's error comes later.
                secondary = _is_broken_connection(error)
                if self.failure is None or not secondary:
                    self.failure = name, error
                if not secondary:
                    break
                deadline = deadline or time.monotonic() + GRACE_SECONDS
        if self.failure is not None:
            self._end()

    def late(self) -> str:
        """The names of the ranks that have not answered."""
        return ", ".join(self._pending.values())


def _open_meeting(num_ranks: int, backend: str) -> tuple[Any, Meeting]:
    """A store on this host, on a port that is free, through which the ranks find each other."""
    import ray
    from torch.distributed import TCPStore

    host = ray.util.get_node_ip_address()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    return store, Meeting(host, store.port, num_ranks, backend)


def _join(meeting: Meeting, rank: int, store: Any) -> None:
    """Become a rank; returns when all have."""
    from datetime import timedelta

    import torch.distributed as dist

    # On an error NCCL's watchdog would end this process, before rank 0 can say which rank failed; 2 only aborts.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
    store = store or dist.TCPStore(meeting.host, meeting.port)
    dist.init_process_group(
        meeting.backend,
        store=store,
        rank=rank,
        world_size=meeting.num_ranks,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )


def _is_broken_connection(error: BaseException) -> bool:
    """Whether an error says that a collective operation failed, which it does when another rank breaks off."""
    from torch.distributed import DistError

    text = str(error)
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))


def _describe_loading(name: str) -> Callable[[float], str]:
    return lambda waited: f"still waiting for {name} to load the model after {waited:.0f} s"


def _tail(path: str) -> str:
    """The last lines of a log, if it is on this host."""
    log = Path(path)
    if not log.exists():
        return "Its log is on the host where it ran."
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    return "The last lines of its log:\n" + "\n".join(f"  {line}" for line in lines)


@contextmanager
def _errors_in_log() -> Iterator[None]:
    """Ray sends an exception to the caller, who may not get to show it, and leaves no trace of it in the process."""
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise
