"""The rules that the configuration's values keep among each other, one small function for each.

Every rule is named after what must hold and raises `UserError` with the value, the rule and the remedy. All of them are
cheap and need no other part of the suite, so a mistake answers before anything starts. `resolve.py` applies them.
"""

import math
import os
from collections.abc import Callable, Iterable
from functools import reduce, wraps
from pathlib import Path
from typing import Any

from expert_iteration.chat_template import is_template_file
from expert_iteration.config import (
    EVAL_METRICS,
    Config,
    Device,
    Dtype,
    InferenceBackend,
    KLScheduleType,
    LoggingBackend,
    LoggingMode,
    LossFunction,
    Parallel,
    RestartFrom,
    Resume,
    accumulates_expert_set,
    collects,
    num_references,
)
from expert_iteration.data_rules import DATA_RULES
from expert_iteration.errors import UserError
from expert_iteration.expert_set_reader import SUFFIXES
from expert_iteration.hub import HUB_ID
from expert_iteration.keys import leaf_keys
from expert_iteration.reward_rules import REWARD_RULES
from expert_iteration.sizes import derive_sizes
from expert_iteration.wandb_logger import has_wandb_login

AT_LEAST_ONE = (
    "env.num_envs",
    "env.repeats",
    "env.max_prompts",
    "env.skip_hopeless_after",
    "reward.openai_concurrency",
    "train.epochs",
    "train.weight_update_frequency",
    "train.dialog_turns_per_batch",
    "train.total_dialog_turns",
    "train.topk_size",
    "train.buffer_size",
    "train.max_ahead",
    "train.total_optimizer_steps",
    "train.optim_batch_size",
    "train.gradient_accumulation_steps",
    "train.max_bad_steps",
    "train.keep_checkpoints",
    "train.stop_patience",
    "train.logging_frequency",
    "train_model.num_devices",
    "train_model.num_threads",
    "train_model.lora.r",
    "inference_model.num_devices",
    "inference_model.num_replicas",
    "inference_model.max_tokens",
    "inference_model.max_model_len",
    "inference_model.num_threads",
    "inference_model.kv_cache_gib",
    "ref_model.num_threads",
    "ref_model.refresh_every",
    "eval.num_prompts",
    "eval.num_samples",
    "eval.k",
)
AT_LEAST_ZERO = (
    "env.skip_solved",
    "reward.workers",
    "reward.openai_retries",
    "train.kl_to_ref_coeff",
    "train.kl_to_ref_schedule.end",
    "train.prioritized_sampling_alpha",
    "train.prioritized_sampling_beta",
    "train.max_policy_age",
    "train.checkpoint_frequency",
    "ref_model.num_devices",
    "optimizer.weight_decay",
    "optimizer.scheduler.warmup_steps",
    "weight_update.probe_frequency",
    "eval.frequency",
    "eval.temperature",
    "logging.num_samples",
)
ABOVE_ZERO = (
    "reward.timeout",
    "reward.openai_timeout",
    "train.minor_sft_beta",
    "train.prioritized_sampling_epsilon",
    "train.collection_timeout",
    "train_model.lora.alpha",
    "inference_model.temperature",
    "optimizer.lr",
    "optimizer.clip_grad_norm",
    "optimizer.scheduler.num_cycles",
    "weight_update.probe_tolerance",
    "weight_update.timeout",
    "logging.kl_budget",
)
FINITE = ("reward.pass_threshold", "train.selection_threshold", "train.min_reward")
PERCENTILES = ("train.selection_percentile", "train.selection_percentile_end")
SHARES = ("inference_model.top_p", "inference_model.gpu_memory_utilization")
WHY_TEMPERATURE = ": at 0 all responses to a prompt are alike and none is better than another"
SEED_LIMIT = 2**32
VLLM_MAX_LORA_RANK = 512

Rule = Callable[[Config], None]


