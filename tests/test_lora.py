"""`expert_iteration.lora`: adapters in float32 on a frozen base, switched off and on, saved, and trained."""

import pytest
import torch
from builders import random_model, random_policy
from tensordict import TensorDict, lazy_stack
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from expert_iteration.config import LoraConfig, learning_rate
from expert_iteration.learner import Learner
from expert_iteration.log_probs import LogProbModel, token_log_probs
from expert_iteration.lora import adapter_state_dict, adapters_off, add_adapters, load_adapter_state
from expert_iteration.loss import SFTLoss
from expert_iteration.optimizer import make_optimizer

VOCABULARY = 60
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_policy(seed=0, **lora):
    return random_policy(random_model(VOCABULARY), seed, **lora)


def add_fresh_adapters(model, seed=0):
    """As before training."""
    return add_adapters(model, LoraConfig(enabled=True, r=4, alpha=8.0, dropout=0.1), seed)


def make_ids():
    return torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def log_probs(model):
    ids = make_ids()
    return token_log_probs(model, ids, torch.ones_like(ids))


def trainable(policy):
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def frozen(policy):
    return {name: parameter.clone() for name, parameter in policy.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_layer_but_the_head_has_adapters_in_float32(dtype):
    model = random_model(VOCABULARY, tie_word_embeddings=True).to(dtype)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name}
    assert {name.rpartition(".")[2] for name in layers} == set(LINEAR_LAYERS)
    policy = add_fresh_adapters(model)
    adapters = trainable(policy)
    assert {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in adapters} == layers
    assert len(adapters) == 2 * len(layers)
    assert {parameter.dtype for parameter in adapters.values()} == {torch.float32}
    assert {parameter.dtype for parameter in frozen(policy).values()} == {dtype}


def test_adapters_begin_as_nothing_and_a_seed_repeats_them():
    model = random_model(VOCABULARY).eval()
    base, state = log_probs(model), torch.get_rng_state()
    first = add_fresh_adapters(model, seed=1)
    assert torch.equal(torch.get_rng_state(), state), "their random numbers are not the caller's"
    assert torch.equal(log_probs(first), base)
    states = [adapter_state_dict(first)]
    states += [adapter_state_dict(add_fresh_adapters(random_model(VOCABULARY), seed)) for seed in (1, 2)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        assert torch.equal(tensor, states[2][name]) is ("lora_B" in name)


def test_dropout_is_as_configured_and_in_training_mode_only():
    policy = make_policy(dropout=0.5)
    policy.train()
    assert not torch.equal(log_probs(policy), log_probs(policy))
    policy.eval()
    assert torch.equal(log_probs(policy), log_probs(policy))
    assert torch.equal(log_probs(policy), log_probs(make_policy(dropout=0.0).eval()))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_stays(training):
    assert add_fresh_adapters(random_model(VOCABULARY).train(training)).training is training


def test_gradient_checkpointing_lets_the_same_gradients_through():
    policy = make_policy().train()
    kept = torch.autograd.grad(log_probs(policy).sum(), list(trainable(policy).values()))
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    again = torch.autograd.grad(log_probs(policy).sum(), list(trainable(policy).values()))
    for one, other in zip(again, kept, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other)


# --- the base behind the adapters ---


def test_with_adapters_off_a_policy_is_its_base_and_afterwards_itself():
    policy = make_policy(dropout=0.5).train()
    before, adapters = log_probs(policy.eval()), set(trainable(policy))
    policy.train()
    with adapters_off(policy):
        assert torch.equal(log_probs(policy), log_probs(random_model(VOCABULARY)))
        assert not policy.training
    assert policy.training
    assert set(trainable(policy)) == adapters
    assert torch.equal(log_probs(policy.eval()), before)
    assert (before - log_probs(random_model(VOCABULARY))).abs().max() > 0.1


def test_adapters_come_back_on_after_an_error():
    policy = make_policy().train()
    before = log_probs(policy)
    with pytest.raises(KeyError), adapters_off(policy):
        raise KeyError
    assert policy.training
    assert torch.equal(log_probs(policy), before)


# --- states ---


def test_a_state_of_adapters_goes_into_another_policy_of_the_same_base():
    policy, other = make_policy(seed=0), make_policy(seed=1)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(policy).items()}
    assert sum(tensor.numel() for tensor in state.values()) == sum(p.numel() for p in trainable(policy).values())
    load_adapter_state(other, state)
    assert torch.equal(log_probs(other), log_probs(policy))


def test_a_state_of_other_adapters_is_refused():
    policy = make_policy()
    state = adapter_state_dict(policy)
    name = next(iter(state))
    with pytest.raises(ValueError, match=rf"missing \['{name}'\]"):
        load_adapter_state(policy, {key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(ValueError, match=r"unknown \['lm_head.lora_A.weight'\]"):
        load_adapter_state(policy, state | {"lm_head.lora_A.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_adapter_state(policy, adapter_state_dict(make_policy(r=2)))


# --- training ---


def test_adapters_have_a_learning_rate_of_their_own(make_cfg):
    for overrides, expected in (("train_model.lora.enabled=true", 1e-4), ("train_model.lora.enabled=false", 1e-5)):
        assert learning_rate(make_cfg(overrides, "optimizer.lr=null")) == expected
    assert learning_rate(make_cfg("optimizer.lr=0.5")) == 0.5


def make_batch():
    mask = torch.arange(12) >= 4
    rows = [
        {("tokens", "full"): ids, ("masks", "all_assistant_mask"): mask, ("next", "reward"): torch.ones(1)}
        for ids in make_ids()
    ]
    return lazy_stack([TensorDict(row) for row in rows])


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_adapters_alone_learn(base_dtype, make_cfg, tiny_tokenizer):
    policy = add_fresh_adapters(random_model(VOCABULARY).to(base_dtype))
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = make_optimizer(policy, make_cfg().optimizer, 1e-2)
    learner = Learner(
        policy,
        SFTLoss(LogProbModel(policy), tiny_tokenizer),
        optimizer,
        LambdaLR(optimizer, lambda step: 1.0),
        gradient_accumulation_steps=1,
        clip_grad_norm=1.0,
        autocast_dtype=None if base_dtype is torch.float32 else base_dtype,
        max_bad_steps=1,
    )
    base, adapters = frozen(policy), {name: parameter.clone() for name, parameter in trainable(policy).items()}
    losses = [learner.step(make_batch())["loss"] for _ in range(60)]
    assert losses[0] > 5 * losses[-1]
    assert all(torch.equal(parameter, base[name]) for name, parameter in frozen(policy).items())
    assert not any(torch.equal(parameter, adapters[name]) for name, parameter in trainable(policy).items())
