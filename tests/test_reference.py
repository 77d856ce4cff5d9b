"""`expert_iteration.reference`: log-probs of the reference, by row, and where they are written."""

from types import SimpleNamespace

import pytest
import torch
from builders import random_model
from tensordict import TensorDict, lazy_stack
from torch import nn
from torchrl.data import Composite, LazyStackStorage, ReplayBuffer
from torchrl.envs.transforms import Compose

from expert_iteration.log_probs import LogProbModel, token_log_probs
from expert_iteration.loss import SFTLoss
from expert_iteration.reference import RetrieveLogProb
from expert_iteration.scorer import ReferenceScorer
from expert_iteration.selection import TopKRewardSelector

VOCABULARY = 50
LENGTHS = [7, 3, 12, 5, 3, 9, 1]
# Float32 log-probs of order 10, under another padding.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def tiny_model(seed: int = 0) -> nn.Module:
    """With dropout, which would show in scores made in training mode."""
    return random_model(VOCABULARY, seed, attention_dropout=0.5)


def make_ids() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def make_row(ids: torch.Tensor, prompt_length: int, reward: float = 1.0) -> TensorDict:
    return TensorDict(
        {
            ("tokens", "full"): ids,
            ("masks", "all_assistant_mask"): torch.arange(len(ids)) >= prompt_length,
            ("next", "reward"): torch.tensor([reward]),
            ("next", "done"): torch.tensor([True]),
            "group_id": torch.tensor(0),
        }
    )


def directly(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return token_log_probs(model.eval(), ids[None], torch.ones_like(ids[None]))[0]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 100])
def test_each_row_gets_its_own_log_probs(micro_batch_size):
    model, rows = tiny_model().train(), make_ids()
    scored = ReferenceScorer(model, 0, micro_batch_size).score(rows)
    assert [len(values) for values in scored] == LENGTHS
    for ids, values in zip(rows, scored, strict=True):
        assert values.dtype == torch.float32
        assert not values.requires_grad
        assert values.untyped_storage().nbytes() == 4 * len(ids)
        torch.testing.assert_close(values, directly(model, ids), **TOLERANCE)


def test_scores_do_not_depend_on_order_or_pad_id():
    model, rows = tiny_model(), make_ids()
    scored = ReferenceScorer(model, 0, 3).score(rows)
    backwards = ReferenceScorer(model, 17, 3)(rows[::-1])[::-1]
    for one, other in zip(scored, backwards, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_scored_as_the_bare_ones(side):
    model, rows = tiny_model(), make_ids()
    pad = {"batch_first": True, "padding_side": side}
    padded = torch.nn.utils.rnn.pad_sequence(rows, **pad)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in rows], **pad)
    scorer = ReferenceScorer(model, 0, 3)
    for one, other in zip(scorer.score(padded, mask), scorer.score(rows), strict=True):
        assert torch.equal(one, other)


def test_a_micro_batch_holds_rows_of_like_length():
    model, seen = LogProbModel(tiny_model()), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    ReferenceScorer(model, 0, 2).score(make_ids())
    assert seen == [(2, 12), (2, 7), (2, 3), (1, 1)]


def test_no_rows_no_scores():
    assert ReferenceScorer(tiny_model(), 0, 2).score([]) == []


def test_a_bfloat16_model_gives_float32_scores():
    rows = make_ids()
    scored = ReferenceScorer(tiny_model().to(torch.bfloat16), 0, 8).score(rows)
    assert {values.dtype for values in scored} == {torch.float32}
    # bfloat16 keeps 8 bits of logits of order 10.
    assert all(
        (values - directly(tiny_model(), ids)).abs().max() < 0.5 for ids, values in zip(rows, scored, strict=True)
    )


# --- the transform ---


def test_the_transform_writes_response_log_probs_and_zeros_before_them():
    model, ids = tiny_model(), make_ids()[:4]
    rows = lazy_stack([make_row(row, prompt_length=2) for row in ids])
    written = RetrieveLogProb(ReferenceScorer(model, 0, 2))(rows)
    assert written.batch_size == (4,)
    for row, values in zip(ids, written.get(("next", "ref_log_probs", "full"), as_list=True), strict=True):
        torch.testing.assert_close(values[2:], directly(model, row)[2:], **TOLERANCE)
        assert values[:2].tolist() == [0.0, 0.0]
    assert written.get(("next", "reward")).shape == (4, 1)


def test_dense_rows_are_written_too():
    model = tiny_model()
    ids = make_ids()[0]
    dense = torch.stack([make_row(ids, 2), make_row(ids.flip(0), 2)])
    written = RetrieveLogProb(ReferenceScorer(model, 0, 2))(dense)
    values = written.get(("next", "ref_log_probs", "full"), as_list=True)
    torch.testing.assert_close(values[1][2:], directly(model, ids.flip(0))[2:], **TOLERANCE)


def test_the_kl_of_the_reference_to_itself_is_zero():
    model = tiny_model()
    rows = lazy_stack([make_row(row, prompt_length=2) for row in make_ids()[:4]])
    batch = RetrieveLogProb(ReferenceScorer(model, 0, 2).score)(rows)
    loss_fn = SFTLoss(model.eval(), SimpleNamespace(pad_token_id=0), kl_to_ref_coeff=1.0)
    # Quadratic in the 1e-6 by which padding changes a log-prob.
    assert abs(loss_fn(batch).kl_to_ref.item()) < 1e-9
    # The scores were made under inference_mode and go through a backward pass all the same.
    loss_fn(batch).sum(reduce=True).backward()
    other = SFTLoss(tiny_model(seed=1).eval(), SimpleNamespace(pad_token_id=0), kl_to_ref_coeff=1.0)
    assert other(batch).kl_to_ref.item() > 0.1


class CountingScorer:
    """A scorer that remembers how many rows it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, rows):
        self.asked.append(len(rows))
        return [-torch.ones(len(ids)) for ids in rows]


def test_in_a_buffer_only_what_was_kept_is_scored_and_only_once():
    scorer = CountingScorer()
    buffer = ReplayBuffer(storage=LazyStackStorage(10), batch_size=2)
    buffer.append_transform(Compose(RetrieveLogProb(scorer), TopKRewardSelector(4, 2)))
    ids = make_ids()
    buffer.extend(lazy_stack([make_row(ids[index], 1, reward) for index, reward in enumerate([0.0, 3.0])]))
    assert (len(buffer), scorer.asked) == (0, [])
    buffer.extend(lazy_stack([make_row(ids[index], 1, reward) for index, reward in [(2, 0.0), (3, 2.0)]]))
    assert (len(buffer), scorer.asked) == (2, [2])
    sample = buffer.sample()
    assert scorer.asked == [2]
    for row in sample.unbind(0):
        expected = [0.0] + [-1.0] * (len(row["tokens", "full"]) - 1)
        assert row["next", "ref_log_probs", "full"].tolist() == expected


def test_the_key_that_is_written_is_the_key_that_is_announced():
    spec = RetrieveLogProb(CountingScorer()).transform_observation_spec(Composite(shape=(4,)))
    assert list(spec.keys(True, True)) == [("ref_log_probs", "full")]
    assert spec["ref_log_probs", "full"].shape == (4, -1)
