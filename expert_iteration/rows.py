"""Rows of a data set from a local file or directory.

A data set is a function for each of its splits, which reads the rows when it is called. A row is a dictionary, or
whatever else stands in its place in a malformed file: the caller counts those. A single file is the split "train".
"""

import csv
import glob
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from expert_iteration.errors import UserError

Splits = dict[str, Callable[[], list[Any]]]
SHOWN = 120  # characters of a text from outside that a message repeats


def read_path(path: Path) -> Splits:
    """The splits of a file, of a directory made by `save_to_disk`, or of a directory of files named after splits.

    Raises:
        UserError: it does not exist or has another form; when a split is called, that it cannot be read.
    """
    if not path.exists():
        raise UserError(f"env.dataset_path={path} does not exist: correct the path.")
    if not path.is_dir():
        if path.suffix.lower() not in READERS:
            raise UserError(
                f"env.dataset_path={path} has an unknown form: give one of {', '.join(READERS)}, or a directory."
            )
        return {"train": partial(_read_files, [path])}
    try:
        return _read_saved(path) if _is_saved(path) else _read_directory(path)
    except (ValueError, OSError) as error:
        raise UserError(f"env.dataset_path={path} cannot be read ({brief(error)}): mend it.") from error


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _read_saved(path: Path) -> Splits:
    import datasets

    return splits_of(datasets.load_from_disk(str(path)))


def splits_of(loaded: Any) -> Splits:
    """Of a `Dataset` (all "train") or a `DatasetDict`."""
    by_split = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    return {str(name): partial(_rows_of, split) for name, split in by_split.items()}


def _rows_of(split: Any) -> list[Any]:
    """Of a `Dataset`."""
    singles = [name for name, kind in split.features.items() if getattr(kind, "dtype", None) == "float32"]
    return _as_written(split.to_list(), singles)


def _read_directory(path: Path) -> Splits:
    """Which files are which split is for `datasets` to say, as in its `load_dataset`.

    They are read here: its own readers give up at the first malformed row.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns

    base = glob.escape(str(path))
    found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    splits: Splits = {}
    for split, names in found.items():
        if files := sorted(file for file in map(Path, names) if file.suffix.lower() in READERS):
            splits[str(split)] = partial(_read_files, files)
    if not splits:
        raise ValueError(f"no file of the form {', '.join(READERS)} and no saved data set is in it")
    return splits


def _read_files(files: Sequence[Path]) -> list[Any]:
    rows = []
    for file in files:
        try:
            rows += READERS[file.suffix.lower()](file)
        except (ValueError, OSError, csv.Error) as error:
            # JSON, Unicode and Arrow errors are ValueErrors.
            raise UserError(f"env.dataset_path={file} cannot be read ({brief(error)}): mend the file.") from error
    return rows


def _read_jsonl(path: Path) -> list[Any]:
    return _json_lines(path.read_text(encoding="utf-8-sig"))


def _json_lines(text: str) -> list[Any]:
    # Not splitlines, which also splits at separators that JSON allows inside a string (U+2028).
    return [_json_or_none(line) for line in text.split("\n") if line.strip()]


def _json_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, brackets in thousands of brackets
        return None


def _read_json(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        return _json_lines(text)  # one object a line, under another name
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(rows, list):
        raise ValueError(f"a JSON {type(rows).__name__}, not a list of rows")
    return rows


def _read_csv(path: Path) -> list[Any]:
    before = csv.field_size_limit(sys.maxsize)  # one cell above 128 KiB would make the whole file unreadable
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _refuse_repeated(reader.fieldnames or ())
            return list(reader)
    finally:
        csv.field_size_limit(before)


def _refuse_repeated(names: Sequence[str]) -> None:
    """Of columns with one name all but the last would be lost. Those without a name are nobody's."""
    repeated = [name for name, count in Counter(names).items() if count > 1 and name]
    if repeated:
        raise ValueError(f"its header has {', '.join(map(repr, repeated))} more than once")


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    return _as_written(table.to_pylist(), [field.name for field in table.schema if field.type == pyarrow.float32()])


def _as_written(rows: list[Any], singles: Iterable[str]) -> list[Any]:
    """The rows with the numbers of float32 columns by their shortest digits: 0.1, and not 0.10000000149011612."""
    import numpy as np

    for name in singles:
        for row in rows:
            if row[name] is not None:
                row[name] = float(str(np.float32(row[name])))
    return rows


def first_three(items: Sequence[str]) -> str:
    """The first few of what may be many, for a message."""
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def brief(text: object, length: int = SHOWN) -> str:
    """On one line, and cut where it is long."""
    line = " ".join(str(text)[: 10 * length].split())
    return line if len(line) <= length else f"{line[:length]}..."


READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
