"""The timeline of a run: what processes record, what the report makes of it, and what its pictures show."""

import json
import random
import re
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from expert_iteration import timeline
from expert_iteration.timeline import ACTIVITIES, COLLECTOR, ENGINE, TRAINER
from expert_iteration.timeline_chart import COLORS, Section, choose_excerpt, draw_excerpt, draw_timeline, list_shares
from expert_iteration.timeline_report import Span, build_timeline, describe_limit, make_disjoint, percent

ROOT = Path(__file__).resolve().parent.parent
START = 1_700_000_000.0  # seconds since the epoch: times of this size have few digits left behind the point
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def recorded(tmp_path):
    """Records this process's spans meanwhile; called, it gives the lines that are written so far."""
    path = tmp_path / "run" / "timeline" / "engine.jsonl"
    timeline.record_to(path)
    yield lambda: [json.loads(line) for line in path.read_text().splitlines()]
    timeline.record_to(None)


def build(**processes):
    """A timeline of spans given as (activity, start, end) in seconds, by process."""
    return build_timeline(
        {
            process: [
                {"activity": activity, "start": START + start, "end": START + end} for activity, start, end in spans
            ]
            for process, spans in processes.items()
        }
    )


def take_turns(num_batches, collecting=6.0, training=3.0, pushing=1.0):
    """Synchronous: what the engine generates in the whole of `collecting` is waited for, then trained on and pushed."""
    engine, collector, trainer = [], [], []
    for batch in range(num_batches):
        start = batch * (collecting + training + pushing)
        trained, pushed = start + collecting + training, start + collecting + training + pushing
        engine += [("generating", start, start + collecting), ("loading weights", trained, pushed)]
        collector += [("collecting", start, start + collecting)]
        trainer += [
            ("waiting for data", start, start + collecting),
            ("training", start + collecting, trained),
            ("pushing weights", trained, pushed),
        ]
    return build(engine=engine, collector=collector, trainer=trainer)


def find_shapes(svg, gid):
    """The corners [N, 2] of each of an activity's shapes, in the picture's own units."""
    (group,) = [element for element in ET.fromstring(svg).iter(f"{SVG}g") if element.get("id") == gid]
    corners = [re.findall(r"[ML] (\S+) (\S+)", path.get("d")) for path in group.iter(f"{SVG}path")]
    return [np.array(shape, dtype=float) for shape in corners]


def find_bars(svg, gid):
    """The left and right ends of an activity's bars."""
    return [(shape[:, 0].min(), shape[:, 0].max()) for shape in find_shapes(svg, gid)]


def height(shape):
    return np.ptp(shape[:, 1])


# What a process records.


def test_a_span_is_a_line_with_its_activity_and_its_times(recorded):
    before = time.time()
    with timeline.span(timeline.GENERATING):
        time.sleep(0.02)
    after = time.time()
    (line,) = recorded()
    assert line["activity"] == "generating"
    assert before - 1e-6 <= line["start"] < line["end"] <= after + 1e-3  # two clocks; times are rounded to 1e-6 s
    assert line["end"] - line["start"] >= 0.02 - 1e-5


def test_a_span_is_written_when_its_body_raises(recorded):
    @timeline.span(timeline.TRAINING)
    def fail():
        time.sleep(0.002)
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert [line["activity"] for line in recorded()] == ["training"]


def test_a_span_of_less_than_a_millisecond_is_not_written(recorded):
    with timeline.span(timeline.WAITING_FOR_DATA):
        pass
    assert recorded() == []


def test_nothing_is_recorded_without_a_file(recorded):
    timeline.record_to(None)
    with timeline.span(timeline.GENERATING):
        time.sleep(0.002)
    assert recorded() == []


def test_a_clock_that_is_set_back_makes_no_span_negative(recorded, monkeypatch):
    times = iter([START, START - 3600.0])
    monkeypatch.setattr(time, "time", lambda: next(times))
    with timeline.span(timeline.GENERATING):
        time.sleep(0.002)
    (line,) = recorded()
    assert line["start"] == START
    assert line["end"] > START