def where_collected(rule: Rule) -> Rule:
    """The rule, of groups and batches, for runs that collect any: to others its keys say nothing (`effects.py`)."""

    @wraps(rule)
    def check(cfg: Config) -> None:
        if collects(cfg):
            rule(cfg)

    return check


def mode_belongs_to_script(cfg: Config, mode: str) -> None:
    """Each script is one algorithm."""
    asked = "sync" if cfg.train.sync else "async"
    if asked != mode:
        raise UserError(
            f"mode={asked} (train.sync={str(cfg.train.sync).lower()}) does not run in expert-iteration-{mode}.py: "
            f"use `python expert-iteration-{asked}.py mode={asked}`."
        )


def values_are_not_empty(cfg: Config) -> None:
    """A text without a letter is a slip, such as `key=` with nothing behind; none but a system prompt may be empty."""
    for key in leaf_keys():
        if _value(cfg, key) == "" and key != "env.system_prompt":
            raise UserError(f"{key} ('') is empty: give it a value, or null where it needs none.")


def sizes_are_at_least_one(cfg: Config) -> None:
    """Counts of things that a run cannot do without."""
    _check_numbers(cfg, AT_LEAST_ONE, lambda value: value >= 1, "must be at least 1")


def amounts_are_not_negative(cfg: Config) -> None:
    """Frequencies and strengths for which 0 means never or none."""
    _check_numbers(cfg, AT_LEAST_ZERO, lambda value: 0 <= value < math.inf, "must be 0 or more")


def amounts_are_above_zero(cfg: Config) -> None:
    """Strengths for which 0 has no meaning."""
    why = {"inference_model.temperature": WHY_TEMPERATURE}
    _check_numbers(cfg, ABOVE_ZERO, lambda value: 0 < value < math.inf, "must be above 0", why)


def shares_are_fractions(cfg: Config) -> None:
    """Shares of a whole."""
    _check_numbers(cfg, SHARES, lambda value: 0 < value <= 1, "must be above 0 and at most 1")


def rewards_to_reach_are_finite(cfg: Config) -> None:
    """Any reward may be asked for, also a negative one."""
    _check_numbers(cfg, FINITE, math.isfinite, "must be a finite number")


def percentiles_leave_something(cfg: Config) -> None:
    """At 100 only what equals the best of a batch would be kept."""
    _check_numbers(cfg, PERCENTILES, lambda value: 0 <= value < 100, "must be 0 or more and below 100")


def seeds_fit_every_generator(cfg: Config) -> None:
    """NumPy takes 32 bits."""
    for key in ("seed", "tiny.model_seed"):
        value = _value(cfg, key)
        if not 0 <= value < SEED_LIMIT:
            raise UserError(f"{key} ({value}) must be from 0 to {SEED_LIMIT - 1}.")


@where_collected
def group_has_two_responses(cfg: Config) -> None:
    """One response alone is neither better nor worse."""
    if cfg.env.repeats < 2:
        raise UserError(
            f"env.repeats ({cfg.env.repeats}) must be at least 2: a response is kept because it is better than others "
            "to the same prompt."
        )


@where_collected
def topk_size_fits_group(cfg: Config) -> None:
    """No more can be kept than there are."""
    if cfg.train.topk_size > cfg.env.repeats:
        raise UserError(
            f"train.topk_size ({cfg.train.topk_size}) cannot exceed env.repeats ({cfg.env.repeats}): "
            "raise env.repeats or lower train.topk_size."
        )


@where_collected
def batch_is_whole_groups(cfg: Config) -> None:
    """Selection needs every response of a group in the same batch."""
    batch, repeats = cfg.train.dialog_turns_per_batch, cfg.env.repeats
    if batch % repeats:
        below = batch // repeats * repeats
        choices = f"{below} or {below + repeats}" if below else f"{repeats}"
        raise UserError(
            f"train.dialog_turns_per_batch ({batch}) must be a multiple of env.repeats ({repeats}): "
            f"set train.dialog_turns_per_batch={choices}, or another env.repeats."
        )


