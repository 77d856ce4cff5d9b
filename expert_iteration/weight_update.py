"""Trainer weights to engine weights, with proof that they arrived.

A push that loads only part of the weights raises nothing: vLLM goes on with a mixture. So trainer and engine score the
same few sequences, the probe, and must agree. A push of unchanged weights always agrees, which is why the probe runs at
the start (the engine loaded the right model), at each push until the trainer's scores have changed by more than the
tolerance (before that a push that does nothing looks right), and then every `weight_update.probe_frequency` pushes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torchrl._utils import timeit

from expert_iteration.log_probs import token_log_probs

# Largest mean difference of the probe's log-probs between trainer and engine. The mean, because in half precision a
# single unlikely token may differ by tenths while all weights are right. In float32 two implementations differ by about
# 1e-6 in the mean; a dropped lm_head shows as tenths after one optimizer step of the tiny model.
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}


class WeightMismatchError(RuntimeError):
    """Trainer and engine do not hold the same weights."""


class WeightReceiver(Protocol):
    """What an engine must offer to be pushed to."""

    def load_weights(self, update_info: dict, version: int, timeout: float) -> dict[str, float]:
        """Take the weights; returns `wait_seconds` and `load_seconds`."""
        ...

    def token_log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score sequences, for the probe."""
        ...


class WorstToken(NamedTuple):
    """Where trainer and engine differ most."""

    difference: float
    sequence: int
    position: int
    trainer: float
    engine: float


