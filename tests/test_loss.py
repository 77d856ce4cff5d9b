"""`expert_iteration.loss`: log-probs of sampled ids, SFT, MinorSFT and KL to the reference."""

import copy

import pytest
import torch
from builders import random_model
from tensordict import TensorDict, lazy_stack
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torchrl.data import History
from torchrl.modules.llm import TransformersWrapper
from torchrl.modules.llm.policies import ChatHistory
from torchrl.objectives.llm.sft import SFTLoss as TorchRLSFTLoss
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from expert_iteration.errors import UserError
from expert_iteration.log_probs import pad_rows, token_log_probs
from expert_iteration.loss import SFTLoss, pad_batch
from expert_iteration.tiny import CHAT_TEMPLATE

VOCABULARY = 300
SHAPES = [(3, 5), (6, 2), (1, 9), (4, 4)]
# Sums of some tens of float32 terms of order 1 to 10, taken in another order or under another padding.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def tokenizer():
    """Every byte a token, and Qwen's chat markers: templates work offline."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return tokenizer


def make_row(prompt_length: int, response_length: int, seed: int, ref: bool = True) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    total = prompt_length + response_length
    mask = torch.arange(total) >= prompt_length
    row = TensorDict(
        {
            ("tokens", "full"): torch.randint(VOCABULARY, (total,), generator=generator),
            ("masks", "all_assistant_mask"): mask,
            ("next", "reward"): torch.rand(1, generator=generator),
        }
    )
    if ref:
        row["next", "ref_log_probs", "full"] = -5 * torch.rand(total, generator=generator) * mask
    return row


def make_rows(ref: bool = True) -> list[TensorDict]:
    return [make_row(prompt, response, seed, ref) for seed, (prompt, response) in enumerate(SHAPES)]


def with_reference(rows: list[TensorDict], model: nn.Module) -> TensorDict:
    """The rows, with the log-probs of `model` itself as the reference's."""
    rows = [row.clone() for row in rows]
    for row in rows:
        ids = row["tokens", "full"][None]
        log_probs = token_log_probs(model, ids, torch.ones_like(ids))[0].detach()
        row["next", "ref_log_probs", "full"] = log_probs * row["masks", "all_assistant_mask"]
    return lazy_stack(rows)


