"""Settings without effect are said, each with its reason, and the others are not."""

import json
from functools import cache, reduce
from operator import getitem
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from expert_iteration import effects, keys
from expert_iteration.cli import compose_config, given_keys
from expert_iteration.config import Config
from expert_iteration.effects import TABLE, settings_without_effect
from expert_iteration.resolve import resolve_config

NO_SCHEDULER = ["optimizer.scheduler.enabled=false"]
NO_WANDB = ["logging.backend=none"]
DISABLED = ["logging.mode=disabled"]
CACHE = ["inference_model.kv_cache_gib=2"]
HUB = ["model.name=gpt2"]
ASYNC = ["mode=async"]
EVEN = ["train.prioritized_sampling=false"]
LORA = ["train_model.lora.enabled=true"]
JUDGED = ["reward.openai_url=http://host:8000/v1"]
TRANSFORMERS = ["inference_model.backend=transformers"]
NO_CACHE = ["inference_model.kv_cache_gib=null"]
CUDA = ["device=cuda", *NO_CACHE]

COLUMNS = ["env.prompt_column=q", "env.answer_column=a"]
# Data, as far as the configuration looks at them.
ROWS = [f"env.dataset_path={Path(__file__).parent}"]
CUSTOM = ["env.dataset=custom", *ROWS]
OTHER_COUNTDOWN = ["env.dataset=countdown", "env.dataset_name=ORG/DATA"]
# An expert set, as far as the configuration looks at it.
SET = [f"train.from_expert_set={Path(__file__).parent}"]

