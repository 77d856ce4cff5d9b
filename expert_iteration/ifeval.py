"""IFEval: which instructions does a response follow? The judgements, the reward, the task's pass and its figures.

What is judged for what:

- the reward, as in TorchRL: what stands in the first `<answer>`. Without one nothing is followed.
- the task's pass and its figures: the same where there is an `<answer>`, else the whole response. The system prompt
  asks for the tags; a model that was never asked to write them, or has not learned to, is judged as the benchmark does.

The libraries of the checkers are imported when the first response is judged, or by `prepare`.
"""

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from expert_iteration.ifeval_instructions import Instruction, read_instructions
from expert_iteration.installation import require

if TYPE_CHECKING:
    from expert_iteration.problems import Problem

REQUIREMENTS = ("nltk", "langdetect")

# Judgements that are kept: a batch is judged for its reward, its pass and its figures, one after the other.
_CACHE_SIZE = 8192


class Followed(NamedTuple):
    """For each instruction of a prompt, whether a text follows it."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def ifeval_follow(
    prompt: str, instruction_id_list: Sequence[str], kwargs: Sequence[dict[str, Any]], response: str
) -> tuple[list[bool], list[bool]]:
    """Whether a response follows each instruction, strictly and loosely, as google-research's benchmark judges it.

    Strictly, the text as it is, which must hold more than white space. Loosely, any of eight: the text, it without
    its first line, without its last, without both; and each of them without asterisks. The same in every process.

    Args:
        prompt: part of the benchmark's signature; what its 25 kinds of instructions need of it is in `kwargs`.
        instruction_id_list: kinds, `ifeval_instructions.ARGUMENTS`.
        kwargs: for each its arguments; those that are None are not there.
        response: judged as a whole, tags included.

    Raises:
        ValueError: an unknown kind, or arguments that are missing or impossible.
    """
    followed = _follow(read_instructions(list(instruction_id_list), list(kwargs)), response)
    return list(followed.strict), list(followed.loose)


def ifeval_rewards(problems: Sequence["Problem"], responses: Sequence[str]) -> list[float]:
    """TorchRL's IFEval reward, 0 to 1.15, of what stands in the first `<answer>`.

    0.4 if all instructions are followed strictly, 0.2 if loosely, 0.3 and 0.1 times the shares that are; and, followed
    or not, 0.1 for exactly one `<answer>` and 0.05 for exactly one `<think>` block.
    """
    return [_reward(problem, response) for problem, response in zip(problems, responses, strict=True)]


def ifeval_corrects(problems: Sequence["Problem"], responses: Sequence[str]) -> list[bool]:
    """Whether every instruction is followed strictly: IFEval's prompt-level strict accuracy is their mean."""
    return [all(followed.strict) for followed in _judge(problems, responses)]


def ifeval_figures(problems: Sequence["Problem"], responses: Sequence[str]) -> dict[str, float]:
    """The benchmark's four accuracies of responses, of which there is at least one.

    Prompt-level: the share of responses that follow all their instructions. Instruction-level: the share of all
    instructions of all responses that are followed, so a prompt with three counts three times.
    """
    judged = _judge(problems, responses)
    figures = {}
    for name, rows in (("strict", [one.strict for one in judged]), ("loose", [one.loose for one in judged])):
        figures[f"prompt_level_{name}_acc"] = sum(all(row) for row in rows) / len(rows)
        figures[f"inst_level_{name}_acc"] = sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    return figures


def check_requirements() -> None:
    """Refuse early, and without importing them, when a library of the checkers is missing."""
    require(REQUIREMENTS, "env.dataset=ifeval", "requirements_ifeval.txt")


def prepare() -> None:
    """Import the checkers, and have them load what they count sentences and tell languages by."""
    kinds = ["language:response_language", "length_constraints:number_sentences"]
    ifeval_follow("", kinds, [{"language": "en"}, {"num_sentences": 1, "relation": "at least"}], "One sentence.")


def _reward(problem: "Problem", response: str) -> float:
    answers, thoughts = _blocks("answer", response), _blocks("think", response)
    followed = _follow(_instructions_of(problem), answers[0] if answers else "")
    terms = (
        0.4 * all(followed.strict),
        0.3 * sum(followed.strict) / len(followed.strict),
        0.2 * all(followed.loose),
        0.1 * sum(followed.loose) / len(followed.loose),
        0.1 * (len(answers) == 1),
        0.05 * (len(thoughts) == 1),
    )
    # Rounded, so that what is 1.1 on paper reaches a threshold of 1.1.
    return round(sum(terms), 9)


def _judge(problems: Sequence["Problem"], responses: Sequence[str]) -> list[Followed]:
    """The first `<answer>`, or the whole response where there is none."""
    return [
        _follow(_instructions_of(problem), next(iter(_blocks("answer", response)), response))
        for problem, response in zip(problems, responses, strict=True)
    ]


def _instructions_of(problem: "Problem") -> tuple[Instruction, ...]:
    return read_instructions(problem.metadata["instruction_id_list"], problem.metadata["kwargs"])


def _blocks(tag: str, response: str) -> list[str]:
    """What stands in each such tag."""
    # After the last closing tag there is nothing to find; to look there from each opening one takes quadratic time.
    end = response.rfind(f"</{tag}>") + len(f"</{tag}>")
    return re.findall(f"<{tag}>(.*?)</{tag}>", response[:end], flags=re.DOTALL)


@functools.lru_cache(maxsize=_CACHE_SIZE)
def _follow(instructions: tuple[Instruction, ...], text: str) -> Followed:
    check_requirements()
    from expert_iteration.ifeval_checkers import check_of

    variants = [variant for variant in _loose_variants(text) if variant.strip()]
    checks = [check_of(instruction) for instruction in instructions]
    strict = tuple(text.strip() != "" and check(text) for check in checks)
    # The text as it is, is one of the variants.
    loose = tuple(
        is_strict or any(check(variant) for variant in variants)
        for check, is_strict in zip(checks, strict, strict=True)
    )
    return Followed(strict, loose)


def _loose_variants(text: str) -> list[str]:
    """The other texts that count when an instruction is judged loosely."""
    lines = text.split("\n")
    parts = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = dict.fromkeys([*parts, *(part.replace("*", "") for part in parts)])
    return [variant for variant in variants if variant != text]
