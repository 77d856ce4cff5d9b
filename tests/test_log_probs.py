"""`expert_iteration.log_probs`: chunks give what whole logits would, for any family, and take less memory."""

import logging

import pytest
import torch
import torch.nn.functional as F
from builders import random_model, random_policy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from expert_iteration import log_probs
from expert_iteration.log_probs import LogProbModel, token_log_probs, token_scores
from expert_iteration.models import load_model

VOCABULARY = 200
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "qwen2": lambda: random_model(VOCABULARY),
    "qwen2 tied": lambda: random_model(VOCABULARY, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=6, final_logit_softcapping=2.0)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=6, final_logit_softcapping=2.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)),
    "phi, a head with bias": lambda: with_head_bias(PhiForCausalLM(PhiConfig(**SIZES))),
    "adapters": lambda: random_policy(random_model(VOCABULARY)),
}
# Float32 log-probs of order 10, from the same operations on other numbers of rows.
TOLERANCE = {"rtol": 1e-6, "atol": 2e-6}


def with_head_bias(model):
    nn.init.normal_(model.lm_head.bias)
    return model


def make_batch(lengths=(20, 13, 17), vocabulary=VOCABULARY, prompt_length=4):
    """ids, attention mask and the mask of what follows the prompt, right-padded."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, vocabulary, (len(lengths), max(lengths)), generator=generator)
    positions = torch.arange(max(lengths))
    attention_mask = (positions < torch.tensor(lengths)[:, None]).long()
    return input_ids * attention_mask, attention_mask, attention_mask.bool() & (positions >= prompt_length)


def whole_logits(model, input_ids, attention_mask):
    """The model's own, of all tokens but the last: those that predict a token of the row."""
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1].float()


def whole_log_probs(model, input_ids, attention_mask):
    """By the model's own logits of all tokens."""
    logits = whole_logits(model, input_ids, attention_mask)
    return F.pad(logits.log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0], (1, 0))


def whole_entropies(model, input_ids, attention_mask):
    """By the model's own logits, and torch's own entropy."""
    logits = whole_logits(model, input_ids, attention_mask)
    return F.pad(torch.distributions.Categorical(logits=logits).entropy(), (1, 0))


def gradients(model, log_probs, mask):
    """Of the masked sum of squares, which gives each token a weight of its own."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad((log_probs * mask).square().sum(), parameters)


def assert_close_gradients(found, expected):
    """Each to 1e-6 of the largest of all: sums of some hundred float32 terms in another order."""
    scale = max(gradient.abs().max().item() for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6 * scale)


def fallbacks(caplog):
    """What was said of models whose logits are computed whole."""
    return [record.getMessage() for record in caplog.records if record.name == log_probs.__name__]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 tokens, whatever the vocabulary."""
    monkeypatch.setattr(log_probs, "CHUNK_BYTES", 1)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_give_the_values_and_gradients_of_whole_logits(family, caplog):
    torch.manual_seed(0)
    model = FAMILIES[family]().train()
    input_ids, attention_mask, response_mask = make_batch()
    found = token_log_probs(model, input_ids, attention_mask, response_mask)
    expected = whole_log_probs(model, input_ids, attention_mask)
    assert not fallbacks(caplog)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[response_mask], expected[response_mask], **TOLERANCE)
    assert_close_gradients(gradients(model, found, response_mask), gradients(model, expected, response_mask))
    with torch.no_grad():
        torch.testing.assert_close(token_log_probs(model, input_ids, attention_mask, response_mask), found)


def test_without_a_target_mask_every_token_has_its_log_prob():
    model = random_model(VOCABULARY)
    input_ids, attention_mask, _ = make_batch()
    found = token_log_probs(model, input_ids, attention_mask)
    real = attention_mask.bool()
    torch.testing.assert_close(found[real], whole_log_probs(model, input_ids, attention_mask)[real], **TOLERANCE)
    assert found[:, 0].tolist() == [0.0, 0.0, 0.0]


def test_where_nothing_is_asked_for_every_parameter_has_a_gradient_of_zero():
    """A rank without rows takes part in what the ranks do together."""
    model = random_model(VOCABULARY)
    input_ids, attention_mask, _ = make_batch()
    token_log_probs(model, input_ids, attention_mask, torch.zeros_like(attention_mask)).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.usefixtures("small_chunks")
