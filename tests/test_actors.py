"""`expert_iteration.actors`: how batches come to the trainer with `train.sync_iter` true and false.

Ray imports this file in the actor's process, so it loads nothing heavy.
"""

import threading

import pytest
import ray

from expert_iteration.actors import CollectedBatch, CollectorActor, CollectorClient


class Stage:
    """Plays the collector's actor, and notes what the trainer does in between."""

    def __init__(self, fails_at=None):
        self.events, self.rows, self.fails_at = [], [], fails_at
        self.collected = self.written = 0
        self.news = threading.Condition()

    def note(self, event):
        with self.news:
            self.events.append(event)
            self.news.notify_all()

    def count(self):
        """How many collections were begun; answered after all that was asked for before."""
        return self.collected

    def collect(self):
        self.collected += 1
        if self.collected == self.fails_at:
            raise ZeroDivisionError("the reward divides by zero")
        self.note(f"collect {self.collected}")

    def write(self, replay_buffer):
        self.written += 1
        self.rows = [replay_buffer, self.written]
        self.note(f"write {self.written}")
        return f"batch {self.written}"

    @ray.method(concurrency_group="audience")
    def wait_for(self, event):
        """Whether the event comes; a minute is for a machine that is very busy."""
        with self.news:
            return self.news.wait_for(lambda: event in self.events, timeout=60)

    @ray.method(concurrency_group="audience")
    def work(self, event):
        self.note(event)
        return list(self.rows)

    @ray.method(concurrency_group="audience")
    def program(self):
        return self.events


@pytest.fixture
def make_stage(ray_session):
    stages = []

    def make(**options):
        stages.append(ray.remote(num_cpus=0, concurrency_groups={"audience": 1})(Stage).remote(**options))
        return stages[-1]

    yield make
    for stage in stages:
        ray.kill(stage)


def test_without_overlap_a_batch_is_collected_when_it_is_asked_for(make_stage):
    stage = make_stage()
    for batch in CollectorClient(stage, "buffer", num_batches=3, overlap=False):
        assert ray.get(stage.work.remote(f"train on {batch}")) == ["buffer", int(batch[-1])]
    assert ray.get(stage.program.remote()) == [
        *("collect 1", "write 1", "train on batch 1"),
        *("collect 2", "write 2", "train on batch 2"),
        *("collect 3", "write 3", "train on batch 3"),
    ]
    assert ray.get(stage.count.remote()) == 3


def test_with_overlap_the_next_batch_is_collected_while_the_trainer_works_on_this_one(make_stage):
    stage = make_stage()
    for number, batch in enumerate(CollectorClient(stage, "buffer", num_batches=3, overlap=True), start=1):
        # The trainer is still at this batch when the next is complete; what it trains on is nevertheless this one's.
        assert number == 3 or ray.get(stage.wait_for.remote(f"collect {number + 1}"))
        assert ray.get(stage.work.remote(f"train on {batch}")) == ["buffer", number]
    assert ray.get(stage.program.remote()) == [
        *("collect 1", "write 1", "collect 2", "train on batch 1"),
        *("write 2", "collect 3", "train on batch 2"),
        *("write 3", "train on batch 3"),
    ]
    assert ray.get(stage.count.remote()) == 3


@pytest.mark.parametrize("overlap", [False, True])
def test_an_error_while_collecting_surfaces_as_itself(make_stage, overlap):
    stage = make_stage(fails_at=2)
    batches = iter(CollectorClient(stage, "buffer", num_batches=3, overlap=overlap))
    assert next(batches) == "batch 1"
    with pytest.raises(ZeroDivisionError, match="the reward divides by zero"):
        next(batches)
    assert ray.get(stage.program.remote()) == ["collect 1", "write 1"]


# --- the actor ---


class FakeCollector:
    def __init__(self):
        self.calls = []

    def collect(self):
        self.calls.append("collect")

    def write(self, replay_buffer):
        print("written to", replay_buffer)
        return [*self.calls, f"write to {replay_buffer}"]


def test_the_actor_builds_its_collector_in_its_own_process_and_logs_its_output(ray_session, tmp_path):
    log = tmp_path / "logs" / "collector.log"
    actor = ray.remote(num_cpus=0)(CollectorActor).remote(FakeCollector, str(log))
    ray.get(actor.collect.remote())
    assert ray.get(actor.write.remote("buffer")) == ["collect", "write to buffer"]
    ray.kill(actor)
    assert "written to buffer\n" in log.read_text()


def test_a_batch_says_how_far_the_run_is():
    assert CollectedBatch(dialog_turns=32, total_dialog_turns=128, responses_kept=0, samples=[]).progress == 0.25
