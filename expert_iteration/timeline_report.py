"""Where a run's time went: shares and overlap of the spans that `timeline.py` recorded, and what limited the run.

All of it is about a *window*: from the start of the first collection to the end of the trainer's last activity. What
comes before, start-up and the first evaluation, does not count. Of a run that was interrupted and went on, only what
came after it last did: nobody worked in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from expert_iteration.timeline import (
    ACTIVITIES,
    COLLECTOR,
    EVALUATING,
    GENERATING,
    LOADING_WEIGHTS,
    PUSHING_WEIGHTS,
    REFERENCE,
    SAVING,
    SESSION,
    TRAINER,
    TRAINING,
    WAITING_FOR_DATA,
)

IDLE = "idle"
NOTABLE = 0.1  # a share of the window that is worth a sentence
# What the trainer does beside training, and what would lessen it.
UPKEEP = {
    PUSHING_WEIGHTS: "fewer weight pushes (train.weight_update_frequency)",
    EVALUATING: "fewer or smaller evaluations (eval.frequency, eval.num_prompts)",
    SAVING: "fewer checkpoints (train.checkpoint_frequency)",
}
# What the trainer waits for while others do this.
AWAITED = {
    GENERATING: "generation",
    LOADING_WEIGHTS: "loading weights into the engine",
    REFERENCE: "scoring by the reference model",
}
AWAITED_ELSE = "what the collector does beside generation, such as rewards,"
# By train.sync.
OVERLAP_REMEDY = {
    True: "train.sync_iter=false or the asynchronous script would overlap them",
    False: "train.deterministic=false or a larger train.max_ahead would overlap them",
}


class Span(NamedTuple):
    """A line of a process's file; seconds since the epoch."""

    start: float
    end: float
    activity: str


@dataclass(frozen=True)
class Spans:
    """When something was done: disjoint spans in order, float64 [N], in seconds since the window's start."""

    starts: np.ndarray
    ends: np.ndarray

    @property
    def seconds(self) -> float:
        """How long it was done."""
        return float((self.ends - self.starts).sum())

    def seconds_before(self, times: np.ndarray) -> np.ndarray:
        """How long it was done before each of the times."""
        edges = np.stack([self.starts, self.ends], axis=1).ravel()
        lengths = self.ends - self.starts
        seconds = np.stack([np.cumsum(lengths) - lengths, np.cumsum(lengths)], axis=1).ravel()
        return np.interp(times, np.append(0.0, edges), np.append(0.0, seconds))

    def seconds_with(self, other: Spans) -> float:
        """How long both were done at once."""
        return float((self.seconds_before(other.ends) - self.seconds_before(other.starts)).sum())


@dataclass(frozen=True)
class Timeline:
    """The window's length in seconds, and when each activity was done in it."""

    seconds: float
    spans: Mapping[str, Spans]

    def share(self, activity: str) -> float:
        """The share of the window, 0 to 1."""
        return self.spans[activity].seconds / self.seconds

    def share_of_both(self, first: str, second: str) -> float:
        """The share of the window in which two processes did this and that at once, 0 to 1."""
        return self.spans[first].seconds_with(self.spans[second]) / self.seconds

    def shares(self, process: str) -> dict[str, float]:
        """The share of each activity of a process, and of the time in which it did none of them."""
        shares = {activity: self.share(activity) for activity in ACTIVITIES[process]}
        return {**shares, IDLE: 1.0 - sum(shares.values())}


