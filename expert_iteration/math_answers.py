r"""MATH: is the answer of a response the same mathematical object as the ground truth? math-verify decides.

math-verify (Hugging Face; `\frac{1}{2}` = 0.5, `(x+1)^2` = `x^2+2x+1`, sets, intervals, matrices, text) and SymPy
below it are imported when the first answer is verified, or by `prepare`. An expression can keep SymPy busy for ever,
and math-verify's own time limit is a signal, which works in the main thread of a process only: it is off, and the limit
is `reward.timeout` in the processes of `reward.workers`.
"""

import functools
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from expert_iteration.answers import boxed, find_answer
from expert_iteration.installation import require

if TYPE_CHECKING:
    from expert_iteration.tasks import Problem

REQUIREMENTS = ("math_verify",)
# A matrix or a list of solutions is shorter; more is no answer.
MAX_ANSWER_CHARS = 500
RIGHT, WRONG, NO_ANSWER = 1.0, 0.1, 0.0
# The base of a number, of which math-verify takes no notice: 2516_8, 1\text{A}_{16}.
_BASE = re.compile(r"(?<=[0-9A-F}])_\s?\{?\s?([0-9]{1,2})\s?\}?$")


def math_rewards(problems: Sequence["Problem"], responses: Sequence[str]) -> list[float]:
    r"""1.0 for the right answer, 0.1 for a wrong one, 0.0 without one: GSM8K's values.

    An answer stands in the first `<answer>` or, without one, in the last `\boxed{}` (in the tag, too, what is boxed
    counts); nothing in a closed `<think>` block does. The truth stands in the last `\boxed{}` of `problem.answer`,
    which may be a whole solution, or is all of it but for what ends in `####`.
    """
    return [_reward(response, problem.answer) for problem, response in zip(problems, responses, strict=True)]


def math_corrects(problems: Sequence["Problem"], responses: Sequence[str]) -> list[bool]:
    """Whether the answer, looked for as in `math_rewards`, is the right one."""
    return [reward == RIGHT for reward in math_rewards(problems, responses)]


def check_requirements() -> None:
    """Refuse early, and without importing it, when the verifier is missing."""
    require(REQUIREMENTS, "The reward of math", "requirements_gsm8k.txt")


def prepare() -> None:
    """Import the verifier, and have it parse something, which imports the rest."""
    _is_same("0.5", "1/2")


def given_answer(response: str) -> str:
    """The answer that is judged; "" without one."""
    tagged = find_answer(response, "answer_tag")
    answer = find_answer(response, "boxed") if tagged is None else (boxed(tagged) or tagged)
    return answer or ""


def true_answer(solution: str) -> str:
    """The answer of a solution, boxed or (as in GSM8K) after `####`, or of what is a bare answer."""
    return boxed(solution) or solution.rpartition("####")[2].strip()


def _reward(response: str, solution: str) -> float:
    given = given_answer(response)
    if not given:
        return NO_ANSWER
    return RIGHT if _is_same(given, true_answer(solution)) else WRONG


# For reward and pass, and for the many responses of a group that agree.
@functools.lru_cache(maxsize=4096)
def _is_same(given: str, truth: str) -> bool:
    given, truth = _without_marks(given), _without_marks(truth)
    if given == truth:
        return truth != ""
    if len(given) > MAX_ANSWER_CHARS:
        return False
    bases = [match[1] for match in map(_BASE.search, (given, truth)) if match]
    if len(bases) == 2 and bases[0] != bases[1]:
        return False
    _, verify = _verifier()
    return bool(verify(_parsed(truth), _parsed(given), timeout_seconds=None))


def _parsed(answer: str) -> list[Any]:
    """What math-verify makes of an answer: [] or expression and text, of which any may be the one that agrees.

    It reads one formula: dollar signs, which would end it and begin another guess, are gone (`_without_marks`).
    """
    parse, _ = _verifier()
    return list(parse(f"${answer}$", parsing_timeout=None))


@functools.cache
def _verifier() -> tuple[Any, Any]:
    # It warns for every process that its time limit is off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    import math_verify

    return math_verify.parse, math_verify.verify


def _without_marks(answer: str) -> str:
    r"""On one line, without dollar and percent signs (MATH writes "10\%" and "10"), `\(` or `\[`, and a last period."""
    for mark in ("\\$", "$", "\\%", "%"):
        answer = answer.replace(mark, "")
    answer = " ".join(answer.split()).rstrip(".")
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        if answer.startswith(opening) and answer.endswith(closing):
            answer = answer[2:-2]
    return answer.strip()
