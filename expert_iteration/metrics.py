"""The run's one sink for numbers and samples: `metrics.jsonl` and `samples.jsonl`, always, and W&B where wanted.

Lives in the training process. Records of the collector's process come in through a queue (`Metrics.drain`), so that one
process writes the files and one W&B run shows everything. Names are `<scope>/<name>`; steps are gradient steps.
"""

from __future__ import annotations

import json
import math
import os
import queue
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torchrl._utils import timeit

from expert_iteration.run_directory import EVAL_REWARDS_FILE, METRICS_FILE, SAMPLES_FILE, is_of_batches

if TYPE_CHECKING:
    from expert_iteration.learner import StepResult

UNSCOPED = ("learning_rate", "optim_step")  # the published scripts' names, kept without a scope
# Where the run stands, not what a step measured: of several gradient steps the last one's counts.
CUMULATIVE = (
    "learning_rate",
    "optim_step",
    "train/kl_to_ref_coeff",
    "train/data_read_count",
    "train/bad_steps",
    "buffer/write_count",
    "buffer/dropped_too_old",
)
MAXIMA = ("train/max_policy_age",)


class RunLogger(Protocol):
    """What `Metrics` asks of a logger beside its own files."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Show numbers at a gradient step; steps may repeat."""
        ...

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int, split: str) -> None:
        """Show prompts with their responses, in the form of samples.jsonl."""
        ...

    def close(self) -> None:
        """End the record; nothing is logged after."""
        ...


class Metrics:
    """Writes every number and sample of a run, at once, so that an interrupted run has all of them.

    Args:
        run_dir: where metrics.jsonl and samples.jsonl are written, or continued.
        loggers: shown everything too (`make_loggers`).
        log_queue: a Ray queue of records (metrics by full name) of other processes; None: there are none.
        logging_frequency: gradient steps per line of training metrics, at least 1.
        clock: seconds since the run's start; None: since now.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        loggers: Sequence[RunLogger],
        log_queue: Any = None,
        logging_frequency: int,
        clock: Callable[[], float] | None = None,
    ) -> None:
        # Buffered by line: what is logged is on disk when the call returns.
        self._paths = [run_dir / name for name in (METRICS_FILE, SAMPLES_FILE, EVAL_REWARDS_FILE)]
        self._metrics_file = (run_dir / METRICS_FILE).open("a", buffering=1, encoding="utf-8")
        self._samples_file = (run_dir / SAMPLES_FILE).open("a", buffering=1, encoding="utf-8")
        self._rewards_path = run_dir / EVAL_REWARDS_FILE
        self._loggers = list(loggers)
        self._queue = queue.SimpleQueue[Mapping[str, float]]() if log_queue is None else log_queue
        self._logging_frequency = logging_frequency
        self._clock = stopwatch() if clock is None else clock
        self._window: list[dict[str, float]] = []
        self._window_step = 0
        self._received: list[Mapping[str, float]] = []  # out of the queue, and not logged yet

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one line, of nothing none; a number that is not finite becomes null, as JSON has no other word."""
        if not metrics:
            return
        line = {"step": step, "time": round(self._clock(), 3), **metrics}
        self._metrics_file.write(to_json(line) + "\n")
        for logger in self._loggers:
            logger.log_metrics(metrics, step)

    def training(self, result: StepResult, **extra: float) -> None:
        """Take the metrics of one gradient step; their mean is written every `logging_frequency` of them.

        Args:
            result: of `Learner.step`; names get the scope `train/`, except learning_rate and optim_step.
            extra: more of the same step, named likewise; a name with a slash stays as it is.
        """
        self._window.append({_scoped(name): value for name, value in {**result, **extra}.items()})
        self._window_step = result.step
        if len(self._window) == self._logging_frequency:
            self.flush()

    def flush(self) -> None:
        """Write the gradient steps not yet written; nothing when there are none."""
        if self._window:
            self.log(summarize(self._window), self._window_step)
            self._window = []

    def drain(self, step: int) -> None:
        """Log what is due beside training: every record that waits in the queue, a line each, and the timings."""
        self._receive()
        received, self._received = self._received, []
        for record in received:
            self.log(record, step)
        if seconds := timings():
            self.log(seconds, step)

    def _receive(self) -> None:
        while True:
            try:
                self._received.append(self._queue.get_nowait())
            except queue.Empty:  # Ray's own Empty is one of these
                return

    def state_dict(self) -> dict[str, Any]:
        """Where the files end now, in bytes, and what is not in them yet."""
        self._receive()
        for file in (self._metrics_file, self._samples_file):
            os.fsync(file.fileno())  # as what a checkpoint says of them is
        return {
            "file_bytes": {path.name: path.stat().st_size for path in self._paths if path.exists()},
            "window": list(self._window),
            "window_step": self._window_step,
            "received": [dict(record) for record in self._received],
        }

    def load_state_dict(self, state: Mapping[str, Any], num_batches: int) -> None:
        """Go on from `state_dict`; the files have been cut to their length.

        Args:
            state: from there.
            num_batches: collected batches that were saved with it. What was received of later ones, which are collected
                again, is dropped.
        """
        self._window, self._window_step = list(state["window"]), state["window_step"]
        self._received = [record for record in state["received"] if is_of_batches(record, num_batches)]

    def samples(self, rows: Sequence[Mapping[str, Any]], step: int, split: str) -> None:
        """Write prompts with their responses, a line each.

        Args:
            rows: {"prompt", "answer"?, "responses": [{"text", "reward", "correct"?, "kept"?}]}.
            step: gradient steps so far.
            split: "heldout" or "train".
        """
        for row in rows:
            self._samples_file.write(to_json({"step": step, "split": split, **row}) + "\n")
        if rows:
            for logger in self._loggers:
                logger.log_samples(rows, step, split)

    def rewards(self, values: Sequence[float], step: int) -> None:
        """Write the rewards of all responses of an evaluation, a line for it, of which the report makes a histogram.

        An evaluation that is made again, because a run went on from before it, has another line; the last one counts.
        """
        with self._rewards_path.open("a", encoding="utf-8") as file:
            file.write(to_json({"step": step, "rewards": values}) + "\n")

    def close(self) -> None:
        """Write what is left and end the loggers; a second call does nothing."""
        if self._metrics_file.closed:
            return
        self.flush()
        for logger in self._loggers:
            logger.close()
        self._metrics_file.close()
        self._samples_file.close()


