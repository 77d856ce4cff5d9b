"""Rank 0's side of data-parallel training: what it trains, reads and scores with, leading the other ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import nn

from expert_iteration.adapter_reference import BaseScorer
from expert_iteration.data_parallel import is_sharded, outline, whole
from expert_iteration.learner import Learner, StepResult, share_out
from expert_iteration.policy_reader import PolicyReader
from expert_iteration.random_state import random_state, set_random_state
from expert_iteration.sizes import ceil_div
from expert_iteration.train_ranks import RankGroup

if TYPE_CHECKING:
    from peft import PeftModel

NamedTensors = Iterable[tuple[str, torch.Tensor]]


class ParallelLearner(Learner):
    """Rank 0's learner: for the caller a learner like any other, of whose work the other ranks do their share.

    Args:
        ranks: the group.
        args: as `Learner`'s, and so the rest.

    Every method raises, beside what the `Learner`'s does, what `RankGroup.together` raises.
    """

    def __init__(self, *args: Any, ranks: RankGroup, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._ranks = ranks

    def step(self, batch: TensorDictBase) -> StepResult:
        """See `Learner.step`; the batch is that of all ranks."""
        with self._timed():
            self._prepare(batch)
            own, *others = share_out(batch, self._ranks.size)
            # One piece of memory travels in a third of the time of the many that rows consist of.
            packed = [share._replace(rows=share.rows.consolidate()) for share in others]
            with self._ranks.together([methodcaller("train_on", share) for share in packed]):
                return self.train_on(own)

    def flush(self) -> StepResult:
        """See `Learner.flush`."""
        with self._ranks.together(methodcaller("flush")):
            return super().flush()

    def plan(self, num_optimizer_steps: int, until: float) -> None:
        """See `Learner.plan`."""
        with self._ranks.together(methodcaller("plan", num_optimizer_steps, until)):
            super().plan(num_optimizer_steps, until)

    def restart(self, num_optimizer_steps: int, until: float) -> None:
        """See `Learner.restart`."""
        with self._ranks.together(methodcaller("restart", num_optimizer_steps, until)):
            super().restart(num_optimizer_steps, until)

    def rescale(self, ratio: float) -> None:
        """See `Learner.rescale`."""
        with self._ranks.together(methodcaller("rescale", ratio)):
            super().rescale(ratio)

    def checkpoint(self, *, keep: bool = True) -> dict[str, Any]:
        """See `Learner.checkpoint`."""
        with self._ranks.together(methodcaller("checkpoint", keep=False)):
            return super().checkpoint(keep=keep)

    def load_checkpoint(self, state: Mapping[str, Any]) -> None:
        """See `Learner.load_checkpoint`."""
        with self._ranks.together(methodcaller("load_checkpoint", outline(dict(state)))):
            super().load_checkpoint(state)

    def _random_states(self) -> list[dict[str, Any]]:
        with self._ranks.together(_get_random_state) as others:
            own = super()._random_states()
        return own + others

    def _set_random_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        with self._ranks.together([partial(_set_random_state, state) for state in states[1:]]):
            super()._set_random_states(states)


class ShardReader(PolicyReader):
    """Reads a policy of which each rank holds shards; collective: every rank goes through the same tensors."""

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return whole(tensor)


class ParallelPolicyReader(ShardReader):
    """Rank 0's reader. Of a sharded policy the other ranks send their shards of one tensor after the other.

    Args:
        learner: rank 0's, of the policy that is read.
        ranks: the group.
        autocast_dtype: in which the trainer computes, None for none.
    """

    def __init__(self, learner: Learner, ranks: RankGroup, autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__(autocast_dtype)
        self._learner = learner
        self._ranks = ranks

    def weights(self, policy: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """See `PolicyReader.weights`."""
        tensors = super().weights(policy)
        return self._gather("weights", tensors) if is_sharded(policy) else tensors

    def adapters(self, policy: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """See `PolicyReader.adapters`."""
        tensors = super().adapters(policy)
        return self._gather("adapters", tensors) if is_sharded(policy) else tensors

    def score(self, policy: nn.Module, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `PolicyReader.score`."""
        if not is_sharded(policy):
            return super().score(policy, sequences)
        with self._ranks.together(partial(_score, self.autocast_dtype, sequences)):
            return _score(self.autocast_dtype, sequences, self._learner)

    def _gather(self, what: str, tensors: NamedTensors) -> Iterator[tuple[str, torch.Tensor]]:
        with self._ranks.together(partial(_go_through, what)):
            for named_tensor in tensors:
                try:
                    yield named_tensor
                except GeneratorExit:  # the caller needs no more, but the other ranks are on their way
                    deque(tensors, maxlen=0)
                    return


class ParallelBaseScorer:
    """A `BaseScorer` that shares the rows out over all ranks.

    Args:
        ranks: the group.
        policy: PEFT's wrapper, rank 0's.
        model: the `LogProbModel` around it.
        micro_batch_size: rows that go through the model at once on each rank.
        autocast_dtype: in which the trainer computes; None: none.
    """

    def __init__(
        self,
        ranks: RankGroup,
        policy: PeftModel,
        model: nn.Module,
        *,
        micro_batch_size: int,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self._ranks = ranks
        self._make_scorer = partial(BaseScorer, micro_batch_size=micro_batch_size, autocast_dtype=autocast_dtype)
        self._own = self._make_scorer(policy, model=model)

    def score(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `BaseScorer.score`; nothing is done for no rows."""
        if not rows:
            return []
        num_ranks = self._ranks.size
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        # As many for every rank, for with shards each forward pass is collective: the shortest stands in.
        order += order[-1:] * (num_ranks * ceil_div(len(rows), num_ranks) - len(rows))
        shares = [order[rank::num_ranks] for rank in range(num_ranks)]
        own, *others = ([rows[index] for index in share] for share in shares)
        with self._ranks.together([partial(_score_base, self._make_scorer, share) for share in others]) as results:
            scored = self._own.score(own)
        by_index = {
            index: values
            for share, log_probs in zip(shares, [scored, *results], strict=True)
            for index, values in zip(share, log_probs, strict=True)
        }
        return [by_index[index] for index in range(len(rows))]


def _get_random_state(learner: Learner) -> dict[str, Any]:
    return random_state()


def _set_random_state(state: Mapping[str, Any], learner: Learner) -> None:
    set_random_state(state)


def _go_through(what: str, learner: Learner) -> None:
    """Another rank's part in `ParallelPolicyReader.weights` or `.adapters`: each tensor is dropped at once."""
    deque(getattr(ShardReader(), what)(learner.model), maxlen=0)


def _score(
    autocast_dtype: torch.dtype | None, sequences: Sequence[Sequence[int]], learner: Learner
) -> list[list[float]]:
    return PolicyReader(autocast_dtype).score(learner.loss_fn.model, sequences)


def _score_base(
    make_scorer: Callable[..., BaseScorer], rows: Sequence[torch.Tensor], learner: Learner
) -> list[torch.Tensor]:
    return make_scorer(learner.model, model=learner.loss_fn.model).score(rows)