class WeightUpdater:
    """Pushes the policy's weights to the engine.

    Args:
        engine: the client of the engine.
        probe: token ids of the probe's sequences, each of at least two tokens.
        directory: where state dicts pass through; shared memory if it can be.
        wire_dtype: the engine's dtype; floating-point weights are cast to it.
        autocast_dtype: in which the trainer computes, None for none.
        probe_frequency: pushes between probes; 0 probes only until the weights have changed visibly.
        tolerance: largest mean difference of the log-probs; None takes `PROBE_TOLERANCE` of the coarser dtype.
        timeout: seconds a push may take.
    """

    def __init__(
        self,
        engine: WeightReceiver,
        *,
        probe: Sequence[Sequence[int]],
        directory: Path,
        wire_dtype: torch.dtype,
        autocast_dtype: torch.dtype | None = None,
        probe_frequency: int = 0,
        tolerance: float | None = None,
        timeout: float = 120.0,
    ) -> None:
        self._engine = engine
        self._probe = [list(ids) for ids in probe]
        self._directory = directory
        self._wire_dtype = wire_dtype
        self._autocast_dtype = autocast_dtype
        self._probe_frequency = probe_frequency
        dtypes = {wire_dtype, autocast_dtype or torch.float32}
        self.tolerance = max(PROBE_TOLERANCE[dtype] for dtype in dtypes) if tolerance is None else tolerance
        self._timeout = timeout
        self._start_scores: list[list[float]] | None = None
        self._changed_once = False
        self._expected_names: frozenset[str] = frozenset()
        self._sent_names: frozenset[str] = frozenset()
        self.policy_version = 0
        self.pushes = 0

    def verify_start(self, policy: nn.Module) -> dict[str, float]:
        """Prove that the engine has loaded the policy's weights.

        Raises:
            WeightMismatchError: it has not.
        """
        self._expected_names = self._sent_names = frozenset(policy.state_dict())
        self._start_scores = self._trainer_scores(policy)
        return self._compare(self._start_scores)

    def push_weights(self, policy: nn.Module) -> dict[str, float]:
        """Give the engine the policy's weights; they count as the next policy version.

        Returns:
            metrics: `weights/push_seconds` (all of it), `weights/wait_seconds` (for the generation in flight),
            `weights/policy_version`, and `weights/probe_diff` when the probe ran.

        Raises:
            WeightMismatchError: the probe found other weights in the engine.
            TimeoutError: the engine did not take the weights in time.
        """
        with timeit("push_weights"):
            return self._push(policy)

    def _push(self, policy: nn.Module) -> dict[str, float]:
        start = time.monotonic()
        version = self.policy_version + 1
        path = self._directory / f"weights-{version}.pt"
        weights = self._weights(policy)
        self._sent_names = frozenset(weights)
        torch.save(weights, path)
        try:
            timings = self._engine.load_weights({"path": str(path)}, version, self._timeout)
        finally:
            path.unlink()
        self.policy_version = version
        self.pushes += 1
        metrics = {
            "weights/push_seconds": time.monotonic() - start,
            "weights/wait_seconds": timings["wait_seconds"],
            "weights/policy_version": float(version),
        }
        return metrics | self._probe_if_due(policy)

    def _weights(self, policy: nn.Module) -> dict[str, torch.Tensor]:
        """The whole state dict: vLLM's packed lm_head stays stale when tied weights are sent only once."""
        return {
            name: tensor.detach().to("cpu", self._wire_dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in policy.state_dict().items()
        }

    def _probe_if_due(self, policy: nn.Module) -> dict[str, float]:
        due = self._probe_frequency and self.pushes % self._probe_frequency == 0
        if self._changed_once and not due:
            return {}
        scores = self._trainer_scores(policy)
        self._changed_once = self._changed_once or self._has_changed(scores)
        return self._compare(scores)

    @torch.inference_mode()
    def _trainer_scores(self, policy: nn.Module) -> list[list[float]]:
        device = next(policy.parameters()).device
        autocast = torch.autocast(device.type, self._autocast_dtype) if self._autocast_dtype else nullcontext()
        was_training = policy.training
        policy.eval()
        with autocast:
            # One sequence at a time: the probe is small, and without padding there is nothing to get wrong.
            scores = [
                token_log_probs(policy, ids, torch.ones_like(ids))[0].tolist()
                for ids in (torch.tensor([sequence], device=device) for sequence in self._probe)
            ]
        policy.train(was_training)
        return scores

    def _has_changed(self, scores: list[list[float]]) -> bool:
        """Whether the trainer scores the probe visibly otherwise than at the start."""
        if self._start_scores is None:
            return False
        return _mean_distance(scores, self._start_scores) > self.tolerance

    def _compare(self, trainer_scores: list[list[float]]) -> dict[str, float]:
        engine_scores = self._engine.token_log_probs(self._probe)
        mean = _mean_distance(trainer_scores, engine_scores)
        worst = max(
            WorstToken(_distance(ours, theirs), sequence, position, ours, theirs)
            for sequence, (trainer, engine) in enumerate(zip(trainer_scores, engine_scores, strict=True))
            for position, (ours, theirs) in enumerate(zip(trainer, engine, strict=True))
        )
        if mean > self.tolerance:
            raise WeightMismatchError(self._explain(mean, worst))
        return {"weights/probe_diff": worst.difference, "weights/probe_mean_diff": mean}

    def _explain(self, mean: float, worst: WorstToken) -> str:
        missing = sorted(self._expected_names - self._sent_names)
        return (
            f"The engine does not hold the trainer's weights (version {self.policy_version}, push {self.pushes}): "
            f"log-probs differ by {mean:.2g} in the mean, weight_update.probe_tolerance is {self.tolerance:g} "
            f"(engine {self._wire_dtype}, trainer {self._autocast_dtype or torch.float32}). "
            f"Worst token: id {self._probe[worst.sequence][worst.position]} at position {worst.position} of probe "
            f"sequence {worst.sequence}: log-prob {worst.trainer:.5f} in the trainer, {worst.engine:.5f} in the "
            "engine. "
            f"Parameters expected but not sent: {', '.join(missing) or 'none'}."
        )


def _mean_distance(first: list[list[float]], second: list[list[float]]) -> float:
    """Mean distance of two sets of scores, over all tokens but each sequence's first, which has no log-prob."""
    distances = [
        _distance(one, other)
        for row, others in zip(first, second, strict=True)
        for one, other in zip(row[1:], others[1:], strict=True)
    ]
    return sum(distances) / len(distances)


def _distance(first: float, second: float) -> float:
    """How far apart two log-probs are; infinitely, if one is NaN (which would compare as no difference)."""
    distance = abs(first - second)
    return math.inf if math.isnan(distance) else distance
