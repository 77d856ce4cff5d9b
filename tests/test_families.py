"""Models of every well-known family go through both steps of the algorithm, and what is pushed arrives."""

import pytest
from local_runs import LocalPool, run_algorithm
from model_families import FAMILIES, make_family_folder
from whole_runs import Run

TWO_BATCHES = (
    "env.repeats=4",
    "env.num_envs=8",
    "train.dialog_turns_per_batch=8",
    "train.total_dialog_turns=16",
    "train.optim_batch_size=4",
    "optimizer.lr=1e-3",
    "eval.frequency=0",
    "eval.num_prompts=3",
    "eval.num_samples=1",
    "inference_model.max_tokens=12",
    "weight_update.probe_frequency=1",
    "logging.backend=none",
)
# Where the default kernel would leave something out.
ATTENTION = {
    "gemma-2": tuple(f"{model}_model.attn_implementation=eager" for model in ("train", "inference", "ref")),
}
# Random models are never right; this tells their responses apart.
REWARD = "def spread(problems, responses):\n    return [float(len(set(text))) for text in responses]\n"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "reward.py"
    path.write_text(REWARD)
    return f"reward.fn={path}:spread"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_iterations_with_every_push_probed(family, lora, overrides, tiny_folder, make_cfg, load_script, tmp_path):
    from expert_iteration.transformers_engine import TransformersEngine

    folder = make_family_folder(family, tiny_folder, tmp_path / "model")
    overrides = (*TWO_BATCHES, overrides, *ATTENTION.get(family, ()))
    cfg = make_cfg(*overrides, f"model.name={folder}", f"train_model.lora.enabled={str(lora).lower()}")
    engine = TransformersEngine(str(folder), cfg.inference_model, batch_size=8)
    run = run_algorithm(load_script("expert-iteration-sync"), cfg, LocalPool(engine), tmp_path / "run")
    assert run.summary["optimizer_steps"] > 0
    assert run.summary["weight_pushes"] == 2
    differences = [line["weights/probe_diff"] for line in run.lines if "weights/probe_diff" in line]
    assert len(differences) == 3  # at the start, and of each push
    assert max(differences) < 1e-3
    kl = [line["train/kl_to_ref"] for line in run.lines if "train/kl_to_ref" in line]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-6  # what was pushed was not what the engine had loaded


@pytest.mark.parametrize("lora_only", [False, True], ids=["merged", "alone"])
def test_a_base_in_four_bits(lora_only, overrides, tiny_folder, make_cfg, load_script, tmp_path):
    pytest.importorskip("bitsandbytes")
    from expert_iteration.transformers_engine import TransformersEngine

    cfg = make_cfg(
        *(*TWO_BATCHES, overrides, f"model.name={tiny_folder}", "train_model.lora.enabled=true"),
        *("train_model.quantization.enabled=true", f"weight_update.lora_only={str(lora_only).lower()}"),
    )
    lora = cfg.train_model.lora if lora_only else None
    engine = TransformersEngine(str(tiny_folder), cfg.inference_model, batch_size=8, lora=lora)
    run = run_algorithm(load_script("expert-iteration-sync"), cfg, LocalPool(engine), tmp_path / "run")
    differences = [line["weights/probe_mean_diff"] for line in run.lines if "weights/probe_mean_diff" in line]
    # Merged, the engine begins with the trainer's own rounded weights; alone, adapters sit on weights that are not.
    assert (run.summary["weight_pushes"], run.summary["policy_version"]) == ((2, 2) if lora_only else (2, 3))
    assert max(differences) < 1e-4 or (lora_only and 1e-3 < max(differences) < 0.2)
    kl = [line["train/kl_to_ref"] for line in run.lines if "train/kl_to_ref" in line]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-6


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_iterations_with_vllm(family, overrides, tiny_folder, tmp_path):
    folder = make_family_folder(family, tiny_folder, tmp_path / "model")
    overrides = (*TWO_BATCHES, overrides, *ATTENTION.get(family, ()))
    run = Run(tmp_path / "run", *overrides, f"model.name={folder}").wait()
    assert run.process.returncode == 0, run.output
    assert run.summary["weight_pushes"] == 2
    assert run.summary["max_probe_logprob_diff"] < 1e-3
