"""Expected memory of the models that Hugging Face runs: the policy in training, and the reference."""

from expert_iteration.config import Config, OptimizerName, Parallel, RestartFrom, num_references
from expert_iteration.devices import DeviceAllocation, parallel_kind
from expert_iteration.memory_terms import (
    BYTES,
    ModelMemory,
    Term,
    chunk_of_logits,
    forward_pass,
    frozen_weights,
    in_gib,
    num_adapter_parameters,
    process,
    product,
    response_tokens,
    shared,
)
from expert_iteration.model_shape import ModelShape
from expert_iteration.sizes import derive_sizes

# What autograd keeps of a layer, against the inputs and outputs of its linear layers in the type of the forward pass:
# measured 1.34 to 1.86 in mixed precision (norms keep float32) and 1.03 to 1.32 in float32, over model families.
KEPT_SHARE = 1.9


def training_memory(cfg: Config, allocation: DeviceAllocation, shape: ModelShape) -> ModelMemory:
    """What one rank holds: weights, gradients and optimizer in float32, a frozen base under adapters, a micro-batch.

    FSDP shares out all but the micro-batch; under DDP each rank has the whole. What a micro-batch takes is gone when
    the optimizer makes its step, so of the two only the larger counts.
    """
    ranks = cfg.train_model.num_devices
    fsdp = parallel_kind(cfg, allocation) is Parallel.fsdp
    parts = ranks if fsdp else 1
    micro_batch = [*(_gathered(cfg, shape) if fsdp else _lowered_copies(cfg, shape)), _activations(cfg, shape)]
    step = _optimizer_step(cfg, allocation, shape, parts)
    terms = [
        *(_lora_terms if cfg.train_model.lora.enabled else _full_terms)(cfg, shape, parts),
        *_start_weights(cfg, allocation, shape, parts),
        *max(micro_batch, step, key=lambda terms: sum(term.expected for term in terms)),
        process(allocation),
    ]
    return ModelMemory("train", allocation["train_model_devices"], ranks, terms)


def reference_memory(cfg: Config, allocation: DeviceAllocation, shape: ModelShape) -> ModelMemory:
    """Weights, and a forward pass over what a batch keeps, or as much of it as goes through at once."""
    model, sizes = cfg.ref_model, derive_sizes(cfg)
    width, rows = BYTES[model.torch_dtype], min(sizes.num_envs, sizes.max_kept_per_batch)
    terms = [
        *frozen_weights(shape, width, model.quantization.enabled),
        forward_pass(shape, rows, response_tokens(cfg, shape), width),
        process(allocation),
    ]
    return ModelMemory("reference", allocation["ref_model_devices"], num_references(cfg), terms)


def _full_terms(cfg: Config, shape: ModelShape, ranks: int) -> list[Term]:
    return [_trained(cfg, shape.parameters, "parameters", ranks)]


def _lora_terms(cfg: Config, shape: ModelShape, ranks: int) -> list[Term]:
    base = frozen_weights(shape, _forward_width(cfg), cfg.train_model.quantization.enabled, ranks)
    return [*base, _trained(cfg, num_adapter_parameters(cfg, shape), "in adapters", ranks)]


def _trained(cfg: Config, number: int, noun: str, ranks: int) -> Term:
    """Float32 weights with their gradients and, but for SGD, two running means."""
    is_sgd = cfg.optimizer.name is OptimizerName.SGD
    factor = f"(4 weights + 4 gradients{'' if is_sgd else f' + 8 {cfg.optimizer.name}'})"
    return product(number, noun, factor, number * (8 if is_sgd else 16) / ranks, shared(ranks, "ranks"))


def _start_weights(cfg: Config, allocation: DeviceAllocation, shape: ModelShape, ranks: int) -> list[Term]:
    """What each batch begins anew from lies in host memory, which counts here where there are no accelerators."""
    if cfg.train.restart_from is not RestartFrom.base or allocation["train_model_devices"]:
        return []
    number = _num_trained(cfg, shape)
    return [product(number, "start weights", "4 bytes", 4 * number / ranks, shared(ranks, "ranks"))]


def _num_trained(cfg: Config, shape: ModelShape) -> int:
    return num_adapter_parameters(cfg, shape) if cfg.train_model.lora.enabled else shape.parameters


def _optimizer_step(cfg: Config, allocation: DeviceAllocation, shape: ModelShape, ranks: int) -> list[Term]:
    """On accelerators torch updates all parameters at once (`foreach`), with one more tensor for each meanwhile.

    Adam and AdamW take the roots of the second means; SGD adds weight decay to a copy of the gradients. It is not
    certain in the sense of a term: between steps it is not held, and an engine that is awake then may have the room.
    """
    is_plain = cfg.optimizer.name is OptimizerName.SGD and cfg.optimizer.weight_decay == 0
    if is_plain or not allocation["train_model_devices"]:
        return []
    num_bytes = 4 * _num_trained(cfg, shape) / ranks
    return [Term(f"a copy in the step of {cfg.optimizer.name} ~{in_gib(num_bytes)}", num_bytes)]


def _lowered_copies(cfg: Config, shape: ModelShape) -> list[Term]:
    """Autocast keeps its copy of each float32 matrix that it met until the forward pass is over."""
    if cfg.train_model.lora.enabled or not cfg.train.mixed_precision:
        return []
    num_bytes = _forward_width(cfg) * (shape.linear_parameters + shape.vocab * shape.hidden)
    return [Term(f"{cfg.train_model.torch_dtype} copies ~{in_gib(num_bytes)}", num_bytes)]


def _gathered(cfg: Config, shape: ModelShape) -> list[Term]:
    """Of the other ranks' shares, what is held at a time: all outside the layers, and two layers, lowered."""
    outside_width = _forward_width(cfg) if cfg.train_model.lora.enabled else 4
    outside = outside_width * (shape.parameters - shape.linear_parameters)
    num_bytes = outside + _forward_width(cfg) * 2 * shape.linear_parameters / shape.layers
    return [Term(f"gathered weights ~{in_gib(num_bytes)}", num_bytes)]


def _activations(cfg: Config, shape: ModelShape) -> Term:
    """What a micro-batch keeps for the backward pass, and the logits of a chunk of it."""
    rows, length = cfg.train.optim_batch_size, response_tokens(cfg, shape)
    tokens, width = rows * length, _forward_width(cfg)
    layer = KEPT_SHARE * width * tokens * shape.linear_ends / shape.layers
    if cfg.train_model.gradient_checkpointing:
        # The hidden states between layers, which float32 weights leave in float32, and one layer at a time.
        hidden_width = width if cfg.train_model.lora.enabled else 4
        kept = shape.layers * tokens * shape.hidden * hidden_width + layer
    else:
        kept = shape.layers * layer
    num_bytes = kept + chunk_of_logits(shape, tokens)
    return Term(f"activations of {rows} x {length} tokens ~{in_gib(num_bytes)}", num_bytes)


def _forward_width(cfg: Config) -> int:
    """Bytes of a number in the policy's forward pass, and of a frozen weight."""
    return BYTES[cfg.train_model.torch_dtype] if cfg.train.mixed_precision else 4
