"""The figures of evaluations side by side, as the terminal, the report and the model card show them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Figures = Mapping[str, float | None]

LABELS = {
    "pass@1": "pass@1 (sampled)",
    "greedy": "greedy",
    "reward": "reward",
    "pass@k": "pass@{k}",
    "format_rate": "well-formed",
    "truncation_rate": "truncated",
    "response_length": "tokens a response",
    "prompt_level_strict_acc": "prompt-level strict",
    "prompt_level_loose_acc": "prompt-level loose",
    "inst_level_strict_acc": "instruction-level strict",
    "inst_level_loose_acc": "instruction-level loose",
}


def score_table(evaluations: Mapping[str, Figures | None]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Columns, and rows of a label and a text for each column; neither of nothing.

    Args:
        evaluations: as in summary.json, {"before", "after", "best"}, of which some may be missing. What was evaluated
            only once is one column.
    """
    known = {name: figures for name, figures in evaluations.items() if figures}
    if not known:
        return [], []
    columns = ["before", "after"] + (["best"] if "best" in known else [])
    if len(known) == len(columns) and all(figures == known["before"] for figures in known.values()):
        known, columns = {"score": known["before"]}, ["score"]
    k = figure_of(evaluations, "k")
    rows = [
        (label.format(k="k" if k is None else f"{k:.0f}"), [cell(known.get(column) or {}, name) for column in columns])
        for name, label in LABELS.items()
        if any(name in figures for figures in known.values())
    ]
    return columns, rows


def figure_of(evaluations: Mapping[str, Figures | None], name: str) -> Any:
    """A figure that is the same in all evaluations, such as `num_prompts`; None where it is not known."""
    return next((figures.get(name) for figures in evaluations.values() if figures), None)


def cell(figures: Figures, name: str) -> str:
    """One figure as text, pass@1 with its standard error."""
    error = figures.get(f"{name}_stderr")
    return fixed(figures.get(name)) + ("" if is_unknown(error) else f" ± {fixed(error)}")


def fixed(value: float | None) -> str:
    """A figure of a table: three decimals, so that columns align; "-" if not known."""
    return "-" if is_unknown(value) else f"{value:,.3f}"


def is_unknown(value: float | None) -> bool:
    """Whether there is no number: JSON's null, or what becomes one there."""
    return value is None or math.isnan(value)
