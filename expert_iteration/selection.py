"""`TopKRewardSelector`: whole groups of responses in, the expert responses out."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable
from typing import Any

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDictBase, lazy_stack
from torchrl._utils import logger as torchrl_logger
from torchrl.data.llm.topk import TopKRewardSelector as TorchRLTopKRewardSelector

from expert_iteration.errors import UserError

SELECTIONS = ("above_median", "random")
COUNTERS = (
    "groups_seen",
    "groups_kept",
    "groups_all_equal",
    "responses_seen",
    "responses_kept",
    "nonfinite_rewards",
)


class TopKRewardSelector(TorchRLTopKRewardSelector):
    """Keeps the best responses of each group, where a group is one drawing of a prompt.

    Rows are gathered by their group until `total_dialog_turns` of it are there; then the group is judged, once, and
    forgotten, so memory holds the groups in flight and nothing else.

    `above_median` keeps at most `topk_size` responses, those with a reward strictly above the lower median, highest
    first, first come first among equals. `random` is the control for it: as many, drawn uniformly from the same
    group. A group whose rewards are all equal teaches nothing and is dropped; a response with a non-finite reward is
    dropped and its group judged on the others. Both are counted.

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
        selection: "above_median" or "random".
        seed: of the random control.

    Raises:
        ValueError: `topk_size` exceeds `total_dialog_turns` (from TorchRL).
        UserError: unknown `selection`, or both `prompt_key` and `group_key`.
        RuntimeError (when rows come in): a row is not done.

    `state_dict` holds counters, random state and the rows in flight; the latter are tensordicts, which a
    `torch.load(weights_only=True)` refuses.
    """

    # What is overridden of TorchRL 0.14.1, and why. __init__: its queues hold a lambda and cannot be pickled.
    # _inv_call: its queues are never cleared, so that a prompt seen again re-writes old winners and memory grows with
    # each prompt; a NaN reward drops the whole group; and splitting and concatenating tensordicts trajectory by
    # trajectory takes 0.2 s for 256 of them (4 ms here).

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
        selection: str = "above_median",
        seed: int = 0,
    ):
        if selection not in SELECTIONS:
            raise UserError(f"train.selection ({selection!r}) is unknown: choose one of {', '.join(SELECTIONS)}.")
        if prompt_key is not None and group_key is not None:
            raise UserError(f"prompt_key ({prompt_key}) and group_key ({group_key}) are one setting: give one of them.")
        self.group_key = next((key for key in (group_key, prompt_key) if key is not None), "group_id")
        super().__init__(total_dialog_turns, topk_size, self.group_key, rewards_key, done_key, verbose)
        self.selection = selection
        self.queues: dict[Hashable, list[tuple[float, TensorDictBase]]] = {}
        self._random = random.Random(seed)
        self._counts: Counter[str] = Counter()

    def select(self, td: TensorDictBase) -> TensorDictBase | None:
        """Take rows in; return the kept rows of the groups they complete, lazily stacked, or None.

        Args:
            td: rows of whole dialogs, of batch size [N], [N, 1] or any other, in any mixture of groups.
        """
        rows = _unstack(td)
        if not torch.cat([row[self.done_key].reshape(-1) for row in rows]).all():
            raise RuntimeError(f"Every row must be a finished dialog, but not all of {self.done_key} is True.")
        kept: list[TensorDictBase] = []
        for row, reward in zip(rows, self._rewards(rows), strict=True):
            key = _as_key(row[self.group_key])
            queue = self.queues.setdefault(key, [])
            queue.append((reward, row))
            if len(queue) == self.total_dialog_turns:
                kept += self._judge(key, self.queues.pop(key))
        return lazy_stack([_as_row(row) for row in kept]) if kept else None

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase | None:
        return self.select(tensordict)

    def stats(self) -> dict[str, float]:
        """Counts since the start over the groups judged, with their rates (0 before the first group).

        acceptance_rate is responses kept / seen, all_equal_rate groups all equal / seen. `groups_in_flight` have not
        been judged yet. Groups neither kept nor all-equal had nothing above their median, or no finite reward.
        """
        counts = {name: self._counts[name] for name in COUNTERS}
        return {
            **counts,
            "groups_in_flight": len(self.queues),
            "acceptance_rate": counts["responses_kept"] / max(1, counts["responses_seen"]),
            "all_equal_rate": counts["groups_all_equal"] / max(1, counts["groups_seen"]),
        }

    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict` saves of this module, alone or inside a Compose or a replay buffer."""
        return {
            "queues": {key: list(queue) for key, queue in self.queues.items()},
            "random": self._random.getstate(),
            "counts": dict(self._counts),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """What `load_state_dict` restores."""
        self.queues = {key: list(queue) for key, queue in state["queues"].items()}
        self._random.setstate(state["random"])
        self._counts = Counter(state["counts"])

    def _rewards(self, rows: list[TensorDictBase]) -> list[float]:
        """Reward of each row, the mean of what stands in it; one tensor operation for the whole batch."""
        values = [row[self.rewards_key].reshape(-1) for row in rows]
        lengths = torch.tensor([len(value) for value in values])
        return torch.segment_reduce(torch.cat(values).float().cpu(), "mean", lengths=lengths).tolist()

    def _judge(self, key: Hashable, group: list[tuple[float, TensorDictBase]]) -> list[TensorDictBase]:
        rewards = [reward for reward, _ in group]
        finite = [index for index, reward in enumerate(rewards) if math.isfinite(reward)]
        chosen = _above_median(rewards, finite, self.topk_size)
        if self.selection == "random":
            chosen = self._random.sample(finite, len(chosen))
        all_equal = len({rewards[index] for index in finite}) == 1
        self._counts.update(
            groups_seen=1,
            groups_kept=int(bool(chosen)),
            groups_all_equal=int(all_equal),
            responses_seen=len(group),
            responses_kept=len(chosen),
            nonfinite_rewards=len(group) - len(finite),
        )
        if self.verbose:
            torchrl_logger.info(f"Group {key!r}: rewards {rewards}, kept {[rewards[index] for index in chosen]}.")
        return [group[index][1] for index in chosen]


def _above_median(rewards: list[float], finite: list[int], topk_size: int) -> list[int]:
    """Indices of at most `topk_size` rewards strictly above the lower median of the finite ones, highest first."""
    if not finite:
        return []
    median = sorted(rewards[index] for index in finite)[(len(finite) - 1) // 2]
    above = [index for index in finite if rewards[index] > median]
    return sorted(above, key=lambda index: -rewards[index])[:topk_size]


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


def _as_key(value: Any) -> Hashable:
    """A group's identity, hashable: the integer in a tensor of one element, or the string."""
    if not isinstance(value, str | list):
        value = value.tolist()
    while isinstance(value, list):
        (value,) = value
    return value
