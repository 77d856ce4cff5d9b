"""Which rows of the buffer come next: drawn in proportion to their reward, or all of them, higher rewards sooner.

TorchRL's PrioritizedSampler, which these replace, keeps its priorities in a tree of C++ code that no wheel provides for
our version of torch, and a negative reward makes its priorities NaN.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchrl.data.replay_buffers.samplers import Sampler

from expert_iteration.row_keys import IMPORTANCE_WEIGHT_KEY


def reward_priorities(rewards: torch.Tensor, alpha: float, epsilon: float) -> torch.Tensor:
    """Priorities (reward + shift + epsilon * spread) ^ alpha, of which the greatest is 1.

    shift = max(0, -least reward), so that rewards may be zero or negative; spread = greatest - least reward. The least
    reward, where it is not above 0, has height epsilon * spread, so that it can still be drawn. At 1e-6 it practically
    never is: with an alpha of 0.8, once in 63,000 draws of the greatest; at 0.05 once in 11. Equal rewards have equal
    priorities, also where all are 0.

    Args:
        rewards: float64 [N], finite, N at least 1.
        alpha: at least 0, where all priorities are equal.
        epsilon: a share of the spread; at 0 a least reward that is not above 0 has priority 0.

    Returns:
        float64 [N], in [0, 1].
    """
    least, greatest = rewards.aminmax()
    spread = greatest - least
    if spread == 0:
        return torch.ones_like(rewards)
    heights = rewards + (-least).clamp(min=0) + epsilon * spread
    # Divided first: a power of a large reward would overflow.
    return (heights / heights.max()) ** alpha


def find_drawn(cumulative: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Positions at which `uniform` falls when [0, 1) is divided in proportion to priorities.

    Args:
        cumulative: float64 [N], sums of the first 1, 2, ... N priorities; the last is above 0.
        uniform: float64 [B], in [0, 1].

    Returns:
        int64 [B], never the position of a priority of 0.
    """
    total = cumulative[-1]
    # Right of equals: a position without a share of its own ends where the one before it does, and at 0 the first may
    # have none. A number that is rounded up to the total would fall past the last position that has a share.
    last_with_share = torch.searchsorted(cumulative, total)
    return torch.searchsorted(cumulative, uniform * total, right=True).clamp(max=last_with_share)


class _Ranking(NamedTuple):
    """What a draw needs to know of the N live slots."""

    slots: torch.Tensor
    """int64 [N], in storage order."""
    priorities: torch.Tensor
    """float64 [N]."""
    cumulative: torch.Tensor
    """float64 [N], sums of the first 1, 2, ... N priorities."""
    least_drawn: torch.Tensor
    """float64 [], the least priority that is above 0."""


