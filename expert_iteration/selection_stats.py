"""`SelectionStats`: what is counted of the groups that selection has judged."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

COUNTERS = (
    "groups_seen",
    "groups_kept",
    "groups_all_equal",
    "responses_seen",
    "responses_kept",
    "nonfinite_rewards",
)
# Bins of a group's pass rate, in percent: none right; up to a quarter, a half, three quarters, less than all; all.
PASS_RATE_BINS = ("000", "001_025", "026_050", "051_075", "076_099", "100")
ABOUT_CORRECT = ("groups_all_right", "groups_all_wrong", *(f"groups_by_pass_rate/{name}" for name in PASS_RATE_BINS))
ABOUT_TEXT = ("duplicates_dropped",)


class JudgedGroup(NamedTuple):
    """What is counted of one group."""

    num_responses: int
    num_finite: int
    """Responses with a finite reward."""
    num_in_running: int
    """Of these, without duplicates that were dropped."""
    num_kept: int
    is_all_equal: bool
    """Whether those in the running have one and the same reward."""
    num_right: int | None
    """Of all responses; None where that is not known."""
    num_distinct: int | None
    """Distinct texts of all responses, after normalization; None where texts are not looked at."""


class SelectionStats:
    """Counts groups and responses since the start, and sums up the last batch.

    Args:
        knows_correct: whether groups say how many of their responses are right.
        knows_text: whether they say how many are distinct.
    """

    def __init__(self, *, knows_correct: bool, knows_text: bool) -> None:
        self._counters = (
            *COUNTERS,
            *(ABOUT_CORRECT if knows_correct else ()),
            *(ABOUT_TEXT if knows_text else ()),
        )
        self._counts: Counter[str] = Counter()
        self._batch: dict[str, float] = {}

    @property
    def groups_seen(self) -> int:
        """Groups judged since the start."""
        return self._counts["groups_seen"]

    def add(self, groups: Sequence[JudgedGroup], percentile: float | None) -> None:
        """Count the groups of a batch, of which there is at least one; a percentile that they had to reach is noted."""
        for group in groups:
            self._counts.update(dict(_count(group)))
        rates = [group.num_right / group.num_responses for group in groups if group.num_right is not None]
        distinct = [group.num_distinct for group in groups if group.num_distinct is not None]
        self._batch = {
            **({"batch_pass_rate": statistics.fmean(rates)} if rates else {}),
            **({"batch_distinct_responses": statistics.fmean(distinct)} if distinct else {}),
            **({} if percentile is None else {"batch_percentile": percentile}),
        }

    def as_dict(self) -> dict[str, float]:
        """Counts, rates over all groups (0 before the first), and means over the groups of the last batch."""
        counts = {name: self._counts[name] for name in self._counters}
        return {
            **counts,
            "acceptance_rate": counts["responses_kept"] / max(1, counts["responses_seen"]),
            "all_equal_rate": counts["groups_all_equal"] / max(1, counts["groups_seen"]),
            **self._batch,
        }

    def state_dict(self) -> dict[str, Any]:
        """In plain types."""
        return {"counts": dict(self._counts), "batch": dict(self._batch)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self._counts, self._batch = Counter(state["counts"]), dict(state["batch"])


def pass_rate_bin(num_right: int, num_responses: int) -> str:
    """The one of `PASS_RATE_BINS` that a group is in."""
    if num_right in (0, num_responses):
        return PASS_RATE_BINS[0 if num_right == 0 else -1]
    return PASS_RATE_BINS[-(-4 * num_right // num_responses)]


def _count(group: JudgedGroup) -> Iterator[tuple[str, int]]:
    yield "groups_seen", 1
    yield "groups_kept", int(group.num_kept > 0)
    yield "groups_all_equal", int(group.is_all_equal)
    yield "responses_seen", group.num_responses
    yield "responses_kept", group.num_kept
    yield "nonfinite_rewards", group.num_responses - group.num_finite
    yield "duplicates_dropped", group.num_finite - group.num_in_running
    if group.num_right is not None:
        yield "groups_all_right", int(group.num_right == group.num_responses)
        yield "groups_all_wrong", int(group.num_right == 0)
        yield f"groups_by_pass_rate/{pass_rate_bin(group.num_right, group.num_responses)}", 1
