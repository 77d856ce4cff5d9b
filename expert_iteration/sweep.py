"""The table over the jobs of a sweep (`--multirun`): `sweep.csv`, and the same for the terminal.

Hydra runs the jobs one after the other in this process, each in a directory of its own below the sweep's.
"""

from __future__ import annotations

import csv
import io
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from expert_iteration.config import Config
from expert_iteration.run_directory import SUMMARY_FILE, write_whole

SWEEP_FILE = "sweep.csv"
EVALUATIONS = ("before", "after", "best")
FIGURES = ("pass@1", "pass@1_stderr", "pass@k", "greedy", "reward")
COLUMNS = (
    *("job", "overrides", "status"),
    *(f"{evaluation}_{figure}" for evaluation in EVALUATIONS for figure in FIGURES),
    *("seconds", "error", "run_dir"),
)
SHOWN_FIGURES = ("pass@1", "reward")  # on the terminal, which is narrow
SHOWN_ERROR = 160  # characters
LEFT_ALIGNED = (1, 2)  # overrides and status


def is_sweep() -> bool:
    """Whether the job that runs now is one of a sweep."""
    return HydraConfig.get().mode is RunMode.MULTIRUN


def share_group(cfg: Config) -> None:
    """Give a sweep's job the W&B group that all its jobs share, unless the configuration names one."""
    if is_sweep() and cfg.logging.group is None:
        cfg.logging.group = group_of(_sweep_directory())


def group_of(directory: Path) -> str:
    """`sweep-2026-11-25-10-00-00` for a sweep in multirun/2026-11-25/10-00-00."""
    return "-".join(("sweep", *directory.relative_to(directory.anchor).parts[-2:]))


class SweepTable:
    """The jobs of a sweep that have ended, a row each; it stays empty in a run that is no sweep.

    Args:
        explain: puts an error into words.
    """

    def __init__(self, explain: Callable[[BaseException], str]) -> None:
        self._explain = explain
        self._path = Path()
        self._rows: list[dict[str, Any]] = []
        self._overrides: list[list[str]] = []

    def __bool__(self) -> bool:
        """Whether there are rows."""
        return bool(self._rows)

    @contextmanager
    def row(self) -> Iterator[None]:
        """What runs inside is a job: however it ends, also by Ctrl-C, its row is then in `sweep.csv`.

        Raises:
            SystemExit: the directory holds a sweep already. All jobs would be refused, and their rows replace its.
        """
        if not is_sweep():
            yield
            return
        self._open(_sweep_directory() / SWEEP_FILE)
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        # A directory that another run has used is refused, and what lies there is not this job's.
        is_new = not (run_dir / SUMMARY_FILE).exists()
        started = time.monotonic()
        status, error_text = "completed", ""
        try:
            yield
        except BaseException as error:
            # As text: the error itself would keep alive what the job held.
            status, error_text = _describe(error, self._explain)
            raise
        finally:
            # Not at module level: the report brings NumPy along, for which no command line should wait.
            from expert_iteration.report import read_summary

            summary = read_summary(run_dir) if is_new else {}
            self._add(run_dir, status, summary.get("error") or error_text, time.monotonic() - started, summary)

    def to_text(self) -> str:
        """The table for the terminal: the overrides in which jobs differ, the main figures, errors and the path."""
        cells = [_header(), *map(self._cells, range(len(self._rows)))]
        groups = ["", "", "", *(name for figure in SHOWN_FIGURES for name in (figure, "", "")), ""]
        errors = [
            f"job {row['job']}: {textwrap.shorten(row['error'], SHOWN_ERROR, placeholder=' ...')}"
            for row in self._rows
            if row["error"]
        ]
        return "\n".join([*_align([groups, *cells]), *errors, f"Sweep: {self._path}"])

    def _open(self, path: Path) -> None:
        if not self._rows and path.exists():
            raise SystemExit(f"Error: {path.parent} holds a sweep already: give another hydra.sweep.dir, or remove it.")
        self._path = path

    def _add(self, run_dir: Path, status: str, error: str, seconds: float, summary: dict[str, Any]) -> None:
        job = HydraConfig.get()
        overrides = [str(override) for override in job.overrides.task]
        evaluations = summary.get("eval") or {}
        figures = {
            f"{evaluation}_{figure}": evaluations.get(evaluation, {}).get(figure)
            for evaluation in EVALUATIONS
            for figure in FIGURES
        }
        self._overrides.append(overrides)
        self._rows.append(
            {"job": job.job.num, "overrides": " ".join(overrides), "status": status}
            | figures
            | {"seconds": round(seconds, 1), "error": " ".join(error.split()), "run_dir": str(run_dir)}
        )
        self._write()

    def _write(self) -> None:
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_whole(self._path, table.getvalue())

    def _cells(self, index: int) -> list[str]:
        from expert_iteration.score_table import fixed

        row = self._rows[index]
        is_alone = len(self._rows) == 1
        shared = set() if is_alone else set.intersection(*map(set, self._overrides))
        figures = [row[f"{evaluation}_{figure}"] for figure in SHOWN_FIGURES for evaluation in EVALUATIONS]
        return [
            str(row["job"]),
            " ".join(override for override in self._overrides[index] if override not in shared),
            row["status"],
            *map(fixed, figures),
            f"{row['seconds']:.0f}",
        ]


def _sweep_directory() -> Path:
    return Path(HydraConfig.get().sweep.dir).absolute()


def _describe(error: BaseException, explain: Callable[[BaseException], str]) -> tuple[str, str]:
    """Status and error of a job that ended early."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", ""
    return "failed", f"{type(error).__name__}: {explain(error)}"


def _header() -> list[str]:
    return ["job", "overrides", "status", *EVALUATIONS * len(SHOWN_FIGURES), "seconds"]


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index in LEFT_ALIGNED else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
