"""`expert_iteration.learner`: windows of gradient steps, bad steps, precision, and the state that is saved."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from builders import random_model
from tensordict import TensorDict, lazy_stack
from torch import nn

import ei_utils
from expert_iteration.cadence import is_due
from expert_iteration.devices import compute_device_allocation
from expert_iteration.errors import UserError
from expert_iteration.learner import Learner, Share, share_out
from expert_iteration.loss import SFTLoss
from expert_iteration.optimizer import make_optimizer
from expert_iteration.schedule import KLSchedule, make_scheduler

VOCABULARY = 50
TOKENIZER = SimpleNamespace(pad_token_id=0)
SPLITS = [[8], [4, 4], [2, 2, 2, 2], [3, 3, 2], [1, 6, 1], [7, 1]]


def make_row(seed: int) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    prompt, response = (int(torch.randint(1, 9, (1,), generator=generator)) for _ in range(2))
    mask = torch.arange(prompt + response) >= prompt
    return TensorDict(
        {
            ("tokens", "full"): torch.randint(VOCABULARY, mask.shape, generator=generator),
            ("masks", "all_assistant_mask"): mask,
            ("next", "reward"): torch.tensor([float(seed)]),
            ("next", "ref_log_probs", "full"): -4.0 * mask,
        }
    )


ROWS = [make_row(seed) for seed in range(8)]


def batches(sizes: list[int]) -> list[TensorDict]:
    """The eight rows, cut into micro-batches of these sizes."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [lazy_stack(ROWS[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


class Poison(nn.Module):
    """The SFT loss, times whatever number stands in a row's reward: NaN makes the loss NaN."""

    def __init__(self, loss_fn: nn.Module):
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, batch):
        output = self.loss_fn(batch)
        output.loss_sft = output.loss_sft * batch["next", "reward"].mean() ** 0
        if batch["next", "reward"].isnan().any():
            output.loss_sft = output.loss_sft * torch.nan
        return output


class SteepLoss(nn.Module):
    """A finite loss (0) with an infinite gradient: the square root at 0."""

    def __init__(self, loss_fn: nn.Module):
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, batch):
        output = self.loss_fn(batch)
        output.loss_sft = (self.loss_fn.model.model.norm.weight - 1).abs().sum().sqrt() + 0 * output.loss_sft
        return output


def make_learner(model=None, *, loss=lambda loss_fn: loss_fn, optimizer="SGD", lr=1.0, num_steps=100, **options):
    model = random_model(VOCABULARY) if model is None else model
    loss_fn = loss(SFTLoss(model, TOKENIZER, kl_to_ref_coeff=0.5))
    torch_optimizer = make_optimizer(model, optimizer_settings(name=optimizer), lr)
    shape = SimpleNamespace(enabled=True, type="cosine_with_warmup", warmup_steps=0, num_cycles=0.5)
    options = {
        "gradient_accumulation_steps": 1,
        "clip_grad_norm": None,
        "autocast_dtype": None,
        "max_bad_steps": 3,
        **options,
    }
    return Learner(model, loss_fn, torch_optimizer, make_scheduler(torch_optimizer, shape, num_steps), **options)


def optimizer_settings(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"name": "AdamW", "betas": [0.9, 0.98], "weight_decay": 0.0, **changes})


def weights(learner: Learner) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in learner.model.parameters()]).clone()


def update(learner: Learner, sizes: list[int]) -> torch.Tensor:
    before = weights(learner)
    for batch in batches(sizes):
        learner.step(batch)
    return weights(learner) - before


def poisoned(batch: TensorDict) -> TensorDict:
    batch = copy.deepcopy(batch)
    batch[0]["next", "reward"].fill_(torch.nan)
    return batch


# --- windows ---


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_accumulation_equals_the_large_batch(sizes, clip):
    """With SGD at rate 1 the update is the (clipped) mean gradient itself; Adam's first step would hide its size."""
    expected = update(make_learner(clip_grad_norm=clip), [8])
    learner = make_learner(clip_grad_norm=clip, gradient_accumulation_steps=len(sizes))
    found = update(learner, sizes)
    # Float32 gradients, summed in another order and under another padding.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert (learner.gradient_steps, learner.optimizer_steps) == (len(sizes), 1)


