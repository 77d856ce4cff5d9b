"""The files of checkpoints: which are whole, which is the newest, which may go.

A checkpoint is `checkpoint_<gradient step>.pt` and a folder of the same stem, which has all else that an exact
continuation needs, and a manifest with the size and checksum of every file. The folder is renamed into place last, so a
checkpoint without a folder, or a file that differs from the manifest, is not whole. Importing this module loads no
torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expert_iteration.errors import UserError
from expert_iteration.run_directory import write_whole

MANIFEST = "manifest.json"
FORMAT = 2
NAME = re.compile(r"checkpoint_(\d+)")


class DamagedCheckpointError(Exception):
    """A checkpoint is not whole; says what is wrong with it."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is there, as far as its manifest says.

    Attributes:
        folder: `checkpoint_<step>`, beside `checkpoint_<step>.pt`.
        manifest: what `write_manifest` wrote.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """Gradient steps made when it was saved."""
        return self.manifest["step"]

    @property
    def weights(self) -> Path:
        """The `.pt` file."""
        return self.folder.with_name(self.folder.name + ".pt")

    def verify(self) -> None:
        """Compare every file with the manifest.

        Raises:
            DamagedCheckpointError: one is missing, was cut short, or holds something else.
        """
        for name, expected in self.manifest["files"].items():
            path = self.folder.parent / name
            if not path.is_file():
                raise DamagedCheckpointError(f"{name} is missing")
            if (size := path.stat().st_size) != expected["bytes"]:
                raise DamagedCheckpointError(f"{name} has {size} bytes in place of {expected['bytes']}")
            if _checksum(path) != expected["sha256"]:
                raise DamagedCheckpointError(f"{name} holds other bytes than were written")


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, whole or not: the folder's name first, without which the rest is none."""
    gone = folder.with_name(f".{folder.name}.gone")
    os.rename(folder, gone)
    folder.with_name(f"{folder.name}.pt").unlink(missing_ok=True)
    shutil.rmtree(gone)


def open_checkpoint(folder: Path) -> SavedCheckpoint:
    """The checkpoint in a folder; its files are not looked at yet.

    Raises:
        DamagedCheckpointError: there is no manifest.
        UserError: it is of another version of this suite.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise DamagedCheckpointError(f"it has no readable {MANIFEST} ({error})") from error
    if (found := manifest.get("format")) != FORMAT:
        raise UserError(f"The checkpoint {folder} is of another version (format {found}, this one has {FORMAT}).")
    return SavedCheckpoint(folder, manifest)


def list_folders(directory: Path) -> list[Path]:
    """The folders of all checkpoints in a directory, whole or not, oldest first."""
    folders = [path for path in directory.glob("checkpoint_*") if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(folders, key=step_of)


def step_of(path: Path) -> int:
    """The gradient step in the name of a checkpoint's folder or file."""
    match = NAME.fullmatch(path.name.removesuffix(".pt"))
    assert match is not None, path
    return int(match[1])


def newest_whole(directory: Path) -> tuple[SavedCheckpoint | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with each newer one."""
    complaints = []
    for folder in reversed(list_folders(directory)):
        try:
            checkpoint = open_checkpoint(folder)
            checkpoint.verify()
        except DamagedCheckpointError as error:
            complaints.append(f"{folder.name} is damaged: {error}")
        else:
            return checkpoint, complaints
    return None, complaints


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for a file or folder, which takes the name, flushed to disk, when the body ends.

    Whoever sees the name sees a whole file, also after a power cut. After an error what the body wrote is removed, and
    what was there before stays.
    """
    tidy(path)
    temporary, old = _temporary_names(path)
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")]:
            _flush(file)
        if path.is_dir():
            os.rename(path, old)  # a folder cannot be renamed onto one
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        tidy(path)


def tidy(path: Path) -> None:
    """Mend what a crash left in the middle of `replacing`: a folder gets its name back, and what is not whole goes."""
    temporary, old = _temporary_names(path)
    if old.is_dir() and not path.exists():
        os.rename(old, path)
    _remove(old)
    _remove(temporary)


def _temporary_names(path: Path) -> tuple[Path, Path]:
    """For what is being written, and for what was there before."""
    return path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")


def write_manifest(folder: Path, files: Iterable[Path], about: dict[str, Any]) -> None:
    """Describe the files of a checkpoint in its folder, which still has a temporary name.

    Args:
        folder: where the manifest goes.
        files: in it, or beside it.
        about: what else the manifest says.
    """
    described = {
        (path.name if path.parent != folder else f"checkpoint_{about['step']}/{path.name}"): {
            "bytes": path.stat().st_size,
            "sha256": _checksum(path),
        }
        for path in files
    }
    write_whole(folder / MANIFEST, json.dumps({"format": FORMAT, **about, "files": described}, indent=1))


def prune(directory: Path, keep: int) -> None:
    """Remove the oldest checkpoints until `keep` are left, but never the last and the best, of the greatest "score".

    What a crash left behind, such as a file without a folder, goes too.
    """
    checkpoints = []
    for folder in list_folders(directory):
        # One that cannot be read is nobody's to go on from, and not ours to judge.
        with suppress(DamagedCheckpointError):
            checkpoints.append(open_checkpoint(folder))
    for checkpoint in choose_superfluous(checkpoints, keep):
        remove_checkpoint(checkpoint.folder)
    for path in directory.glob("checkpoint_*.pt"):
        if NAME.fullmatch(path.stem) and not path.with_suffix("").is_dir():
            path.unlink()
    for path in directory.glob(".checkpoint_*"):
        _remove(path)


def choose_superfluous(checkpoints: Sequence[SavedCheckpoint], keep: int) -> list[SavedCheckpoint]:
    """Of checkpoints in the order of their steps those that are too many; see `prune`."""
    if not checkpoints:
        return []
    last = checkpoints[-1]
    scored = [checkpoint for checkpoint in checkpoints if checkpoint.manifest["score"] is not None]
    best = max(scored, key=lambda checkpoint: checkpoint.manifest["score"], default=last)
    by_worth = sorted(checkpoints, key=lambda one: (one is last, one is best, one.step), reverse=True)
    return by_worth[max(keep, len({last.step, best.step})) :]


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
