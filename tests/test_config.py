"""The configuration: every file of `config/` holds, every rule bites."""

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from expert_iteration import config as schema
from expert_iteration import keys, resolve, validation
from expert_iteration.cli import CONFIG_DIR, compose_config
from expert_iteration.config import Config
from expert_iteration.errors import UserError
from expert_iteration.resolve import resolve_config, to_config
from expert_iteration.sizes import derive_sizes, describe_sizes

TASKS = sorted(path.stem for path in CONFIG_DIR.glob("*.yaml") if path.stem != "base")
MODES = sorted(path.stem for path in (CONFIG_DIR / "mode").glob("*.yaml"))


@cache
def composed(task: str, mode: str) -> DictConfig:
    return compose_config(task, mode)


def changed(changes: dict[str, Any], mode: str = "sync", task: str = "ei_tiny") -> DictConfig:
    """A composed configuration with values that are not typed yet, as from a file that lacks the schema."""
    cfg = OmegaConf.create(OmegaConf.to_container(composed(task, mode)))
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def load(changes: dict[str, Any] | None = None, task: str = "ei_tiny", mode: str = "sync") -> Config:
    return resolve_config(changed(changes or {}, mode, task), mode)


@pytest.fixture(autouse=True)
def no_wandb_key(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


# --- the files ---


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", TASKS)
def test_every_task_composes_in_every_mode(task, mode):
    cfg = load(task=task, mode=mode)
    assert cfg.train.sync == (mode == "sync")
    assert resolve_config(compose_config(task, mode, [f"mode={mode}"]), mode) == cfg


def test_there_are_the_published_files():
    assert {"ei_gsm8k", "ei_ifeval", "ei_math", "ei_countdown", "ei_tiny"} <= set(TASKS)
    assert MODES == ["async", "sync"]


def values(cfg: Config, expected: dict[str, Any]) -> dict[str, Any]:
    return {key: OmegaConf.select(OmegaConf.structured(cfg), key) for key in expected}


def test_gsm8k_has_the_published_values_and_our_mended_ones():
    expected = {
        "device": "cuda",
        "env.dataset": "gsm8k",
        "env.num_envs": 256,
        "env.repeats": 32,
        "model.name": "Qwen/Qwen2.5-3B",
        "train.mixed_precision": True,
        "train.topk_size": 4,
        "train.selection": "topk",
        "train.min_reward": 0.5,
        "train.total_dialog_turns": 100_000,
        "train.dialog_turns_per_batch": 256,
        "train.buffer_size": None,
        "train.gradient_accumulation_steps": 4,
        "train.optim_batch_size": 4,
        "train.checkpoint_frequency": 100,
        "train.kl_to_ref_coeff": 1.0,
        "train.loss_function": "sft",
        "train.minor_sft_beta": 0.1,
        "train.logging_frequency": 1,
        "train.empty_replay_buffer": True,
        "train.epochs": 4,
        "train.weight_update_frequency": None,
        "train.sync_iter": True,
        "train_model.gradient_checkpointing": True,
        "train_model.num_devices": 1,
        "train_model.parallel": "auto",
        "train_model.lora.enabled": True,
        "train_model.lora.r": 8,
        "train_model.lora.alpha": 16,
        "train_model.lora.dropout": 0.0,
        "train_model.quantization.enabled": False,
        "train_model.attn_implementation": "sdpa",
        "train_model.torch_dtype": "bfloat16",
        "train_model.eval": False,
        "inference_model.backend": "vllm",
        "inference_model.num_devices": 1,
        "inference_model.num_replicas": 1,
        "inference_model.gpu_memory_utilization": 0.75,
        "inference_model.temperature": 0.8,
        "inference_model.max_tokens": 1024,
        "inference_model.include_stop_str_in_output": True,
        "inference_model.enforce_eager": False,
        "ref_model.num_devices": None,
        "ref_model.torch_dtype": "bfloat16",
        "ref_model.quantization.enabled": False,
        "weight_update.lora_only": False,
        "placement": "auto",
        "optimizer.name": "AdamW",
        "optimizer.lr": None,
        "optimizer.clip_grad_norm": 1.0,
        "optimizer.weight_decay": 0.01,
        "optimizer.scheduler.enabled": True,
        "optimizer.scheduler.type": "cosine_with_warmup",
        "optimizer.scheduler.warmup_steps": 0.03,
        "optimizer.scheduler.num_cycles": 0.5,
        "logging.experiment_name": None,
        "logging.checkpoint_dir": "checkpoints",
    }
    assert values(load(task="ei_gsm8k"), expected) == expected


def test_ifeval_differs_where_the_published_one_does():
    gsm8k, ifeval = (schema.to_plain_dict(load(task=task)) for task in ("ei_gsm8k", "ei_ifeval"))
    assert differences(gsm8k, ifeval) == {
        "env.dataset": ("gsm8k", "ifeval"),
        "env.num_envs": (256, 128),
        "model.name": ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-7b"),
        "train.selection": ("topk", "above_median"),
        "train.min_reward": (0.5, None),
        "train.optim_batch_size": (4, 2),
        "train_model.num_devices": (1, 4),
        "inference_model.num_devices": (1, 2),
        "inference_model.gpu_memory_utilization": (0.75, 0.5),
        "inference_model.max_tokens": (1024, 2048),
    }


def test_one_gpu_differs_where_it_must():
    gsm8k, one_gpu = (schema.to_plain_dict(load(task=task)) for task in ("ei_gsm8k", "ei_gsm8k_1gpu"))
    assert differences(gsm8k, one_gpu) == {
        "placement": ("auto", "colocated"),
        "model.name": ("Qwen/Qwen2.5-3B", "Qwen/Qwen2.5-1.5B-Instruct"),
        "inference_model.max_tokens": (1024, 512),
        "inference_model.max_model_len": (None, 1024),
        "inference_model.gpu_memory_utilization": (0.75, 0.6),
    }


def differences(left: dict, right: dict, prefix: str = "") -> dict[str, tuple]:
    found = {}
    for key in left:
        if isinstance(left[key], dict):
            found |= differences(left[key], right[key], f"{prefix}{key}.")
        elif left[key] != right[key]:
            found[prefix + key] = (left[key], right[key])
    return found


def test_tiny_has_its_measured_recipe():
    expected = {
        "device": "cpu",
        "model.name": "tiny",
        "env.repeats": 8,
        "train.dialog_turns_per_batch": 256,
        "train.total_dialog_turns": 4096,
        "train.topk_size": 2,
        "train.epochs": 2,
        "train.optim_batch_size": 16,
        "train.gradient_accumulation_steps": 1,
        "train.kl_to_ref_coeff": 0.1,
        "train.mixed_precision": False,
        "train_model.lora.enabled": False,
        "ref_model.num_devices": None,
        "inference_model.torch_dtype": "float32",
        "inference_model.temperature": 1.0,
        "inference_model.max_tokens": 32,
        "optimizer.name": "AdamW",
        "optimizer.lr": 2e-4,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.weight_decay": 0.0,
        "optimizer.clip_grad_norm": 1.0,
        "optimizer.scheduler.type": "constant",
        "eval.num_prompts": 200,
        "eval.num_samples": 4,
        "eval.temperature": 1.0,
    }
    assert values(load(), expected) == expected


def test_mode_files_differ_as_published():
    sync, asynchronous = (schema.to_plain_dict(load(task="ei_gsm8k", mode=mode)) for mode in ("sync", "async"))
    assert differences(sync, asynchronous) == {
        "train.sync": (True, False),
        "train.sync_iter": (True, None),
        "train.epochs": (4, 1),
        "train.weight_update_frequency": (None, 10),
    }


@pytest.mark.parametrize("path", [CONFIG_DIR / "base.yaml", *(CONFIG_DIR / f"{task}.yaml" for task in TASKS)])
def test_what_a_mode_decides_is_left_out_of_other_files(path):
    decided = set(OmegaConf.load(CONFIG_DIR / "mode" / "sync.yaml").train)
    present = decided & set(OmegaConf.load(path).train)
    assert present == ({"epochs"} if path.stem == "ei_tiny" else set())  # tiny's recipe names its epochs


def test_command_line_wins_over_task_and_task_over_mode():
    assert load(mode="async").train.epochs == 2  # ei_tiny, where mode/async says 1
    assert compose_config("ei_tiny", "async", ["train.epochs=7"]).train.epochs == 7


def commented_keys(path: Path) -> set[str]:
    """The keys whose line in a YAML file carries a comment."""
    lines = path.read_text().splitlines()

    def walk(node: yaml.MappingNode, prefix: str) -> Iterator[str]:
        for key, value in node.value:
            name = prefix + key.value
            if "#" in lines[value.start_mark.line]:
                yield name
            if isinstance(value, yaml.MappingNode):
                yield from walk(value, name + ".")

    return set(walk(yaml.compose(path.read_text()), ""))


def test_every_key_has_a_comment_in_some_file():
    commented = set().union(*(commented_keys(path) for path in CONFIG_DIR.rglob("*.yaml")))
    free = {section for section in keys.free_sections() if any(key.startswith(section + ".") for key in commented)}
    assert set(keys.leaf_keys()) - commented - free == set()


@pytest.mark.parametrize("task", TASKS)
def test_every_task_file_opens_with_hardware_and_command(task):
    head = (CONFIG_DIR / f"{task}.yaml").read_text().partition("\n\n")[0]
    assert "# Hardware:" in head
    assert "python expert-iteration-sync.py mode=sync" in head


# --- keys and types ---


def test_same_configuration_as_plain_data():
    plain = schema.to_plain_dict(load(task="ei_gsm8k"))
    assert json.loads(json.dumps(plain)) == plain
    assert type(plain["train"]["selection"]) is str  # a StrEnum would not load with weights_only=True
    assert to_config(OmegaConf.create(plain)) == load(task="ei_gsm8k")


@pytest.mark.parametrize(
    ("override", "known"),
    [
        ("env.dataset=mnist", "tiny, gsm8k, ifeval"),
        ("device=tpu", "auto, cpu, cuda"),
        ("train.loss_function=dpo", "sft, minor_sft"),
        ("train.selection=best", "above_median, topk, threshold, percentile, random"),
        ("train.selection_ties=longest", "first, shortest, random"),
        ("train.restart_from=start", "current, base"),
        ("optimizer.name=Lion", "AdamW, Adam, SGD"),
        ("optimizer.scheduler.type=step", "cosine_with_warmup, linear, constant"),
        ("train.kl_to_ref_schedule.type=step", "constant, linear, cosine"),
        ("train_model.torch_dtype=float8", "float32, bfloat16, float16"),
        ("placement=shared", "auto, dedicated, colocated"),
        ("train_model.parallel=tensor", "auto, ddp, fsdp"),
        ("inference_model.backend=sglang", "vllm, transformers"),
        ("logging.backend=mlflow", "wandb, none"),
        ("logging.mode=sometimes", "online, offline, disabled"),
    ],
)
def test_unknown_names_list_the_known(override, known):
    key, _, value = override.partition("=")
    with pytest.raises(UserError, match=rf"{key}.*{value}.*{known}"):
        resolve_config(changed({key: value}), "sync")


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("train.topk_size", "four", "could not be converted to Integer"),
        ("train.topk_size", 1.5, "could not be converted to Integer"),
        ("train.topk_size", None, "null is not allowed"),
        ("train.kl_to_ref_coeff", "high", "could not be converted to Float"),
        ("train.sync_iter", "maybe", "is not a valid bool"),
        ("optimizer.betas", 0.9, "is not a ListConfig"),
        ("train", 3, "is not a subclass"),
        ("optimizer.lr", "${optimizer.learning_rate}", "Interpolation key 'optimizer.learning_rate' not found"),
    ],
)
def test_wrong_types_answer_in_one_line(key, value, rule):
    with pytest.raises(UserError) as error:
        resolve_config(changed({key: value}), "sync")
    message = str(error.value)
    assert message.startswith(key + ":")
    assert rule in message
    assert "\n" not in message


