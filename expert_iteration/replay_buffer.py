"""The buffer of expert responses: TorchRL's replay buffer, with rewards and ages known beside the rows.

What draws is in `sampler.py`; `BufferReader` is what the trainer holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data import ReplayBuffer

from expert_iteration.row_keys import IMPORTANCE_WEIGHT_KEY, TRAINED_KEYS


class ExpertReplayBuffer(ReplayBuffer):
    """A replay buffer that repeats for a seed, drops what is too old, and describes itself in a few numbers.

    A row is *live*, which is to say that it can be drawn, until it is overwritten or evicted; the buffer's length and
    statistics are of live rows. Storage is a ring: when it is full, new rows take the places of the oldest. For one
    caller at a time, as its actor has it.

    Args:
        capacity: of storage and sampler, in rows.
        seed: of the order in which rows are drawn.
        **kwargs: TorchRL's `ReplayBuffer` keywords. `sampler` is one of `sampler.py`, or builds one; the storage holds
            rows with ("next", "reward") of one element, ("tokens", "response") and an integer "policy_version".
    """

    def __init__(self, *, capacity: int, seed: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.set_rng(torch.Generator().manual_seed(seed))
        # Beside the rows, so that no statistic unpickles or stacks the ragged storage. Rewards are the sampler's.
        self._lengths = torch.zeros(capacity)
        self._policy_versions = torch.zeros(capacity, dtype=torch.int64)
        self._evicted_below = 0  # no live row is of an older policy version
        self._dropped_too_old = 0
        self._pass: Iterator[TensorDictBase] | None = None  # that a client is in the middle of
        self._figures: dict[str, float] | None = None  # None: to be computed again
        self._writer_state: Any = None

    def __len__(self) -> int:
        """Live rows."""
        return self._sampler.num_live

    def extend(self, data: TensorDictBase, **kwargs: Any) -> torch.Tensor:
        """Write rows; returns where they were written.

        Raises:
            ValueError: a reward is not finite.
        """
        index = super().extend(data, **kwargs)
        # Of more rows than there are slots the last ones stay, and an index that names a slot twice writes either.
        slots, rows = index[-len(self._lengths) :], data.unbind(0)[-len(self._lengths) :]
        self._lengths[slots] = torch.tensor([float(len(row["tokens", "response"])) for row in rows])
        versions = [row["policy_version"].item() for row in rows]
        self._policy_versions[slots] = torch.tensor(versions)
        self._evicted_below = min(self._evicted_below, *versions)
        rewards = [row["next", "reward"].item() for row in rows]
        self._sampler.write(slots, torch.tensor(rewards, dtype=torch.float64))
        self._figures = None
        return index

    def write_batch(self, rows: TensorDictBase | None, writer_state: Any) -> None:
        """Write the rows that a batch kept, None for none, and note where their writer then stands.

        Both at once, so that `state_dict` never holds one without the other.

        Args:
            rows: as for `extend`.
            writer_state: kept for `state_dict`, in types that `torch.load` trusts.
        """
        if rows is not None:
            self.extend(rows)
        self._writer_state = writer_state

    def add(self, data: TensorDictBase) -> int:
        """Write one row; returns where it was written."""
        return int(self.extend(lazy_stack([data])))

    def draw(self, min_version: int) -> TensorDictBase | None:
        """One micro-batch of responses, after evicting those of a policy version below `min_version`.

        Rows have "importance_weight", float32 [], where the sampler gives weights.

        Returns:
            `batch_size` rows; None where no row is live.
        """
        self.evict_older_than(min_version)
        if not len(self):
            return None
        return self.sample()

    def sample(self, batch_size: int | None = None, return_info: bool = False) -> Any:
        """A micro-batch of what training reads of a row (`TRAINED_KEYS`), for itself: nothing in it is the buffer's.

        Rows have "importance_weight", float32 [], where the sampler gives weights. Arguments as in TorchRL.
        """
        batch, info = super().sample(batch_size, return_info=True)
        batch = batch.select(*TRAINED_KEYS, strict=False)
        if IMPORTANCE_WEIGHT_KEY in info:
            batch[IMPORTANCE_WEIGHT_KEY] = info[IMPORTANCE_WEIGHT_KEY]
        # One piece of memory in place of a hundred: what travels to the trainer, with texts and all, would take 15 ms
        # to pickle and unpickle for 16 rows; this takes 4.
        batch = batch.consolidate()
        return (batch, info) if return_info else batch

    def next_young(self, min_version: int) -> TensorDictBase | None:
        """The next micro-batch of a pass, after evicting what is of a policy version below `min_version`, as `draw`.

        Returns:
            at most `batch_size` rows; None at the end of the pass.
        """
        self.evict_older_than(min_version)
        return self.next()

    def evict_older_than(self, version: int) -> int:
        """Never draw responses of an older policy version again; returns how many there were."""
        if version <= self._evicted_below:  # as of most draws, which then cost nothing that grows with the capacity
            return 0
        self._evicted_below = version
        old = (self._sampler.live & (self._policy_versions < version)).nonzero()[:, 0]
        self._sampler.drop(old)
        self._dropped_too_old += len(old)
        self._figures = None
        return len(old)

    def __iter__(self) -> Iterator[TensorDictBase]:
        """One pass over all live rows, where the sampler makes passes; over none when there are none."""
        if len(self):
            yield from super().__iter__()

    def next(self) -> TensorDictBase | None:
        """The next micro-batch of a pass, None at its end: how a client in another process iterates."""
        # TorchRL's makes a copy, in which a consolidated batch falls apart into its hundred pieces.
        if self._pass is None:
            self._pass = iter(self)
        batch = next(self._pass, None)
        if batch is None:
            self._pass = None
        return batch

    def empty(self, empty_write_count: bool = True) -> None:
        """Forget all rows, with them the pass that a client may be in the middle of, and the counts if asked."""
        super().empty(empty_write_count=empty_write_count)
        self._pass = self._figures = None
        if empty_write_count:
            self._dropped_too_old = 0

    def statistics(self) -> dict[str, float]:
        """Number, mean reward and mean response length (tokens) of live rows; all rows ever written and dropped."""
        # Asked at each gradient step, changed by few of them.
        if self._figures is None:
            self._figures = self._compute_statistics()
        return self._figures

    def _compute_statistics(self) -> dict[str, float]:
        live = self._sampler.live
        size = len(self)
        figures = {
            "buffer/size": float(size),
            "buffer/write_count": float(self.write_count),
            "buffer/dropped_too_old": float(self._dropped_too_old),
        }
        if size:
            figures["buffer/reward"] = self._sampler.rewards[live].mean().item()
            figures["buffer/response_length"] = self._lengths[live].mean().item()
        return figures

    def state_dict(self) -> dict[str, Any]:
        """Rows, what is known of them, random state, the pass under way and where the writer stood.

        In types that `torch.load` trusts.
        """
        return super().state_dict() | {
            # TorchRL's own state of a row loses its texts: they come back as empty tensordicts.
            "_storage": [self._storage.get(slot).to_dict() for slot in range(len(self._storage))],
            "_lengths": self._lengths.clone(),
            "_policy_versions": self._policy_versions.clone(),
            "_dropped_too_old": self._dropped_too_old,
            "_is_in_pass": self._pass is not None,
            "_writer_state": self._writer_state,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict` of a buffer of the same sampler and at most this capacity: the same rows are next.

        A client that was in the middle of a pass goes on with it.
        """
        super().load_state_dict(state_dict | {"_storage": {"_storage": []}})
        for slot, row in enumerate(state_dict["_storage"]):
            self._storage.set(slot, TensorDict(row))
        known = len(state_dict["_lengths"])
        self._lengths[:known] = state_dict["_lengths"]
        self._policy_versions[:known] = state_dict["_policy_versions"]
        self._evicted_below = 0
        self._dropped_too_old = state_dict["_dropped_too_old"]
        self._writer_state = state_dict["_writer_state"]
        self._pass = self._rest_of_pass() if state_dict["_is_in_pass"] else None
        self._figures = None

    def _rest_of_pass(self) -> Iterator[TensorDictBase]:
        """What is left of a pass: nothing, where its last micro-batch was the last that was drawn."""
        while not self._sampler.ran_out:
            yield self.sample()