def test_clipping_bounds_the_norm_of_the_mean_gradient():
    free = update(make_learner(), [8])
    for limit in (0.1, 1e6):
        learner = make_learner(clip_grad_norm=limit, gradient_accumulation_steps=3)
        before = weights(learner)
        result = [learner.step(batch) for batch in batches([3, 3, 2])][-1]
        found = weights(learner) - before
        assert result["grad_norm"] == pytest.approx(free.norm().item(), rel=1e-4)
        # clip_grad_norm_ adds 1e-6 to the norm it divides by.
        assert found.norm().item() == pytest.approx(min(limit, free.norm().item()), rel=1e-4)


def test_flush_steps_on_what_a_window_holds_and_leaks_nothing():
    first, second = batches([5, 3])
    learner, plain = make_learner(lr=1e-2, gradient_accumulation_steps=4), make_learner(lr=1e-2)
    for rows in (first, second):
        assert not learner.step(rows).stepped
        result = learner.flush()
        plain.step(rows)
        assert result.stepped
        assert result["grad_norm"] > 0
        # One window of one micro-batch is the same computation: bitwise.
        assert torch.equal(weights(learner), weights(plain))
    assert (learner.gradient_steps, learner.optimizer_steps) == (2, 2)


def test_flush_of_an_empty_window_does_nothing():
    learner = make_learner()
    before, state = weights(learner), copy.deepcopy(learner.state_dict())
    result = learner.flush()
    assert not result.stepped
    assert torch.equal(weights(learner), before)
    assert learner.state_dict() == state
    update(learner, [8])
    assert learner.optimizer_steps == 1
    learner.flush()
    assert learner.optimizer_steps == 1


def test_a_result_says_where_it_stands():
    learner = make_learner(lr=1e-2, gradient_accumulation_steps=3)
    results = [learner.step(ROWS_BATCH) for _ in range(7)]
    assert [result.stepped for result in results] == [False, False, True, False, False, True, False]
    assert [result.step for result in results] == [1, 2, 3, 4, 5, 6, 7]
    assert [result.since for result in results] == [0, 0, 0, 3, 3, 3, 6]
    assert learner.flush().since == 6
    assert learner.last_step_at == 7


ROWS_BATCH = lazy_stack(ROWS[:2])


@pytest.mark.parametrize(
    ("step", "every", "since", "due"),
    [
        (10, 10, None, True),
        (11, 10, None, False),
        (10, None, None, False),
        (10, 0, None, False),
        (12, 10, 8, True),  # 10 fell between two optimizer steps: it is due at the second
        (16, 10, 12, False),
        (10, 10, 8, True),
        (14, 10, 10, False),  # 10 was an optimizer step itself and is done
        (40, 10, 8, True),  # several at once happen once
        (4, 1, 0, True),
    ],
)
def test_is_due(step, every, since, due):
    assert is_due(step, every, since) is due


# --- shares ---


@pytest.mark.parametrize(
    ("num_rows", "num_ranks", "counts"),
    [(8, 1, [8]), (8, 3, [3, 3, 2]), (3, 2, [2, 1]), (1, 2, [1, 0]), (2, 3, [1, 1, 0])],
)
def test_a_batch_is_shared_out_evenly_and_nobody_stays_without_rows(num_rows, num_ranks, counts):
    shares = share_out(lazy_stack(ROWS[:num_rows]), num_ranks)
    assert [share.num_responses for share in shares] == counts
    counted = [row for share in shares for row in share.rows.unbind(0)[: share.num_responses]]
    assert [row["next", "reward"].item() for row in counted] == list(range(num_rows))
    for share in shares:
        assert len(share.rows) == max(1, share.num_responses)
        assert share.step_responses == num_rows
        assert share.step_tokens == sum(len(row["tokens", "full"]) for row in ROWS[:num_rows])


def test_a_share_that_does_not_count_takes_part_without_effect():
    learner = make_learner(gradient_accumulation_steps=2)
    learner.train_on(Share(lazy_stack(ROWS[:1]), 0, 4, 20))
    assert all(parameter.grad.count_nonzero() == 0 for parameter in learner.model.parameters())
    assert (learner.responses_trained, learner.tokens_trained) == (4, 20)