def build_timeline(lines: Mapping[str, Iterable[Mapping[str, Any]]]) -> Timeline | None:
    """The timeline of a run; None when nothing was collected or the trainer did nothing after.

    Args:
        lines: of each process's file.

    Raises:
        KeyError: a line names an activity that is not in `ACTIVITIES`, nor the mark of a session.
    """
    written = {
        process: [Span(row["start"], row["end"], row["activity"]) for row in rows] for process, rows in lines.items()
    }
    since = max((span.start for span in written.get(TRAINER, ()) if span.activity == SESSION), default=-math.inf)
    recorded = {
        process: [span for span in spans if span.start >= since and span.activity != SESSION]
        for process, spans in written.items()
    }
    start = min((span.start for span in recorded.get(COLLECTOR, ())), default=math.inf)
    end = max((span.end for span in recorded.get(TRAINER, ())), default=-math.inf)
    if end <= start:
        return None
    found: dict[str, list[Span]] = {activity: [] for activities in ACTIVITIES.values() for activity in activities}
    for spans in recorded.values():
        for span in make_disjoint(spans):
            found[span.activity].append(span)
    return Timeline(end - start, {activity: _clip(spans, start, end) for activity, spans in found.items()})


def make_disjoint(spans: Iterable[Span]) -> Iterator[Span]:
    """A process's spans in order, each moment in one of them: where they overlap, the one that began last counts."""
    now = -math.inf
    running: list[Span] = []
    for span in [*sorted(spans, key=lambda span: (span.start, -span.end)), Span(math.inf, math.inf, "")]:
        while running and now < span.start:
            last = running[-1]
            until = min(last.end, span.start)
            if now < until:
                yield Span(now, until, last.activity)
                now = until
            if last.end <= now:
                running.pop()
        now = span.start
        running.append(span)


def describe_limit(timeline: Timeline, sync: bool) -> str:
    """What limits the run, in a sentence.

    1. The trainer pushed, evaluated or saved for longer than it trained, and than it waited for data: that limits.
    2. The trainer waited for data, and collection stood still while the trainer trained, both notably (`NOTABLE`) and
       both for longer than they went on at once: they take turns.
    3. Otherwise the longer of these two waits says it, if it is notable: what the trainer waited for, or training.
    4. Neither is notable: both kept pace.

    Whether the engine is idle does not count: it is, too, where the collector does not feed it fast enough.

    Args:
        timeline: of the run.
        sync: whether the run is synchronous (`train.sync`), for the remedy.
    """
    waited, training = timeline.share(WAITING_FOR_DATA), timeline.share(TRAINING)
    at_once = sum(timeline.share_of_both(activity, TRAINING) for activity in ACTIVITIES[COLLECTOR])
    stood_still = training - at_once
    upkeep = max(UPKEEP, key=timeline.share)
    if timeline.share(upkeep) > max(waited, training):
        return (
            f"The trainer spent {percent(timeline.share(upkeep))} of the time {upkeep}, longer than training or "
            f"waiting for data: {UPKEEP[upkeep]} would help most."
        )
    if min(waited, stood_still) >= max(NOTABLE, at_once):
        return (
            f"Generation and training take turns: the trainer waited for data {percent(waited)} of the time, and "
            f"generation for the trainer {percent(stood_still)} of it ({OVERLAP_REMEDY[sync]})."
        )
    if max(waited, stood_still) < NOTABLE:
        return f"Generation and training kept pace: neither waited for the other for {percent(NOTABLE)} of the time."
    if waited >= stood_still:
        return f"The trainer waited for data {percent(waited)} of the time: {_awaited(timeline)} limits this run."
    return f"Generation waited for the trainer {percent(stood_still)} of the time: training limits this run."


def percent(share: float) -> str:
    """A share of 0 to 1 as people read it; what is not nothing does not look like it."""
    return "<1%" if 0.0 < share < 0.005 else f"{share:.0%}"


def _awaited(timeline: Timeline) -> str:
    """What was done for the longest time while the trainer waited for data."""
    shares = {wording: timeline.share_of_both(activity, WAITING_FOR_DATA) for activity, wording in AWAITED.items()}
    shares[AWAITED_ELSE] = timeline.share(WAITING_FOR_DATA) - sum(shares.values())
    return max(shares, key=shares.__getitem__)


def _clip(spans: Sequence[Span], start: float, end: float) -> Spans:
    """Disjoint spans within the window; of one that lies outside remains a span of no length."""
    bounds = np.array([(span.start, span.end) for span in spans], dtype=np.float64).reshape(-1, 2)
    starts, ends = np.clip(bounds, start, end).T - start
    return Spans(starts, ends)