def test_a_key_without_a_value_is_refused():
    cfg = changed({"seed": 0})
    del cfg.train.topk_size
    with pytest.raises(UserError, match=r"^train\.topk_size: no value is set.*base\.yaml"):
        resolve_config(cfg, "sync")


def test_added_unknown_key_is_refused():
    cfg = compose_config("ei_tiny", "sync", ["+train.epochz=3"])  # Hydra lets it pass
    with pytest.raises(UserError, match=r"train\.epochz is not a configuration key: did you mean train\.epochs\?"):
        resolve_config(cfg, "sync")


@pytest.mark.parametrize(
    ("wrong", "answer"),
    [
        ("train.epochz", "did you mean train.epochs?"),
        ("topk_size", "did you mean train.topk_size?"),
        ("train.topk", "did you mean train.topk_size?"),
        ("train.update_weight_frequency", "did you mean train.weight_update_frequency?"),
        ("update_weight_frequency", "did you mean train.weight_update_frequency?"),
        ("optimiser.lr", "did you mean optimizer.lr?"),
        ("train.lr", "did you mean optimizer.lr?"),
        ("inference_model.temprature", "did you mean inference_model.temperature?"),
        ("optimizer.schedular", "did you mean optimizer.scheduler?"),
        ("logging.checkpointdir", "did you mean logging.checkpoint_dir?"),
        ("reward.zzz", "reward has fn, weights,"),
        ("zzz", "the top level has seed, resume, resume_from, device"),
        ("train.exp_name", "use logging.experiment_name."),
        ("logging.checkpoint_frequency", "use train.checkpoint_frequency."),
        ("ref_model.lora.enabled", "is gone: the reference is the frozen start model"),
        ("ref_model.gradient_checkpointing", "is gone: the reference is never differentiated"),
    ],
)
def test_unknown_keys_are_answered_with_the_nearest(wrong, answer):
    assert not keys.is_known(wrong)
    message = keys.explain_unknown(wrong)
    assert message.startswith(wrong)
    assert answer in message


