"""Derived sizes and their arithmetic."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest

from expert_iteration.cli import compose_config
from expert_iteration.config import Config, RestartFrom
from expert_iteration.resolve import resolve_config
from expert_iteration.sizes import (
    Sizes,
    batches_ahead,
    derive_sizes,
    describe_sizes,
    due_gradient_steps,
    optimizer_steps_of_batch,
    responses_per_gradient_step,
)


@cache
def loaded(task: str, mode: str) -> Config:
    return resolve_config(compose_config(task, mode), mode)


def changed(task: str = "ei_tiny", mode: str = "sync", **train: int | str | None) -> Config:
    cfg = deepcopy(loaded(task, mode))
    cfg.train = replace(cfg.train, **train)
    return cfg


def sizes(
    task: str = "ei_tiny", mode: str = "sync", *, num_envs: int | None = None, **train: int | str | None
) -> Sizes:
    cfg = changed(task, mode, **train)
    cfg.env.num_envs = num_envs or cfg.env.num_envs
    return derive_sizes(cfg)


def test_sizes_of_the_tiny_run():
    got = sizes()
    assert (got.turns_per_batch, got.groups_per_batch, got.num_batches, got.num_envs) == (256, 32, 16, 256)
    assert (got.max_kept_per_batch, got.buffer_size) == (64, 64)
    # 64 / 16 = 4 micro-batches, twice over, in each of 16 batches
    assert (got.max_gradient_steps, got.max_optimizer_steps) == (128, 128)


def test_an_evaluation_alone_says_how_much_it_samples():
    cfg = changed()
    cfg.eval.only = True
    (line,) = describe_sizes(derive_sizes(cfg), cfg)
    assert line == "evaluation of tiny: 200 prompts x (4 responses at temperature 1 + 1 greedy) = 1000 responses"


def test_sizes_of_gsm8k_sync():
    got = sizes("ei_gsm8k")
    assert (got.turns_per_batch, got.groups_per_batch, got.num_batches) == (256, 8, 391)  # 390.6
    assert (got.max_kept_per_batch, got.buffer_size) == (32, 32)  # turns x topk / repeats
    assert got.max_gradient_steps == 391 * 4 * 8
    assert got.max_optimizer_steps == 391 * 8


def test_sizes_of_gsm8k_async():
    got = sizes("ei_gsm8k", "async")
    assert got.buffer_size == 256
    assert got.max_gradient_steps == 391 * 32 // 4
    assert got.max_optimizer_steps == 391 * 32 // 16


def test_the_buffer_of_an_asynchronous_run_holds_256_or_a_batch():
    assert sizes(mode="async").buffer_size == 256
    assert sizes(mode="async", topk_size=8, dialog_turns_per_batch=256).buffer_size == 256
    assert sizes(mode="async", topk_size=8, dialog_turns_per_batch=264).buffer_size == 264
    assert sizes(mode="async", buffer_size=64).buffer_size == 64


def test_total_optimizer_steps_are_the_steps_of_an_asynchronous_run():
    got = sizes(mode="async", total_optimizer_steps=100, gradient_accumulation_steps=3)
    assert (got.max_gradient_steps, got.max_optimizer_steps) == (300, 100)
    assert sizes(total_optimizer_steps=100).max_optimizer_steps == 128  # no meaning in sync mode


@cache
def on_devices(num_devices: int, mode: str = "sync") -> Config:
    cfg = changed(mode=mode)
    cfg.train_model = replace(cfg.train_model, num_devices=num_devices)
    return cfg


def test_a_gradient_step_is_a_micro_batch_on_each_training_device():
    assert [responses_per_gradient_step(on_devices(ranks)) for ranks in (1, 2, 3)] == [16, 32, 48]
    # 64 kept in steps of 32, of 48 (the second is smaller), of 80 (the only one is smaller), twice over in 16 batches
    assert [derive_sizes(on_devices(ranks)).max_gradient_steps for ranks in (2, 3, 5)] == [64, 64, 32]
    assert [optimizer_steps_of_batch(on_devices(2), kept) for kept in (0, 1, 32, 33)] == [0, 2, 2, 4]
    assert any("64 responses / 32 a gradient step" in line for line in describe_sizes(sizes(), on_devices(2)))


def test_owed_steps_count_the_responses_of_all_training_devices():
    cfg = on_devices(2, "async")
    assert derive_sizes(cfg).max_gradient_steps == 16 * 64 * 2 // 32
    assert due_gradient_steps(cfg, 64, progress=0.5) == 4
    assert [due_gradient_steps(cfg, 20, progress) for progress in (0.5, 1.0)] == [1, 2]  # 40 draws


def test_a_partial_accumulation_is_stepped_at_the_end_of_each_batch():
    # 64 kept, 2 epochs: 8 gradient steps a batch, of which 3 + 3 + 2 make optimizer steps
    assert sizes(gradient_accumulation_steps=3).max_optimizer_steps == 16 * 3


def test_optimizer_steps_of_a_batch_follow_what_was_kept():
    cfg = deepcopy(loaded("ei_tiny", "sync"))  # 2 epochs, micro-batches of 16
    cfg.train.gradient_accumulation_steps = 3
    assert [optimizer_steps_of_batch(cfg, kept) for kept in (0, 1, 16, 17, 64)] == [0, 1, 1, 2, 3]


def test_the_last_micro_batch_of_an_epoch_is_smaller():
    assert sizes(optim_batch_size=24).max_gradient_steps == 16 * 2 * 3  # 24 + 24 + 16


@pytest.mark.parametrize(
    ("total", "batch", "batches"), [(1, 8, 1), (8, 8, 1), (64, 64, 1), (100, 104, 1), (256, 256, 1), (257, 256, 2)]
)
def test_a_short_run_makes_a_smaller_batch_of_whole_groups(total, batch, batches):
    got = sizes(total_dialog_turns=total)
    assert (got.turns_per_batch, got.num_batches) == (batch, batches)
    assert got.num_envs == batch
    assert got.max_kept_per_batch == got.buffer_size == batch // 8 * 2


@pytest.mark.parametrize("num_envs", [1, 2, 4, 8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("total", [1, 24, 40, 96, 200, 256])
def test_num_envs_always_divides_the_batch_into_groups_or_parts_of_one(num_envs, total):
    got = sizes(num_envs=num_envs, total_dialog_turns=total)
    assert got.num_envs <= num_envs
    assert got.turns_per_batch % got.num_envs == 0
    assert got.num_envs % 8 == 0 or 8 % got.num_envs == 0


def test_what_accumulates_has_room_for_the_whole_run():
    for got in (sizes(accumulate_expert_set=True), sizes(restart_from=RestartFrom.base)):
        assert (got.buffer_size, got.max_trained_per_batch) == (16 * 64, 16 * 64)
        # 64, 128, ... 1024 responses in micro-batches of 16, twice over
        assert got.max_gradient_steps == 2 * 4 * sum(range(1, 17))
    assert sizes(restart_from=RestartFrom.base, accumulate_expert_set=False) == sizes()


def simulated_steps(cfg: Config) -> tuple[int, int]:
    """Gradient and optimizer steps of the script's loop, counted, in a run whose batches keep all they may."""
    got, train = derive_sizes(cfg), cfg.train
    stored = gradient_steps = optimizer_steps = 0
    for _ in range(got.num_batches):
        stored = min(stored + got.max_kept_per_batch, got.buffer_size)
        micro_batches = sum(len(range(0, stored, train.optim_batch_size)) for _ in range(train.epochs))
        gradient_steps += micro_batches
        optimizer_steps += len(range(0, micro_batches, train.gradient_accumulation_steps))
        stored = 0 if train.empty_replay_buffer and not train.accumulate_expert_set else stored
    return gradient_steps, optimizer_steps


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("buffer_size", [None, 64, 100, 200, 10_000])
@pytest.mark.parametrize(("empty", "accumulates"), [(True, False), (False, False), (True, True)])
def test_steps_are_those_of_the_loop(empty, accumulates, buffer_size, accumulation):
    cfg = deepcopy(loaded("ei_tiny", "sync"))
    train = cfg.train
    train.empty_replay_buffer, train.buffer_size, train.gradient_accumulation_steps = empty, buffer_size, accumulation
    train.accumulate_expert_set = accumulates
    got = derive_sizes(cfg)
    assert (got.max_gradient_steps, got.max_optimizer_steps) == simulated_steps(cfg)