def test_threads_write_whole_lines(recorded):
    def work(activity):
        for _ in range(100):
            with timeline.span(activity):
                time.sleep(0.0015)

    activities = [*ACTIVITIES[ENGINE], *ACTIVITIES[TRAINER]]
    threads = [threading.Thread(target=work, args=(activity,)) for activity in activities]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [line["activity"] for line in recorded()]
    assert {activity: found.count(activity) for activity in activities} == dict.fromkeys(activities, 100)


def test_a_killed_process_leaves_what_it_did_and_its_times_compare_with_those_of_another(recorded, tmp_path):
    path = tmp_path / "run" / "timeline" / "trainer.jsonl"
    code = (
        "import os, sys, time\n"
        "from expert_iteration import timeline\n"
        "timeline.record_to(sys.argv[1])\n"
        "with timeline.span(timeline.TRAINING): time.sleep(0.002)\n"
        "os._exit(len({'torch', 'torchrl', 'ray', 'numpy'} & sys.modules.keys()))\n"
    )
    with timeline.span(timeline.GENERATING):
        done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT)
    assert done.returncode == 0, "the recorder loads what is heavy"
    (inner,), (outer,) = [json.loads(line) for line in path.read_text().splitlines()], recorded()
    assert outer["start"] < inner["start"] < inner["end"] < outer["end"]


def test_activities_name_their_process():
    activities = [activity for names in ACTIVITIES.values() for activity in names]
    assert len(activities) == len(set(activities))


# What the report makes of it.


def test_shares_are_of_the_time_from_the_first_collection_to_the_end_of_the_trainer():
    found = build(
        engine=[("generating", 0, 9), ("generating", 10, 14), ("loading weights", 17, 18), ("generating", 18.5, 40)],
        collector=[("collecting", 10, 14), ("reference", 14, 15), ("collecting", 18, 50)],
        trainer=[("evaluating", 0, 9), ("waiting for data", 10, 15), ("training", 15, 17), ("saving", 18, 20)],
    )
    assert found.seconds == 10
    assert found.shares(ENGINE) == pytest.approx({"generating": 0.55, "loading weights": 0.1, "idle": 0.35})
    assert found.shares(COLLECTOR) == pytest.approx({"collecting": 0.6, "reference": 0.1, "writing": 0, "idle": 0.3})
    assert found.shares(TRAINER) == pytest.approx(
        {
            "training": 0.2,
            "pushing weights": 0,
            "evaluating": 0,
            "saving": 0.2,
            "waiting for data": 0.5,
            "idle": 0.1,
        }
    )


def test_the_overlap_is_when_both_happened():
    found = build(
        engine=[("generating", 0, 3), ("generating", 3, 5), ("generating", 8, 9.5)],
        collector=[("collecting", 0, 10)],
        trainer=[("training", 1, 2), ("training", 4, 8.5), ("training", 9, 10)],
    )
    # 1 to 2, 4 to 5, 8 to 8.5, 9 to 9.5
    assert found.share_of_both("generating", "training") == pytest.approx(0.3)
    assert found.share_of_both("training", "generating") == pytest.approx(0.3)
    assert found.share_of_both("generating", "evaluating") == 0


def test_the_inner_of_two_spans_counts():
    spans = [Span(2, 3, "inner"), Span(1, 5, "outer"), Span(8, 9, "alone"), Span(4, 7, "other thread")]
    assert list(make_disjoint(spans)) == [
        Span(1, 2, "outer"),
        Span(2, 3, "inner"),
        Span(3, 4, "outer"),
        Span(4, 7, "other thread"),
        Span(8, 9, "alone"),
    ]
    together = [Span(1, 3, "inner"), Span(1, 5, "outer")]
    assert list(make_disjoint(together)) == [Span(1, 3, "inner"), Span(3, 5, "outer")]
    found = build(collector=[("collecting", 0, 10), ("reference", 6, 8)], trainer=[("training", 0, 10)])
    assert found.shares(COLLECTOR) == pytest.approx({"collecting": 0.8, "reference": 0.2, "writing": 0, "idle": 0})


