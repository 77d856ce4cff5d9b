"""The actors of a run beside the engine's, and what the training process holds of them.

Importing this module loads neither torch nor TorchRL: an actor loads what it needs in its own process, so all of them
start at once, before the training process has loaded its own.
"""

from __future__ import annotations

import atexit
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from expert_iteration import timeline
from expert_iteration.remote import Waiting, get_from
from expert_iteration.screen import redirect_output
from expert_iteration.selection_advice import WITHIN_GROUPS
from expert_iteration.turns import Turns

if TYPE_CHECKING:
    import torch

    from expert_iteration.packed_weights import ObjectStoreWeights, PackedWeights


@dataclass(frozen=True)
class CollectedBatch:
    """What the trainer hears of a batch whose kept responses now lie in the buffer."""

    dialog_turns: int  # collected so far, this batch included
    total_dialog_turns: int
    responses_kept: int  # of this batch
    samples: list[dict[str, Any]]  # a few groups, in the form of samples.jsonl
    notes: list[str] = field(default_factory=list)  # what the user is to be told
    is_resumed: bool = False  # whether a run before this one has begun to train on it

    @property
    def progress(self) -> float:
        """The fraction of the run that is collected, 0 to 1."""
        return self.dialog_turns / self.total_dialog_turns


class CollectorActor:
    """An `ExpertCollector` in a process of its own.

    Args:
        make_collector: builds it there; environments and selectors do not travel.
        log_path: where this process's output goes.
        timeline_path: where it notes what it does when; None: nowhere.
    """

    def __init__(self, make_collector: Callable[[], Any], log_path: str, timeline_path: str | None = None) -> None:
        redirect_output(log_path)
        timeline.record_to(timeline_path)
        self._collector = make_collector()
        atexit.register(self._collector.close)

    def collect(self) -> None:
        """See `ExpertCollector.collect`."""
        self._collector.collect()

    def write(self, replay_buffer: Any) -> CollectedBatch:
        """See `ExpertCollector.write`."""
        return self._collector.write(replay_buffer)

    def collect_and_write(self, replay_buffer: Any) -> CollectedBatch:
        """Both at once, for a trainer that does not mind rows that come while it trains."""
        self.collect()
        return self.write(replay_buffer)


class CollectorClient:
    """The synchronous trainer's view of the collector: iterating it yields each batch once its rows lie in the buffer.

    Args:
        actor: the `CollectorActor`.
        replay_buffer: a client of the buffer.
        num_batches: after which the iteration ends.
        overlap: gather the next batch while the caller works on the one just yielded (`train.sync_iter=false`).
        waiting: how to wait for a batch.
        turns: of engine and trainer on an accelerator that they share.
        advice: what to change where nothing is kept, as `selection_advice.advise` says.
    """

    def __init__(
        self,
        actor: Any,
        replay_buffer: Any,
        num_batches: int,
        *,
        overlap: bool,
        waiting: Waiting,
        turns: Turns,
        advice: str = WITHIN_GROUPS,
    ) -> None:
        self._actor = actor
        self._replay_buffer = replay_buffer
        self._num_batches = num_batches
        self._overlap = overlap
        self._waiting = waiting
        self._turns = turns
        self._advice = advice
        self._num_written = 0
        self._current: CollectedBatch | None = None  # that the caller works on
        self._collecting: Any = None  # the call under way

    def __iter__(self) -> Iterator[CollectedBatch]:
        if self._current is not None:
            self._overlap_next()
            yield replace(self._current, is_resumed=True)
            self._current = None
        since, num_empty = time.monotonic(), 0
        while self._num_written < self._num_batches:
            if self._collecting is None:
                self._turns.to_engine()
                self._collecting = self._actor.collect.remote()
            with _waiting_for_data():
                self._waiting.wait(self._collecting, since, kept_nothing(num_empty, self._advice))
            get_from("collector", self._collecting)
            batch = get_from("collector", self._actor.write.remote(self._replay_buffer))
            for note in batch.notes:
                self._waiting.say(note)
            self._collecting, self._current = None, batch
            self._num_written += 1
            self._overlap_next()
            yield batch
            self._current = None
            num_empty = 0 if batch.responses_kept else num_empty + 1
            if batch.responses_kept:
                since = time.monotonic()

    def _overlap_next(self) -> None:
        if self._overlap and self._num_written < self._num_batches:
            self._collecting = self._actor.collect.remote()

    def state_dict(self) -> dict[str, Any]:
        """The batches that were written, and the one that is worked on; what is under way is collected again."""
        return {"num_written": self._num_written, "current": None if self._current is None else asdict(self._current)}

    def load_state_dict(self, state: Mapping[str, Any], writer_state: Mapping[str, Any] | None) -> None:
        """Go on from `state_dict`: the iteration begins with the batch that was worked on, as `is_resumed`.

        Args:
            state: from there.
            writer_state: of the collector, which goes on by itself where this does.
        """
        self._num_written = state["num_written"]
        self._current = None if state["current"] is None else CollectedBatch(**state["current"])


