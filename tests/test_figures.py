"""`expert_iteration.figures` and `best`: estimators against counting, errors against simulation, what is better."""

import itertools
import math
import random
import statistics

import pytest

from expert_iteration.best import Best, merit
from expert_iteration.figures import Judged, compute_figures, pass_at_k, standard_error


def judge(correct, reward=0.5, **changes):
    figures = {"text": "", "reward": reward, "correct": correct, "has_format": True, "num_tokens": 3}
    return Judged(**{**figures, "is_truncated": False, **changes})


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (4, 2), (4, 4), (7, 3)])
def test_pass_at_k_is_the_share_of_choices_with_a_correct_one(n, k):
    for c in range(n + 1):
        choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(statistics.fmean(any(choice) for choice in choices))


def test_pass_at_k_is_exact_for_many_samples():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


def test_the_error_is_how_far_the_figure_strays_over_sets_of_prompts():
    """Prompts differ and each has four samples; counted one by one the samples would give about half of it."""
    rng = random.Random(0)

    def draw():
        chances = [rng.choice([0.0, 0.1, 1.0]) for _ in range(50)]
        return [statistics.fmean(rng.random() < chance for _ in range(4)) for chance in chances]

    draws = [draw() for _ in range(400)]
    spread = statistics.stdev(statistics.fmean(means) for means in draws)
    # The standard deviation of 400 draws is known to 1 / sqrt(800), 4 %: three of these.
    assert statistics.fmean(map(standard_error, draws)) == pytest.approx(spread, rel=0.11)


def test_one_prompt_has_no_error():
    assert math.isnan(standard_error([0.5]))


def test_rewards_that_are_not_finite_are_left_out():
    groups = [[judge(True, 1.0), judge(False, math.nan)], [judge(False, 0.5), judge(False, -math.inf)]]
    assert compute_figures(groups, [True, False], k=2)["reward"] == 0.75
    assert math.isnan(compute_figures([[judge(True, math.nan)]], [True], k=1)["reward"])


def test_rates_are_of_sampled_responses():
    groups = [[judge(True, has_format=False), judge(True)], [judge(False, is_truncated=True), judge(False)]]
    figures = compute_figures(groups, [True, True], k=1)
    assert (figures["format_rate"], figures["truncation_rate"], figures["greedy"]) == (0.75, 0.25, 1.0)


def test_the_first_of_equals_is_the_best():
    best = Best("reward", patience=None)
    assert [best.compare({"reward": value}, step) for step, value in enumerate([0.2, 0.2, 0.4, 0.1])] == [
        True,
        False,
        True,
        False,
    ]
    assert (best.figures, best.step, best.evaluations_since) == ({"reward": 0.4}, 2, 1)


def test_a_figure_that_is_not_finite_is_worse_than_any():
    best = Best("reward", patience=None)
    assert best.compare({"reward": math.nan}, step=0)
    assert best.compare({"reward": -5.0}, step=1)
    assert not best.compare({"reward": math.nan}, step=2)
    assert merit({}, "reward") == -math.inf