def test_without_a_collection_there_is_no_timeline():
    assert build(engine=[], collector=[], trainer=[]) is None
    assert build() is None
    assert build(engine=[("generating", 0, 3)], trainer=[("evaluating", 0, 3)]) is None
    assert build(collector=[("collecting", 3, 4)], trainer=[("evaluating", 0, 3)]) is None
    assert build(collector=[("collecting", 3, 4)]) is None


def test_of_a_run_that_went_on_only_the_time_since_then_counts():
    day = 86_400
    found = build(
        engine=[("generating", 0, 6), ("generating", day + 5, day + 11)],
        collector=[("collecting", 0, 6), ("collecting", day + 5, day + 11)],
        trainer=[
            ("session", -1, -1),
            ("waiting for data", 0, 6),
            ("training", 6, 9),
            ("session", day, day),
            ("waiting for data", day + 5, day + 11),
            ("training", day + 11, day + 15),
        ],
    )
    assert found.seconds == 10
    assert found.shares(TRAINER)["training"] == pytest.approx(0.4)
    assert found.shares(ENGINE) == pytest.approx({"generating": 0.6, "loading weights": 0, "idle": 0.4})
    marked = [{"activity": "session", "start": START - 1, "end": START - 1}]
    assert build_timeline({TRAINER: marked}) is None


def test_an_activity_that_nothing_knows_is_an_error():
    with pytest.raises(KeyError, match="dreaming"):
        build(collector=[("collecting", 0, 1)], trainer=[("dreaming", 0, 1)])


def test_taking_turns_is_told_with_the_remedy_of_the_mode():
    found = take_turns(num_batches=3)
    assert describe_limit(found, sync=True) == (
        "Generation and training take turns: the trainer waited for data 60% of the time, and generation for the "
        "trainer 30% of it (train.sync_iter=false or the asynchronous script would overlap them)."
    )
    assert "(train.deterministic=false or a larger train.max_ahead would" in describe_limit(found, sync=False)


def test_turns_of_which_one_is_short_are_no_turns():
    found = take_turns(num_batches=3, collecting=18.0, training=1.0)
    assert (
        describe_limit(found, sync=True) == "The trainer waited for data 90% of the time: generation limits this run."
    )
    found = take_turns(num_batches=3, collecting=0.5, training=18.5)
    assert (
        describe_limit(found, sync=True)
        == "Generation waited for the trainer 92% of the time: training limits this run."
    )


@pytest.mark.parametrize(
    ("awaited", "limit"),
    [
        ({"generating": 3, "reference": 2}, "generation"),
        ({"generating": 2, "reference": 3}, "scoring by the reference model"),
        ({"generating": 1, "loading weights": 4}, "loading weights into the engine"),
        ({"generating": 1, "reference": 1}, "what the collector does beside generation, such as rewards,"),
    ],
)
def test_what_the_trainer_waits_for_longest_is_told(awaited, limit):
    """Over 20 s, of which the trainer waits 5 s and trains 15 s; the collector never stands still."""
    engine, collector, now = [("generating", 5, 20)], [], 0
    for activity, seconds in awaited.items():
        (collector if activity == "reference" else engine).append((activity, now, now + seconds))
        now += seconds
    found = build(
        engine=engine,
        collector=[("collecting", 0, 20), *collector],
        trainer=[("waiting for data", 0, 5), ("training", 5, 20)],
    )
    assert describe_limit(found, sync=False) == f"The trainer waited for data 25% of the time: {limit} limits this run."


def test_an_idle_engine_is_not_held_up_by_the_trainer_while_the_collector_works():
    found = build(
        engine=[("generating", 0, 2)],
        collector=[("collecting", 0, 20)],
        trainer=[("waiting for data", 0, 1.5), ("training", 1.5, 20)],
    )
    assert describe_limit(found, sync=False) == (
        "Generation and training kept pace: neither waited for the other for 10% of the time."
    )


