"""What every inference engine has, whatever library generates: one gate, offers of new weights, the probe.

An engine is a plain class, built without Ray (`engine_client.EngineActor` puts it into an actor). One gate serializes
generation, scoring and weight updates: vLLM raises when a generation meets the meta tensors of a half-finished update,
and a response must not mix two sets of weights.

New weights are *offered*: whoever offers them does not wait for a generation in flight. They are loaded at once when
the engine is idle then, else before the next generation begins; the newest takes the place of one that still waits.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from expert_iteration import timeline

if TYPE_CHECKING:
    from expert_iteration.packed_weights import PackedWeights


@dataclass(frozen=True)
class Sampling:
    """How to sample: `num_samples` responses a prompt of at most `max_tokens` tokens; temperature 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    num_samples: int = 1


class Completion(NamedTuple):
    """One response: ids with the end-of-turn token, `stop` or `length`, and the version of the weights that made it."""

    token_ids: list[int]
    finish_reason: str
    policy_version: int


class OfferedWeights(Protocol):
    """Weights on their way: small itself, it fetches them when the engine is about to load them."""

    def get(self) -> PackedWeights:
        """The weights, in this process's memory."""
        ...


class WeightOffer(NamedTuple):
    """A set of weights that the engine is to load."""

    weights: OfferedWeights
    version: int
    probe: list[list[int]] | None  # sequences to score with these weights; None: none
    offered_at: float  # time.monotonic()


class AppliedUpdate(NamedTuple):
    """What became of a weight offer that was loaded."""

    version: int
    wait_seconds: float  # from the offer until it was loaded: for a generation in flight, and for the next to begin
    load_seconds: float
    probe_scores: list[list[float]] | None  # log-probs of the offer's probe under the new weights


class OfferReport(NamedTuple):
    """What an engine answers to a weight offer."""

    applied: list[AppliedUpdate]  # offers loaded since the last report, oldest first
    superseded: int  # offers so far whose place a newer one took before they were loaded


class Health(NamedTuple):
    """What an engine does at this moment."""

    version: int  # of the weights in use
    generating_seconds: float = 0.0  # for how long the generation in flight has run; 0: there is none
    loading_seconds: float = 0.0  # for how long weights are being loaded; 0: they are not
    responses: int = 0  # of the generation in flight


class Engine(ABC):
    """An inference engine in this process. Subclasses say how their library samples, scores and loads weights."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._offer_lock = threading.Lock()
        self._offer: WeightOffer | None = None
        self._applied: list[AppliedUpdate] = []
        self._superseded = 0
        self._version = 0
        # One value, so that `health` reads in its own thread what belongs together.
        self._work: tuple[str, float, int] | None = None

    @abstractmethod
    def _sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[Completion]]:
        """`sample`, with the gate held."""

    @abstractmethod
    def _score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """`token_log_probs`, with the gate held."""

    @abstractmethod
    def _load(self, weights: OfferedWeights, version: int) -> None:
        """Load weights, with the gate held; nothing that was computed with older ones may be used after."""

    def generate(self, prompts: Any, sampling_params: Any, **kwargs: Any) -> list[Any]:
        """What TorchRL's `vLLMWrapper` calls; only vLLM's engine has it."""
        raise NotImplementedError(f"{type(self).__name__} has no vLLM interface: call sample()")

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[Completion]]:
        """Sample responses to tokenized prompts.

        Args:
            prompts: token ids, one sequence a prompt.
            sampling: how.
            seed: of this call: the same call gives the same responses, whatever was called before.

        Returns:
            `sampling.num_samples` completions for each prompt, in order. Generation stops at the chat template's
            end-of-turn token, which stays in the response.
        """
        with self._generating(len(prompts) * sampling.num_samples):
            return self._sample(prompts, sampling, seed)

    def token_log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-prob of every token of each sequence given its predecessors; the first token gets 0 (it has none)."""
        with self._gate:
            self._apply_offer()
            return self._score(sequences)

    def offer_weights(self, weights: OfferedWeights, version: int, probe: list[list[int]] | None = None) -> OfferReport:
        """Take new weights, to be loaded before anything else is generated.

        Does not wait for the generation in flight; an idle engine loads them before it returns.

        Args:
            weights: fetched when they are loaded, dropped when they are superseded.
            version: labels what the weights generate.
            probe: sequences that are scored with exactly these weights, if they are ever loaded.
        """
        with self._offer_lock:
            self._superseded += self._offer is not None
            self._offer = WeightOffer(weights, version, probe, time.monotonic())
        if self._gate.acquire(blocking=False):
            try:
                self._apply_offer()
            finally:
                self._gate.release()
        return self.report()

    def report(self) -> OfferReport:
        """What became of the weights that were offered, since the last report."""
        with self._offer_lock:
            applied, self._applied = self._applied, []
            return OfferReport(applied, self._superseded)

    def sleep(self) -> None:
        """Give accelerator memory back until the next use, which wakes the engine; only vLLM's can."""
        raise NotImplementedError(f"{type(self).__name__} cannot sleep")

    def version(self) -> int:
        """The version of the weights now in use."""
        return self._version

    def health(self) -> Health:
        """What the engine does at this moment; answers also while it is at work."""
        work = self._work
        if work is None:
            return Health(self._version)
        activity, since, responses = work
        seconds = time.monotonic() - since
        if activity == timeline.GENERATING:
            return Health(self._version, generating_seconds=seconds, responses=responses)
        return Health(self._version, loading_seconds=seconds)

    @contextmanager
    def _generating(self, num_responses: int) -> Iterator[None]:
        """The gate, for a generation of so many responses with the newest weights."""
        with self._gate:
            self._apply_offer()
            with self._working(timeline.GENERATING, num_responses):
                yield

    @contextmanager
    def _working(self, activity: str, num_responses: int = 0) -> Iterator[None]:
        self._work = activity, time.monotonic(), num_responses
        try:
            with timeline.span(activity):
                yield
        finally:
            self._work = None

    def _apply_offer(self) -> None:
        """Load the weights that wait, if any do; called with the gate held."""
        with self._offer_lock:
            offer, self._offer = self._offer, None
        if offer is None:
            return
        start = time.monotonic()
        with self._working(timeline.LOADING_WEIGHTS):
            self._load(offer.weights, offer.version)
            self._version = offer.version
            loaded = time.monotonic()
            scores = None if offer.probe is None else self._score(offer.probe)
        with self._offer_lock:
            self._applied.append(AppliedUpdate(offer.version, start - offer.offered_at, loaded - start, scores))