@where_collected
def num_envs_fits_groups_and_batch(cfg: Config) -> None:
    """The engine is asked for whole groups, or whole parts of one, and for a whole batch in the end."""
    batch, repeats = cfg.train.dialog_turns_per_batch, cfg.env.repeats
    num_envs = min(cfg.env.num_envs, batch)
    if not _fits_groups_and_batch(num_envs, repeats, batch):
        legal = [number for number in range(1, batch + 1) if _fits_groups_and_batch(number, repeats, batch)]
        below, above = max(n for n in legal if n < num_envs), min(n for n in legal if n > num_envs)
        raise UserError(
            f"env.num_envs ({cfg.env.num_envs}) must be a multiple or a divisor of env.repeats ({repeats}) and divide "
            f"the batch of {batch} turns (train.dialog_turns_per_batch): set env.num_envs={below} or {above}."
        )


@where_collected
def buffer_holds_a_batch(cfg: Config) -> None:
    """A smaller buffer would overwrite kept responses before any of them was trained on."""
    size, sizes = cfg.train.buffer_size, derive_sizes(cfg)
    if size is not None and size < sizes.max_kept_per_batch:
        raise UserError(
            f"train.buffer_size ({size}) is too small: {sizes.turns_per_batch} turns / {cfg.env.repeats} repeats x "
            f"{cfg.train.topk_size} kept = {sizes.max_kept_per_batch} responses that a batch can keep. Raise it, or "
            "set train.buffer_size=null."
        )


@where_collected
def buffer_holds_what_accumulates(cfg: Config) -> None:
    """A smaller buffer would forget the oldest, which is not what accumulating means."""
    size, sizes, accumulates = cfg.train.buffer_size, derive_sizes(cfg), accumulates_expert_set(cfg)
    needed = sizes.num_batches * sizes.max_kept_per_batch
    if cfg.train.sync and accumulates and size is not None and size < needed:
        raise UserError(
            f"train.buffer_size ({size}) is too small where {_what_accumulates(cfg)}: {sizes.num_batches} batches x "
            f"{sizes.max_kept_per_batch} kept = {needed} responses. Set train.buffer_size=null; or "
            "train.accumulate_expert_set=false with train.empty_replay_buffer=false, which forgets the oldest."
        )


@where_collected
def max_ahead_holds_a_batch(cfg: Config) -> None:
    """Collection goes on by whole batches; a smaller limit would never let one begin."""
    ahead, groups = cfg.train.max_ahead, derive_sizes(cfg).groups_per_batch
    if not cfg.train.sync and ahead is not None and ahead < groups:
        raise UserError(
            f"train.max_ahead ({ahead}) is less than the {groups} groups of one batch, so none could be collected: "
            f"set train.max_ahead={2 * groups} or more to collect while training ({groups} takes turns), or lower "
            "train.dialog_turns_per_batch."
        )


def sync_iter_belongs_to_sync(cfg: Config) -> None:
    """Asynchronous collection never waits, so there is nothing to choose."""
    if cfg.train.sync and cfg.train.sync_iter is None:
        raise UserError("train.sync_iter (null) must be true or false in sync mode.")
    if not cfg.train.sync and cfg.train.sync_iter is not None:
        raise UserError(
            f"train.sync_iter ({str(cfg.train.sync_iter).lower()}) has a meaning in sync mode only: remove it, or run "
            "`python expert-iteration-sync.py mode=sync`."
        )


def max_policy_age_leaves_something(cfg: Config) -> None:
    """Generated while the batch before is trained on, a batch is at least one push old."""
    if cfg.train.sync and cfg.train.sync_iter is False and cfg.train.max_policy_age == 0:
        raise UserError(
            "train.max_policy_age (0) drops every response with train.sync_iter=false, where each batch is made before "
            "the last push: set train.max_policy_age=1 or more, or train.sync_iter=true."
        )


