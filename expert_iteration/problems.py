"""`Problem`, and how a row of a data set becomes one.

A function that makes a problem of a row takes the row and its `Columns`, and raises ValueError, saying why, for a row
that cannot be used. Whatever other columns a row has are the problem's metadata.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from expert_iteration.answers import boxed
from expert_iteration.countdown import describe_answer, describe_question
from expert_iteration.ifeval_instructions import read_instructions

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """One row of a task."""

    question: str
    """The user's turn."""
    answer: str
    """Ground truth in the data set's own form (gsm8k and tiny: ends in `#### x`); "" where there is none."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The row's other columns (ifeval: instruction_id_list, kwargs; countdown: numbers, target)."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set hold what; "" where none does."""

    prompt: str = ""
    answer: str = ""


def plain_problem(row: Row, columns: Columns) -> Problem:
    """A prompt, and a ground truth where there is a column for it."""
    question = _question(row, columns.prompt)
    return Problem(
        question, _as_text(row.get(columns.answer), columns.answer) if columns.answer else "", _others(row, columns)
    )


def gsm8k_problem(row: Row, columns: Columns) -> Problem:
    """A ground truth that is a number, or ends in one after `####`."""
    problem = plain_problem(row, columns)
    if not problem.answer.rpartition("####")[2].strip():
        raise ValueError("nothing after ####")
    return problem


def math_problem(row: Row, columns: Columns) -> Problem:
    r"""A ground truth that is an expression, or (column `solution`) a text with it in `\boxed{}`."""
    problem = plain_problem(row, columns)
    if columns.answer == "solution" and boxed(problem.answer) is None:
        raise ValueError("nothing boxed in solution")
    return problem


def ifeval_problem(row: Row, columns: Columns) -> Problem:
    """Instructions of the kinds that there are, with all their arguments."""
    read_instructions(row.get("instruction_id_list"), row.get("kwargs"))
    return Problem(_question(row, columns.prompt), "", {"key": row.get("key")} | _others(row, columns))


def countdown_problem(row: Row, columns: Columns) -> Problem:
    """`nums` and `target`, integers; the prompt is made of them."""
    nums, target = row.get("nums"), row.get("target")
    numbers = _numbers_of(nums) if isinstance(nums, str) else nums
    if not isinstance(numbers, list) or not numbers or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("nums is not a list of whole numbers")
    text = _as_text(target, "target")
    if not text.isdecimal():
        raise ValueError("target is not a whole number")
    metadata = {name: value for name, value in row.items() if name not in ("nums", "target")}
    return make_countdown_problem(numbers, int(text), metadata)


def _numbers_of(text: str) -> list[int]:
    """Of a CSV file's cell: a list as JSON or Python writes it, or as NumPy does, without commas."""
    match = re.fullmatch(r"\s*\[([\d\s,]*)\]\s*", text, flags=re.ASCII)
    return [] if match is None else [int(number) for number in match[1].replace(",", " ").split()]


def make_countdown_problem(numbers: Sequence[int], target: int, metadata: Row | None = None) -> Problem:
    """The problem to reach `target` with `numbers`."""
    about = {**(metadata or {}), "numbers": list(numbers), "target": target}
    return Problem(describe_question(numbers, target), describe_answer(numbers, target), about)


def question_key(problem: Problem) -> str:
    """Equal for questions that differ in white space and case only."""
    return " ".join(problem.question.split()).casefold()


def countdown_key(problem: Problem) -> str:
    """Equal for the same numbers, in whatever order, and target."""
    return f"{sorted(problem.metadata['numbers'])} {problem.metadata['target']}"


def system_message(row: Row, columns: Columns) -> str | None:
    """What stands before the user's turn in a prompt of chat messages; None of any other prompt."""
    messages = row.get(columns.prompt)
    return messages[0]["content"] if isinstance(messages, list) and len(messages) == 2 else None


def _question(row: Row, column: str) -> str:
    """The prompt: a text, or chat messages of which only a system message stands before the one of the user."""
    value = row.get(column)
    if not isinstance(value, list):
        return _as_text(value, column)
    if not all(isinstance(message, dict) and isinstance(message.get("content"), str) for message in value):
        raise ValueError(f"{column!r} is no list of chat messages with texts")
    roles = [str(message.get("role")) for message in value]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(f"{column!r} has the turns {', '.join(roles) or 'of nobody'}, not one of the user")
    return _as_text(value[-1]["content"], column)


def _as_text(value: Any, column: str) -> str:
    """A text, or a number as one (true and false as these words)."""
    if isinstance(value, str):
        text = value.strip()
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, int):
        text = str(value)
    elif isinstance(value, float) and math.isfinite(value):
        text = format(Decimal(str(value)), "f")  # without an exponent, which is no number in an answer
    elif isinstance(value, Decimal) and value.is_finite():
        text = format(value, "f")
    elif value is None or value != value:  # NaN, as which pandas writes what is missing
        raise ValueError(f"no {column!r}")
    else:
        raise ValueError(f"{column!r} is a {type(value).__name__}, not a text or a finite number")
    if not text:
        raise ValueError(f"empty {column!r}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"half a character in {column!r}") from None
    return text


def _others(row: Row, columns: Columns) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in (columns.prompt, columns.answer)}
