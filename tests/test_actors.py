"""`expert_iteration.actors`: how batches come to the trainer, one after the other, overlapping, and in the background.

Ray imports this file in the actor's process, so it loads nothing heavy.
"""

import dataclasses
import threading
import time

import pytest
import ray

from expert_iteration import remote
from expert_iteration.actors import BackgroundCollector, CollectedBatch, CollectorActor, CollectorClient
from expert_iteration.pacing import paced_batches
from expert_iteration.position import Position
from expert_iteration.remote import ProcessDiedError, Waiting, get_from
from expert_iteration.sizes import batches_ahead
from expert_iteration.turns import Turns


class Batch(str):
    """A batch that kept something."""

    responses_kept = 1
    notes = ()


class Stage:
    """Plays the collector's actor, and notes what the trainer does in between."""

    def __init__(self, fails_at=None, seconds=0.0):
        self.events, self.rows, self.fails_at, self.seconds = [], [], fails_at, seconds
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
        if self.seconds:
            self.note(f"begin {self.collected}")
            time.sleep(self.seconds)
        if self.collected == self.fails_at:
            raise ZeroDivisionError("the reward divides by zero")
        self.note(f"collect {self.collected}")

    def write(self, replay_buffer):
        self.written += 1
        self.rows = [replay_buffer, self.written]
        self.note(f"write {self.written}")
        return Batch(f"batch {self.written}")

    def collect_and_write(self, replay_buffer):
        self.collect()
        return self.write(replay_buffer)

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


@pytest.fixture
def waiting():
    """Waits for a minute, which is for a machine that is very busy, and says nothing of it."""
    return Waiting(60, lambda text: None, lambda: "the engine is idle")


def test_without_overlap_a_batch_is_collected_when_it_is_asked_for(make_stage, waiting):
    stage = make_stage()
    for batch in CollectorClient(stage, "buffer", num_batches=3, overlap=False, waiting=waiting, turns=Turns()):
        assert ray.get(stage.work.remote(f"train on {batch}")) == ["buffer", int(batch[-1])]
    assert ray.get(stage.program.remote()) == [
        *("collect 1", "write 1", "train on batch 1"),
        *("collect 2", "write 2", "train on batch 2"),
        *("collect 3", "write 3", "train on batch 3"),
    ]
    assert ray.get(stage.count.remote()) == 3


def test_with_overlap_the_next_batch_is_collected_while_the_trainer_works_on_this_one(make_stage, waiting):
    stage = make_stage()
    for number, batch in enumerate(
        CollectorClient(stage, "buffer", num_batches=3, overlap=True, waiting=waiting, turns=Turns()), start=1
    ):
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
def test_an_error_while_collecting_surfaces_as_itself(make_stage, waiting, overlap):
    stage = make_stage(fails_at=2)
    batches = iter(CollectorClient(stage, "buffer", num_batches=3, overlap=overlap, waiting=waiting, turns=Turns()))
    assert next(batches) == "batch 1"
    with pytest.raises(ZeroDivisionError, match="the reward divides by zero"):
        next(batches)
    assert ray.get(stage.program.remote()) == ["collect 1", "write 1"]


# --- in the background ---


def finish(collector, worked_off=10):
    """The batches that are still to come, in the order in which they arrive."""
    batches = collector.arrived()
    while not collector.finished:
        collector.go_on(worked_off)
        collector.wait(since=time.monotonic())
        batches += collector.arrived()
    return batches


def test_in_the_background_batch_after_batch_is_collected_while_the_trainer_works(make_stage, waiting):
    stage = make_stage()
    collector = BackgroundCollector(stage, "buffer", 4, batches_ahead=None, waiting=waiting)
    collector.start()
    # The trainer has not looked once, and the second batch is written already.
    assert ray.get(stage.wait_for.remote("write 2"))
    assert finish(collector) == ["batch 1", "batch 2", "batch 3", "batch 4"]
    assert collector.latest == "batch 4"
    assert ray.get(stage.count.remote()) == 4