class NotingReference:
    """In place of an `AdapterReference`: log-probs that no batch brings along."""

    def __init__(self):
        self.batches = []

    def attach(self, batch):
        self.batches.append(len(batch))
        for row in batch.unbind(0):
            row.set(("next", "ref_log_probs", "full"), -4.0 * row["masks", "all_assistant_mask"])


def test_the_reference_gives_every_batch_the_log_probs_that_it_lacks():
    reference = NotingReference()
    learner, expected = make_learner(reference=reference), make_learner()
    bare = [row.clone().exclude(("next", "ref_log_probs", "full")) for row in ROWS]
    result = learner.step(lazy_stack(bare))
    assert reference.batches == [8]
    assert result == expected.step(lazy_stack(ROWS))


# --- metrics ---


def test_metrics_are_means_over_the_micro_batch():
    learner = make_learner()
    rows = ROWS[2:5]
    output = learner.loss_fn(lazy_stack(rows))
    result = learner.step(lazy_stack(rows))
    assert all(type(value) is float for value in result.values())
    assert result["reward"] == 3.0
    responses = [int(row["masks", "all_assistant_mask"].sum()) for row in rows]
    assert result["response_length"] == pytest.approx(sum(responses) / 3, rel=1e-6)
    assert result["loss_sft"] == pytest.approx(output.loss_sft.item(), rel=1e-6)
    assert result["loss_kl_to_ref"] == pytest.approx(output.loss_kl_to_ref.item(), rel=1e-6)
    assert result["loss"] == pytest.approx(result["loss_sft"] + result["loss_kl_to_ref"], rel=1e-6)
    assert result["entropy"] == pytest.approx(output.entropy.item(), rel=1e-6)
    assert result["kl_to_ref"] == pytest.approx(2 * result["loss_kl_to_ref"], rel=1e-6)
    assert result["learning_rate"] == 1.0
    assert learner.responses_trained == 3
    assert learner.tokens_trained == sum(len(row["tokens", "full"]) for row in rows)


def test_without_a_kl_term_there_is_no_metric_of_it():
    learner = make_learner()
    learner.loss_fn.kl_to_ref_coeff = None
    result = learner.step(lazy_stack(ROWS))
    assert "loss_kl_to_ref" not in result
    assert result["loss"] == result["loss_sft"]
    assert result["kl_to_ref"] > 0


def test_the_learning_rate_is_that_of_the_step_and_follows_the_plan():
    learner = make_learner(lr=1e-3, gradient_accumulation_steps=2, num_steps=1000)
    learner.plan(2, until=1.0)
    found = [learner.step(ROWS_BATCH)["learning_rate"] for _ in range(5)]
    # Half a cosine over two optimizer steps: 1, 1/2, then 0.
    assert found == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 0.0], abs=1e-12)


# --- the KL coefficient ---


def linear_to_zero() -> KLSchedule:
    return KLSchedule(start=0.5, end=0.0, shape="linear")


def test_the_kl_coefficient_falls_from_window_to_window_and_is_reported():
    learner = make_learner(lr=1e-3, gradient_accumulation_steps=2, num_steps=5, kl_schedule=linear_to_zero())
    results = [learner.step(ROWS_BATCH) for _ in range(8)]
    found = [result["kl_to_ref_coeff"] for result in results]
    assert found == pytest.approx([0.5, 0.5, 0.4, 0.4, 0.3, 0.3, 0.2, 0.2], abs=1e-12)
    for result, coefficient in zip(results, found, strict=True):
        assert result["loss_kl_to_ref"] == pytest.approx(coefficient * result["kl_to_ref"], rel=1e-6)
    learner.step(ROWS_BATCH)
    assert learner.flush()["kl_to_ref_coeff"] == pytest.approx(0.1, abs=1e-12)


def test_a_plan_in_the_middle_of_a_window_changes_the_kl_coefficient_from_the_next_on():
    learner = make_learner(lr=1e-3, gradient_accumulation_steps=2, num_steps=5, kl_schedule=linear_to_zero())
    found = [learner.step(ROWS_BATCH)["kl_to_ref_coeff"]]
    learner.plan(0, until=0.2)  # a batch that kept nothing: progress jumps
    learner.plan(2, until=0.6)
    found += [learner.step(ROWS_BATCH)["kl_to_ref_coeff"] for _ in range(3)]
    assert found == pytest.approx([0.5, 0.5, 0.3, 0.3], abs=1e-12)


