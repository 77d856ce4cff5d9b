"""Trainer weights to engine weights, with proof that they arrived.

A push returns once the weights are copied out: the trainer does not wait for a generation in flight, after which the
engine loads them (`VLLMEngine.offer_weights`). What the engine reports of a push thus comes with it when the engine was
idle, else with a later one.

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
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torchrl._utils import timeit

from expert_iteration import timeline
from expert_iteration.engine import AppliedUpdate, OfferReport
from expert_iteration.log_probs import token_log_probs

# Largest mean difference of the probe's log-probs between trainer and engine. The mean, because in half precision a
# single unlikely token may differ by tenths while all weights are right. In float32 two implementations differ by about
# 1e-6 in the mean; a dropped lm_head shows as tenths after one optimizer step of the tiny model.
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}


class WeightMismatchError(RuntimeError):
    """Trainer and engine do not hold the same weights."""


class WeightReceiver(Protocol):
    """What an engine must offer to be pushed to."""

    def offer_weights(
        self, update_info: dict[str, Any], version: int, probe: list[list[int]] | None, timeout: float
    ) -> OfferReport:
        """Take the weights, and score the probe once they are loaded."""
        ...

    def report(self) -> OfferReport:
        """What became of earlier offers since the last report."""
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
        timeout: seconds that an idle engine has to load the weights.
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
        # The trainer's scores of the probe for each version that the engine was asked to score and has not reported.
        self._asked: dict[int, list[list[float]]] = {}
        self._changed_once = False
        self._probed_version = 0  # the newest that was compared
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
        return self._compare(0, self._start_scores, self._engine.token_log_probs(self._probe))

    def push_weights(self, policy: nn.Module) -> dict[str, float]:
        """Give the engine the policy's weights; they count as the next policy version.

        Returns:
            metrics: `weights/policy_version`, `weights/push_seconds` (that the trainer spent), `weights/superseded`
            (pushes so far that the engine never loaded, as a newer one came first); and of the newest weights that the
            engine has loaded since the last push, if it has: `weights/engine_version`, `weights/wait_seconds` (for the
            generation in flight), `weights/load_seconds`, and `weights/probe_diff` and `weights/probe_mean_diff` where
            they were probed.

        Raises:
            WeightMismatchError: the probe found other weights in the engine, now or after an earlier push.
            TimeoutError: the engine did not take the weights in time.
        """
        with timeit("push_weights"), timeline.span(timeline.PUSHING_WEIGHTS):
            return self._push(policy)

    def _push(self, policy: nn.Module) -> dict[str, float]:
        start = time.monotonic()
        version = self.policy_version + 1
        path = self._directory / f"weights-{version}.pt"
        weights = self._weights(policy)
        self._sent_names = frozenset(weights)
        probe = self._probe if self._is_probe_due() else None
        scores = self._trainer_scores(policy) if probe else None
        torch.save(weights, path)
        try:
            report = self._engine.offer_weights({"path": str(path)}, version, probe, self._timeout)
        except BaseException:
            path.unlink(missing_ok=True)  # taken, it is the engine's to remove
            raise
        self.policy_version = version
        self.pushes += 1
        if scores is not None:
            self._asked[version] = scores
        return {
            "weights/push_seconds": time.monotonic() - start,
            "weights/policy_version": float(version),
            "weights/superseded": float(report.superseded),
        } | self._read(report.applied)

    def read_reports(self) -> dict[str, float]:
        """What the engine has to say of pushes that it loaded since the last one, for the end of a run; see there.

        Raises:
            WeightMismatchError: as `push_weights`.
        """
        return self._read(self._engine.report().applied)

    def _read(self, applied: Sequence[AppliedUpdate]) -> dict[str, float]:
        """What the engine reports of the weights that it has loaded, as metrics; the newest figures count."""
        metrics: dict[str, float] = {}
        for update in applied:
            metrics["weights/engine_version"] = float(update.version)
            metrics["weights/wait_seconds"] = update.wait_seconds
            metrics["weights/load_seconds"] = update.load_seconds
            if update.probe_scores is not None:
                scores = self._asked[update.version]
                self._changed_once = self._changed_once or self._has_changed(scores)
                self._probed_version = update.version
                metrics |= self._compare(update.version, scores, update.probe_scores)
            # Whatever is older was superseded, and is never reported.
            self._asked = {version: kept for version, kept in self._asked.items() if version > update.version}
        return metrics

    def _is_probe_due(self) -> bool:
        # Counted from the last answer: a push that is superseded takes its probe with it, and the next must ask again.
        pushes = self.policy_version + 1 - self._probed_version
        return not self._changed_once or 0 < self._probe_frequency <= pushes

    def _weights(self, policy: nn.Module) -> dict[str, torch.Tensor]:
        """The whole state dict: vLLM's packed lm_head stays stale when tied weights are sent only once."""
        return {
            name: tensor.detach().to("cpu", self._wire_dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in policy.state_dict().items()
        }

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

    def _compare(
        self, version: int, trainer_scores: list[list[float]], engine_scores: list[list[float]]
    ) -> dict[str, float]:
        mean = _mean_distance(trainer_scores, engine_scores)
        worst = max(
            WorstToken(_distance(ours, theirs), sequence, position, ours, theirs)
            for sequence, (trainer, engine) in enumerate(zip(trainer_scores, engine_scores, strict=True))
            for position, (ours, theirs) in enumerate(zip(trainer, engine, strict=True))
        )
        if mean > self.tolerance:
            raise WeightMismatchError(self._explain(version, mean, worst))
        return {"weights/probe_diff": worst.difference, "weights/probe_mean_diff": mean}

    def _explain(self, version: int, mean: float, worst: WorstToken) -> str:
        missing = sorted(self._expected_names - self._sent_names)
        return (
            f"The engine does not hold the trainer's weights (version {version} of {self.policy_version}): "
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
