"""The trainer's side of a push: how weights get from the training process to the engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from expert_iteration.engine import OfferReport
from expert_iteration.packed_weights import PackedWeights

# A pass over the weights by name, whole tensors one at a time; each call is a new pass.
WeightPass = Callable[[], Iterator[tuple[str, torch.Tensor]]]


class SentWeights(NamedTuple):
    """What came of sending."""

    reports: list[OfferReport]  # of each replica
    names: frozenset[str]  # of the tensors that were sent
    num_bytes: int


class WeightTransport(Protocol):
    """A way to the engines."""

    dtype: torch.dtype
    """In which floating-point weights travel."""

    def connect(self, weights: WeightPass) -> None:
        """Prepare to send such weights; called once the engines are there and before anything is generated."""
        ...

    def send(self, weights: WeightPass, version: int, probe: list[list[int]] | None, timeout: float) -> SentWeights:
        """Offer weights to every replica; when it returns, the policy may change.

        Args:
            weights: the policy's.
            version: labels them.
            probe: sequences that each replica scores once it has loaded them.
            timeout: seconds in which idle replicas must have loaded them.

        Raises:
            TimeoutError: one has not taken them in time.
        """
        ...

    @property
    def last_sent(self) -> PackedWeights | None:
        """The weights of the last push, which the next one overwrites; None before the first."""
        ...


class PackedReceiver(Protocol):
    """What `PackedTransport` sends to: an `EnginePool`."""

    def offer_weights(
        self, weights: PackedWeights, version: int, probe: list[list[int]] | None, timeout: float
    ) -> list[OfferReport]:
        """See `EnginePool.offer_weights`."""
        ...


class PackedTransport:
    """Copies the weights into one buffer in host memory, from which they go to all replicas.

    Args:
        engine: the engines' client.
        dtype: the engine's; floating-point weights are cast to it.
    """

    def __init__(self, engine: PackedReceiver, dtype: torch.dtype) -> None:
        self._engine = engine
        self.dtype = dtype
        self._packed: PackedWeights | None = None  # kept from push to push

    def connect(self, weights: WeightPass) -> None:
        """Make the buffer; see `WeightTransport.connect`."""
        self._packed = PackedWeights.allocate(weights(), self.dtype)

    def send(self, weights: WeightPass, version: int, probe: list[list[int]] | None, timeout: float) -> SentWeights:
        """See `WeightTransport.send`."""
        if self._packed is None:
            self.connect(weights)
        assert self._packed is not None
        self._packed.pack(weights())
        reports = self._engine.offer_weights(self._packed, version, probe, timeout)
        return SentWeights(reports, self._packed.names, self._packed.num_bytes)

    @property
    def last_sent(self) -> PackedWeights | None:
        """See `WeightTransport.last_sent`."""
        return self._packed