def plain_terms(model: nn.Module, row: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and k3 of the response tokens of one row, token by token and without padding."""
    ids, mask = row["tokens", "full"], row["masks", "all_assistant_mask"]
    logits = model(input_ids=ids[None]).logits[0]
    log_probs, k3 = [], []
    for position in range(1, len(ids)):
        if mask[position]:
            log_probs.append(logits[position - 1].log_softmax(-1)[ids[position]])
            ratio = row["next", "ref_log_probs", "full"][position] - log_probs[-1]
            k3.append(ratio.exp() - 1 - ratio)
    return torch.stack(log_probs), torch.stack(k3)


def plain_entropies(model: nn.Module, row: TensorDict) -> torch.Tensor:
    """Entropies of the distributions over the response tokens of one row, without padding."""
    log_probs = model(input_ids=row["tokens", "full"][None]).logits[0].log_softmax(-1)
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    return entropies[:-1][row["masks", "all_assistant_mask"][1:]]


def gradients(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


class LogitsModel(nn.Module):
    """A causal model whose logits are its parameters, so that their gradients can be looked at."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, attention_mask, use_cache):
        return CausalLMOutput(logits=self.logits)


def test_token_log_probs_are_those_of_each_row_alone():
    model, rows = random_model(VOCABULARY), make_rows()
    found = token_log_probs(model, *pad_rows([row["tokens", "full"] for row in rows], pad_token_id=7))
    assert found.dtype == torch.float32
    assert (found[:, 0] == 0).all()
    for values, row in zip(found, rows, strict=True):
        ids = row["tokens", "full"]
        expected = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(values[1 : len(ids)], expected, **TOLERANCE)


def columns(rows: list[TensorDict]) -> list[list[torch.Tensor]]:
    keys = (("tokens", "full"), ("masks", "all_assistant_mask"), ("next", "ref_log_probs", "full"))
    return [[row[key] for row in rows] for key in keys]


def test_a_batch_is_padded_on_the_right():
    rows = make_rows()
    batch = pad_batch(*columns(rows), pad_token_id=9, device=torch.device("cpu"))
    assert batch.input_ids.shape == batch.response_mask.shape == batch.ref_log_probs.shape == (4, 10)
    for index, (prompt, response) in enumerate(SHAPES):
        total = prompt + response
        assert batch.input_ids[index].tolist() == rows[index]["tokens", "full"].tolist() + [9] * (10 - total)
        assert batch.attention_mask[index].tolist() == [1] * total + [0] * (10 - total)
        assert batch.response_mask[index].nonzero()[:, 0].tolist() == list(range(prompt, total))
        assert batch.ref_log_probs[index].tolist() == [*rows[index]["next", "ref_log_probs", "full"]] + [0] * (
            10 - total
        )


@pytest.mark.parametrize(
    ("key", "words"),
    [(("next", "ref_log_probs", "full"), "reference log-probs"), (("masks", "all_assistant_mask"), "response mask")],
)
def test_rows_whose_parts_differ_in_length_are_refused(tokenizer, key, words):
    rows = make_rows()
    rows[1][key] = torch.zeros(5)
    with pytest.raises(ValueError, match=words):
        SFTLoss(random_model(VOCABULARY), tokenizer)(lazy_stack(rows))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_both_terms_equal_a_plain_computation(tokenizer, normalize, reduction):
    model, rows = random_model(VOCABULARY), make_rows()
    loss_fn = SFTLoss(model, tokenizer, reduction=reduction, normalize_by_seq_length=normalize, kl_to_ref_coeff=0.7)
    output = loss_fn(lazy_stack(rows))
    terms = [plain_terms(model, row) for row in rows]
    over_tokens = torch.mean if normalize else torch.sum
    over_responses = {"mean": torch.mean, "sum": torch.sum, "none": lambda values: values}[reduction]
    sft = over_responses(torch.stack([-over_tokens(log_probs) for log_probs, _ in terms]))
    kl = over_responses(torch.stack([over_tokens(k3) for _, k3 in terms]))
    torch.testing.assert_close(output.loss_sft, sft, **TOLERANCE)
    torch.testing.assert_close(output.kl_to_ref, kl.detach(), **TOLERANCE)
    torch.testing.assert_close(output.loss_kl_to_ref, 0.7 * kl, **TOLERANCE)
    entropy = over_responses(torch.stack([over_tokens(plain_entropies(model, row)) for row in rows]))
    torch.testing.assert_close(output.entropy, entropy.detach(), **TOLERANCE)
    total = (output.loss_sft + output.loss_kl_to_ref).sum()
    expected = gradients(model, (sft + 0.7 * kl).sum())
    torch.testing.assert_close(gradients(model, total), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_loss_does_not_depend_on_padding_or_order(tokenizer):
    model, rows = random_model(VOCABULARY), make_rows()
    loss_fn = SFTLoss(model, tokenizer, kl_to_ref_coeff=1.0)
    together = loss_fn(lazy_stack(rows))
    shuffled = loss_fn(lazy_stack([rows[index] for index in (2, 0, 3, 1)]))
    alone = [loss_fn(lazy_stack([row])) for row in rows]
    for name in ("loss_sft", "loss_kl_to_ref"):
        expected = together.get(name)
        torch.testing.assert_close(shuffled.get(name), expected, **TOLERANCE)
        torch.testing.assert_close(torch.stack([output.get(name) for output in alone]).mean(), expected, **TOLERANCE)


@pytest.mark.parametrize("options", [{"kl_to_ref_coeff": 1.0}, {"loss_function": "minor_sft"}])
def test_gradient_comes_from_response_tokens_only(tokenizer, options):
    model = LogitsModel(torch.randn(4, 10, VOCABULARY))
    output = SFTLoss(model, tokenizer, **options)(lazy_stack(make_rows()))
    output.sum(reduce=True).backward()
    has_gradient = model.logits.grad.abs().sum(-1) > 0
    for index, (prompt, response) in enumerate(SHAPES):
        # The logits at position i predict token i + 1.
        predicts_response = list(range(prompt - 1, prompt + response - 1))
        assert has_gradient[index].nonzero()[:, 0].tolist() == predicts_response


def test_an_impossible_prompt_token_leaves_the_gradient_finite(tokenizer):
    row = make_row(3, 2, seed=0)
    logits = torch.zeros(1, 5, VOCABULARY)
    logits[0, 0, row["tokens", "full"][1]] = -1000.0  # exp(0 + 1000) overflows unless the prompt is masked first
    model = LogitsModel(logits)
    output = SFTLoss(model, tokenizer, kl_to_ref_coeff=1.0)(lazy_stack([row]))
    output.sum(reduce=True).backward()
    assert model.logits.grad.isfinite().all()


def test_kl_is_zero_at_the_reference_and_has_no_gradient_there(tokenizer):
    model = random_model(VOCABULARY)
    batch = with_reference(make_rows(), model)
    output = SFTLoss(model, tokenizer, kl_to_ref_coeff=1.0)(batch)
    # k3 is quadratic in the difference of log-probs, which padding changes by about 1e-6.
    assert abs(output.kl_to_ref.item()) < 1e-9
    scale = gradients(model, SFTLoss(model, tokenizer)(batch).loss_sft).norm()
    assert gradients(model, output.loss_kl_to_ref).norm() < 1e-5 * scale
    moved = SFTLoss(random_model(VOCABULARY, seed=1), tokenizer, kl_to_ref_coeff=1.0)(batch)
    assert moved.kl_to_ref.item() > 0.1


@pytest.mark.parametrize("beta", [0.001, 0.1, 2.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_minor_sft_has_the_gradient_of_sft_at_the_reference(tokenizer, beta, normalize):
    model = random_model(VOCABULARY)
    batch = with_reference(make_rows(), model)
    options = {"normalize_by_seq_length": normalize}
    sft = gradients(model, SFTLoss(model, tokenizer, **options)(batch).loss_sft)
    minor = SFTLoss(model, tokenizer, loss_function="minor_sft", beta=beta, **options)(batch)
    # 1 - sigmoid(beta * difference) is 1/2 but for the float32 rounding of the difference.
    torch.testing.assert_close(gradients(model, minor.loss_sft), sft, rtol=1e-4, atol=1e-5 * sft.abs().max().item())
    assert minor.loss_kl_to_ref is None


def test_minor_sft_slows_down_past_the_reference(tokenizer):
    """A response already likelier than under the reference pulls less: this is what MinorSFT is for."""
    model = random_model(VOCABULARY)
    batch = with_reference(make_rows(), model)
    for row in batch.tensordicts:
        row["next", "ref_log_probs", "full"] -= 10 * row["masks", "all_assistant_mask"]
    minor = SFTLoss(model, tokenizer, loss_function="minor_sft", beta=1.0)(batch)
    sft = SFTLoss(model, tokenizer)(batch)
    # sigmoid(-10) * 2 = 9e-5 of SFT's gradient.
    assert gradients(model, minor.loss_sft).norm() < 1e-3 * gradients(model, sft.loss_sft).norm()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{"kl_to_ref_coeff": 0.7}, {"loss_function": "minor_sft"}])
def test_importance_weights_multiply_what_each_response_adds_to_both_terms(tokenizer, options, reduction):
    model, batch, weights = random_model(VOCABULARY), lazy_stack(make_rows()), torch.tensor([1.0, 0.5, 0.0, 0.25])
    each = SFTLoss(model, tokenizer, reduction="none", **options)(batch)
    loss_fn = SFTLoss(model, tokenizer, reduction=reduction, **options)
    plain = loss_fn(batch)
    batch["importance_weight"] = weights
    output = loss_fn(batch)
    over_responses = {"mean": torch.mean, "sum": torch.sum, "none": lambda values: values}[reduction]
    torch.testing.assert_close(output.loss_sft, over_responses(weights * each.loss_sft), **TOLERANCE)
    if "kl_to_ref_coeff" in options:
        torch.testing.assert_close(output.loss_kl_to_ref, over_responses(weights * each.loss_kl_to_ref), **TOLERANCE)
    assert torch.equal(output.kl_to_ref, plain.kl_to_ref)
    assert torch.equal(output.entropy, plain.entropy)


def test_a_weighted_loss_has_the_gradient_of_a_plain_computation(tokenizer):
    model, rows, weights = random_model(VOCABULARY), make_rows(), [1.0, 0.5, 0.0, 0.25]
    batch = lazy_stack([row.set("importance_weight", weight) for row, weight in zip(rows, weights, strict=True)])
    output = SFTLoss(model, tokenizer, kl_to_ref_coeff=0.7)(batch)
    plain = torch.zeros(())
    for row, weight in zip(rows, weights, strict=True):
        log_probs, k3 = plain_terms(model, row)
        plain = plain + weight * (0.7 * k3.mean() - log_probs.mean()) / len(rows)
    expected = gradients(model, plain)
    found = gradients(model, output.loss_sft + output.loss_kl_to_ref)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("options", [{"kl_to_ref_coeff": 0.7}, {"loss_function": "minor_sft"}])
def test_importance_weights_of_one_change_nothing(tokenizer, options):
    model, batch = random_model(VOCABULARY), lazy_stack(make_rows())
    loss_fn = SFTLoss(model, tokenizer, **options)
    plain = loss_fn(batch)
    batch["importance_weight"] = torch.ones(4)
    output = loss_fn(batch)
    assert torch.equal(output.loss_sft, plain.loss_sft)
    assert torch.equal(output.sum(reduce=True), plain.sum(reduce=True))


@pytest.mark.parametrize("coefficient", [None, 0.0])
def test_kl_is_reported_without_gradient_where_it_is_no_term(tokenizer, coefficient):
    model, rows = random_model(VOCABULARY), make_rows()
    output = SFTLoss(model, tokenizer, kl_to_ref_coeff=coefficient)(lazy_stack(rows))
    with_term = SFTLoss(model, tokenizer, kl_to_ref_coeff=1.0)(lazy_stack(rows))
    assert output.loss_kl_to_ref is None
    assert not output.kl_to_ref.requires_grad
    torch.testing.assert_close(output.kl_to_ref, with_term.kl_to_ref)
    without_reference = SFTLoss(model, tokenizer, kl_to_ref_coeff=coefficient)(lazy_stack(make_rows(ref=False)))
    assert without_reference.kl_to_ref is None
    torch.testing.assert_close(without_reference.loss_sft, output.loss_sft)


@pytest.mark.parametrize("options", [{"kl_to_ref_coeff": 1.0}, {"loss_function": "minor_sft"}])
def test_missing_reference_log_probs_are_an_error(tokenizer, options):
    with pytest.raises(ValueError, match="ref_log_probs"):
        SFTLoss(random_model(VOCABULARY), tokenizer, **options)(lazy_stack(make_rows(ref=False)))


def test_an_empty_response_counts_and_adds_nothing(tokenizer):
    model, rows = random_model(VOCABULARY), make_rows()
    loss_fn = SFTLoss(model, tokenizer, kl_to_ref_coeff=1.0)
    full = loss_fn(lazy_stack(rows))
    output = loss_fn(lazy_stack([*rows, make_row(5, 0, seed=9)]))
    for name in ("loss_sft", "loss_kl_to_ref", "kl_to_ref", "entropy"):
        torch.testing.assert_close(output.get(name), full.get(name) * 4 / 5, **TOLERANCE)
    output.sum(reduce=True).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_function": "minor_sft", "kl_to_ref_coeff": 1.0}, "kl_to_ref_coeff"),
        ({"loss_function": "grpo"}, "sft, minor_sft"),
        ({"reduction": "median"}, "mean, sum, none"),
        ({"kl_to_ref_coeff": -1.0}, "at least 0"),
        ({"loss_function": "minor_sft", "beta": 0.0}, "above 0"),
        ({"tokenizer": None}, "tokenizer"),
    ],
)
def test_options_that_cannot_work_are_refused(tokenizer, options, words):
    with pytest.raises(UserError, match=words):
        SFTLoss(random_model(VOCABULARY), **{"tokenizer": tokenizer, **options})