def test_a_slow_engine_and_a_slow_trainer_overlap(make_stage, waiting):
    stage, batches = make_stage(seconds=0.2), 4
    collector = BackgroundCollector(stage, "buffer", batches, batches_ahead=None, waiting=waiting)
    collector.start()
    while not collector.finished:
        collector.go_on(worked_off=0)
        collector.wait(since=time.monotonic())
        for batch in collector.arrived():
            time.sleep(0.2)
            ray.get(stage.work.remote(f"trained on {batch}"))
    events = ray.get(stage.program.remote())
    assert all(
        events.index(f"begin {number + 1}") < events.index(f"trained on batch {number}") for number in range(1, batches)
    )


def test_looking_for_batches_does_not_wait_for_one(make_stage, waiting):
    stage = make_stage(seconds=0.5)
    collector = BackgroundCollector(stage, "buffer", 1, batches_ahead=None, waiting=waiting)
    collector.start()
    assert collector.arrived() == []
    assert not collector.finished
    assert finish(collector) == ["batch 1"]


def test_collection_stays_within_its_limit_until_batches_are_worked_off(make_stage, waiting):
    stage = make_stage()
    collector = BackgroundCollector(stage, "buffer", 4, batches_ahead=1, waiting=waiting)
    collector.start()
    for worked_off in range(4):
        collector.wait(since=time.monotonic())
        assert collector.arrived() == [f"batch {worked_off + 1}"]
        collector.go_on(worked_off)
        assert ray.get(stage.count.remote()) == worked_off + 1
        collector.go_on(worked_off + 1)
    assert collector.finished


# --- going on where an earlier run stood ---


def as_batch(number, **changes):
    return CollectedBatch(number * 8, 32, 2, [f"sample {number}"], **changes)


class NumberedStage:
    """A collector whose batches are `as_batch`, from the one after those that an earlier run has written."""

    def __init__(self, written):
        self.number, self.events = written, []

    def collect(self):
        self.number += 1
        self.events.append(f"collect {self.number}")

    def write(self, replay_buffer):
        self.events.append(f"write {self.number}")
        return as_batch(self.number)

    def collect_and_write(self, replay_buffer):
        self.collect()
        return self.write(replay_buffer)

    def program(self):
        return self.events


class TellingStage(NumberedStage):
    """One whose second batch has something to tell."""

    def write(self, replay_buffer):
        return as_batch(self.number, notes=["a reward failed"] if self.number == 2 else [])


@pytest.mark.parametrize("is_async", [False, True])
def test_what_a_batch_has_to_tell_is_shown_once(ray_session, is_async):
    stage, said = ray.remote(num_cpus=0)(TellingStage).remote(0), []
    waiting = Waiting(60, said.append, lambda: "the engine is idle")
    if is_async:
        collector = BackgroundCollector(stage, "buffer", 3, batches_ahead=None, waiting=waiting)
        collector.start()
        assert len(finish(collector)) == 3
    else:
        assert len(list(CollectorClient(stage, "buffer", 3, overlap=False, waiting=waiting, turns=Turns()))) == 3
    assert said == ["a reward failed"]


@pytest.fixture
def stage_after(ray_session):
    """A function that starts a `NumberedStage`."""
    return lambda written: ray.remote(num_cpus=0)(NumberedStage).remote(written)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_batch_that_was_trained_on_comes_first_again_and_is_not_collected_again(stage_after, waiting, overlap):
    def client(written):
        stage = stage_after(written)
        return stage, CollectorClient(stage, "buffer", 4, overlap=overlap, waiting=waiting, turns=Turns())

    _, first = client(written=0)
    batches = iter(first)
    assert [next(batches), next(batches)] == [as_batch(1), as_batch(2)]
    state = first.state_dict()  # in the middle of the second
    stage, second = client(written=2)
    second.load_state_dict(state, writer_state=None)
    batches = iter(second)
    assert next(batches) == as_batch(2, is_resumed=True)
    # With overlap the third is on its way while the second is trained on; without it nobody has asked for it.
    time.sleep(0.5)
    assert ray.get(stage.program.remote()) == (["collect 3"] if overlap else [])
    assert list(batches) == [as_batch(3), as_batch(4)]


