"""`expert-iteration-sync.py`: what happens in which order, told as a list of events by fakes of a few lines."""

import pytest
import torch
from script_fakes import QUIET, drive, only
from tensordict import TensorDict

from expert_iteration.actors import CollectedBatch

TURNS = 8


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("expert-iteration-sync")


class FakeCollector:
    """Writes so many rows into the buffer, batch after batch."""

    def __init__(self, events, buffer, kept):
        self.events, self.buffer, self.kept = events, buffer, kept

    def __iter__(self):
        for number, rows in enumerate(self.kept, start=1):
            self.events.append("collect")
            self.buffer.rows += [number] * rows
            self.buffer.write_count += rows
            yield CollectedBatch(number * TURNS, len(self.kept) * TURNS, rows, [f"sample of batch {number}"])


class FakeBuffer:
    """Rows are the numbers of their batches."""

    def __init__(self, events, batch_size):
        self.events, self.batch_size, self.rows, self.write_count = events, batch_size, [], 0

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        for start in range(0, len(self.rows), self.batch_size):
            rows = self.rows[start : start + self.batch_size]
            yield TensorDict(policy_version=torch.tensor(rows), batch_size=[len(rows)])

    def empty(self, empty_write_count):
        self.events.append("empty")
        self.rows.clear()
        self.write_count = 0 if empty_write_count else self.write_count

    def statistics(self):
        return {"buffer/write_count": float(self.write_count)}


@pytest.fixture
def run(script, make_cfg):
    """A function that runs `train` on fakes and returns them; `kept` are the responses that each batch keeps."""

    def run(*overrides, kept, bad_at=()):
        cfg = make_cfg(*QUIET, *overrides)
        events = []
        buffer = FakeBuffer(events, cfg.train.optim_batch_size)
        return drive(script, cfg, events, FakeCollector(events, buffer, kept), buffer, bad_at)

    return run


# --- the three loops ---


def test_the_whole_order_of_a_run(run):
    done = run("train.epochs=2", "train.gradient_accumulation_steps=2", kept=[2, 1])
    assert done.events == [
        "evaluate at 0",
        "collect",
        "plan 2 until 0.5",
        *("step 1", "step 2", "optimizer step"),
        *("step 3", "step 4", "optimizer step"),
        "empty",
        "push",
        "collect",
        "plan 1 until 1",
        *("step 5", "step 6", "optimizer step"),
        "empty",
        "push",
        "evaluate at 6",
    ]


def test_every_epoch_passes_over_the_whole_buffer(run):
    done = run("train.epochs=3", "train.optim_batch_size=2", kept=[5])
    assert only(done.events, "step") == [f"step {number}" for number in range(1, 10)]  # 3 x (2 + 2 + 1)
    assert done.learner.responses_trained == 15


def test_a_partial_accumulation_is_stepped_at_the_end_of_each_batch(run):
    done = run("train.gradient_accumulation_steps=4", kept=[6, 3])
    assert only(done.events, "step", "optimizer", "collect") == [
        "collect",
        *("step 1", "step 2", "step 3", "step 4", "optimizer step"),
        *("step 5", "step 6", "optimizer step"),
        "collect",
        *("step 7", "step 8", "step 9", "optimizer step"),
    ]


def test_an_accumulation_goes_on_over_the_epochs_of_a_batch(run):
    done = run("train.epochs=2", "train.gradient_accumulation_steps=4", kept=[3])
    assert only(done.events, "step", "optimizer", "plan") == [
        "plan 2 until 1",
        *("step 1", "step 2", "step 3", "step 4", "optimizer step"),
        *("step 5", "step 6", "optimizer step"),
    ]


def test_a_batch_that_keeps_nothing_is_passed_over(run):
    done = run(kept=[0, 2, 0])
    assert done.events == [
        *("evaluate at 0", "collect"),
        *("collect", "plan 2 until 0.666667", "step 1", "optimizer step", "step 2", "optimizer step", "empty", "push"),
        *("collect", "evaluate at 2"),
    ]


