"""Expected memory of an engine: its weights, and the cache of keys and values in what it may take."""

import math

from expert_iteration.accelerators import MemorySizes
from expert_iteration.config import Config, InferenceBackend, num_references
from expert_iteration.devices import DeviceAllocation
from expert_iteration.memory_terms import (
    BYTES,
    GIB,
    PROCESS,
    PROMPT_TOKENS,
    ModelMemory,
    Term,
    forward_pass,
    in_gib,
    longest_sequence,
    process,
    product,
    response_tokens,
    shared,
)
from expert_iteration.model_shape import ModelShape
from expert_iteration.trainer_memory import reference_memory, training_memory

# vLLM's largest forward pass and its CUDA graphs, both within its share of an accelerator.
ENGINE_WORK = 2 * GIB
# Of an accelerator that several processes share, what none of them is given: their allocators leave gaps.
SHARED_MARGIN = 0.05


def engine_memory(cfg: Config, allocation: DeviceAllocation, shape: ModelShape, sizes: MemorySizes) -> ModelMemory:
    """What an engine, or one of its shards, holds."""
    model = cfg.inference_model
    width = BYTES[model.torch_dtype]
    parts = shared(model.num_devices, "shards")
    weights = product(shape.parameters, "parameters", f"{width} bytes", _weights(cfg, shape), parts)
    if model.backend is InferenceBackend.transformers:
        work = _generation(cfg, shape)
    elif allocation["placement"] == "cpu":
        work = [_cache_on_cpu(cfg, shape, sizes)]
    else:
        work = [_cache(cfg, allocation, shape, sizes), Term(f"work ~{in_gib(ENGINE_WORK)}", ENGINE_WORK)]
    places = model.num_replicas * model.num_devices
    return ModelMemory(
        "inference", allocation["inference_model_devices"], places, [weights, *work, process(allocation)]
    )


def engine_memory_share(cfg: Config, allocation: DeviceAllocation, shape: ModelShape, sizes: MemorySizes) -> float:
    """What vLLM is given as `gpu_memory_utilization`.

    As configured, and on a shared accelerator no more than the other models leave (`memory_beside_engine`). Never less
    than the engine needs.
    """
    configured = cfg.inference_model.gpu_memory_utilization
    if not _must_share(cfg, allocation) or not sizes.accelerators:
        return configured
    others = [training_memory(cfg, allocation, shape)]
    if num_references(cfg):
        others.append(reference_memory(cfg, allocation, shape))
    taken = memory_beside_engine(others, allocation["sleeps"])
    size = min(sizes.accelerators)
    room = max((1 - SHARED_MARGIN) * size - taken - PROCESS, least_engine_memory(cfg, shape) + ENGINE_WORK)
    return min(configured, math.floor(1000 * room / size) / 1000)


def memory_beside_engine(others: list[ModelMemory], sleeps: bool) -> float:
    """Bytes that the other models on the engine's accelerator take while it is awake.

    An engine that sleeps while the trainer works leaves to it only what it holds all the time. A reference of its own
    works while the engine is awake: the collector has it score a batch before the trainer takes its turn.
    """
    return sum(other.certain if sleeps and other.kind == "train" else other.expected for other in others)


def engine_cache_bytes(cfg: Config, allocation: DeviceAllocation, shape: ModelShape, sizes: MemorySizes) -> int | None:
    """What vLLM is given as `kv_cache_memory_bytes`: the size of its cache on a shared accelerator, else None.

    On its own accelerator vLLM measures what its share leaves for the cache. On a shared one it would count as its own
    what the trainer takes meanwhile, and refuse to start when the trainer gives something back.
    """
    if not _must_share(cfg, allocation) or not sizes.accelerators:
        return None
    return int(_cache_bytes(cfg, allocation, shape, sizes))


def least_engine_memory(cfg: Config, shape: ModelShape) -> float:
    """Bytes of an accelerator without which vLLM does not start: weights, and the cache of the longest sequence."""
    longest = min(shape.window, longest_sequence(cfg, shape))
    return _weights(cfg, shape) + longest * _cache_per_token(cfg, shape)


def _must_share(cfg: Config, allocation: DeviceAllocation) -> bool:
    """Whether vLLM is on an accelerator with other models; Hugging Face's generation takes what it needs."""
    return allocation["placement"] == "colocated" and cfg.inference_model.backend is InferenceBackend.vllm


def _weights(cfg: Config, shape: ModelShape) -> float:
    model = cfg.inference_model
    return shape.parameters * BYTES[model.torch_dtype] / model.num_devices


def _cache_per_token(cfg: Config, shape: ModelShape) -> int:
    """Keys and values of a token in one place; shards that outnumber the heads hold the same ones."""
    model = cfg.inference_model
    heads = math.ceil(shape.kv_heads / model.num_devices)
    return 2 * shape.layers * heads * shape.head_dim * BYTES[model.torch_dtype]


def _least_cache(cfg: Config, shape: ModelShape) -> float:
    return least_engine_memory(cfg, shape) - _weights(cfg, shape)


def _cache_bytes(cfg: Config, allocation: DeviceAllocation, shape: ModelShape, sizes: MemorySizes) -> float:
    """What vLLM's share of an accelerator leaves for the cache."""
    assert sizes.accelerators
    budget = engine_memory_share(cfg, allocation, shape, sizes) * min(sizes.accelerators)
    return max(_least_cache(cfg, shape), budget - _weights(cfg, shape) - ENGINE_WORK)


def _cache(cfg: Config, allocation: DeviceAllocation, shape: ModelShape, sizes: MemorySizes) -> Term:
    if sizes.accelerators:
        return _describe_cache(cfg, shape, _cache_bytes(cfg, allocation, shape, sizes))
    return _cache_of_unknown_size(cfg, shape)


def _cache_on_cpu(cfg: Config, shape: ModelShape, sizes: MemorySizes) -> Term:
    """As configured, or what a share of the host's memory leaves."""
    gib = cfg.inference_model.kv_cache_gib
    if gib is not None:
        return _describe_cache(cfg, shape, gib * GIB)._replace(certain=gib * GIB)
    if sizes.host is None:
        return _cache_of_unknown_size(cfg, shape)
    budget = cfg.inference_model.gpu_memory_utilization * sizes.host
    return _describe_cache(cfg, shape, max(_least_cache(cfg, shape), budget - _weights(cfg, shape)))


def _cache_of_unknown_size(cfg: Config, shape: ModelShape) -> Term:
    least = _least_cache(cfg, shape)
    return Term(f"cache of at least {in_gib(least)}", least, least)


def _describe_cache(cfg: Config, shape: ModelShape, num_bytes: float) -> Term:
    per_token, tokens = _cache_per_token(cfg, shape), response_tokens(cfg, shape)
    responses = num_bytes / per_token / tokens
    text = f"cache {in_gib(num_bytes)} ({per_token / 1024:g} KiB a token: {responses:.0f} responses of {tokens} tokens)"
    return Term(text, num_bytes, _least_cache(cfg, shape))


def _generation(cfg: Config, shape: ModelShape) -> list[Term]:
    """Hugging Face's generation: a pass over a batch of prompts, then a cache that grows with their responses."""
    rows, length = cfg.env.num_envs, response_tokens(cfg, shape)
    one = length * _cache_per_token(cfg, shape)
    return [
        Term(f"cache of {rows} x {length} tokens ~{in_gib(rows * one)}", rows * one, one),
        forward_pass(shape, rows, min(length, PROMPT_TOKENS), BYTES[cfg.inference_model.torch_dtype]),
    ]
