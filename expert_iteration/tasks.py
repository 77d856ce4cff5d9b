"""Tasks: where the prompts and ground truths come from, which of them are held out, and how responses are judged.

`env.dataset` names a task; `env.dataset_path` replaces its rows by your own file or directory with the same columns,
and `reward.fn` its reward. Held-out problems are the data set's own test split, or, where it has none, rows chosen by
the hash of their question and taken out of training: the same rows whatever their order and whatever the seed.

Imports no torch, and `datasets` only to load with it.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_iteration import ifeval, rewards, tiny
from expert_iteration.errors import UserError
from expert_iteration.rewards import CorrectFn, FormatFn, RewardFn
from expert_iteration.rows import first_three, read_hub, read_path

if TYPE_CHECKING:
    from expert_iteration.config import Config
    from expert_iteration.expert_set_reader import Example

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """One row of a task."""

    question: str
    """The user's turn."""
    answer: str
    """Ground truth in the data set's own form (gsm8k and tiny: ends in `#### x`); "" where there is none."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Further columns the reward needs (ifeval: key, instruction_id_list, kwargs)."""


@dataclass(frozen=True)
class Task:
    """Problems and how to judge responses to them."""

    name: str
    system_prompt: str | None
    train: list[Problem]
    heldout: list[Problem]
    """Never trained on: no question of it is in `train`."""
    reward: RewardFn
    correct: CorrectFn
    """The task's own pass, whatever the reward."""
    has_format: FormatFn
    """Whether a response has the form that the task asks for, right or wrong."""
    examples: "Sequence[Example]" = ()
    """Responses to imitate as they are; nothing is sampled then (`train.from_expert_set`)."""


@dataclass(frozen=True)
class Source:
    """A data set of rows: its place on the Hugging Face hub, its columns, its judges."""

    hub_id: str
    hub_config: str | None
    columns: tuple[str, ...]
    to_problem: Callable[[Row], Problem]
    """Raises ValueError, saying why, for a row that cannot be used."""
    system_prompt: str
    reward: RewardFn
    correct: CorrectFn
    has_format: FormatFn


def load_task(cfg: "Config") -> Task:
    """The task that `env.dataset` names, `eval.num_prompts` problems held out.

    Raises:
        UserError: unknown data set, path or hub that cannot be read, missing columns, no usable row, or more held-out
            problems asked for than there can be.
    """
    name = str(cfg.env.dataset)
    if name == "tiny":
        task = _tiny_task(cfg)
    elif name in SOURCES:
        task = _task_from_rows(name, SOURCES[name], cfg)
    else:
        raise UserError(f"env.dataset={name} is unknown: choose one of tiny, {', '.join(SOURCES)}.")
    if cfg.reward.fn is None:
        return task
    return replace(task, reward=rewards.load_reward_fn(cfg.reward.fn))


def task_without_problems(name: str) -> Task:
    """How a task puts its prompts and judges responses; its data are not looked for."""
    if name == "tiny":
        return Task(
            name=name,
            system_prompt=tiny.SYSTEM_PROMPT,
            train=[],
            heldout=[],
            reward=rewards.tiny_rewards,
            correct=rewards.tiny_corrects,
            has_format=rewards.has_thought_and_answer,
        )
    source = SOURCES[name]
    return Task(
        name=name,
        system_prompt=source.system_prompt,
        train=[],
        heldout=[],
        reward=source.reward,
        correct=source.correct,
        has_format=source.has_format,
    )


def without_long_prompts(task: Task, count_tokens: Callable[[Problem], int], limit: int) -> tuple[Task, int]:
    """The task without the problems whose prompts are longer than `limit` tokens, and how many those were.

    Raises:
        UserError: none is left to train on or to evaluate with.
    """
    train = [problem for problem in task.train if count_tokens(problem) <= limit]
    heldout = [problem for problem in task.heldout if count_tokens(problem) <= limit]
    if not train or not heldout:
        raise UserError(
            f"No prompt of {task.name} is left for {'evaluation' if train else 'training'}: with the chat template all "
            f"have more than {limit} tokens (inference_model.max_model_len less max_tokens). Raise max_model_len."
        )
    dropped = len(task.train) + len(task.heldout) - len(train) - len(heldout)
    return replace(task, train=train, heldout=heldout), dropped


def _tiny_task(cfg: "Config") -> Task:
    if cfg.env.dataset_path is not None:
        raise UserError(
            f"env.dataset_path={cfg.env.dataset_path} has no effect with env.dataset=tiny, which generates its "
            "problems: remove it, or choose env.dataset=gsm8k."
        )
    return replace(
        task_without_problems("tiny"),
        train=[Problem(problem.question, problem.answer) for problem in tiny.train_problems()],
        heldout=_first([Problem(p.question, p.answer) for p in tiny.heldout_problems()], cfg.eval.num_prompts, "tiny"),
    )


