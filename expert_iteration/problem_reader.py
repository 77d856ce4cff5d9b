"""From the rows of a data set to problems: which columns to take, and account of the rows that cannot be used."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from expert_iteration.errors import UserError
from expert_iteration.problems import Columns, Problem, system_message
from expert_iteration.rows import brief, first_three

if TYPE_CHECKING:
    from expert_iteration.config import EnvConfig
    from expert_iteration.sources import Source

COLUMNS_SHOWN = 300  # characters


class ProblemReader:
    """Makes problems of a data set's rows, split by split, the training split first.

    A prompt may be chat messages: one of the user, after a system message at most. As a task has one system prompt,
    that of most rows of the first split is the task's, and rows with another are not used, unless `env.system_prompt`
    replaces them all.

    Args:
        source: of the task.
        env: which columns to take in place of the task's own.
        where: the data come from, for messages.

    Attributes:
        system_message: of the rows that are used; None: they have none.
        notes: lines that say which rows were skipped.
    """

    def __init__(self, source: "Source", env: "EnvConfig", where: str) -> None:
        self._source = source
        self._env = env
        self._where = where
        self._has_read = False
        self.system_message: str | None = None
        self.notes: list[str] = []

    def read(self, rows: Sequence[Any], split: str) -> list[Problem]:
        """The problems of a split.

        Args:
            rows: dictionaries, or whatever stands in their place in a malformed file.
            split: its name, for messages.

        Raises:
            UserError: a column is not there, or no row can be used.
        """
        where = f"{self._where}, {split}"
        columns = self._find_columns(rows, where)
        problems: dict[int, tuple[Problem, str | None]] = {}  # by the row's number, with the system message
        reasons: dict[int, str] = {}
        for number, row in enumerate(rows, start=1):
            try:
                problems[number] = self._problem(row, columns)
            except ValueError as error:
                reasons[number] = brief(error)
        if problems and not self._has_read:
            # Of equally many, that which came first.
            ((self.system_message, _),) = Counter(message for _, message in problems.values()).most_common(1)
            self._has_read = True
        others = [number for number, (_, message) in problems.items() if message != self.system_message]
        reasons |= dict.fromkeys(others, "another system message than most rows': env.system_prompt replaces them all")
        skipped = [f"row {number} ({reasons[number]})" for number in sorted(reasons)]
        usable = [problem for number, (problem, _) in problems.items() if number not in reasons]
        if not usable:
            read = f"{len(rows)} rows read" + (f": {first_three(skipped)}" if skipped else "")
            raise UserError(f"{where} holds no usable row ({read}): give other data.")
        if skipped:
            self.notes.append(f"note: {where}: {len(skipped)} of {len(rows)} rows were skipped: {first_three(skipped)}")
        return usable

    def _problem(self, row: Any, columns: Columns) -> tuple[Problem, str | None]:
        """With the system message that counts."""
        if not isinstance(row, dict):
            raise ValueError("no JSON object")
        if None in row:
            raise ValueError("more cells than columns")
        problem = self._source.to_problem(row, columns)
        return problem, system_message(row, columns) if self._env.system_prompt is None else None

    def _find_columns(self, rows: Sequence[Any], where: str) -> Columns:
        present = {str(column) for row in rows if isinstance(row, dict) for column in row}
        if not present:
            return Columns()  # no row can be used
        prompts = _wanted(self._env.prompt_column, self._source.prompt_columns)
        answers = _wanted(self._env.answer_column, self._source.answer_columns)
        found = [next((name for name in names if name in present), "") for names in (prompts, answers)]
        missing = [
            f"{' or '.join(map(repr, names))} ({key})"
            for names, name, key in zip(
                (prompts, answers), found, ("env.prompt_column", "env.answer_column"), strict=True
            )
            if names and not name
        ]
        missing += [repr(name) for name in self._source.other_columns if name not in present]
        if missing:
            there = brief(", ".join(map(repr, sorted(present))), COLUMNS_SHOWN)
            raise UserError(
                f"{where} lacks the column {', '.join(missing)}; it has {there}: rename its columns, or name those "
                "that are meant where a key is given."
            )
        if found[0] and found[0] == found[1]:
            raise UserError(
                f"{where}: the prompt and the answer would both be the column {found[0]!r}: name another with "
                "env.prompt_column or env.answer_column."
            )
        return Columns(*found)


def _wanted(given: str | None, own: tuple[str, ...]) -> tuple[str, ...]:
    """What the user says goes where the task has such a column at all."""
    return own if given is None or not own else (given,)
