"""`summary.json`: the keys that other programs read, and how a run is said to have ended."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import ray

from expert_iteration.errors import UserError
from expert_iteration.summary import Summary, failure_summary, write_summary

# DESIGN section 5.
CONTRACT = {
    "status",
    "error",
    "mode",
    "seed",
    "gradient_steps",
    "optimizer_steps",
    "dialog_turns",
    "groups_seen",
    "groups_kept",
    "responses_kept",
    "weight_pushes",
    "policy_version",
    "seconds",
    "seconds_to_first_optimizer_step",
    "collect_tokens_per_second",
    "train_tokens_per_second",
    "max_probe_logprob_diff",
    "eval",
}
EVAL_CONTRACT = {"pass@1", "pass@1_stderr", "greedy", "reward", "pass@k", "k", "num_prompts"}
EVAL_CONTRACT |= {"response_length", "truncation_rate", "format_rate"}
UPDATER = SimpleNamespace(pushes=16, policy_version=16)


def make_learner(**changes):
    figures = {
        "gradient_steps": 128,
        "optimizer_steps": 64,
        "bad_steps": 1,
        "tokens_trained": 5000,
        "seconds": 10.0,
        "first_optimizer_step_time": 1042.5,
    }
    return SimpleNamespace(**{**figures, **changes})


def evaluation(pass_at_1):
    figures = {"pass@1": pass_at_1, "pass@1_stderr": 0.02, "greedy": 0.5, "reward": 1 - pass_at_1, "pass@k": 0.9}
    figures |= {"k": 4.0, "num_prompts": 200.0, "response_length": 18.0, "truncation_rate": 0.0, "format_rate": 0.9}
    return {f"eval/{name}": value for name, value in figures.items()}


def summarize(cfg, *lines, error=None, learner=None, started=1000.0):
    summary = Summary(cfg)
    for line in lines:
        summary.log_metrics(line, step=0)
    return summary.to_dict(error, make_learner() if learner is None else learner, UPDATER, started)


def test_a_completed_run_has_the_keys_that_other_programs_read(make_cfg):
    summary = summarize(make_cfg("seed=3"), evaluation(0.3), evaluation(0.7))
    assert summary.keys() >= CONTRACT
    assert summary["eval"].keys() == {"before", "after", "best"}
    assert all(figures.keys() == EVAL_CONTRACT for figures in summary["eval"].values())
    assert (summary["mode"], summary["seed"]) == ("sync", 3)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (None, "completed", None),
        (KeyboardInterrupt(), "interrupted", None),
        (RuntimeError("the engine is gone"), "failed", "RuntimeError: the engine is gone"),
    ],
)
def test_how_a_run_ended(make_cfg, error, status, text):
    for summary in (summarize(make_cfg(), error=error), failure_summary(make_cfg(), error, started=0.0)):
        assert (summary["status"], summary["error"]) == (status, text)


def test_an_error_that_came_through_ray_is_said_in_its_own_words(ray_session, make_cfg):
    @ray.remote
    def refuse():
        from expert_iteration.errors import UserError

        raise UserError("env.dataset_path (x) holds no usable row.")

    with pytest.raises(UserError) as refusal:
        ray.get(refuse.remote())
    summary = failure_summary(make_cfg(), refusal.value, started=0.0)
    assert summary["error"] == "UserError: env.dataset_path (x) holds no usable row."


def test_what_can_be_said_of_a_run_that_could_not_say_it_itself(make_cfg):
    before = time.time()
    summary = failure_summary(make_cfg("seed=7"), RuntimeError("killed"), started=before - 5)
    assert (summary["mode"], summary["seed"], summary["eval"]) == ("sync", 7, {})
    assert 5 <= summary["seconds"] <= 5 + time.time() - before


def test_counts_are_the_latest_and_of_the_parts_that_count(make_cfg):
    lines = [
        {"collector/dialog_turns": 256.0, "selection/groups_seen": 32.0, "selection/groups_kept": 20.0},
        {"selection/responses_kept": 40.0},
        {"collector/dialog_turns": 512.0, "selection/groups_seen": 64.0, "selection/groups_kept": 44.0},
        {"selection/responses_kept": 80.0, "selection/empty_batches": 1.0},
    ]
    summary = summarize(make_cfg(), *lines)
    expected = {"dialog_turns": 512, "groups_seen": 64, "groups_kept": 44, "responses_kept": 80, "empty_batches": 1}
    expected |= {
        "gradient_steps": 128,
        "optimizer_steps": 64,
        "bad_steps": 1,
        "weight_pushes": 16,
        "policy_version": 16,
    }
    assert {name: summary[name] for name in expected} == expected
    assert all(isinstance(summary[name], int) for name in expected)


def test_speeds_are_tokens_by_the_seconds_they_took(make_cfg):
    lines = [
        {"collector/response_tokens": 3000.0},
        {"collector/time/collect": 2.0},
        {"collector/response_tokens": 1000.0, "collector/time/elapsed": 99.0},
        {"collector/time/collect": 3.0},
    ]
    summary = summarize(make_cfg(), *lines)
    assert summary["collect_tokens_per_second"] == 800.0
    assert summary["train_tokens_per_second"] == 500.0


def test_times_are_seconds_since_the_process_started(make_cfg):
    summary = summarize(make_cfg(), started=1000.0)
    assert summary["seconds_to_first_optimizer_step"] == 42.5
    assert summary["seconds"] == pytest.approx(time.time() - 1000.0, abs=60)


def test_a_run_that_never_stepped_has_no_speed_and_no_first_step(make_cfg):
    learner = make_learner(first_optimizer_step_time=None, tokens_trained=0, seconds=0.0, optimizer_steps=0)
    summary = summarize(make_cfg(), learner=learner)
    assert summary["seconds_to_first_optimizer_step"] is None
    assert summary["train_tokens_per_second"] == summary["collect_tokens_per_second"] == 0.0
    assert summary["dialog_turns"] == 0
    assert summary["eval"] == {}


def test_before_after_and_best_are_evaluations_of_the_run(make_cfg):
    found = summarize(make_cfg(), *map(evaluation, (0.3, 0.8, 0.7)))["eval"]
    assert {name: figures["pass@1"] for name, figures in found.items()} == {"before": 0.3, "best": 0.8, "after": 0.7}


def test_the_best_is_so_by_the_metric_and_of_equals_the_first(make_cfg):
    lines = [evaluation(value) for value in (0.3, 0.8, 0.2, 0.2)]
    lines[3]["eval/greedy"] = 0.4
    best = summarize(make_cfg("eval.metric=reward"), *lines)["eval"]["best"]
    assert (best["reward"], best["greedy"]) == (0.8, 0.5)
    assert summarize(make_cfg("eval.metric=greedy"), *lines)["eval"]["best"]["pass@1"] == 0.3


def test_a_figure_that_is_unknown_is_never_the_best(make_cfg):
    lines = [evaluation(0.3), evaluation(0.8) | {"eval/reward": math.nan}, evaluation(0.7)]
    del lines[2]["eval/reward"]  # as read again from JSON, which has no word for NaN
    assert summarize(make_cfg("eval.metric=reward"), *lines)["eval"]["best"]["pass@1"] == 0.3


def test_it_is_written_with_nulls_for_what_is_not_finite(tmp_path):
    write_summary(tmp_path, {"eval": {"before": {"pass@1_stderr": math.nan}}})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"eval": {"before": {"pass@1_stderr": None}}}


def test_the_largest_probe_difference_of_the_run_is_kept(make_cfg):
    lines = [{"weights/probe_diff": value} for value in (1e-6, 7e-6, 2e-6)]
    assert summarize(make_cfg(), *lines)["max_probe_logprob_diff"] == 7e-6