def test_between_two_batches_there_is_none_to_come_again(stage_after, waiting):
    def client(written):
        return CollectorClient(stage_after(written), "buffer", 2, overlap=False, waiting=waiting, turns=Turns())

    first, states = client(written=0), []
    waiting.check = lambda: states.append(first.state_dict())  # where a signal is heard
    assert len(list(first)) == 2
    waiting.check = None
    assert [(state["num_written"], state["current"]) for state in (states[0], states[-1])] == [(0, None), (1, None)]
    second = client(written=1)
    second.load_state_dict(states[-1], writer_state=None)
    assert list(second) == [as_batch(2)]


def test_batches_that_the_trainer_had_not_heard_of_arrive_first(stage_after, waiting):
    def client(written):
        return BackgroundCollector(stage_after(written), "buffer", 5, batches_ahead=None, waiting=waiting)

    first = client(written=0)
    first.start()
    first.wait(since=time.monotonic())
    assert first.arrived()[:1] == [as_batch(1)]
    state = first.state_dict()
    num_seen = state["num_seen"]
    assert state["latest"]["dialog_turns"] == 8 * num_seen
    # The buffer that is saved with it holds one more than the trainer knows of.
    written = num_seen + 1
    last_written = [dataclasses.asdict(as_batch(number)) for number in (num_seen, written)]
    second = client(written)
    second.load_state_dict(state, {"num_written": written, "last_written": last_written})
    assert second.latest == as_batch(num_seen)
    assert not second.finished
    second.start()
    assert finish(second) == [as_batch(number) for number in range(written, 6)]


def test_an_error_in_the_background_surfaces_when_the_trainer_looks(make_stage, waiting):
    collector = BackgroundCollector(make_stage(fails_at=2), "buffer", 3, batches_ahead=None, waiting=waiting)
    collector.start()
    with pytest.raises(ZeroDivisionError, match="the reward divides by zero"):
        finish(collector)


class Batches:
    """A collector that keeps so many responses, batch after batch."""

    def __init__(self, kept):
        self.kept, self.number = kept, 0

    def collect_and_write(self, replay_buffer):
        self.number += 1
        return CollectedBatch(self.number, len(self.kept), self.kept[self.number - 1], [])


class Counts:
    """Buffer, learner and metrics in one: has a micro-batch wherever it is asked for one, and counts steps."""

    gradient_steps = 0

    def __len__(self):
        return 1

    def sample(self):
        return "micro-batch"

    def plan(self, num_optimizer_steps, until):
        assert num_optimizer_steps >= 0

    def drain(self, step):
        pass


@pytest.mark.parametrize(
    ("overrides", "kept", "steps"),
    [
        (("train.deterministic=true",), [64, 0, 64], 16),
        (("train.deterministic=true",), [64, 3, 64], 17),
        (("train.deterministic=true", "train.total_optimizer_steps=2"), [64, 64, 64], 2),
        (("train.max_ahead=32",), [64, 0, 64], 16),
        (("train.max_ahead=64",), [0, 0, 64], 8),
        ((), [64, 0, 64], 16),
    ],
)
def test_a_limit_never_leaves_the_trainer_waiting_for_nothing(ray_session, make_cfg, waiting, overrides, kept, steps):
    cfg = make_cfg(f"train.total_dialog_turns={256 * len(kept)}", *overrides, mode="async")
    actor = ray.remote(num_cpus=0)(Batches).remote(kept)
    ahead = batches_ahead(cfg)
    collector = BackgroundCollector(actor, "buffer", len(kept), batches_ahead=ahead, waiting=waiting)
    collector.start()
    counts = Counts()
    for _ in paced_batches(cfg, Position(), collector, counts, counts, counts):
        counts.gradient_steps += 1
    assert counts.gradient_steps == steps
    assert collector.finished
    ray.kill(actor)


# --- waiting ---


def test_a_wait_is_said_and_ends_with_what_the_engine_does_meanwhile(make_stage, monkeypatch):
    monkeypatch.setattr(remote, "SAY_EVERY", 0.2)
    said, start = [], time.monotonic()
    waiting = Waiting(0.7, said.append, lambda: "the engine has been generating for 3 s")
    collector = BackgroundCollector(make_stage(seconds=60), "buffer", 1, batches_ahead=None, waiting=waiting)
    collector.start()
    with pytest.raises(TimeoutError) as error:
        collector.wait(since=start)
    assert "train.collection_timeout=0.7" in str(error.value)
    assert "the engine has been generating for 3 s" in str(error.value)
    assert len(said) >= 2
    assert all(line.startswith("still waiting for responses after 0 s: the engine has") for line in said[:2])