def test_a_buffer_that_is_not_emptied_accumulates_up_to_its_size():
    got = sizes(empty_replay_buffer=False, buffer_size=200)
    assert got.max_trained_per_batch == 200
    # 64, 128, 192 and 13 times 200 responses in micro-batches of 16, twice over
    assert got.max_gradient_steps == 2 * (4 + 8 + 12 + 13 * 13)
    assert sizes(empty_replay_buffer=False, buffer_size=10_000).max_trained_per_batch == 16 * 64
    assert sizes(empty_replay_buffer=False).max_gradient_steps == sizes().max_gradient_steps  # room for one batch only


def test_growth_is_described():
    cfg = deepcopy(loaded("ei_tiny", "sync"))
    cfg.train = replace(cfg.train, empty_replay_buffer=False, buffer_size=200)
    assert (
        "64 to 200 responses (the buffer is not emptied) / 16 a gradient step, 2 epochs, 16 batches -> at most 386 "
        "gradient steps; 1 to an optimizer step -> at most 386"
    ) in describe_sizes(derive_sizes(cfg), cfg)


def test_classic_expert_iteration_is_described():
    cfg = changed(restart_from=RestartFrom.base)
    lines = describe_sizes(derive_sizes(cfg), cfg)
    assert lines[-2:] == ["buffer: 1024 responses", "each batch fine-tunes the start model anew"]
    assert "64 to 1024 responses (all that was kept so far) / 16 a gradient step" in lines[-3]