def test_what_the_collector_says_of_a_batch_is_logged_also_of_an_empty_one(run):
    assert run(kept=[0, 2, 0]).metrics.drained == [0, 0, 2]


def test_every_gradient_step_is_logged(run):
    done = run(kept=[2, 1])
    assert [step for step, _ in done.metrics.trained] == [1, 2, 3]
    # The rows of batch n carry version n, and so many pushes came before the steps of batch n less one.
    assert [extra["policy_age"] for _, extra in done.metrics.trained] == [-1.0, -1.0, -1.0]
    assert [extra["buffer/write_count"] for _, extra in done.metrics.trained] == [2.0, 2.0, 3.0]


def test_a_flushed_optimizer_step_is_logged_too(run):
    done = run("train.gradient_accumulation_steps=2", kept=[3, 2])
    assert [(step, extra["optim_step"]) for step, extra in done.metrics.trained] == [
        *((1, 0), (2, 1), (3, 1), (3, 2)),
        *((4, 2), (5, 3)),
    ]


# --- pushes ---


def test_weights_are_pushed_once_before_each_new_collection(run):
    done = run("train.epochs=2", kept=[2, 3, 1])
    assert only(done.events, "collect", "push") == ["collect", "push"] * 3
    assert done.weight_updater.policies == [done.policy_training] * 3


def test_a_push_is_logged_at_its_gradient_step(run):
    assert run(kept=[2, 3]).metrics.logged == [
        ({"weights/policy_version": 1.0}, 2),
        ({"weights/policy_version": 2.0}, 5),
    ]


def test_weight_update_frequency_counts_gradient_steps_and_waits_for_the_optimizer(run):
    done = run("train.weight_update_frequency=3", "train.gradient_accumulation_steps=2", kept=[8, 8])
    pushed_after = [event for event, then in zip(done.events, done.events[2:], strict=False) if then == "push"]
    # Due at 3, 6, 9, 12 and 15; optimizer steps are at the even ones.
    assert pushed_after == ["step 4", "step 6", "step 10", "step 12", "step 16"]
    assert all(done.events[index - 1] == "optimizer step" for index, event in enumerate(done.events) if event == "push")


def test_two_pushes_that_fall_due_before_one_optimizer_step_are_one(run):
    done = run("train.weight_update_frequency=1", "train.gradient_accumulation_steps=4", kept=[8])
    assert only(done.events, "push", "optimizer") == ["optimizer step", "push"] * 2


def test_with_a_frequency_no_push_comes_merely_because_a_batch_ends(run):
    done = run("train.weight_update_frequency=5", kept=[3, 3])
    assert only(done.events, "collect", "step", "push") == [
        *("collect", "step 1", "step 2", "step 3"),
        *("collect", "step 4", "step 5", "push", "step 6"),
        "push",  # the last: the engine is evaluated, and saved, with the weights of the last step
    ]


def test_no_last_push_when_the_engine_has_the_last_weights(run):
    done = run("train.weight_update_frequency=2", kept=[4])
    assert only(done.events, "step", "push") == ["step 1", "step 2", "push", "step 3", "step 4", "push"]


def test_a_flushed_step_can_be_the_one_to_push(run):
    done = run("train.weight_update_frequency=3", "train.gradient_accumulation_steps=2", kept=[3, 1])
    assert only(done.events, "collect", "step", "push") == [
        *("collect", "step 1", "step 2", "step 3", "push"),
        *("collect", "step 4", "push"),
    ]


# --- steps that were skipped as bad ---


def test_a_skipped_optimizer_step_leaves_push_and_checkpoint_to_the_next(run):
    done = run(
        *("train.weight_update_frequency=2", "train.checkpoint_frequency=2", "train.gradient_accumulation_steps=2"),
        kept=[6],
        bad_at=[2],
    )
    assert only(done.events, "step", "push", "checkpoint") == [
        *("step 1", "step 2", "step 3", "step 4", "push", "checkpoint at 4"),
        *("step 5", "step 6", "push", "checkpoint at 6"),
    ]


