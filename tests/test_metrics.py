"""The run's sink: what reaches metrics.jsonl, samples.jsonl and W&B, and that nothing is lost on the way."""

import json
import math
import os
import queue
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from expert_iteration.cli import compose_config
from expert_iteration.config import LoggingMode
from expert_iteration.learner import StepResult
from expert_iteration.metrics import Metrics, plain, summarize, timeit, timings
from expert_iteration.resolve import resolve_config
from expert_iteration.wandb_logger import make_loggers, wandb_mode, wandb_run_name

ROOT = Path(__file__).resolve().parent.parent
ROWS = [
    {
        "prompt": "2+2?",
        "answer": "#### 4",
        "responses": [
            {"text": "<answer>4</answer>", "reward": 1.0, "correct": True, "kept": True},
            {"text": "I don't know\u2028", "reward": float("nan"), "correct": False, "kept": False},
        ],
    },
    {"prompt": "3+3?", "responses": [{"text": "6", "reward": 0.1}]},
]


class FakeLogger:
    def __init__(self):
        self.metrics, self.samples, self.closed = [], [], 0

    def log_metrics(self, metrics, step):
        self.metrics.append((dict(metrics), step))

    def log_samples(self, rows, step, split):
        self.samples.append((len(rows), step, split))

    def close(self):
        self.closed += 1


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def read_lines(path):
    return [json.loads(line, parse_constant=refuse_constant) for line in path.read_text().splitlines()]


def make_metrics(run_dir, logging_frequency=1, log_queue=None):
    logger = FakeLogger()
    ticks = iter(range(1000))
    metrics = Metrics(
        run_dir,
        loggers=[logger],
        log_queue=log_queue,
        logging_frequency=logging_frequency,
        clock=lambda: next(ticks) + 0.12345,
    )
    return metrics, logger


def step_result(step, **values):
    return StepResult({**values, "learning_rate": step * 0.1}, stepped=True, step=step, since=step - 1)


def load_config(*overrides):
    return resolve_config(compose_config("ei_tiny", overrides=overrides), "sync")


@pytest.fixture(autouse=True)
def no_timings_of_other_tests():
    """TorchRL's timings belong to the whole process."""
    timings()


def test_a_line_is_on_disk_at_once_and_reaches_the_logger(tmp_path):
    metrics, logger = make_metrics(tmp_path)
    metrics.log({"eval/pass@1": 0.5, "buffer/write_count": 7}, step=3)
    metrics.log({"eval/pass@1": 0.75}, step=3)
    first, second = read_lines(tmp_path / "metrics.jsonl")
    assert first == {"step": 3, "time": 0.123, "eval/pass@1": 0.5, "buffer/write_count": 7}
    assert second == {"step": 3, "time": 1.123, "eval/pass@1": 0.75}
    assert logger.metrics == [({"eval/pass@1": 0.5, "buffer/write_count": 7}, 3), ({"eval/pass@1": 0.75}, 3)]


def test_lines_are_valid_json_whatever_the_numbers(tmp_path):
    metrics, _ = make_metrics(tmp_path)
    metrics.log(
        {"a/nan": math.nan, "a/inf": -math.inf, "a/tensor": torch.tensor(0.5), "a/numpy": np.int64(3), "a/int": 2},
        step=0,
    )
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line == {"step": 0, "time": 0.123, "a/nan": None, "a/inf": None, "a/tensor": 0.5, "a/numpy": 3, "a/int": 2}
    assert isinstance(line["a/numpy"], int)


def test_plain_values_are_those_that_json_knows():
    found = plain(
        {"eval": {"k": np.int64(4), "reward": math.nan}, "rates": (torch.tensor(0.5), math.inf), "error": None}
    )
    assert found == {"eval": {"k": 4, "reward": None}, "rates": [0.5, None], "error": None}
    assert plain([True, "NaN", 2]) == [True, "NaN", 2]
    assert plain(True) is True


def test_a_second_sink_continues_the_file(tmp_path):
    for step in (1, 2):
        metrics, _ = make_metrics(tmp_path)
        metrics.log({"a/b": 1.0}, step=step)
        metrics.close()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_the_default_clock_starts_with_the_sink(tmp_path):
    metrics = Metrics(tmp_path, loggers=[], logging_frequency=1)
    time.sleep(0.02)
    metrics.log({"a/b": 1.0}, step=1)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert 0.02 <= line["time"] < 5


def test_training_writes_means_and_loses_nothing(tmp_path):
    metrics, _ = make_metrics(tmp_path, logging_frequency=2)
    metrics.training(step_result(1, loss=1.0), **{"buffer/reward": 0.5}, optim_step=0)
    assert read_lines(tmp_path / "metrics.jsonl") == []
    metrics.training(step_result(2, loss=3.0, grad_norm=0.25), **{"buffer/reward": 1.0}, optim_step=1)
    metrics.training(step_result(3, loss=5.0), policy_age=2.0)
    metrics.close()
    full, rest = read_lines(tmp_path / "metrics.jsonl")
    assert full == {
        "step": 2,
        "time": 0.123,
        "train/loss": 2.0,
        "train/grad_norm": 0.25,  # of the only step that has one
        "learning_rate": 0.2,
        "buffer/reward": 0.75,
        "optim_step": 1,
    }
    assert rest == {"step": 3, "time": 1.123, "train/loss": 5.0, "learning_rate": 3 * 0.1, "train/policy_age": 2.0}


