"""Whole runs of the asynchronous script, as a user starts them: real engines, real Ray, real TorchRL."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from whole_runs import LIGHT, Run, shown, without_times

from expert_iteration import timeline
from expert_iteration.run_directory import timeline_file

SCRIPT = "expert-iteration-async.py"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def learned(tmp_path_factory, warm_tiny_model):
    """Six batches of the tiny task with a push each five gradient steps."""
    return Run(
        tmp_path_factory.mktemp("async") / "run",
        *("train.total_dialog_turns=1536", "train.weight_update_frequency=5", "eval.frequency=4"),
        script=SCRIPT,
    ).wait()


def spans(run, process, activity):
    lines = [json.loads(line) for line in Path(timeline_file(run.dir, process)).read_text().splitlines()]
    return [(line["start"], line["end"]) for line in lines if line["activity"] == activity]


@pytest.mark.vllm
def test_the_tiny_model_learns(learned):
    assert learned.process.returncode == 0, learned.output
    before, after = learned.summary["eval"]["before"], learned.summary["eval"]["after"]
    # As in the synchronous test: 0.15 is four standard errors of 800 samples.
    assert after["pass@1"] > before["pass@1"] + 0.15
    assert after["greedy"] > before["greedy"] + 0.15
    assert after["reward"] > before["reward"]


@pytest.mark.vllm
def test_the_run_ends_after_its_turns_and_the_steps_that_belong_to_them(learned):
    summary = learned.summary
    assert (summary["status"], summary["mode"], summary["dialog_turns"]) == ("completed", "async", 1536)
    # Two draws of each kept response, 16 at a time.
    assert summary["gradient_steps"] == -(-2 * summary["responses_kept"] // 16)
    assert summary["optimizer_steps"] == summary["gradient_steps"]
    assert summary["weight_pushes"] == -(-summary["gradient_steps"] // 5)


@pytest.mark.vllm
def test_the_run_directory_keeps_its_contract(learned):
    for name in ("run.log", "samples.jsonl", "report.html", ".hydra/config.yaml", "last/config.json"):
        assert (learned.dir / name).stat().st_size > 0, name
    assert (learned.dir / "checkpoints" / f"checkpoint_{learned.summary['gradient_steps']}.pt").exists()
    assert {path.stem for path in (learned.dir / "timeline").iterdir()} == {"engine", "collector", "trainer"}
    assert learned.summary["max_probe_logprob_diff"] < 1e-3
    samples = [json.loads(line) for line in (learned.dir / "samples.jsonl").read_text().splitlines()]
    assert {sample["split"] for sample in samples} == {"train", "heldout"}


@pytest.mark.vllm
def test_the_engine_generates_while_the_trainer_steps(learned):
    generating = spans(learned, timeline.ENGINE, timeline.GENERATING)
    training = spans(learned, timeline.TRAINER, timeline.TRAINING)
    both = sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for start, end in generating
        for other_start, other_end in training
    )
    assert both > 0


@pytest.mark.vllm
def test_ages_come_from_the_versions_that_the_engine_stamped(learned):
    ages, oldest = (shown(learned.metrics, name) for name in ("train/policy_age", "train/max_policy_age"))
    assert all(0 <= age <= most for age, most in zip(ages, oldest, strict=True))
    assert max(oldest) >= 1
    versions = shown(learned.metrics, "collector/policy_version/max")
    assert versions == sorted(versions)
    pushed, loaded = (shown(learned.metrics, f"weights/{name}") for name in ("policy_version", "engine_version"))
    assert pushed == list(range(1, len(pushed) + 1))
    assert loaded == sorted(loaded)
    assert loaded[-1] == pushed[-1] == learned.summary["policy_version"]


@pytest.mark.vllm
def test_nothing_is_left_running(learned):
    assert learned.processes_left() == []


@pytest.mark.vllm
def test_the_report_shows_where_the_time_went(learned):
    assert "Where the time went" in (learned.dir / "report.html").read_text()


@pytest.mark.slow
def test_a_seed_repeats_a_deterministic_run(tmp_path):
    overrides = (
        *LIGHT,
        *("train.deterministic=true", "train.total_dialog_turns=512", "train.weight_update_frequency=3"),
        *("eval.num_prompts=20", "eval.frequency=2", "logging.backend=none"),
    )
    first, second = (Run(tmp_path / name, *overrides, script=SCRIPT).wait() for name in ("first", "second"))
    assert first.process.returncode == second.process.returncode == 0, first.output + second.output
    assert first.summary["weight_pushes"] > 1
    assert without_times(first.metrics) == without_times(second.metrics)
    samples = [(run.dir / "samples.jsonl").read_text() for run in (first, second)]
    assert samples[0] == samples[1]


@pytest.mark.slow
@pytest.mark.parametrize(("process", "name"), [("ray::EngineActor", "engine"), ("ray::CollectorActor", "collector")])
@pytest.mark.parametrize("script", [SCRIPT, "expert-iteration-sync.py"])
def test_a_process_that_is_killed_ends_the_run_with_an_error_that_names_it(tmp_path, script, process, name):
    run = Run(
        tmp_path / "run",
        *LIGHT,
        *("train.total_dialog_turns=100000", "eval.num_prompts=20", "eval.frequency=0", "logging.backend=none"),
        script=script,
    )
    run.wait_for_line("weights/policy_version")
    (victim,) = [
        child
        for child in psutil.Process(run.process.pid).children(recursive=True)
        if child.cmdline() and child.cmdline()[0].startswith(process)
    ]
    os.kill(victim.pid, signal.SIGKILL)
    run.wait()
    assert run.process.returncode == 1
    assert run.summary["status"] == "failed"
    assert f"The {name}'s process has died (logs/{name}.log)" in run.summary["error"]
    assert run.processes_left() == []