class BufferReader:
    """The trainer's view of the buffer, which never shows it a response that is too old.

    Args:
        client: an `ExpertReplayBuffer`, or TorchRL's client of one in an actor.
        max_policy_age: responses made more than so many weight pushes ago are evicted before they are seen; None: none.
        policy_version: the version of the weights last pushed.
    """

    def __init__(self, client: Any, *, max_policy_age: int | None, policy_version: Callable[[], int]) -> None:
        self._client, self._max_policy_age, self._policy_version = client, max_policy_age, policy_version

    def sample(self) -> TensorDictBase | None:
        """One micro-batch, in one call of the client; None where there is nothing to draw."""
        return self._client.draw(self._min_version())

    def __iter__(self) -> Iterator[TensorDictBase]:
        """One pass over what is not too old when its turn comes: weights may be pushed in the middle of it."""
        while (batch := self._client.next_young(self._min_version())) is not None:
            yield batch

    def __len__(self) -> int:
        """Responses that are not too old."""
        self._client.evict_older_than(self._min_version())
        return len(self._client)

    def empty(self, **kwargs: Any) -> None:
        """Forget all responses; see `ExpertReplayBuffer.empty`."""
        self._client.empty(**kwargs)

    def statistics(self) -> dict[str, float]:
        """See `ExpertReplayBuffer.statistics`."""
        return self._client.statistics()

    def state_dict(self) -> dict[str, Any]:
        """See `ExpertReplayBuffer.state_dict`."""
        return self._client.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ExpertReplayBuffer.load_state_dict`."""
        self._client.load_state_dict(state)

    def _min_version(self) -> int:
        return 0 if self._max_policy_age is None else self._policy_version() - self._max_policy_age
