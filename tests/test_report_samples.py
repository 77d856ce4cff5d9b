"""The samples of a report: before and after, equal responses as one, and the rows that there is room for."""

import pytest
from run_directories import collected, evaluation, respond

from expert_iteration import report_samples
from expert_iteration.report_samples import Response, browse, compare, read_groups


def rows(step, split, found):
    return [{"step": step, "split": split, **row} for row in found]


def test_before_and_after_are_the_first_and_the_last_evaluation_of_five_prompts():
    found = rows(0, "heldout", evaluation(good=1, num_prompts=7)) + rows(5, "train", evaluation(good=4, num_prompts=7))
    comparisons = compare(read_groups(found))
    assert [(some.before.prompt, some.after) for some in comparisons] == [(f"2+2={n}?", None) for n in range(5)]
    for good in (2, 4):
        found += rows(5, "heldout", evaluation(good, num_prompts=7))
    first = compare(read_groups(found))[0]
    assert first.before.step == 0
    assert [response.head for response in first.before.responses] == [
        "✓ correct · reward 1",
        "✗ wrong · reward 0.1 · 3 times",
    ]
    assert first.after.responses == [Response("right", "✓ correct · reward 1 · 4 times", "<b>4</b>")]


def test_what_was_kept_comes_first_then_the_higher_reward():
    responses = [
        {"text": "a", "reward": 0.25, "kept": True},
        {"text": "b", "reward": None, "kept": False},
        {"text": "c", "reward": 0.5, "kept": False},
        {"text": "c", "reward": 0.5, "kept": True},
        {"text": "d", "reward": 1.0, "kept": False},
    ]
    (group,) = read_groups(rows(3, "train", [{"prompt": "?", "responses": responses}]))
    assert [(response.kind, response.head, response.text) for response in group.responses] == [
        ("kept", "★ kept · reward 0.5", "c"),
        ("kept", "★ kept · reward 0.25", "a"),
        ("", "reward 1", "d"),
        ("", "reward 0.5", "c"),
        ("", "reward unknown", "b"),
    ]
    assert (group.num_kept, group.num_responses) == (2, 5)
    assert group.mean == pytest.approx((0.25 + 0.5 + 0.5 + 1.0) / 4)


def test_responses_of_unknown_reward_have_no_mean():
    responses = [respond("a", None, False)]
    (group,) = read_groups(rows(3, "heldout", [{"prompt": "?", "answer": None, "responses": responses}]))
    assert (group.mean, group.answer) == (None, "")


def test_all_rows_are_there_to_browse_the_newest_first():
    found = rows(0, "train", [collected("a"), collected("b")]) + rows(4, "train", [collected("c"), collected("d")])
    browsable = browse(read_groups(found))
    assert [group.prompt for group in browsable.groups] == ["c", "d", "a", "b"]
    assert browsable.num_left_out == 0
    assert browse([]) == ([], 0)


def test_where_there_is_no_room_for_all_steps_some_are_left_out_but_not_the_ends(monkeypatch):
    found = [row for step in range(0, 90, 10) for row in rows(step, "train", [collected("?"), collected("?")])]
    size = report_samples._size(read_groups(found[:2]))  # of a step
    monkeypatch.setattr(report_samples, "MAX_TEXT", 5 * size)
    browsable = browse(read_groups(found))
    assert sorted({group.step for group in browsable.groups}) == [0, 20, 40, 60, 80]
    assert browsable.num_left_out == 8
    monkeypatch.setattr(report_samples, "MAX_TEXT", 2 * size)
    assert sorted({group.step for group in browse(read_groups(found)).groups}) == [0, 80]


def test_a_step_that_is_too_large_is_cut(monkeypatch):
    found = read_groups(rows(3, "train", [collected(f"{number:02}") for number in range(64)]))
    monkeypatch.setattr(report_samples, "MAX_TEXT", report_samples._size(found) // 3)
    browsable = browse(found)
    assert [group.prompt for group in browsable.groups] == [f"{number:02}" for number in range(16)]
    assert browsable.num_left_out == 48