def test_summarize_takes_means_of_measurements_and_the_last_of_counts():
    records = [
        {"train/loss": 1.0, "buffer/write_count": 16, "train/bad_steps": 0},
        {"train/loss": 2.0, "buffer/write_count": 32, "train/bad_steps": 1},
    ]
    assert summarize(records) == {"train/loss": 1.5, "buffer/write_count": 32, "train/bad_steps": 1}


def test_summarize_takes_the_last_of_what_was_dropped_and_the_greatest_of_the_oldest():
    names = ("buffer/dropped_too_old", "train/max_policy_age", "train/policy_age", "train/kl_to_ref_coeff")
    rows = [(0, 3, 0, 0.9), (10, 0, 3, 0.6), (13, 0, 0, 0.3)]
    records = [dict(zip(names, row, strict=True)) for row in rows]
    assert summarize(records) == dict(zip(names, (13, 3, 1, 0.3), strict=True))


def test_drain_logs_every_waiting_record(tmp_path):
    log_queue = queue.Queue()
    metrics, logger = make_metrics(tmp_path, log_queue=log_queue)
    metrics.drain(step=1)
    for reward in (0.1, 0.2, 0.3):
        log_queue.put({"collector/rewards/mean": reward})
    log_queue.put({"collector/rewards/mean": 0.9, "collector/dropped_records": 4})
    metrics.drain(step=2)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["collector/rewards/mean"] for line in lines] == [0.1, 0.2, 0.3, 0.9]
    assert {line["step"] for line in lines} == {2}
    assert lines[-1]["collector/dropped_records"] == 4
    assert len(logger.metrics) == 4


def test_drain_without_a_queue_does_nothing(tmp_path):
    metrics, _ = make_metrics(tmp_path)
    metrics.drain(step=1)
    assert read_lines(tmp_path / "metrics.jsonl") == []


def test_samples_are_one_line_a_prompt(tmp_path):
    metrics, logger = make_metrics(tmp_path)
    metrics.samples(ROWS, step=5, split="heldout")
    metrics.samples([], step=6, split="train")
    first, second = read_lines(tmp_path / "samples.jsonl")
    assert list(first) == ["step", "split", "prompt", "answer", "responses"]
    assert (first["step"], first["split"], first["answer"]) == (5, "heldout", "#### 4")
    assert first["responses"][0] == {"text": "<answer>4</answer>", "reward": 1.0, "correct": True, "kept": True}
    assert first["responses"][1]["reward"] is None
    assert second == {"step": 5, "split": "heldout", **ROWS[1]}
    assert logger.samples == [(2, 5, "heldout")]


def test_rewards_of_an_evaluation_are_one_line(tmp_path):
    metrics, _ = make_metrics(tmp_path)
    metrics.rewards([1.0, 0.1, float("nan")], step=5)
    metrics.rewards([0.5], step=9)
    assert read_lines(tmp_path / "eval_rewards.jsonl") == [
        {"step": 5, "rewards": [1.0, 0.1, None]},
        {"step": 9, "rewards": [0.5]},
    ]


def test_close_flushes_and_ends_the_loggers_once(tmp_path):
    metrics, logger = make_metrics(tmp_path, logging_frequency=10)
    metrics.training(step_result(1, loss=1.0))
    metrics.close()
    metrics.close()
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1
    assert logger.closed == 1


def test_timings_are_means_per_call_since_the_last_look():
    timings()
    for _ in range(2):
        with timeit("push"):
            time.sleep(0.01)
    first = timings()
    assert 0.01 <= first["timeit/push"] < 1  # one call's, not the sum; generous above: the machine is shared
    assert "timeit/push" not in timings()


def test_no_logger_when_none_is_wanted(tmp_path):
    for override in ("logging.backend=none", "logging.mode=disabled"):
        assert make_loggers(load_config(override), tmp_path, "sync") == []
    assert list(tmp_path.iterdir()) == []


def test_run_names():
    assert wandb_run_name(load_config(), "sync") == "ei-sync-tiny-tiny"
    cfg = load_config("logging.experiment_name=first", "model.name=Qwen/Qwen2.5-3B")
    assert wandb_run_name(cfg, "async") == "ei-async-first-tiny-Qwen2.5-3B"


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k"}, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ({"NETRC": "login"}, "online"),
        ({"NETRC": "login", "WANDB_BASE_URL": "https://wandb.example.org"}, "offline"),
    ],
)
def test_the_mode_follows_the_login(environment, mode, monkeypatch, tmp_path):
    (tmp_path / "login").write_text("machine api.wandb.ai\n  login user\n  password k\n")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "no such file")
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(None) == mode
    assert wandb_mode(LoggingMode.online) == "online"


