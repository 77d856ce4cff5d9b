"""Which problems are held out, so that none of them is trained on.

A data set's own split for it, or, where it has none, problems chosen by the hash of their question: the same whatever
the order of the rows and whatever the seed.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import islice

from expert_iteration.errors import UserError
from expert_iteration.problems import Problem

Key = Callable[[Problem], str]


def choose_splits(
    there: Collection[str], split: str | None, eval_split: str | None, where: str
) -> tuple[str, str | None]:
    """The split to train on, and the one that is held out (None: there is none).

    Without `split` it is `train`, or the only one that is not for evaluation; without `eval_split` it is `test`.

    Raises:
        UserError: there is no such split; lists those that there are.
    """
    _check_names(there, split, eval_split, where)
    others = [name for name in there if name not in ("test", eval_split)]
    if split is None:
        if "train" not in others and len(others) != 1:
            raise UserError(
                f"{where} has the splits {', '.join(there)} and no 'train': name the one to train on with env.split."
            )
        split = "train" if "train" in others else others[0]
    if eval_split is None and split != "test" and "test" in there:
        eval_split = "test"
    return split, eval_split


def choose_split_alone(
    there: Collection[str], split: str | None, eval_split: str | None, where: str
) -> tuple[None, str]:
    """The same where nothing is trained: no split to train on, and the one to evaluate with.

    Without `eval_split` it is `test`, or where there is none the one of which a training would hold problems out.
    """
    _check_names(there, split, eval_split, where)
    if eval_split is None:
        eval_split = "test" if "test" in there else choose_splits(there, split, None, where)[0]
    return None, eval_split


def _check_names(there: Collection[str], split: str | None, eval_split: str | None, where: str) -> None:
    for key, name in (("env.split", split), ("env.eval_split", eval_split)):
        if name is not None and name not in there:
            raise UserError(f"{key}={name} is no split of {where}: choose one of {', '.join(there)}.")


def in_hash_order(problems: Iterable[Problem], key: Key) -> list[Problem]:
    """One problem of each key, in an order that depends on nothing but the questions' text."""
    by_key: dict[str, Problem] = {}
    for problem in sorted(problems, key=_content):
        by_key.setdefault(key(problem), problem)
    return sorted(by_key.values(), key=lambda problem: hashlib.sha256(problem.question.encode()).digest())


def _content(problem: Problem) -> tuple[str, str, str]:
    return problem.answer, problem.question, json.dumps(problem.metadata, sort_keys=True, default=str)


def leave_half_to_train_on(distinct: Sequence[Problem], count: int, where: str) -> None:
    """Refuse to take more than half of the problems out of training."""
    most = len(distinct) // 2
    if count > most:
        remedy = f"lower it to at most {most}" if most else "give more rows, or a split for evaluation"
        raise UserError(
            f"eval.num_prompts ({count}) is more than half of the {len(distinct)} questions of {where}, which has no "
            f"split for evaluation, so they are taken out of training: {remedy}."
        )


def first(heldout: Sequence[Problem], count: int, where: str, fits: Callable[[Problem], bool]) -> list[Problem]:
    """The first of the held-out problems that fit."""
    taken = list(islice(filter(fits, heldout), count))
    if len(taken) < count:
        are = "" if len(taken) == len(heldout) else " that are short enough"
        remedy = (
            f"lower it to at most {len(taken)}"
            if taken
            else "raise inference_model.max_model_len, or lower inference_model.max_tokens"
        )
        raise UserError(
            f"eval.num_prompts ({count}) is more than the {len(taken)} held-out problems of {where}{are}: {remedy}."
        )
    return taken


def without_overlap(
    train: Sequence[Problem], heldout: Sequence[Problem], key: Key
) -> tuple[list[Problem], list[Problem]]:
    """The training problems whose keys are not held out, and the others, without those that are held out themselves."""
    keys, themselves = {key(problem) for problem in heldout}, {id(problem) for problem in heldout}
    kept: list[Problem] = []
    removed: list[Problem] = []
    for problem in train:
        if key(problem) not in keys:
            kept.append(problem)
        elif id(problem) not in themselves:
            removed.append(problem)
    return kept, removed
