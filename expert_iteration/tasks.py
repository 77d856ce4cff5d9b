"""Tasks: prompts and ground truths, which of them are held out, and how responses are judged.

`env.dataset` names a task of the table in `sources.py`; `env.dataset_path` or `env.dataset_name` replaces its rows by
others with the same columns, and `reward.fn` its reward.

Imports no torch, and `datasets` only to load with it.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from expert_iteration.config import Config, Selection, collects
from expert_iteration.errors import UserError
from expert_iteration.heldout import (
    choose_split_alone,
    choose_splits,
    first,
    in_hash_order,
    leave_half_to_train_on,
    without_overlap,
)
from expert_iteration.hub_data import read_hub
from expert_iteration.problem_reader import ProblemReader
from expert_iteration.problems import Problem
from expert_iteration.prompt_limit import Fits, PromptLimit, fits_always, quote
from expert_iteration.reward_sum import load_reward
from expert_iteration.rewards import CorrectFn, FormatFn, RewardFn
from expert_iteration.rows import Splits, first_three, read_path
from expert_iteration.seeds import derive_seed
from expert_iteration.sources import FiguresFn, Source, is_generated, source_of

if TYPE_CHECKING:
    from expert_iteration.expert_set_reader import Example

__all__ = ["FiguresFn", "Problem", "Task", "load_task", "task_without_problems"]


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


def load_task(cfg: Config, limit: PromptLimit | None = None) -> Task:
    """The task that `env.dataset` names, `eval.num_prompts` problems held out; with `eval.only` none to train on.

    Args:
        cfg: the configuration.
        limit: problems whose prompts are longer are not looked at; None: there is no limit.

    Raises:
        UserError: unknown data set, path or hub that cannot be read, missing split or columns, no usable row, or more
            held-out problems asked for than there can be. It says which rows were skipped before, too.
    """
    source = source_of(cfg)
    source.check()
    task = _with_generated(cfg, source, limit) if is_generated(cfg) else _with_rows(cfg, source, limit)
    task = replace(task, notes=(*task.notes, *_long_ones(limit), *_describe_pass(task, cfg)))
    reward = load_reward(cfg.reward)
    return task if reward is None else replace(task, reward=reward, notes=(*task.notes, *_describe_least(cfg)))


def task_without_problems(cfg: Config) -> Task:
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


def _with_generated(cfg: Config, source: Source, limit: PromptLimit | None) -> Task:
    assert source.generate is not None, "is_generated looked"
    train, heldout = source.generate()
    task = task_without_problems(cfg)
    fits = fits_always if limit is None else limit.under(task.system_prompt)
    with _telling(lambda: _long_ones(limit)):
        return replace(
            task,
            train=[] if cfg.eval.only else _to_train_on(train, cfg, fits, task.name),
            heldout=first(heldout, cfg.eval.num_prompts, task.name, fits),
        )


def _with_rows(cfg: Config, source: Source, limit: PromptLimit | None) -> Task:
    where, splits = _open(cfg, source)
    choose = choose_split_alone if cfg.eval.only else choose_splits
    split, eval_split = choose(splits, cfg.env.split, cfg.env.eval_split, where)
    reader = ProblemReader(source, cfg.env, where)
    with _telling(lambda: [*reader.notes, *_long_ones(limit)]):
        train = [] if split is None else reader.read(splits[split](), split)
        pool = in_hash_order(train if eval_split is None else reader.read(splits[eval_split](), eval_split), source.key)
        task = task_without_problems(cfg)
        if reader.system_message is not None:
            task = replace(task, system_prompt=reader.system_message)
        fits = fits_always if limit is None else limit.under(task.system_prompt)
        if eval_split is None:
            leave_half_to_train_on(pool, cfg.eval.num_prompts, where)
        heldout = first(pool, cfg.eval.num_prompts, where, fits)
        train, removed = without_overlap(train, heldout if eval_split is None else pool, source.key)
        notes = [*reader.notes, *_describe_repetitions(train, removed, source)]
        train = [] if split is None else _to_train_on(train, cfg, fits, where)
    return replace(task, train=train, heldout=heldout, notes=tuple(notes))


@contextmanager
def _telling(notes: Callable[[], list[str]]) -> Iterator[None]:
    """Have a mistake say what was left out before, which may be its cause."""
    try:
        yield
    except UserError as error:
        told = "; ".join(note.removeprefix("note: ") for note in notes())
        if not told:
            raise
        raise UserError(f"{error} (Before, {told})") from error


def _long_ones(limit: PromptLimit | None) -> list[str]:
    return [] if limit is None else limit.notes()


def _open(cfg: Config, source: Source) -> tuple[str, Splits]:
    """Where the data are, and their splits."""
    if cfg.env.dataset_path is not None:
        return cfg.env.dataset_path, read_path(Path(cfg.env.dataset_path).expanduser())
    name, config = _place_on_hub(cfg, source)
    return name, read_hub(name, config)


def _place_on_hub(cfg: Config, source: Source) -> tuple[str, str | None]:
    """The data set's name and configuration."""
    if cfg.env.dataset_name is not None:
        return cfg.env.dataset_name, cfg.env.dataset_config
    if source.hub_id is None:
        raise UserError(f"env.dataset={cfg.env.dataset} needs data: set env.dataset_path or env.dataset_name.")
    return source.hub_id, cfg.env.dataset_config or source.hub_config