def accumulation_forgets_nothing(cfg: Config) -> None:
    """All that was ever kept, and nothing that is old, contradict each other."""
    age = cfg.train.max_policy_age
    if cfg.train.sync and accumulates_expert_set(cfg) and age is not None:
        raise UserError(
            f"train.max_policy_age ({age}) drops old responses where {_what_accumulates(cfg)}: set "
            "train.max_policy_age=null; or train.accumulate_expert_set=false with train.empty_replay_buffer=false, "
            "and a train.buffer_size for what is not too old."
        )


def accumulation_belongs_to_sync(cfg: Config) -> None:
    """The asynchronous buffer is a ring, of which responses are drawn and never worked off."""
    if not cfg.train.sync and cfg.train.accumulate_expert_set:
        raise UserError(
            "train.accumulate_expert_set (true) has a meaning in sync mode only, where batches are worked off: set it "
            "to null and raise train.buffer_size, or run `python expert-iteration-sync.py mode=sync`."
        )


def restarting_belongs_to_sync(cfg: Config) -> None:
    """Asynchronous training has no iterations that could begin anew."""
    if not cfg.train.sync and cfg.train.restart_from is RestartFrom.base:
        raise UserError(
            "train.restart_from (base) begins anew with each batch, which has a meaning in sync mode only: set "
            "train.restart_from=current, or run `python expert-iteration-sync.py mode=sync`."
        )


def restarting_pushes_finished_policies(cfg: Config) -> None:
    """In the middle of a batch the policy is on its way from the start model: worse than the one before it."""
    frequency = cfg.train.weight_update_frequency
    if cfg.train.restart_from is RestartFrom.base and frequency is not None:
        raise UserError(
            f"train.weight_update_frequency ({frequency}) would push policies that are half trained with "
            "train.restart_from=base: set train.weight_update_frequency=null, which pushes once after each batch."
        )


def expert_set_exists(cfg: Config) -> None:
    """Whether its rows can be used shows when they are read."""
    path = cfg.train.from_expert_set
    if path is None:
        return
    if not Path(path).exists():
        raise UserError(
            f"train.from_expert_set ({path}) does not exist: correct it, or set it to null to collect responses."
        )
    if not Path(path).is_dir() and Path(path).suffix not in SUFFIXES:
        raise UserError(
            f"train.from_expert_set ({path}) must be a folder of Parquet files, or a file that ends in "
            f"{' or '.join(SUFFIXES)}."
        )


def expert_set_belongs_to_sync(cfg: Config) -> None:
    """Nothing is collected that training could overlap with."""
    if not cfg.train.sync and cfg.train.from_expert_set is not None:
        raise UserError(
            f"train.from_expert_set ({cfg.train.from_expert_set}) is trained on in passes, which only the synchronous "
            "script makes: run `python expert-iteration-sync.py mode=sync`."
        )


def async_pushes_weights(cfg: Config) -> None:
    """Without an interval the engine would never see a new policy."""
    if not cfg.train.sync and cfg.train.weight_update_frequency is None:
        raise UserError(
            "train.weight_update_frequency (null) means before each new collection, which async mode does not have: "
            "set a number of gradient steps."
        )


def minor_sft_stands_alone(cfg: Config) -> None:
    """minor_sft has the reference in it already; TorchRL drops the KL term beside it."""
    if cfg.train.loss_function is LossFunction.minor_sft and cfg.train.kl_to_ref_coeff:
        raise UserError(
            f"train.kl_to_ref_coeff ({cfg.train.kl_to_ref_coeff}) has no effect with train.loss_function=minor_sft: "
            "set train.kl_to_ref_coeff=null (train.minor_sft_beta holds the policy back), or train.loss_function=sft."
        )


