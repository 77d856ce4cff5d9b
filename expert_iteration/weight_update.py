"""Trainer weights to engine weights, with proof that they arrived.

A push returns once the weights are copied out: the trainer does not wait for a generation in flight, after which the
engine loads them (`Engine.offer_weights`). What an engine reports of a push thus comes with it when the engine was
idle, else with a later one. Every replica of the engine is pushed to, and checked, by itself.

A push that loads only part of the weights raises nothing: vLLM goes on with a mixture. So trainer and engine score the
same few sequences, the probe, and must agree. A push of unchanged weights always agrees, which is why the probe runs at
the start (the engine loaded the right model), at each push until the trainer's scores have changed by more than the
tolerance (before that a push that does nothing looks right), and then every `weight_update.probe_frequency` pushes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torchrl._utils import timeit

from expert_iteration import timeline
from expert_iteration.engine import OfferReport
from expert_iteration.packed_weights import PackedWeights
from expert_iteration.policy_reader import PolicyReader
from expert_iteration.reference_update import ReferenceUpdater
from expert_iteration.weight_transport import WeightPass, WeightTransport

# Largest mean difference of the probe's log-probs between trainer and engine. The mean, because in half precision a
# single unlikely token may differ by tenths while all weights are right. In float32 two implementations differ by about
# 1e-6 in the mean; a dropped lm_head shows as tenths after one optimizer step of the tiny model.
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}
# Where the trainer's base is in four bits and the engine's, under adapters that travel alone, is not: of the tiny
# model's three seeds the mean differs by 0.06 to 0.07.
FOUR_BIT_TOLERANCE = 0.2


class WeightMismatchError(RuntimeError):
    """Trainer and engine do not hold the same weights."""


class ScoringEngine(Protocol):
    """What is asked of the engines beside taking weights: an `EnginePool`, or a stand-in."""

    @property
    def names(self) -> Sequence[str]:
        """Of the replicas' processes."""
        ...

    def report(self) -> list[OfferReport]:
        """Of each replica what became of earlier offers since the last report."""
        ...

    def token_log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        """Score sequences, for the probe; of each replica its answer."""
        ...


@dataclass
class _Replica:
    """What is known of one engine."""

    name: str
    version: int = 0  # the newest that it has loaded
    probed_version: int = 0  # the newest that was compared
    has_shown_change: bool = False  # whether it has passed a comparison whose scores were not the start's


class WorstToken(NamedTuple):
    """Where trainer and engine differ most."""

    difference: float
    sequence: int
    position: int
    trainer: float
    engine: float


