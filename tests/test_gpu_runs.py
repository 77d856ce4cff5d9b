"""Whole runs on an accelerator: one GPU is enough, which then holds every model."""

import pytest
from whole_runs import LIGHT, Run

from expert_iteration.accelerators import count_accelerators

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(count_accelerators() == 0, reason="no accelerator"),
]

ON_ONE_GPU = (
    *("device=cuda", "placement=colocated", "inference_model.kv_cache_gib=null"),
    *("inference_model.gpu_memory_utilization=0.3", "train.total_dialog_turns=1024", "eval.frequency=2"),
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["vllm", "transformers"])
@pytest.mark.parametrize("lora", ["true", "false"])
def test_the_tiny_model_learns_in_half_precision(tmp_path, warm_tiny_model, dtype, backend, lora):
    run = Run(
        tmp_path / "run",
        *ON_ONE_GPU,
        f"inference_model.backend={backend}",
        f"train_model.lora.enabled={lora}",
        f"optimizer.lr={'1e-3' if lora == 'true' else '2e-4'}",
        "train.mixed_precision=true",
        *(f"{model}_model.torch_dtype={dtype}" for model in ("train", "inference", "ref")),
    ).wait()
    assert run.process.returncode == 0, run.output
    before, after = run.summary["eval"]["before"], run.summary["eval"]["after"]
    # As on a CPU: 0.15 is four standard errors of 800 samples.
    assert after["pass@1"] > before["pass@1"] + 0.15
    assert run.processes_left() == []


def test_a_base_in_four_bits_is_trained_by_its_adapters(tmp_path, warm_tiny_model):
    pytest.importorskip("bitsandbytes")
    run = Run(
        tmp_path / "run",
        *(*ON_ONE_GPU, *LIGHT, "train_model.lora.enabled=true", "optimizer.lr=1e-3", "train.mixed_precision=true"),
        *("train_model.quantization.enabled=true", "train_model.torch_dtype=bfloat16"),
    ).wait()
    assert run.process.returncode == 0, run.output
    assert run.summary["weight_pushes"] > 0
