"""Which model sits where and how much memory it will take: shown at start with the arithmetic, refused where too much.

What is certain (weights, gradients, optimizer, the cache of one sequence) refuses a run before anything loads. What is
estimated (activations, the size of caches) is shown, and noted where it may be too much.
"""

from typing import NamedTuple

from expert_iteration.accelerators import MemorySizes
from expert_iteration.config import Config, InferenceBackend, num_engines, num_references, num_trainers
from expert_iteration.devices import DeviceAllocation, device_counts
from expert_iteration.engine_memory import (
    ENGINE_WORK,
    engine_memory,
    engine_memory_share,
    least_engine_memory,
    memory_beside_engine,
)
from expert_iteration.errors import UserError
from expert_iteration.memory_terms import (
    BYTES,
    PROCESS,
    ModelMemory,
    in_gib,
    longest_sequence,
    num_adapter_parameters,
)
from expert_iteration.model_shape import ModelShape
from expert_iteration.trainer_memory import reference_memory, training_memory

HOST = "this host"
CLUSTER = "the cluster's hosts"
# On the CPU, beside the models' processes: the driver, the collector, the buffer, and Ray itself.
OTHER_PROCESSES = 4
# Of the weights of a push, on the host: what the trainer packs, and what Ray hands to the engines. So of a refresh.
PACKED_COPIES = 2


class _Load(NamedTuple):
    """All that is in one memory; `size` None: unknown."""

    place: str
    models: list[ModelMemory]
    size: int | None
    expected: float
    certain: float