# (an override, others with which it is idle, others with which it is not, a word of the reason), for ei_tiny, in sync
# mode unless an override says otherwise
CASES: list[tuple[str, list[str], list[str], str]] = [
    (
        "train_model.torch_dtype=bfloat16",
        ["train.mixed_precision=false"],
        ["train.mixed_precision=true"],
        "mixed_precision=false",
    ),
    *[
        (override, data, ["env.dataset=gsm8k"], "makes its own problems")
        for override in ("env.dataset_config=c", "env.split=a", "env.eval_split=b", *COLUMNS)
        for data in ([], ["env.dataset=countdown"])
    ],
    *[(column, OTHER_COUNTDOWN, ["env.dataset=gsm8k"], "columns nums and target") for column in COLUMNS],
    ("env.answer_column=a", ["env.dataset=ifeval"], ["env.dataset=gsm8k"], "no answers"),
    ("env.dataset_config=c", [*ROWS, "env.dataset=gsm8k"], ["env.dataset=gsm8k"], "in place of a data set of the hub"),
    ("reward.answer_mode=boxed", [], ["env.dataset=gsm8k"], "several forms"),
    (
        "reward.answer_mode=boxed",
        [*CUSTOM, "reward.fn=my.rewards:score"],
        [*CUSTOM, "env.answer_column=a"],
        "several forms",
    ),
    ("env.skip_hopeless_after=2", ["env.skip_solved=0"], ["env.skip_solved=1"], "env.skip_solved=0"),
    (
        "train.minor_sft_beta=0.2",
        ["train.loss_function=sft"],
        ["train.loss_function=minor_sft", "train.kl_to_ref_coeff=null"],
        "loss_function=sft",
    ),
    *[
        (override, [*SET, *needed], [*needed, *active], "none are sampled")
        for overrides, needed, active in (
            (("env.repeats=4", "reward.fn=math:sqrt", "train.topk_size=1", "train.total_dialog_turns=512"), [], []),
            (("train.dialog_turns_per_batch=128", "train.weight_update_frequency=4", "train.stop_patience=2"), [], []),
            (("train.accumulate_expert_set=true", "train.restart_from=base", "train.sync_iter=false"), [], []),
            (("train.empty_replay_buffer=false", "train.collection_timeout=9", "ref_model.refresh_every=2"), [], []),
            (("train.buffer_size=1000", "train.max_policy_age=2"), [], ["train.empty_replay_buffer=false"]),
            (("train.dedup=true", "train.min_reward=1", "train.selection_ties=shortest"), [], []),
            (("train.selection_threshold=0.5",), [], ["train.selection=threshold"]),
            (("train.selection_percentile=9", "train.selection_percentile_end=80"), [], ["train.selection=percentile"]),
            ((*ROWS, "env.split=a", "env.eval_split=b", *COLUMNS), ["env.dataset=gsm8k"], []),
            (("env.dataset_name=ORG/DATA", "env.dataset_config=c"), ["env.dataset=gsm8k"], []),
            (("env.max_prompts=9", "env.shuffle=false", "env.skip_solved=1"), [], []),
            (("env.skip_hopeless_after=2",), [], ["env.skip_solved=1"]),
            (("reward.answer_mode=boxed",), ["env.dataset=gsm8k"], []),
            (("inference_model.backend=transformers", "inference_model.num_devices=2"), [], []),
            (("inference_model.num_replicas=2", "inference_model.num_threads=1"), [], []),
            (("inference_model.enforce_eager=false", "inference_model.enable_prefix_caching=false"), [], []),
            (("inference_model.kv_cache_gib=2",), [], []),
            (("inference_model.gpu_memory_utilization=0.4",), [], NO_CACHE),
            (("inference_model.attn_implementation=eager",), [], TRANSFORMERS),
            (("weight_update.probe_frequency=1", "weight_update.probe_tolerance=0.1"), [], []),
            (("weight_update.timeout=9",), [], []),
            (("weight_update.lora_only=true",), LORA, []),
            (("eval.frequency=1", "eval.num_prompts=10", "eval.num_samples=2", "eval.k=2"), [], []),
            (("eval.temperature=0.5", "eval.metric=greedy", "expert_set.save=true"), [], []),
            (("expert_set.token_ids=true",), [], ["expert_set.save=true"]),
            (("reward.weights=null", "reward.workers=2", "reward.pass_threshold=0.5"), [], []),
            (("reward.timeout=3",), [], ["reward.workers=2"]),
            (("reward.openai_url=http://host/v1",), [], []),
            (("reward.openai_model=a", "reward.openai_kind=judge", "reward.openai_concurrency=2"), [], JUDGED),
            (("reward.openai_retries=1", "reward.openai_timeout=9"), [], JUDGED),
            ((f"reward.openai_prompt={__file__}",), [], JUDGED),
        )
        for override in overrides
    ],
    ("expert_set.token_ids=true", [], ["expert_set.save=true"], "expert_set.save=false"),
    ("train.buffer_size=100", [], ["train.empty_replay_buffer=false"], "empty_replay_buffer=true"),
    ("reward.timeout=3", [], ["reward.workers=2"], "reward.workers=0"),
    ("reward.openai_url=http://host/v1", ["reward.fn=tiny"], ["reward.fn=openai"], "names no openai"),
    *[
        (f"reward.openai_{override}", idle, JUDGED, "a server's judge")
        for override in ("model=a", "kind=judge", f"prompt={__file__}", "concurrency=2", "retries=1", "timeout=9")
        for idle in ([], ["reward.fn=tiny"])
    ],
    (f"reward.openai_prompt={__file__}", [*JUDGED, "reward.openai_kind=reward_model"], JUDGED, "in words"),
    (
        "reward.openai_concurrency=2",
        [*JUDGED, "reward.workers=2", "reward.timeout=100"],
        JUDGED,
        "one response at a time",
    ),
    ("train.stop_patience=3", ["eval.frequency=0"], ["eval.frequency=1"], "before and after the run only"),
    ("train.total_optimizer_steps=100", [], ASYNC, "train.epochs"),
    ("train.max_ahead=64", [], ASYNC, "train.sync_iter"),
    ("train.max_ahead=64", [*ASYNC, "train.deterministic=true"], ASYNC, "train.deterministic=true"),
    *[(f"train.deterministic={value}", [], ASYNC, "train.sync_iter=true") for value in ("true", "false")],
    ("train.epochs=3", [*ASYNC, "train.total_optimizer_steps=100"], ASYNC, "train.total_optimizer_steps"),
    ("train.epochs=3", [*ASYNC, "train.total_optimizer_steps=100"], [], "train.total_optimizer_steps"),
    *[(f"train.empty_replay_buffer={value}", ASYNC, [], "ring") for value in ("true", "false")],
    *[
        (f"train.empty_replay_buffer={value}", idle, ["train.restart_from=current"], "all that was ever kept")
        for value in ("true", "false")
        for idle in (["train.accumulate_expert_set=true"], ["train.restart_from=base"])
    ],
    ("train.accumulate_expert_set=false", ASYNC, ["train.restart_from=base"], "never accumulates"),
    (
        "train.buffer_size=2000",
        ["train.restart_from=base"],
        ["train.restart_from=base", "train.accumulate_expert_set=false", "train.empty_replay_buffer=false"],
        "accumulates",
    ),
    *[
        ("train.max_policy_age=2", [], active, "weights last pushed")
        for active in (
            ASYNC,
            ["train.sync_iter=false"],
            ["train.empty_replay_buffer=false"],
            ["train.weight_update_frequency=4"],
        )
    ],
    *[
        (f"train.prioritized_sampling_{override}", [*mode, *EVEN], ASYNC, "prioritized_sampling=false")
        for override in ("alpha=0.5", "beta=0.5", "epsilon=0.05")
        for mode in ([], ASYNC)
    ],
    *[
        (f"train.prioritized_sampling_{override}", [*ASYNC, "train.prioritized_sampling_alpha=0"], ASYNC, "alpha=0")
        for override in ("beta=0.5", "epsilon=0.05")
    ],
    ("train.prioritized_sampling_beta=0.5", [], ASYNC, "draws every response once"),
    *[
        (f"train.prioritized_sampling{override}", [*ASYNC, "train.selection=random"], ASYNC, "the control")
        for override in ("=true", "_alpha=0.5", "_beta=0.5", "_epsilon=0.05")
    ],
    ("train.selection_threshold=0.5", [], ["train.selection=threshold"], "selection=threshold has one"),
    (
        "train.selection_threshold=0.5",
        ["train.selection=threshold", "train.min_reward=0.6"],
        ["train.selection=threshold"],
        "train.min_reward, which is higher",
    ),
    (
        "train.min_reward=0.5",
        ["train.selection=threshold", "train.selection_threshold=0.5"],
        ["train.selection=topk"],
        "train.selection_threshold, which is no less",
    ),
    *[
        (override, [], ["train.selection=percentile"], "selection=percentile has one")
        for override in ("train.selection_percentile=20", "train.selection_percentile_end=80")
    ],
    ("train.selection_ties=shortest", ["train.selection=random"], [], "there are no ties"),
    (
        "train.selection_ties=first",
        ["train.selection=random"],
        ["train.selection=random", "train.dedup=true"],
        "there are no ties",
    ),
    *[
        ("train.kl_to_ref_schedule.end=0.01", mode, [*mode, f"train.kl_to_ref_schedule.type={shape}"], "type=constant")
        for mode in ([], ASYNC)
        for shape in ("linear", "cosine")
    ],
    *[
        (override, NO_SCHEDULER, ["optimizer.scheduler.type=cosine_with_warmup"], "scheduler.enabled=false")
        for override in ("optimizer.scheduler.warmup_steps=3", "optimizer.scheduler.num_cycles=1")
    ],
    ("optimizer.scheduler.type=linear", NO_SCHEDULER, [], "scheduler.enabled=false"),
    *[
        (
            "optimizer.scheduler.num_cycles=1",
            [f"optimizer.scheduler.type={shape}"],
            ["optimizer.scheduler.type=cosine_with_warmup"],
            "type=cosine_with_warmup",
        )
        for shape in ("linear", "constant")
    ],
    ("optimizer.betas=[0.8,0.9]", ["optimizer.name=SGD"], ["optimizer.name=Adam"], "SGD"),
    ("inference_model.gpu_memory_utilization=0.4", CACHE, NO_CACHE, "kv_cache_gib"),
    ("inference_model.gpu_memory_utilization=0.4", [*TRANSFORMERS, *NO_CACHE], NO_CACHE, "backend=transformers"),
    ("inference_model.kv_cache_gib=2", TRANSFORMERS, [], "backend=transformers"),
    *[
        (f"inference_model.{override}", TRANSFORMERS, ["inference_model.backend=vllm"], "backend=transformers")
        for override in ("enforce_eager=false", "enable_prefix_caching=false")
    ],
    ("inference_model.attn_implementation=eager", [], TRANSFORMERS, "backend=vllm"),
    *[(f"placement={name}", [], CUDA, "on a CPU") for name in ("colocated", "auto")],
    *[
        (f"train_model.lora.{override}", [], LORA, "lora.enabled=false")
        for override in ("r=4", "alpha=8", "dropout=0.1")
    ],
    *[
        (f"train_model.parallel={kind}", [], ["train_model.num_devices=2"], "num_devices=1")
        for kind in ("fsdp", "auto")
    ],
    *[
        (f"ref_model.{override}", LORA, [*LORA, "ref_model.num_devices=1"], "its adapters off")
        for override in ("attn_implementation=eager", "quantization.enabled=true", "num_threads=1")
    ],
    ("ref_model.torch_dtype=bfloat16", [*LORA, "ref_model.num_devices=0"], [], "its adapters off"),
    ("tiny.model_seed=1", HUB, [], "model.name=tiny"),
    ("tiny.cache_dir=/tmp", HUB, ["env.dataset=gsm8k"], "model.name=tiny"),
    *[
        (f"logging.{override}", idle, ["logging.mode=offline"], idle[0])
        for override in ("project=a", "entity=a", "group=a", "tags=[a]", "experiment_name=a")
        for idle in (NO_WANDB, DISABLED)
    ],
]


