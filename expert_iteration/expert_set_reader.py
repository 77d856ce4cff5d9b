"""Reading an expert set to train on (`train.from_expert_set`): rows of texts in, token ids and rewards out.

A run may have made it (`expert_set.py`), or anybody else: a row needs a prompt and a response. Imports no torch.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from expert_iteration.chat_template import chat_prompt_ids, end_of_turn_id, load_tokenizer
from expert_iteration.errors import UserError
from expert_iteration.models import context_length, model_path
from expert_iteration.rows import READERS, first_three
from expert_iteration.tasks import Task, task_without_problems

if TYPE_CHECKING:
    from expert_iteration.config import Config

SUFFIXES = (".parquet", ".jsonl")  # of a single file; of a folder, its .parquet files are read
ROWS_AT_ONCE = 1024  # of a Parquet file: as Python's integers, token ids take ten times their room
DEFAULT_REWARD = 1.0


@dataclass(frozen=True)
class Example:
    """A response to imitate."""

    prompt_ids: array[int]
    """With the chat template, up to where the response begins."""
    response_ids: array[int]
    reward: float


class ExampleEncoder:
    """Makes examples of rows.

    Columns: `prompt` (the user's turn) and `response`, texts; `reward`, a number, 1 where there is none;
    `system_prompt`, where it differs from the task's (null: there is none); `finish_reason`, "length" where the
    response is cut short; `prompt_token_ids` and `response_token_ids`. Others are not looked at.

    Token ids are taken as they are where they are this tokenizer's, which is to say that they decode to the row's
    texts. Else the chat template is put around the prompt, and the end-of-turn token after a response that is whole.

    Args:
        tokenizer: of the model that is trained.
        system_prompt: of rows without such a column; None: none.
        max_length: tokens that prompt and response may have together.
        ends_turn: whether the end-of-turn token belongs to a response (`inference_model.include_stop_str_in_output`).

    Attributes:
        num_sampled: rows whose token ids were taken as they are.
    """

    def __init__(self, tokenizer: Any, *, system_prompt: str | None, max_length: int, ends_turn: bool) -> None:
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._max_length = max_length
        self._end_of_turn = end_of_turn_id(tokenizer) if ends_turn else None
        # The rows of a group share their prompt, and stand together.
        self._put = lru_cache(maxsize=128)(lambda system, prompt: chat_prompt_ids(tokenizer, system, prompt))
        self.num_sampled = 0

    def encode(self, row: Any) -> Example:
        """One row as an example.

        Raises:
            ValueError: it cannot be used; says why.
        """
        if not isinstance(row, Mapping):
            raise ValueError("no JSON object")
        prompt, response, reward = _text(row, "prompt"), _text(row, "response"), _reward(row)
        sampled = self._sampled_ids(row, prompt, response)
        prompt_ids, response_ids = sampled or self._tokenize(row, prompt, response)
        if (length := len(prompt_ids) + len(response_ids)) > self._max_length:
            raise ValueError(f"{length:,} tokens, more than {self._max_length:,}")
        self.num_sampled += sampled is not None
        return Example(array("i", prompt_ids), array("i", response_ids), reward)

    def _sampled_ids(self, row: Mapping[str, Any], prompt: str, response: str) -> tuple[list[int], list[int]] | None:
        prompt_ids, response_ids = row.get("prompt_token_ids"), row.get("response_token_ids")
        if not (self._are_ids(prompt_ids) and self._are_ids(response_ids)):
            return None
        is_this_tokenizers = (
            self._tokenizer.decode(response_ids, skip_special_tokens=True) == response
            # A template may have taken spaces off the prompt.
            and prompt.strip() in self._tokenizer.decode(prompt_ids)
        )
        return (prompt_ids, response_ids) if is_this_tokenizers else None

    def _are_ids(self, value: Any) -> TypeGuard[list[int]]:
        vocabulary = len(self._tokenizer)
        return isinstance(value, list) and bool(value) and all(type(i) is int and 0 <= i < vocabulary for i in value)

    def _tokenize(self, row: Mapping[str, Any], prompt: str, response: str) -> tuple[list[int], list[int]]:
        system_prompt = row.get("system_prompt", self._system_prompt)
        if not isinstance(system_prompt, str | None):
            raise ValueError("the system_prompt is no text")
        ids = self._tokenizer(response, add_special_tokens=False)["input_ids"]
        is_whole = row.get("finish_reason") != "length"
        # What others write may end with the token's text already.
        if self._end_of_turn is not None and is_whole and ids[-1:] != [self._end_of_turn]:
            ids = [*ids, self._end_of_turn]
        return self._put(system_prompt, prompt), ids


def read_expert_set(path: Path, encoder: ExampleEncoder) -> tuple[list[Example], list[str]]:
    """The examples of a set, and lines that describe it. Rows that cannot be used are counted, and three of them shown.

    Args:
        path: a folder of Parquet files, or one file of the `SUFFIXES`.
        encoder: makes an example of a row.

    Raises:
        UserError: there is no such file, one cannot be read, or no row can be used.
    """
    examples: list[Example] = []
    skipped: list[str] = []
    columns: list[str] = []
    for number, row in enumerate(_read(path), start=1):
        columns = columns or (list(row) if isinstance(row, Mapping) else [])
        try:
            examples.append(encoder.encode(row))
        except ValueError as error:
            skipped.append(f"row {number} ({error})")
    num_rows = len(examples) + len(skipped)
    if not examples:
        read = f"{num_rows} rows read" + (f": {first_three(skipped)}" if skipped else "")
        there = f" It has the columns {', '.join(columns)}." if columns else ""
        raise UserError(
            f"train.from_expert_set ({path}) holds no usable row ({read}): each needs a text `prompt` and a text "
            f"`response`.{there}"
        )
    notes = [f"expert set: {len(examples)} responses from {path}, {encoder.num_sampled} of them by their token ids"]
    if skipped:
        notes.append(f"note: {len(skipped)} of {num_rows} rows were skipped: {first_three(skipped)}")
    return examples, notes


def task_of_expert_set(cfg: Config, path: Path) -> tuple[Task, Any, list[str]]:
    """A task of nothing but the examples of a set, the tokenizer, and lines that describe the set.

    Args:
        cfg: of which task they are, for its system prompt; and of which model.
        path: `train.from_expert_set`.

    Raises:
        UserError: as `read_expert_set`.
    """
    task = task_without_problems(cfg)
    name, trust = model_path(cfg), cfg.model.trust_remote_code
    tokenizer = load_tokenizer(name, trust, cfg.model.chat_template)
    encoder = ExampleEncoder(
        tokenizer,
        system_prompt=task.system_prompt,
        max_length=context_length(name, cfg.inference_model.max_model_len, trust),
        ends_turn=cfg.inference_model.include_stop_str_in_output,
    )
    examples, notes = read_expert_set(path, encoder)
    return replace(task, examples=examples), tokenizer, notes


def digest_of_examples(examples: Sequence[Example]) -> str:
    """What tells two lists of examples apart."""
    digest = hashlib.sha256()
    for example in examples:
        lengths_and_reward = f"{len(example.prompt_ids)} {len(example.response_ids)} {example.reward}"
        for part in (lengths_and_reward.encode(), example.prompt_ids, example.response_ids):
            digest.update(part)
    return digest.hexdigest()


def _read(path: Path) -> Iterator[Any]:
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(
            f"train.from_expert_set ({path}) is a folder without a .parquet file: give the expert_set/ folder of a run "
            f"that saved one, or a {' or '.join(SUFFIXES)} file."
        )
    for file in files:
        try:
            yield from _read_parquet(file) if file.suffix == ".parquet" else READERS[file.suffix](file)
        except (ValueError, OSError) as error:
            # JSON's, Unicode's and Arrow's errors are ValueErrors.
            raise UserError(f"train.from_expert_set: {file} cannot be read ({error}): mend or remove it.") from error


def _read_parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for rows in file.iter_batches(ROWS_AT_ONCE):
            yield from rows.to_pylist()


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        raise ValueError(f"no {column}")
    if not isinstance(value, str):
        raise ValueError(f"the {column} is no text")
    if not value.strip():
        raise ValueError(f"empty {column}")
    return value


def _reward(row: Mapping[str, Any]) -> float:
    value = row.get("reward")
    if value is None:
        return DEFAULT_REWARD
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"the reward {value!r} is no finite number")
    return float(value)
