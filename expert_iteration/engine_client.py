"""Engines in Ray actors, and what the other processes hold of them: one client for any number of replicas."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from expert_iteration import timeline
from expert_iteration.engine import Completion, Engine, Health, OfferedWeights, OfferReport, Sampling
from expert_iteration.remote import Waiting, get_from, wait_aloud
from expert_iteration.screen import redirect_output
from expert_iteration.seeds import derive_seed
from expert_iteration.turns import Turns

if TYPE_CHECKING:
    from expert_iteration.packed_weights import PackedWeights

# All answer while a generation runs: an actor's other calls queue behind it.
HEALTH_GROUP = "health"
WEIGHTS_GROUP = "weights"
TRANSFER_GROUP = "transfer"
CONCURRENCY_GROUPS = {HEALTH_GROUP: 1, WEIGHTS_GROUP: 1, TRANSFER_GROUP: 1}
HEALTH_SECONDS = 10.0


class EngineActor:
    """An engine in a process of its own; to be started with `CONCURRENCY_GROUPS`.

    Args:
        make_engine: builds it there, where its devices are and its model's path holds.
        log_path: where this process's output goes; None leaves it where it is.
        timeline_path: where it notes what it does when; None: nowhere.
    """

    def __init__(
        self, make_engine: Callable[[], Engine], log_path: str | None = None, timeline_path: str | None = None
    ) -> None:
        if log_path is not None:
            redirect_output(log_path)
        timeline.record_to(timeline_path)
        self._engine = make_engine()

    def generate(self, prompts: Any, sampling_params: Any, **kwargs: Any) -> list[Any]:
        """See `Engine.generate`."""
        return self._engine.generate(prompts, sampling_params, **kwargs)

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[Completion]]:
        """See `Engine.sample`."""
        return self._engine.sample(prompts, sampling, seed)

    def token_log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Engine.token_log_probs`."""
        return self._engine.token_log_probs(sequences)

    def offer_weights(self, weights: OfferedWeights, version: int, probe: list[list[int]] | None = None) -> OfferReport:
        """See `Engine.offer_weights`; to be called in the group of weights."""
        return self._engine.offer_weights(weights, version, probe)

    def transfer(self, method: str, *args: Any) -> Any:
        """Call a method of a `Receiving` engine."""
        return getattr(self._engine, method)(*args)

    def sleep(self) -> None:
        """See `Engine.sleep`."""
        self._engine.sleep()

    def report(self) -> OfferReport:
        """See `Engine.report`; to be called in the group of weights."""
        return self._engine.report()

    def version(self) -> int:
        """See `Engine.version`."""
        return self._engine.version()

    def health(self) -> Health:
        """See `Engine.health`; to be called in the group of health."""
        return self._engine.health()


class EngineClient:
    """A picklable handle on one engine's actor.

    Args:
        actor: an `EngineActor`.
        name: of its process.
    """

    def __init__(self, actor: Any, name: str = timeline.ENGINE) -> None:
        self.actor = actor
        self.name = name

    def call(self, method: str, *args: Any, group: str | None = None) -> Any:
        """Begin a call of an `EngineActor` method, and return its reference."""
        remote_method = getattr(self.actor, method)
        return (remote_method if group is None else remote_method.options(concurrency_group=group)).remote(*args)

    def get(self, reference: Any, timeout: float | None = None) -> Any:
        """The result of a call; see `get_from`."""
        return get_from(self.name, reference, timeout)

    def health(self, timeout: float | None = None) -> Health:
        """See `Engine.health`; answers also while a generation runs."""
        return self.get(self.call("health", group=HEALTH_GROUP), timeout)

    def activity(self) -> str | None:
        """What the engine does at this moment, in a few words for people; None when it is idle."""
        from ray.exceptions import GetTimeoutError

        try:
            health = self.health(HEALTH_SECONDS)
        except GetTimeoutError:
            return self._says(f"did not answer within {HEALTH_SECONDS:g} s")
        if health.generating_seconds:
            return self._says(f"has been generating for {health.generating_seconds:.0f} s")
        if health.loading_seconds:
            return self._says(f"has been loading weights for {health.loading_seconds:.0f} s")
        return None

    def _says(self, what: str) -> str:
        subject = "the engine" if self.name == timeline.ENGINE else self.name
        return f"{subject} {what} (logs/{self.name}.log)"


