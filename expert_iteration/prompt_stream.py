"""Which prompts come in which order, and which are left out for a while because they teach nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset

from expert_iteration.seeds import derive_seed
from expert_iteration.tasks import Problem

MOST_TURNS = torch.iinfo(torch.int32).max  # for ever


class PromptStream(IterableDataset):
    """Endless prompts: every problem once a pass, each pass in an order of its own.

    Yields `query` (str), `prompt_index` (the row in `problems`) and `group_id`, which counts the draws: a problem drawn
    again is a new group. Iterating again begins anew where this began.

    A problem that all responses of a visit solved is passed over at its next `skip_solved` turns, and so is one that
    no response solved in `skip_hopeless_after` visits in a row; then it comes back. Neither teaches a selection that
    compares responses to the same prompt.

    Args:
        problems: what is drawn from.
        seed: of the orders.
        shuffle: whether a pass has an order of its own; False: that of `problems`.
        skip_solved: turns for which a problem is passed over; 0: never.
        skip_hopeless_after: visits without a right response that count as solved; None: none do.
        state: from `state_dict`, to go on there; None: from the beginning.

    Attributes:
        num_skipped: turns passed over so far.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        seed: int,
        *,
        shuffle: bool = True,
        skip_solved: int = 0,
        skip_hopeless_after: int | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._problems = problems
        self._seed = seed
        self._shuffle = shuffle
        self._skip_solved = min(skip_solved, MOST_TURNS)
        self._skip_hopeless_after = skip_hopeless_after
        self._order: tuple[int, Sequence[int]] | None = None
        self._start = dict(state) if state is not None else self._beginning()
        self._load(self._start)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._load(self._start)
        for group_id, index in list(self._open.items()):
            yield self._item(group_id, index)
        while True:
            index = self._next_index()
            group_id = self._next_group
            self._next_group += 1
            self._open[group_id] = index
            yield self._item(group_id, index)

    def finish(self, group_id: int, num_right: int, num_responses: int) -> None:
        """Say how many responses of a group were right. It is not drawn again by whoever goes on from `state_dict`.

        Args:
            group_id: of a group that was drawn, and not said of before.
            num_right: of its responses.
            num_responses: all of them.
        """
        index = self._open.pop(group_id)
        if not self._skip_solved:
            return
        mark = int(self._marks[index])
        if num_right == num_responses:
            mark = self._skip_solved
        elif num_right == 0 and self._skip_hopeless_after is not None:
            mark = self._skip_solved if 1 - mark >= self._skip_hopeless_after else mark - 1
        else:
            mark = 0
        self._marks[index] = mark

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, in types that `torch.load` trusts; groups that were drawn ahead come again."""
        return {
            "epoch": self._epoch,
            "place": self._place,
            "next_group": self._next_group,
            "open": dict(self._open),
            "num_skipped": self.num_skipped,
            "marks": self._marks.clone() if self._skip_solved else None,
        }

    def _beginning(self) -> dict[str, Any]:
        return {"epoch": 0, "place": 0, "next_group": 0, "open": {}, "num_skipped": 0, "marks": None}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._place, self._next_group = state["epoch"], state["place"], state["next_group"]
        self._open: dict[int, int] = dict(state["open"])
        self.num_skipped = state["num_skipped"]
        # A small number a problem: above 0 the turns that it is still passed over, below 0 its visits in a row without
        # a right response.
        none = torch.zeros(len(self._problems) if self._skip_solved else 0, dtype=torch.int32)
        self._marks = none if state["marks"] is None else state["marks"].clone()

    def _item(self, group_id: int, index: int) -> dict[str, Any]:
        return {"query": self._problems[index].question, "prompt_index": index, "group_id": group_id}

    def _next_index(self) -> int:
        """Ends: every pass over the problems lets those that are passed over come nearer."""
        while True:
            if self._place == len(self._problems):
                self._epoch, self._place = self._epoch + 1, 0
                self._leap()
            index = self._order_of(self._epoch)[self._place]
            self._place += 1
            if not self._skip_solved or self._marks[index] <= 0:
                return index
            self._marks[index] -= 1
            self.num_skipped += 1

    def _leap(self) -> None:
        """Do at once the whole passes in which every problem would be passed over, all but the last of them."""
        passes = int(self._marks.min()) - 1 if self._skip_solved else 0
        if passes > 0:
            self._marks -= passes
            self._epoch += passes
            self.num_skipped += passes * len(self._problems)

    def _order_of(self, epoch: int) -> Sequence[int]:
        if not self._shuffle:
            return range(len(self._problems))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, "prompts", epoch))
            self._order = epoch, torch.randperm(len(self._problems), generator=generator).tolist()
        return self._order[1]
