"""`expert_iteration.evaluation_alone`: what it leaves in a run directory, and that it repeats a run's final figures."""

import json
import time
from types import SimpleNamespace

import pytest
from local_runs import LocalPool, run_algorithm

import ei_utils
from expert_iteration import evaluation_alone
from expert_iteration.devices import compute_device_allocation
from expert_iteration.evaluation import Evaluator
from expert_iteration.evaluation_alone import evaluate_alone
from expert_iteration.export import Exporter
from expert_iteration.interruption import Interrupted, StopRequest
from expert_iteration.policy_reader import PolicyReader
from expert_iteration.tasks import load_task

OVERRIDES = (
    "inference_model.backend=transformers",
    "env.num_envs=32",
    "train.dialog_turns_per_batch=32",
    "train.total_dialog_turns=32",
    "train.optim_batch_size=4",
    "optimizer.lr=1e-3",
    "eval.num_prompts=12",
    "logging.backend=none",
)


class FakePool(LocalPool):
    """An engine of this process where a run has an actor."""

    actors, waiting = (), None

    def wait_until_ready(self, say, check):
        say("waiting")

    def describe(self):
        return "idle"


class FakeScreen:
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    """A function that evaluates alone with an engine of this process; what is on the screen, and the run directory."""

    def start(cfg, stop=None):
        engine = ei_utils.make_engine(cfg, compute_device_allocation(cfg, 0))
        monkeypatch.setattr(ei_utils, "get_inference_model", lambda *args: FakePool(engine))
        monkeypatch.setattr(evaluation_alone, "stop_actors", lambda actors: None)
        screen, begin = FakeScreen(), SimpleNamespace(task=load_task(cfg), started=time.time())
        evaluate_alone(cfg, begin, tmp_path, None, screen, stop or StopRequest())
        return screen

    return start


def test_what_a_run_left_scores_as_it_did_at_its_end(make_cfg, load_script, warm_tiny_model, evaluate, tmp_path):
    cfg = make_cfg(f"model.name={warm_tiny_model}", *OVERRIDES)
    engine = ei_utils.make_engine(cfg, compute_device_allocation(cfg, 0))
    run = run_algorithm(load_script("expert-iteration-sync"), cfg, LocalPool(engine), tmp_path / "run")
    exporter = Exporter(cfg, run.policy, ei_utils.get_tokenizer(cfg), PolicyReader())
    exporter.export(tmp_path / "last", card="")
    # Collecting nothing, it is not of the same lengths.
    screen = evaluate(make_cfg("eval.only=true", f"model.name={tmp_path / 'last'}", *OVERRIDES, "env.repeats=4"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    final = run.summary["eval"]["after"]
    assert final != run.summary["eval"]["before"]
    assert summary["eval"] == {"before": final, "after": final, "best": final}
    assert summary["status"] == "completed"
    assert {summary[name] for name in ("gradient_steps", "dialog_turns", "weight_pushes", "policy_version")} == {0}
    (line,) = (json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["eval/pass@1"] == final["pass@1"]
    samples = [json.loads(text) for text in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [len(sample["responses"]) for sample in samples] == [4] * cfg.logging.num_samples
    assert "pass@1" in screen.lines[-1]


def test_what_goes_wrong_is_in_the_summary(make_cfg, tiny_folder, evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(FakePool, "sample", lambda *args: 1 / 0)
    closed = []
    monkeypatch.setattr(Evaluator, "close", lambda evaluator: closed.append(evaluator))
    with pytest.raises(ZeroDivisionError):
        evaluate(make_cfg(f"model.name={tiny_folder}", *OVERRIDES))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["eval"]) == ("failed", {})
    assert "division by zero" in summary["error"]
    assert len(closed) == 1  # or the judge's workers would live on


def test_one_that_is_asked_to_stop_is_interrupted(make_cfg, tiny_folder, evaluate, tmp_path, monkeypatch):
    def ask(pool, *args):
        pool.waiting.check()

    stop = StopRequest()
    stop.signum = 15
    monkeypatch.setattr(FakePool, "sample", ask)
    with pytest.raises(Interrupted):
        evaluate(make_cfg(f"model.name={tiny_folder}", *OVERRIDES), stop)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "interrupted"


def test_an_engine_that_is_only_evaluated_has_no_adapters(make_cfg, tiny_folder):
    lora = ("train_model.lora.enabled=true", "weight_update.lora_only=true")
    cfg = make_cfg(f"model.name={tiny_folder}", "eval.only=true", *lora, *OVERRIDES)
    engine = ei_utils.make_engine(cfg, compute_device_allocation(cfg, 0))
    assert not [name for name, _ in engine._model.named_parameters() if "lora" in name]
