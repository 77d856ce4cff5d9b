"""The names of the files in a run directory, for what writes them and what reads them."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
EVAL_REWARDS_FILE = "eval_rewards.jsonl"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
CONFIG_FILE = ".hydra/config.yaml"
ACCEPTED_MARK = "accepted"  # beside the configuration of a continuation
EXPERT_SET_FOLDER = "expert_set"
BATCH_METRIC = "collector/batch"  # in a line of metrics of the collector: the number of its batch, from 1
LAST_FOLDER, BEST_FOLDER = "last", "best"  # of the policy, for other tools
TIMELINE_FOLDER = "timeline"  # of <process>.jsonl


def process_name(kind: str, index: int, count: int) -> str:
    """What one of `count` like processes is called in messages and file names: its kind alone where it is the only one.

    Args:
        kind: "engine", "reference" or "trainer".
        index: of the process, from 0.
        count: of its kind in the run.
    """
    return kind if count == 1 else f"{kind}-{index}"


def log_file(run_dir: Path, process: str) -> str:
    """Where the output of a process of the run goes: "engine", "collector", "reference", "trainer", "trainer-1"."""
    return str(run_dir / "logs" / f"{process}.log")


def timeline_file(run_dir: Path, process: str) -> str:
    """Where a process of the run notes what it does when (`timeline.record_to`)."""
    return str(run_dir / TIMELINE_FOLDER / f"{process}.jsonl")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, none if it does not exist; a line cut short by the end of the process is passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def settings_folder(run_dir: Path) -> Path:
    """Where Hydra's files of the settings lie that a run has now: those of its start, or of its last continuation.

    Hydra writes them before anybody has looked at the settings: a continuation that was refused has no mark.
    """
    first = (run_dir / CONFIG_FILE).parent
    accepted = [mark.parent for mark in first.glob(f"resumed-*/{ACCEPTED_MARK}")]
    return max(accepted, key=lambda path: int(path.name.rpartition("-")[2]), default=first)


def is_of_batches(line: Mapping[str, Any], num_batches: int) -> bool:
    """Whether a line of metrics belongs to one of the first `num_batches` collected batches, or to none of any."""
    return (line.get(BATCH_METRIC) or 0) <= num_batches


def write_whole(path: Path, text: str) -> None:
    """Write a file, in place of one that is there, so that whoever sees the name sees a whole file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)
