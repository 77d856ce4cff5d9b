"""The numbers of metrics.jsonl as the report needs them: collected, derived, smoothed, judged in windows."""

import pytest

from expert_iteration.report_series import (
    ACCEPTED,
    COLLECT_SPEED,
    GROUPS_EQUAL,
    SMOOTHING,
    WINDOW,
    Point,
    collect_series,
    in_windows,
    running_mean,
    thin,
)


def points(values):
    return [Point(10 * number, value) for number, value in enumerate(values)]


def test_series_are_those_asked_for_without_nulls():
    lines = [
        {"step": 0, "selection/batch_kept": 4, "train/loss": None},
        {"step": 2, "selection/batch_kept": 0, "collector/dialog_turns": 16},
    ]
    names = {"selection/batch_kept", "train/loss", ACCEPTED}
    assert collect_series(lines, names) == {"selection/batch_kept": [Point(0, 4), Point(2, 0)]}


def test_shares_of_a_batch_are_growths_of_counters():
    lines = [
        {"step": step, "selection/responses_kept": kept, "selection/responses_seen": seen}
        for step, kept, seen in [(0, 8, 64), (3, 8, 128), (3, 8, 128), (5, 40, 192)]  # one line says nothing new
    ]
    assert collect_series(lines, {ACCEPTED, GROUPS_EQUAL}) == {
        ACCEPTED: [Point(0, 0.125), Point(3, 0.0), Point(5, 0.5)]
    }


def test_the_speed_of_collection_is_that_of_each_batch():
    lines = [
        {"step": 0, "collector/batch": 1.0, "collector/response_tokens": 600},
        {"step": 0, "collector/batch": 1.0, "collector/time/collect": 2.0},
        {"step": 2, "collector/batch": 2.0, "collector/response_tokens": 5},  # its other record was lost
        {"step": 3, "collector/batch": 3.0, "collector/time/collect": 7.0},  # likewise
        {"step": 4, "collector/batch": 4.0, "collector/response_tokens": 900},
        {"step": 4, "collector/batch": 4.0, "collector/time/collect": 0.5},
        {"step": 5, "train/loss": 1.0},
    ]
    assert collect_series(lines, {COLLECT_SPEED}) == {COLLECT_SPEED: [Point(0, 300.0), Point(4, 1800.0)]}


def test_few_numbers_are_not_smoothed():
    values = [3.0, 1.0, 2.0] * 6
    assert len(values) < SMOOTHING
    assert running_mean(values) == (pytest.approx(values), 1)
    assert running_mean([]) == ([], 1)


def test_the_running_mean_begins_where_the_run_did_and_ends_with_the_last_numbers():
    values = [100.0, *[0.0] * 18, 9.0]  # twenty: one neighbour to either side
    means, width = running_mean(values)
    assert width == 3
    assert means == pytest.approx([100.0, 100 / 3, *[0.0] * 16, 3.0, 4.5])


def test_the_running_mean_of_a_line_is_the_line():
    values = [float(number) for number in range(100)]
    means, width = running_mean(values)
    assert width == 11
    assert means[:95] == pytest.approx(values[:95])


def test_windows_are_judged_by_their_median():
    assert in_windows(points([1.0, 50.0, 2.0, 3.0, 4.0, 5.0, 9.0])) == [Point(0, 2.0), Point(30, 4.5)]
    assert in_windows(points([7.0])) == [Point(0, 7.0)]
    assert in_windows([]) == []


def test_windows_grow_with_the_run():
    assert len(in_windows(points([1.0] * 20 * WINDOW))) == 20
    assert len(in_windows(points([1.0] * 2000))) == 20


def test_neighbours_are_thinned_to_their_means():
    assert thin([1.0, 3.0, 5.0, 7.0, 9.0], size=2) == [2.0, 6.0, 9.0]


def test_metrics_of_a_prefix_are_found_in_the_same_reading():
    lines = [{"step": 1, "part/a": 0.5, "loss": 2.0, "other": 1.0}, {"step": 2, "part/b": None, "part/a": 0.25}]
    series = collect_series(lines, {"loss"}, prefix="part/")
    assert series == {"part/a": [Point(1, 0.5), Point(2, 0.25)], "loss": [Point(1, 2.0)]}
