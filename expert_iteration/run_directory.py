"""The names of the files in a run directory, for what writes them and what reads them."""

import os
from pathlib import Path

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
CONFIG_FILE = ".hydra/config.yaml"
TIMELINE_FOLDER = "timeline"  # of <process>.jsonl


def log_file(run_dir: Path, process: str) -> str:
    """Where the output of a process of the run goes: "engine", "collector", "reference" or "trainer"."""
    return str(run_dir / "logs" / f"{process}.log")


def timeline_file(run_dir: Path, process: str) -> str:
    """Where a process of the run notes what it does when (`timeline.record_to`)."""
    return str(run_dir / TIMELINE_FOLDER / f"{process}.jsonl")


def write_whole(path: Path, text: str) -> None:
    """Write a file, in place of one that is there, so that whoever sees the name sees a whole file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)