def _task_from_rows(name: str, source: Source, cfg: "Config") -> Task:
    if name == "ifeval":
        ifeval.check_requirements()
    if cfg.env.dataset_path is None:
        splits, where = read_hub(source.hub_id, source.hub_config), source.hub_id
    else:
        path = Path(cfg.env.dataset_path).expanduser()
        splits, where = read_path(path), str(path)
    if "train" not in splits:
        raise UserError(f"{where} has the splits {', '.join(splits)} and no 'train': save it with a train split.")
    train = _usable(splits["train"], source, where)
    if "test" in splits:
        heldout = _first(_hash_order(_usable(splits["test"], source, where)), cfg.eval.num_prompts, where)
    else:
        heldout = _hold_out(train, cfg.eval.num_prompts, where)
    questions = {problem.question for problem in heldout}
    train = [problem for problem in train if problem.question not in questions]
    if not train:
        raise UserError(f"{where} has no training question outside its test split: give other rows to train on.")
    return replace(task_without_problems(name), train=train, heldout=heldout)


# Held-out problems


def _hash_order(problems: Iterable[Problem]) -> list[Problem]:
    """Distinct questions in an order that depends on nothing but their text (and the answers of duplicates)."""
    by_question: dict[str, Problem] = {}
    for problem in sorted(problems, key=lambda problem: problem.answer):
        by_question.setdefault(problem.question, problem)
    return sorted(by_question.values(), key=lambda problem: hashlib.sha256(problem.question.encode()).digest())


def _hold_out(problems: list[Problem], count: int, where: str) -> list[Problem]:
    distinct = _hash_order(problems)
    if count > len(distinct) // 2:
        raise UserError(
            f"eval.num_prompts ({count}) is more than half of the {len(distinct)} questions of {where}, which has no "
            f"test split, so they are taken out of training: lower it to at most {len(distinct) // 2}."
        )
    return distinct[:count]


def _first(heldout: list[Problem], count: int, where: str) -> list[Problem]:
    if count > len(heldout):
        raise UserError(
            f"eval.num_prompts ({count}) is more than the {len(heldout)} held-out problems of {where}: "
            f"lower it to at most {len(heldout)}."
        )
    return heldout[:count]


# From rows to problems


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if isinstance(value, str):
        text = value.strip()
    elif isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        text = str(value)
    else:
        raise ValueError(f"no {column}")
    if not text:
        raise ValueError(f"empty {column}")
    return text


def _gsm8k_problem(row: Row) -> Problem:
    answer = _text(row, "answer")
    if not answer.rpartition("####")[2].strip():
        raise ValueError("nothing after ####")
    return Problem(_text(row, "question"), answer)


def _ifeval_problem(row: Row) -> Problem:
    ids, kwargs = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
        raise ValueError("instruction_id_list is not a list of names")
    if not isinstance(kwargs, list) or len(kwargs) != len(ids) or not all(isinstance(k, dict) for k in kwargs):
        raise ValueError("kwargs is not a list of one dictionary an instruction")
    return Problem(_text(row, "prompt"), "", {"key": row.get("key"), "instruction_id_list": ids, "kwargs": kwargs})


def _usable(rows: list[Any], source: Source, where: str) -> list[Problem]:
    """The problems in `rows`; unusable rows are counted and the first three named in a warning."""
    dicts = [row for row in rows if isinstance(row, dict)]
    present = {str(column) for row in dicts for column in row}
    missing = [column for column in source.columns if column not in present]
    if dicts and missing:
        raise UserError(
            f"{where} lacks the column(s) {', '.join(missing)}; it has {', '.join(sorted(present))}: "
            f"rename its columns to {', '.join(source.columns)}."
        )
    problems, skipped = [], []
    for number, row in enumerate(rows, start=1):
        try:
            problems.append(source.to_problem(row if isinstance(row, dict) else {}))
        except ValueError as error:
            skipped.append(f"row {number} ({error if isinstance(row, dict) else 'no JSON object'})")
    if skipped:
        logger.warning("%s: %d of %d rows skipped: %s", where, len(skipped), len(rows), first_three(skipped))
    if not problems:
        read = f"{len(rows)} rows read" + (f": {first_three(skipped)}" if skipped else "")
        raise UserError(f"{where} holds no usable row ({read}): give one with a {' and a '.join(source.columns[:2])}.")
    return problems


SOURCES = {
    "gsm8k": Source(
        hub_id="openai/gsm8k",
        hub_config="main",
        columns=("question", "answer"),
        to_problem=_gsm8k_problem,
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
        hub_config=None,
        columns=("prompt", "instruction_id_list", "kwargs"),
        to_problem=_ifeval_problem,
        system_prompt=(
            "Plan your response between <think> and </think>. Then write it between <answer> and </answer>, "
            "following every instruction of the user there."
        ),
        reward=ifeval.ifeval_rewards,
        correct=ifeval.ifeval_corrects,
        has_format=rewards.has_answer,
    ),
}
