"""`expert-iteration-async.py` and its pace: what happens in which order, told as a list of events by small fakes."""

import pytest
import torch
from script_fakes import QUIET, drive, only
from tensordict import TensorDict

from expert_iteration.actors import CollectedBatch

TURNS = 8


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("expert-iteration-async")


class FakeCollector:
    """Its batches arrive one by one, each when the trainer waits or, if it is `early`, looks a first time.

    Like the real one it collects no further than it was allowed to: one batch ahead of what is worked off.
    """

    def __init__(self, events, buffer, kept, early):
        self.events, self.buffer, self.kept, self.early = events, buffer, kept, set(early)
        self.number, self.ready, self.latest, self.worked_off, self.allowed, self.why = 0, 0, None, [], 0, []

    finished = property(lambda self: self.number == len(self.kept))

    def start(self):
        self.events.append("start")
        self.allowed = 1

    def go_on(self, worked_off):
        self.worked_off.append(worked_off)
        self.allowed = worked_off + 1

    def arrived(self):
        if self.number + 1 in self.early:
            self.ready = max(self.ready, self.number + 1)
        batches = []
        while self.number < self.ready:
            self.number += 1
            rows = self.kept[self.number - 1]
            self.events.append(f"batch {self.number}")
            self.buffer.rows += [self.number] * rows
            self.latest = CollectedBatch(
                self.number * TURNS, len(self.kept) * TURNS, rows, [f"sample of batch {self.number}"]
            )
            batches.append(self.latest)
        return batches

    def wait(self, since, why=None):
        assert self.number < self.allowed, "nothing is on its way"
        self.events.append("wait")
        self.why.append(why)
        self.ready += 1

    def say(self, text):
        self.events.append(f"say {text}")


class FakeBuffer:
    """Rows are the numbers of their batches; each sample is the newest, unless that is among those too old."""

    def __init__(self, events, batch_size, old):
        self.events, self.batch_size, self.rows, self.old = events, batch_size, [], old

    def __len__(self):
        return sum(row not in self.old for row in self.rows)

    def sample(self):
        rows = [row for row in self.rows if row not in self.old][-1:] * self.batch_size
        return TensorDict(policy_version=torch.tensor(rows), batch_size=[len(rows)]) if rows else None

    def statistics(self):
        return {"buffer/write_count": float(len(self.rows))}


@pytest.fixture
def run(script, make_cfg):
    """A function that runs `train` on fakes and returns them; `kept` are the responses that each batch keeps."""

    def run(*overrides, kept, early=(), old=(), bad_at=()):
        frequency = (
            () if any("weight_update" in override for override in overrides) else ("train.weight_update_frequency=100",)
        )
        cfg = make_cfg(*QUIET, *frequency, *overrides, mode="async")
        events = []
        buffer = FakeBuffer(events, cfg.train.optim_batch_size, old)
        return drive(script, cfg, events, FakeCollector(events, buffer, kept, early), buffer, bad_at)

    return run


# --- the loop ---


def test_the_whole_order_of_a_run(run):
    done = run("train.epochs=2", "train.gradient_accumulation_steps=2", "train.weight_update_frequency=3", kept=[2, 1])
    assert done.events == [
        *("evaluate at 0", "start", "wait"),
        *("batch 1", "plan 2 until 0.5"),
        *("step 1", "step 2", "optimizer step", "step 3", "step 4", "optimizer step", "push"),
        *("wait", "batch 2", "plan 1 until 1"),
        *("step 5", "step 6", "optimizer step", "push"),
        "evaluate at 6",
    ]


def test_a_batch_that_arrives_while_training_is_taken_note_of_between_two_steps(run):
    done = run(kept=[3, 2], early=[1, 2])
    assert only(done.events, "wait", "batch", "plan", "step") == [
        *("batch 1", "plan 3 until 0.5", "step 1"),
        *("batch 2", "plan 4 until 1", "step 2", "step 3", "step 4", "step 5"),
    ]
    assert done.metrics.drained == [0, 1]


def test_every_kept_response_is_drawn_epochs_times_on_average(run):
    done = run("train.epochs=3", "train.optim_batch_size=2", kept=[3, 0, 4])
    # 3 x 3 / 2 = 4.5 and 3 x 7 / 2 = 10.5: whole steps on the way, and the rest is made at the end.
    assert only(done.events, "batch", "step")[:5] == ["batch 1", "step 1", "step 2", "step 3", "step 4"]
    assert done.learner.gradient_steps == 11


def test_a_given_number_of_optimizer_steps_is_shared_out_over_what_is_collected(run):
    done = run("train.total_optimizer_steps=5", "train.gradient_accumulation_steps=2", kept=[1, 9, 1, 0])
    assert only(done.events, "batch", "optimizer") == [
        *("batch 1", "optimizer step"),
        *("batch 2", "optimizer step"),
        *("batch 3", "optimizer step"),
        *("batch 4", "optimizer step", "optimizer step"),
    ]
    assert done.learner.gradient_steps == 10


def test_a_partial_accumulation_is_stepped_and_pushed_at_the_end(run):
    done = run("train.gradient_accumulation_steps=4", kept=[3, 3])
    assert only(done.events, "batch", "step", "optimizer", "push", "plan") == [
        *("batch 1", "plan 1 until 0.5", "step 1", "step 2", "step 3"),
        *("batch 2", "plan 2 until 1", "step 4", "optimizer step", "step 5", "step 6", "optimizer step", "push"),
    ]


