"""The policy becomes the reference now and then: iterated training, whose KL term holds the policy near the latest one.

Whole weights go to the reference's processes as a push sends them to engines, in the reference's type, adapters merged.
Responses keep the log-probs of the reference that scored them, which is the one of the time when they were collected.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch
from torch import nn
from torchrl._utils import timeit

from expert_iteration import timeline
from expert_iteration.cadence import is_due
from expert_iteration.packed_weights import PackedWeights
from expert_iteration.policy_reader import PolicyReader


class LoadableReference(Protocol):
    """All replicas of the reference: a `ReferenceClient`, or a stand-in."""

    def load(self, weights: PackedWeights, timeout: float) -> None:
        """See `ReferenceClient.load`."""
        ...


class ReferenceUpdater:
    """Gives the reference the policy's weights after every so many pushes.

    Args:
        reference: all replicas; None where the policy with its adapters off is the reference, which never changes.
        reader: gives the policy's weights.
        dtype: of the reference; floating-point weights are cast to it.
        every: pushes between refreshes; None: the start model stays the reference.
        timeout: seconds that the reference has to finish what it scores and to load.

    Attributes:
        version: policy version that is the reference; 0: the start model.
        weights: those that were loaded last, for a checkpoint; None: the start model's. The next refresh overwrites
            them.
    """

    def __init__(
        self,
        reference: LoadableReference | None,
        reader: PolicyReader,
        *,
        dtype: torch.dtype,
        every: int | None,
        timeout: float,
    ) -> None:
        self._reference = reference
        self._reader = reader
        self._dtype = dtype
        self._every = every
        self._timeout = timeout
        self._packed: PackedWeights | None = None  # kept from refresh to refresh
        self.version = 0
        self.weights: PackedWeights | None = None

    def after_push(self, policy: nn.Module, pushes: int, version: int) -> dict[str, float]:
        """Make the policy the reference where that is due.

        Args:
            policy: whose weights were just pushed.
            pushes: so far.
            version: of the policy.

        Returns:
            metrics: `weights/reference_version`, and where it changed `weights/refresh_seconds` (that the trainer
            spent); nothing where the reference never changes.

        Raises:
            TimeoutError: a replica did not load the weights in time.
        """
        if self._every is None:
            return {}
        metrics = self._refresh(policy, version) if is_due(pushes, self._every) else {}
        return {"weights/reference_version": float(self.version), **metrics}

    def restore(self, weights: PackedWeights, version: int) -> None:
        """Go on with the `weights` and `version` of an earlier run; raises as `after_push`."""
        assert self._reference is not None, "only what was refreshed is restored"
        self._reference.load(weights, self._timeout)
        self.weights, self.version = weights, version

    def _refresh(self, policy: nn.Module, version: int) -> dict[str, float]:
        start = time.monotonic()
        with timeit("refresh_reference"), timeline.span(timeline.PUSHING_WEIGHTS):
            if self._packed is None:
                self._packed = PackedWeights.allocate(self._reader.weights(policy), self._dtype)
            self._packed.pack(self._reader.weights(policy))
            self.restore(self._packed, version)
        return {"weights/refresh_seconds": time.monotonic() - start}