def test_answers_name_keys_that_exist():
    assert all(keys.is_known(key) for key in keys.SUCCESSORS.values())
    assert not any(keys.is_known(key) for key in [*keys.SUCCESSORS, *keys.GONE])


def test_free_dictionaries_reach_ray_as_they_are():
    runtime_env = {"env_vars": {"A": "1"}, "excludes": ["data"]}
    cfg = resolve_config(changed({"ray.init_config.runtime_env": runtime_env}), "sync")
    assert cfg.ray.init_config["runtime_env"] == runtime_env


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    for name in ("data.jsonl", "my_reward.py", "mine.jinja"):
        (tmp_path / name).touch()
    cfg = load(
        {
            "model.name": "./model",
            "model.chat_template": "mine.jinja",
            "env.dataset": "gsm8k",
            "env.dataset_path": "data.jsonl",
            "reward.fn": "my_reward.py:score",
            "tiny.cache_dir": "~/cache",
            "train.from_expert_set": "data.jsonl",
            "logging.checkpoint_dir": "~/checkpoints",
        }
    )
    assert cfg.model.name == str(tmp_path / "model")
    assert cfg.model.chat_template == str(tmp_path / "mine.jinja")
    assert load({"model.chat_template": "plain"}).model.chat_template == "plain"
    assert cfg.env.dataset_path == str(tmp_path / "data.jsonl")
    assert cfg.reward.fn == f"{tmp_path / 'my_reward.py'}:score"
    several = load({"reward.fn": ["my_reward.py:score", "tiny"], "reward.openai_prompt": "data.jsonl"})
    assert several.reward.fn == [f"{tmp_path / 'my_reward.py'}:score", "tiny"]
    assert several.reward.openai_prompt == str(tmp_path / "data.jsonl")
    assert cfg.tiny.cache_dir == str(tmp_path / "cache")
    assert cfg.train.from_expert_set == str(tmp_path / "data.jsonl")
    assert cfg.logging.checkpoint_dir == str(tmp_path / "checkpoints")
    assert load({"model.name": "~/model"}).model.name == str(tmp_path / "model")


# --- the rules ---

