"""Models of every well-known family go through both steps of the algorithm, and what is pushed arrives."""

import pyarrow.parquet
import pytest
from chat_tokenizers import THINKING, base_tokenizer, gemma_tokenizer, llama_tokenizer, qwen_base_tokenizer
from local_runs import LocalPool, run_algorithm
from model_families import FAMILIES, make_chat_folder, make_family_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from whole_runs import Run

import ei_utils
from expert_iteration.chat_template import PLAIN_TEMPLATE, chat_prompt_ids
from expert_iteration.policy_reader import PolicyReader

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


TOKENIZERS = {
    "chatml": (qwen_base_tokenizer, "<|im_end|>"),
    "thinking": (lambda: qwen_base_tokenizer(THINKING), "<|im_end|>"),
    "headers": (lambda: llama_tokenizer("<|end_of_text|>"), "<|eot_id|>"),
    "no template": (base_tokenizer, "</s>"),
    "no system prompt": (gemma_tokenizer, "<end_of_turn>"),
}


def brevity(folder):
    """Overrides for a run that prefers short responses, which are those that ended, and saves them."""
    (folder / "reward.py").write_text("def brevity(problems, responses):\n    return [-len(t) for t in responses]\n")
    return f"reward.fn={folder}/reward.py:brevity", "expert_set.save=true", "expert_set.token_ids=true"


def kept_rows(run_dir):
    files = (run_dir / "expert_set").iterdir()
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


def last_log_prob(model, ids):
    return PolicyReader().score(model, [ids])[0][-1]


@pytest.mark.parametrize("family", TOKENIZERS)
def test_what_ends_a_turn_ends_responses_and_is_trained(family, make_cfg, load_script, tmp_path):
    from expert_iteration.transformers_engine import TransformersEngine

    make_tokenizer, end = TOKENIZERS[family]
    folder = make_chat_folder(make_tokenizer(), tmp_path / "model")
    cfg = make_cfg(*TWO_BATCHES, *brevity(tmp_path), f"model.name={folder}", "train.epochs=4")
    engine = TransformersEngine(str(folder), cfg.inference_model, batch_size=8)
    run = run_algorithm(load_script("expert-iteration-sync"), cfg, LocalPool(engine), tmp_path / "run")
    tokenizer = ei_utils.get_tokenizer(cfg)
    end_id = tokenizer.convert_tokens_to_ids(end)
    kept = kept_rows(tmp_path / "run")
    ended = [row for row in kept if row["response_token_ids"][-1] == end_id]
    assert len(ended) > 0
    for row in kept:
        # The environment has put the prompt as evaluations and the probe do.
        assert row["prompt_token_ids"] == chat_prompt_ids(tokenizer, run.task.system_prompt, row["prompt"])
        assert end_id not in row["response_token_ids"][:-1]
        assert row["finish_reason"] == "stop" or end_id not in row["response_token_ids"]
    start = AutoModelForCausalLM.from_pretrained(folder)
    for row in ended:
        ids = row["prompt_token_ids"] + row["response_token_ids"]
        # Nats of the last token, which random weights give about 1 in 16.
        assert last_log_prob(run.policy, ids) - last_log_prob(start, ids) > 0.5


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


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_a_model_without_a_template_with_vllm(tmp_path):
    folder = make_chat_folder(base_tokenizer(), tmp_path / "model")
    run = Run(tmp_path / "run", *TWO_BATCHES, *brevity(tmp_path), f"model.name={folder}").wait()
    assert run.process.returncode == 0, run.output
    assert "note: the chat template is the plain one" in run.output
    assert run.summary["max_probe_logprob_diff"] < 1e-3
    last = AutoTokenizer.from_pretrained(run.dir / "last")
    assert last.chat_template == PLAIN_TEMPLATE
    assert last.get_vocab() == base_tokenizer().get_vocab()
    assert GenerationConfig.from_pretrained(run.dir / "last").eos_token_id == [last.eos_token_id]
    reasons = set()
    for row in kept_rows(run.dir):
        *ids, end = row["response_token_ids"]
        assert last.eos_token_id not in ids
        assert (end == last.eos_token_id) == (row["finish_reason"] == "stop")
        reasons.add(row["finish_reason"])
    assert "stop" in reasons
