"""An inference engine and the client that talks to it through Ray.

`VLLMEngine` is a plain class (tests build it without Ray); a run puts it in a Ray actor and everyone else holds an
`EngineClient`. One gate serializes generation, scoring and weight updates: vLLM raises when a generation meets the
meta tensors of a half-finished update, and a response must not mix two sets of weights.

New weights are *offered*: whoever offers them does not wait for a generation in flight. They are loaded at once when
the engine is idle then, else before the next generation begins; the newest takes the place of one that still waits.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from expert_iteration import timeline
from expert_iteration.config import InferenceModelConfig
from expert_iteration.models import end_of_turn_id, load_tokenizer
from expert_iteration.remote import Waiting, get_from, wait_aloud
from expert_iteration.screen import redirect_output

# Both answer while a generation runs: an actor's other calls queue behind it.
HEALTH_GROUP = "health"
WEIGHTS_GROUP = "weights"
HEALTH_SECONDS = 10.0
CONCURRENCY_GROUPS = {HEALTH_GROUP: 1, WEIGHTS_GROUP: 1}


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


class WeightOffer(NamedTuple):
    """A set of weights that the engine is to load."""

    update_info: dict[str, Any]  # of vLLM's weight-transfer API; the file at "path" is the engine's to remove
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


class VLLMEngine:
    """vLLM in this process, behind the small interface every engine has.

    Args:
        model_path: a local folder or hub id that vLLM can load.
        config: the `inference_model` section.
        seed: vLLM's own seed.
        log_path: where this process's output goes; None leaves it where it is.
        timeline_path: where it notes what it does when; None: nowhere.

    Generation stops at the chat template's end-of-turn token, which stays in the response.
    """

    def __init__(
        self,
        model_path: str,
        config: InferenceModelConfig,
        *,
        seed: int = 0,
        log_path: str | None = None,
        timeline_path: str | None = None,
    ) -> None:
        if log_path is not None:
            redirect_output(log_path)
        timeline.record_to(timeline_path)
        _set_environment(config)
        from vllm import LLM

        from expert_iteration import weight_transport  # registers it with vLLM

        self._stop_token_ids = [end_of_turn_id(load_tokenizer(model_path))]
        self._gate = threading.Lock()
        self._offer_lock = threading.Lock()
        self._offer: WeightOffer | None = None
        self._applied: list[AppliedUpdate] = []
        self._superseded = 0
        self._version = 0
        self._busy_since: float | None = None
        self._llm = LLM(
            model=model_path,
            dtype=config.torch_dtype.value,
            seed=seed,
            max_model_len=config.max_model_len,
            enforce_eager=config.enforce_eager,
            enable_prefix_caching=config.enable_prefix_caching,
            tensor_parallel_size=config.num_devices,
            # On CPU vLLM reads this as a share of the host's memory; there VLLM_CPU_KVCACHE_SPACE sizes the cache.
            gpu_memory_utilization=config.gpu_memory_utilization,
            weight_transfer_config={"backend": weight_transport.BACKEND},
            disable_log_stats=True,
        )
        self._llm.init_weight_transfer_engine({"init_info": {}})
        self._llm.update_weight_version("0")

    def generate(self, prompts: Any, sampling_params: Any, **kwargs: Any) -> list[Any]:
        """vLLM's own `LLM.generate`, through the gate: what TorchRL's `vLLMWrapper` calls.

        Returns:
            vLLM `RequestOutput`s in the order of `prompts`.
        """
        kwargs.setdefault("use_tqdm", False)
        return self._generate(prompts, sampling_params, None, **kwargs)

    def _generate(self, prompts: Any, sampling_params: Any, seed: int | None, **kwargs: Any) -> list[Any]:
        import numpy
        import torch

        with self._gate:
            self._apply_offer()
            if seed is not None:
                # vLLM's sampler draws from torch's generator on a CPU; on GPUs it draws its requests' seeds from
                # NumPy's. Seeds of single requests would be slower there, and are refused on a CPU.
                torch.manual_seed(seed)
                numpy.random.seed(seed)
            self._busy_since = time.monotonic()
            try:
                with timeline.span(timeline.GENERATING):
                    return self._llm.generate(prompts, sampling_params, **kwargs)
            finally:
                self._busy_since = None

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[Completion]]:
        """Sample responses to tokenized prompts.

        Args:
            prompts: token ids, one sequence a prompt.
            sampling: how; `seed` sets the sampler's random state for this call, so that a call repeats by itself and
                not only as part of the whole sequence of calls (vLLM refuses per-request seeds on CPU).

        Returns:
            `sampling.num_samples` completions for each prompt, in order. No log-probs are asked for: expert iteration
            does not use them and they cost vLLM most of its speed.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = SamplingParams(
            n=sampling.num_samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=self._stop_token_ids,
            detokenize=False,
        )
        token_prompts = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        outputs = self._generate(token_prompts, params, seed, use_tqdm=False)
        return [[_completion(completion) for completion in output.outputs] for output in outputs]

    def token_log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-prob of every token of each sequence given its predecessors; the first token gets 0 (it has none)."""
        with self._gate:
            self._apply_offer()
            return self._score(sequences)

    def _score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """`token_log_probs` with the gate held already."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        # vLLM cannot score without generating: one token is made and dropped.
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        prompts = [TokensPrompt(prompt_token_ids=list(ids)) for ids in sequences]
        outputs: list[Any] = self._llm.generate(prompts, params, use_tqdm=False)
        return [
            [0.0] + [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(sequences, outputs, strict=True)
        ]

    def offer_weights(
        self, update_info: dict[str, Any], version: int, probe: list[list[int]] | None = None
    ) -> OfferReport:
        """Take new weights, to be loaded through vLLM's weight-transfer API before anything else is generated.

        Does not wait for the generation in flight; an idle engine loads them before it returns.

        Args:
            update_info: for vLLM; the file at "path" is removed once it is loaded or superseded.
            version: labels what the weights generate.
            probe: sequences that are scored with exactly these weights, if they are ever loaded.
        """
        with self._offer_lock:
            superseded, self._offer = self._offer, WeightOffer(update_info, version, probe, time.monotonic())
            if superseded is not None:
                self._superseded += 1
                os.unlink(superseded.update_info["path"])
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

    def _apply_offer(self) -> None:
        """Load the weights that wait, if any do; called with the gate held."""
        with self._offer_lock:
            offer, self._offer = self._offer, None
        if offer is None:
            return
        start = time.monotonic()
        with timeline.span(timeline.LOADING_WEIGHTS):
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": offer.update_info})
            self._llm.finish_weight_update(str(offer.version))
            os.unlink(offer.update_info["path"])
            # Cached prefixes hold keys and values of the old weights.
            self._llm.reset_prefix_cache()
            self._version = offer.version
            loaded = time.monotonic()
            scores = None if offer.probe is None else self._score(offer.probe)
        with self._offer_lock:
            self._applied.append(AppliedUpdate(offer.version, start - offer.offered_at, loaded - start, scores))

    def version(self) -> int:
        """The version of the weights now in use."""
        return self._version

    def health(self) -> dict[str, float | int]:
        """The version, and for how many seconds the current generation has run (0 when idle)."""
        busy_since = self._busy_since
        return {"version": self._version, "busy_seconds": time.monotonic() - busy_since if busy_since else 0.0}


class EngineClient:
    """A picklable handle on an engine actor.

    TorchRL's `vLLMWrapper` accepts it: the wrapper asks for an attribute `remote` and calls
    `model.generate.remote(prompts, sampling_params=...)`; a bare Ray actor handle has no `remote`.
    """

    remote = True

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.waiting: Waiting | None = None  # how to wait for samples; None: silently

    @property
    def generate(self) -> Any:
        """The actor's `generate`, to be called with `.remote(...)`."""
        return self.actor.generate

    def wait_until_ready(self, say: Callable[[str], None]) -> None:
        """Wait for the engine to load its model, and say so every minute.

        Raises:
            ProcessDiedError: it failed to.
        """

        def describe(waited: float) -> str:
            return f"still waiting for the engine after {waited:.0f} s (logs/engine.log)"

        reference = self.actor.version.options(concurrency_group=HEALTH_GROUP).remote()
        wait_aloud(reference, say, describe, since=time.monotonic())
        self._get(reference)

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[Completion]]:
        """See `VLLMEngine.sample`; raises TimeoutError as `waiting` says."""
        reference = self.actor.sample.remote(prompts, sampling, seed)
        if self.waiting is not None:
            self.waiting.wait(reference, since=time.monotonic())
        return self._get(reference)

    def token_log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `VLLMEngine.token_log_probs`."""
        return self._get(self.actor.token_log_probs.remote(sequences))

    def offer_weights(
        self, update_info: dict[str, Any], version: int, probe: list[list[int]] | None, timeout: float
    ) -> OfferReport:
        """See `VLLMEngine.offer_weights`.

        Raises:
            TimeoutError: the engine did not answer within `timeout` seconds, which an idle one has for loading.
        """
        from ray.exceptions import GetTimeoutError

        offer = self.actor.offer_weights.options(concurrency_group=WEIGHTS_GROUP)
        try:
            return self._get(offer.remote(update_info, version, probe), timeout)
        except GetTimeoutError as error:
            raise TimeoutError(
                f"The engine did not load weights version {version} within weight_update.timeout={timeout:g} s "
                "(logs/engine.log). Raise weight_update.timeout if it is only slow."
            ) from error

    def report(self) -> OfferReport:
        """See `VLLMEngine.report`."""
        return self._get(self.actor.report.options(concurrency_group=WEIGHTS_GROUP).remote())

    def version(self) -> int:
        """See `VLLMEngine.version`."""
        return self._get(self.actor.version.options(concurrency_group=HEALTH_GROUP).remote())

    def health(self, timeout: float | None = None) -> dict[str, float | int]:
        """See `VLLMEngine.health`; answers also while a generation runs."""
        return self._get(self.actor.health.options(concurrency_group=HEALTH_GROUP).remote(), timeout)

    def describe(self) -> str:
        """What the engine does at this moment, in a few words for people."""
        from ray.exceptions import GetTimeoutError

        try:
            busy = self.health(HEALTH_SECONDS)["busy_seconds"]
        except GetTimeoutError:
            return f"the engine did not answer within {HEALTH_SECONDS:g} s (logs/engine.log)"
        if busy:
            return f"the engine has been generating for {busy:.0f} s (logs/engine.log)"
        return "the engine is idle; rewards or the reference are at work (logs/collector.log)"

    def _get(self, reference: Any, timeout: float | None = None) -> Any:
        return get_from("engine", reference, timeout)


def _completion(output: Any) -> Completion:
    spans = output.weight_versions or []
    if len(spans) != 1:
        raise RuntimeError(
            f"A response mixes weight sets, or has none: {spans}. The engine's gate should prevent this."
        )
    return Completion(list(output.token_ids), output.finish_reason, int(spans[0].version))


def _set_environment(config: InferenceModelConfig) -> None:
    """What vLLM reads from the environment while it is imported."""
    # In process: no engine-core child to leave behind, and half the start-up time.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if config.kv_cache_gib is not None:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gib)
