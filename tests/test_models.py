"""`expert_iteration.models`: how models are loaded, and what is done with loaded ones."""

import shutil
import sys

import pytest
import torch
import torch._inductor.config
from bitsandbytes.nn import Linear4bit
from builders import random_model, random_policy
from model_families import make_family_folder
from peft.utils.integrations import dequantize_bnb_weight

from expert_iteration.adapter_reference import BaseScorer
from expert_iteration.chat_template import load_tokenizer
from expert_iteration.errors import UserError
from expert_iteration.log_probs import LogProbModel, token_log_probs
from expert_iteration.models import compile_forward, context_length, evaluating, load_model, model_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_loaded_in_its_dtype_ready_to_score(tiny_folder, dtype):
    model = load_model(str(tiny_folder), dtype=dtype, attn_implementation="eager", device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.config._attn_implementation == "eager"
    assert not model.training


def test_the_model_is_the_one_named_or_the_built_in(make_cfg, tiny_folder, tmp_path, monkeypatch):
    assert model_path(make_cfg(f"model.name={tiny_folder}")) == str(tiny_folder)
    assert model_path(make_cfg("model.name=ORG/MODEL")) == "ORG/MODEL"
    asked = []
    monkeypatch.setattr(
        "expert_iteration.tiny.ensure_tiny_model",
        lambda seed, cache_dir: asked.append((seed, cache_dir)) or tmp_path / "built",
    )
    assert model_path(make_cfg("tiny.model_seed=3", f"tiny.cache_dir={tmp_path}")) == str(tmp_path / "built")
    assert asked == [(3, tmp_path)]


def test_the_context_is_the_given_or_the_models_own(tiny_folder):
    assert context_length(str(tiny_folder), None) == load(tiny_folder).config.max_position_embeddings
    assert context_length(str(tiny_folder), 17) == 17


def load(folder, **options):
    defaults = {"dtype": "float32", "attn_implementation": "sdpa", "device": "cpu", "section": "here"}
    return load_model(str(folder), **defaults | options)


@pytest.mark.parametrize("name", ["flash_attention_2", "kernel_of_my_own"])
def test_attention_that_cannot_be_had_is_refused_by_its_key(tiny_folder, name):
    with pytest.raises(UserError, match=rf"^here\.attn_implementation \({name}\) .*set here\.attn_implementation=sdpa"):
        load(tiny_folder, attn_implementation=name)


def test_evaluation_mode_ends_after_an_error_too():
    model = random_model(20).train()
    with evaluating(model):
        assert not model.training
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert all(module.training for module in model.modules())


# --- code that comes with a model ---

CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM
class FriendlyConfig(Qwen2Config):
    model_type = "friendly"
class FriendlyForCausalLM(Qwen2ForCausalLM):
    config_class = FriendlyConfig
"""
AUTO_MAP = {"AutoConfig": "friendly.FriendlyConfig", "AutoModelForCausalLM": "friendly.FriendlyForCausalLM"}


@pytest.fixture
def folder_with_code(tmp_path, tiny_folder, monkeypatch):
    """The tiny model in the clothes of one whose code is in its own folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    model = load(folder)
    model.config.auto_map = AUTO_MAP
    written = model.config.to_json_string().replace('"qwen2"', '"friendly"')
    (folder / "config.json").write_text(written)
    (folder / "friendly.py").write_text(CODE)
    return str(folder)


@pytest.mark.parametrize("read", [load, load_tokenizer, lambda name: context_length(name, None)])
def test_code_of_a_model_does_not_run_unless_it_is_trusted(folder_with_code, read, tmp_path):
    with pytest.raises(UserError, match=r"^model\.name .*set model\.trust_remote_code=true"):
        read(folder_with_code)
    assert not (tmp_path / "modules").exists()


def test_trusted_code_of_a_model_runs(folder_with_code):
    assert type(load(folder_with_code, trust_remote_code=True)).__name__ == "FriendlyForCausalLM"
    assert load_tokenizer(folder_with_code, trust_remote_code=True).chat_template
    assert context_length(folder_with_code, None, trust_remote_code=True) > 0


# --- four bits ---

VOCABULARY = 60


def log_probs(model):
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    return token_log_probs(model, ids, torch.ones_like(ids))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_layers_but_the_head_are_held_in_four_bits(tiny_folder, dtype):
    model = load(tiny_folder, dtype=dtype, quantized=True)
    inner = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "proj" in name]
    assert len(inner) == 7 * model.config.num_hidden_layers
    for module in inner:
        assert isinstance(module, Linear4bit)
        assert module.compute_dtype == getattr(torch, dtype)
        state = module.weight.quant_state
        assert (state.quant_type, state.nested) == ("nf4", True)
        assert module.weight.nbytes == state.shape.numel() / 2
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == getattr(torch, dtype)
    assert not model.training
    weights = [module.weight for name, module in load(tiny_folder).named_modules() if "proj" in name]
    for found, expected in zip(inner, weights, strict=True):
        error = dequantize_bnb_weight(found.weight).float() - expected
        # NF4's 16 levels, with a scale for each 64 weights: some 9 % of normally distributed weights.
        assert 0.05 < error.norm() / expected.norm() < 0.12


