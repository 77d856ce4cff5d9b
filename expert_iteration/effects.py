"""Settings that somebody gave and that change nothing in the configuration they are part of: to be said, not ignored.

A table of key, condition and reason. What contradicts another setting is refused (`validation.py`); what is merely idle
is noted here, as it may be meant for another command line.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

from expert_iteration.accelerators import count_accelerators
from expert_iteration.config import (
    Config,
    Dataset,
    Device,
    InferenceBackend,
    KLScheduleType,
    LoggingBackend,
    LoggingMode,
    LossFunction,
    OpenAIKind,
    OptimizerName,
    Selection,
    accumulates_expert_set,
    empties_buffer,
    is_local,
    num_references,
    pushes_before_collecting,
)
from expert_iteration.config import SchedulerType as Shape
from expert_iteration.hub import BUILT_IN
from expert_iteration.keys import free_sections, is_for_sampling, is_for_training, leaf_keys
from expert_iteration.reward_sum import OPENAI, named_functions
from expert_iteration.sources import has_answer_modes, is_generated


class Idle(NamedTuple):
    """A row of the table: `key` has no effect where `holds`, because of `reason`."""

    key: str
    holds: Callable[[Config], bool]
    reason: str


def settings_without_effect(cfg: Config, given: Collection[str]) -> list[str]:
    """One line for each key that has no effect in this configuration, with the first reason that holds.

    Args:
        cfg: has passed the rules of `validation.py`.
        given: the dotted keys that the user set; what a file sets is not remarked upon.
    """
    reasons: dict[str, str] = {}
    for key, holds, reason in TABLE:
        if key in given and key not in reasons and holds(cfg):
            reasons[key] = reason
    return [f"note: {key} has no effect here: {reason}" for key, reason in reasons.items()]


def _on_accelerators(cfg: Config) -> bool:
    return cfg.device is Device.cuda or (cfg.device is Device.auto and is_local(cfg) and count_accelerators() > 0)


def _on_cpu(cfg: Config) -> bool:
    return cfg.device is Device.cpu or (cfg.device is Device.auto and is_local(cfg) and count_accelerators() == 0)


def _is_judged_by_server(cfg: Config) -> bool:
    return OPENAI in named_functions(cfg.reward)


def _is_emptied_buffer(cfg: Config) -> bool:
    return empties_buffer(cfg) and cfg.train.buffer_size is not None


def _is_accumulating_buffer(cfg: Config) -> bool:
    return cfg.train.sync and accumulates_expert_set(cfg) and cfg.train.buffer_size is not None


def _never_ages(cfg: Config) -> bool:
    """Whether every response that is trained on was made by the weights last pushed."""
    return empties_buffer(cfg) and pushes_before_collecting(cfg)


def _given_where(name: str, holds: Callable[[Config], bool]) -> Callable[[Config], bool]:
    """Whether `env.<name>` has a value, as null is no wish, where `holds`."""
    return lambda cfg: vars(cfg.env)[name] is not None and holds(cfg)


def _rows_of(keys: tuple[str, ...], holds: Callable[[Config], bool], reason: str) -> list[Idle]:
    return [Idle(key, holds, reason) for key in keys]


# Without train.from_expert_set, which is refused beside eval.only=true.
TRAINING_KEYS = tuple(
    key for key in leaf_keys() if is_for_training(key) and key != "train.from_expert_set" and key not in free_sections()
)
NEEDED_TO_SAMPLE = tuple(key for key in leaf_keys() if is_for_sampling(key))
PRIORITY_KEYS = tuple(f"train.prioritized_sampling_{name}" for name in ("alpha", "beta", "epsilon"))
SCHEDULER_KEYS = tuple(f"optimizer.scheduler.{name}" for name in ("type", "warmup_steps", "num_cycles"))
COLUMN_KEYS = ("prompt_column", "answer_column")
WANDB_KEYS = tuple(f"logging.{name}" for name in ("project", "entity", "group", "tags", "experiment_name"))
TINY_KEYS = ("tiny.model_seed", "tiny.cache_dir")
OPENAI_KEYS = tuple(
    f"reward.openai_{name}" for name in ("model", "kind", "prompt", "concurrency", "retries", "timeout")
)
LORA_KEYS = tuple(f"train_model.lora.{name}" for name in ("r", "alpha", "dropout"))
VLLM_KEYS = tuple(
    f"inference_model.{name}" for name in ("gpu_memory_utilization", "enforce_eager", "enable_prefix_caching")
)
REFERENCE_KEYS = tuple(
    f"ref_model.{name}" for name in ("torch_dtype", "attn_implementation", "quantization.enabled", "num_threads")
)

# Without logging.mode, which is refused beside logging.backend=none unless it is null.
TABLE: tuple[Idle, ...] = (
    *_rows_of(
        TRAINING_KEYS,
        lambda cfg: cfg.eval.only,
        "eval.only=true evaluates model.name and trains nothing.",
    ),
    *_rows_of(
        NEEDED_TO_SAMPLE,
        lambda cfg: cfg.train.from_expert_set is not None,
        "train.from_expert_set trains on responses that are there: none are sampled.",
    ),
    Idle(
        "expert_set.token_ids",
        lambda cfg: not cfg.expert_set.save,
        "expert_set.save=false writes nothing.",
    ),
    *(
        Idle(
            f"env.{name}",
            _given_where(name, is_generated),
            "the task makes its own problems, unless env.dataset_path or env.dataset_name gives others.",
        )
        for name in ("dataset_config", "split", "eval_split", *COLUMN_KEYS)
    ),
    *(
        Idle(
            f"env.{name}",
            _given_where(name, lambda cfg: cfg.env.dataset is Dataset.countdown),
            "env.dataset=countdown makes its prompts of the columns nums and target.",
        )
        for name in COLUMN_KEYS
    ),
    Idle(
        "env.answer_column",
        _given_where("answer_column", lambda cfg: cfg.env.dataset is Dataset.ifeval),
        "env.dataset=ifeval has instructions to follow, and no answers.",
    ),
    Idle(
        "env.dataset_config",
        _given_where("dataset_config", lambda cfg: cfg.env.dataset_path is not None),
        "env.dataset_path is read in place of a data set of the hub.",
    ),
    Idle(
        "reward.answer_mode",
        lambda cfg: not has_answer_modes(cfg),
        "only gsm8k, and custom with env.answer_column, take an answer in several forms.",
    ),
    Idle(
        "env.skip_hopeless_after",
        lambda cfg: cfg.env.skip_hopeless_after is not None and cfg.env.skip_solved == 0,
        "env.skip_solved=0 leaves no prompt out.",
    ),
    Idle(
        "reward.timeout",
        lambda cfg: cfg.reward.workers == 0,
        "reward.workers=0 judges in the collector's own process, without a limit of time.",
    ),
    Idle(
        "reward.openai_url",
        lambda cfg: cfg.reward.openai_url is not None and not _is_judged_by_server(cfg),
        "reward.fn is given and names no openai.",
    ),
    *_rows_of(
        OPENAI_KEYS,
        lambda cfg: not _is_judged_by_server(cfg),
        "it is for a server's judge or reward model: reward.openai_url, with reward.fn null or naming openai.",
    ),
    Idle(
        "reward.openai_prompt",
        lambda cfg: cfg.reward.openai_kind is OpenAIKind.reward_model,
        "reward.openai_kind=reward_model is asked nothing in words.",
    ),
    Idle(
        "reward.openai_concurrency",
        lambda cfg: cfg.reward.workers > 0,
        "each of reward.workers asks for one response at a time.",
    ),
    Idle(
        "train.stop_patience",
        lambda cfg: cfg.train.stop_patience is not None and cfg.eval.frequency == 0,
        "eval.frequency=0 evaluates before and after the run only.",
    ),
    Idle(
        "train.total_optimizer_steps",
        lambda cfg: cfg.train.sync and cfg.train.total_optimizer_steps is not None,
        "in sync mode train.epochs and what each batch keeps give the steps.",
    ),
    Idle(
        "train.max_ahead",
        lambda cfg: cfg.train.sync and cfg.train.max_ahead is not None,
        "in sync mode train.sync_iter says how far collection may be ahead.",
    ),
    Idle(
        "train.max_ahead",
        lambda cfg: cfg.train.deterministic and cfg.train.max_ahead is not None,
        "train.deterministic=true collects one batch at a time.",
    ),
    Idle(
        "train.deterministic",
        lambda cfg: cfg.train.sync,
        "the synchronous script alternates anyway, with train.sync_iter=true.",
    ),
    Idle(
        "train.epochs",
        lambda cfg: not cfg.train.sync and cfg.train.total_optimizer_steps is not None,
        "train.total_optimizer_steps, which is set, gives the steps.",
    ),
    Idle(
        "train.empty_replay_buffer",
        lambda cfg: not cfg.train.sync,
        "in async mode the buffer is a ring: new responses take the places of the oldest.",
    ),
    Idle(
        "train.empty_replay_buffer",
        lambda cfg: cfg.train.sync and accumulates_expert_set(cfg),
        "all that was ever kept is trained on again (train.accumulate_expert_set, or train.restart_from=base).",
    ),
    Idle(
        "train.accumulate_expert_set",
        lambda cfg: not cfg.train.sync and cfg.train.accumulate_expert_set is not None,
        "async mode never accumulates: new responses take the places of the oldest.",
    ),
    Idle(
        "train.max_policy_age",
        lambda cfg: cfg.train.max_policy_age is not None and _never_ages(cfg),
        "all that is trained on was made by the weights last pushed.",
    ),
    *_rows_of(
        PRIORITY_KEYS,
        lambda cfg: not cfg.train.prioritized_sampling,
        "train.prioritized_sampling=false draws evenly.",
    ),
    *_rows_of(
        ("train.prioritized_sampling", *PRIORITY_KEYS),
        lambda cfg: cfg.train.selection is Selection.random,
        "train.selection=random, the control, is drawn evenly too: by reward it would be selected after all.",
    ),
    Idle(
        "train.selection_threshold",
        lambda cfg: cfg.train.selection is not Selection.threshold,
        "only train.selection=threshold has one.",
    ),
    Idle(
        "train.selection_threshold",
        lambda cfg: cfg.train.min_reward is not None and cfg.train.min_reward > cfg.train.selection_threshold,
        "train.min_reward, which is higher, decides.",
    ),
    Idle(
        "train.min_reward",
        lambda cfg: (
            cfg.train.min_reward is not None
            and cfg.train.selection is Selection.threshold
            and cfg.train.min_reward <= cfg.train.selection_threshold
        ),
        "train.selection_threshold, which is no less, decides.",
    ),
    *_rows_of(
        ("train.selection_percentile", "train.selection_percentile_end"),
        lambda cfg: cfg.train.selection is not Selection.percentile,
        "only train.selection=percentile has one.",
    ),
    Idle(
        "train.selection_ties",
        # With train.dedup they decide which of a response's copies stays.
        lambda cfg: cfg.train.selection is Selection.random and not cfg.train.dedup,
        "train.selection=random draws whatever the rewards, so there are no ties.",
    ),
    *_rows_of(
        PRIORITY_KEYS[1:],
        lambda cfg: cfg.train.prioritized_sampling_alpha == 0,
        "train.prioritized_sampling_alpha=0 draws evenly.",
    ),
    Idle(
        "train.prioritized_sampling_beta",
        lambda cfg: cfg.train.sync,
        "in sync mode each pass draws every response once, so there is no preference to undo.",
    ),
    Idle(
        "train.kl_to_ref_schedule.end",
        lambda cfg: cfg.train.kl_to_ref_schedule.type is KLScheduleType.constant,
        "train.kl_to_ref_schedule.type=constant stays at train.kl_to_ref_coeff.",
    ),
    Idle(
        "train_model.torch_dtype",
        lambda cfg: not cfg.train.mixed_precision,
        "train.mixed_precision=false trains in float32.",
    ),
    Idle(
        "train.minor_sft_beta",
        lambda cfg: cfg.train.loss_function is LossFunction.sft,
        "train.loss_function=sft has no beta; minor_sft has.",
    ),
    Idle(
        "train.buffer_size",
        _is_emptied_buffer,
        "train.empty_replay_buffer=true never holds more than one batch's responses, for which there is room anyway.",
    ),
    Idle(
        "train.buffer_size",
        _is_accumulating_buffer,
        "where all that was ever kept accumulates there is room for it anyway.",
    ),
    *_rows_of(
        SCHEDULER_KEYS,
        lambda cfg: not cfg.optimizer.scheduler.enabled,
        "optimizer.scheduler.enabled=false keeps the learning rate as it is.",
    ),
    Idle(
        "optimizer.scheduler.num_cycles",
        lambda cfg: cfg.optimizer.scheduler.type is not Shape.cosine_with_warmup,
        "only optimizer.scheduler.type=cosine_with_warmup has cycles.",
    ),
    Idle(
        "optimizer.betas",
        lambda cfg: cfg.optimizer.name is OptimizerName.SGD,
        "optimizer.name=SGD has no betas; Adam and AdamW have.",
    ),
    Idle(
        "placement",
        _on_cpu,
        "on a CPU every model is a process of its own, and all share its cores and memory.",
    ),
    *_rows_of(
        LORA_KEYS,
        lambda cfg: not cfg.train_model.lora.enabled,
        "train_model.lora.enabled=false trains the model's own weights.",
    ),
    Idle(
        "train_model.parallel",
        lambda cfg: cfg.train_model.num_devices == 1,
        "train_model.num_devices=1 holds the whole model.",
    ),
    Idle(
        "inference_model.attn_implementation",
        lambda cfg: cfg.inference_model.backend is InferenceBackend.vllm,
        "inference_model.backend=vllm chooses its own attention kernel.",
    ),
    *_rows_of(
        VLLM_KEYS,
        lambda cfg: cfg.inference_model.backend is InferenceBackend.transformers,
        "it is for vLLM, and inference_model.backend=transformers.",
    ),
    Idle(
        "inference_model.kv_cache_gib",
        lambda cfg: (
            cfg.inference_model.kv_cache_gib is not None
            and cfg.inference_model.backend is InferenceBackend.transformers
        ),
        "inference_model.backend=transformers has a cache as large as its batch needs.",
    ),
    *_rows_of(
        REFERENCE_KEYS,
        lambda cfg: num_references(cfg) == 0,
        "the reference is the policy with its adapters off (ref_model.num_devices=1 gives it a place of its own).",
    ),
    Idle(
        "inference_model.kv_cache_gib",
        lambda cfg: cfg.inference_model.kv_cache_gib is not None and _on_accelerators(cfg),
        "on accelerators inference_model.gpu_memory_utilization sizes the cache.",
    ),
    Idle(
        "inference_model.gpu_memory_utilization",
        lambda cfg: cfg.inference_model.kv_cache_gib is not None and _on_cpu(cfg),
        "on a CPU inference_model.kv_cache_gib, which is set, sizes the cache.",
    ),
    *_rows_of(
        TINY_KEYS,
        # The built-in task's problems are the same for every seed.
        lambda cfg: cfg.model.name != BUILT_IN,
        "it is for the built-in model, model.name=tiny.",
    ),
    *_rows_of(
        WANDB_KEYS,
        lambda cfg: cfg.logging.backend is LoggingBackend.none,
        "it is for W&B, which logging.backend=none leaves out.",
    ),
    *_rows_of(
        WANDB_KEYS,
        lambda cfg: cfg.logging.mode is LoggingMode.disabled,
        "it is for W&B, which logging.mode=disabled switches off.",
    ),
)