# rule -> (values, mode, what the message must contain: value, rule, remedy)
CASES: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("mode_belongs_to_script", {"train.sync": False}, "sync", ["mode=async", "expert-iteration-async.py mode=async"]),
    ("mode_belongs_to_script", {"train.sync": True}, "async", ["mode=sync", "expert-iteration-sync.py mode=sync"]),
    *[("sizes_are_at_least_one", {key: 0}, "sync", [key, "(0)", "at least 1"]) for key in validation.AT_LEAST_ONE],
    ("sizes_are_at_least_one", {"train.epochs": -2}, "sync", ["train.epochs (-2)"]),
    *[("amounts_are_not_negative", {key: -1}, "sync", [key, "-1", "0 or more"]) for key in validation.AT_LEAST_ZERO],
    ("amounts_are_not_negative", {"train.kl_to_ref_coeff": math.nan}, "sync", ["train.kl_to_ref_coeff (nan)"]),
    ("amounts_are_not_negative", {"train.kl_to_ref_coeff": math.inf}, "sync", ["train.kl_to_ref_coeff (inf)"]),
    *[
        ("amounts_are_above_zero", {key: value}, "sync", [key, str(value), "above 0"])
        for key in validation.ABOVE_ZERO
        for value in (0, -1, math.nan)
    ],
    ("amounts_are_above_zero", {"inference_model.temperature": 0}, "sync", ["all responses to a prompt are alike"]),
    *[
        ("shares_are_fractions", {key: value}, "sync", [key, str(value), "above 0 and at most 1"])
        for key in validation.SHARES
        for value in (0, 1.5, -0.5, math.nan)
    ],
    *[
        ("rewards_to_reach_are_finite", {key: value}, "sync", [key, str(value), "must be a finite number"])
        for key in validation.FINITE
        for value in (math.nan, -math.inf)
    ],
    *[
        ("percentiles_leave_something", {key: value}, "sync", [key, str(value), "0 or more and below 100"])
        for key in validation.PERCENTILES
        for value in (100, -1, math.nan)
    ],
    ("seeds_fit_every_generator", {"seed": -1}, "sync", ["seed (-1)"]),
    ("seeds_fit_every_generator", {"tiny.model_seed": 2**32}, "sync", ["tiny.model_seed"]),
    ("group_has_two_responses", {"env.repeats": 1, "train.topk_size": 1}, "sync", ["env.repeats (1)", "at least 2"]),
    (
        "topk_size_fits_group",
        {"train.topk_size": 9},
        "sync",
        ["train.topk_size (9) cannot exceed env.repeats (8): raise env.repeats or lower train.topk_size."],
    ),
    (
        "batch_is_whole_groups",
        {"env.repeats": 24, "env.num_envs": 24},
        "sync",
        ["train.dialog_turns_per_batch (256)", "multiple of env.repeats (24)", "240 or 264"],
    ),
    ("batch_is_whole_groups", {"env.repeats": 512}, "sync", ["train.dialog_turns_per_batch=512"]),
    ("num_envs_fits_groups_and_batch", {"env.num_envs": 48}, "sync", ["env.num_envs (48)", "256 turns", "32 or 64"]),
    ("num_envs_fits_groups_and_batch", {"env.num_envs": 3}, "sync", ["env.num_envs (3)", "repeats (8)", "2 or 4"]),
    *[
        ("buffer_holds_a_batch", {"train.buffer_size": 63}, mode, ["(63)", "256 turns / 8 repeats x 2 kept = 64"])
        for mode in ("sync", "async")
    ],
    (
        "buffer_holds_what_accumulates",
        {"train.restart_from": "base", "train.buffer_size": 1023},
        "sync",
        ["train.buffer_size (1023)", "train.restart_from=base", "16 batches x 64 kept = 1024 responses"],
    ),
    (
        "buffer_holds_what_accumulates",
        {"train.accumulate_expert_set": True, "train.buffer_size": 64},
        "sync",
        ["train.buffer_size (64)", "accumulate_expert_set=true", "buffer_size=null", "empty_replay_buffer=false"],
    ),
    (
        "max_ahead_holds_a_batch",
        {"train.max_ahead": 31},
        "async",
        ["train.max_ahead (31)", "32 groups", "train.max_ahead=64 or more", "lower train.dialog_turns_per_batch"],
    ),
    ("sync_iter_belongs_to_sync", {"train.sync_iter": True}, "async", ["train.sync_iter (true)", "mode=sync"]),
    ("sync_iter_belongs_to_sync", {"train.sync_iter": None}, "sync", ["train.sync_iter (null)"]),
    (
        "max_policy_age_leaves_something",
        {"train.max_policy_age": 0, "train.sync_iter": False},
        "sync",
        ["train.max_policy_age (0)", "train.sync_iter=false", "train.max_policy_age=1", "train.sync_iter=true"],
    ),
    (
        "accumulation_forgets_nothing",
        {"train.accumulate_expert_set": True, "train.max_policy_age": 2},
        "sync",
        ["train.max_policy_age (2)", "train.accumulate_expert_set=true", "train.max_policy_age=null"],
    ),
    (
        "accumulation_belongs_to_sync",
        {"train.accumulate_expert_set": True},
        "async",
        ["train.accumulate_expert_set (true)", "sync mode only", "raise train.buffer_size", "mode=sync"],
    ),
    (
        "restarting_belongs_to_sync",
        {"train.restart_from": "base"},
        "async",
        ["train.restart_from (base)", "train.restart_from=current", "mode=sync"],
    ),
    (
        "restarting_pushes_finished_policies",
        {"train.restart_from": "base", "train.weight_update_frequency": 4},
        "sync",
        ["train.weight_update_frequency (4)", "train.restart_from=base", "train.weight_update_frequency=null"],
    ),
    (
        "expert_set_exists",
        {"train.from_expert_set": "/nowhere"},
        "sync",
        ["train.from_expert_set (/nowhere) does not exist", "null"],
    ),
    ("expert_set_exists", {"train.from_expert_set": __file__}, "sync", [__file__, ".parquet or .jsonl"]),
    (
        "expert_set_belongs_to_sync",
        {"train.from_expert_set": str(CONFIG_DIR)},
        "async",
        [f"train.from_expert_set ({CONFIG_DIR})", "python expert-iteration-sync.py mode=sync"],
    ),
    (
        "async_pushes_weights",
        {"train.weight_update_frequency": None},
        "async",
        ["train.weight_update_frequency (null)"],
    ),
    (
        "minor_sft_stands_alone",
        {"train.loss_function": "minor_sft"},
        "sync",
        ["train.kl_to_ref_coeff (0.1)", "minor_sft", "train.kl_to_ref_coeff=null"],
    ),
    *[
        (
            "kl_schedule_has_a_start",
            {"train.kl_to_ref_schedule.type": shape, "train.kl_to_ref_coeff": start},
            mode,
            [f"({shape})", f"kl_to_ref_coeff={start}", "above 0", "train.kl_to_ref_schedule.type=constant"],
        )
        for shape, start, mode in (("linear", None, "sync"), ("cosine", 0.0, "async"))
    ],
    (
        "mixed_precision_has_two_types",
        {"train.mixed_precision": True},
        "sync",
        ["float32", "train.mixed_precision=false"],
    ),
    *[
        ("lora_dropout_is_a_share", {"train_model.lora.dropout": value}, "sync", [f"({value})", "from 0 to below 1"])
        for value in (-0.1, 1.0, math.nan)
    ],
    (
        "reference_has_a_place",
        {"ref_model.num_devices": 0},
        "sync",
        ["ref_model.num_devices (0)", "train_model.lora.enabled=true", "ref_model.num_devices=null"],
    ),
    (
        "refreshed_reference_has_a_place",
        {"ref_model.refresh_every": 4, "train_model.lora.enabled": True},
        "sync",
        ["ref_model.refresh_every (4)", "adapters off", "ref_model.num_devices=1", "ref_model.refresh_every=null"],
    ),
    *[
        (
            "refreshed_reference_has_a_use",
            {"ref_model.refresh_every": 4, "train.kl_to_ref_coeff": coefficient},
            "sync",
            ["ref_model.refresh_every (4)", f"kl_to_ref_coeff={coefficient}", "ref_model.refresh_every=null"],
        )
        for coefficient in (None, 0.0)
    ],
    (
        "refreshed_reference_is_not_quantized",
        {"ref_model.refresh_every": 4, "ref_model.quantization.enabled": True},
        "sync",
        ["ref_model.refresh_every (4)", "four bits", "ref_model.quantization.enabled=false"],
    ),
    (
        "quantization_needs_lora",
        {"train_model.quantization.enabled": True},
        "sync",
        ["train_model.quantization.enabled (true)", "train_model.lora.enabled=true", "quantization.enabled=false"],
    ),
    (
        "quantization_is_on_one_whole_model",
        {
            "train_model.quantization.enabled": True,
            "train_model.lora.enabled": True,
            "train_model.parallel": "fsdp",
        },
        "sync",
        ["train_model.parallel (fsdp)", "train_model.quantization.enabled=true", "train_model.parallel=ddp"],
    ),
    (
        "lora_only_needs_lora",
        {"weight_update.lora_only": True},
        "sync",
        ["weight_update.lora_only (true)", "train_model.lora.enabled=true"],
    ),
    (
        "tensor_parallelism_needs_vllm",
        {"inference_model.backend": "transformers", "inference_model.num_devices": 2},
        "sync",
        ["inference_model.num_devices (2)", "inference_model.num_replicas", "inference_model.backend=vllm"],
    ),
    (
        "adapters_have_a_rank_that_vllm_serves",
        {"train_model.lora.enabled": True, "weight_update.lora_only": True, "train_model.lora.r": 513},
        "sync",
        ["train_model.lora.r (513)", "(512)", "weight_update.lora_only=false"],
    ),
    (
        "every_engine_gets_a_group",
        {"inference_model.num_replicas": 5, "env.num_envs": 32},
        "sync",
        ["inference_model.num_replicas (5)", "the 4 groups", "env.num_envs 32 / env.repeats 8"],
    ),
    (
        "ray_addresses_are_joined_directly",
        {"ray.init_config.address": "ray://host:10001"},
        "sync",
        ["ray.init_config.address (ray://host:10001)", "address=auto"],
    ),
    (
        "ray_addresses_are_joined_directly",
        {"ray.init_config.address": "auto", "ray.init_config.num_cpus": 4},
        "sync",
        ["ray.init_config.num_cpus (4)", "address=auto", "null"],
    ),
    (
        "training_task_takes_its_own_accelerator",
        {"ray.train_handler_config.num_gpus": 1},
        "sync",
        ["ray.train_handler_config.num_gpus (1)", "train_model.num_devices"],
    ),
    (
        "gradient_checkpointing_needs_train_mode",
        {"train_model.eval": True, "train_model.gradient_checkpointing": True},
        "sync",
        ["train_model.gradient_checkpointing (true)", "train_model.eval=true"],
    ),
    ("response_fits_context", {"inference_model.max_model_len": 32}, "sync", ["max_model_len (32)", "max_tokens (32)"]),
    ("kv_cache_gib_is_for_cpu", {"device": "cuda"}, "sync", ["inference_model.kv_cache_gib (1)", "device=cuda"]),
    ("betas_are_two_rates", {"optimizer.betas": [0.9]}, "sync", ["optimizer.betas ([0.9])"]),
    ("betas_are_two_rates", {"optimizer.betas": [0.9, 1.0]}, "sync", ["optimizer.betas ([0.9, 1.0])"]),
    ("warmup_is_fraction_or_steps", {"optimizer.scheduler.warmup_steps": 2.5}, "sync", ["warmup_steps (2.5)"]),
    ("evaluation_samples_differ", {"eval.temperature": 0}, "sync", ["eval.num_samples (4)", "eval.temperature=0"]),
    (
        "pass_at_k_has_its_samples",
        {"eval.k": 5},
        "sync",
        ["eval.k (5) cannot exceed eval.num_samples (4)", "raise eval.num_samples, or lower eval.k"],
    ),
    (
        "policies_are_compared_by_a_figure",
        {"eval.metric": "pass@2"},
        "sync",
        ["eval.metric (pass@2)", "pass@1, pass@k, greedy, reward"],
    ),
    *[
        (
            "evaluation_alone_trains_nothing",
            {"eval.only": True, key: value},
            "sync",
            [f"{key} ({value})", "eval.only=true", "model.name=RUN_DIR/last", "eval.only=false"],
        )
        for key, value in (
            ("train.from_expert_set", str(CONFIG_DIR)),
            ("resume_from", str(CONFIG_DIR)),
            ("resume", "auto"),
        )
    ],
    ("model_exists", {"model.name": "/no/such/model"}, "sync", ["model.name (/no/such/model)", "config.json"]),
    ("model_exists", {"model.name": "~/no/such/model"}, "sync", ["/no/such/model", "config.json"]),
    ("model_exists", {"model.name": "Qwen 2.5"}, "sync", ["'Qwen 2.5'", "hub id"]),
    ("model_exists", {"model.name": " "}, "sync", ["model.name (' ')", "hub id"]),
    *[
        ("values_are_not_empty", {key: ""}, "sync", [f"{key} ('')", "empty", "null"])
        for key in ("model.name", "env.dataset_path", "env.answer_column", "reward.fn", "resume_from")
    ],
    ("chat_template_file_exists", {"model.chat_template": "/none/mine.jinja"}, "sync", ["(/none/mine.jinja)", "null"]),
    *[
        ("tiny_has_no_other_data", {key: "/data"}, "sync", [f"{key} (/data)", "env.dataset=tiny", "no effect"])
        for key in ("env.dataset_path", "env.dataset_name")
    ],
    (
        "data_have_one_place",
        {"env.dataset": "gsm8k", "env.dataset_path": str(CONFIG_DIR), "env.dataset_name": "a/b"},
        "sync",
        [f"env.dataset_path ({CONFIG_DIR})", "env.dataset_name (a/b)", "one of them to null"],
    ),
    (
        "dataset_path_exists",
        {"env.dataset": "gsm8k", "env.dataset_path": "/no/such/data"},
        "sync",
        ["env.dataset_path (/no/such/data) does not exist"],
    ),
    *[
        (
            "dataset_name_is_a_hub_name",
            {"env.dataset": "gsm8k", "env.dataset_name": name},
            "sync",
            [f"env.dataset_name ({name})", "openai/gsm8k", "env.dataset_path"],
        )
        for name in ("./data", "a b", "/data/rows.jsonl", "..")
    ],
    (
        "custom_data_have_a_place",
        {"env.dataset": "custom", "env.answer_column": "a"},
        "sync",
        ["env.dataset=custom", "env.dataset_path", "env.dataset_name"],
    ),
    (
        "custom_data_have_a_reward",
        {"env.dataset": "custom", "env.dataset_path": str(CONFIG_DIR)},
        "sync",
        ["env.answer_column", "reward.fn or reward.openai_url"],
    ),
    *[
        (
            "evaluation_has_a_split_of_its_own",
            {"env.dataset": "gsm8k", "env.split": split, "env.eval_split": split or "train"},
            "sync",
            [f"env.eval_split ({split or 'train'})", "name another"],
        )
        for split in ("dev", None)
    ],
    (
        "prompt_and_answer_are_two_columns",
        {"env.dataset": "gsm8k", "env.prompt_column": "text", "env.answer_column": "text"},
        "sync",
        ["env.prompt_column and env.answer_column (text)"],
    ),
    ("reward_function_has_a_place", {"reward.fn": "score"}, "sync", ["reward.fn (score)", "package.module:function"]),
    ("reward_function_has_a_place", {"reward.fn": ["tiny", "gsm9k"]}, "sync", ["reward.fn (gsm9k)", "gsm8k_granular"]),
    ("reward_function_has_a_place", {"reward.fn": []}, "sync", ["reward.fn ([])", "null"]),
    ("reward_function_has_a_place", {"reward.fn": 3}, "sync", ["reward.fn (3)", "file.py:function"]),
    ("reward_function_has_a_place", {"reward.fn": "a b:score"}, "sync", ["reward.fn (a b:score)"]),
    ("reward_function_has_a_place", {"reward.fn": "/no/such.py:score"}, "sync", ["/no/such.py does not exist"]),
    *[
        (
            "rewards_have_what_they_compare_with",
            {"env.dataset": dataset, "reward.fn": fn},
            "sync",
            [f"reward.fn ({fn if isinstance(fn, str) else fn[-1]})", f"env.dataset={dataset}"],
        )
        for dataset, fn in (
            ("tiny", "ifeval"),
            ("gsm8k", ["gsm8k", "countdown"]),
            ("ifeval", "gsm8k"),
            ("math", "gsm8k_granular"),
            ("countdown", "math"),
        )
    ],
    (
        "rewards_have_what_they_compare_with",
        {"env.dataset": "custom", "env.dataset_path": str(CONFIG_DIR), "reward.fn": "gsm8k"},
        "sync",
        ["reward.fn (gsm8k)", "env.answer_column (null)"],
    ),
    (
        "summed_rewards_have_different_names",
        {"reward.fn": ["tiny", "my.rewards:tiny"]},
        "sync",
        ["names tiny twice", "rename one"],
    ),
    (
        "reward_weights_belong_to_functions",
        {"reward.fn": "tiny", "reward.weights": [1.0]},
        "sync",
        ["reward.weights ([1.0])", "reward.fn (tiny)", "list"],
    ),
    ("reward_weights_belong_to_functions", {"reward.weights": [1.0]}, "sync", ["reward.weights ([1.0])", "list"]),
    *[
        (
            "reward_weights_belong_to_functions",
            {"reward.fn": ["tiny", "gsm8k"], "reward.weights": weights},
            "sync",
            ["reward.weights", "must be 2 finite numbers"],
        )
        for weights in ([1.0], [1.0, math.nan])
    ],
    ("openai_reward_has_an_address", {"reward.fn": "openai"}, "sync", ["reward.openai_url (null)", "http://host"]),
    ("openai_reward_has_an_address", {"reward.openai_url": "host:8000"}, "sync", ["(host:8000)", "http://host"]),
    (
        "openai_prompt_exists",
        {"reward.openai_prompt": "/no/such/prompt"},
        "sync",
        ["reward.openai_prompt (/no/such/prompt) is no file"],
    ),
    (
        "workers_wait_for_the_server",
        {"reward.openai_url": "http://host:8000/v1", "reward.workers": 2},
        "sync",
        ["reward.timeout (10)", "reward.openai_timeout (60)", "reward.workers=0"],
    ),
    ("verifier_has_a_time_limit", {"env.dataset": "math"}, "sync", ["reward.workers (0)", "reward.workers=2"]),
    ("verifier_has_a_time_limit", {"reward.fn": ["tiny", "math"]}, "sync", ["reward.workers (0)"]),
    ("wandb_can_be_reached", {"logging.mode": "online"}, "sync", ["WANDB_API_KEY", "logging.mode=offline"]),
    (
        "wandb_can_be_reached",
        {"logging.mode": "offline", "logging.backend": "none"},
        "sync",
        ["logging.mode (offline)", "logging.backend=none"],
    ),
]