def timings() -> dict[str, float]:
    """Mean seconds per call of each `with timeit(name):` since the last call of this, as `timeit/<name>`."""
    # TorchRL's erase() leaves a name behind with 0 seconds until it is timed again.
    seconds = {name: value for name, value in timeit.todict(prefix="timeit").items() if value > 0}
    timeit.erase()
    return seconds


def stopwatch() -> Callable[[], float]:
    """A clock that says the seconds since this call."""
    start = time.monotonic()
    return lambda: time.monotonic() - start


def summarize(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One record for many: each name's mean over the records that have it, or its last (CUMULATIVE) or greatest one."""
    names = dict.fromkeys(name for record in records for name in record)
    values = {name: [record[name] for record in records if name in record] for name in names}
    return {name: _summarize(name, found) for name, found in values.items()}


def _summarize(name: str, values: Sequence[float]) -> float:
    if name in CUMULATIVE:
        return values[-1]
    return max(values) if name in MAXIMA else mean_of(values)


def mean_of(values: Iterable[float]) -> float:
    """The mean of one or more numbers."""
    numbers = list(values)
    return sum(numbers) / len(numbers)


def to_json(value: Any) -> str:
    """One line of valid JSON, of what `plain` makes of a value."""
    return json.dumps(plain(value), allow_nan=False)


def plain(value: Any) -> Any:
    """A nested value as JSON can say it: non-finite numbers become None, numpy's and torch's scalars numbers."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def _scoped(name: str) -> str:
    return name if "/" in name or name in UNSCOPED else f"train/{name}"
