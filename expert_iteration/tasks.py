"""Tasks: prompts and ground truths, which of them are held out, and how responses are judged.

`env.dataset` names a task of the table in `sources.py`; `env.dataset_path` or `env.dataset_name` replaces its rows by
others with the same columns, and `reward.fn` its reward.

Imports no torch, and `datasets` only to load with it.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from expert_iteration.errors import UserError
from expert_iteration.heldout import choose_splits, first, hold_out, in_hash_order, without_overlap
from expert_iteration.hub_data import read_hub
from expert_iteration.problem_reader import ProblemReader
from expert_iteration.problems import Problem
from expert_iteration.reward_sum import load_reward
from expert_iteration.rewards import CorrectFn, FormatFn, RewardFn
from expert_iteration.rows import brief, first_three, read_path
from expert_iteration.seeds import derive_seed
from expert_iteration.sources import FiguresFn, Source, is_generated, source_of

if TYPE_CHECKING:
    from expert_iteration.config import Config
    from expert_iteration.expert_set_reader import Example

__all__ = ["FiguresFn", "Problem", "Task", "load_task", "task_without_problems", "without_long_prompts"]


@dataclass(frozen=True)
class Task:
    """Problems and how to judge responses to them."""

    name: str
    system_prompt: str | None
    train: list[Problem]
    heldout: list[Problem]
    """Never trained on: no question of it is in `train`."""
    reward: RewardFn
    correct: CorrectFn | None
    """The task's own pass, whatever the reward; None: there is no ground truth, and the reward decides."""
    has_format: FormatFn
    """Whether a response has the form that the task asks for, right or wrong."""
    figures: FiguresFn | None = None
    """Further figures of an evaluation."""
    notes: tuple[str, ...] = ()
    """What its loading has to tell the user."""
    examples: "Sequence[Example]" = ()
    """Responses to imitate as they are; nothing is sampled then (`train.from_expert_set`)."""


def load_task(cfg: "Config") -> Task:
    """The task that `env.dataset` names, `eval.num_prompts` problems held out.

    Raises:
        UserError: unknown data set, path or hub that cannot be read, missing split or columns, no usable row, or more
            held-out problems asked for than there can be.
    """
    source = source_of(cfg)
    source.check()
    task = _with_generated(cfg, source) if is_generated(cfg) else _with_rows(cfg, source)
    task = replace(task, train=_at_most(task.train, cfg), notes=(*task.notes, *_describe_pass(task, cfg)))
    reward = load_reward(cfg.reward)
    return task if reward is None else replace(task, reward=reward)


def task_without_problems(cfg: "Config") -> Task:
    """How the task puts its prompts and judges responses; its data are not looked for."""
    source, given = source_of(cfg), cfg.env.system_prompt
    return Task(
        name=str(cfg.env.dataset),
        system_prompt=source.system_prompt if given is None else given or None,
        train=[],
        heldout=[],
        reward=source.reward,
        correct=source.correct,
        has_format=source.has_format,
        figures=source.figures,
    )


def without_long_prompts(task: Task, count_tokens: Callable[[Problem], int], limit: int) -> Task:
    """The task without the problems whose prompts are longer than `limit` tokens, and with a note that counts them.

    Raises:
        UserError: none is left to train on or to evaluate with.
    """
    lengths = {id(problem): count_tokens(problem) for problem in (*task.train, *task.heldout)}
    train, heldout = (
        [problem for problem in problems if lengths[id(problem)] <= limit] for problems in (task.train, task.heldout)
    )
    if not train or not heldout:
        raise UserError(
            f"No prompt of {task.name} is left for {'evaluation' if train else 'training'}: with the chat template all "
            f"have more than {limit} tokens (inference_model.max_model_len less max_tokens). Raise max_model_len."
        )
    long = [problem for problem in (*task.train, *task.heldout) if lengths[id(problem)] > limit]
    if not long:
        return task
    note = (
        f"note: {len(long)} prompts were left out ({len(task.heldout) - len(heldout)} of them held out), for they have "
        f"more than {limit} tokens: {first_three([f'{_quote(p)} ({lengths[id(p)]})' for p in long])}"
    )
    return replace(task, train=train, heldout=heldout, notes=(*task.notes, note))


def _with_generated(cfg: "Config", source: Source) -> Task:
    assert source.generate is not None, "is_generated looked"
    train, heldout = source.generate()
    task = task_without_problems(cfg)
    return replace(task, train=train, heldout=first(heldout, cfg.eval.num_prompts, task.name))


def _with_rows(cfg: "Config", source: Source) -> Task:
    if cfg.env.dataset_path is not None:
        where, splits = cfg.env.dataset_path, read_path(Path(cfg.env.dataset_path).expanduser())
    else:
        name, config = _place_on_hub(cfg, source)
        where, splits = name, read_hub(name, config)
    split, eval_split = choose_splits(splits, cfg.env.split, cfg.env.eval_split, where)
    reader = ProblemReader(source, cfg.env, where)
    train = reader.read(splits[split](), split)
    if eval_split is None:
        never_trained_on = heldout = hold_out(train, cfg.eval.num_prompts, source.key, where)
    else:
        never_trained_on = in_hash_order(reader.read(splits[eval_split](), eval_split), source.key)
        heldout = first(never_trained_on, cfg.eval.num_prompts, where)
    train, removed = without_overlap(train, never_trained_on, source.key)
    if not train:
        raise UserError(f"{where} has no training question that is not held out: give other rows to train on.")
    task = task_without_problems(cfg)
    return replace(
        task,
        system_prompt=task.system_prompt if reader.system_message is None else reader.system_message,
        train=train,
        heldout=heldout,
        notes=(*reader.notes, *_describe_repetitions(train, removed, source)),
    )


def _place_on_hub(cfg: "Config", source: Source) -> tuple[str, str | None]:
    """The data set's name and configuration."""
    if cfg.env.dataset_name is not None:
        return cfg.env.dataset_name, cfg.env.dataset_config
    if source.hub_id is None:
        raise UserError(f"env.dataset={cfg.env.dataset} needs data: set env.dataset_path or env.dataset_name.")
    return source.hub_id, cfg.env.dataset_config or source.hub_config


def _at_most(train: list[Problem], cfg: "Config") -> list[Problem]:
    """`env.max_prompts` of them, in their order; what a smaller number draws, a larger one draws too."""
    count = cfg.env.max_prompts
    if count is None or count >= len(train):
        return train
    chosen = list(range(len(train)))
    if cfg.env.shuffle:
        random.Random(derive_seed(cfg.seed, "max_prompts")).shuffle(chosen)
    return [train[index] for index in sorted(chosen[:count])]


def _describe_repetitions(train: list[Problem], removed: list[Problem], source: Source) -> list[str]:
    """What was done about questions that come more than once."""
    notes = []
    if removed:
        notes.append(
            f"note: {len(removed)} training prompts were left out, for they are held out for evaluation as well (white "
            f"space and case apart): {first_three([_quote(problem) for problem in removed])}"
        )
    # Kept, as how often a question stands in a data set is its author's choice: each is a group of its own.
    counts = Counter(map(source.key, train))
    if len(counts) < len(train):
        notes.append(f"note: {len(train) - len(counts)} training prompts repeat an earlier one; all are trained on")
    return notes


def _describe_pass(task: Task, cfg: "Config") -> list[str]:
    if task.correct is not None or cfg.reward.pass_threshold is not None:
        return []
    return [
        "note: without ground truths a response counts as right if its reward is at least 1 (reward.pass_threshold)"
    ]


def _quote(problem: Problem) -> str:
    return f"'{brief(problem.question, 60)}'"
