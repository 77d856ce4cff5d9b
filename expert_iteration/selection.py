"""`TopKRewardSelector`: whole groups of responses in, the expert responses out."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDictBase, lazy_stack
from torchrl._utils import logger as torchrl_logger
from torchrl.data.llm.topk import TopKRewardSelector as TorchRLTopKRewardSelector

from expert_iteration.config import Selection, Ties
from expert_iteration.errors import UserError
from expert_iteration.selection_rules import (
    Candidate,
    Rule,
    drop_duplicates,
    is_all_equal,
    normalize,
    tie_orders,
)
from expert_iteration.selection_stats import JudgedGroup, SelectionStats

Group = list[tuple[float, TensorDictBase]]  # rewards and rows, in the order in which they came


class TopKRewardSelector(TorchRLTopKRewardSelector):
    """Keeps the best responses of each group, where a group is one drawing of a prompt.

    Rows are gathered by their group until `total_dialog_turns` of it are there; then the group is judged, once, and
    forgotten, so memory holds the groups in flight and nothing else.

    At most `topk_size` responses of a group are kept, highest reward first, among equals by `ties`:

    - `above_median`: of those strictly above the group's lower median (TorchRL's rule).
    - `topk`: of all, unless all rewards of the group are equal.
    - `threshold`: of those that reach `threshold`, also where all are equal.
    - `percentile`: of those that reach the given percentile of all rewards of the batch and are above its least, also
      where a group's are all equal (Dong et al., 2023, arXiv:2304.06767, rank the batch as a whole). A batch is what
      one call of `select` completes.
    - `random`, the control for `above_median`: as many as that would keep, drawn uniformly from the same group.

    A response with a non-finite reward is dropped and its group judged on the others. With `dedup` so are, of
    responses with the same text up to case, white space and compatibility forms (NFKC), all but the best; medians and
    the like are of what remains. Below `min_reward` nothing is kept; under `random` that lowers how many are drawn and
    not which, for a control that left out the worst would select by reward after all.

    Use it as a replay-buffer transform, where `extend` writes what `_inv_call` returns (nothing for None) and sampling
    changes nothing, or call `select` on the writer's side. In a Compose, what is appended last inverts first: append
    what is to work on the kept responses, such as `RetrieveLogProb`, before the selector.

    Args:
        total_dialog_turns: responses in a group (TorchRL's name).
        topk_size: most responses kept of a group.
        prompt_key: TorchRL's name for `group_key`; give one of the two.
        rewards_key: float [1], or [T, 1] of which the mean counts.
        done_key: bool; every row is a whole dialog.
        verbose: log each selection.
        group_key: entry that identifies the group: an integer or a string. With the prompt's text, TorchRL's
            behaviour, equal prompts are one group and must not be in flight twice.
        text_key: string, the response; None: texts are not looked at, which `dedup` needs.
        tokens_key: int [T], the response's ids; None: not looked at, which `ties` other than "first" need.
        correct_key: bool [1], whether the response is right, for statistics; None: not looked at.
        selection: one of `config.Selection`.
        threshold: for "threshold".
        percentile: for "percentile", from 0 to below 100; that of the run's first batch.
        percentile_end: that of its last, for which `num_groups` must be known; None: the same.
        num_groups: of the run, from its start.
        ties: one of `config.Ties`. Under "shortest" (fewest tokens, then chance) and "random" (a hash of seed, group
            and ids) the order in which rows come does not matter.
        dedup: whether duplicates are dropped.
        min_reward: least reward that is kept; None: any.
        seed: of the random control and of ties.

    Raises:
        ValueError: `topk_size` exceeds `total_dialog_turns` (from TorchRL).
        UserError: unknown `selection` or `ties`, both `prompt_key` and `group_key`, or what a setting needs is not
            given.
        RuntimeError (when rows come in): a row is not done.

    `state_dict` holds counters, random state and the rows in flight; the latter are tensordicts, which a
    `torch.load(weights_only=True)` refuses.
    """

    # What is overridden of TorchRL 0.14.1, and why. __init__: its queues hold a lambda and cannot be pickled.
    # _inv_call: its queues are never cleared, so that a prompt seen again re-writes old winners and memory grows with
    # each prompt; a NaN reward drops the whole group; and splitting and concatenating tensordicts trajectory by
    # trajectory takes 0.2 s for 256 of them (4 ms here, 11 ms with texts and tokens).

    def __init__(
        self,
        total_dialog_turns: int,
        topk_size: int,
        prompt_key: NestedKey | None = None,
        rewards_key: NestedKey = ("next", "reward"),
        done_key: NestedKey = ("next", "done"),
        verbose: bool = False,
        *,
        group_key: NestedKey | None = None,
        text_key: NestedKey | None = None,
        tokens_key: NestedKey | None = None,
        correct_key: NestedKey | None = None,
        selection: str = "above_median",
        threshold: float | None = None,
        percentile: float | None = None,
        percentile_end: float | None = None,
        num_groups: int | None = None,
        ties: str = "first",
        dedup: bool = False,
        min_reward: float | None = None,
        seed: int = 0,
    ):
        if prompt_key is not None and group_key is not None:
            raise UserError(f"prompt_key ({prompt_key}) and group_key ({group_key}) are one setting: give one of them.")
        self.group_key = next((key for key in (group_key, prompt_key) if key is not None), "group_id")
        super().__init__(total_dialog_turns, topk_size, self.group_key, rewards_key, done_key, verbose)
        self.text_key, self.tokens_key, self.correct_key = text_key, tokens_key, correct_key
        if dedup and text_key is None:
            raise UserError("dedup needs text_key, by which responses are told apart: give it.")
        self.ties = _check_name("train.selection_ties", ties, Ties)
        if self.ties is not Ties.first and tokens_key is None:
            raise UserError(f"ties={ties} needs tokens_key, of which it is made: give it.")
        self.dedup, self.seed = dedup, seed
        self.rule = Rule(
            selection=_check_name("train.selection", selection, Selection),
            topk_size=topk_size,
            threshold=None if threshold is None else _as_float32(threshold),
            percentile=percentile,
            percentile_end=percentile if percentile_end is None else percentile_end,
            num_groups=num_groups,
            min_reward=-math.inf if min_reward is None else _as_float32(min_reward),
        )
        self.queues: dict[Hashable, Group] = {}
        self._random = random.Random(seed)
        self._stats = SelectionStats(knows_correct=correct_key is not None, knows_text=text_key is not None)

    def select(self, td: TensorDictBase) -> TensorDictBase | None:
        """Take rows in; return the kept rows of the groups they complete, lazily stacked, or None.

        Args:
            td: rows of whole dialogs, of batch size [N], [N, 1] or any other, in any mixture of groups.
        """
        rows = _unstack(td)
        if not torch.cat([row[self.done_key].reshape(-1) for row in rows]).all():
            raise RuntimeError(f"Every row must be a finished dialog, but not all of {self.done_key} is True.")
        complete: list[tuple[Hashable, Group]] = []
        for row, reward in zip(rows, self._rewards(rows), strict=True):
            key = _as_value(row[self.group_key])
            queue = self.queues.setdefault(key, [])
            queue.append((reward, row))
            if len(queue) == self.total_dialog_turns:
                complete.append((key, self.queues.pop(key)))
        kept = self._judge(complete) if complete else []
        return lazy_stack([_as_row(row) for row in kept]) if kept else None

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase | None:
        return self.select(tensordict)

    def stats(self) -> dict[str, float]:
        """Counts since the start over the groups judged, with their rates (0 before the first group).

        - groups_seen, groups_kept (of which something was kept), groups_all_equal (one reward in the running),
          responses_seen, responses_kept, nonfinite_rewards; groups_in_flight have not been judged yet.
        - acceptance_rate is responses kept / seen, all_equal_rate groups all equal / seen.
        - With `correct_key`, of all responses of a group: groups_all_right, groups_all_wrong,
          groups_by_pass_rate/<percent> for the bins 0, (0, 25], (25, 50], (50, 75], (75, 100) and 100, and
          batch_pass_rate, the mean over the groups of the last batch.
        - With `text_key`: duplicates_dropped, and batch_distinct_responses, the mean over the groups of the last batch,
          whether or not duplicates are dropped.
        - Under `percentile`: batch_percentile, that the last batch had to reach.
        """
        return {**self._stats.as_dict(), "groups_in_flight": len(self.queues)}

    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict` saves of this module, alone or inside a Compose or a replay buffer."""
        return {
            "queues": {key: list(queue) for key, queue in self.queues.items()},
            "random": self._random.getstate(),
            "stats": self._stats.state_dict(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """What `load_state_dict` restores."""
        self.queues = {key: list(queue) for key, queue in state["queues"].items()}
        self._random.setstate(state["random"])
        self._stats.load_state_dict(state["stats"])

    def _rewards(self, rows: list[TensorDictBase]) -> list[float]:
        """Reward of each row, the mean of what stands in it; one tensor operation for the whole batch."""
        values = [row[self.rewards_key].reshape(-1) for row in rows]
        lengths = torch.tensor([len(value) for value in values])
        return torch.segment_reduce(torch.cat(values).float().cpu(), "mean", lengths=lengths).tolist()

    def _judge(self, complete: list[tuple[Hashable, Group]]) -> list[TensorDictBase]:
        """The kept rows of whole groups, which come with their keys."""
        texts = [self._texts(group) for _, group in complete]
        finite = [self._candidates(*item, of_group) for item, of_group in zip(complete, texts, strict=True)]
        running = [drop_duplicates(group) if self.dedup else group for group in finite]
        percentile = self.rule.percentile_of_batch(self._stats.groups_seen, len(complete))
        chosen = self.rule.choose(running, percentile, self._random)
        judged = [
            JudgedGroup(
                num_responses=len(group),
                num_finite=len(finite[number]),
                num_in_running=len(running[number]),
                num_kept=len(chosen[number]),
                is_all_equal=is_all_equal(running[number]),
                num_right=None if self.correct_key is None else sum(self._is_right(row) for _, row in group),
                num_distinct=None if self.text_key is None else len(set(texts[number])),
            )
            for number, (_, group) in enumerate(complete)
        ]
        self._stats.add(judged, percentile)
        if self.verbose:
            _log(complete, chosen)
        return [group[one.place][1] for (_, group), kept in zip(complete, chosen, strict=True) for one in kept]

    def _candidates(self, key: Hashable, group: Group, texts: Sequence[str | None]) -> list[Candidate]:
        """The responses of a group that have a finite reward."""
        rewards = [reward for reward, _ in group]
        token_ids = [] if self.ties is Ties.first else [self._token_ids(row) for _, row in group]
        orders = tie_orders(self.ties, self.seed, key, rewards, token_ids)
        return [
            Candidate(place, reward, order, text)
            for place, (reward, order, text) in enumerate(zip(rewards, orders, texts, strict=True))
            if math.isfinite(reward)
        ]

    def _texts(self, group: Group) -> list[str | None]:
        if self.text_key is None:
            return [None] * len(group)
        return [normalize(_as_value(row[self.text_key])) for _, row in group]

    def _token_ids(self, row: TensorDictBase) -> bytes:
        return row[self.tokens_key].reshape(-1).long().cpu().numpy().tobytes()

    def _is_right(self, row: TensorDictBase) -> bool:
        return bool(row[self.correct_key].all())


def _check_name(key: str, name: str, kind: Any) -> Any:
    if name not in list(kind):
        raise UserError(f"{key} ({name!r}) is unknown: choose one of {', '.join(kind)}.")
    return kind(name)


def _as_float32(bar: float) -> float:
    """As rewards are: in float32 0.7 is less than what a configuration calls 0.7."""
    return torch.tensor(bar, dtype=torch.float32).item()


def _log(complete: list[tuple[Hashable, Group]], chosen: list[list[Candidate]]) -> None:
    for (key, group), kept in zip(complete, chosen, strict=True):
        rewards = [reward for reward, _ in group]
        torchrl_logger.info(f"Group {key!r}: rewards {rewards}, kept {[one.reward for one in kept]}.")


def _unstack(td: TensorDictBase) -> list[TensorDictBase]:
    """Rows of any batch shape as tensordicts of one element each, without copying: lazy stacks are taken apart.

    Indexing or reshaping a lazy stack of 256 rows takes some 20 ms, going through what it is made of 0.5 ms.
    """
    if td.batch_size.numel() == 1 and not isinstance(td, LazyStackedTensorDict):
        return [td]
    parts = td.tensordicts if isinstance(td, LazyStackedTensorDict) else td.unbind(0)
    return [row for part in parts for row in _unstack(part)]


def _as_row(td: TensorDictBase) -> TensorDictBase:
    """A row of batch size [], of one whose batch dimensions are all 1."""
    return td[(0,) * td.ndim] if td.ndim else td


def _as_value(value: Any) -> Any:
    """The number in a tensor of one element, or the string."""
    if not isinstance(value, str | list):
        value = value.tolist()
    while isinstance(value, list):
        (value,) = value
    return value
