"""Where weights lie on their way to the engine."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def choose_directory(run_dir: Path, num_bytes: int) -> Path:
    """A new directory for weights in flight: in shared memory if they fit there, else in the run directory.

    At most three versions are there at once: one that the engine is loading, one that waits, and one that is written to
    take its place.
    """
    in_memory, on_disk = _candidates(run_dir)
    fits = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 3 * num_bytes
    directory = in_memory if fits else on_disk
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def remove_directories(run_dir: Path) -> None:
    """Remove what `choose_directory` made for a run, also when whoever made it was killed."""
    for directory in _candidates(run_dir):
        shutil.rmtree(directory, ignore_errors=True)


def _candidates(run_dir: Path) -> tuple[Path, Path]:
    digest = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
    return SHARED_MEMORY / f"expert-iteration-{digest}", run_dir / "weights"