def kl_schedule_has_a_start(cfg: Config) -> None:
    """What is not there cannot fall."""
    if cfg.train.kl_to_ref_schedule.type is not KLScheduleType.constant and not cfg.train.kl_to_ref_coeff:
        raise UserError(
            f"train.kl_to_ref_schedule.type ({cfg.train.kl_to_ref_schedule.type}) has no effect with "
            f"train.kl_to_ref_coeff={cfg.train.kl_to_ref_coeff}, at which it starts: set train.kl_to_ref_coeff above "
            "0, or train.kl_to_ref_schedule.type=constant."
        )


def mixed_precision_has_two_types(cfg: Config) -> None:
    """Autocast to float32 changes nothing."""
    if cfg.train.mixed_precision and cfg.train_model.torch_dtype is Dtype.float32:
        raise UserError(
            "train.mixed_precision (true) has no effect with train_model.torch_dtype=float32: set "
            "train.mixed_precision=false, or train_model.torch_dtype=bfloat16."
        )


def lora_dropout_is_a_share(cfg: Config) -> None:
    """At 1 nothing would be left."""
    dropout = cfg.train_model.lora.dropout
    if not 0 <= dropout < 1:
        raise UserError(f"train_model.lora.dropout ({dropout}) must be from 0 to below 1.")


def reference_has_a_place(cfg: Config) -> None:
    """Only adapters can be switched off."""
    if cfg.ref_model.num_devices == 0 and not cfg.train_model.lora.enabled:
        raise UserError(
            "ref_model.num_devices (0) needs train_model.lora.enabled=true, where the policy with its adapters off is "
            "the reference: set ref_model.num_devices=null, or at least 1."
        )


def refreshed_reference_has_a_place(cfg: Config) -> None:
    """The policy with its adapters off is the start model for ever."""
    every = cfg.ref_model.refresh_every
    if every is not None and num_references(cfg) == 0:
        raise UserError(
            f"ref_model.refresh_every ({every}) needs a reference of its own, and here it is the policy with its "
            "adapters off: set ref_model.num_devices=1, or ref_model.refresh_every=null."
        )


def refreshed_reference_has_a_use(cfg: Config) -> None:
    """What is in no loss need not be kept fresh."""
    every, train = cfg.ref_model.refresh_every, cfg.train
    if every is not None and not train.kl_to_ref_coeff and train.loss_function is LossFunction.sft:
        raise UserError(
            f"ref_model.refresh_every ({every}) has no effect with train.kl_to_ref_coeff={train.kl_to_ref_coeff} and "
            "train.loss_function=sft, which do not use the reference: set train.kl_to_ref_coeff above 0, or "
            "ref_model.refresh_every=null."
        )


def refreshed_reference_is_not_quantized(cfg: Config) -> None:
    """Four bits are packed when a model is loaded."""
    every = cfg.ref_model.refresh_every
    if every is not None and cfg.ref_model.quantization.enabled:
        raise UserError(
            f"ref_model.refresh_every ({every}) cannot load weights into a model in four bits: set "
            "ref_model.quantization.enabled=false, or ref_model.refresh_every=null."
        )


def quantization_needs_lora(cfg: Config) -> None:
    """Four bits cannot be trained."""
    if cfg.train_model.quantization.enabled and not cfg.train_model.lora.enabled:
        raise UserError(
            "train_model.quantization.enabled (true) freezes the model's weights: set train_model.lora.enabled=true, "
            "whose adapters are trained, or train_model.quantization.enabled=false."
        )


def quantization_is_on_one_whole_model(cfg: Config) -> None:
    """FSDP cannot share out packed weights."""
    if cfg.train_model.quantization.enabled and cfg.train_model.parallel is Parallel.fsdp:
        raise UserError(
            "train_model.parallel (fsdp) cannot share out the packed weights of train_model.quantization.enabled=true: "
            "set train_model.parallel=ddp."
        )


