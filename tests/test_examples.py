"""The worked example of the README: its text is its files, and its command runs."""

import re
import shlex
import subprocess
import sys

import pytest
from local_runs import LocalPool, run_algorithm
from whole_runs import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("#### A worked example\n")[2].partition("\n### ")[0]
BLOCKS = dict(re.findall(r"```(\w+)\n(.*?)```", SECTION, re.DOTALL))
COMMAND = shlex.split(BLOCKS["bash"].replace("\\\n", " "))
SMALL = [
    "inference_model.backend=transformers",
    "logging.backend=none",
    "train.total_dialog_turns=256",
    "train.dialog_turns_per_batch=128",
    "eval.num_prompts=10",
    "eval.frequency=0",
]


def test_the_readme_shows_the_files_as_they_are():
    rows = (REPO / "extras/examples/questions.jsonl").read_text(encoding="utf-8")
    assert rows.startswith(BLOCKS["json"])
    source = (REPO / "extras/examples/right_and_brief.py").read_text(encoding="utf-8")
    assert source == BLOCKS["python"]
    assert source.count("\n") <= 20


def test_its_command_trains_on_its_questions_with_its_reward(make_cfg, load_script, warm_tiny_model, tmp_path):
    from expert_iteration.transformers_engine import TransformersEngine

    assert COMMAND[:2] == ["python", "expert-iteration-sync.py"]
    assert COMMAND[2:5] == ["mode=sync", "--config-name", "ei_tiny"]
    relative = [argument.replace("extras/", f"{REPO}/extras/") for argument in COMMAND[5:]]
    cfg = make_cfg(*relative, *SMALL)
    engine = LocalPool(TransformersEngine(str(warm_tiny_model), cfg.inference_model, batch_size=64))
    run = run_algorithm(load_script("expert-iteration-sync"), cfg, engine, tmp_path / "run")
    questions = {problem.question for problem in (*run.task.train, *run.task.heldout)}
    assert len(questions) == 300
    parts = [
        (line["collector/reward/right"], line["collector/reward/brief"])
        for line in run.lines
        if "collector/reward/right" in line
    ]
    means = [line["collector/rewards/mean"] for line in run.lines if "collector/rewards/mean" in line]
    assert len(parts) == 2
    assert all(0 < brief <= right < 1 for right, brief in parts)
    assert means == pytest.approx([right + 0.1 * brief for right, brief in parts], abs=1e-6)
    # An answer without its tag is right too, but not for this reward.
    assert 0 < run.summary["eval"]["after"]["reward/right"] <= run.summary["eval"]["after"]["pass@1"]
    assert run.summary["gradient_steps"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_command_runs_as_it_stands(tmp_path):
    command = [sys.executable, *COMMAND[1:], *SMALL, f"hydra.run.dir={tmp_path / 'run'}"]
    subprocess.run(command, cwd=REPO, check=True, timeout=500)
    assert (tmp_path / "run" / "report.html").is_file()