@pytest.mark.parametrize(("rule", "changes", "mode", "parts"), CASES)
def test_rule_refuses_with_value_rule_and_remedy(rule, changes, mode, parts, monkeypatch):
    cfg = changed(changes, mode)
    with pytest.raises(UserError) as error:
        resolve_config(cfg, mode)
    message = str(error.value)
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message

    # It is this rule that refuses: without it the same configuration passes, or fails otherwise further on.
    monkeypatch.setattr(resolve, "RULES", tuple(r for r in validation.RULES if r.__name__ != rule))
    monkeypatch.setattr(resolve, "mode_belongs_to_script", lambda cfg, mode: None)
    assert refusal(cfg, mode) != message


OF_COLLECTING = {
    "group_has_two_responses",
    "topk_size_fits_group",
    "batch_is_whole_groups",
    "num_envs_fits_groups_and_batch",
    "buffer_holds_a_batch",
    "buffer_holds_what_accumulates",
    "max_ahead_holds_a_batch",
    "every_engine_gets_a_group",
}


@pytest.mark.parametrize(
    ("changes", "mode", "without"),
    [
        (changes, mode, without)
        for rule, changes, mode, _ in CASES
        for without in ({"eval.only": True}, {"train.from_expert_set": str(CONFIG_DIR)})
        if rule in OF_COLLECTING and (mode == "sync" or "eval.only" in without)  # expert sets belong to sync
    ],
)
def test_where_nothing_is_collected_groups_and_batches_need_not_fit(changes, mode, without):
    cfg = load({**changes, **without}, mode=mode)
    assert derive_sizes(cfg).num_batches >= 1


