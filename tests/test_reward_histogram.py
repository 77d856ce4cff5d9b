"""Rewards before and after: which evaluations, and what the bars show."""

import re
import xml.etree.ElementTree as ET

import pytest

from expert_iteration.reward_histogram import MAX_VALUES, NUM_BINS, Rewards, draw_histogram, first_and_last

SVG = "{http://www.w3.org/2000/svg}"


def line(step, *rewards):
    return {"step": step, "rewards": list(rewards)}


def heights(svg, index):
    """Of the bars of an evaluation, as shares of the highest bar of the picture."""
    found = {}
    for number in (0, 1):
        groups = [element for element in ET.fromstring(svg).iter(f"{SVG}g") if element.get("id") == f"rewards-{number}"]
        corners = [
            [float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d"))]
            for group in groups
            for path in group.iter(f"{SVG}path")
        ]
        found[number] = [max(ys) - min(ys) for ys in corners]
    highest = max(height for bars in found.values() for height in bars)
    return [height / highest for height in found[index]]


def test_the_first_and_the_last_evaluation_are_compared():
    lines = [line(0, 0.1, 1.0), line(5, 0.2), line(9, 1.0, None)]
    assert first_and_last(lines, steps=[0, 5, 9]) == [Rewards(0, [0.1, 1.0]), Rewards(9, [1.0])]
    assert first_and_last(lines[:1], steps=[0]) == [Rewards(0, [0.1, 1.0])]
    assert first_and_last([], steps=[0, 5]) == []


def test_what_a_run_undid_when_it_went_on_from_before_does_not_count():
    lines = [line(0, 0.1), line(5, 0.2), line(9, 0.3), line(5, 0.4)]
    assert first_and_last(lines, steps=[0, 5]) == [Rewards(0, [0.1]), Rewards(5, [0.4])]


def test_every_reward_has_its_bars_where_there_are_few():
    before = Rewards(0, [0.0, 0.10000000149, 0.1, 1.0])
    after = Rewards(7, [1.0, 1.0, 1.0, 0.1])
    histogram = draw_histogram([before, after])
    assert heights(histogram.svg, 0) == pytest.approx([1 / 3, 2 / 3, 1 / 3], abs=1e-4)
    assert heights(histogram.svg, 1) == pytest.approx([0.0, 1 / 3, 1.0], abs=1e-4)
    assert [(bars.label, bars.num_responses) for bars in histogram.bars] == [
        ("before (gradient step 0)", 4),
        ("after (gradient step 7)", 4),
    ]
    assert [text.text for text in ET.fromstring(histogram.svg).iter(f"{SVG}text")][:3] == ["0", "0.1", "1"]


def test_many_rewards_are_counted_in_ranges():
    values = [number / 24 for number in range(25)]
    assert len(values) > MAX_VALUES
    histogram = draw_histogram([Rewards(0, values)])
    found = heights(histogram.svg, 0)
    # Two a range, and the greatest belongs to the last one.
    assert found == pytest.approx([2 / 3] * (NUM_BINS - 1) + [1.0], abs=1e-4)
    assert [bars.label for bars in histogram.bars] == ["gradient step 0"]


def test_without_an_evaluation_there_is_no_histogram():
    assert draw_histogram([]) is None
