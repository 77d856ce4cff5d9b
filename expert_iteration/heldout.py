"""Which problems are held out, so that none of them is trained on.

A data set's own split for it, or, where it has none, problems chosen by the hash of their question: the same whatever
the order of the rows and whatever the seed.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Sequence

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
    for key, name in (("env.split", split), ("env.eval_split", eval_split)):
        if name is not None and name not in there:
            raise UserError(f"{key}={name} is no split of {where}: choose one of {', '.join(there)}.")
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


def in_hash_order(problems: Iterable[Problem], key: Key) -> list[Problem]:
    """One problem of each key, in an order that depends on nothing but the questions' text."""
    by_key: dict[str, Problem] = {}
    for problem in sorted(problems, key=_content):
        by_key.setdefault(key(problem), problem)
    return sorted(by_key.values(), key=lambda problem: hashlib.sha256(problem.question.encode()).digest())


def _content(problem: Problem) -> tuple[str, str, str]:
    return problem.answer, problem.question, json.dumps(problem.metadata, sort_keys=True, default=str)


def hold_out(problems: Sequence[Problem], count: int, key: Key, where: str) -> list[Problem]:
    """So many of the problems, of which at least as many must stay to train on."""
    distinct = in_hash_order(problems, key)
    if count > len(distinct) // 2:
        raise UserError(
            f"eval.num_prompts ({count}) is more than half of the {len(distinct)} questions of {where}, which has no "
            f"split for evaluation, so they are taken out of training: lower it to at most {len(distinct) // 2}."
        )
    return distinct[:count]


def first(heldout: Sequence[Problem], count: int, where: str) -> list[Problem]:
    """The first of the held-out problems."""
    if count > len(heldout):
        raise UserError(
            f"eval.num_prompts ({count}) is more than the {len(heldout)} held-out problems of {where}: "
            f"lower it to at most {len(heldout)}."
        )
    return list(heldout[:count])


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