# --- checkpoints ---


def test_checkpoints_come_every_so_many_gradient_steps_at_the_next_optimizer_step(run):
    done = run("train.checkpoint_frequency=3", "train.gradient_accumulation_steps=2", kept=[5, 5])
    # Optimizer steps at 2, 4, 5, 7, 9, 10; due at 3, 6 and 9.
    assert only(done.events, "checkpoint") == ["checkpoint at 4", "checkpoint at 7", "checkpoint at 9"]


def test_no_checkpoints_on_the_way_when_none_are_wanted(run):
    assert only(run("train.checkpoint_frequency=0", kept=[5]).events, "checkpoint") == []


# --- evaluations ---


def evaluations(done):
    return only(done.events, "push", "evaluate")


def test_evaluation_comes_before_and_after_and_every_so_many_pushes(run):
    assert evaluations(run("eval.frequency=2", kept=[1] * 5)) == [
        "evaluate at 0",
        *("push", "push", "evaluate at 2"),
        *("push", "push", "evaluate at 4"),
        *("push", "evaluate at 5"),
    ]


def test_the_last_weights_are_evaluated_once(run):
    assert evaluations(run("eval.frequency=2", kept=[1] * 2)) == ["evaluate at 0", "push", "push", "evaluate at 2"]
    done = run("eval.frequency=2", "train.weight_update_frequency=2", kept=[3])
    assert evaluations(done) == ["evaluate at 0", "push", "push", "evaluate at 3"]


@pytest.mark.parametrize("frequency", [0, 1, 4])
def test_weights_that_never_changed_are_evaluated_once(run, frequency):
    assert evaluations(run(f"eval.frequency={frequency}", kept=[0, 0])) == ["evaluate at 0"]


def test_an_evaluation_on_the_way_comes_with_samples_of_the_batch_trained_on(run):
    done = run("eval.frequency=2", kept=[1, 2, 1, 1])
    assert done.metrics.shown == [(["sample of batch 2"], 3, "train"), (["sample of batch 4"], 5, "train")]


# --- the buffer ---


def test_the_buffer_is_emptied_after_its_batch_was_trained_on(run):
    done = run("train.empty_replay_buffer=true", kept=[2, 3])
    assert only(done.events, "empty", "collect") == ["collect", "empty"] * 2
    assert done.learner.gradient_steps == 5
    assert done.replay_buffer.write_count == 5  # all rows ever written


def test_an_expert_set_that_accumulates_is_trained_on_again_and_never_emptied(run):
    done = run("train.accumulate_expert_set=true", kept=[2, 0, 3])
    assert only(done.events, "empty", "plan", "restart") == ["plan 2 until 0.333333", "plan 5 until 1"]


def test_from_the_base_every_batch_that_kept_something_begins_anew_on_all_that_was_kept(run):
    done = run("train.restart_from=base", "train.epochs=2", kept=[2, 0, 3])
    assert only(done.events, "collect", "restart", "plan", "empty", "push") == [
        *("collect", "restart 4 until 0.333333", "push"),
        "collect",
        *("collect", "restart 10 until 1", "push"),
    ]
    newest_only = run("train.restart_from=base", "train.accumulate_expert_set=false", kept=[2, 3])
    assert only(newest_only.events, "restart", "plan", "empty") == [
        *("restart 2 until 0.5", "empty"),
        *("restart 3 until 1", "empty"),
    ]


def test_a_buffer_that_is_not_emptied_is_trained_on_again(run):
    done = run("train.empty_replay_buffer=false", "train.buffer_size=100", kept=[2, 0, 3])
    assert only(done.events, "empty", "plan") == ["plan 2 until 0.333333", "plan 5 until 1"]
    assert done.learner.gradient_steps == 2 + 5