def lora_only_needs_lora(cfg: Config) -> None:
    """Without adapters there is nothing to send."""
    if cfg.weight_update.lora_only and not cfg.train_model.lora.enabled:
        raise UserError(
            "weight_update.lora_only (true) needs train_model.lora.enabled=true: set one of them to the other's value."
        )


def tensor_parallelism_needs_vllm(cfg: Config) -> None:
    """Hugging Face's generation runs on one device."""
    if cfg.inference_model.backend is InferenceBackend.transformers and cfg.inference_model.num_devices > 1:
        raise UserError(
            f"inference_model.num_devices ({cfg.inference_model.num_devices}) above 1 is tensor parallelism, which "
            "inference_model.backend=transformers does not have: set inference_model.num_replicas for more engines, or "
            "inference_model.backend=vllm."
        )


def adapters_have_a_rank_that_vllm_serves(cfg: Config) -> None:
    """vLLM's kernels end there."""
    rank, is_vllm = cfg.train_model.lora.r, cfg.inference_model.backend is InferenceBackend.vllm
    if cfg.weight_update.lora_only and is_vllm and rank > VLLM_MAX_LORA_RANK:
        raise UserError(
            f"train_model.lora.r ({rank}) is more than vLLM serves ({VLLM_MAX_LORA_RANK}) with "
            "weight_update.lora_only=true: lower it, or set weight_update.lora_only=false."
        )


@where_collected
def every_engine_gets_a_group(cfg: Config) -> None:
    """A group is not split over engines."""
    replicas, num_envs = cfg.inference_model.num_replicas, derive_sizes(cfg).num_envs
    groups = max(1, num_envs // cfg.env.repeats)
    if replicas > groups:
        raise UserError(
            f"inference_model.num_replicas ({replicas}) is more than the {groups} groups that are asked at once "
            f"(env.num_envs {num_envs} / env.repeats {cfg.env.repeats}), so some engines would idle: raise "
            "env.num_envs, or lower inference_model.num_replicas."
        )


def ray_addresses_are_joined_directly(cfg: Config) -> None:
    """Ray's client protocol has no placement groups of its own process; a cluster's size is not the run's to set."""
    options = cfg.ray.init_config
    address = options.get("address")
    if address is None or address == "local":
        return
    if str(address).startswith("ray://"):
        raise UserError(
            f"ray.init_config.address ({address}) is Ray's client protocol: start the script on a host of the cluster, "
            "with ray.init_config.address=auto."
        )
    sizes = [name for name in ("num_cpus", "num_gpus") if options.get(name) is not None]
    if sizes:
        raise UserError(
            f"ray.init_config.{sizes[0]} ({options[sizes[0]]}) has no meaning with ray.init_config.address={address}, "
            "whose hosts have what they have: set it to null."
        )


def training_task_takes_its_own_accelerator(cfg: Config) -> None:
    """Which it gets follows from the placement."""
    num_gpus = cfg.ray.train_handler_config.get("num_gpus")
    if num_gpus is not None:
        raise UserError(
            f"ray.train_handler_config.num_gpus ({num_gpus}) has no place here: train_model.num_devices and placement "
            "decide which accelerators train. Remove it."
        )


def gradient_checkpointing_needs_train_mode(cfg: Config) -> None:
    """Transformers leaves it out in evaluation mode, without a word."""
    if cfg.train_model.eval and cfg.train_model.gradient_checkpointing:
        raise UserError(
            "train_model.gradient_checkpointing (true) has no effect with train_model.eval=true: set one of them to "
            "false."
        )


def response_fits_context(cfg: Config) -> None:
    """The prompt needs room too."""
    length, response = cfg.inference_model.max_model_len, cfg.inference_model.max_tokens
    if length is not None and length <= response:
        raise UserError(
            f"inference_model.max_model_len ({length}) leaves no room for a prompt beside inference_model.max_tokens "
            f"({response}): raise the first or lower the second."
        )


def kv_cache_gib_is_for_cpu(cfg: Config) -> None:
    """vLLM sizes the cache on accelerators by gpu_memory_utilization."""
    if cfg.device is Device.cuda and cfg.inference_model.kv_cache_gib is not None:
        raise UserError(
            f"inference_model.kv_cache_gib ({cfg.inference_model.kv_cache_gib}) has no effect with device=cuda: set it "
            "to null and choose inference_model.gpu_memory_utilization."
        )


def betas_are_two_rates(cfg: Config) -> None:
    """Adam keeps two running means."""
    betas = cfg.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"optimizer.betas ({betas}) must be two numbers from 0 to below 1, such as [0.9,0.999].")


