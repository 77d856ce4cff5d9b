"""An inference engine and the client that talks to it through Ray.

`VLLMEngine` is a plain class (tests build it without Ray); a run puts it in a Ray actor and everyone else holds an
`EngineClient`. One gate serializes generation, scoring and weight updates: vLLM raises when a generation meets the
meta tensors of a half-finished update, and a response must not mix two sets of weights.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from expert_iteration.config import InferenceModelConfig
from expert_iteration.models import end_of_turn_id, load_tokenizer
from expert_iteration.screen import redirect_output

HEALTH_GROUP = "health"
WEIGHTS_GROUP = "weights"
# Health answers while a generation runs, and a weight update queues at the gate instead of behind queued generations.
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


class VLLMEngine:
    """vLLM in this process, behind the small interface every engine has.

    Args:
        model_path: a local folder or hub id that vLLM can load.
        config: the `inference_model` section.
        seed: vLLM's own seed.
        log_path: where this process's output goes; None leaves it where it is.

    Generation stops at the chat template's end-of-turn token, which stays in the response.
    """

    def __init__(
        self,
        model_path: str,
        config: InferenceModelConfig,
        *,
        seed: int = 0,
        log_path: str | None = None,
    ) -> None:
        if log_path is not None:
            redirect_output(log_path)
        _set_environment(config)
        from vllm import LLM

        from expert_iteration import weight_transport  # registers it with vLLM

        self._stop_token_ids = [end_of_turn_id(load_tokenizer(model_path))]
        self._gate = threading.Lock()
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
            self._busy_since = time.monotonic()
            try:
                if seed is not None:
                    # vLLM's sampler draws from torch's generator on a CPU; on GPUs it draws its requests' seeds from
                    # NumPy's. Seeds of single requests would be slower there, and are refused on a CPU.
                    torch.manual_seed(seed)
                    numpy.random.seed(seed)
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
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        # vLLM cannot score without generating: one token is made and dropped.
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self.generate([TokensPrompt(prompt_token_ids=list(ids)) for ids in sequences], params)
        return [
            [0.0] + [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(sequences, outputs, strict=True)
        ]

    def load_weights(self, update_info: dict[str, Any], version: int) -> dict[str, float]:
        """Replace the weights through vLLM's weight-transfer API and label later responses with `version`.

        Waits for the generation in flight and admits none until the update is finished.

        Returns:
            `wait_seconds` (at the gate) and `load_seconds`.
        """
        start = time.monotonic()
        with self._gate:
            admitted = time.monotonic()
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": update_info})
            self._llm.finish_weight_update(str(version))
            # Cached prefixes hold keys and values of the old weights.
            self._llm.reset_prefix_cache()
            self._version = version
        return {"wait_seconds": admitted - start, "load_seconds": time.monotonic() - admitted}

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

    @property
    def generate(self) -> Any:
        """The actor's `generate`, to be called with `.remote(...)`."""
        return self.actor.generate

    def wait_until_ready(self, say: Callable[[str], None], every: float = 60.0) -> None:
        """Wait for the engine to load its model, and say so every `every` seconds.

        Raises:
            ray.exceptions.ActorDiedError: it failed to.
        """
        import ray

        start = time.monotonic()
        reference = self.actor.version.options(concurrency_group=HEALTH_GROUP).remote()
        while not ray.wait([reference], timeout=every)[0]:
            say(f"still waiting for the engine after {time.monotonic() - start:.0f} s (logs/engine.log)")
        self._get(reference)

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[Completion]]:
        """See `VLLMEngine.sample`."""
        return self._get(self.actor.sample.remote(prompts, sampling, seed))

    def token_log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `VLLMEngine.token_log_probs`."""
        return self._get(self.actor.token_log_probs.remote(sequences))

    def load_weights(self, update_info: dict[str, Any], version: int, timeout: float) -> dict[str, float]:
        """See `VLLMEngine.load_weights`.

        Raises:
            TimeoutError: the engine did not take the weights within `timeout` seconds.
        """
        from ray.exceptions import GetTimeoutError

        reference = self.actor.load_weights.options(concurrency_group=WEIGHTS_GROUP).remote(update_info, version)
        try:
            return self._get(reference, timeout)
        except GetTimeoutError as error:
            busy = self.health()["busy_seconds"]
            raise TimeoutError(
                f"The engine did not take weights version {version} within weight_update.timeout={timeout:g} s; its "
                f"current generation has run for {busy:.0f} s. Raise weight_update.timeout or lower env.num_envs or "
                "inference_model.max_tokens."
            ) from error

    def version(self) -> int:
        """See `VLLMEngine.version`."""
        return self._get(self.actor.version.options(concurrency_group=HEALTH_GROUP).remote())

    def health(self) -> dict[str, float | int]:
        """See `VLLMEngine.health`; answers also while a generation runs."""
        return self._get(self.actor.health.options(concurrency_group=HEALTH_GROUP).remote())

    def _get(self, reference: Any, timeout: float | None = None) -> Any:
        import ray

        return ray.get(reference, timeout=timeout)


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