def as_it_is(key: str) -> str:
    """The override that sets a key to the value that it has in ei_tiny anyway."""
    value = reduce(getitem, key.split("."), OmegaConf.to_container(tiny(), enum_to_str=True))
    return f"{key}={json.dumps(value)}"


@cache
def tiny() -> DictConfig:
    return compose_config("ei_tiny")


EVALUATION = ["eval.only=true", *(as_it_is(key) for key in effects.TRAINING_KEYS)]


@cache
def load(task: str, *overrides: str) -> Config:
    mode = "async" if "mode=async" in overrides else "sync"
    return resolve_config(compose_config(task, mode, overrides), mode)


def notes(overrides: list[str], task: str = "ei_tiny") -> list[str]:
    return settings_without_effect(load(task, *overrides), given_keys(overrides))


@pytest.mark.parametrize(("override", "idle", "active", "reason"), CASES)
def test_idle_settings_are_noted_and_active_ones_are_not(override, idle, active, reason):
    [line] = notes([override, *idle])[:1]
    assert line.startswith(f"note: {override.split('=')[0]} has no effect here: ")
    assert reason in line
    assert notes([override, *active]) == []


def test_what_trains_says_nothing_to_an_evaluation_alone():
    reason = "has no effect here: eval.only=true evaluates model.name and trains nothing."
    assert notes(EVALUATION) == [f"note: {key} {reason}" for key in effects.TRAINING_KEYS]


