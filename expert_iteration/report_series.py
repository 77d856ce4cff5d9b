"""The numbers of metrics.jsonl as the report needs them: by name, in order, some of them derived, and smoothed."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from expert_iteration.run_directory import BATCH_METRIC
from expert_iteration.selection_stats import PASS_RATE_BINS

# Derived, a number for each batch: the growth of one counter over that of another, both since the start of the run.
ACCEPTED, GROUPS_KEPT, GROUPS_EQUAL = "accepted", "groups_kept", "groups_all_equal"
# Groups by the share of their responses that are right: what each bin is called, by the end of its metric's name.
PASS_RATE_LABELS = ("none right", "up to 25 %", "25 to 50 %", "50 to 75 %", "75 to < 100 %", "all right")
PASS_RATES = dict(zip(PASS_RATE_BINS, PASS_RATE_LABELS, strict=True))
GROWTHS = {
    **{f"pass_rate/{name}": (f"selection/groups_by_pass_rate/{name}", "selection/groups_seen") for name in PASS_RATES},
    ACCEPTED: ("selection/responses_kept", "selection/responses_seen"),
    GROUPS_KEPT: ("selection/groups_kept", "selection/groups_seen"),
    GROUPS_EQUAL: ("selection/groups_all_equal", "selection/groups_seen"),
}
# Derived, likewise: the quotient of two numbers of the same batch.
COLLECT_SPEED = "collect_tokens_per_second"
QUOTIENTS = {COLLECT_SPEED: ("collector/response_tokens", "collector/time/collect")}
DERIVED = GROWTHS | QUOTIENTS

SMOOTHING = 20  # a curve is smoothed over a twentieth of it to either side
WINDOW = 3  # numbers judged together where there are few
NUM_WINDOWS = 20  # where there are many


class Point(NamedTuple):
    """A number of metrics.jsonl and the gradient step of its line."""

    step: int
    value: float


Series = Mapping[str, Sequence[Point]]


def collect_series(
    lines: Iterable[Mapping[str, Any]], names: Collection[str], prefix: str | None = None
) -> dict[str, list[Point]]:
    """The numbers of these names, in the order of the lines of metrics.jsonl; nulls are left out.

    Args:
        lines: of metrics.jsonl.
        names: of metrics, and of `DERIVED`.
        prefix: of names of further metrics.

    Returns:
        The points by name, without names that have none.
    """
    sources = {source for name in names for source in DERIVED.get(name, (name,))}
    found: dict[str, list[Point]] = {}
    by_batch: dict[str, dict[float, Point]] = {}  # of lines that belong to a batch
    for line in lines:
        batch = line.get(BATCH_METRIC)
        further = () if prefix is None else (name for name in line if name.startswith(prefix))
        for name in (sources & line.keys()).union(further):
            if line[name] is not None:
                point = Point(line["step"], line[name])
                found.setdefault(name, []).append(point)
                if batch is not None:
                    by_batch.setdefault(name, {})[batch] = point
    for name in set(names) & GROWTHS.keys():
        above, below = GROWTHS[name]
        found[name] = _growth(found.get(above, []), found.get(below, []))
    for name in set(names) & QUOTIENTS.keys():
        above, below = QUOTIENTS[name]
        found[name] = _quotient(by_batch.get(above, {}), by_batch.get(below, {}))
    return {
        name: points
        for name, points in found.items()
        if points and (name in names or (prefix is not None and name.startswith(prefix)))
    }


def running_mean(values: Sequence[float]) -> tuple[list[float], int]:
    """Each number's mean with its neighbours, a `SMOOTHING`-th of all to either side.

    Near the start fewer, but as many on both sides, so that a curve begins where the run did; near the end those there
    are, so that its end does not hang on the last number.

    Returns:
        As many means, and the width of the window: 1 where there are too few numbers to smooth.
    """
    reach = len(values) // SMOOTHING
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    places = np.arange(len(values))
    starts, ends = np.maximum(places - reach, 0), np.minimum(places + np.minimum(places, reach) + 1, len(values))
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist(), 2 * reach + 1


def in_windows(points: Sequence[Point]) -> list[Point]:
    """Medians of neighbouring numbers, each at the step of its first: one odd number among them does not count.

    The windows do not overlap; a rest too small for a window of its own joins the last.
    """
    size = max(WINDOW, len(points) // NUM_WINDOWS)
    starts = list(range(0, max(1, len(points) - size + 1), size)) if points else []
    return [
        Point(points[start].step, statistics.median(point.value for point in points[start:end]))
        for start, end in pairwise([*starts, len(points)])
    ]


def thin(values: Sequence[float], size: int) -> list[float]:
    """The means of each `size` neighbours; the last may have fewer."""
    return [statistics.fmean(values[start : start + size]) for start in range(0, len(values), size)]


def _growth(above: Sequence[Point], below: Sequence[Point]) -> list[Point]:
    before = Point(0, 0.0)
    points = []
    for (last_above, one), (last_below, other) in zip(
        pairwise([before, *above]), pairwise([before, *below]), strict=False
    ):
        if other.value > last_below.value:
            points.append(Point(one.step, (one.value - last_above.value) / (other.value - last_below.value)))
    return points


def _quotient(above: Mapping[float, Point], below: Mapping[float, Point]) -> list[Point]:
    """Of the batches that have both: either record may have been lost on its way."""
    both = [(one, below[batch]) for batch, one in above.items() if batch in below]
    return [Point(one.step, one.value / other.value) for one, other in both if other.value > 0]