def test_gradient_checkpointing_changes_no_gradient():
    model = random_model(VOCABULARY).train()
    input_ids, attention_mask, response_mask = make_batch()
    kept = gradients(model, token_log_probs(model, input_ids, attention_mask, response_mask), response_mask)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, token_log_probs(model, input_ids, attention_mask, response_mask), response_mask)
    assert_close_gradients(again, kept)


@pytest.mark.usefixtures("small_chunks")
def test_under_autocast_chunks_compute_as_whole_logits_do():
    model = random_model(VOCABULARY)
    input_ids, attention_mask, response_mask = make_batch((300, 300))
    with torch.autocast("cpu", torch.bfloat16):
        found = token_log_probs(model, input_ids, attention_mask, response_mask)
        expected = whole_log_probs(model, input_ids, attention_mask)
    assert found.dtype == torch.float32
    # The same products, rounded to bfloat16 alike.
    torch.testing.assert_close(found[response_mask], expected[response_mask], **TOLERANCE)
    sums = [(log_probs * response_mask).sum() for log_probs in (found, expected)]
    one, other = (torch.autograd.grad(sum_, model.lm_head.weight)[0] for sum_ in sums)
    # bfloat16 rounds by 0.2 % on average. Summing the 38 chunks' gradients in it would make 0.7 % of that.
    assert (one - other).norm() < 0.004 * other.norm()


