"""Expected memory: its terms against real models, the table, and what is refused."""

import subprocess
import sys
from functools import cache

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import ei_utils
from expert_iteration import accelerators
from expert_iteration.accelerators import MemorySizes
from expert_iteration.cli import CONFIG_DIR, compose_config
from expert_iteration.config import Config
from expert_iteration.devices import compute_device_allocation
from expert_iteration.engine_memory import engine_cache_bytes, engine_memory, engine_memory_share
from expert_iteration.errors import UserError
from expert_iteration.memory import _loads, check_memory, describe_allocation
from expert_iteration.memory_terms import (
    FOUR_BITS,
    GIB,
    PROCESS,
    ModelMemory,
    chunk_of_logits,
    in_gib,
    num_adapter_parameters,
)
from expert_iteration.model_shape import ModelShape, read_model_shape, shape_of
from expert_iteration.resolve import resolve_config
from expert_iteration.trainer_memory import reference_memory, training_memory

SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-untied": Qwen2Config(**SMALL, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SMALL, head_dim=32),
    "llama": LlamaConfig(**SMALL, attention_bias=True),
    "gemma": GemmaConfig(**SMALL, head_dim=32),
    "gemma2": Gemma2Config(**SMALL, head_dim=32, sliding_window=16),
    "mistral": MistralConfig(**SMALL, sliding_window=16),
    "gpt2": GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=128),
}
FULL = "train_model.lora.enabled=false"
REFERENCE = "ref_model.num_devices=1"


@cache
def load(*overrides: str, task: str = "ei_gsm8k", mode: str = "sync") -> Config:
    return resolve_config(compose_config(task, mode, overrides), mode)


@cache
def family(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[name]).train()


@cache
def qwen(billions: float) -> ModelShape:
    """Qwen2.5's shapes."""
    hidden, layers, heads, kv_heads, intermediate, vocab = {
        0.5: (896, 24, 14, 2, 4864, 151936),
        1.5: (1536, 28, 12, 2, 8960, 151936),
        3: (2048, 36, 16, 2, 11008, 151936),
        7: (3584, 28, 28, 4, 18944, 152064),
    }[billions]
    return shape_of(
        Qwen2Config(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=intermediate,
            vocab_size=vocab,
            tie_word_embeddings=billions < 7,
            max_position_embeddings=32768 if billions < 7 else 131072,
        )
    )


def gpus(count: int, gib: float) -> MemorySizes:
    return MemorySizes(host=1000 * GIB, accelerators=[int(gib * GIB)] * count)


def allocate(cfg: Config, num_accelerators: int):
    return compute_device_allocation(cfg, num_accelerators)


