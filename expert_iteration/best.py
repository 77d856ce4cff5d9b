"""Which of a run's evaluations is the best, and for how many in a row none was better.

Imports nothing heavy: the summary asks too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def merit(figures: Mapping[str, float], metric: str) -> float:
    """What evaluations are compared by, higher being better; without a finite figure one is worse than any other.

    Args:
        figures: of an evaluation.
        metric: the name of one of them (`eval.metric`).
    """
    value = figures.get(metric, math.nan)
    return value if math.isfinite(value) else -math.inf


class Best:
    """The best evaluation so far: the first of those that no other beats.

    Args:
        metric: the figure that decides (`eval.metric`).
        patience: so many evaluations in a row that are no better than the best should end the run; None: none do.

    Attributes:
        figures: of the best evaluation; {} before the first.
        step: gradient steps before it.
        evaluations_since: how many came after it.
    """

    def __init__(self, metric: str, patience: int | None) -> None:
        self.metric = metric
        self.patience = patience
        self.figures: dict[str, float] = {}
        self.step = 0
        self.evaluations_since = 0

    @property
    def has_stalled(self) -> bool:
        """Whether as many evaluations as there is patience for came after the best."""
        return self.patience is not None and self.evaluations_since >= self.patience

    def compare(self, figures: Mapping[str, float], step: int) -> bool:
        """Take the figures of the newest evaluation, after so many gradient steps; returns whether it is the best."""
        if self.figures and merit(figures, self.metric) <= merit(self.figures, self.metric):
            self.evaluations_since += 1
            return False
        self.figures, self.step, self.evaluations_since = dict(figures), step, 0
        return True

    def describe_stall(self) -> str:
        """Why a run ends that has stalled, with the numbers."""
        return (
            f"{self.metric} has not risen above {self.figures[self.metric]:.3f} (after {self.step} gradient steps) in "
            f"{self.evaluations_since} evaluations (train.stop_patience): the run ends"
        )

    def state_dict(self) -> dict[str, Any]:
        """As plain numbers."""
        return {"figures": dict(self.figures), "step": self.step, "evaluations_since": self.evaluations_since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.figures = dict(state["figures"])
        self.step, self.evaluations_since = state["step"], state["evaluations_since"]