def test_minor_sft_takes_a_coefficient_of_zero(tokenizer):
    SFTLoss(random_model(VOCABULARY), tokenizer, loss_function="minor_sft", kl_to_ref_coeff=0.0)


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_readme_snippet_runs(tokenizer, wrapped):
    train_tokenizer, train_device = tokenizer, torch.device("cpu")
    model = random_model(VOCABULARY)
    policy_training = model
    if wrapped:
        policy_training = TransformersWrapper(model, tokenizer=tokenizer, generate=False, return_log_probs=True)
    loss_fn = SFTLoss(
        actor_network=policy_training,
        kl_to_ref_coeff=1.0,
        tokenizer=train_tokenizer,
        tokenizer_kwargs={"chat_template_name": "qwen"},
        device=train_device,
    )
    output = loss_fn(lazy_stack(make_rows()))
    (output.loss_sft + output.loss_kl_to_ref).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.testing.assert_close(output.loss_sft, SFTLoss(model, tokenizer)(lazy_stack(make_rows())).loss_sft)


CHATS = [
    [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Seven, all told."}],
    [{"role": "user", "content": "And balls, after losing three of them?"}, {"role": "assistant", "content": "4"}],
]


def history_batch() -> TensorDict:
    history = History.from_chats(CHATS)
    return lazy_stack(list(TensorDict(history=ChatHistory(full=history), batch_size=(2,)).unbind(0)))


def test_a_batch_of_histories_gives_the_loss_of_torchrl(tokenizer):
    model = random_model(VOCABULARY)
    wrapper = TransformersWrapper(
        model,
        tokenizer=tokenizer,
        generate=False,
        return_log_probs=True,
        input_mode="history",
        chat_template_name="qwen",
        pad_output=False,
    )
    arguments = {"actor_network": wrapper, "tokenizer": tokenizer}
    theirs = TorchRLSFTLoss(**arguments, tokenizer_kwargs={"chat_template_name": "qwen"})(history_batch())
    ours = SFTLoss(**arguments, tokenizer_kwargs={"chat_template_name": "qwen"})(history_batch())
    torch.testing.assert_close(ours.loss_sft, theirs.loss_sft, **TOLERANCE)


def test_tokenizer_kwargs_choose_the_template_of_histories_and_stay_the_callers(tokenizer):
    model, losses = random_model(VOCABULARY), {}
    for name in ("qwen", "chatml_format"):
        kwargs = {"chat_template_name": name}
        losses[name] = SFTLoss(model, tokenizer, tokenizer_kwargs=kwargs)(history_batch()).loss_sft.item()
        assert kwargs == {"chat_template_name": name}
    # Qwen's template puts a system message first, which changes every log-prob.
    assert abs(losses["qwen"] - losses["chatml_format"]) > 1e-3


def test_histories_are_put_into_the_tokenizers_own_template_by_default(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHAT_TEMPLATE
    kwargs = {"default": {}, "own": {"chat_template": CHAT_TEMPLATE}, "other": {"chat_template": "x" + CHAT_TEMPLATE}}
    model, losses = random_model(VOCABULARY), {}
    for name in kwargs:
        losses[name] = SFTLoss(model, own, tokenizer_kwargs=kwargs[name])(history_batch()).loss_sft.item()
    assert losses["default"] == losses["own"]
    assert abs(losses["default"] - losses["other"]) > 1e-3