def test_past_the_end_of_a_schedule_to_zero_the_kl_is_reported_without_its_term():
    learner = make_learner(lr=1e-3, num_steps=2, kl_schedule=linear_to_zero())
    results = [learner.step(ROWS_BATCH) for _ in range(3)]
    assert [result["kl_to_ref_coeff"] for result in results] == [0.5, 0.25, 0.0]
    assert "loss_kl_to_ref" in results[1]
    assert "loss_kl_to_ref" not in results[2]
    assert results[2]["loss"] == results[2]["loss_sft"]
    assert results[2]["kl_to_ref"] > 0


def test_a_bad_window_leaves_the_kl_coefficient_where_it_is():
    learner = make_learner(lr=1e-3, num_steps=5, kl_schedule=linear_to_zero())
    torch.nn.init.constant_(learner.model.lm_head.weight, torch.nan)
    found = [learner.step(ROWS_BATCH) for _ in range(2)]
    assert not any(result.stepped for result in found)
    assert [result["kl_to_ref_coeff"] for result in found] == [0.5, 0.5]


def test_without_a_schedule_the_kl_coefficient_stays_and_is_no_metric():
    learner = make_learner(num_steps=2)
    results = [learner.step(ROWS_BATCH) for _ in range(2)]
    assert not any("kl_to_ref_coeff" in result for result in results)
    assert learner.loss_fn.kl_to_ref_coeff == 0.5


def test_a_restored_learner_continues_the_kl_schedule():
    def start() -> Learner:
        return make_learner(lr=1e-3, num_steps=1000, kl_schedule=linear_to_zero())

    learner = start()
    learner.plan(4, until=0.8)
    for _ in range(3):
        learner.step(ROWS_BATCH)
    restored = start()
    restored.load_state_dict(learner.state_dict())
    assert restored.step(ROWS_BATCH)["kl_to_ref_coeff"] == pytest.approx(0.5 * 0.4, abs=1e-12)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.kl_to_ref_coeff=0.8"], [0.8, 0.8]),
        (["train.kl_to_ref_schedule.type=linear", "train.kl_to_ref_schedule.end=0.02"], [0.1, 0.06]),
        (["train.kl_to_ref_schedule.type=cosine"], [0.1, 0.05]),
        (["train.kl_to_ref_coeff=null"], [None, None]),
        (["train.kl_to_ref_coeff=0"], [None, None]),
    ],
)
def test_the_kl_schedule_of_the_configuration(overrides, expected, make_cfg):
    cfg = make_cfg(*overrides)
    allocation = compute_device_allocation(cfg, num_accelerators=0)
    learner = ei_utils.make_learner(cfg, allocation, (random_model(VOCABULARY), TOKENIZER))
    learner.plan(2, until=1.0)
    found = [learner.step(ROWS_BATCH).get("kl_to_ref_coeff") for _ in range(2)]
    assert found == [value if value is None else pytest.approx(value, abs=1e-12) for value in expected]


# --- bad steps ---


def test_a_bad_loss_costs_its_window_and_nothing_else():
    learner = make_learner(loss=Poison, optimizer="AdamW", lr=1e-3, gradient_accumulation_steps=2)
    good, other = batches([4, 4])
    learner.step(good)
    learner.step(other)
    before, optimizer_before = weights(learner), copy.deepcopy(learner.optimizer.state_dict())
    rate = learner.optimizer.param_groups[0]["lr"]
    learner.step(poisoned(good))
    result = learner.step(other)
    assert not result.stepped
    assert torch.equal(weights(learner), before)
    assert_same_state(learner.optimizer.state_dict(), optimizer_before)
    assert learner.optimizer.param_groups[0]["lr"] == rate
    assert (learner.gradient_steps, learner.optimizer_steps, learner.bad_steps) == (4, 1, 1)
    assert learner.last_step_at == 2
    # The next window is a clean one: as if the bad one had never been.
    learner.step(good)
    assert learner.step(other).stepped
    twin = make_learner(loss=Poison, optimizer="AdamW", lr=1e-3, gradient_accumulation_steps=2)
    for batch in (good, other, good, other):
        twin.step(batch)
    assert torch.equal(weights(learner), weights(twin))