def test_what_is_there_already_is_not_waited_for_however_late_it_is(make_stage):
    stage = make_stage()
    waiting = Waiting(0.1, print, lambda: "")
    collector = BackgroundCollector(stage, "buffer", 1, batches_ahead=None, waiting=waiting)
    collector.start()
    assert ray.get(stage.wait_for.remote("write 1"))
    collector.wait(since=time.monotonic() + 5)
    collector.wait(since=time.monotonic() - 5)
    assert collector.arrived() == ["batch 1"]


def test_batches_of_which_nothing_is_kept_end_the_wait_with_that_reason(make_stage, monkeypatch):
    monkeypatch.setattr(Batch, "responses_kept", 0)
    stage = make_stage(seconds=0.2)
    ray.get(stage.count.remote())  # its process has started
    waiting = Waiting(2.0, print, lambda: "the engine is idle")
    with pytest.raises(TimeoutError, match=r"\d+ batches came meanwhile and none of their responses was kept") as error:
        for _ in CollectorClient(stage, "buffer", 100, overlap=False, waiting=waiting, turns=Turns()):
            pass
    assert "the engine" not in str(error.value)


def test_a_synchronous_trainer_gives_up_waiting_too(make_stage):
    waiting = Waiting(0.3, print, lambda: "the engine is idle")
    with pytest.raises(TimeoutError, match=r"collection_timeout=0\.3\): the engine is idle"):
        next(iter(CollectorClient(make_stage(seconds=60), "buffer", 1, overlap=False, waiting=waiting, turns=Turns())))


@pytest.mark.parametrize("kind", ["synchronous", "background"])
def test_a_collector_that_dies_is_named(make_stage, waiting, kind):
    stage = make_stage(seconds=60)
    if kind == "synchronous":
        batches = iter(CollectorClient(stage, "buffer", 1, overlap=False, waiting=waiting, turns=Turns()))
        threading.Timer(0.5, ray.kill, [stage]).start()
        with pytest.raises(ProcessDiedError, match=r"The collector's process has died \(logs/collector\.log\)"):
            next(batches)
    else:
        collector = BackgroundCollector(stage, "buffer", 1, batches_ahead=None, waiting=waiting)
        collector.start()
        ray.kill(stage)
        collector.wait(since=time.monotonic())
        with pytest.raises(ProcessDiedError, match=r"The collector's process has died \(logs/collector\.log\)"):
            collector.arrived()


class Asker:
    """A process that asks another, as the collector asks the engine."""

    def ask(self, stage):
        return get_from("engine", stage.count.remote())


def test_a_dead_process_is_named_by_whoever_asked_it_also_from_far(make_stage):
    stage = make_stage()
    ray.kill(stage)
    asker = ray.remote(num_cpus=0)(Asker).remote()
    with pytest.raises(ProcessDiedError, match=r"The engine's process has died \(logs/engine\.log\)"):
        get_from("collector", asker.ask.remote(stage))
    ray.kill(asker)


# --- the actor ---


class FakeCollector:
    def __init__(self):
        self.calls = []

    def collect(self):
        self.calls.append("collect")

    def write(self, replay_buffer):
        print("written to", replay_buffer)
        return [*self.calls, f"write to {replay_buffer}"]

    def close(self):
        pass


def test_the_actor_builds_its_collector_in_its_own_process_and_logs_its_output(ray_session, tmp_path):
    log = tmp_path / "logs" / "collector.log"
    actor = ray.remote(num_cpus=0)(CollectorActor).remote(FakeCollector, str(log))
    ray.get(actor.collect.remote())
    assert ray.get(actor.write.remote("buffer")) == ["collect", "write to buffer"]
    assert ray.get(actor.collect_and_write.remote("buffer")) == ["collect", "collect", "write to buffer"]
    ray.kill(actor)
    assert "written to buffer\n" in log.read_text()


def test_a_batch_says_how_far_the_run_is():
    assert CollectedBatch(dialog_turns=32, total_dialog_turns=128, responses_kept=0, samples=[]).progress == 0.25