class BackgroundCollector:
    """The asynchronous trainer's view of the collector, which gathers and writes batch after batch meanwhile.

    Args:
        actor: the `CollectorActor`.
        replay_buffer: a client of the buffer.
        num_batches: after which collection ends.
        batches_ahead: so many batches may be collected beyond those that were worked off; None: any number.
        waiting: how to wait for a batch.
    """

    # Calls that lie at the actor: one at work, and one so that it need not idle until the trainer looks again. Not all
    # at once, because an actor that is to end first works off the calls it has.
    QUEUED = 2

    def __init__(
        self, actor: Any, replay_buffer: Any, num_batches: int, *, batches_ahead: int | None, waiting: Waiting
    ) -> None:
        self._actor = actor
        self._replay_buffer = replay_buffer
        self._num_batches = num_batches
        self._batches_ahead = num_batches if batches_ahead is None else batches_ahead
        self._waiting = waiting
        self._calls: deque[Any] = deque()
        self._num_called = 0
        self._unseen: list[CollectedBatch] = []  # of an earlier run, in the buffer before the trainer heard of them
        self.latest: CollectedBatch | None = None

    @property
    def finished(self) -> bool:
        """Whether every batch of the run has arrived."""
        return self._num_called == self._num_batches and not self._calls and not self._unseen

    def start(self) -> None:
        """Begin to collect."""
        self.go_on(worked_off=0)

    def arrived(self) -> list[CollectedBatch]:
        """The batches whose rows came to lie in the buffer since the last call. Does not wait."""
        import ray

        batches, self._unseen = self._unseen, []
        if batches:
            self.latest = batches[-1]
        while self._calls and ray.wait([self._calls[0]], timeout=0)[0]:
            self.latest = get_from("collector", self._calls.popleft())
            batches.append(self.latest)
        for note in [note for batch in batches for note in batch.notes]:
            self.say(note)
        return batches

    def go_on(self, worked_off: int) -> None:
        """Allow collection to go on, as far ahead of what was worked off as it may.

        Args:
            worked_off: batches of which training has made all that it owes them.
        """
        allowed = min(self._num_batches, worked_off + self._batches_ahead)
        while self._num_called < allowed and len(self._calls) < self.QUEUED:
            self._calls.append(self._actor.collect_and_write.remote(self._replay_buffer))
            self._num_called += 1

    def wait(self, since: float, why: str | None = None) -> None:
        """Return when another batch has arrived, which is on its way; see `Waiting.wait`."""
        assert self._calls, "nothing was allowed to be collected that could arrive"
        with _waiting_for_data():
            self._waiting.wait(self._calls[0], since, why)

    def say(self, text: str) -> None:
        """Show a line to the user."""
        self._waiting.say(text)

    def state_dict(self) -> dict[str, Any]:
        """The batches that the trainer has heard of, in number, and the last of them."""
        return {
            "num_seen": self._num_called - len(self._calls) - len(self._unseen),
            "latest": None if self.latest is None else asdict(self.latest),
        }

    def load_state_dict(self, state: Mapping[str, Any], writer_state: Mapping[str, Any] | None) -> None:
        """Go on from `state_dict`.

        Args:
            state: from there.
            writer_state: of the collector, from the buffer that was saved with it: batches that lie in it and that the
                trainer had not heard of yet arrive first. None: nothing had been written.
        """
        self.latest = None if state["latest"] is None else CollectedBatch(**state["latest"])
        if writer_state is not None:
            self._num_called = writer_state["num_written"]
            num_unseen = self._num_called - state["num_seen"]
            last_written = [CollectedBatch(**batch) for batch in writer_state["last_written"]]
            self._unseen = last_written[len(last_written) - num_unseen :]


