"""The buffer of expert responses: TorchRL's replay buffer, with statistics of constant size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer


class ExpertReplayBuffer(ReplayBuffer):
    """A replay buffer that repeats for a seed, can be iterated when empty, and describes itself in a few numbers.

    Args:
        capacity: of the storage, in rows.
        seed: of the order in which rows are drawn.
        **kwargs: TorchRL's `ReplayBuffer` keywords.
    """

    def __init__(self, *, capacity: int, seed: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.set_rng(torch.Generator().manual_seed(seed))
        # Beside the rows, so that a statistic never unpickles or stacks the ragged storage.
        self._rewards = torch.zeros(capacity)
        self._lengths = torch.zeros(capacity)

    def extend(self, data: TensorDictBase, **kwargs: Any) -> torch.Tensor:
        """Write rows; returns where they were written."""
        index = super().extend(data, **kwargs)
        for slot, row in zip(index.tolist(), data.unbind(0), strict=True):
            self._rewards[slot] = row["next", "reward"].item()
            self._lengths[slot] = len(row["tokens", "response"])
        return index

    def __iter__(self) -> Iterator[TensorDictBase]:
        """One pass over all rows; over none when the buffer is empty, where TorchRL's raises."""
        if len(self):
            yield from super().__iter__()

    def empty(self, empty_write_count: bool = True) -> None:
        """Forget all rows, and with them the pass that a client may be in the middle of."""
        super().empty(empty_write_count=empty_write_count)
        self._iterator = None

    def statistics(self) -> dict[str, float]:
        """Mean reward and response length (tokens) of what is stored, its size, and all rows ever written."""
        size = len(self)
        figures = {"buffer/size": float(size), "buffer/write_count": float(self.write_count)}
        if size:
            figures["buffer/reward"] = self._rewards[:size].mean().item()
            figures["buffer/response_length"] = self._lengths[:size].mean().item()
        return figures