def warmup_is_fraction_or_steps(cfg: Config) -> None:
    """From 1 on it counts optimizer steps."""
    warmup = cfg.optimizer.scheduler.warmup_steps
    if warmup >= 1 and warmup != int(warmup):
        raise UserError(
            f"optimizer.scheduler.warmup_steps ({warmup}) must be a fraction of the run below 1, or a whole number of "
            "optimizer steps."
        )


def evaluation_samples_differ(cfg: Config) -> None:
    """At temperature 0 every sample is the greedy response, which is evaluated anyway."""
    if cfg.eval.temperature == 0 and cfg.eval.num_samples > 1:
        raise UserError(
            f"eval.num_samples ({cfg.eval.num_samples}) would be alike at eval.temperature=0: set eval.num_samples=1, "
            "or a temperature above 0."
        )


def pass_at_k_has_its_samples(cfg: Config) -> None:
    """Nothing is known of more responses than were sampled."""
    k, num_samples = cfg.eval.k, cfg.eval.num_samples
    if k is not None and k > num_samples:
        raise UserError(
            f"eval.k ({k}) cannot exceed eval.num_samples ({num_samples}): raise eval.num_samples, or lower eval.k."
        )


def policies_are_compared_by_a_figure(cfg: Config) -> None:
    """An evaluation has no other by which higher is better."""
    if cfg.eval.metric not in EVAL_METRICS:
        raise UserError(f"eval.metric ({cfg.eval.metric}) must be one of {', '.join(EVAL_METRICS)}.")


def evaluation_alone_trains_nothing(cfg: Config) -> None:
    """There is nothing to go on with, and no policy that an expert set could teach."""
    if not cfg.eval.only:
        return
    asked = {
        "train.from_expert_set": cfg.train.from_expert_set,
        "resume_from": cfg.resume_from,
        "resume": None if cfg.resume is Resume.never else cfg.resume,
    }
    for key, value in asked.items():
        if value is not None:
            raise UserError(
                f"{key} ({value}) has no meaning with eval.only=true, which evaluates model.name and trains nothing: "
                "remove it (a trained model is evaluated by its folder, such as model.name=RUN_DIR/last), or set "
                "eval.only=false."
            )


def model_exists(cfg: Config) -> None:
    """A path must lead to a model folder; anything else must look like a hub id."""
    name = cfg.model.name
    if os.path.isabs(name):
        if not (Path(name) / "config.json").is_file():
            raise UserError(
                f"model.name ({name}) is a path, and no Hugging Face folder (with a config.json) is there: correct it, "
                "or give a hub id such as Qwen/Qwen2.5-3B."
            )
    elif not HUB_ID.fullmatch(name):
        raise UserError(
            f"model.name ({name!r}) is neither a path, which begins with /, . or ~, nor a hub id such as "
            "Qwen/Qwen2.5-3B, nor tiny."
        )


def chat_template_file_exists(cfg: Config) -> None:
    """Whether a name is one of the tokenizer's templates, and a file holds one, shows when the tokenizer is loaded."""
    template = cfg.model.chat_template
    if template is not None and is_template_file(template) and not Path(template).is_file():
        raise UserError(
            f"model.chat_template ({template}) is a path, and no file is there: correct it, name one of the "
            "tokenizer's own templates, or set it to null for its default."
        )