def test_bad_steps_in_a_row_end_the_run():
    learner = make_learner(loss=Poison, lr=1e-3, max_bad_steps=2)
    good = lazy_stack(ROWS)
    before = weights(learner)
    learner.step(poisoned(good))
    learner.step(good)  # ends the row
    after = weights(learner)
    assert not torch.equal(after, before)
    learner.step(poisoned(good))
    with pytest.raises(RuntimeError, match=r"2 optimizer steps in a row.*loss_sft is nan at gradient step 4"):
        learner.step(poisoned(good))
    assert learner.bad_steps == 3
    assert torch.equal(weights(learner), after)


def test_a_bad_window_is_found_by_flush_too():
    learner = make_learner(loss=Poison, gradient_accumulation_steps=4, max_bad_steps=1)
    learner.step(poisoned(lazy_stack(ROWS)))
    with pytest.raises(RuntimeError, match="loss_sft is nan"):
        learner.flush()


def test_a_bad_gradient_of_a_finite_loss_is_skipped_and_named():
    learner = make_learner(loss=SteepLoss, max_bad_steps=2)
    before = weights(learner)
    result = learner.step(lazy_stack(ROWS))
    assert result["loss_sft"] == 0.0
    assert not result.stepped
    assert learner.bad_steps == 1
    with pytest.raises(RuntimeError, match=r"gradient norm is nan .*model\.norm\.weight"):
        learner.step(lazy_stack(ROWS))
    assert torch.equal(weights(learner), before)


# --- precision ---


def test_master_weights_stay_float32_under_a_bfloat16_forward():
    learner = make_learner(autocast_dtype=torch.bfloat16, lr=1e-3, optimizer="AdamW")
    seen = []
    learner.model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    before = weights(learner)
    result = learner.step(lazy_stack(ROWS))
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in learner.model.parameters()} == {torch.float32}
    assert {state["exp_avg"].dtype for state in learner.optimizer.state.values()} == {torch.float32}
    assert not torch.equal(weights(learner), before)
    full = make_learner(lr=1e-3, optimizer="AdamW").step(lazy_stack(ROWS))
    # bfloat16 keeps 8 bits: some 1 % a value, less in a mean over fifty tokens.
    assert result["loss_sft"] == pytest.approx(full["loss_sft"], rel=0.02)
    assert not learner.scaler.is_enabled()


def test_trainable_bfloat16_weights_are_refused():
    with pytest.raises(UserError, match=r"embed_tokens.*bfloat16.*float32"):
        make_learner(random_model(VOCABULARY).to(torch.bfloat16))


def test_an_overflow_of_the_gradient_scaler_is_not_a_bad_step():
    learner = make_learner(autocast_dtype=torch.float16, lr=1e-3, max_bad_steps=1)
    assert learner.scaler.is_enabled()
    set_scale(learner, 2.0**100)
    before = weights(learner)
    assert not learner.step(lazy_stack(ROWS)).stepped
    assert torch.equal(weights(learner), before)
    assert (learner.bad_steps, learner.optimizer_steps) == (0, 0)
    assert learner.scaler.get_scale() == 2.0**99
    set_scale(learner, 16.0)
    result = learner.step(lazy_stack(ROWS))
    assert result.stepped
    # The scale is taken out again before the norm: the norm of a float32 run, to float16's three digits.
    assert result["grad_norm"] == pytest.approx(make_learner().step(lazy_stack(ROWS))["grad_norm"], rel=0.05)


def test_a_non_finite_gradient_at_scale_one_is_bad_with_a_scaler_too():
    learner = make_learner(loss=SteepLoss, autocast_dtype=torch.float16, max_bad_steps=1)
    set_scale(learner, 1.0)
    with pytest.raises(RuntimeError, match="gradient norm is"):
        learner.step(lazy_stack(ROWS))


def set_scale(learner: Learner, scale: float) -> None:
    learner.scaler.load_state_dict({**learner.scaler.state_dict(), "scale": scale})


# --- modes of the model ---


