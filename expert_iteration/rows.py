"""Rows of a data set: from a local file or directory, or from the Hugging Face hub and its cache.

Every reader gives `{split: rows}`. A row is a dictionary, or whatever else stands in its place in a malformed file:
the caller counts those. A single file is the split "train".
"""

import contextlib
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from expert_iteration.errors import UserError
from expert_iteration.hub import ask

HUB_PATIENCE_SECONDS = 8.0


def read_path(path: Path) -> dict[str, list[Any]]:
    """Splits of a file (its rows are "train") or of a directory made by `save_to_disk`."""
    if not path.exists():
        raise UserError(f"env.dataset_path={path} does not exist: correct the path.")
    reader = _read_directory if path.is_dir() else READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"env.dataset_path={path} has an unknown form: give one of {', '.join(READERS)}, or a directory."
        )
    try:
        return reader(path)
    except (ValueError, OSError, csv.Error) as error:
        # JSON, Unicode and Arrow errors are ValueErrors.
        raise UserError(f"env.dataset_path={path} cannot be read ({error}): mend the file.") from error


def _read_jsonl(path: Path) -> dict[str, list[Any]]:
    # Not splitlines, which also splits at separators that JSON allows inside a string (U+2028).
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return {"train": [_json_or_none(line) for line in lines if line.strip()]}


def _json_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _read_json(path: Path) -> dict[str, list[Any]]:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError(f"a JSON {type(rows).__name__}, not a list of rows")
    return {"train": rows}


def _read_csv(path: Path) -> dict[str, list[Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return {"train": list(csv.DictReader(file))}


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    import pyarrow.parquet

    return {"train": pyarrow.parquet.read_table(path).to_pylist()}


def _read_directory(path: Path) -> dict[str, list[Any]]:
    import datasets

    return _splits(datasets.load_from_disk(str(path)))


def _splits(loaded: Any) -> dict[str, list[Any]]:
    """Rows by split of a `Dataset` (all "train") or a `DatasetDict`."""
    by_split = loaded if isinstance(loaded, dict) else {"train": loaded}
    return {str(name): rows.to_list() for name, rows in by_split.items()}


def read_hub(hub_id: str, hub_config: str | None) -> dict[str, list[Any]]:
    """All splits of the data set, from the hub or from the cache of an earlier download."""
    import datasets

    with contextlib.nullcontext() if _hub_answers(hub_id) else _datasets_offline():
        try:
            return _splits(datasets.load_dataset(hub_id, hub_config))
        except (OSError, ValueError) as error:
            raise UserError(
                f"The data set {hub_id} is neither cached nor reachable ({error}): connect to the Hugging Face "
                "hub once, or give a local copy with env.dataset_path=FILE."
            ) from error


def _hub_answers(hub_id: str) -> bool:
    """Whether the hub has the data set. `load_dataset` by itself would retry for more than 20 seconds.

    Whatever went wrong, the cache is tried next, and the error that ends the run is the cache's.
    """
    from huggingface_hub import HfApi

    return ask(lambda: HfApi().dataset_info(hub_id, timeout=HUB_PATIENCE_SECONDS), HUB_PATIENCE_SECONDS) is None


@contextlib.contextmanager
def _datasets_offline() -> Iterator[None]:
    """Make `datasets` go to its cache at once; it reads HF_HUB_OFFLINE only when it is imported."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def first_three(items: Sequence[str]) -> str:
    """The first few of what may be many, for a message."""
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