def test_nothing_is_trained_where_nothing_was_kept(run):
    done = run(kept=[0, 0])
    assert done.events == [
        *("evaluate at 0", "start", "wait", "batch 1", "plan 0 until 0.5", "wait", "batch 2", "plan 0 until 1"),
    ]


def test_steps_that_are_owed_to_nothing_are_said_not_to_be_made(run):
    done = run("train.total_optimizer_steps=3", kept=[0, 0])
    assert done.learner.gradient_steps == 0
    assert done.events[-1] == "say note: 3 gradient steps were not made: no response was kept"


# --- pushes and checkpoints ---


def test_a_push_comes_every_so_many_gradient_steps_after_an_optimizer_step(run):
    done = run("train.weight_update_frequency=3", "train.gradient_accumulation_steps=2", kept=[8])
    assert only(done.events, "step", "push") == [
        *("step 1", "step 2", "step 3", "step 4", "push"),
        *("step 5", "step 6", "push", "step 7", "step 8", "push"),
    ]
    assert done.weight_updater.policies == [done.policy_training] * 3


def test_a_push_is_logged_at_its_gradient_step(run):
    done = run("train.weight_update_frequency=2", kept=[3])
    assert done.metrics.logged == [({"weights/policy_version": 1.0}, 2), ({"weights/policy_version": 2.0}, 3)]


def test_a_skipped_optimizer_step_leaves_push_and_checkpoint_to_the_next(run):
    done = run("train.weight_update_frequency=2", "train.checkpoint_frequency=2", kept=[4], bad_at=[2])
    assert only(done.events, "step", "push", "checkpoint") == [
        *("step 1", "step 2", "step 3", "push", "checkpoint at 3"),
        *("step 4", "push", "checkpoint at 4"),
    ]


def test_evaluations_come_every_so_many_pushes_with_samples_of_the_newest_batch(run):
    done = run("train.weight_update_frequency=1", "eval.frequency=2", kept=[3, 2])
    assert only(done.events, "evaluate", "push") == [
        *("evaluate at 0", "push", "push", "evaluate at 2"),
        *("push", "push", "evaluate at 4", "push", "evaluate at 5"),
    ]
    assert done.metrics.shown == [(["sample of batch 1"], 2, "train"), (["sample of batch 2"], 4, "train")]


def test_every_gradient_step_is_logged_with_the_age_of_what_it_saw(run):
    done = run("train.weight_update_frequency=1", kept=[2, 1])
    assert [step for step, _ in done.metrics.trained] == [1, 2, 3]
    # Rows of batch n carry version n here; before step s there were s - 1 pushes.
    assert [extra["policy_age"] for _, extra in done.metrics.trained] == [-1.0, 0.0, 0.0]


# --- how far ahead, and what is too old ---


def test_the_collector_hears_which_batches_are_worked_off(run):
    done = run("train.epochs=2", kept=[1, 0, 2], early=[1, 2])
    # Batch 2 kept nothing and owes nothing: it is worked off with batch 1.
    assert done.collector.worked_off == [0, 0, 2, 2, 2, 2, 2, 3]


def test_nothing_young_enough_costs_no_step_and_is_waited_out(run):
    done = run("train.max_policy_age=1", kept=[3, 2], early=[1], old=[1])
    assert only(done.events, "batch", "step", "wait", "say") == [
        "batch 1",
        "say note: no response in the buffer is at most 1 pushes old (train.max_policy_age); waiting for new ones",
        *("wait", "batch 2", "step 1", "step 2", "step 3", "step 4", "step 5"),
    ]
    # While it starves nothing more can be worked off, and collection must go on whatever its limit.
    assert done.collector.worked_off[:2] == [1, 0]
    assert done.collector.why[0].startswith("no response in the buffer is at most 1 pushes old")


@pytest.mark.parametrize("kept", [[4, 0, 4], [4, 3, 4], [0, 0, 4], [0, 3, 0], [0, 0, 0]])
def test_a_batch_that_owes_no_whole_step_does_not_stop_collection(run, kept):
    # The fake collects one batch ahead of what is worked off, and refuses to be waited for beyond.
    done = run("train.optim_batch_size=4", kept=kept)
    assert done.learner.gradient_steps == -(-sum(kept) // 4)
    assert done.collector.finished


def test_a_wait_says_how_many_batches_kept_nothing(run):
    why = run(kept=[0, 0, 2, 0]).collector.why
    assert (why[0], why[1][:30], why[2][:30]) == (
        None,
        "1 batches came meanwhile and n",
        "2 batches came meanwhile and n",
    )
    assert why[3] is None  # there is something in the buffer; it is only the next batch that is waited for


def test_steps_for_which_everything_is_too_old_are_left_out_at_the_end(run):
    done = run("train.max_policy_age=1", kept=[3, 2], old=[1, 2])
    assert done.learner.gradient_steps == 0
    assert done.events[-1] == (
        "say note: 5 gradient steps were not made: no response in the buffer is at most 1 pushes old "
        "(train.max_policy_age)"
    )