class Allocations(TorchDispatchMode):
    """The most bytes that tensors of more than a number, made inside, hold at a time."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) and tensor.ndim else None
            if storage is not None and storage._cdata not in before:
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self.live.values()))
        return out


def training(shape: ModelShape, *overrides: str, num_accelerators: int = 8) -> ModelMemory:
    cfg = load(*overrides)
    return training_memory(cfg, allocate(cfg, num_accelerators), shape)


def term(model: ModelMemory, word: str) -> float:
    """The expected bytes of the one term whose text has a word."""
    [found] = [term.expected for term in model.terms if word in term.text]
    return found


# --- shapes ---


@pytest.mark.parametrize(("billions", "parameters"), [(0.5, 494_032_768), (1.5, 1_543_714_304), (3, 3_085_938_688)])
def test_published_models_have_their_published_sizes(billions, parameters):
    assert qwen(billions).parameters == parameters


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_are_those_of_the_real_model(name):
    shape, model = shape_of(FAMILIES[name]), family(name)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        cache = model(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    assert 2 * shape.layers * shape.kv_heads * shape.head_dim * 5 == sum(
        layer.keys.numel() + layer.values.numel() for layer in cache.layers
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_are_those_that_peft_adds(name):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_config(FAMILIES[name])
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", fan_in_fan_out=name == "gpt2"))
    trainable, _ = adapted.get_nb_trainable_parameters()
    assert num_adapter_parameters(load(), shape_of(FAMILIES[name])) == trainable


def test_a_shape_is_read_from_a_folder(tiny_folder):
    from safetensors import safe_open

    with safe_open(tiny_folder / "model.safetensors", framework="pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    assert read_model_shape(str(tiny_folder)).parameters == sum(sizes.values())


def test_a_window_limits_what_is_certain_of_a_cache_if_every_layer_has_it():
    assert shape_of(FAMILIES["mistral"]).window == 16
    assert {"sliding_attention", "full_attention"} == set(FAMILIES["gemma2"].layer_types)
    assert shape_of(FAMILIES["gemma2"]).window == FAMILIES["gemma2"].max_position_embeddings
    assert shape_of(FAMILIES["qwen2"]).window == FAMILIES["qwen2"].max_position_embeddings


# --- training ---


@pytest.mark.parametrize(("optimizer", "per_parameter"), [("AdamW", 16), ("Adam", 16), ("SGD", 8)])
def test_weights_gradients_and_optimizer_are_those_of_a_real_step(optimizer, per_parameter):
    model = AutoModelForCausalLM.from_config(FAMILIES["qwen2"])
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3)
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(ids, labels=ids).loss.backward()
    optim.step()
    held = [tensor for p in model.parameters() for tensor in (p, p.grad, *optim.state[p].values()) if tensor.ndim > 0]
    shape = shape_of(FAMILIES["qwen2"])
    expected = term(training(shape, FULL, f"optimizer.name={optimizer}"), "4 gradients")
    assert expected == sum(tensor.nbytes for tensor in held) == per_parameter * shape.parameters


@pytest.mark.parametrize(
    ("optimizer", "weight_decay", "copies"),
    [("AdamW", 0.01, 1), ("AdamW", 0, 1), ("Adam", 0.01, 1), ("SGD", 0.01, 1), ("SGD", 0, 0)],
)
def test_a_step_on_accelerators_takes_a_copy_of_all_parameters(optimizer, weight_decay, copies):
    """Of the tensors that torch's `foreach` makes, as many bytes are alive at a time as the term says."""
    weights = [torch.nn.Parameter(torch.zeros(300, 100)) for _ in range(4)]
    optim = getattr(torch.optim, optimizer)(weights, lr=1e-3, weight_decay=weight_decay, foreach=True)
    for _ in range(2):  # the first step makes the running means
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        with Allocations() as allocations:
            optim.step()
    assert allocations.peak == copies * sum(weight.nbytes for weight in weights)
    shape, rows = qwen(3), "train.optim_batch_size=1"
    memory = training(shape, FULL, rows, f"optimizer.name={optimizer}", f"optimizer.weight_decay={weight_decay}")
    found = [term for term in memory.terms if "a copy in the step" in term.text]
    assert [(term.expected, term.certain) for term in found] == [(4 * shape.parameters, 0)] * copies


def test_of_a_micro_batch_and_the_optimizers_step_the_larger_counts():
    shape, sharded = qwen(3), (FULL, "train_model.num_devices=2", "train.optim_batch_size=1")
    for rows, counted, other in ((1, "the step of AdamW", "activations"), (64, "activations", "the step")):
        arithmetic = training(shape, FULL, f"train.optim_batch_size={rows}").arithmetic
        assert counted in arithmetic
        assert other not in arithmetic
    assert term(training(shape, *sharded), "the step of AdamW") == 4 * shape.parameters / 2
    assert "activations" in training(shape).arithmetic  # adapters are few
    cfg = load(FULL, "train.optim_batch_size=1", "device=cpu")  # where torch takes one parameter at a time
    assert "activations" in training_memory(cfg, allocate(cfg, 0), shape).arithmetic


def test_adapters_leave_the_base_in_the_type_of_the_forward_pass():
    shape = qwen(3)
    memory = training(shape)
    assert term(memory, "parameters x 2 bytes") == 2 * shape.parameters
    assert term(memory, "in adapters x (4 weights + 4 gradients + 8 AdamW)") == 16 * 8 * shape.linear_ends
    whole = training(shape, "train.mixed_precision=false")
    assert term(whole, "parameters x 4 bytes") == 4 * shape.parameters