@pytest.mark.parametrize(("repeats", "num_envs"), [(3, 256), (3, 100), (5000, 7)])
def test_an_evaluation_alone_starts_with_any_sizes(repeats, num_envs):
    cfg = load({"eval.only": True, "env.repeats": repeats, "env.num_envs": num_envs})
    (line,) = describe_sizes(derive_sizes(cfg), cfg)
    assert line.startswith("evaluation of tiny: 200 prompts")


def refusal(cfg: DictConfig, mode: str) -> str | None:
    try:
        resolve_config(cfg, mode)
    except (ValueError, ArithmeticError) as error:  # later rules compute with what the missing one would have refused
        return str(error)
    return None


def test_every_rule_has_a_case():
    rules = {rule.__name__ for rule in validation.RULES} | {"mode_belongs_to_script"}
    assert {rule for rule, *_ in CASES} == rules


def test_every_number_is_bounded():
    """A number that no rule looks at would be passed on whatever it is."""
    elsewhere = {"seed", "tiny.model_seed", "optimizer.betas", "train_model.lora.dropout"}
    bounded = {*validation.AT_LEAST_ONE, *validation.AT_LEAST_ZERO, *validation.ABOVE_ZERO, *validation.SHARES}
    bounded |= {*validation.FINITE, *validation.PERCENTILES}
    assert {key for key in keys.leaf_keys() if is_number(key)} == bounded | elsewhere