class RewardPrioritizedSampler(Sampler):
    """Draws with replacement: row i with probability P(i) in proportion to its `reward_priorities`.

    Prioritized replay (Schaul et al., 2016, arXiv:1511.05952) with a reward in place of the temporal-difference error.
    With `beta` above 0 every drawn row has an importance weight (P(i) / least P) ^ -beta, at most 1 as there, which
    undoes the preference at 1. The least P is taken over the live rows that can be drawn at all.

    A slot of the storage is *live* from `write` to `drop`; no other is drawn. Sums of priorities are computed by the
    first draw after a change, at a cost of O(capacity); every other draw costs O(log capacity) a row.

    Args:
        capacity: slots of the storage.
        alpha: at least 0, where rows are drawn evenly.
        epsilon: see `reward_priorities`.
        beta: at least 0, where there are no importance weights.

    Attributes:
        rewards: float64 [capacity], of what is or was last in each slot.
        live: bool [capacity].
        num_live: rows that can be drawn.
    """

    def __init__(self, capacity: int, *, alpha: float, epsilon: float, beta: float = 0.0) -> None:
        self.alpha, self.epsilon, self.beta = alpha, epsilon, beta
        self.rewards = torch.zeros(capacity, dtype=torch.float64)
        self.live = torch.zeros(capacity, dtype=torch.bool)
        self.num_live = 0
        self._ranking: _Ranking | None = None

    def write(self, index: torch.Tensor, rewards: torch.Tensor) -> None:
        """Note what was written, and that it may be drawn from now on.

        Args:
            index: int64 [N], slots, each at most once.
            rewards: [N].

        Raises:
            ValueError: a reward is not finite.
        """
        if not rewards.isfinite().all():
            raise ValueError(f"Rewards must be finite to be drawn by, these are not: {rewards.tolist()}.")
        self.rewards[index] = rewards.to(torch.float64)
        self.live[index] = True
        self._note_change(index)

    def drop(self, index: torch.Tensor) -> None:
        """Never draw the rows in these slots (int64 [N]) again."""
        # Dropping nothing leaves the sums of priorities as they are.
        if len(index):
            self.live[index] = False
            self._note_change(index)

    def sample(self, storage: Any, batch_size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Draw slots.

        Args:
            storage: not looked at.
            batch_size: B.

        Returns:
            int64 [B], and with `beta` above 0 "importance_weight", float32 [B].

        Raises:
            RuntimeError: no row is live.
        """
        ranking = self._rank()
        drawn = find_drawn(ranking.cumulative, torch.rand(batch_size, dtype=torch.float64, generator=self._rng))
        if not self.beta:
            return ranking.slots[drawn], {}
        weights = (ranking.priorities[drawn] / ranking.least_drawn) ** -self.beta
        return ranking.slots[drawn], {IMPORTANCE_WEIGHT_KEY: weights.float()}

    def can_sample(self, storage: Any, batch_size: int) -> bool:
        """Whether any row is live."""
        return self.num_live > 0

    def state_dict(self) -> dict[str, Any]:
        """Rewards and what is live; not what configures the sampler."""
        return {"rewards": self.rewards.clone(), "live": self.live.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict` of a sampler of at most this capacity."""
        known = len(state_dict["live"])
        self.rewards[:known], self.live[:known] = state_dict["rewards"], state_dict["live"]
        self.live[known:] = False
        self._forget_ranking()

    def dumps(self, path: str | Path) -> None:
        """Write the state into a folder, which is made where it is missing."""
        path = Path(path)
        path.mkdir(exist_ok=True)
        torch.save(self.state_dict(), path / "sampler.pt")

    def loads(self, path: str | Path) -> None:
        """Continue from what `dumps` wrote."""
        self.load_state_dict(torch.load(Path(path) / "sampler.pt", weights_only=True))

    def _empty(self) -> None:
        self.drop(self.live.nonzero()[:, 0])

    def _note_change(self, index: torch.Tensor) -> None:
        self._forget_ranking()

    def _forget_ranking(self) -> None:
        self._ranking = None
        self.num_live = int(self.live.sum())

    def _rank(self) -> _Ranking:
        if self._ranking is None:
            self._ranking = self._compute_ranking()
        return self._ranking

    def _compute_ranking(self) -> _Ranking:
        slots = self.live.nonzero()[:, 0]
        if not self.num_live:
            raise RuntimeError("There is nothing to draw: no row of the buffer is live.")
        priorities = reward_priorities(self.rewards[slots], self.alpha, self.epsilon)
        return _Ranking(slots, priorities, priorities.cumsum(0), priorities[priorities > 0].min())


class RewardPrioritizedPass(RewardPrioritizedSampler):
    """Draws without replacement, in passes: every live row once, in a random order in which higher rewards come sooner.

    The order is that of drawing one row after the other in proportion to the `reward_priorities` of what is left, made
    in one step with exponential keys (Efraimidis and Spirakis, 2006, doi:10.1016/j.ipl.2005.11.003). As every row is
    seen once there are no importance weights.

    The order is drawn when a pass begins. What is written meanwhile belongs to the next pass, what is dropped or
    overwritten meanwhile to none. Toward TorchRL's `ReplayBuffer.__iter__` it is as its SamplerWithoutReplacement: the
    last batch of a pass is smaller, and a pass that was broken off is taken up by the next iteration.

    Args:
        capacity: slots of the storage.
        alpha: at least 0, where every order is equally likely.
        epsilon: see `reward_priorities`.

    Attributes:
        ran_out: whether a pass has ended and the next has not begun.
    """

    ran_out = False  # in TorchRL's base class a property without a setter, while its buffer sets it

    def __init__(self, capacity: int, *, alpha: float, epsilon: float) -> None:
        super().__init__(capacity, alpha=alpha, epsilon=epsilon)
        self._left = torch.empty(0, dtype=torch.int64)  # of the pass under way, in order

    def sample(self, storage: Any, batch_size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The next slots of the pass, int64 [B], fewer at its end; begins a pass where none is under way.

        Raises:
            RuntimeError: no row is live.
        """
        if not len(self._left):
            self._left = self._draw_order()
        index = self._left[:batch_size]
        self._leave(self._left[batch_size:])
        return index, {}

    def state_dict(self) -> dict[str, Any]:
        """As of the base class, and the pass that is under way."""
        return super().state_dict() | {"left": self._left.clone(), "ran_out": self.ran_out}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`, in the middle of a pass too."""
        super().load_state_dict(state_dict)
        self._left, self.ran_out = state_dict["left"].clone(), state_dict["ran_out"]

    def _note_change(self, index: torch.Tensor) -> None:
        super()._note_change(index)
        if len(self._left):
            self._leave(self._left[~torch.isin(self._left, index)])

    def _leave(self, left: torch.Tensor) -> None:
        """Go on with a pass in which these slots are left; it is over where there are none."""
        self._left = left
        self.ran_out = not len(left)

    def _draw_order(self) -> torch.Tensor:
        ranking = self._rank()
        count = len(ranking.slots)
        keys = torch.empty(count, dtype=torch.float64).exponential_(generator=self._rng) / ranking.priorities
        # Keys of priority 0 are all infinite: shuffled before the stable sort, they too come in a random order.
        shuffled = torch.randperm(count, generator=self._rng)
        return ranking.slots[shuffled[keys[shuffled].argsort(stable=True)]]