def _to_train_on(train: list[Problem], cfg: Config, fits: Fits, where: str) -> list[Problem]:
    """`env.max_prompts` of those that fit, in their order; what a smaller number draws, a larger one draws too."""
    if not train:
        raise UserError(f"{where} has no training question that is not held out: give other rows to train on.")
    order = list(range(len(train)))
    if cfg.env.max_prompts is not None and cfg.env.shuffle:
        random.Random(derive_seed(cfg.seed, "max_prompts")).shuffle(order)
    # Half a million prompts take minutes to tokenize.
    with tqdm(order, desc=f"measuring the prompts of {where}", unit=" prompts", delay=3.0, leave=False) as measured:
        chosen = sorted(islice((index for index in measured if fits(train[index])), cfg.env.max_prompts))
    if chosen:
        return [train[index] for index in chosen]
    raise UserError(
        f"No prompt of {where} is left for training, as all are too long: raise inference_model.max_model_len, or "
        "lower inference_model.max_tokens."
    )


def _describe_repetitions(train: list[Problem], removed: list[Problem], source: Source) -> list[str]:
    """What was done about questions that come more than once."""
    notes = []
    if removed:
        notes.append(
            f"note: {len(removed)} training prompts were left out, for they are held out for evaluation as well (white "
            f"space and case apart): {first_three([quote(problem) for problem in removed])}"
        )
    # Kept, as how often a question stands in a data set is its author's choice: each is a group of its own.
    counts = Counter(map(source.key, train))
    if len(counts) < len(train):
        notes.append(f"note: {len(train) - len(counts)} training prompts repeat an earlier one; all are trained on")
    return notes


def _describe_pass(task: Task, cfg: Config) -> list[str]:
    if task.correct is not None or cfg.reward.pass_threshold is not None:
        return []
    return [
        "note: without ground truths a response counts as right if its reward is at least 1 (reward.pass_threshold)"
    ]


def _describe_least(cfg: Config) -> list[str]:
    """Of a reward that is not the task's: what the selection asks for may be out of its reach."""
    train = cfg.train
    bars = {
        "train.selection_threshold": train.selection_threshold if train.selection is Selection.threshold else None,
        # Under the random control it only lowers how many are drawn.
        "train.min_reward": None if train.selection is Selection.random else train.min_reward,
    }
    known = {key: bar for key, bar in bars.items() if bar is not None}
    if not known or not collects(cfg):
        return []
    key = max(known, key=lambda key: known[key])
    return [f"note: of this reward, too, nothing below {known[key]:g} is kept ({key})"]