def is_number(key: str) -> bool:
    kind: Any = Config
    for part in key.split("."):
        kind = get_type_hints(kind)[part]
    return kind in (int, float, int | None, float | None, list[float])


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({"train.kl_to_ref_coeff": None}, "sync"),
        ({"train.kl_to_ref_coeff": 0}, "sync"),
        ({"train.loss_function": "minor_sft", "train.kl_to_ref_coeff": None}, "sync"),
        ({"train.loss_function": "minor_sft", "train.kl_to_ref_coeff": 0}, "sync"),
        ({"train.topk_size": 8}, "sync"),
        ({"train.buffer_size": 64}, "sync"),
        ({"train.buffer_size": 64}, "async"),
        ({"train.max_ahead": 32}, "async"),
        ({"train.max_ahead": 16, "train.total_dialog_turns": 128}, "async"),  # one smaller batch of 16 groups
        ({"train.max_ahead": 1}, "sync"),
        ({"train.max_policy_age": 0}, "async"),
        ({"train.max_policy_age": 0}, "sync"),
        ({"train.max_policy_age": 1, "train.sync_iter": False}, "sync"),
        ({"train.total_optimizer_steps": 1}, "async"),
        ({"train.prioritized_sampling_alpha": 0, "train.prioritized_sampling_beta": 0}, "async"),
        ({"train.prioritized_sampling_epsilon": 1e-12}, "async"),
        ({"train.kl_to_ref_schedule.type": "linear", "train.kl_to_ref_schedule.end": 0}, "sync"),
        ({"train.kl_to_ref_schedule.type": "cosine", "train.kl_to_ref_schedule.end": 2.0}, "async"),
        ({"train.kl_to_ref_schedule.type": "constant", "train.kl_to_ref_coeff": None}, "sync"),
        ({"env.num_envs": 1000}, "sync"),
        ({"env.num_envs": 4}, "sync"),
        ({"env.num_envs": 16}, "sync"),
        ({"train.total_dialog_turns": 20}, "sync"),
        ({"train.checkpoint_frequency": 0, "eval.frequency": 0, "logging.num_samples": 0}, "sync"),
        ({"eval.temperature": 0, "eval.num_samples": 1}, "sync"),
        ({"eval.k": 4}, "sync"),
        *(({"eval.metric": metric}, "async") for metric in schema.EVAL_METRICS),
        ({"eval.only": True}, "async"),
        ({"inference_model.top_p": 1.0, "inference_model.gpu_memory_utilization": 1.0}, "sync"),
        ({"train.mixed_precision": True, "train_model.torch_dtype": "bfloat16"}, "sync"),
        ({"train_model.lora.dropout": 0.99}, "sync"),
        ({"ref_model.num_devices": 0, "train_model.lora.enabled": True}, "sync"),
        ({"ref_model.num_devices": 2, "train_model.lora.enabled": True}, "async"),
        ({"train_model.quantization.enabled": True, "train_model.lora.enabled": True}, "sync"),
        ({"ref_model.quantization.enabled": True}, "sync"),
        ({"train.from_expert_set": str(CONFIG_DIR), "train.buffer_size": 1}, "sync"),
        ({"train.restart_from": "base"}, "sync"),
        ({"train.restart_from": "base", "train.buffer_size": 1024}, "sync"),
        ({"train.restart_from": "base", "train.accumulate_expert_set": False, "train.max_policy_age": 1}, "sync"),
        ({"train.accumulate_expert_set": True, "train.weight_update_frequency": 4}, "sync"),
        ({"train.accumulate_expert_set": False}, "async"),
        ({"ref_model.refresh_every": 1}, "async"),
        ({"ref_model.refresh_every": 1, "train_model.lora.enabled": True, "ref_model.num_devices": 1}, "sync"),
        (
            {"ref_model.refresh_every": 1, "train.loss_function": "minor_sft", "train.kl_to_ref_coeff": None},
            "sync",
        ),
        ({"weight_update.lora_only": True, "train_model.lora.enabled": True}, "sync"),
        ({"inference_model.backend": "transformers", "inference_model.num_replicas": 2}, "sync"),
        ({"train_model.num_devices": 2, "inference_model.num_devices": 2, "ref_model.num_devices": 2}, "sync"),
        ({"optimizer.scheduler.warmup_steps": 10}, "sync"),
        ({"reward.fn": "my.rewards:score"}, "sync"),
        ({"reward.fn": ["gsm8k_granular", "my.rewards:score"], "reward.weights": [1.0, -0.5]}, "sync"),
        ({"reward.fn": ["tiny", "openai"], "reward.openai_url": "https://host/v1"}, "sync"),
        ({"env.dataset": "math", "reward.workers": 1}, "sync"),
        ({"env.dataset": "gsm8k", "reward.fn": ["gsm8k", "math"], "reward.workers": 1}, "sync"),
        (
            {
                "env.dataset": "custom",
                "env.dataset_path": str(CONFIG_DIR),
                "env.answer_column": "a",
                "reward.fn": "gsm8k_granular",
            },
            "sync",
        ),
        ({"reward.openai_url": "http://host:1/v1", "reward.workers": 2, "reward.timeout": 100.0}, "sync"),
        ({"env.dataset": "custom", "env.dataset_name": "a/b", "env.answer_column": "a"}, "sync"),
        ({"env.dataset": "custom", "env.dataset_path": str(CONFIG_DIR), "reward.fn": "my.rewards:score"}, "async"),
        ({"env.dataset": "custom", "train.from_expert_set": str(CONFIG_DIR)}, "sync"),
        ({"env.dataset": "countdown", "env.split": "test"}, "sync"),
        ({"model.name": "gpt2"}, "sync"),
        ({"model.name": "some-org/Some.Model_1"}, "sync"),
        ({"logging.backend": "none"}, "sync"),
        ({"logging.mode": "disabled"}, "sync"),
    ],
)
def test_rules_let_sense_pass(changes, mode):
    load(changes, mode=mode)


def test_online_passes_with_a_key(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x")
    load({"logging.mode": "online"})