def kept_nothing(num_batches: int, advice: str) -> str | None:
    """Why there is nothing to train on where so many batches came in vain; None for 0."""
    if not num_batches:
        return None
    return (
        f"{num_batches} batches came meanwhile and none of their responses was kept (selection/* in metrics.jsonl): "
        f"{advice}"
    )


@contextmanager
def _waiting_for_data() -> Iterator[None]:
    from torchrl._utils import timeit

    with timeit("wait_for_data"), timeline.span(timeline.WAITING_FOR_DATA):
        yield


class ReferenceActor:
    """The reference in a process of its own.

    Args:
        load_model: loads the start model there.
        micro_batch_size: rows scored at once.
        log_path: where this process's output goes.
    """

    def __init__(self, load_model: Callable[[], Any], *, micro_batch_size: int, log_path: str) -> None:
        redirect_output(log_path)
        from expert_iteration.scorer import ReferenceScorer

        # Any id does for padding, which is masked.
        self._scorer = ReferenceScorer(load_model(), pad_token_id=0, micro_batch_size=micro_batch_size)

    def score(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """See `ReferenceScorer.score`."""
        return self._scorer.score(rows)

    def load(self, weights: ObjectStoreWeights) -> None:
        """See `ReferenceScorer.load`."""
        self._scorer.load(weights.get())


class ReferenceClient:
    """A picklable handle on the reference's actors, which share the work.

    Args:
        actors: `ReferenceActor`s by the names of their processes.
    """

    def __init__(self, actors: dict[str, Any]) -> None:
        self.actors = actors

    def score(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """See `ReferenceScorer.score`."""
        # Dealt out by length, so that every replica gets about as many tokens, and rows of like length stay together.
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        shares = [order[number :: len(self.actors)] for number in range(len(self.actors))]
        calls = {
            name: (share, actor.score.remote([rows[index] for index in share]))
            for (name, actor), share in zip(self.actors.items(), shares, strict=True)
            if share
        }
        scored: dict[int, torch.Tensor] = {}
        for name, (share, call) in calls.items():
            scored.update(zip(share, get_from(name, call), strict=True))
        return [scored[index] for index in range(len(rows))]

    def load(self, weights: PackedWeights, timeout: float) -> None:
        """Have every replica score with these weights from now on; each loads them between two scorings.

        Raises:
            TimeoutError: one has not loaded them within `timeout` seconds.
        """
        from ray.exceptions import GetTimeoutError

        from expert_iteration.packed_weights import ObjectStoreWeights

        since, stored = time.monotonic(), ObjectStoreWeights.put(weights)
        calls = {name: actor.load.remote(stored) for name, actor in self.actors.items()}
        for name, call in calls.items():
            try:
                get_from(name, call, max(0.0, since + timeout - time.monotonic()))
            except GetTimeoutError as error:
                raise TimeoutError(
                    f"{name} has not loaded the policy's weights within weight_update.timeout={timeout:g} s "
                    f"(logs/{name}.log): raise weight_update.timeout if it is only slow."
                ) from error
