"""Which prompts leave room for a response."""

from collections.abc import Callable
from functools import cached_property

from expert_iteration.problems import Problem
from expert_iteration.rows import brief, first_three

Fits = Callable[[Problem], bool]


def fits_always(problem: Problem) -> bool:
    """Where nothing limits prompts."""
    return True


class PromptLimit:
    """Tells prompts that are too long from others, and keeps account of those that it was asked about.

    Args:
        count_tokens: of a prompt with this system prompt and question.
        find_limit: most tokens of a prompt; called once it is needed, as it needs the model.
    """

    def __init__(self, count_tokens: Callable[[str | None, str], int], find_limit: Callable[[], int]) -> None:
        self._count_tokens = count_tokens
        self._find_limit = find_limit
        self._long: dict[int, tuple[Problem, int]] = {}  # by id; as they are held, no other gets the same

    @cached_property
    def limit(self) -> int:
        """Most tokens of a prompt."""
        return self._find_limit()

    def under(self, system_prompt: str | None) -> Fits:
        """Whether a problem's prompt is short enough, with this system prompt."""

        def fits(problem: Problem) -> bool:
            length = self._count_tokens(system_prompt, problem.question)
            if length > self.limit:
                self._long[id(problem)] = problem, length
            return length <= self.limit

        return fits

    def notes(self) -> list[str]:
        """A line that counts those that were too long, if any were."""
        if not self._long:
            return []
        shown = first_three([f"{quote(problem)} ({length})" for problem, length in self._long.values()])
        return [
            f"note: {len(self._long)} prompts were left out, for with the chat template they have more than "
            f"{self.limit} tokens (inference_model.max_model_len less inference_model.max_tokens): {shown}"
        ]


def quote(problem: Problem) -> str:
    """The beginning of the question, for a message."""
    return f"'{brief(problem.question, 60)}'"
