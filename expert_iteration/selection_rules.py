"""The rules of selection: of the responses in the running, which deserve to be kept, and which of them come first.

Pure functions of rewards, lengths and texts, and `Rule`, which applies one of them to the groups of a batch.
"""

from __future__ import annotations

import hashlib
import math
import random
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from expert_iteration.config import Selection, Ties
from expert_iteration.errors import UserError


class Candidate(NamedTuple):
    """A response in the running, which has a finite reward."""

    place: int
    """Its number among the rows of its group, as they came."""
    reward: float
    order: tuple[int, ...]
    """Of equal rewards the least is kept first."""
    text: str | None = None
    """Normalized; None where texts are not looked at."""


@dataclass(frozen=True)
class Rule:
    """What is kept of the groups of a batch; see `TopKRewardSelector` for the meaning of its parts.

    Raises:
        UserError: what the selection needs is None.
    """

    selection: Selection
    topk_size: int
    threshold: float | None
    percentile: float | None
    percentile_end: float | None
    num_groups: int | None
    min_reward: float

    def __post_init__(self) -> None:
        """Refuse what lacks something."""
        by_percentile = self.selection is Selection.percentile
        if self.selection is Selection.threshold and self.threshold is None:
            raise UserError("train.selection=threshold needs threshold (train.selection_threshold): give it.")
        if by_percentile and (self.percentile is None or self.percentile_end is None):
            raise UserError("train.selection=percentile needs percentile and percentile_end: give them.")
        if by_percentile and self.percentile != self.percentile_end and self.num_groups is None:
            raise UserError("A percentile that follows the run's progress needs num_groups: give it.")

    def percentile_of_batch(self, seen: int, coming: int) -> float | None:
        """The percentile for the next `coming` groups after `seen`, linear in between: `percentile` for the first
        batch of the run, `percentile_end` for its last. None under another selection.
        """
        if self.selection is not Selection.percentile:
            return None
        assert self.percentile is not None  # __post_init__
        assert self.percentile_end is not None
        before_last = (self.num_groups or 0) - coming
        progress = min(1.0, seen / before_last) if before_last > 0 else 0.0
        return self.percentile + (self.percentile_end - self.percentile) * progress

    def choose(
        self, groups: Sequence[list[Candidate]], percentile: float | None, chance: random.Random
    ) -> list[list[Candidate]]:
        """What is kept of each group of a batch, the best first.

        Args:
            groups: of the batch, the responses in the running.
            percentile: from `percentile_of_batch`.
            chance: draws for the random control.
        """
        bar = self.threshold
        if percentile is not None:
            bar = percentile_bar([candidate.reward for group in groups for candidate in group], percentile)
        chosen = [at_least(best(self._eligible(group, bar), self.topk_size), self.min_reward) for group in groups]
        if self.selection is Selection.random:
            return [chance.sample(group, len(kept)) for group, kept in zip(groups, chosen, strict=True)]
        return chosen

    def _eligible(self, group: list[Candidate], bar: float | None) -> list[Candidate]:
        match self.selection:
            case Selection.topk:
                return unless_all_equal(group)
            case Selection.threshold | Selection.percentile:
                assert bar is not None
                return at_least(group, bar)
            case Selection.above_median | Selection.random:
                return above_median(group)


def best(candidates: Iterable[Candidate], most: int) -> list[Candidate]:
    """At most `most` of them, highest reward first, equals by their order."""
    return sorted(candidates, key=lambda candidate: (-candidate.reward, candidate.order))[:most]


def above_median(group: Sequence[Candidate]) -> list[Candidate]:
    """Those strictly above the group's lower median, TorchRL's rule."""
    if not group:
        return []
    median = sorted(candidate.reward for candidate in group)[(len(group) - 1) // 2]
    return [candidate for candidate in group if candidate.reward > median]


def unless_all_equal(group: Sequence[Candidate]) -> list[Candidate]:
    """All of them, or none if none is better than another."""
    return [] if is_all_equal(group) else list(group)


def at_least(group: Sequence[Candidate], bar: float) -> list[Candidate]:
    """Those whose reward reaches the bar."""
    return [candidate for candidate in group if candidate.reward >= bar]


def is_all_equal(group: Sequence[Candidate]) -> bool:
    """Whether the group has one reward, whatever number of responses; an empty group has none."""
    return len({candidate.reward for candidate in group}) == 1


def percentile_bar(rewards: Sequence[float], percentile: float) -> float:
    """The reward to reach: the percentile of these, but above the least of them; infinite where all are equal.

    Without "above the least" a batch in which more responses have the least reward than the percentile leaves out
    would be kept whole.

    Args:
        rewards: finite, of a whole batch.
        percentile: from 0 to 100; between two rewards it is interpolated linearly.
    """
    least = min(rewards, default=math.inf)
    above = [reward for reward in rewards if reward > least]
    return max(float(np.percentile(rewards, percentile)), min(above)) if above else math.inf


def drop_duplicates(group: Iterable[Candidate]) -> list[Candidate]:
    """Of those with the same text the best, as `best` would choose it, so that a duplicate never costs its better."""
    by_text: dict[str | None, list[Candidate]] = {}
    for candidate in group:
        by_text.setdefault(candidate.text, []).append(candidate)
    return [best(candidates, 1)[0] for candidates in by_text.values()]


def normalize(text: str) -> str:
    """The text without what makes no other response of it: compatibility forms (NFKC), case and white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def tie_orders(
    ties: Ties, seed: int, group_key: Hashable, rewards: Sequence[float], token_ids: Sequence[bytes]
) -> list[tuple[int, ...]]:
    """For each response of a group what decides between it and one of equal reward.

    But for `first` it depends on the responses alone and not on the order in which they came: chance is a hash of seed,
    group and token ids. Copies of a response have chances of their own, as if they were drawn one by one.

    Args:
        ties: which kind of order.
        seed: of the chances.
        group_key: of the group, for a prompt that is seen again to have other chances.
        rewards: of the responses.
        token_ids: of the responses, as bytes; [] for `first`.
    """
    if ties is Ties.first:
        return [(index,) for index in range(len(rewards))]
    copies: Counter[tuple[float, bytes]] = Counter()
    orders: list[tuple[int, ...]] = []
    for reward, ids in zip(rewards, token_ids, strict=True):
        copies[reward, ids] += 1
        label = f"{seed}/{group_key}/{copies[reward, ids]}/".encode()
        chance = int.from_bytes(hashlib.blake2b(label + ids, digest_size=8).digest())
        orders.append((len(ids), chance) if ties is Ties.shortest else (chance,))
    return orders
