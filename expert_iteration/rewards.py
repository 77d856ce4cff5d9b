"""Rewards: problems and responses in, a number or named components out.

Every reward function has the signature of `RewardFn` and takes a whole batch:
`reward(problems, responses) -> list of rewards`, one for each response. `problems[i]` (an
`expert_iteration.tasks.Problem`: `question`, `answer`, `metadata`) is what `responses[i]` answers; responses are text
without special tokens. A reward is a number, or a dictionary of components: each a number, or a pair of number and
weight (1 where there is none). The reward is then their weighted sum, and each component is logged, before weighting,
as `collector/reward/<name>` and `eval/reward/<name>`. Your own plugs in with `reward.fn` (`user_functions.py`); what
becomes of one that fails is `judging.py`'s.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from expert_iteration import answers
from expert_iteration.ifeval import ifeval_follow as ifeval_follow

if TYPE_CHECKING:
    from expert_iteration.tasks import Problem

Reward = float | Mapping[str, float | tuple[float, float]]
RewardFn = Callable[[Sequence["Problem"], Sequence[str]], Sequence[Reward]]
CorrectFn = Callable[[Sequence["Problem"], Sequence[str]], list[bool]]
FormatFn = Callable[[str], bool]

_INTEGER = re.compile(r"[+-]?[0-9]+")


def total(reward: Reward) -> float:
    """The number, or the weighted sum of the components.

    The sum is rounded to nine decimals, so that what is 1 on paper reaches a threshold of 1.
    """
    if not isinstance(reward, Mapping):
        return float(reward)
    return round(float(sum(value * weight for value, weight in map(weighted, reward.values()))), 9)


def components_of(reward: Reward) -> dict[str, float]:
    """Each component before weighting, by name; {} of a plain number."""
    if not isinstance(reward, Mapping):
        return {}
    return {name: weighted(part)[0] for name, part in reward.items()}


def weighted(part: float | tuple[float, float]) -> tuple[float, float]:
    """A component as number and weight."""
    value, weight = part if isinstance(part, tuple) else (part, 1.0)
    return float(value), float(weight)


def _inside(tag: str, response: str) -> str:
    """What the first such tag holds, stripped; "" without one. Only the first counts, so guessing twice is no use."""
    return answers.inside(tag, response) or ""


# GSM8K


def gsm8k_correct(response: str, answer: str, mode: str = "auto") -> bool:
    """Whether the answer of a response is the ground truth, compared as exact numbers: 72, 72.0 and $72 are equal.

    Args:
        response: text, special tokens removed.
        answer: the ground truth, bare or ending in `#### 72`.
        mode: where the answer is looked for, one of `answers.MODES`.

    Raises:
        UserError: unknown mode.
    """
    return answers.holds_answer(response, answer, mode)


def gsm8k_reward(response: str, answer: str) -> float:
    """1.0 for the right number in `<answer>`, 0.1 for a wrong one, 0.0 without one.

    The values of TorchRL's `GSM8KRewardParser`. The tag is what 0.1 is paid for, and it is the form that the task's
    system prompt asks for, so no other is looked for, whatever `reward.answer_mode` says of what passes. Deliberate
    differences: numbers are compared, not text ("5 km" is "5", "072.50" is "72.5", and "1,2" is not "12"), and what
    stands in a closed `<think>` block is no answer.
    """
    given = answers.find_answer(response, "answer_tag")
    if not given:
        return 0.0
    return 1.0 if gsm8k_correct(response, answer, "answer_tag") else 0.1


# Of gsm8k_granular: a wrong answer earns at most FORMAT_WEIGHT, a right one at least 1.
FORMAT_WEIGHT = 0.2
BREVITY_WEIGHT = 0.1
HALF_BREVITY = 1000
"""Characters at which brevity is one half."""


def gsm8k_granular(response: str, answer: str, *, brief: bool = False) -> dict[str, tuple[float, float]]:
    """GSM8K's reward in parts, value and weight each. No wrong answer earns as much as a right one, which earns 1.

    answer (weight 1): 1 for the right number, wherever `auto` finds it.
    format (weight 0.2): half of it for a closed `<think>` with a thought, half for one number in a closed `<answer>`.
    brevity (with `brief`, weight 0.1): of a right answer 1000 / (1000 + its characters), so that no two lengths tie; of
        a wrong one 0, or the shortest guess would win a group without a right answer.
    """
    correct = gsm8k_correct(response, answer)
    stated = answers.find_answer(response, "answer_tag")
    has_number = stated is not None and answers.read_number(stated) is not None
    parts = {
        "answer": (float(correct), 1.0),
        "format": (0.5 * (_inside("think", response) != "") + 0.5 * has_number, FORMAT_WEIGHT),
    }
    if brief:
        parts["brevity"] = (correct * HALF_BREVITY / (HALF_BREVITY + len(response)), BREVITY_WEIGHT)
    return parts


# Tiny


def tiny_correct(response: str, answer: str) -> bool:
    """Whether `<answer>` holds the right integer."""
    given, truth = _inside("answer", response), answer.rpartition("####")[2].strip()
    return _INTEGER.fullmatch(given) is not None and answers.read_number(given) == answers.read_number(truth)


def tiny_reward(response: str, answer: str) -> float:
    """1.0 for the right integer in `<answer>` after thinking, 0.9 without a thought.

    A wrong response earns 0.1 for a thought and 0.1 for any integer. Closeness earns nothing: it would let wrong
    responses win whole groups.
    """
    thought = _inside("think", response) != ""
    if tiny_correct(response, answer):
        return 1.0 if thought else 0.9
    return 0.1 * (thought + (_INTEGER.fullmatch(_inside("answer", response)) is not None))


def has_thought_and_answer(response: str) -> bool:
    """Whether a response has the form that tiny and gsm8k ask for: something in `<think>` and in `<answer>`."""
    return _inside("think", response) != "" and _inside("answer", response) != ""


def has_answer(response: str) -> bool:
    """Whether there is something in `<answer>`, without which ifeval's reward judges nothing."""
    return _inside("answer", response) != ""


def score_each(score: Callable[[str, str], Any], problems: Sequence["Problem"], responses: Sequence[str]) -> list[Any]:
    """Apply `score(response, answer)` to each pair; `functools.partial` of it is a batched function."""
    return [score(response, problem.answer) for problem, response in zip(problems, responses, strict=True)]


def gsm8k_corrects(problems: Sequence["Problem"], responses: Sequence[str], mode: str = "auto") -> list[bool]:
    """`gsm8k_correct` of a batch, the answers looked for by `mode` (`reward.answer_mode`)."""
    return score_each(functools.partial(gsm8k_correct, mode=mode), problems, responses)


gsm8k_rewards: RewardFn = functools.partial(score_each, gsm8k_reward)
gsm8k_granular_rewards: RewardFn = functools.partial(score_each, gsm8k_granular)
gsm8k_granular_brief_rewards: RewardFn = functools.partial(score_each, functools.partial(gsm8k_granular, brief=True))
tiny_rewards: RewardFn = functools.partial(score_each, tiny_reward)
tiny_corrects: CorrectFn = functools.partial(score_each, tiny_correct)