def test_what_an_evaluation_depends_on_is_not_noted():
    used = ["seed=1", "eval.num_prompts=10", "eval.k=2", "inference_model.temperature=0.5", "env.num_envs=64"]
    assert notes([*used, "train.collection_timeout=60", "logging.num_samples=2", "eval.only=true"]) == []


@pytest.mark.parametrize(
    ("key", "other", "count"),
    [("kv_cache_gib", "gpu_memory_utilization", 8), ("gpu_memory_utilization", "kv_cache_gib", 0)],
)
def test_device_auto_asks_the_machine(key, other, count, monkeypatch):
    overrides = ["device=auto", *CACHE, "inference_model.gpu_memory_utilization=0.4"]
    monkeypatch.setattr(effects, "count_accelerators", lambda: count)
    [line] = notes(overrides)
    assert line.startswith(f"note: inference_model.{key} has no effect here: ")
    assert other in line
    assert notes([*overrides, "ray.init_config.address=local"]) == [line]
    assert notes([*overrides, "ray.init_config.address=auto"]) == []  # what the cluster has is not known yet


def test_null_is_no_wish():
    """The remedy of the rule `kv_cache_gib_is_for_cpu`, the default of the buffer, and limits that are not set."""
    limits = [f"train.{name}=null" for name in ("buffer_size", "max_ahead", "max_policy_age", "total_optimizer_steps")]
    assert notes(["device=cuda", "inference_model.kv_cache_gib=null", *limits]) == []
    assert notes([*ASYNC, "train.epochs=3", "train.deterministic=true", *limits]) == []


def test_every_row_has_a_case():
    """By key and reason. One fires on accelerators only: `test_device_auto_asks_the_machine` has it."""
    cases = [EVALUATION, *([override, *idle] for override, idle, _, _ in CASES)]
    fired = {line for case in cases for line in notes(case)}
    rows = {f"note: {key} has no effect here: {reason}" for key, _, reason in TABLE}
    [left] = rows - fired
    assert left.startswith("note: inference_model.kv_cache_gib has no effect here: on accelerators")
    assert fired <= rows
    assert all(keys.is_known(row.key) for row in TABLE)


def test_steps_that_are_idle_themselves_make_no_epochs_idle():
    [line] = notes(["train.epochs=3", "train.total_optimizer_steps=100"])
    assert line.startswith("note: train.total_optimizer_steps ")


def test_a_key_is_noted_once():
    assert len(notes(["optimizer.scheduler.num_cycles=1", "optimizer.scheduler.type=linear", *NO_SCHEDULER])) == 2


@pytest.mark.parametrize("mode", [[], ASYNC], ids=["sync", "async"])
@pytest.mark.parametrize("task", ["ei_tiny", "ei_gsm8k", "ei_ifeval"])
def test_what_files_set_is_not_noted(task, mode):
    assert notes(mode, task) == []
    assert notes([*mode, "seed=1", "env.repeats=64", "train.topk_size=8", "train.kl_to_ref_coeff=0.5"], task) == []
