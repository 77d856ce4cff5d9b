"""Who did what when: each process of a run writes its spans of work, a line each, into a file of its own.

Imports nothing heavy, so that any process can record. `timeline_report` reads the files.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

# The processes, which name the files, and what each does.
ENGINE = "engine"
GENERATING = "generating"
LOADING_WEIGHTS = "loading weights"

COLLECTOR = "collector"
COLLECTING = "collecting"
REFERENCE = "reference"
WRITING = "writing"

TRAINER = "trainer"
TRAINING = "training"
PUSHING_WEIGHTS = "pushing weights"
EVALUATING = "evaluating"
WAITING_FOR_DATA = "waiting for data"
SAVING = "saving"

SESSION = "session"  # the trainer's mark, no activity

ACTIVITIES = {
    ENGINE: (GENERATING, LOADING_WEIGHTS),
    COLLECTOR: (COLLECTING, REFERENCE, WRITING),
    TRAINER: (TRAINING, PUSHING_WEIGHTS, EVALUATING, SAVING, WAITING_FOR_DATA),
}
MIN_SECONDS = 0.001  # what is shorter, such as a wait for what is there already, cannot be seen and is not written

_lock = threading.Lock()  # the engine's process has several threads
_file: TextIO | None = None


def record_to(path: str | Path | None) -> None:
    """Append this process's spans to a file from now on, whose folder is made; None: record nothing, as at first.

    Args:
        path: `<run directory>/timeline/<process>.jsonl`, one line a span:
            {"activity", "start", "end"}, the latter two in seconds since the epoch.
    """
    global _file
    with _lock:
        if _file is not None:
            _file.close()
            _file = None
        if path is not None:
            _file = _open(Path(path))


@contextmanager
def span(activity: str) -> Iterator[None]:
    """Record that this process does `activity`, one of the above, while the body runs, also when it raises.

    Spans may lie in one another: the report counts the inner one.
    """
    # The epoch compares between processes; its clock may be set meanwhile, so the length is measured by another.
    start, ticks = time.time(), time.perf_counter()
    try:
        yield
    finally:
        _write(activity, start, time.perf_counter() - ticks)


def mark_session() -> None:
    """Note that a run, or its continuation, begins here: between two of them nobody worked."""
    _append(SESSION, time.time(), 0.0)


def _open(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Buffered by line: a process that is killed leaves whole lines.
    return path.open("a", buffering=1, encoding="utf-8")


def _write(activity: str, start: float, seconds: float) -> None:
    if seconds >= MIN_SECONDS:
        _append(activity, start, seconds)


def _append(activity: str, start: float, seconds: float) -> None:
    line = json.dumps({"activity": activity, "start": round(start, 6), "end": round(start + seconds, 6)})
    with _lock:
        if _file is not None:
            _file.write(line + "\n")