def test_four_bits_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(1024, 1024)
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    scales = [state.absmax, state.state2.absmax]
    measured = sum(tensor.nbytes for tensor in (packed, *scales)) / weight.numel()
    assert measured == pytest.approx(FOUR_BITS, rel=1e-3)


def test_quantization_packs_linear_layers_only():
    shape = qwen(1.5)
    memory = training(shape, "train_model.quantization.enabled=true")
    others = shape.parameters - shape.linear_parameters
    assert term(memory, "weights x 0.52 bytes") == shape.linear_parameters * FOUR_BITS
    assert term(memory, "others x 2 bytes") == 2 * others
    assert others > 151936 * 1536  # the embeddings
    cfg = load(FULL, "ref_model.quantization.enabled=true")
    assert term(reference_memory(cfg, allocate(cfg, 3), shape), "weights x 0.52 bytes") > 0


def test_fsdp_shares_out_and_ddp_does_not():
    shape, two = qwen(3), "train_model.num_devices=2"
    whole = term(training(shape, FULL), "4 gradients")
    assert term(training(shape, FULL, two), "4 gradients") == whole / 2
    assert term(training(shape, FULL, two, "train_model.parallel=ddp"), "4 gradients") == whole
    assert term(training(shape, two), "parameters x 2 bytes") == 2 * shape.parameters
    assert term(training(shape, two, "train_model.parallel=fsdp"), "parameters x 2 bytes") == shape.parameters


# The proportions of published models, an eighth as wide.
PROPORTIONS = {
    "qwen2.5-3b": (Qwen2Config, {"hidden_size": 256, "intermediate_size": 1376, "num_attention_heads": 16}),
    "qwen3-1.7b": (
        Qwen3Config,
        {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 16, "head_dim": 16},
    ),
    "llama3-8b": (LlamaConfig, {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 32}),
    "gemma2-2b": (
        Gemma2Config,
        {"hidden_size": 288, "intermediate_size": 1152, "num_attention_heads": 8, "head_dim": 32},
    ),
}
TOKENS = 2 * 123  # unlike any width


def test_start_weights_lie_in_host_memory_beside_what_is_trained():
    def training(*overrides, accelerators):
        cfg = load(*overrides, "device=cuda" if accelerators else "device=cpu", FULL)
        return training_memory(cfg, allocate(cfg, accelerators), qwen(0.5))

    base, shape = "train.restart_from=base", qwen(0.5)
    for ranks in (1, 2):
        devices = f"train_model.num_devices={ranks}"
        with_start, without = training(base, devices, accelerators=0), training(devices, accelerators=0)
        assert with_start.certain - without.certain == 4 * shape.parameters
        assert any(term.text == "494.03 M start weights x 4 bytes" for term in with_start.terms)
    assert training(base, accelerators=4) == training(accelerators=4)


def test_a_refresh_is_packed_like_a_push():
    def packed(*overrides):
        cfg = load(*overrides, "device=cpu", FULL, "ref_model.torch_dtype=float32")
        return _loads(cfg, allocate(cfg, 0), qwen(0.5), MemorySizes(host=GIB, accelerators=[]))[0].certain

    assert packed("ref_model.refresh_every=2") - packed() == 2 * 4 * qwen(0.5).parameters


def test_only_a_whole_float32_model_is_copied_by_autocast():
    shape, rows, two = qwen(3), "train.optim_batch_size=64", "train_model.num_devices=2"
    assert term(training(shape, FULL, rows), "bfloat16 copies") == 2 * (shape.linear_parameters + 151936 * 2048)
    assert term(training(shape, FULL, rows, two), "gathered weights") < 2 * 2**30
    for overrides in ((), (FULL, "train.mixed_precision=false"), (FULL, two)):
        assert "copies" not in training(shape, rows, *overrides).arithmetic