def test_buffer_size_is_taken_as_given():
    assert sizes(buffer_size=100).buffer_size == 100


def test_sizes_are_described_with_their_arithmetic():
    cfg = loaded("ei_tiny", "sync")
    assert describe_sizes(derive_sizes(cfg), cfg) == [
        "256 turns / 8 repeats = 32 groups; 2 kept each -> at most 64 responses a batch",
        "4096 turns / 256 = 16 batches",
        "engine: 256 turns / 256 asked at once = 1 calls a batch",
        "64 responses / 16 a gradient step, 2 epochs, 16 batches -> at most 128 gradient steps; "
        "1 to an optimizer step -> at most 128",
        "buffer: 64 responses",
    ]
    cfg = loaded("ei_gsm8k", "sync")
    assert "100096 turns (rounded up from 100000) / 256 = 391 batches" in describe_sizes(derive_sizes(cfg), cfg)


# --- pacing of the asynchronous mode ---


def owed(batches: list[int], **train: int) -> list[int]:
    """Gradient steps owed after each of the batches that kept so many responses."""
    cfg = changed(mode="async", **train)
    return [
        due_gradient_steps(cfg, sum(batches[:done]), progress=done / len(batches))
        for done in range(1, len(batches) + 1)
    ]


def test_kept_responses_owe_the_micro_batches_that_they_fill_and_at_the_end_the_last_one():
    # 2 epochs in micro-batches of 16: 80 / 16, 126 / 16 = 7.9, the same again, 128 / 16, 130 / 16 = 8.1
    assert owed([40, 23, 0, 1, 1]) == [5, 7, 7, 8, 9]
    assert owed([40, 24]) == [5, 8]  # nothing is left over
    assert owed([3], epochs=5) == [1]  # 15 draws
    assert owed([0, 0]) == [0, 0]
    assert due_gradient_steps(changed(mode="async"), 0, progress=0.0) == 0


def test_total_optimizer_steps_are_owed_evenly_whatever_is_kept():
    assert owed([64, 0, 1, 64], total_optimizer_steps=10) == [2, 5, 7, 10]
    assert owed([64, 0, 1, 64], total_optimizer_steps=10, gradient_accumulation_steps=4) == [8, 20, 28, 40]
    assert owed([64, 64, 64], total_optimizer_steps=2) == [0, 1, 2]


@pytest.mark.parametrize("total", [1, 98, 100, 782])
@pytest.mark.parametrize("batches", [1, 3, 49, 391])  # 98 x (1 / 49) is just below 2
def test_no_owed_optimizer_step_is_lost_to_rounding(total, batches):
    exact = [total * done // batches for done in range(1, batches + 1)]
    assert owed([1] * batches, total_optimizer_steps=total) == exact
    assert exact[-1] == total


@pytest.mark.parametrize("train", [{}, {"total_optimizer_steps": 50}, {"gradient_accumulation_steps": 3}])
def test_what_a_full_run_owes_in_the_end_is_what_its_sizes_say(train):
    got = sizes(mode="async", **train)
    assert owed([got.max_kept_per_batch] * got.num_batches, **train)[-1] == got.max_gradient_steps


@pytest.mark.parametrize(
    ("train", "ahead"),
    [
        ({}, None),
        ({"max_ahead": 32}, 1),
        ({"max_ahead": 63}, 1),
        ({"max_ahead": 64}, 2),
        ({"deterministic": True}, 1),
        ({"deterministic": True, "max_ahead": 64}, 1),
        ({"max_ahead": 64, "total_dialog_turns": 128}, 4),  # one batch of 16 groups
    ],
)
def test_collection_may_be_whole_batches_ahead(train, ahead):
    assert batches_ahead(changed(mode="async", **train)) == ahead


def described(**train: int) -> list[str]:
    """The lines that asynchronous mode has for itself."""
    cfg = changed(mode="async", **train)
    return describe_sizes(derive_sizes(cfg), cfg)[3:]


def test_asynchronous_sizes_are_described_with_their_arithmetic():
    assert described() == [
        "at most 64 kept a batch x 16 batches x 2 epochs / 16 a gradient step -> at most 128 gradient steps; "
        "1 to an optimizer step -> at most 128",
        "buffer: 256 responses, the oldest make room",
    ]
    assert described(total_optimizer_steps=50, gradient_accumulation_steps=4, max_ahead=70) == [
        "50 optimizer steps x 4 = 200 gradient steps; x 16 each / (at most 64 kept a batch x 16 batches) -> "
        "at least 3.12 epochs",
        "buffer: 256 responses, the oldest make room",
        "collection: at most 64 groups = 2 batches ahead of training",
    ]
    assert described(deterministic=True)[-1] == "collection: at most 32 groups = 1 batch ahead of training"
