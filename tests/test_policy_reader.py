"""`expert_iteration.policy_reader`: whole weights by Hugging Face's names, whatever the policy consists of."""

import copy
import weakref

import pytest
import torch
from builders import random_model, random_policy
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from expert_iteration.log_probs import token_log_probs
from expert_iteration.models import load_model, without_weights
from expert_iteration.policy_reader import PolicyReader

VOCABULARY = 60


def log_probs(model):
    ids = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    return token_log_probs(model, ids, torch.ones_like(ids))


def read(policy, reader=None):
    return dict((reader or PolicyReader()).weights(policy))


def test_a_policy_without_adapters_is_its_state_dict():
    model = random_model(VOCABULARY, tie_word_embeddings=True)
    weights = read(model)
    assert list(weights) == list(model.state_dict())
    assert "lm_head.weight" in weights
    for name, parameter in model.named_parameters():
        assert weights[name].data_ptr() == parameter.data_ptr()
        assert not weights[name].requires_grad


def gpt2():
    """Its weights are [in, out], those of all others [out, in]."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3))


@pytest.mark.parametrize("build", [lambda: random_model(VOCABULARY, tie_word_embeddings=True), gpt2])
def test_adapters_are_merged_under_the_names_of_the_base(build):
    names = list(build().state_dict())
    policy = random_policy(build())
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    weights = read(policy)
    assert list(weights) == names
    expected = copy.deepcopy(policy).merge_and_unload().state_dict()
    for name in names:
        assert not weights[name].requires_grad
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters())


def test_merged_weights_make_an_ordinary_model_with_the_policys_log_probs(tmp_path):
    policy = random_policy(random_model(VOCABULARY, tie_word_embeddings=True))
    without_weights(policy).save_pretrained(tmp_path, state_dict=read(policy))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(saved) is type(policy.get_base_model())
    torch.testing.assert_close(log_probs(saved), log_probs(policy), rtol=1e-5, atol=1e-5)


def test_weights_are_merged_in_float32_one_at_a_time():
    policy = random_policy(random_model(VOCABULARY).to(torch.bfloat16))
    merged = 0
    for name, tensor in PolicyReader().weights(policy):
        if name.endswith("proj.weight"):
            assert tensor.dtype == torch.float32
            last, merged = weakref.ref(tensor), merged + 1
        elif merged:
            del tensor
            assert last() is None, "a merged weight is kept while the next are made"
    assert merged == 14


def test_the_base_is_read_in_its_own_precision():
    base = random_model(VOCABULARY).to(torch.bfloat16)
    expected = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    policy = random_policy(base)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    for name, tensor in PolicyReader().weights(policy):
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


class Doubling(PolicyReader):
    """What lies in this process is half of each tensor."""

    def _whole(self, tensor):
        return 2 * tensor


def test_a_derived_reader_gathers_each_tensor_before_it_is_merged():
    policy = random_policy(random_model(VOCABULARY), alpha=4.0)  # a scale of 1
    weights, adapters = read(policy, Doubling()), dict(Doubling().adapters(policy))
    layer = policy.get_base_model().model.layers[0].mlp.up_proj
    base, first, second = layer.base_layer.weight, layer.lora_B["default"].weight, layer.lora_A["default"].weight
    found = weights["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(found, 2 * base + 4 * first @ second)
    torch.testing.assert_close(weights["model.norm.weight"], 2 * policy.get_base_model().model.norm.weight)
    assert torch.equal(adapters["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"], 2 * first)


def test_adapters_alone_have_the_names_of_pefts_file(tmp_path):
    policy = random_policy(random_model(VOCABULARY).to(torch.bfloat16))
    policy.save_pretrained(tmp_path)
    saved, adapters = load_file(tmp_path / "adapter_model.safetensors"), dict(PolicyReader().adapters(policy))
    assert set(adapters) == set(saved)
    for name, tensor in adapters.items():
        assert torch.equal(tensor, saved[name])
        assert not tensor.requires_grad


# --- four bits ---


@pytest.fixture
def quantized_policy(tiny_folder):
    options = {"dtype": "float32", "attn_implementation": "sdpa", "device": "cpu", "quantized": True}
    return random_policy(load_model(str(tiny_folder), **options))


def test_four_bit_weights_are_dequantized_and_merged(quantized_policy, load_tiny_model):
    model = load_tiny_model()
    weights = read(quantized_policy)
    assert list(weights) == list(model.state_dict())
    assert all(weights[name].shape == tensor.shape for name, tensor in model.state_dict().items())
    layer = quantized_policy.get_base_model().model.layers[1].self_attn.q_proj
    dense = dequantize_bnb_weight(layer.base_layer.weight) + layer.get_delta_weight("default")
    torch.testing.assert_close(weights["model.layers.1.self_attn.q_proj.weight"], dense)
    model.load_state_dict(weights)
    # Float32 log-probs of order 10; bitsandbytes multiplies by the same dequantized weights.
    torch.testing.assert_close(log_probs(model), log_probs(quantized_policy), rtol=1e-5, atol=1e-5)


def test_a_four_bit_policy_is_saved_as_an_ordinary_model(quantized_policy, tmp_path):
    without_weights(quantized_policy).save_pretrained(tmp_path, state_dict=read(quantized_policy))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(saved.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(log_probs(saved), log_probs(quantized_policy), rtol=1e-5, atol=1e-5)


# --- scores ---


def dropping():
    return random_model(VOCABULARY, attention_dropout=0.5)


@pytest.mark.parametrize("build", [dropping, lambda: random_policy(dropping(), dropout=0.5)])
def test_scores_are_log_probs_in_evaluation_mode_and_the_policy_stays_in_its_own(build):
    policy = build().train()
    sequences = [[3, 5, 7, 11], [2, 4]]
    scores = PolicyReader().score(policy, sequences)
    assert policy.training
    policy.eval()
    for ids, row in zip(map(torch.tensor, sequences), scores, strict=True):
        assert row == token_log_probs(policy, ids[None], torch.ones_like(ids[None]))[0].tolist()


def test_scores_are_made_in_the_trainers_precision():
    policy, sequences = random_model(VOCABULARY), [[3, 5, 7, 11]]
    exact, rounded = (torch.tensor(PolicyReader(dtype).score(policy, sequences)) for dtype in (None, torch.bfloat16))
    # bfloat16 keeps 8 bits of logits of order 10.
    assert 1e-4 < (exact - rounded).abs().max() < 0.5


# --- on an accelerator ---


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("quantized", [False, True])
def test_on_an_accelerator_adapters_are_the_same_and_merge_as_well(tiny_folder, quantized):
    options = {"dtype": "bfloat16", "attn_implementation": "sdpa", "quantized": quantized}
    policy = random_policy(load_model(str(tiny_folder), device="cuda", **options))
    on_cpu = random_policy(load_model(str(tiny_folder), device="cpu", **options))
    adapters = dict(PolicyReader().adapters(policy))
    assert all(torch.equal(adapters[name].cpu(), tensor) for name, tensor in PolicyReader().adapters(on_cpu))
    merged = load_model(str(tiny_folder), dtype="float32", attn_implementation="sdpa", device="cuda")
    merged.load_state_dict(read(policy))
    sequences = [list(range(20))]
    found, expected = (torch.tensor(PolicyReader().score(model, sequences)) for model in (policy, merged))
    # The policy computes in bfloat16, which keeps 8 bits of logits of order 10.
    assert (found - expected).abs().mean() < 0.1