def test_on_a_cpu_a_four_bit_model_has_gradients_after_an_evaluation_too(tiny_folder):
    gradients = []
    for evaluated in (False, True):
        policy = random_policy(load(tiny_folder, quantized=True))
        if evaluated:
            with evaluating(policy), torch.no_grad():
                log_probs(policy)
        log_probs(policy.train()).sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradients[1][name], gradient), name


def test_without_bitsandbytes_four_bits_are_refused_by_their_key(tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"^here\.quantization\.enabled .*pip install bitsandbytes"):
        load(tiny_folder, quantized=True)


def test_on_a_cpu_four_bits_are_refused_for_sizes_that_come_out_wrong(tmp_path):
    random_model(VOCABULARY).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^here\.quantization\.enabled .*q_proj has 32 inputs"):
        load(tmp_path, quantized=True)


# --- compilation ---


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="on a CPU, torch.compile needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
@torch._inductor.config.patch(compile_threads=1)
def test_a_compiled_model_has_the_same_names_loss_and_gradients(checkpointing):
    policy = random_policy(random_model(VOCABULARY)).train()
    if checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    model, names = LogProbModel(policy), list(policy.state_dict())
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]

    def run(rows, length):
        ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))
        values = token_log_probs(model, ids, torch.ones_like(ids))
        return values.detach(), *torch.autograd.grad(values.sum(), parameters)

    sizes = [(2, 12), (3, 17), (4, 9)]
    expected = [run(*size) for size in sizes]
    scorer, rows = BaseScorer(policy, micro_batch_size=2, model=model), [torch.arange(9), torch.arange(5)]
    expected_scores = scorer.score(rows)
    compile_forward(policy)
    assert list(policy.state_dict()) == names
    torch._dynamo.utils.counters.clear()
    for size, values in zip(sizes, expected, strict=True):
        for one, other in zip(run(*size), values, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "other sizes do not compile again"
    # In evaluation, without gradient and adapters, it is another graph.
    torch.testing.assert_close(scorer.score(rows), expected_scores, rtol=1e-4, atol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_kernel_that_leaves_out_the_cap_of_a_model_s_attention_is_refused(tmp_path, tiny_folder):
    folder = make_family_folder("gemma-2", tiny_folder, tmp_path)
    options = {"dtype": "float32", "device": "cpu", "section": "here"}
    with pytest.raises(UserError, match=r"here\.attn_implementation \(sdpa\) .* set here\.attn_implementation=eager"):
        load_model(str(folder), attn_implementation="sdpa", **options)
    assert load_model(str(folder), attn_implementation="eager", **options).config._attn_implementation == "eager"
