"""Whole runs in which every model has several devices, which on a CPU are processes; and runs with adapters."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from whole_runs import LIGHT, Run, shown

pytestmark = pytest.mark.timeout(900)

# The published command line, on a CPU.
TWO_EACH = ("train_model.num_devices=2", "ref_model.num_devices=2", "inference_model.num_devices=2", "device=cpu")
TWO_BATCHES = ("train.total_dialog_turns=512", "eval.num_prompts=20", "eval.frequency=0", "logging.backend=none")


def check(run):
    """What a completed run of two batches leaves, whatever it ran on."""
    assert run.process.returncode == 0, run.output
    summary = run.summary
    assert (summary["status"], summary["dialog_turns"]) == ("completed", 512)
    assert summary["optimizer_steps"] > 0
    assert summary["weight_pushes"] == summary["policy_version"] >= 2
    assert summary["max_probe_logprob_diff"] < 1e-3
    assert AutoModelForCausalLM.from_pretrained(run.dir / "last")
    assert run.processes_left() == []


def test_two_engines_two_references_and_two_ranks(tmp_path, warm_tiny_model):
    run = Run(
        tmp_path / "run",
        *(*TWO_BATCHES, *LIGHT, "train_model.num_devices=2", "train_model.parallel=fsdp", "ref_model.num_devices=2"),
        *("inference_model.num_replicas=2", "train.optim_batch_size=8"),
    ).wait()
    check(run)
    logs = {path.stem for path in (run.dir / "logs").iterdir()}
    assert logs >= {"engine-0", "engine-1", "reference-0", "reference-1", "trainer", "trainer-1", "collector"}
    for index in (0, 1):
        assert shown(run.metrics, f"weights/engine_version/{index}")[-1] == run.summary["policy_version"]
    # 16 rows a gradient step, 8 on each rank.
    steps = run.summary["gradient_steps"]
    assert shown(run.metrics, "train/data_read_count")[-1] == 2 * run.summary["responses_kept"]
    assert steps < run.summary["responses_kept"] * 2 / 8


@pytest.mark.slow
def test_adapters_are_trained_on_two_ranks_against_the_base_under_them(tmp_path, warm_tiny_model):
    run = Run(
        tmp_path / "run",
        *(*TWO_BATCHES, *LIGHT, "train_model.lora.enabled=true", "train_model.num_devices=2", "optimizer.lr=2e-3"),
        *("train.weight_update_frequency=5",),
        script="expert-iteration-async.py",
    ).wait()
    check(run)
    assert not (run.dir / "logs" / "reference.log").exists()
    assert shown(run.metrics, "train/kl_to_ref")[0] == pytest.approx(0, abs=1e-6)
    assert shown(run.metrics, "train/kl_to_ref")[-1] > 1e-4
    (checkpoint,) = (run.dir / "checkpoints").glob("*.pt")
    state = torch.load(checkpoint, weights_only=True)
    assert all("lora_" in name for name in state["model_state_dict"])
    assert json.loads((run.dir / "last" / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_published_command_line_runs_on_a_cpu(tmp_path, warm_tiny_model, mode):
    often = ("train.weight_update_frequency=3",) if mode == "async" else ()
    run = Run(tmp_path / "run", *TWO_BATCHES, *TWO_EACH, *often, script=f"expert-iteration-{mode}.py").wait()
    check(run)


@pytest.mark.slow
@pytest.mark.vllm
def test_adapters_travel_alone_to_vllm(tmp_path, warm_tiny_model):
    run = Run(
        tmp_path / "run",
        *(*TWO_BATCHES, "train_model.lora.enabled=true", "weight_update.lora_only=true", "optimizer.lr=2e-3"),
    ).wait()
    check(run)
    assert shown(run.metrics, "weights/bytes")[-1] < 1e6 < (run.dir / "last" / "model.safetensors").stat().st_size