class WeightUpdater:
    """Pushes the policy's weights to the engines.

    Args:
        engine: the client of all replicas.
        transport: how weights get there.
        reader: gives the policy's weights and its scores of the probe.
        reference: is given them too, now and then; None: never.
        probe: token ids of the probe's sequences, each of at least two tokens.
        adapters_only: whether the policy's adapters travel alone, to engines that apply them.
        is_quantized: whether the policy's base is in four bits, and so not the model that the engines have loaded.
        probe_frequency: pushes between probes; 0 probes only until the weights have changed visibly.
        tolerance: largest mean difference of the log-probs; None takes `PROBE_TOLERANCE` of the coarser dtype, or
            `FOUR_BIT_TOLERANCE`.
        timeout: seconds that an idle engine has to load the weights.
    """

    def __init__(
        self,
        engine: ScoringEngine,
        transport: WeightTransport,
        reader: PolicyReader,
        *,
        reference: ReferenceUpdater | None = None,
        probe: Sequence[Sequence[int]],
        adapters_only: bool = False,
        is_quantized: bool = False,
        probe_frequency: int = 0,
        tolerance: float | None = None,
        timeout: float = 120.0,
    ) -> None:
        self._engine = engine
        self._transport = transport
        self._reader = reader
        self._reference = reference
        self._probe = [list(ids) for ids in probe]
        self._adapters_only = adapters_only
        self._is_quantized = is_quantized
        self._probe_frequency = probe_frequency
        dtypes = {transport.dtype, reader.autocast_dtype or torch.float32}
        least = FOUR_BIT_TOLERANCE if is_quantized and adapters_only else 0.0
        self.tolerance = max(least, *(PROBE_TOLERANCE[dtype] for dtype in dtypes)) if tolerance is None else tolerance
        self._timeout = timeout
        self._replicas = [_Replica(name) for name in engine.names]
        self._start_scores: list[list[float]] | None = None
        # The trainer's scores of the probe for each version that a replica was asked to score and has not reported.
        self._asked: dict[int, list[list[float]]] = {}
        self._expected_names: frozenset[str] = frozenset()
        self._sent_names: frozenset[str] = frozenset()
        self._superseded = self._superseded_before = 0  # the latter in the run that this one goes on with
        self.policy_version = 0
        self.pushes = 0

    def verify_start(self, policy: nn.Module) -> dict[str, float]:
        """Prove that every engine has loaded the policy's weights; a quantized policy's are pushed first.

        Raises:
            WeightMismatchError: one has not.
        """
        self._expected_names = self._sent_names = _parameter_names(policy, self._adapters_only)
        self._transport.connect(self._weights_of(policy))
        self._start_scores = self._reader.score(policy, self._probe)
        if self._is_quantized and not self._adapters_only:
            metrics = self._push(policy)
            self.pushes = 0  # it belongs to the start: frequencies count those that follow training
            return metrics
        answers = self._engine.token_log_probs(self._probe)
        return _greatest(
            self._compare(replica, 0, self._start_scores, scores)
            for replica, scores in zip(self._replicas, answers, strict=True)
        )

    def push_weights(self, policy: nn.Module) -> dict[str, float]:
        """Give the engines the policy's weights; they count as the next policy version.

        Returns:
            metrics: `weights/policy_version`, `weights/push_seconds` (that the trainer spent), `weights/bytes` (that
            were sent), `weights/superseded` (pushes so far that an engine never loaded, as a newer one came first); and
            of the newest weights that engines have loaded since the last push, if they have: `weights/engine_version`,
            `weights/wait_seconds` (for the generation in flight), `weights/load_seconds`, and `weights/probe_diff` and
            `weights/probe_mean_diff` where they were probed. Of several engines the oldest version and the greatest of
            the other figures count, and `weights/engine_version/<i>` is each one's. Also what the reference says
            (`ReferenceUpdater.after_push`).

        Raises:
            WeightMismatchError: the probe found other weights in an engine, now or after an earlier push.
            TimeoutError: an engine, or the reference, did not take the weights in time.
        """
        with timeit("push_weights"), timeline.span(timeline.PUSHING_WEIGHTS):
            metrics = self._push(policy)
        if self._reference is None:
            return metrics
        return metrics | self._reference.after_push(policy, self.pushes, self.policy_version)

    def _push(self, policy: nn.Module) -> dict[str, float]:
        start = time.monotonic()
        version = self.policy_version + 1
        probe = self._probe if self._is_probe_due() else None
        scores = self._reader.score(policy, probe) if probe else None
        sent = self._transport.send(self._weights_of(policy), version, probe, self._timeout)
        self._sent_names = sent.names
        self.policy_version = version
        self.pushes += 1
        self._superseded = self._superseded_before + max(report.superseded for report in sent.reports)
        if scores is not None:
            self._asked[version] = scores
        return {
            "weights/push_seconds": time.monotonic() - start,
            "weights/policy_version": float(version),
            "weights/bytes": float(sent.num_bytes),
            "weights/superseded": float(self._superseded),
        } | self._read(sent.reports)

    @property
    def pushed_weights(self) -> PackedWeights | None:
        """The weights of the last push, as they were sent; None before the first."""
        return self._transport.last_sent if self.policy_version else None

    def state_dict(self) -> dict[str, Any]:
        """Counters, and what is known of the engines; no weights."""
        return {
            "policy_version": self.policy_version,
            "pushes": self.pushes,
            "superseded": self._superseded,
            "replicas": [asdict(replica) for replica in self._replicas],
        }

    def load_state_dict(self, state: Mapping[str, Any], policy: nn.Module, pushed: PackedWeights | None) -> None:
        """Go on from `state_dict`: the engines get the weights that they had, under their version, with proof.

        After `verify_start`. Engines may be more or fewer than they were.

        Args:
            state: from there.
            policy: as it was then.
            pushed: `pushed_weights` of then, where the policy has changed since; None: it has not.

        Raises:
            WeightMismatchError, TimeoutError: as `push_weights`.
        """
        version = state["policy_version"]
        if version:
            self.policy_version = version - 1
            self._push(policy)
            if pushed is not None:
                # On the way that was just proven; of these weights the trainer has no scores to compare with.
                self._read(self._transport.send(lambda: iter(pushed), version, None, self._timeout).reports)
        self.policy_version, self.pushes = version, state["pushes"]
        self._superseded = self._superseded_before = state["superseded"]
        if len(state["replicas"]) == len(self._replicas):
            self._replicas = [_Replica(**replica) for replica in state["replicas"]]

    def _weights_of(self, policy: nn.Module) -> WeightPass:
        return partial(self._reader.adapters if self._adapters_only else self._reader.weights, policy)

    def read_reports(self) -> dict[str, float]:
        """What the engines have to say of pushes that they loaded since the last one, for the end of a run; see there.

        Raises:
            WeightMismatchError: as `push_weights`.
        """
        return self._read(self._engine.report())

    def _read(self, reports: Sequence[OfferReport]) -> dict[str, float]:
        """What the engines report of the weights that they have loaded, as metrics."""
        metrics = _greatest(
            self._read_one(replica, report) for replica, report in zip(self._replicas, reports, strict=True)
        )
        if not metrics:
            return {}
        oldest = min(replica.version for replica in self._replicas)
        # Whatever is older was superseded, and is never reported.
        self._asked = {version: scores for version, scores in self._asked.items() if version > oldest}
        metrics["weights/engine_version"] = float(oldest)
        if len(self._replicas) > 1:
            for index, replica in enumerate(self._replicas):
                metrics[f"weights/engine_version/{index}"] = float(replica.version)
        return metrics

    def _read_one(self, replica: _Replica, report: OfferReport) -> dict[str, float]:
        """Of one replica; its newest figures count."""
        metrics: dict[str, float] = {}
        for update in report.applied:
            replica.version = update.version
            metrics["weights/wait_seconds"] = update.wait_seconds
            metrics["weights/load_seconds"] = update.load_seconds
            if update.probe_scores is not None:
                scores = self._asked[update.version]
                replica.has_shown_change = replica.has_shown_change or self._has_changed(scores)
                replica.probed_version = update.version
                metrics |= self._compare(replica, update.version, scores, update.probe_scores)
        return metrics

    def _is_probe_due(self) -> bool:
        # Counted from the last answer: a push that is superseded takes its probe with it, and the next must ask again.
        pushes = self.policy_version + 1 - min(replica.probed_version for replica in self._replicas)
        all_changed = all(replica.has_shown_change for replica in self._replicas)
        return not all_changed or 0 < self._probe_frequency <= pushes

    def _has_changed(self, scores: list[list[float]]) -> bool:
        """Whether the trainer scores the probe visibly otherwise than at the start."""
        if self._start_scores is None:
            return False
        return _mean_distance(scores, self._start_scores) > self.tolerance

    def _compare(
        self,
        replica: _Replica,
        version: int,
        trainer_scores: list[list[float]],
        engine_scores: list[list[float]],
    ) -> dict[str, float]:
        mean = _mean_distance(trainer_scores, engine_scores)
        worst = max(
            WorstToken(_distance(ours, theirs), sequence, position, ours, theirs)
            for sequence, (trainer, engine) in enumerate(zip(trainer_scores, engine_scores, strict=True))
            for position, (ours, theirs) in enumerate(zip(trainer, engine, strict=True))
        )
        if mean > self.tolerance:
            raise WeightMismatchError(self._explain(replica, version, mean, worst))
        return {"weights/probe_diff": worst.difference, "weights/probe_mean_diff": mean}

    def _explain(self, replica: _Replica, version: int, mean: float, worst: WorstToken) -> str:
        missing = sorted(self._expected_names - self._sent_names)
        engine = "The engine" if len(self._replicas) == 1 else replica.name
        trainer_dtype = self._reader.autocast_dtype or torch.float32
        return (
            f"{engine} does not hold the trainer's weights (version {version} of {self.policy_version}): "
            f"log-probs differ by {mean:.2g} in the mean, weight_update.probe_tolerance is {self.tolerance:g} "
            f"(engine {self._transport.dtype}, trainer {trainer_dtype}). "
            f"Worst token: id {self._probe[worst.sequence][worst.position]} at position {worst.position} of probe "
            f"sequence {worst.sequence}: log-prob {worst.trainer:.5f} in the trainer, {worst.engine:.5f} in the "
            "engine. "
            f"Parameters expected but not sent: {', '.join(missing) or 'none'}."
        )


def _parameter_names(policy: nn.Module, adapters_only: bool) -> frozenset[str]:
    """Of what a push should send, found otherwise than by reading it: tied parameters stand under each of their names.

    Names are the engine's: PEFT puts the adapter's name into those of its own, and moves those of the model's.
    """
    names = [name for name, _ in policy.named_parameters(remove_duplicate=False)]
    if adapters_only:
        return frozenset(name.replace(".default.", ".") for name in names if ".lora_" in name)
    return frozenset(
        name.removeprefix("base_model.model.").replace(".base_layer.", ".") for name in names if ".lora_" not in name
    )


def _greatest(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """The metrics of several replicas as one: of each the greatest value."""
    merged: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            merged[name] = max(merged.get(name, -math.inf), value)
    return merged


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
