"""The table of tasks: where the data of each are, which columns they have, how prompts are put, who judges.

Imports no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from expert_iteration import countdown, ifeval, math_answers, rewards, tiny
from expert_iteration.answers import find_answer, holds_answer
from expert_iteration.errors import UserError
from expert_iteration.problems import (
    Columns,
    Problem,
    Row,
    countdown_key,
    countdown_problem,
    gsm8k_problem,
    ifeval_problem,
    make_countdown_problem,
    math_problem,
    plain_problem,
    question_key,
)
from expert_iteration.rewards import CorrectFn, FormatFn, RewardFn

if TYPE_CHECKING:
    from expert_iteration.config import Config

FiguresFn = Callable[[Sequence[Problem], Sequence[str]], dict[str, float]]


@dataclass(frozen=True)
class Source:
    """A task's data and judges."""

    system_prompt: str | None
    reward: RewardFn
    correct: CorrectFn | None
    has_format: FormatFn
    figures: FiguresFn | None = None
    hub_id: str | None = None
    """On the Hugging Face hub; None: nothing is fetched that was not named."""
    hub_config: str | None = None
    prompt_columns: tuple[str, ...] = ()
    """The first of them that is there holds the user's turn; none: it is made of `other_columns`."""
    answer_columns: tuple[str, ...] = ()
    """The first of them that is there holds the ground truth; none: there is no such column."""
    other_columns: tuple[str, ...] = ()
    """Needed as well."""
    to_problem: Callable[[Row, Columns], Problem] = plain_problem
    key: Callable[[Problem], str] = question_key
    """Equal for problems of which only one may be trained on where the other is held out."""
    generate: Callable[[], tuple[list[Problem], list[Problem]]] | None = None
    """Problems to train on and held-out ones, for a task that needs no data; None: it does."""
    check: Callable[[], None] = lambda: None
    """Raises UserError where a library is missing."""


def source_of(cfg: "Config") -> Source:
    """The entry of `env.dataset`, with the judges that this configuration asks for.

    Raises:
        UserError: there is no such entry.
    """
    name, mode = str(cfg.env.dataset), str(cfg.reward.answer_mode)
    if name not in SOURCES:
        raise UserError(f"env.dataset={name} is unknown: choose one of {', '.join(SOURCES)}.")
    source = SOURCES[name]
    if name == "gsm8k":
        return replace(source, correct=partial(rewards.gsm8k_corrects, mode=mode))
    if name == "custom" and cfg.env.answer_column is not None:
        is_right = partial(rewards.score_each, partial(holds_answer, mode=mode))
        return replace(
            source,
            reward=partial(_one_if, is_right),
            correct=is_right,
            has_format=partial(_gives_answer, mode),
            answer_columns=(cfg.env.answer_column,),
        )
    return source


def has_answer_modes(cfg: "Config") -> bool:
    """Whether `reward.answer_mode` says anything to the task."""
    name = str(cfg.env.dataset)
    return name == "gsm8k" or (name == "custom" and cfg.env.answer_column is not None)


def is_generated(cfg: "Config") -> bool:
    """Whether the task makes its problems itself."""
    is_given = cfg.env.dataset_path is not None or cfg.env.dataset_name is not None
    return SOURCES[str(cfg.env.dataset)].generate is not None and not is_given


def _one_if(correct: CorrectFn, problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
    return [float(is_right) for is_right in correct(problems, responses)]


def _gives_answer(mode: str, response: str) -> bool:
    return bool(find_answer(response, mode, numeric=False))


def _no_reward(problems: Sequence[Problem], responses: Sequence[str]) -> list[float]:
    raise UserError(
        "env.dataset=custom without env.answer_column has no reward of its own: name the column with the ground truth, "
        "or give reward.fn."
    )


def _says_something(response: str) -> bool:
    return not response.isspace() and response != ""


def _generate_tiny() -> tuple[list[Problem], list[Problem]]:
    train, heldout = tiny.train_problems(), tiny.heldout_problems()
    return [Problem(p.question, p.answer) for p in train], [Problem(p.question, p.answer) for p in heldout]


def _generate_countdown() -> tuple[list[Problem], list[Problem]]:
    train, heldout = countdown.make_problems()
    return [make_countdown_problem(*p) for p in train], [make_countdown_problem(*p) for p in heldout]


SOURCES = {
    "tiny": Source(
        system_prompt=tiny.SYSTEM_PROMPT,
        reward=rewards.tiny_rewards,
        correct=rewards.tiny_corrects,
        has_format=rewards.has_thought_and_answer,
        generate=_generate_tiny,
    ),
    "gsm8k": Source(
        hub_id="openai/gsm8k",
        hub_config="main",
        prompt_columns=("question",),
        answer_columns=("answer",),
        to_problem=gsm8k_problem,
        system_prompt=(
            "Solve the problem step by step between <think> and </think>. "
            "Then write the result, only a number, between <answer> and </answer>."
        ),
        reward=rewards.gsm8k_rewards,
        correct=rewards.gsm8k_corrects,
        has_format=rewards.has_thought_and_answer,
    ),
    "ifeval": Source(
        hub_id="google/IFEval",
        prompt_columns=("prompt",),
        other_columns=("instruction_id_list", "kwargs"),
        to_problem=ifeval_problem,
        system_prompt=(
            "Plan your response between <think> and </think>. Then write it between <answer> and </answer>, "
            "following every instruction of the user there."
        ),
        reward=ifeval.ifeval_rewards,
        correct=ifeval.ifeval_corrects,
        figures=ifeval.ifeval_figures,
        has_format=rewards.has_answer,
        check=ifeval.check_requirements,
    ),
    "math": Source(
        hub_id="DigitalLearningGmbH/MATH-lighteval",
        prompt_columns=("problem",),
        answer_columns=("answer", "solution"),
        to_problem=math_problem,
        system_prompt=(
            "Solve the problem step by step between <think> and </think>. "
            "Then write the result alone, in LaTeX, between <answer> and </answer>."
        ),
        reward=math_answers.math_rewards,
        correct=math_answers.math_corrects,
        has_format=rewards.has_thought_and_answer,
        check=math_answers.check_requirements,
    ),
    "countdown": Source(
        other_columns=("nums", "target"),
        to_problem=countdown_problem,
        key=countdown_key,
        generate=_generate_countdown,
        system_prompt=countdown.SYSTEM_PROMPT,
        reward=countdown.countdown_rewards,
        correct=countdown.countdown_corrects,
        has_format=rewards.has_thought_and_answer,
    ),
    "custom": Source(
        prompt_columns=("prompt", "question"),
        system_prompt=None,
        reward=_no_reward,
        correct=None,
        has_format=_says_something,
    ),
}
