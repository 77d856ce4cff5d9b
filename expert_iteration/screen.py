"""What the user sees while a run goes on, and where everything else is written."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expert_iteration.selection_advice import WITHIN_GROUPS

SHOW_EVERY = 2.0  # seconds


def redirect_output(path: str | Path) -> None:
    """Send this process's stdout and stderr, also that of native code, to a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    # A file makes Python buffer whole blocks; a log is read while the run goes on.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


class RemoteScreen:
    """The training process's end: messages travel to the process that owns the terminal.

    Args:
        queue: has `put`, such as a `Mailbox`.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._queue.put(("say", text))

    def progress(self, done: int, **figures: str) -> None:
        """Set the bar to `done` dialog turns and show the figures behind it."""
        self._queue.put(("progress", done, figures))


class Progress:
    """Shows a run's metrics as they are logged: one of its loggers.

    Args:
        screen: the terminal.
        advice: what to change where selection keeps too little, as `selection_advice.advise` says.
    """

    def __init__(self, screen: RemoteScreen, advice: str = WITHIN_GROUPS) -> None:
        self._screen = screen
        self._advice = advice
        self._warned = False
        self._shown_at = math.inf  # before the first batch there is no bar to move
        self._latest: dict[str, float] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Move the bar, print evaluations, and warn once when selection drops too much.

        The bar moves when a batch was collected, and its figures also while training goes on without one.
        """
        self._latest |= metrics
        if "eval/pass@1" in metrics:
            self._screen.say(
                f"evaluation after {step} gradient steps: "
                f"pass@1 {metrics['eval/pass@1']:.3f} ± {metrics['eval/pass@1_stderr']:.3f}, "
                f"greedy {metrics['eval/greedy']:.3f}, reward {metrics['eval/reward']:.3f}"
            )
        if "selection/groups_seen" in metrics:
            self._show()
            self._warn_of_dropped_groups(metrics["selection/groups_seen"], metrics["selection/groups_kept"])
        elif "optim_step" in metrics and time.monotonic() - self._shown_at > SHOW_EVERY:
            self._show()

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int, split: str) -> None:
        """Samples are not shown."""

    def close(self) -> None:
        """Nothing is held."""

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        self._screen.progress(
            int(self._latest["collector/dialog_turns"]),
            reward=f"{self._latest.get('collector/rewards/mean', math.nan):.3f}",
            kept=f"{self._latest['selection/batch_kept']:.0f}",
            steps=f"{self._latest.get('optim_step', 0):.0f}",
        )

    def _warn_of_dropped_groups(self, seen: float, kept: float) -> None:
        if self._warned or kept >= seen / 2:
            return
        self._warned = True
        self._screen.say(
            f"note: {seen - kept:.0f} of {seen:.0f} groups were dropped, for train.selection keeps none of their "
            f"responses: {self._advice}."
        )


class StepProgress:
    """In place of `Progress` where nothing is collected: the bar moves with gradient steps.

    Args:
        screen: the terminal.
    """

    def __init__(self, screen: RemoteScreen) -> None:
        self._screen = screen
        self._shown_at = 0.0
        self._latest: tuple[int, Mapping[str, float]] | None = None  # what is to be shown yet

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Move the bar where a gradient step was made."""
        if "train/loss" not in metrics:
            return
        self._latest = step, metrics
        if time.monotonic() - self._shown_at > SHOW_EVERY:
            self._show()

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int, split: str) -> None:
        """Samples are not shown."""

    def close(self) -> None:
        """Move the bar to where the run ended."""
        self._show()

    def _show(self) -> None:
        if self._latest is not None:
            step, metrics = self._latest
            self._screen.progress(step, loss=f"{metrics['train/loss']:.3f}")
            self._shown_at, self._latest = time.monotonic(), None


class Screen:
    """The terminal: a progress bar, over dialog turns or another unit, and lines above it; also goes to `run.log`.

    Args:
        total: length of the bar; 0: there is none.
        log_path: of `run.log`.
        unit: of the bar.
    """

    def __init__(self, total: int, log_path: Path, unit: str = "turn") -> None:
        from tqdm import tqdm

        self._log = log_path.open("a", buffering=1)
        self._unit = unit
        hidden = None if total else True  # None: unless this is a terminal
        self._bar = tqdm(total=total, unit=unit, desc="starting", dynamic_ncols=True, disable=hidden, smoothing=0.1)

    def handle(self, message: tuple[Any, ...]) -> None:
        """Show one message of a `RemoteScreen`."""
        kind, *content = message
        getattr(self, kind)(*content)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._log.write(text + "\n")
        self._bar.write(text)

    def progress(self, done: int, figures: dict[str, str]) -> None:
        """Move the bar."""
        self._bar.set_description("training", refresh=False)
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update(done - self._bar.n)
        self._log.write(
            f"{done} {self._unit}s, " + ", ".join(f"{name} {value}" for name, value in figures.items()) + "\n"
        )

    def close(self) -> None:
        """Leave the bar as it is and close the log."""
        self._bar.close()
        self._log.close()
