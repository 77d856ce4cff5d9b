"""Sweeps: a row a job as soon as it has ended, whatever ended it, and the next job starts on a machine set free."""

import csv
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from whole_runs import LIGHT, SHORT, Run, without_times

from expert_iteration.cli import launch
from expert_iteration.errors import UserError
from expert_iteration.report import read_jsonl, read_summary
from expert_iteration.sweep import COLUMNS, EVALUATIONS, FIGURES, group_of

SWEEP = ["--config-name", "ei_tiny", "hydra.sweep.dir=sweep", "--multirun"]
EVAL = {
    "before": {
        "pass@1": 0.25,
        "pass@1_stderr": 0.0625,
        "greedy": 0.5,
        "reward": 0.125,
        "pass@k": 0.75,
        "k": 4,
        "num_prompts": 20,
    },
    "after": {
        "pass@1": 0.5,
        "pass@1_stderr": 0.0625,
        "greedy": 0.75,
        "reward": 0.25,
        "pass@k": 0.75,
        "k": 4,
        "num_prompts": 20,
    },
    "best": {
        "pass@1": 0.625,
        "pass@1_stderr": 0.0625,
        "greedy": 0.875,
        "reward": 0.375,
        "pass@k": 0.75,
        "k": 4,
        "num_prompts": 20,
    },
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory to run sweeps in, within this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return tmp_path


def read_rows(folder):
    with (folder / "sweep.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def succeed(cfg, run_dir):
    (run_dir / "summary.json").write_text(json.dumps({"status": "completed", "error": None, "eval": EVAL}))


def nothing(cfg, run_dir):
    """A job that leaves no summary."""


def test_a_job_is_a_row_of_its_figures(here):
    assert launch(succeed, "sync", [*SWEEP, "mode=sync", "train.topk_size=1,2"]) == 0
    first, second = read_rows(here / "sweep")
    assert tuple(first) == COLUMNS
    assert (first["job"], second["job"]) == ("0", "1")
    assert first["overrides"] == "mode=sync train.topk_size=1"
    assert (first["status"], first["error"]) == ("completed", "")
    assert {(evaluation, figure): float(first[f"{evaluation}_{figure}"]) for evaluation in EVALUATIONS
            for figure in FIGURES} == {
        (evaluation, figure): EVAL[evaluation][figure] for evaluation in EVALUATIONS for figure in FIGURES
    }  # fmt: skip
    assert float(first["seconds"]) >= 0
    assert second["run_dir"] == str(here / "sweep" / "1")


def test_the_table_is_on_disk_before_the_next_job_begins(here):
    seen = []

    def main(cfg, run_dir):
        path = here / "sweep" / "sweep.csv"
        seen.append([row["overrides"] for row in read_rows(path.parent)] if path.exists() else None)

    assert launch(main, "sync", [*SWEEP, "seed=1,2,3"]) == 0
    assert seen == [None, ["seed=1"], ["seed=1", "seed=2"]]
    assert sorted(path.name for path in (here / "sweep").iterdir() if path.is_file()) == ["multirun.yaml", "sweep.csv"]


def test_jobs_that_fail_or_are_refused_are_rows_and_the_others_run(here):
    def main(cfg, run_dir):
        if cfg.train.topk_size == 2:
            raise ZeroDivisionError("no reward\n  today")
        if cfg.train.topk_size == 3:
            raise UserError("The data are empty: give others.")
        succeed(cfg, run_dir)

    assert launch(main, "sync", [*SWEEP, "train.topk_size=2,9,3,4"]) == 1
    rows = read_rows(here / "sweep")
    assert [row["status"] for row in rows] == ["failed", "failed", "failed", "completed"]
    failing, refused, empty, completed = [row["error"] for row in rows]
    assert failing == "ZeroDivisionError: no reward today"
    assert refused.startswith("UserError: train.topk_size (9) cannot exceed env.repeats (8)")
    assert empty == "UserError: The data are empty: give others."
    assert completed == ""
    assert [row["after_pass@1"] for row in rows] == ["", "", "", "0.5"]


def test_the_error_is_that_of_the_summary_which_knows_the_process_it_comes_from(here):
    def main(cfg, run_dir):
        summary = {"status": "failed", "error": "KeyError: 'tokens'", "eval": {"before": EVAL["before"]}}
        (run_dir / "summary.json").write_text(json.dumps(summary))
        raise RuntimeError("ray::train_process() (pid=1)")

    assert launch(main, "sync", [*SWEEP, "seed=1"]) == 1
    [row] = read_rows(here / "sweep")
    assert (row["status"], row["error"]) == ("failed", "KeyError: 'tokens'")
    assert (row["before_greedy"], row["after_greedy"]) == ("0.5", "")


def test_ctrl_c_ends_the_sweep_and_the_job_is_a_row(here, capsys):
    jobs = []

    def main(cfg, run_dir):
        jobs.append(cfg.seed)
        succeed(cfg, run_dir)
        if cfg.seed == 2:
            raise KeyboardInterrupt

    assert launch(main, "sync", [*SWEEP, "seed=1,2,3"]) == 130
    assert jobs == [1, 2]
    assert [(row["status"], row["error"]) for row in read_rows(here / "sweep")] == [
        ("completed", ""),
        ("interrupted", ""),
    ]
    assert re.search(r"1 +seed=2 +interrupted", capsys.readouterr().out)


def test_the_table_is_printed_at_the_end(here, capsys):
    def main(cfg, run_dir):
        assert "pass@1" not in capsys.readouterr().out
        if cfg.train.topk_size == 2 and cfg.seed == 5:
            raise RuntimeError("engine died " + "in the night " * 20)
        succeed(cfg, run_dir)

    assert launch(main, "sync", [*SWEEP, "train.kl_to_ref_coeff=0.5", "train.topk_size=1,2", "seed=5,10"]) == 1
    figures, header, *rows, error, path = capsys.readouterr().out.splitlines()[-8:]
    assert figures.split() == ["pass@1", "reward"]
    assert header.split() == ["job", "overrides", "status", *["before", "after", "best"] * 2, "seconds"]
    assert [row.split()[:-1] for row in rows] == [
        ["0", "train.topk_size=1", "seed=5", "completed", "0.250", "0.500", "0.625", "0.125", "0.250", "0.375"],
        ["1", "train.topk_size=1", "seed=10", "completed", "0.250", "0.500", "0.625", "0.125", "0.250", "0.375"],
        ["2", "train.topk_size=2", "seed=5", "failed", *["-"] * 6],
        ["3", "train.topk_size=2", "seed=10", "completed", "0.250", "0.500", "0.625", "0.125", "0.250", "0.375"],
    ]
    ends = {len(line) for line in (header, *rows)}
    assert len(ends) == 1  # aligned
    assert re.fullmatch(r"job 2: RuntimeError: engine died in the night.* \.\.\.", error)
    assert path == f"Sweep: {here / 'sweep' / 'sweep.csv'}"


def test_a_sweep_of_one_job_shows_all_overrides(here, capsys):
    assert launch(succeed, "sync", [*SWEEP, "seed=3"]) == 0
    assert re.search(r"0 +seed=3 +completed", capsys.readouterr().out)


def test_a_single_run_makes_no_table(here, capsys):
    assert launch(succeed, "sync", ["--config-name", "ei_tiny", "hydra.run.dir=run"]) == 0
    assert capsys.readouterr().out == ""
    assert list(here.rglob("sweep.csv")) == []


def test_a_directory_that_holds_a_sweep_is_refused_and_kept(here):
    assert launch(succeed, "sync", [*SWEEP, "seed=1,2"]) == 0
    before = (here / "sweep" / "sweep.csv").read_text()
    jobs = []
    with pytest.raises(SystemExit, match=r"Error: .*/sweep holds a sweep already: give another hydra\.sweep\.dir"):
        launch(lambda cfg, run_dir: jobs.append(cfg), "sync", [*SWEEP, "seed=1,2"])
    assert jobs == []
    assert (here / "sweep" / "sweep.csv").read_text() == before


def test_figures_of_an_earlier_run_in_the_directory_are_not_a_job_s(here):
    (here / "sweep" / "0").mkdir(parents=True)
    succeed(None, here / "sweep" / "0")

    def refuse(cfg, run_dir):
        raise UserError("The run directory holds a run already.")

    assert launch(refuse, "sync", [*SWEEP, "seed=1"]) == 1
    [row] = read_rows(here / "sweep")
    assert (row["status"], row["after_pass@1"]) == ("failed", "")


def test_jobs_of_a_sweep_share_a_group_of_its_own(here):
    groups = []

    def main(cfg, run_dir):
        groups.append(cfg.logging.group)

    arguments = ["--config-name", "ei_tiny", "--multirun", "seed=1,2"]
    assert launch(main, "sync", arguments) == 0
    [sweep] = (here / "multirun").glob("*/*")
    assert groups == [f"sweep-{sweep.parent.name}-{sweep.name}"] * 2
    assert re.fullmatch(r"sweep(-\d+){6}", groups[0])


def test_a_group_that_is_given_stays(here):
    groups = []

    def main(cfg, run_dir):
        groups.append(cfg.logging.group)

    assert launch(main, "sync", [*SWEEP, "seed=1,2", "logging.group=mine"]) == 0
    assert launch(main, "sync", ["--config-name", "ei_tiny"]) == 0
    assert groups == ["mine", "mine", None]


@pytest.mark.parametrize(
    ("directory", "group"),
    [("/a/multirun/2026-11-25/10-00-00", "sweep-2026-11-25-10-00-00"), ("/sweep22", "sweep-sweep22")],
)
def test_a_group_is_named_after_the_sweep_s_directory(directory, group):
    assert group_of(Path(directory)) == group


def test_both_scripts_sweep_over_selection_and_penalty(here):
    jobs = []

    def main(cfg, run_dir):
        jobs.append((cfg.train.topk_size, cfg.train.kl_to_ref_coeff))

    for mode in ("sync", "async"):
        arguments = [*SWEEP, f"hydra.sweep.dir={mode}", "train.topk_size=1,2", "train.kl_to_ref_coeff=0.1,0.5"]
        assert launch(main, mode, arguments) == 0
        assert len(read_rows(here / mode)) == 4
    assert jobs == [(1, 0.1), (1, 0.5), (2, 0.1), (2, 0.5)] * 2


def test_a_failed_job_holds_nothing_that_the_next_needs(here):
    """An error's traceback keeps alive what the functions held that it went through: data, handles on actors."""
    import weakref

    class Data:
        pass

    held = []

    def main(cfg, run_dir):
        assert [reference() for reference in held] == [None] * len(held)
        data = Data()
        held.append(weakref.ref(data))
        raise RuntimeError("engine died")

    assert launch(main, "sync", [*SWEEP, "seed=1,2,3"]) == 1
    assert len(held) == 3
    assert [row["error"] for row in read_rows(here / "sweep")] == ["RuntimeError: engine died"] * 3


# --- real sweeps ---


def start_sweep(sweep_dir, *overrides):
    return Run(sweep_dir / "0", *SHORT, *LIGHT, "--multirun", f"hydra.sweep.dir={sweep_dir}", *overrides)


def wait_for_rows(sweep, sweep_dir, count):
    """Waits until so many jobs have ended; returns the processes that were seen meanwhile."""
    seen = set()
    while not ((sweep_dir / "sweep.csv").exists() and len(read_rows(sweep_dir)) == count):
        assert sweep.process.poll() is None, sweep.process.communicate()[0]
        seen.update(sweep.processes())
        time.sleep(0.2)
    return seen


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_runs_on_a_free_machine_after_one_that_failed_in_the_middle(tmp_path, warm_tiny_model):
    reward = tmp_path / "reward.py"
    # Fails in the first of the two jobs only, with everything started.
    reward.write_text(
        "from pathlib import Path\n\n\n"
        "def score(problems, responses):\n"
        "    try:\n"
        "        Path(__file__).with_name('failed').touch(exist_ok=False)\n"
        "    except FileExistsError:\n"
        "        return [float(len(set(text))) for text in responses]\n"
        "    raise ZeroDivisionError('no reward today')\n"
    )
    sweep_dir = tmp_path / "sweep"
    sweep = start_sweep(sweep_dir, "train.topk_size=1,2", f"reward.fn={reward}:score")
    seen = wait_for_rows(sweep, sweep_dir, 1)
    assert len(seen) > 4  # the trainer, the engine, the collector, the reference and what belongs to Ray
    assert [process for process in seen & set(sweep.processes()) if process.pid != sweep.process.pid] == []
    sweep.wait()
    assert sweep.process.returncode == 1, sweep.output
    failed, completed = read_rows(sweep_dir)
    assert (failed["status"], completed["status"]) == ("failed", "completed"), sweep.output
    assert failed["error"] == "ZeroDivisionError: no reward today"
    assert completed["after_reward"] == str(read_summary(sweep_dir / "1")["eval"]["after"]["reward"])
    assert re.search(r"0 +train.topk_size=1 +failed", sweep.output)
    assert sweep.processes_left() == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_over_selection_and_penalty_gives_the_runs_it_is_made_of(tmp_path, warm_tiny_model):
    sweep_dir = tmp_path / "sweep"
    sweep = start_sweep(sweep_dir, "train.topk_size=1,2", "train.kl_to_ref_coeff=0.1,0.5").wait()
    assert sweep.process.returncode == 0, sweep.output
    rows = read_rows(sweep_dir)
    assert [row["status"] for row in rows] == ["completed"] * 4
    for row in rows:
        evaluations = read_summary(Path(row["run_dir"]))["eval"]
        assert [row[f"{when}_{figure}"] for when in EVALUATIONS for figure in FIGURES] == [
            str(evaluations[when][figure]) for when in EVALUATIONS for figure in FIGURES
        ]
    metrics = [without_times(read_jsonl(sweep_dir / str(job) / "metrics.jsonl")) for job in range(4)]
    assert all(metrics[job] != metrics[other] for job in range(4) for other in range(job))
    # The last job is what the same command gives alone: nothing of the first three has reached it.
    alone = Run(tmp_path / "alone", *SHORT, *LIGHT, "train.topk_size=2", "train.kl_to_ref_coeff=0.5").wait()
    assert without_times(alone.metrics) == metrics[3]
    assert sweep.processes_left() == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_in_a_later_job_ends_the_sweep_with_its_table(tmp_path, warm_tiny_model):
    sweep_dir = tmp_path / "sweep"
    sweep = start_sweep(sweep_dir, "seed=1,2,3")
    wait_for_rows(sweep, sweep_dir, 1)
    while not (sweep_dir / "1" / "metrics.jsonl").exists():
        assert sweep.process.poll() is None, sweep.process.communicate()[0]
        time.sleep(0.2)
    os.killpg(sweep.process.pid, signal.SIGINT)
    sweep.wait()
    assert sweep.process.returncode == 130, sweep.output
    assert [row["status"] for row in read_rows(sweep_dir)] == ["completed", "interrupted"]
    assert re.search(r"1 +seed=2 +interrupted", sweep.output)
    assert sweep.processes_left() == []
