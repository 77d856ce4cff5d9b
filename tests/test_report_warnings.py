"""What the report warns of: each thing is seen, when it began is told, and a healthy run has no warning."""

import re

import pytest

from expert_iteration import keys
from expert_iteration.report_series import GROUPS_EQUAL, GROUPS_KEPT, Point
from expert_iteration.report_warnings import WARNING_METRICS, find_warnings
from expert_iteration.selection_advice import ADVICE, advise

STEPS = range(1, 91)
HEALTHY = {
    "train/entropy": 0.5,
    "train/kl_to_ref": 0.3,
    "train/bad_steps": 0,
    "collector/truncation_rate": 0.05,
    "collector/dropped_records": 0,
    "collector/rewards/mean": 0.6,
    "collector/rewards/min": 0.0,
    "collector/rewards/max": 1.0,
    "eval/truncation_rate": 0.1,
    "selection/batch_kept": 20,
    GROUPS_KEPT: 0.8,
    GROUPS_EQUAL: 0.1,
}


def make_series(changes=None, since=61, until=90):
    """Ninety points of each metric, healthy but for the changes from one step to another."""
    series = {name: [Point(step, value) for step in STEPS] for name, value in HEALTHY.items()}
    for name, value in (changes or {}).items():
        series[name] = [Point(step, value if since <= step <= until else HEALTHY[name]) for step in STEPS]
    return series


def warn(changes=None, *, error=None, kl_budget=1.0, **when):
    return find_warnings(make_series(changes, **when), kl_budget=kl_budget, error=error)


def test_a_healthy_run_has_no_warning():
    assert set(HEALTHY) == WARNING_METRICS
    assert warn() == []
    assert find_warnings({}, kl_budget=None, error=None) == []


@pytest.mark.parametrize(
    ("changes", "title", "when"),
    [
        ({"train/entropy": 0.09}, "Entropy collapse: down to 0.09 nats per token, from 0.5", "since gradient step 61"),
        ({"train/kl_to_ref": 1.25}, "KL to the reference up to 1.25 nats per token", "since gradient step 61"),
        ({"collector/truncation_rate": 0.25}, "Up to 25% of collected responses", "since gradient step 61"),
        ({"eval/truncation_rate": 0.3}, "Up to 30% of held-out responses", "since gradient step 61"),
        ({"selection/batch_kept": 0}, "Nothing was kept of 30 of 90 batches", "first after gradient step 61"),
        ({GROUPS_KEPT: 0.4}, "Most groups are dropped: down to 40%", "since gradient step 61"),
        ({"collector/rewards/mean": 0.97}, "The reward is saturated: its mean is 97%", "since gradient step 61"),
        ({GROUPS_EQUAL: 0.7}, "The reward is saturated: in up to 70% of groups", "since gradient step 61"),
        ({"train/bad_steps": 4}, "4 optimizer steps were skipped", "since gradient step 61"),
        ({"collector/dropped_records": 7}, "7 records of the collector were lost", "since gradient step 61"),
    ],
)
def test_what_is_wrong_is_told_with_its_beginning_and_a_remedy(changes, title, when):
    (found,) = warn(changes)
    assert found.title.startswith(title)
    assert found.when == when
    assert found.remedy


def test_what_came_to_an_end_has_two_steps():
    (found,) = warn({"train/kl_to_ref": 2.0}, since=21, until=40)
    assert found.when == "gradient steps 21 to 41"


def test_one_odd_number_is_no_alarm():
    assert warn({"train/kl_to_ref": 200.0, "train/entropy": 0.0}, since=50, until=50) == []


def test_a_single_number_is_judged():
    series = {"eval/truncation_rate": [Point(0, 0.5)]}  # of a model that is only evaluated
    (found,) = find_warnings(series, kl_budget=None, error=None)
    assert found.title == "Up to 50% of held-out responses were truncated"


@pytest.mark.parametrize(
    ("rates", "highest", "since"),
    [
        ([0.0, 0.35], 35, 10),
        ([0.5, 0.0, 0.3], 30, 20),
        ([0.0, 0.0, 0.0, 0.4, 0.5], 50, 30),
        ([0.3, 0.5, 0.25, 0.4], 50, 0),
    ],
)
def test_evaluations_are_judged_one_by_one(rates, highest, since):
    series = {"eval/truncation_rate": [Point(10 * number, rate) for number, rate in enumerate(rates)]}
    (found,) = find_warnings(series, kl_budget=None, error=None)
    assert found.title == f"Up to {highest}% of held-out responses were truncated"
    assert found.when == f"since gradient step {since}"


@pytest.mark.parametrize("rates", [[0.5, 0.0], [0.3, 0.5, 0.5, 0.5, 0.1], [0.2]])
def test_what_the_last_evaluation_shows_no_more_is_no_warning(rates):
    series = {"eval/truncation_rate": [Point(10 * number, rate) for number, rate in enumerate(rates)]}
    assert find_warnings(series, kl_budget=None, error=None) == []


def test_the_budget_of_the_kl_is_the_configured_one():
    assert warn({"train/kl_to_ref": 1.25}, kl_budget=1.5) == []
    assert warn({"train/kl_to_ref": 1.25}, kl_budget=None) == []
    assert "logging.kl_budget (0.2)" in warn(kl_budget=0.2)[0].title


def test_rewards_are_judged_between_the_lowest_and_the_highest():
    shifted = {f"collector/rewards/{name}": value for name, value in (("mean", -1.0), ("min", -5.0), ("max", -0.9))}
    (found,) = warn(shifted, since=1)
    assert found.title.startswith("The reward is saturated: its mean is 98%")


def test_groups_that_are_all_wrong_are_not_saturated_but_dropped():
    changes = {GROUPS_EQUAL: 0.7, GROUPS_KEPT: 0.3, "collector/rewards/mean": 0.02}
    (found,) = warn(changes)
    assert found.title.startswith("Most groups are dropped")


def test_what_to_do_about_dropped_groups_is_of_the_rule_in_use():
    for changes in ({GROUPS_KEPT: 0.3}, {"selection/batch_kept": 0}):
        (found,) = find_warnings(make_series(changes), kl_budget=None, error=None, advice=advise("threshold", 0.5))
        assert found.remedy.startswith("A lower train.selection_threshold")
        assert found.remedy.endswith("a lower train.min_reward (now 0.5) keeps more.")


def test_saturation_explains_why_groups_are_dropped():
    (found,) = warn({GROUPS_EQUAL: 0.7, GROUPS_KEPT: 0.3, "collector/rewards/mean": 0.9})
    assert found.title.startswith("The reward is saturated")


def test_weights_that_did_not_arrive_are_told():
    (found,) = warn(error="WeightMismatchError: trainer and engine disagree")
    assert found.title == "The engine did not hold the trainer's weights"
    assert warn(error="RuntimeError: something else") == []


def test_the_keys_that_remedies_name_exist():
    changes = {name: 0 if name in ("train/entropy", "selection/batch_kept") else 9 for name in HEALTHY}
    found = [*warn(changes), *warn({GROUPS_KEPT: 0.0})]
    words = " ".join([*(f"{warning.title} {warning.remedy}" for warning in found), *ADVICE.values()])
    named = set(re.findall(r"\b(?:train|optimizer|logging|inference_model|env|train_model)\.\w+", words))
    assert len(named) >= 9
    assert {name for name in named if not keys.is_known(name)} == set()


def test_the_gravest_comes_first():
    titles = [warning.title for warning in warn({"collector/dropped_records": 1, "train/bad_steps": 1})]
    assert [title.split()[1] for title in titles] == ["optimizer", "records"]
