"""`expert_iteration.model_card`: what a card says, and that its command is one."""

import re
import shlex

import pytest
import yaml

from expert_iteration.cli import compose_config, prepare_arguments
from expert_iteration.model_card import evaluation_command, model_card
from expert_iteration.resolve import resolve_config
from expert_iteration.tasks import Task

BEFORE = {"pass@1": 0.3, "pass@1_stderr": 0.02, "greedy": 0.4, "reward": 0.5, "pass@k": 0.7, "k": 4.0}
BEFORE |= {"num_prompts": 200.0, "response_length": 18.0, "truncation_rate": 0.0, "format_rate": 0.9}
AFTER = BEFORE | {"pass@1": 0.6, "pass@1_stderr": 0.03}
SUMMARY = {
    "mode": "sync",
    "dialog_turns": 4096,
    "responses_kept": 500,
    "gradient_steps": 64,
    "optimizer_steps": 32,
    "weight_pushes": 16,
    "seconds": 83.4,
    "eval": {"before": BEFORE, "after": AFTER, "best": AFTER},
}
TASK = Task("sums", "Be brief.", [], [], None, None, None)


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with the command line as Hydra notes it."""
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "hydra.yaml").write_text("hydra: {job: {config_name: ei_tiny}}")
    overrides = ["mode=sync", "seed=3", "train.topk_size=4", "eval.num_prompts=20", "hydra.run.dir=somewhere"]
    overrides += ["model.name=tiny", "logging.tags=[a b]", "+ray.init_config.num_cpus=2", "optimizer.lr=1e-3"]
    (tmp_path / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    return tmp_path


def header_of(card):
    return yaml.safe_load(card.split("---")[1])


def test_the_header_is_what_the_hub_reads(make_cfg, tmp_path):
    cfg = make_cfg("model.name=ORG/MODEL", "env.dataset=gsm8k", "train_model.lora.enabled=true")
    assert header_of(model_card(cfg, TASK, SUMMARY, tmp_path)) == {
        "base_model": "ORG/MODEL",
        "datasets": ["openai/gsm8k"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["expert-iteration", "lora"],
    }


def test_a_model_or_data_that_the_hub_does_not_know_is_not_in_the_header(make_cfg, tmp_path):
    assert header_of(model_card(make_cfg(), TASK, SUMMARY, tmp_path)).keys() == {
        "library_name",
        "pipeline_tag",
        "tags",
    }


def test_the_card_says_what_was_done_and_what_it_scores(make_cfg, run_dir):
    card = model_card(make_cfg("reward.fn=a.b:c"), TASK, SUMMARY, run_dir)
    assert "at most 2 are kept (the best of those above the median reward)" in card
    assert "> Be brief." in card
    assert "200 held-out prompts, 4 responses to each at temperature 1" in card
    assert "| pass@1 (sampled) | 0.300 ± 0.020 | 0.600 ± 0.030 |" in card
    assert "| pass@4 | 0.700 | 0.700 |" in card
    assert "| `optimizer.lr` | 0.0002 |" in card
    assert "| `reward.fn` | a.b:c |" in card
    assert "| optimizer_steps | 32 |" in card
    assert re.search(r"torch \d", card)


def test_the_control_and_adapters_are_named(make_cfg, run_dir):
    cfg = make_cfg("train.selection=random", "train_model.lora.enabled=true", "optimizer.lr=null")
    card = model_card(cfg, TASK, SUMMARY, run_dir)
    assert "(at random)" in card
    assert "LoRA, r 8, alpha 16" in card
    assert "| `optimizer.lr` | 0.0001 |" in card


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["topk", "train.min_reward=0.5"], "the best, where not all have the same reward"),
        (["threshold", "train.selection_threshold=0.25"], "a reward of at least 0.25"),
        (["percentile"], "goes from 50 to 90"),
    ],
)
def test_every_rule_of_selection_is_named(make_cfg, run_dir, overrides, words):
    card = model_card(make_cfg(f"train.selection={overrides[0]}", *overrides[1:]), TASK, SUMMARY, run_dir)
    assert words in card
    assert ("| `train.min_reward` | 0.5 |" in card) == ("train.min_reward=0.5" in overrides)


def test_without_evaluations_it_has_no_scores(make_cfg, run_dir, tmp_path):
    cfg = make_cfg()
    cfg.train.from_expert_set = "/a/folder"
    card = model_card(cfg, Task("sums", None, [], [], None, None, None), SUMMARY | {"eval": {}}, run_dir)
    assert "The run evaluated nothing." in card
    assert "fine-tuned on a set of expert responses" in card
    assert "system prompt" not in card


def test_the_command_evaluates_as_the_run_did(make_cfg, run_dir):
    command = evaluation_command(make_cfg(), run_dir)
    assert command == (
        "python expert-iteration-sync.py mode=sync --config-name ei_tiny eval.only=true model.name=PATH seed=3 "
        "eval.num_prompts=20 +ray.init_config.num_cpus=2"
    )
    arguments = prepare_arguments(shlex.split(command)[2:])
    cfg = resolve_config(compose_config("ei_tiny", "sync", [text for text in arguments if "=" in text]), "sync")
    assert cfg.eval.only
    assert (cfg.seed, cfg.eval.num_prompts, cfg.model.name) == (3, 20, "PATH")
    assert f"```bash\n{command}\n```" in model_card(make_cfg(), TASK, SUMMARY, run_dir)


def test_without_hydras_notes_the_command_has_the_defaults(make_cfg, tmp_path):
    assert evaluation_command(make_cfg(mode="async"), tmp_path) == (
        "python expert-iteration-async.py mode=async eval.only=true model.name=PATH"
    )