WANDB_RUN = """
import json, sys
from pathlib import Path
from expert_iteration import wandb_logger
from expert_iteration.cli import compose_config
from expert_iteration.errors import UserError
from expert_iteration.metrics import Metrics
from expert_iteration.resolve import resolve_config
from expert_iteration.wandb_logger import make_loggers

def load(*options):
    return resolve_config(compose_config("ei_tiny", overrides=options), "sync")

run_dir, rows = Path(sys.argv[1]), json.loads(sys.argv[2])
options = ("logging.experiment_name=first", "logging.group=g", "logging.tags=[a,b]", "logging.entity=e")
loggers = make_loggers(load("logging.mode=offline", *options), run_dir, "sync")
metrics = Metrics(run_dir, loggers=loggers, logging_frequency=1)
for step, reward in ((0, 0.1), (4, 0.2), (4, 0.3), (4, float("nan")), (2, 0.5)):
    metrics.log({"collector/rewards/mean": reward, "learning_rate": 1e-4}, step=step)
metrics.samples(rows, step=4, split="heldout")
metrics.samples(rows[1:], step=4, split="train")
metrics.close()

wandb_logger.WANDB_TIMEOUT = 1
try:
    make_loggers(load("logging.mode=online"), run_dir, "sync")
except UserError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory):
    """Another process's offline run, then an attempt to go online: what it printed, and the first run's records."""
    run_dir = tmp_path_factory.mktemp("run")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(run_dir / "home"), "NETRC": str(run_dir / "no file"), "PYTHONPATH": str(ROOT)}
    # A key, and a server that is not there: the discard port, where nobody listens.
    environment |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", WANDB_RUN, str(run_dir), json.dumps(ROWS)]
    done = subprocess.run(command, env=environment, cwd=run_dir, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    return done.stdout + done.stderr, read_wandb_records(path), path.parent


def read_wandb_records(path):
    """W&B's offline file: 7 bytes of magic, then LevelDB's log format in blocks of 32 KiB, a protobuf a record."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, records = path.read_bytes(), 7, [], []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<4xHB", data[at : at + 7])
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(b"".join(parts)))
            parts = []
    return records


def history(records):
    """The logged rows by name; a table's parts have a dot before their own name."""
    rows = [record.history.item for record in records if record.history.item]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def test_wandb_prints_nothing_and_an_unreachable_server_is_refused_with_a_remedy(wandb_run):
    assert re.fullmatch(r"W&B cannot log online \(.*\): use logging\.mode=offline, .*\n", wandb_run[0])


def test_wandb_keeps_every_line_also_when_steps_repeat_or_go_back(wandb_run):
    rows = [row for row in history(wandb_run[1]) if "collector/rewards/mean" in row]
    assert [row["collector/rewards/mean"] for row in rows] == [0.1, 0.2, 0.3, pytest.approx(math.nan, nan_ok=True), 0.5]
    assert [row["collector/rewards/step"] for row in rows] == [0, 4, 4, 4, 2]
    numbers = [record.history.step.num for record in wandb_run[1] if record.history.item]
    assert numbers == sorted(set(numbers))  # W&B's own count of rows: it drops what does not rise


def test_wandb_has_the_tables_and_a_text(wandb_run):
    rows = history(wandb_run[1])
    (path,) = [row["samples/heldout.path"] for row in rows if "samples/heldout.path" in row]
    content = json.loads((wandb_run[2] / "files" / path).read_text())
    assert content["columns"] == ["step", "split", "prompt", "response", "reward", "kept"]
    assert content["data"][0] == [4, "heldout", "2+2?", "<answer>4</answer>", 1.0, True]
    assert content["data"][2] == [4, "heldout", "3+3?", "6", 0.1, None]
    texts = [row["history"] for row in rows if "history" in row]
    assert texts[0] == "2+2?\n\n<answer>4</answer>\n\nreward: 1.0"


def test_wandb_run_is_named_and_carries_the_configuration(wandb_run):
    (run,) = [record.run for record in wandb_run[1] if record.HasField("run")]
    assert (run.project, run.display_name) == ("ei-sync", "ei-sync-first-tiny-tiny")
    assert (run.entity, run.run_group, list(run.tags)) == ("e", "g", ["a", "b"])
    updates = [update for record in wandb_run[1] for update in (*record.run.config.update, *record.config.update)]
    config = {item.key: json.loads(item.value_json) for item in updates}  # the last one counts
    assert config["env"]["repeats"] == 8  # not TorchRL's list of packages, which it would store under the same name
    assert config["train"]["selection"] == "above_median"
    assert any(record.HasField("exit") for record in wandb_run[1])  # finished