def describe_allocation(cfg: Config, allocation: DeviceAllocation, shape: ModelShape, sizes: MemorySizes) -> list[str]:
    """Lines for the start of a run: model, devices, expected memory with its arithmetic.

    Args:
        cfg: the configuration.
        allocation: which model has which devices.
        shape: of the model (`read_model_shape`).
        sizes: the memory that there is.
    """
    loads = _loads(cfg, allocation, shape, sizes)
    alone = {model.kind: load.size for load in loads if len(load.models) == 1 for model in load.models}
    rows = [
        (model.kind, _place(model), f"{model.arithmetic}{_of(alone.get(model.kind))}")
        for model in _models(cfg, allocation, shape, sizes)
    ]
    if num_references(cfg) == 0 and num_trainers(cfg):
        rows.append(("reference", "none", "the policy with its adapters off, in the trainer"))
    rows += [
        ("together", load.place, f"{in_gib(load.expected)}{_of(load.size)}") for load in loads if len(load.models) > 1
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    sleep = ", the engine sleeps while the trainer works" if allocation["sleeps"] else ""
    headline = f"devices ({allocation['placement']}{sleep}) and expected memory of each:"
    return [headline, *(f"  {kind:{widths[0]}}  {place:{widths[1]}}  {text}" for kind, place, text in rows)]


def check_memory(cfg: Config, allocation: DeviceAllocation, shape: ModelShape, sizes: MemorySizes) -> list[str]:
    """Refuses models that are too large for their devices.

    Args:
        cfg: the configuration.
        allocation: which model has which devices.
        shape: of the model (`read_model_shape`).
        sizes: the memory that there is.

    Returns:
        Notes on what was lowered to fit, and on what fits only if the estimates are too high.

    Raises:
        UserError: weights, gradients, optimizer and the least cache exceed what there is; or the engine's devices do
            not divide the attention heads.
    """
    notes = _check_engine(cfg, allocation, shape, sizes) if num_engines(cfg) else []
    for load in _loads(cfg, allocation, shape, sizes):
        if load.size is None:
            continue
        if load.certain > load.size:
            raise UserError(_explain_too_large(cfg, load))
        if load.expected > load.size:
            notes.append(
                f"note: {load.place} may run out of memory: {in_gib(load.expected)} are expected{_of(load.size)}; "
                "lower train.optim_batch_size, or see the README on running out of memory"
            )
    return notes


def _models(cfg: Config, allocation: DeviceAllocation, shape: ModelShape, sizes: MemorySizes) -> list[ModelMemory]:
    """In the order in which devices are given out."""
    engine = [engine_memory(cfg, allocation, shape, sizes)] if num_engines(cfg) else []
    reference = [reference_memory(cfg, allocation, shape)] if num_references(cfg) else []
    training = [training_memory(cfg, allocation, shape)] if num_trainers(cfg) else []
    return [*engine, *reference, *training]


def _loads(cfg: Config, allocation: DeviceAllocation, shape: ModelShape, sizes: MemorySizes) -> list[_Load]:
    """One for the host; or one for each accelerator, of those with the same models on them the first."""
    models = _models(cfg, allocation, shape, sizes)
    if allocation["placement"] == "cpu":
        packed = PACKED_COPIES * _packed_bytes(cfg, shape)
        expected = packed + OTHER_PROCESSES * PROCESS + sum(model.places * model.expected for model in models)
        certain = packed + sum(model.places * model.certain for model in models)
        place = CLUSTER if sizes.host is None else HOST
        return [_Load(place, models, sizes.host, expected, certain)]
    # Which of the machine's accelerators a model gets, Ray decides: the smallest must do.
    size = min(sizes.accelerators) if sizes.accelerators else None
    loads: dict[tuple[str, ...], _Load] = {}
    for device in range(allocation["ray_num_gpus"]):
        present = [model for model in models if device in model.devices]
        certain = sum(model.certain for model in present)
        load = _Load(f"GPU {device}", present, size, _peak(present, allocation["sleeps"]), certain)
        loads.setdefault(tuple(model.kind for model in present), load)
    return list(loads.values())


def _peak(models: list[ModelMemory], sleeps: bool) -> float:
    """The most that models expect of one accelerator at a time."""
    if not sleeps:
        return sum(model.expected for model in models)
    engine, *others = models
    awake = engine.expected + memory_beside_engine(others, sleeps)
    return max(awake, PROCESS + ENGINE_WORK + sum(model.expected for model in others))


def _packed_bytes(cfg: Config, shape: ModelShape) -> float:
    """Of what is sent to engines, and to references if they are refreshed; nothing without an engine or a trainer."""
    if not num_engines(cfg) or not num_trainers(cfg):
        return 0.0
    pushed = num_adapter_parameters(cfg, shape) if cfg.weight_update.lora_only else shape.parameters
    refreshed = 0 if cfg.ref_model.refresh_every is None else shape.parameters
    return pushed * BYTES[cfg.inference_model.torch_dtype] + refreshed * BYTES[cfg.ref_model.torch_dtype]


def _place(model: ModelMemory) -> str:
    if not model.devices:
        return "CPU" if model.places == 1 else f"CPU, {model.places} processes, each"
    return f"GPU {', '.join(map(str, model.devices))}{', each' if len(model.devices) > 1 else ''}"


def _of(size: int | None) -> str:
    return "" if size is None else f" of {in_gib(size)}"


def _check_engine(cfg: Config, allocation: DeviceAllocation, shape: ModelShape, sizes: MemorySizes) -> list[str]:
    """Of `check_memory` what concerns the engine alone."""
    _check_shards(cfg, shape)
    _check_share(cfg, allocation, shape, sizes)
    return _note_share(cfg, allocation, shape, sizes)


def _check_shards(cfg: Config, shape: ModelShape) -> None:
    """vLLM gives each of an engine's devices as many attention heads, and refuses only in the engine's process."""
    shards = cfg.inference_model.num_devices
    if cfg.inference_model.backend is InferenceBackend.vllm and shape.heads % shards:
        fitting = [number for number in range(1, shape.heads + 1) if shape.heads % number == 0]
        raise UserError(
            f"inference_model.num_devices ({shards}) must divide the {shape.heads} attention heads of model.name "
            f"({cfg.model.name}), which vLLM shares out: choose one of {', '.join(map(str, fitting))}; "
            "inference_model.num_replicas gives more engines."
        )


def _check_share(cfg: Config, allocation: DeviceAllocation, shape: ModelShape, sizes: MemorySizes) -> None:
    """vLLM refuses a share without room for its weights and one sequence, but only once it has loaded them."""
    model = cfg.inference_model
    if model.backend is not InferenceBackend.vllm or allocation["placement"] == "cpu" or not sizes.accelerators:
        return
    size, share = min(sizes.accelerators), engine_memory_share(cfg, allocation, shape, sizes)
    least = least_engine_memory(cfg, shape)
    if least > share * size:
        raise UserError(
            f"inference_model.gpu_memory_utilization ({share:g}) of {in_gib(size)} is {in_gib(share * size)}, and the "
            f"engine needs at least {in_gib(least)} for its weights and the cache of a sequence of "
            f"{longest_sequence(cfg, shape)} tokens: raise it, lower inference_model.max_model_len, or raise "
            "inference_model.num_devices, which share the model."
        )


def _note_share(cfg: Config, allocation: DeviceAllocation, shape: ModelShape, sizes: MemorySizes) -> list[str]:
    configured, share = cfg.inference_model.gpu_memory_utilization, engine_memory_share(cfg, allocation, shape, sizes)
    if share == configured:
        return []
    return [
        f"note: inference_model.gpu_memory_utilization is lowered from {configured:g} to {share:g}, which the other "
        "models on its accelerator leave"
    ]


def _explain_too_large(cfg: Config, load: _Load) -> str:
    times = (f"{model.places} x " if load.place == HOST and model.places > 1 else "" for model in load.models)
    parts = [f"{model.kind} {many}{in_gib(model.certain)}" for many, model in zip(times, load.models, strict=True)]
    return (
        f"model.name ({cfg.model.name}) is too large: {load.place} has {in_gib(load.size or 0)}, and at least "
        f"{in_gib(load.certain)} are needed, activations not counted ({', '.join(parts)}): "
        f"{'; '.join(_remedies(cfg, load))}."
    )


def _remedies(cfg: Config, load: _Load) -> list[str]:
    """What would take less of this memory, if it is not done already."""
    kinds = {model.kind for model in load.models}
    train, on_host = cfg.train_model, load.place == HOST
    trains, lora = "train" in kinds, train.lora.enabled
    remedies = {
        "set train_model.lora.enabled=true": trains and not lora,
        "set train_model.quantization.enabled=true": trains and lora and not train.quantization.enabled,
        "set ref_model.quantization.enabled=true": "reference" in kinds and not cfg.ref_model.quantization.enabled,
        f"use {sum(device_counts(cfg).values())} accelerators, one for each": len(kinds) > 1 and not on_host,
        "raise train_model.num_devices with train_model.parallel=fsdp": kinds == {"train"} and not on_host,
        "lower inference_model.kv_cache_gib": on_host and cfg.inference_model.kv_cache_gib is not None,
    }
    return [*(remedy for remedy, helps in remedies.items() if helps), "choose a smaller model"]