class EnginePool:
    """The client of all replicas of the engine, also where there is one.

    Picklable. TorchRL's `vLLMWrapper` accepts it: the wrapper asks for an attribute `remote` and calls
    `model.generate.remote(prompts, sampling_params=...)`.

    Args:
        replicas: at least one.
    """

    remote = True

    def __init__(self, replicas: Sequence[EngineClient]) -> None:
        self.replicas = list(replicas)
        self.waiting: Waiting | None = None  # how to wait for samples; None: silently
        self.turns = Turns()  # in the training process, where it shares its accelerator with the engine

    @property
    def names(self) -> list[str]:
        """Of the replicas' processes."""
        return [replica.name for replica in self.replicas]

    @property
    def actors(self) -> list[Any]:
        """The replicas' actors."""
        return [replica.actor for replica in self.replicas]

    @property
    def generate(self) -> Any:
        """The `generate` of the replica that is least loaded now, to be called with `.remote(...)`."""
        loads = self._loads()
        return self.replicas[loads.index(min(loads))].actor.generate

    def wait_until_ready(self, say: Callable[[str], None], check: Callable[[], None] | None = None) -> None:
        """Wait for the engines to load their model, and say so every minute.

        Args:
            say: shows a line to the user.
            check: called every second meanwhile; it may raise to end the wait.

        Raises:
            ProcessDiedError: one failed to.
        """
        if self.replicas:
            say("waiting for the engine, which loads the model (logs/engine.log)")
        since = time.monotonic()
        for replica in self.replicas:

            def describe(waited: float, name: str = replica.name) -> str:
                return f"still waiting for {name} after {waited:.0f} s (logs/{name}.log)"

            reference = replica.call("version", group=HEALTH_GROUP)
            wait_aloud(reference, say, describe, since, check=check)
            replica.get(reference)

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[Completion]]:
        """See `Engine.sample`.

        A group, consecutive equal prompts, goes to one replica as a whole, which caches its prompt: to the one that is
        least loaded, counting the responses it works on now and those of this call. All replicas work at once. Where
        they are idle, a call repeats for its seed.

        Raises:
            TimeoutError: as `waiting` says.
            ProcessDiedError: a replica did.
        """
        self.turns.to_engine()
        shares = [
            (replica, share)
            for replica, share in zip(self.replicas, self._share_out(prompts, sampling), strict=True)
            if share
        ]
        since = time.monotonic()
        references = [
            replica.call("sample", [prompts[index] for index in share], sampling, derive_seed(seed, share[0]))
            for replica, share in shares
        ]
        completions: dict[int, list[Completion]] = {}
        for (replica, share), reference in zip(shares, references, strict=True):
            if self.waiting is not None:
                self.waiting.wait(reference, since)
            completions.update(zip(share, replica.get(reference), strict=True))
        return [completions[index] for index in range(len(prompts))]

    def _share_out(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        """For each replica the indices of its prompts, in order."""
        loads = self._loads()
        shares: list[list[int]] = [[] for _ in self.replicas]
        for group in _groups(prompts):
            least = loads.index(min(loads))
            shares[least].extend(group)
            loads[least] += len(group) * sampling.num_samples
        return shares

    def _loads(self) -> list[int]:
        """Responses that each replica works on; where there is one, nothing depends on it."""
        if len(self.replicas) == 1:
            return [0]
        references = [replica.call("health", group=HEALTH_GROUP) for replica in self.replicas]
        return [replica.get(reference).responses for replica, reference in zip(self.replicas, references, strict=True)]

    def token_log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        """For each replica its answer; see `Engine.token_log_probs`."""
        self.turns.to_engine()
        return self._get_all([replica.call("token_log_probs", sequences) for replica in self.replicas])

    def offer_weights(
        self, weights: PackedWeights, version: int, probe: list[list[int]] | None, timeout: float
    ) -> list[OfferReport]:
        """Offer weights to all replicas at once; they travel through Ray's object store, which holds them once a host.

        Returns:
            what each replica answers; see `Engine.offer_weights`.

        Raises:
            TimeoutError: one did not answer within `timeout` seconds, which an idle one has for loading.
        """
        from expert_iteration.packed_weights import ObjectStoreWeights

        return self.offer(ObjectStoreWeights.put(weights), version, probe, timeout)

    def offer(
        self, offered: OfferedWeights, version: int, probe: list[list[int]] | None, timeout: float
    ) -> list[OfferReport]:
        """`offer_weights`, for weights that are on their way already."""
        self.turns.to_engine()
        calls = [
            (replica, replica.call("offer_weights", offered, version, probe, group=WEIGHTS_GROUP))
            for replica in self.replicas
        ]
        return self._taken(calls, version, timeout)

    def withdraw_weights(self, version: int, timeout: float) -> None:
        """See `Receiving.withdraw_weights`; raises TimeoutError as `offer_weights`."""
        calls = [
            (replica, replica.call("transfer", "withdraw_weights", version, group=WEIGHTS_GROUP))
            for replica in self.replicas
        ]
        self._taken(calls, version, timeout)

    def sleep(self) -> None:
        """See `Engine.sleep`, of every replica."""
        self._get_all([replica.call("sleep") for replica in self.replicas])

    def _taken(self, calls: Sequence[tuple[EngineClient, Any]], version: int, timeout: float) -> list[Any]:
        import ray

        answered, late = ray.wait([call for _, call in calls], num_returns=len(calls), timeout=timeout)
        # Of those that answered first: whoever has died says so before others are found late.
        reports = [replica.get(call) for replica, call in calls if call in answered]
        if late:
            activities = [replica.activity() or f"{replica.name} is idle" for replica, call in calls if call in late]
            raise TimeoutError(
                f"Weights version {version} left the trainer, but were not taken within weight_update.timeout="
                f"{timeout:g} s: {'; '.join(activities)}. Raise weight_update.timeout if it is only slow."
            )
        return reports

    def report(self) -> list[OfferReport]:
        """For each replica what became of the weights that were offered; see `Engine.report`."""
        return self._get_all([replica.call("report", group=WEIGHTS_GROUP) for replica in self.replicas])

    def describe(self) -> str:
        """What the engines do at this moment, in a few words for people."""
        activities = [activity for replica in self.replicas if (activity := replica.activity()) is not None]
        if activities:
            return "; ".join(activities)
        subject = "the engine is" if len(self.replicas) == 1 else "the engines are"
        return f"{subject} idle; rewards or the reference are at work (logs/collector.log)"

    def _get_all(self, references: Sequence[Any]) -> list[Any]:
        return [replica.get(reference) for replica, reference in zip(self.replicas, references, strict=True)]


def _groups(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The indices of consecutive equal prompts."""
    for _, group in groupby(range(len(prompts)), key=lambda index: list(prompts[index])):
        yield list(group)
