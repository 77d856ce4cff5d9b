"""`summary.json`: what a run did and what it learned, for programs that read the run directory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from expert_iteration.best import merit
from expert_iteration.config import Config
from expert_iteration.run_directory import SUMMARY_FILE, write_whole


class Trained(Protocol):
    """What the summary asks of a learner."""

    gradient_steps: int
    optimizer_steps: int
    bad_steps: int
    tokens_trained: int
    seconds: float
    first_optimizer_step_time: float | None


class Pushed(Protocol):
    """What the summary asks of a weight updater."""

    pushes: int
    policy_version: int


class Summary:
    """Follows a run's metrics, as one of its loggers, and sums them up at the end.

    Args:
        cfg: the configuration.
    """

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg
        self._latest: dict[str, float] = {}
        self._collected_tokens = self._collecting_seconds = self._max_probe_difference = 0.0
        self._evaluations: list[dict[str, float]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep what the summary needs."""
        self._latest |= metrics
        self._collected_tokens += metrics.get("collector/response_tokens", 0.0)
        self._collecting_seconds += metrics.get("collector/time/collect", 0.0)
        self._max_probe_difference = max(self._max_probe_difference, metrics.get("weights/probe_diff", 0.0))
        if "eval/pass@1" in metrics:
            self._evaluations.append(
                {name.removeprefix("eval/"): value for name, value in metrics.items() if name.startswith("eval/")}
            )

    def go_on_from(self, lines: Iterable[Mapping[str, float | None]]) -> None:
        """Know what an earlier run has logged, from its metrics.jsonl."""
        for line in lines:
            numbers = {name: value for name, value in line.items() if value is not None}
            self.log_metrics(numbers, int(numbers["step"]))

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int, split: str) -> None:
        """Samples are not summed up."""

    def close(self) -> None:
        """Nothing is held."""

    def to_dict(
        self, error: BaseException | None, learner: Trained, weight_updater: Pushed, started: float
    ) -> dict[str, Any]:
        """The content of summary.json.

        Args:
            error: what ended the run early, or None.
            learner: for its counters and its speed.
            weight_updater: for its counters.
            started: when the user's process started, in seconds since the epoch.
        """
        first_step = learner.first_optimizer_step_time
        return {
            **_outcome(self._cfg, error),
            "gradient_steps": learner.gradient_steps,
            "optimizer_steps": learner.optimizer_steps,
            "bad_steps": learner.bad_steps,
            **{
                name: int(self._latest.get(metric, 0))
                for name, metric in {
                    "dialog_turns": "collector/dialog_turns",
                    "groups_seen": "selection/groups_seen",
                    "groups_kept": "selection/groups_kept",
                    "responses_kept": "selection/responses_kept",
                    "empty_batches": "selection/empty_batches",
                    "responses_too_old": "buffer/dropped_too_old",
                }.items()
            },
            "weight_pushes": weight_updater.pushes,
            "policy_version": weight_updater.policy_version,
            "seconds": time.time() - started,
            "seconds_to_first_optimizer_step": None if first_step is None else first_step - started,
            "collect_tokens_per_second": _rate(self._collected_tokens, self._collecting_seconds),
            "train_tokens_per_second": _rate(learner.tokens_trained, learner.seconds),
            "max_probe_logprob_diff": self._max_probe_difference,
            "eval": self._evaluation(),
        }

    def _evaluation(self) -> dict[str, dict[str, float]]:
        """The first, the last and the best by `eval.metric` (of equals the first)."""
        if not self._evaluations:
            return {}
        best = max(self._evaluations, key=partial(merit, metric=self._cfg.eval.metric))
        return {"before": self._evaluations[0], "after": self._evaluations[-1], "best": best}


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`; JSON has no word for numbers that are not finite, which become null."""
    from expert_iteration.metrics import plain

    write_whole(run_dir / SUMMARY_FILE, json.dumps(plain(summary), indent=2))


def failure_summary(cfg: Config, error: BaseException, started: float) -> dict[str, Any]:
    """What can be said of a run whose training process could not write its own summary."""
    return {**_outcome(cfg, error), "seconds": time.time() - started, "eval": {}}


def _outcome(cfg: Config, error: BaseException | None) -> dict[str, Any]:
    from ray.exceptions import RayTaskError

    # An error of another process comes wrapped, and its text is then that process's traceback; logs/ has it.
    while isinstance(error, RayTaskError):
        error = error.cause
    status = "completed" if error is None else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    return {
        "status": status,
        "error": f"{type(error).__name__}: {error}" if status == "failed" else None,
        "mode": "sync" if cfg.train.sync else "async",
        "seed": cfg.seed,
    }


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds else 0.0