@pytest.mark.parametrize(("eval_mode", "forwards"), [(False, 2), (True, 1)])
def test_gradient_checkpointing_recomputes_each_layer(eval_mode, forwards):
    learner = make_learner(eval_mode=eval_mode)
    learner.model.gradient_checkpointing_enable()
    learner.model.train(eval_mode)  # the learner sets the mode itself: an evaluation may have changed it
    calls, modes = [], []
    for layer in learner.model.model.layers:
        # A pre-hook, for the recomputation stops as soon as it has what the backward pass needs.
        layer.mlp.register_forward_pre_hook(lambda module, _: calls.append(module))
    learner.model.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    learner.step(lazy_stack(ROWS))
    assert modes == [not eval_mode]
    assert [calls.count(layer.mlp) for layer in learner.model.model.layers] == [forwards, forwards]


# --- state ---


@pytest.mark.parametrize("optimizer", ["AdamW", "Adam", "SGD"])
def test_a_restored_learner_continues_bitwise(optimizer):
    def start():
        learner = make_learner(
            loss=Poison, optimizer=optimizer, lr=1e-2, gradient_accumulation_steps=2, clip_grad_norm=1.0
        )
        learner.plan(6, until=0.8)
        return learner

    def work(learner):
        for batch in batches([2, 2, 2, 2]):
            learner.step(batch)

    learner = start()
    work(learner)
    for batch in batches([4, 4]):
        learner.step(poisoned(batch))
    saved = io.BytesIO()
    torch.save({"model_state_dict": learner.model.state_dict(), **learner.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    restored = start()
    restored.model.load_state_dict(state["model_state_dict"])
    restored.load_state_dict(state)
    for which in (learner, restored):
        work(which)
    assert torch.equal(weights(restored), weights(learner))
    assert restored.bad_steps == 1
    assert_same_state(restored.state_dict(), learner.state_dict())


def test_the_row_of_bad_steps_is_restored():
    learner = make_learner(loss=Poison, max_bad_steps=2)
    learner.step(poisoned(lazy_stack(ROWS)))
    restored = make_learner(loss=Poison, max_bad_steps=2)
    restored.load_state_dict(learner.state_dict())
    with pytest.raises(RuntimeError, match="in a row"):
        restored.step(poisoned(lazy_stack(ROWS)))


def test_state_in_the_middle_of_a_window_is_refused():
    learner = make_learner(gradient_accumulation_steps=2)
    learner.step(lazy_stack(ROWS))
    with pytest.raises(RuntimeError, match="flush"):
        learner.state_dict()


def assert_same_state(found, expected) -> None:
    """Equality of nested states whose leaves may be tensors, bitwise."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_state(found[key], value)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


# --- the optimizer ---


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_the_optimizer_is_the_one_named_and_spares_norms_and_biases(name):
    model = random_model(VOCABULARY)
    optimizer = make_optimizer(model, optimizer_settings(name=name, weight_decay=0.1), 1e-3)
    assert type(optimizer) is getattr(torch.optim, name)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        spared = "norm" in parameter_name or parameter_name.endswith("bias")
        assert decay[id(parameter)] == (0.0 if spared else 0.1), parameter_name
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    if name != "SGD":
        assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.98)}


def test_weight_decay_moves_matrices_only():
    model = random_model(VOCABULARY)
    learner = make_learner(model, lr=0.5)
    for group in learner.optimizer.param_groups:
        assert group["weight_decay"] == 0.0
    optimizer = make_optimizer(model, optimizer_settings(name="SGD", weight_decay=0.1), 0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if parameter.ndim >= 2 else 1.0))


def test_frozen_parameters_are_left_alone():
    model = random_model(VOCABULARY)
    model.model.requires_grad_(False)
    optimizer = make_optimizer(model, optimizer_settings(), 1e-5)
    (group,) = optimizer.param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(model.lm_head.weight)]
    model.requires_grad_(False)
    with pytest.raises(UserError, match="no trainable"):
        make_optimizer(model, optimizer_settings(), 1e-5)


def test_an_unknown_optimizer_is_refused_with_the_known():
    with pytest.raises(UserError, match="AdamW, Adam, SGD"):
        make_optimizer(random_model(VOCABULARY), optimizer_settings(name="Lion"), 1e-5)