# --- entropies ---


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", FAMILIES)
def test_entropies_are_those_of_whole_logits(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().train()
    batch = make_batch()
    expected = whole_entropies(model, *batch[:2])
    found = token_scores(model, *batch)
    assert found.entropies.dtype == torch.float32
    assert not found.entropies.requires_grad
    assert expected[batch[2]].std() > 1e-4, "the places differ"
    torch.testing.assert_close(found.entropies[batch[2]], expected[batch[2]], **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(token_scores(model, *batch).entropies, found.entropies)


@pytest.mark.usefixtures("small_chunks")
def test_entropies_change_neither_log_probs_nor_gradients():
    model, batch = random_model(VOCABULARY).train(), make_batch()
    plain, scored = token_log_probs(model, *batch), token_scores(model, *batch).log_probs
    assert torch.equal(scored, plain)
    for one, other in zip(gradients(model, scored, batch[2]), gradients(model, plain, batch[2]), strict=True):
        assert torch.equal(one, other)


class Exponentials(TorchDispatchMode):
    """Counts how often a table of probabilities is computed, which entropies take one of."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **kwargs or {})
        self.count += func.overloadpacket is torch.ops.aten.exp and output.shape[-1:] == (VOCABULARY,)
        return output


@pytest.mark.usefixtures("small_chunks")
def test_entropies_are_computed_once_a_chunk_and_only_where_asked_for():
    model, (input_ids, attention_mask, response_mask) = random_model(VOCABULARY).train(), make_batch()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with Exponentials() as seen:
        token_scores(model, input_ids, attention_mask, response_mask).log_probs.sum().backward()
    assert seen.count == -(-int(response_mask.sum()) // 16)  # and not again in the backward pass
    with Exponentials() as seen:
        token_log_probs(model, input_ids, attention_mask, response_mask).sum().backward()
    assert seen.count == 0


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned, backward and recomputation included."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **kwargs or {})
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return output


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_of_all_tokens_never_stand_in_memory(monkeypatch, checkpointing):
    vocabulary, chunk = 5000, 20
    monkeypatch.setattr(log_probs, "CHUNK_BYTES", 4 * vocabulary * chunk)
    model = LogProbModel(random_model(vocabulary))
    if checkpointing:
        model.model.gradient_checkpointing_enable({"use_reentrant": False})
    input_ids, attention_mask, _ = make_batch((100, 100), vocabulary)
    with LargestTensor() as chunked:
        model(input_ids, attention_mask, with_entropies=True).log_probs.sum().backward()
    with LargestTensor() as whole:
        whole_log_probs(model.model, input_ids, attention_mask).sum().backward()
    # The head's weight and its gradient have vocabulary x 32 elements.
    assert chunked.numel == vocabulary * max(chunk, 32)
    assert whole.numel >= vocabulary * 2 * 99


@pytest.mark.usefixtures("small_chunks")
def test_with_adapters_off_the_base_is_computed():
    policy = random_policy(random_model(VOCABULARY))
    input_ids, attention_mask, response_mask = make_batch()
    with policy.disable_adapter():
        found = token_log_probs(policy, input_ids, attention_mask, response_mask)
    expected = whole_log_probs(random_model(VOCABULARY), input_ids, attention_mask)
    torch.testing.assert_close(found[response_mask], expected[response_mask], **TOLERANCE)


@pytest.mark.usefixtures("small_chunks")
def test_a_four_bit_model_with_adapters_has_the_values_and_gradients_of_whole_logits(tiny_folder, caplog):
    options = {"dtype": "float32", "attn_implementation": "sdpa", "device": "cpu", "quantized": True}
    policy = random_policy(load_model(str(tiny_folder), **options)).train()
    input_ids, attention_mask, response_mask = make_batch()
    found = token_log_probs(policy, input_ids, attention_mask, response_mask)
    expected = whole_log_probs(policy, input_ids, attention_mask)
    assert not fallbacks(caplog)
    torch.testing.assert_close(found[response_mask], expected[response_mask], **TOLERANCE)
    assert_close_gradients(gradients(policy, found, response_mask), gradients(policy, expected, response_mask))


# --- the proof, and what happens without it ---


class ShiftedQwen2(Qwen2ForCausalLM):
    """Does to its logits what no configuration tells."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output


def test_a_model_of_another_kind_is_computed_whole_and_said_so_once(caplog):
    # An untrained model: its logits are so small that the cap at 30 changes nothing yet.
    model = ShiftedQwen2(random_model(VOCABULARY).config)
    model.apply(lambda module: isinstance(module, nn.Linear) and nn.init.normal_(module.weight, std=1e-3))
    model = model.train()
    input_ids, attention_mask, response_mask = make_batch()
    with caplog.at_level(logging.WARNING):
        assert LogProbModel(model).training
        nn.init.normal_(model.lm_head.weight, std=20.0)
        found = token_log_probs(model, input_ids, attention_mask, response_mask)
        token_log_probs(model, input_ids, attention_mask)
    assert [message.split()[0] for message in fallbacks(caplog)] == ["ShiftedQwen2"]
    expected = whole_log_probs(model, input_ids, attention_mask)
    torch.testing.assert_close(found[response_mask], expected[response_mask])
    assert expected.min() > -70, "the cap shows"
    entropies = token_scores(model, input_ids, attention_mask).entropies
    expected = whole_entropies(model, input_ids, attention_mask)
    torch.testing.assert_close(entropies[response_mask], expected[response_mask])


def test_the_proof_leaves_the_model_as_it_was():
    model = random_model(VOCABULARY, attention_dropout=0.5).train()
    LogProbModel(model)
    assert all(module.training for module in model.modules())
    assert not model.lm_head._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_log_prob_model_is_called_as_it_is():
    model = random_model(VOCABULARY)
    input_ids, attention_mask, response_mask = make_batch()
    wrapped = LogProbModel(model)
    assert [name for name, _ in wrapped.named_parameters()] == [f"model.{name}" for name, _ in model.named_parameters()]
    found = token_log_probs(wrapped, input_ids, attention_mask, response_mask)
    assert torch.equal(found, token_log_probs(model, input_ids, attention_mask, response_mask))
    wrapped.forward = lambda *args: args
    assert token_log_probs(wrapped, input_ids, attention_mask, response_mask)[2] is response_mask


def test_a_kernel_that_refuses_float32_is_not_asked_until_training(caplog):
    def picky(module, query, *args, **kwargs):
        assert torch.is_autocast_enabled("cpu"), "only half precision, as flash attention"
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("picky", picky)
    AttentionMaskInterface.register("picky", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = random_model(VOCABULARY)
    model.set_attn_implementation("picky")
    policy = LogProbModel(model)
    assert not caplog.records  # no fall-back to whole logits
    ids = torch.arange(6)[None]
    with torch.autocast("cpu", torch.bfloat16):
        policy(ids, torch.ones_like(ids))
    with pytest.raises(AssertionError, match="only half precision"):
        policy(ids, torch.ones_like(ids))
