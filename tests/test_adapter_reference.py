"""`expert_iteration.adapter_reference`: the policy's base as reference, asked once for each response."""

import pickle
from itertools import chain

import pytest
import torch
from builders import random_model, random_policy
from tensordict import TensorDict, lazy_stack
from torch import nn
from torchrl.data import LazyStackStorage

from expert_iteration.adapter_reference import AdapterReference, BaseScorer
from expert_iteration.log_probs import LogProbModel, token_log_probs
from expert_iteration.loss import SFTLoss
from expert_iteration.reference import RetrieveLogProb
from expert_iteration.replay_buffer import ExpertReplayBuffer
from expert_iteration.row_keys import REF_LOG_PROBS_KEY, RESPONSE_ID_KEY, RESPONSE_MASK_KEY, TOKENS_KEY
from expert_iteration.sampler import RewardPrioritizedSampler
from expert_iteration.scorer import ReferenceScorer

VOCABULARY = 50
PROMPT_LENGTH = 2


def make_row(number):
    """A response of its own length and ids."""
    length = 5 + number % 4
    ids = torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(number))
    return TensorDict(
        {
            TOKENS_KEY: ids,
            ("tokens", "response"): ids[PROMPT_LENGTH:],
            RESPONSE_MASK_KEY: torch.arange(length) >= PROMPT_LENGTH,
            ("next", "reward"): torch.tensor([float(number)]),
            "policy_version": torch.tensor(0),
            RESPONSE_ID_KEY: torch.tensor(number),
        }
    )


def make_batch(*numbers):
    return lazy_stack([make_row(number) for number in numbers])


class CountingScorer:
    """Log-probs that tell the token, -id / 100, and a list of what was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, rows):
        self.asked.append([row.tolist() for row in rows])
        return [row / -100 for row in rows]


def asked_numbers(scorer):
    by_ids = {tuple(make_row(number)[TOKENS_KEY].tolist()): number for number in range(20)}
    return [[by_ids[tuple(ids)] for ids in call] for call in scorer.asked]


def assert_attached(batch):
    for row in batch.unbind(0):
        assert torch.equal(row[REF_LOG_PROBS_KEY], row[TOKENS_KEY] / -100 * row[RESPONSE_MASK_KEY])


# --- each response once ---


def test_a_response_is_scored_once_however_often_it_is_drawn():
    scorer = CountingScorer()
    reference = AdapterReference(scorer, capacity=10)
    for numbers in ((0, 1, 2), (2, 3, 3), (0, 1, 3)):
        batch = make_batch(*numbers)
        assert reference.attach(batch) is batch
        assert_attached(batch)
    assert asked_numbers(scorer) == [[0, 1, 2], [3]]
    assert (reference.scored, reference.hits) == (4, 5)


def test_the_oldest_make_room_and_a_batch_may_be_larger_than_the_cache():
    scorer = CountingScorer()
    reference = AdapterReference(scorer, capacity=2)
    assert_attached(reference.attach(make_batch(0, 1, 2, 3)))
    assert_attached(reference.attach(make_batch(3, 2)))
    assert_attached(reference.attach(make_batch(3, 4, 2)))
    assert_attached(reference.attach(make_batch(2)))
    assert asked_numbers(scorer) == [[0, 1, 2, 3], [4], [2]]


def test_what_the_buffer_still_holds_is_kept_in_whatever_order_it_was_drawn():
    scorer = CountingScorer()
    reference = AdapterReference(scorer, capacity=2)
    for number in (5, 3, 6, 5):  # a buffer of two: 6 has taken the place of 3
        assert_attached(reference.attach(make_batch(number)))
    assert asked_numbers(scorer) == [[5], [3], [6]]


def test_rows_that_have_log_probs_keep_them():
    scorer, batch = CountingScorer(), make_batch(0, 1)
    given = -torch.ones(len(batch[0][TOKENS_KEY]))
    batch[0].set(REF_LOG_PROBS_KEY, given)
    AdapterReference(scorer, capacity=10).attach(batch)
    assert asked_numbers(scorer) == [[1]]
    assert torch.equal(batch[0][REF_LOG_PROBS_KEY], given)
    assert AdapterReference(CountingScorer(), capacity=10).attach(batch) is batch


@pytest.mark.parametrize("travel", [lambda batch: batch, lambda batch: pickle.loads(pickle.dumps(batch))])
def test_batches_that_were_drawn_from_the_buffer_are_written_into(travel):
    """A drawn batch is one piece of memory, and comes from another process."""
    buffer = ExpertReplayBuffer(
        storage=LazyStackStorage(8),
        sampler=RewardPrioritizedSampler(8, alpha=0.0, epsilon=0.1),
        batch_size=6,
        capacity=8,
        seed=0,
    )
    buffer.extend(make_batch(0, 1, 2, 3).consolidate())
    scorer = CountingScorer()
    reference = AdapterReference(scorer, capacity=8)
    for _ in range(5):
        batch = reference.attach(travel(buffer.draw(0)))
        assert len(batch) == 6
        assert_attached(batch)
    assert sorted(chain.from_iterable(asked_numbers(scorer))) == [0, 1, 2, 3]
    assert reference.scored + reference.hits == 30


# --- by the base of the policy ---


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_base_gives_what_a_frozen_copy_gives_before_and_after_training(wrapped, tiny_tokenizer):
    policy = random_policy(random_model(VOCABULARY), dropout=0.5).train()
    model = LogProbModel(policy) if wrapped else None
    reference = AdapterReference(BaseScorer(policy, micro_batch_size=2, model=model).score, capacity=3)
    frozen_copy = RetrieveLogProb(ReferenceScorer(random_model(VOCABULARY), 0, 2).score)
    loss_fn = SFTLoss(model or policy, tiny_tokenizer, kl_to_ref_coeff=1.0)
    optimizer = torch.optim.SGD([parameter for parameter in policy.parameters() if parameter.requires_grad], lr=0.1)
    for numbers in ((0, 1, 2, 3), (4, 2, 5), (6, 7)):
        batch, expected = reference.attach(make_batch(*numbers)), frozen_copy(make_batch(*numbers))
        assert policy.training
        for row, other in zip(batch.unbind(0), expected.unbind(0), strict=True):
            assert row[REF_LOG_PROBS_KEY].dtype == torch.float32
            torch.testing.assert_close(row[REF_LOG_PROBS_KEY], other[REF_LOG_PROBS_KEY], rtol=1e-5, atol=1e-5)
        before = policy.state_dict()["base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"].clone()
        loss_fn(batch).sum(reduce=True).backward()
        optimizer.step()
        after = policy.state_dict()["base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"]
        assert not torch.equal(before, after)


def test_the_reference_computes_in_the_policys_precision():
    """Before the first step they are the same model, so the KL is 0 but for padding."""
    policy = random_policy(random_model(VOCABULARY).to(torch.bfloat16)).eval()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    ids = make_row(0)[TOKENS_KEY]
    (scored,) = BaseScorer(policy, micro_batch_size=1, autocast_dtype=torch.bfloat16).score([ids])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = token_log_probs(policy, ids[None], torch.ones_like(ids[None]))[0]
    assert torch.equal(scored, expected)