def kept_bytes(model: torch.nn.Module) -> int:
    """What autograd keeps of a forward pass under autocast, weights and their lowered copies left out."""
    weights = [parameter.shape for parameter in model.parameters()]
    lowered = {*weights, *(shape[::-1] for shape in weights)}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape not in lowered:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=torch.zeros(2, TOKENS // 2, dtype=torch.long), use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def kept_by_layers(name: str, layers: int, lora: bool) -> tuple[int, ModelShape]:
    from peft import LoraConfig, get_peft_model

    config_class, sizes = PROPORTIONS[name]
    config = config_class(vocab_size=100, num_hidden_layers=layers, num_key_value_heads=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    if lora:
        model = get_peft_model(model.bfloat16(), LoraConfig(r=8, target_modules="all-linear")).get_base_model()
    return kept_bytes(model.model), shape_of(config)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", PROPORTIONS)
def test_activations_are_about_what_autograd_keeps(name, lora):
    (one, _), (two, shape) = (kept_by_layers(name, layers, lora) for layers in (1, 2))
    cfg = load(
        f"train_model.lora.enabled={str(lora).lower()}",
        "train_model.gradient_checkpointing=false",
        "train.optim_batch_size=2",
        "inference_model.max_tokens=100",
        f"inference_model.max_model_len={TOKENS // 2}",
    )
    memory = training_memory(cfg, allocate(cfg, 3), shape)
    estimate = (term(memory, f"activations of 2 x {TOKENS // 2} tokens") - chunk_of_logits(shape, TOKENS)) / 2
    # A bound that is not far off: of a family it knows nothing but the linear layers.
    assert 0.7 < (two - one) / estimate <= 1


def test_checkpointing_keeps_hidden_states_and_one_layer():
    shape = qwen(3)
    on, off = (
        term(training(shape, f"train_model.gradient_checkpointing={value}"), "activations") for value in (True, False)
    )
    logits = chunk_of_logits(shape, 4 * 1536)
    hidden_states = shape.layers * 4 * 1536 * shape.hidden * 2
    assert on - logits == pytest.approx((off - logits) / shape.layers + hidden_states)


def test_logits_count_for_a_chunk_of_tokens_whatever_the_batch():
    assert chunk_of_logits(qwen(3), 10_000) == chunk_of_logits(qwen(3), 10_000_000) == 512 * 2**20
    assert chunk_of_logits(qwen(0.5), 10) == 4 * 4 * 10 * 151936


# --- the engine ---


def test_the_engine_takes_its_share_and_fills_it_with_cache():
    cfg = load()
    memory = engine_memory(cfg, allocate(cfg, 2), qwen(3), gpus(2, 80))
    assert memory.expected == pytest.approx(60 * GIB + PROCESS)
    # 36 layers x 2 heads x 128 x keys and values in two bytes
    assert any("(36 KiB a token: 991 responses of 1536 tokens)" in term.text for term in memory.terms)
    assert memory.certain == pytest.approx(2 * 3_085_938_688 + 32768 * 36 * 1024 + PROCESS)


def test_shards_share_weights_and_heads():
    cfg = load("inference_model.num_devices=2")
    memory = engine_memory(cfg, allocate(cfg, 3), qwen(3), gpus(3, 80))
    assert term(memory, "parameters x 2 bytes / 2 shards") == qwen(3).parameters
    assert any("(18 KiB a token" in term.text for term in memory.terms)
    four = load("inference_model.num_devices=4")  # more shards than heads
    assert "(18 KiB a token" in engine_memory(four, allocate(four, 5), qwen(3), gpus(5, 80)).arithmetic


def test_generation_by_hugging_face_holds_a_batch():
    cfg = load("inference_model.backend=transformers", "env.num_envs=32")
    memory = engine_memory(cfg, allocate(cfg, 2), qwen(3), gpus(2, 80))
    assert term(memory, "cache of 32 x 1536 tokens") == 32 * 1536 * 36 * 1024
    assert term(memory, "forward pass of 32 x 512 tokens") > 0


def test_the_cache_on_a_cpu_is_as_configured_or_a_share_of_the_host():
    sizes = MemorySizes(host=64 * GIB, accelerators=[])
    cfg = load(task="ei_tiny")
    assert term(engine_memory(cfg, allocate(cfg, 0), qwen(0.5), sizes), "cache") == GIB
    cfg = load("inference_model.kv_cache_gib=null", task="ei_tiny")
    memory = engine_memory(cfg, allocate(cfg, 0), qwen(0.5), sizes)
    assert memory.expected == pytest.approx(32 * GIB + PROCESS)


def test_a_dedicated_engine_gets_the_share_that_is_configured():
    for count, sizes in ((2, gpus(2, 24)), (2, MemorySizes(GIB, None)), (0, MemorySizes(GIB, []))):
        cfg = load("device=auto")
        allocation = allocate(cfg, count)
        assert engine_memory_share(cfg, allocation, qwen(0.5), sizes) == 0.75
        assert engine_cache_bytes(cfg, allocation, qwen(0.5), sizes) is None


def shared(gib: float, *overrides: str, billions: float = 3, mode: str = "sync") -> tuple[float, int]:
    cfg = load(*overrides, mode=mode)
    sizes, allocation = gpus(1, gib), allocate(cfg, 1)
    share = engine_memory_share(cfg, allocation, qwen(billions), sizes)
    cache = engine_cache_bytes(cfg, allocation, qwen(billions), sizes)
    assert cache is not None
    return share, cache


@pytest.mark.parametrize("overrides", [(), (FULL,), (REFERENCE,)])
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("gib", [22, 24, 40, 80, 140])
def test_on_a_shared_accelerator_all_fits(gib, mode, overrides):
    """Where a model of half a billion parameters can be held at all."""
    cfg, shape, sizes = load(*overrides, mode=mode), qwen(0.5), gpus(1, gib)
    allocation = allocate(cfg, 1)
    share, cache = shared(gib, *overrides, billions=0.5, mode=mode)
    trainer = training_memory(cfg, allocation, shape)
    taken = trainer.certain if allocation["sleeps"] else trainer.expected
    if allocation["ref_model_devices"]:
        taken += reference_memory(cfg, allocation, shape).expected
    assert share <= 0.75
    assert share * gib * GIB + taken + PROCESS <= 0.95 * gib * GIB
    assert 0 < cache < share * gib * GIB - 2 * shape.parameters
    assert [note for note in check_memory(cfg, allocation, shape, sizes) if "run out" in note] == []


def test_an_engine_that_sleeps_leaves_more_for_its_cache():
    assert shared(24)[1] > shared(24, "train.sync_iter=false")[1]
    assert shared(140) == (0.75, shared(140, "train.sync_iter=false")[1])


def test_a_reference_works_while_the_engine_is_awake():
    cfg, shape, sizes = load(REFERENCE), qwen(3), gpus(1, 40)
    allocation = allocate(cfg, 1)
    trainer, reference = (of(cfg, allocation, shape) for of in (training_memory, reference_memory))
    engine = engine_memory(cfg, allocation, shape, sizes)
    together = engine.expected + trainer.certain + reference.expected
    assert allocation["sleeps"]
    assert 0.94 * 40 * GIB < together <= 0.95 * 40 * GIB
    assert describe_allocation(cfg, allocation, shape, sizes)[-1].split()[3] == f"{together / GIB:.1f}"


def test_a_share_that_is_lowered_is_noted():
    cfg = load()
    [note] = check_memory(cfg, allocate(cfg, 1), qwen(3), gpus(1, 24))
    assert note.startswith("note: inference_model.gpu_memory_utilization is lowered from 0.75 to 0.65")
    assert check_memory(cfg, allocate(cfg, 1), qwen(3), gpus(1, 80)) == []
    cfg = load("inference_model.backend=transformers", "env.num_envs=32")  # has no share
    assert check_memory(cfg, allocate(cfg, 1), qwen(3), gpus(1, 24)) == []
    assert engine_cache_bytes(cfg, allocate(cfg, 1), qwen(3), gpus(1, 24)) is None


# --- the table ---


def table(shape: ModelShape, sizes: MemorySizes, *overrides: str, task: str = "ei_gsm8k") -> list[str]:
    cfg = load(*overrides, task=task)
    return describe_allocation(cfg, allocate(cfg, len(sizes.accelerators or [])), shape, sizes)


def test_three_accelerators_are_described_with_their_arithmetic():
    assert table(qwen(3), gpus(3, 80), FULL) == [
        "devices (dedicated) and expected memory of each:",
        "  inference  GPU 0  3.09 B parameters x 2 bytes + cache 52.3 GiB (36 KiB a token: 991 responses of 1536 "
        "tokens) + work ~2.0 GiB + CUDA 0.5 GiB = 60.5 GiB of 80.0 GiB",
        "  reference  GPU 1  3.09 B parameters x 2 bytes + forward pass of 32 x 1536 tokens ~4.3 GiB + CUDA 0.5 GiB = "
        "10.5 GiB of 80.0 GiB",
        "  train      GPU 2  3.09 B parameters x (4 weights + 4 gradients + 8 AdamW) + a copy in the step of AdamW "
        "~11.5 GiB + CUDA 0.5 GiB = 58.0 GiB of 80.0 GiB",
    ]


def test_a_shared_accelerator_is_described_with_the_sum():
    lines = table(qwen(1.5), gpus(1, 24))
    assert lines[0] == "devices (colocated, the engine sleeps while the trainer works) and expected memory of each:"
    assert [line.split()[0] for line in lines[1:]] == ["inference", "train", "reference", "together"]
    assert lines[3] == "  reference  none   the policy with its adapters off, in the trainer"
    assert lines[4].startswith("  together   GPU 0  ")
    assert lines[4].endswith(" of 24.0 GiB")


def test_an_evaluation_alone_holds_the_engine_only():
    lines = table(qwen(3), gpus(1, 80), FULL, "eval.only=true")
    assert [line.split()[:3] for line in lines[1:]] == [["inference", "GPU", "0"]]
    on_cpu = table(qwen(0.5), MemorySizes(host=24 * GIB, accelerators=[]), "eval.only=true", task="ei_tiny")
    assert [line.split()[0] for line in on_cpu[1:]] == ["inference"]


def test_without_an_engine_none_is_described():
    trained_on = f"train.from_expert_set={CONFIG_DIR}"
    lines = table(qwen(3), gpus(1, 80), FULL, trained_on, "inference_model.num_devices=3")  # of 16 heads
    assert [line.split()[:3] for line in lines[1:]] == [
        ["reference", "GPU", "0"],
        ["train", "GPU", "0"],
        ["together", "GPU", "0"],
    ]


def test_of_two_the_second_is_described_with_the_sum():
    lines = table(qwen(3), gpus(2, 80), FULL)
    assert [line.split()[0] for line in lines[1:]] == ["inference", "reference", "train", "together"]
    assert lines[1].endswith("of 80.0 GiB")
    assert lines[4] == "  together   GPU 1  68.5 GiB of 80.0 GiB"


def test_several_devices_are_listed():
    two = ("train_model.num_devices=2", "ref_model.num_devices=2", "inference_model.num_devices=2")
    places = [line.split("  3.09 B")[0] for line in table(qwen(3), gpus(8, 80), *two)[1:]]
    assert places == ["  inference  GPU 0, 1, each", "  reference  GPU 2, 3, each", "  train      GPU 4, 5, each"]


def test_processes_on_a_cpu_are_counted_together():
    sizes = MemorySizes(host=24 * GIB, accelerators=[])
    one, two = (table(qwen(0.5), sizes, f"train_model.num_devices={ranks}", task="ei_tiny") for ranks in (1, 2))
    assert one[0] == "devices (cpu) and expected memory of each:"
    assert "CPU, 2 processes, each" in two[3]
    total = [float(lines[-1].split()[3]) for lines in (one, two)]
    trainer = float(one[3].split()[-2])
    assert one[-1].split()[:3] == ["together", "this", "host"]
    assert total[1] - total[0] == pytest.approx(trainer, abs=0.15)  # each figure is rounded to 0.1


def test_what_a_cluster_has_is_not_guessed():
    cfg = load("ray.init_config.address=auto")
    sizes = MemorySizes(host=None, accelerators=None)
    lines = describe_allocation(cfg, allocate(cfg, 8), qwen(7), sizes)
    assert not any(" of 8" in line for line in lines)
    assert "cache of at least 7.0 GiB" in lines[1]
    assert check_memory(cfg, allocate(cfg, 8), qwen(7), sizes) == []


def test_an_engine_in_a_cluster_knows_its_own_accelerator(monkeypatch, tiny_folder):
    made = {}
    monkeypatch.setattr(accelerators, "accelerator_memory", lambda: [24 * GIB])
    monkeypatch.setattr("expert_iteration.receiving_engine.ReceivingVLLMEngine", lambda *_, **given: made.update(given))
    monkeypatch.setattr("expert_iteration.vllm_engine.VLLMEngine", lambda *_, **given: made.update(given))
    cfg = load("ray.init_config.address=auto", f"model.name={tiny_folder}")
    allocation = allocate(cfg, 1)
    ei_utils.make_engine(cfg, allocation)
    assert made["cache_bytes"] == engine_cache_bytes(cfg, allocation, read_model_shape(str(tiny_folder)), gpus(1, 24))


def test_the_hosts_of_a_cluster_are_not_taken_for_one():
    cfg = load("ray.init_config.address=auto", "inference_model.kv_cache_gib=null", task="ei_tiny")
    allocation, sizes = allocate(cfg, 0), MemorySizes(host=None, accelerators=None)
    assert check_memory(cfg, allocation, qwen(7), sizes) == []
    lines = describe_allocation(cfg, allocation, qwen(7), sizes)
    assert "cache of at least" in lines[1]
    assert lines[-1].startswith("  together   the cluster's hosts")
    assert " of " not in lines[-1]


# --- refusals ---

# (size, accelerators, GiB of each, overrides, what the message must contain)
TOO_LARGE = [
    (
        3,
        1,
        24,
        (FULL,),
        ["GPU 0 has 24.0 GiB", "train 46.5 GiB", "train_model.lora.enabled=true", "3 accelerators, one"],
    ),
    (7, 3, 80, (FULL,), ["GPU 2 has 80.0 GiB", "parallel=fsdp", "train_model.lora.enabled=true"]),
    (7, 3, 12, (), ["gpu_memory_utilization (0.75) of 12.0 GiB is 9.0 GiB", "raise inference_model.num_devices"]),
    (
        7,
        8,
        12,
        ("inference_model.num_devices=4",),
        ["GPU 4 has 12.0 GiB", "train_model.quantization.enabled=true", "smaller model"],
    ),
    (
        7,
        8,
        12,
        ("inference_model.num_devices=4", "train_model.quantization.enabled=true", "ref_model.num_devices=1"),
        ["GPU 4 has 12.0 GiB", "reference 14.7 GiB", "ref_model.quantization.enabled=true"],
    ),
    (
        3,
        2,
        80,
        ("inference_model.gpu_memory_utilization=0.08",),
        ["(0.08) of 80.0 GiB is 6.4 GiB", "a sequence of 32768 tokens", "max_model_len"],
    ),
]


@pytest.mark.parametrize(("billions", "count", "gib", "overrides", "parts"), TOO_LARGE)
def test_what_cannot_fit_is_refused_with_the_remedy(billions, count, gib, overrides, parts):
    cfg = load(*overrides)
    with pytest.raises(UserError) as error:
        check_memory(cfg, allocate(cfg, count), qwen(billions), gpus(count, gib))
    assert [part for part in parts if part not in str(error.value)] == []


@pytest.mark.parametrize(("billions", "heads", "choices"), [(0.5, 14, "1, 2, 7, 14"), (1.5, 12, "1, 2, 3, 4, 6, 12")])
def test_devices_that_do_not_divide_the_heads_are_refused(billions, heads, choices):
    cfg = load("inference_model.num_devices=5")
    with pytest.raises(
        UserError, match=rf"inference_model\.num_devices \(5\).*the {heads} attention.*one of {choices};.*num_replicas"
    ):
        check_memory(cfg, allocate(cfg, 8), qwen(billions), gpus(8, 80))
    check_memory(cfg := load("inference_model.num_devices=2"), allocate(cfg, 8), qwen(billions), gpus(8, 80))


def test_remedies_are_not_offered_twice():
    cfg = load("inference_model.num_devices=4", "train_model.quantization.enabled=true", "ref_model.num_devices=1")
    with pytest.raises(UserError) as error:
        check_memory(cfg, allocate(cfg, 8), qwen(7), gpus(8, 12))
    assert "train_model" not in str(error.value)
    assert "accelerators, one for each" not in str(error.value)  # it has one of its own already


def test_the_smallest_accelerator_decides():
    cfg = load(FULL)
    sizes = MemorySizes(GIB, [80 * GIB, 80 * GIB, 24 * GIB])
    with pytest.raises(UserError, match=r"has 24\.0 GiB"):
        check_memory(cfg, allocate(cfg, 3), qwen(3), sizes)


def test_a_host_that_is_too_small_is_refused():
    cfg = load("train_model.num_devices=2", task="ei_tiny")
    with pytest.raises(UserError, match=r"this host has 24\.0 GiB.*train 2 x 46\.0 GiB.*kv_cache_gib") as error:
        check_memory(cfg, allocate(cfg, 0), qwen(3), MemorySizes(24 * GIB, []))
    assert "accelerators" not in str(error.value)
    assert check_memory(cfg, allocate(cfg, 0), qwen(0.5), MemorySizes(100 * GIB, [])) == []


def test_a_small_host_runs_the_tiny_model_on_two_devices_each(tiny_folder):
    cfg = load(*(f"{model}.num_devices=2" for model in ("train_model", "ref_model", "inference_model")), task="ei_tiny")
    check_memory(cfg, allocate(cfg, 0), read_model_shape(str(tiny_folder)), MemorySizes(6 * GIB, []))


def test_what_only_the_estimate_exceeds_is_noted():
    cfg = load("train.optim_batch_size=256")
    [note] = check_memory(cfg, allocate(cfg, 2), qwen(3), gpus(2, 40))
    assert note.startswith("note: GPU 1 may run out of memory: ")
    assert "of 40.0 GiB" in note
    assert "train.optim_batch_size" in note


def test_the_file_for_one_gpu_says_what_it_takes():
    cfg, sizes = load(task="ei_gsm8k_1gpu"), gpus(1, 24)
    allocation = allocate(cfg, 1)
    engine = engine_memory(cfg, allocation, qwen(1.5), sizes)
    head = (CONFIG_DIR / "ei_gsm8k_1gpu.yaml").read_text().partition("\n\n")[0]
    assert f"{in_gib(engine.expected)} for the engine" in head
    assert "cache for 348 responses" in head
    assert ": 348 responses of 1024 tokens" in engine.arithmetic
    assert f"{in_gib(training_memory(cfg, allocation, qwen(1.5)).expected)}\n#           for training" in head


# (file, overrides, GPUs, GiB of each, billions of parameters): what the heads of the files promise
HARDWARE = [
    ("ei_gsm8k", (), 2, 24, 3),
    ("ei_gsm8k", (), 1, 40, 3),
    ("ei_gsm8k", (FULL,), 3, 80, 3),
    ("ei_gsm8k_1gpu", (), 1, 24, 1.5),
    ("ei_ifeval", (), 6, 40, 7),
    ("ei_ifeval", (FULL,), 7, 80, 7),
]


@pytest.mark.parametrize(("task", "overrides", "count", "gib", "billions"), HARDWARE)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_files_fit_the_hardware_that_they_name(mode, task, overrides, count, gib, billions):
    cfg = load(*overrides, task=task, mode=mode)
    allocation = allocate(cfg, count)
    assert allocation["ray_num_gpus"] == count
    # What is sold as 24 GB has 22 to 24 GiB.
    notes = check_memory(cfg, allocation, qwen(billions), gpus(count, 0.93 * gib))
    assert [note for note in notes if "run out" in note] == []


def test_the_driver_pays_nothing_for_these_modules():
    code = (
        "import sys, expert_iteration.memory; print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
