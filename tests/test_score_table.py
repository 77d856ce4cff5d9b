"""`expert_iteration.score_table`: figures as text, whatever an older or a broken summary lacks."""

import math

from expert_iteration.score_table import cell, figure_of, fixed, score_table

OLD = {"pass@1": 0.3, "greedy": 0.4, "reward": 0.5, "pass@k": 0.7, "k": 4.0, "num_prompts": 20.0}
NEW = OLD | {
    "pass@1": 0.6,
    "pass@1_stderr": 0.021,
    "format_rate": 0.9,
    "truncation_rate": 0.05,
    "response_length": 1018.25,
}


def test_columns_and_rows_are_those_that_are_known():
    columns, rows = score_table({"before": OLD, "after": NEW, "best": None})
    assert columns == ["before", "after"]
    assert dict(rows) == {
        "pass@1 (sampled)": ["0.300", "0.600 ± 0.021"],
        "greedy": ["0.400", "0.400"],
        "reward": ["0.500", "0.500"],
        "pass@4": ["0.700", "0.700"],
        "well-formed": ["-", "0.900"],
        "truncated": ["-", "0.050"],
        "tokens a response": ["-", "1,018.250"],
    }
    assert len(score_table({"before": OLD, "after": OLD | {"greedy": 0.5}, "best": OLD})[1]) == 4


def test_what_was_evaluated_once_is_one_column():
    columns, rows = score_table({"before": NEW, "after": NEW, "best": NEW})
    assert columns == ["score"]
    assert rows[0] == ("pass@1 (sampled)", ["0.600 ± 0.021"])
    assert score_table({"before": OLD, "after": NEW, "best": NEW})[0] == ["before", "after", "best"]
    assert score_table({"before": OLD, "after": None, "best": OLD})[0] == ["before", "after", "best"]


def test_a_tasks_further_figures_follow():
    _, rows = score_table({"before": OLD, "after": OLD | {"inst_level_loose_acc": 0.25}})
    assert rows[-1] == ("instruction-level loose", ["-", "0.250"])


def test_nothing_is_no_table():
    assert score_table({}) == ([], [])
    assert score_table({"before": None, "after": {}}) == ([], [])
    assert figure_of({}, "k") is None
    assert figure_of({"before": None, "after": NEW}, "k") == 4.0


def test_what_is_not_known_is_a_dash():
    assert [fixed(value) for value in (0.5, None, math.nan)] == ["0.500", "-", "-"]
    assert cell({"pass@1": 0.5, "pass@1_stderr": None}, "pass@1") == "0.500"
    assert cell({"pass@1": 0.5, "pass@1_stderr": math.nan}, "pass@1") == "0.500"
