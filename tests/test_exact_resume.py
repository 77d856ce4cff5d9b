"""A run that was cut off and gone on with is the run that was not: equal metrics, samples and weights, bit by bit."""

import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch
from local_runs import LocalPool, run_algorithm
from whole_runs import REPO, without_times

from expert_iteration.checkpoint_files import list_folders, newest_whole, open_checkpoint
from expert_iteration.resume import rewind

pytestmark = pytest.mark.timeout(600)

SMALL = (
    "inference_model.backend=transformers",
    "train.total_dialog_turns=96",
    "train.dialog_turns_per_batch=32",
    "train.optim_batch_size=4",
    "inference_model.max_tokens=24",
    "eval.num_prompts=4",
    "eval.num_samples=2",
    "eval.frequency=2",
    "train.checkpoint_frequency=1",
    "train.keep_checkpoints=100",
    "logging.backend=none",
)
# What each case makes the next step depend on, beside weights and optimizer.
CASES = {
    "defaults": (),
    "adapters": (
        "train.gradient_accumulation_steps=2",
        "train.optim_batch_size=2",
        "train_model.lora.enabled=true",
        "train_model.lora.dropout=0.1",  # the trainer's random state
        "optimizer.lr=1e-3",
        "optimizer.scheduler.type=cosine_with_warmup",
    ),
    "engine behind the trainer": (
        "train.weight_update_frequency=2",
        "train.empty_replay_buffer=false",
        "train.buffer_size=40",
        "train.logging_frequency=3",  # a line of metrics under way
    ),
    "engine of adapters behind the trainer": (
        "train.weight_update_frequency=3",
        "train_model.lora.enabled=true",
        "weight_update.lora_only=true",
        "optimizer.lr=1e-3",
    ),
    "iterations from the start model": ("train.restart_from=base",),
    "a reference and a percentile that follow the run": (
        "ref_model.refresh_every=2",
        "expert_set.save=true",
        "train.selection=percentile",
        "train.selection_percentile=20",
        "train.selection_ties=random",
        "train.dedup=true",
        "train.min_reward=0.05",
    ),
    "random control": ("train.selection=random", "env.num_envs=4"),
    "prompts that are passed over": (
        "env.max_prompts=8",
        "env.repeats=4",
        "env.skip_solved=1",
        "env.skip_hopeless_after=1",
    ),
    "asynchronous": ("train.deterministic=true", "train.weight_update_frequency=3"),
}


def make_engine(cfg, tiny_folder):
    from expert_iteration.transformers_engine import TransformersEngine

    lora = cfg.train_model.lora if cfg.weight_update.lora_only else None
    return LocalPool(TransformersEngine(str(tiny_folder), cfg.inference_model, batch_size=32, lora=lora))


@pytest.fixture
def start(make_cfg, load_script, warm_tiny_model):
    """A function that runs a case in a directory, from a checkpoint on if one is given."""

    def start(case, run_dir, checkpoint=None, *more):
        mode = "async" if case == "asynchronous" else "sync"
        cfg = make_cfg(*SMALL, *CASES[case], *more, mode=mode)
        if checkpoint is not None:
            rewind(run_dir, checkpoint)
        script = load_script(f"expert-iteration-{mode}")
        return run_algorithm(script, cfg, make_engine(cfg, warm_tiny_model), run_dir, checkpoint)

    return start


def assert_equal_runs(run, whole, run_dir, whole_dir):
    assert without_times(run.lines) == without_times(whole.lines)
    assert (run_dir / "samples.jsonl").read_text() == (whole_dir / "samples.jsonl").read_text()
    weights = whole.policy.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in run.policy.state_dict().items())
    assert run.summary["eval"] == whole.summary["eval"]
    shards = [sorted((folder / "expert_set").glob("*.parquet")) for folder in (run_dir, whole_dir)]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_from_a_checkpoint_as_if_nothing_had_happened(case, start, tmp_path):
    whole = start(case, tmp_path / "whole")
    folders = list_folders(tmp_path / "whole" / "checkpoints")
    assert len(folders) > 3
    # In the middle of a batch, and where the next one begins; all of them were tried once.
    for folder in (folders[1], folders[len(folders) // 2]):
        run_dir = tmp_path / folder.name
        shutil.copytree(tmp_path / "whole", run_dir)
        checkpoint = open_checkpoint(run_dir / "checkpoints" / folder.name)
        checkpoint.verify()
        assert_equal_runs(start(case, run_dir, checkpoint), whole, run_dir, tmp_path / "whole")


def test_a_longer_run_goes_on_where_a_shorter_one_ended(start, tmp_path):
    start("defaults", tmp_path / "short", None, "train.total_dialog_turns=64", "eval.frequency=1")
    whole = start("defaults", tmp_path / "whole", None, "eval.frequency=1")
    checkpoint, _ = newest_whole(tmp_path / "short" / "checkpoints")
    longer = start("defaults", tmp_path / "short", checkpoint, "eval.frequency=1")
    assert_equal_runs(longer, whole, tmp_path / "short", tmp_path / "whole")


def run_until_killed(cfg, folder, run_dir, script_path):
    """What the killed process does: a run from the newest checkpoint that is whole, if there is one."""
    import importlib.util

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("script", script_path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    checkpoint, _ = newest_whole(run_dir / "checkpoints")
    if checkpoint is None:
        shutil.rmtree(run_dir, ignore_errors=True)
    else:
        rewind(run_dir, checkpoint)
    run_algorithm(script, cfg, make_engine(cfg, folder), run_dir, checkpoint)


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_ends_as_one_that_is_not(
    start, make_cfg, load_script, warm_tiny_model, tmp_path, monkeypatch
):
    more = ("train.total_dialog_turns=640", "train.checkpoint_frequency=2", "train.keep_checkpoints=2")
    whole = start("defaults", tmp_path / "whole", None, *more)
    run_dir = tmp_path / "killed"
    # A server that has loaded everything, of which each process is a copy: importing takes longer than the run.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (REPO, REPO / "tests"))))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["local_runs", "expert_iteration.transformers_engine", "test_exact_resume"])
    cfg = make_cfg(*SMALL, *more)
    script_path = load_script("expert-iteration-sync").__file__
    chance, kills, steps = random.Random(0), 0, []
    while True:
        process = context.Process(target=run_until_killed, args=(cfg, warm_tiny_model, run_dir, script_path))
        process.start()
        metrics = run_dir / "metrics.jsonl"
        if kills < 10:
            # From the moment at which it writes on, so that some steps are made whatever the machine does else.
            before = metrics.stat().st_size if metrics.exists() else 0
            deadline = time.monotonic() + 120
            while process.is_alive() and time.monotonic() < deadline:
                if metrics.exists() and metrics.stat().st_size > before + 200:
                    break
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.4))
            process.kill()
        process.join()
        checkpoint, _ = newest_whole(run_dir / "checkpoints")
        steps.append(0 if checkpoint is None else checkpoint.step)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills == 10
    # It was gone on with from several checkpoints, and not merely begun again.
    assert len(set(steps) - {0}) >= 3
    checkpoint, complaints = newest_whole(run_dir / "checkpoints")
    assert complaints == []
    saved = torch.load(checkpoint.weights, weights_only=True)["model_state_dict"]
    weights = whole.policy.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in saved.items())
    lines = [without_times(lines) for lines in (read(run_dir), whole.lines)]
    assert lines[0] == lines[1]


def read(run_dir):
    from expert_iteration.run_directory import read_jsonl

    return list(read_jsonl(run_dir / "metrics.jsonl"))