def test_overlapping_modes_do_not_take_turns():
    """The trainer waits for the first batch only, and generation for the training on the last."""
    found = build(
        engine=[("generating", 0, 20)],
        collector=[("collecting", 0, 20)],
        trainer=[("waiting for data", 0, 4), ("training", 4, 25)],
    )
    assert (
        describe_limit(found, sync=True)
        == "Generation waited for the trainer 20% of the time: training limits this run."
    )


@pytest.mark.parametrize(
    ("activity", "remedy"),
    [
        ("pushing weights", "fewer weight pushes (train.weight_update_frequency)"),
        ("evaluating", "fewer or smaller evaluations (eval.frequency, eval.num_prompts)"),
        ("saving", "fewer checkpoints (train.checkpoint_frequency)"),
    ],
)
def test_what_takes_longer_than_training_and_waiting_is_told(activity, remedy):
    found = build(
        collector=[("collecting", 0, 3)],
        trainer=[("waiting for data", 0, 3), ("training", 3, 6), (activity, 6, 10)],
    )
    assert describe_limit(found, sync=True) == (
        f"The trainer spent 40% of the time {activity}, longer than training or waiting for data: {remedy} would help "
        "most."
    )


def test_what_takes_longer_than_training_but_not_than_waiting_does_not_limit():
    found = take_turns(num_batches=3, collecting=6.0, training=1.0, pushing=3.0)
    assert describe_limit(found, sync=True).startswith("Generation and training take turns")


def test_the_keys_that_sentences_name_exist():
    from expert_iteration import keys, timeline_report

    texts = [*timeline_report.UPKEEP.values(), *timeline_report.OVERLAP_REMEDY.values()]
    named = {name for text in texts for name in re.findall(r"(?:train|eval)\.\w+", text)}
    assert len(named) >= 5
    assert {name for name in named if not keys.is_known(name)} == set()


def test_what_is_not_nothing_does_not_look_like_it():
    assert [percent(share) for share in (0.0, 0.0049, 0.0051, 0.5, 1.0)] == ["0%", "<1%", "1%", "50%", "100%"]


# What its pictures show.


def test_the_legend_has_what_was_done():
    shares = list_shares(take_turns(num_batches=3), TRAINER)
    assert [(share.activity, pytest.approx(share.share)) for share in shares] == [
        ("training", 0.3),
        ("pushing weights", 0.1),
        ("waiting for data", 0.6),
    ]
    idle = list_shares(take_turns(num_batches=3), COLLECTOR)[-1]
    assert (idle.activity, idle.color) == ("idle", None)


def test_a_short_run_is_shown_whole_with_a_bar_a_span():
    (picture,) = draw_timeline(take_turns(num_batches=6))
    assert picture.caption == "The whole run."
    waiting, training = (find_bars(picture.svg, f"excerpt-{name}") for name in ("waiting-for-data", "training"))
    generating, pushing = (find_bars(picture.svg, f"excerpt-{name}") for name in ("generating", "pushing-weights"))
    assert len(waiting) == len(training) == len(generating) == len(pushing) == 6
    assert find_bars(picture.svg, "excerpt-evaluating") == []
    # 60 s in 600 columns: spans of whole seconds begin and end where columns do.
    second = (pushing[-1][1] - generating[0][0]) / 60
    left = generating[0][0]
    for batch in range(6):
        start = left + 10 * batch * second
        assert generating[batch] == waiting[batch] == pytest.approx((start, start + 6 * second), abs=1e-3)
        assert training[batch] == pytest.approx((start + 6 * second, start + 9 * second), abs=1e-3)


def test_waiting_is_thin():
    svg = draw_excerpt(take_turns(num_batches=1), Section(0, 10))
    waiting, training = (find_shapes(svg, f"excerpt-{name}")[0] for name in ("waiting-for-data", "training"))
    assert height(waiting) < height(training) / 2
    assert waiting[:, 1].mean() == pytest.approx(training[:, 1].mean(), rel=0.05)


