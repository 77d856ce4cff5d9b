"""The prompts and responses of samples.jsonl as the report shows them: before and after, and all of them to browse."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

NUM_COMPARED = 5  # held-out prompts that are shown before and after
MAX_TEXT = 4_000_000  # characters that the page holds of all samples: more would take a phone long to load
LOWEST = -math.inf  # in place of a reward that is not known


class Response(NamedTuple):
    """One response, or several that are equal."""

    kind: str
    """"right", "wrong", "kept" or "": what it is marked as."""
    head: str
    """What is known of it, in words."""
    text: str


class Group(NamedTuple):
    """A prompt with its responses at one gradient step; in JSON a list in this order."""

    step: int
    split: str
    prompt: str
    answer: str
    mean: float | None
    """Reward; None where none is known."""
    num_kept: int
    num_responses: int
    responses: list[Response]


class Comparison(NamedTuple):
    """A held-out prompt at its first and at its last evaluation, which is None if there was only one."""

    before: Group
    after: Group | None


class Browsable(NamedTuple):
    """What the page holds of the samples, the newest first."""

    groups: list[Group]
    num_left_out: int
    """Groups that there was no room for."""


def read_groups(rows: Iterable[Mapping[str, Any]]) -> list[Group]:
    """The rows of samples.jsonl, in order."""
    return [_read_group(row) for row in rows]


def compare(groups: Sequence[Group]) -> list[Comparison]:
    """The first few held-out prompts, before and after."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        if group.split == "heldout" and (group.prompt in found or len(found) < NUM_COMPARED):
            found[group.prompt] = [*found.get(group.prompt, [])[:1], group]
    return [Comparison(some[0], some[1] if len(some) > 1 else None) for some in found.values()]


def browse(groups: Sequence[Group]) -> Browsable:
    """As many of the groups as there is room for: of all steps, or of every second, fourth, ... and the last."""
    steps = sorted({group.step for group in groups})
    stride = 1
    kept = list(groups)
    while stride < len(steps) and _size(kept) > MAX_TEXT:
        stride *= 2
        shown = {*steps[::stride], steps[-1]}
        kept = [group for group in groups if group.step in shown]
    newest_first = sorted(kept, key=lambda group: -group.step)
    while newest_first and _size(newest_first) > MAX_TEXT:
        newest_first = newest_first[: len(newest_first) // 2]
    return Browsable(newest_first, len(groups) - len(newest_first))


def _read_group(row: Mapping[str, Any]) -> Group:
    responses = row["responses"]
    rewards = [response["reward"] for response in responses if response["reward"] is not None]
    return Group(
        step=row["step"],
        split=row["split"],
        prompt=row["prompt"],
        answer=row.get("answer") or "",
        mean=statistics.fmean(rewards) if rewards else None,
        num_kept=sum(bool(response.get("kept")) for response in responses),
        num_responses=len(responses),
        responses=_merge(responses),
    )


def _merge(responses: Sequence[Mapping[str, Any]]) -> list[Response]:
    """Equal responses as one, those that were kept first and the higher reward first."""
    merged: dict[tuple[Any, ...], int] = {}
    for response in responses:
        identity = (bool(response.get("kept")), response["reward"], response.get("correct"), response["text"])
        merged[identity] = merged.get(identity, 0) + 1
    ordered = sorted(merged, key=lambda found: (not found[0], -(LOWEST if found[1] is None else found[1])))
    return [_describe(*identity, count=merged[identity]) for identity in ordered]


def _describe(kept: bool, reward: float | None, correct: bool | None, text: str, *, count: int) -> Response:
    parts = ["reward unknown" if reward is None else f"reward {reward:.3g}"]
    if correct is not None:
        parts.insert(0, "✓ correct" if correct else "✗ wrong")
    if kept:
        parts.insert(0, "★ kept")
    if count > 1:
        parts.append(f"{count} times")
    kind = "kept" if kept else "" if correct is None else "right" if correct else "wrong"
    return Response(kind, " · ".join(parts), text)


def _size(groups: Sequence[Group]) -> int:
    return sum(
        len(group.prompt) + len(group.answer) + sum(len(response.text) for response in group.responses)
        for group in groups
    )
