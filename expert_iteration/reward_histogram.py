"""Rewards of all held-out responses, at the first and at the last evaluation, as a histogram of the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from expert_iteration.charts import COLORS, MARKERS, open_canvas, to_svg

TITLE = "Reward of held-out responses"
NAMES = ("before", "after")
MAX_VALUES = 8  # so many different rewards have a bar each
NUM_BINS = 12  # for more


class Rewards(NamedTuple):
    """Of an evaluation: gradient steps before it, and the reward of each sampled response."""

    step: int
    values: list[float]


class Bars(NamedTuple):
    """An evaluation as the legend shows it."""

    label: str
    color: str
    marker: str
    num_responses: int


class Histogram(NamedTuple):
    """The picture and its legend."""

    title: str
    bars: list[Bars]
    svg: str


def first_and_last(lines: Iterable[Mapping[str, Any]], steps: Sequence[int]) -> list[Rewards]:
    """The rewards at the first and the last evaluation, or at the only one.

    Args:
        lines: of eval_rewards.jsonl; of several with the same step the last counts (`Metrics.rewards`).
        steps: at which metrics.jsonl has evaluations. Others were undone when the run went on from before them.
    """
    found = {line["step"]: [value for value in line["rewards"] if value is not None] for line in lines}
    known = sorted(step for step in set(steps) if found.get(step))
    return [Rewards(step, found[step]) for step in dict.fromkeys([*known[:1], *known[-1:]])]


def draw_histogram(evaluations: Sequence[Rewards]) -> Histogram | None:
    """Shares of responses by reward, a bar for each evaluation side by side; None without evaluations."""
    if not evaluations:
        return None
    labels, places = _bins([value for rewards in evaluations for value in rewards.values])
    width = 0.8 / len(evaluations)
    bars = []
    with open_canvas(height=2.6) as canvas:
        axes = canvas.subplots()
        for index, (step, values) in enumerate(evaluations):
            shares = np.bincount(np.searchsorted(places, values, side="right") - 1, minlength=len(labels)) / len(values)
            left = np.arange(len(labels)) + (index - (len(evaluations) - 1) / 2) * width
            axes.bar(left, shares, width, color=COLORS[index], gid=f"rewards-{index}")
            label = f"gradient step {step}" if len(evaluations) == 1 else f"{NAMES[index]} (gradient step {step})"
            bars.append(Bars(label, COLORS[index], MARKERS[1][1], len(values)))
        axes.set(xlabel="reward", ylabel="share of responses", ylim=(0.0, None))
        axes.grid(False, axis="x")
        every = -(-len(labels) // 6)
        axes.set_xticks(range(0, len(labels), every), labels[::every])
        return Histogram(TITLE, bars, to_svg(canvas))


def _bins(values: Sequence[float]) -> tuple[list[str], np.ndarray]:
    """What each bar is called, and the least reward that it counts: the rewards themselves, or equal ranges of them."""
    # Rewards travel through float32, so that 0.2 comes as 0.20000000298.
    different = np.unique(np.round(values, 5))
    if len(different) <= MAX_VALUES:
        # From halfway to the one before, which spares comparing floats for equality.
        starts = np.append(different[0] - 1.0, (different[1:] + different[:-1]) / 2)
        return [f"{value:.3g}" for value in different], starts
    edges = np.linspace(different[0], different[-1], NUM_BINS + 1)
    starts = edges[:-1].copy()
    starts[0] -= 1.0  # and all that rounding has put below it
    return [f"{value:.2f}" for value in (edges[:-1] + edges[1:]) / 2], starts