@pytest.mark.parametrize(("num_batches", "num_bins"), [(20, 20), (60, 60), (600, 60)])
def test_shares_are_stacked_to_the_lane_s_height_in_bins_of_at_least_a_push(num_batches, num_bins):
    svg = draw_timeline(take_turns(num_batches))[1].svg
    training, pushing, waiting = (
        find_shapes(svg, f"shares-{name}")[0] for name in ("training", "pushing-weights", "waiting-for-data")
    )
    assert len(np.unique(training[:, 0])) == num_bins + 1
    lane = height(np.concatenate([training, pushing, waiting]))
    # The axis of an SVG points down: training lies at the bottom.
    assert training[:, 1].min() == pytest.approx(pushing[:, 1].max(), abs=1e-3)
    assert pushing[:, 1].min() == pytest.approx(waiting[:, 1].max(), abs=1e-3)
    assert [height(shape) / lane for shape in (training, pushing, waiting)] == pytest.approx([0.3, 0.1, 0.6], abs=1e-3)


def test_a_long_run_is_shown_by_an_excerpt_of_its_middle_and_by_shares():
    found = take_turns(num_batches=1000)
    assert choose_excerpt(found) == Section(4960, 5040)
    excerpt, shares = draw_timeline(found)
    assert excerpt.caption == "An excerpt from the middle: 4,960.0 to 5,040.0 seconds."
    assert len(find_bars(excerpt.svg, "excerpt-pushing-weights")) == 8
    groups = {element.get("id") for element in ET.fromstring(shares.svg).iter(f"{SVG}g")}
    assert {"shares-generating", "shares-collecting", "shares-training"} <= groups


def test_a_run_without_pushes_is_shown_by_a_minute():
    trainer = [("training", start, start + 0.9) for start in range(600)]
    assert choose_excerpt(build(collector=[("collecting", 0, 600)], trainer=trainer)).end == pytest.approx(329.95)
    assert choose_excerpt(build(collector=[("collecting", 0, 80)], trainer=trainer[:80])) == Section(
        0, pytest.approx(79.9)
    )


def test_a_push_is_seen_however_short_it_is():
    found = build(
        engine=[("generating", 0, 1000), ("loading weights", 500, 500.002)],
        collector=[("collecting", 0, 1000)],
        trainer=[("training", 0, 1000), ("pushing weights", 499.99, 500), ("saving", 700, 700.01)],
    )
    svg = draw_excerpt(found, Section(0, 1000))
    counts = [len(find_bars(svg, f"excerpt-{name}")) for name in ("pushing-weights", "loading-weights", "saving")]
    assert counts == [1, 1, 0]
    assert len(find_bars(svg, "excerpt-training")) == 2


def test_many_spans_make_a_small_picture():
    numbers = random.Random(0)

    def spans(process, count):
        now = START
        for _ in range(count):
            seconds = numbers.uniform(0.0, 0.1)
            yield {"activity": numbers.choice(ACTIVITIES[process]), "start": now, "end": now + seconds}
            now += seconds * numbers.choice([1.0, 1.5])

    began = time.process_time()
    pictures = draw_timeline(build_timeline({process: spans(process, 50_000) for process in ACTIVITIES}))
    assert time.process_time() - began < 20  # takes about 1.5 s
    assert len(pictures) == 2
    assert max(len(picture.svg) for picture in pictures) < 100_000


def test_an_excerpt_of_endless_changes_stays_small():
    trainer = [(ACTIVITIES[TRAINER][number % 4], number / 10, (number + 1) / 10) for number in range(20_000)]
    found = build(collector=[("collecting", 0, 2000)], trainer=trainer)
    assert len(draw_excerpt(found, Section(0, 2000))) < 150_000
    assert len(draw_excerpt(found, Section(0, 60))) < 150_000


@pytest.mark.parametrize("process", ACTIVITIES)
def test_activities_of_a_lane_differ_in_lightness(process):
    def luminance(color):
        channels = np.array([int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    lightness = sorted(116 * luminance(COLORS[activity]) ** (1 / 3) - 16 for activity in ACTIVITIES[process])
    assert min(np.diff(lightness)) > 9  # of 100 (CIE L*); a just visible difference is about 1