def wandb_can_be_reached(cfg: Config) -> None:
    """W&B online needs a login; its mode needs W&B."""
    mode = cfg.logging.mode
    if mode is None:
        return
    if cfg.logging.backend is LoggingBackend.none:
        raise UserError(
            f"logging.mode ({mode}) has no effect with logging.backend=none: set it to null, or logging.backend=wandb."
        )
    if mode is LoggingMode.online and not has_wandb_login():
        raise UserError(
            "logging.mode (online) needs a login: run `wandb login`, export WANDB_API_KEY, or set logging.mode=offline "
            "(`wandb sync` uploads later)."
        )


# In this order: the later ones divide by what the earlier ones checked.
RULES: tuple[Rule, ...] = (
    values_are_not_empty,
    sizes_are_at_least_one,
    amounts_are_above_zero,  # before the next, as eval.temperature follows inference_model.temperature
    amounts_are_not_negative,
    shares_are_fractions,
    rewards_to_reach_are_finite,
    percentiles_leave_something,
    seeds_fit_every_generator,
    group_has_two_responses,
    topk_size_fits_group,
    batch_is_whole_groups,
    num_envs_fits_groups_and_batch,
    buffer_holds_a_batch,
    buffer_holds_what_accumulates,
    max_ahead_holds_a_batch,
    sync_iter_belongs_to_sync,
    max_policy_age_leaves_something,
    accumulation_forgets_nothing,
    accumulation_belongs_to_sync,
    restarting_belongs_to_sync,
    restarting_pushes_finished_policies,
    expert_set_exists,
    expert_set_belongs_to_sync,
    async_pushes_weights,
    minor_sft_stands_alone,
    kl_schedule_has_a_start,
    mixed_precision_has_two_types,
    lora_dropout_is_a_share,
    reference_has_a_place,
    refreshed_reference_has_a_place,
    refreshed_reference_has_a_use,
    refreshed_reference_is_not_quantized,
    quantization_needs_lora,
    quantization_is_on_one_whole_model,
    lora_only_needs_lora,
    tensor_parallelism_needs_vllm,
    adapters_have_a_rank_that_vllm_serves,
    every_engine_gets_a_group,
    ray_addresses_are_joined_directly,
    training_task_takes_its_own_accelerator,
    gradient_checkpointing_needs_train_mode,
    response_fits_context,
    kv_cache_gib_is_for_cpu,
    betas_are_two_rates,
    warmup_is_fraction_or_steps,
    evaluation_samples_differ,
    pass_at_k_has_its_samples,
    policies_are_compared_by_a_figure,
    evaluation_alone_trains_nothing,
    model_exists,
    chat_template_file_exists,
    *DATA_RULES,
    *REWARD_RULES,
    wandb_can_be_reached,
)


def _check_numbers(
    cfg: Config,
    keys: Iterable[str],
    holds: Callable[[float], bool],
    rule: str,
    why: dict[str, str] | None = None,
) -> None:
    """`holds` is written so that NaN fails it; a key that is null is left to its own meaning."""
    for key in keys:
        value = _value(cfg, key)
        if value is not None and not holds(value):
            reason = (why or {}).get(key, "")
            raise UserError(f"{key} ({value}) {rule}{reason}.")


def _value(cfg: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), cfg)


def _what_accumulates(cfg: Config) -> str:
    """Which setting it is, for a message."""
    if cfg.train.accumulate_expert_set:
        return "train.accumulate_expert_set=true keeps all that was ever kept"
    return "train.restart_from=base trains on all that was ever kept (train.accumulate_expert_set=null)"


def _fits_groups_and_batch(num_envs: int, repeats: int, batch: int) -> bool:
    return (num_envs % repeats == 0 or repeats % num_envs == 0) and batch % num_envs == 0
