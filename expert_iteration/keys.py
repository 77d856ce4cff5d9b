"""Which configuration keys exist, and what to tell somebody who writes one that does not.

All knowledge comes from the schema, but for the keys of the published suite that have a successor or had no effect.
"""

import dataclasses
import difflib
from collections.abc import Iterator
from functools import cache
from typing import Any, get_origin, get_type_hints

from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from expert_iteration.config import Config

SUCCESSORS = {
    "train.exp_name": "logging.experiment_name",
    "logging.checkpoint_frequency": "train.checkpoint_frequency",
}
GONE = {
    "ref_model.lora": "the reference is the frozen start model and has no adapters",
    "ref_model.gradient_checkpointing": "the reference is never differentiated",
}
# What an evaluation alone does without, but for the mode's keys, of which the engine's threads depend, and the limit of
# waiting.
TRAINING_SECTIONS = ("train.", "train_model.", "ref_model.", "optimizer.", "weight_update.", "expert_set.")
USED_BY_EVALUATIONS = ("train.sync", "train.sync_iter", "train.collection_timeout")
ONLY_FOR_TRAINING = (
    "placement",
    *(f"env.{name}" for name in ("max_prompts", "repeats", "shuffle", "skip_hopeless_after", "skip_solved")),
    "model.compile",
    "inference_model.include_stop_str_in_output",
    "eval.frequency",
    "eval.metric",
    "logging.checkpoint_dir",
    "logging.kl_budget",
    "ray.collector_config",
    "ray.replay_buffer_config",
)
# What a run on an expert set (`train.from_expert_set`) does without, as it samples nothing.
SAMPLING_SECTIONS = ("reward.", "inference_model.", "weight_update.", "eval.", "expert_set.")
# The limit of lengths, what ends a response, and what exported models say of themselves.
USED_WITHOUT_ENGINE = (
    "eval.only",
    *(f"inference_model.{name}" for name in ("max_model_len", "include_stop_str_in_output", "torch_dtype")),
    *(f"inference_model.{name}" for name in ("max_tokens", "temperature", "top_p")),
)
ONLY_FOR_SAMPLING = (
    *(f"env.{name}" for name in ("dataset_name", "dataset_config", "dataset_path", "split", "eval_split", "repeats")),
    *(f"env.{name}" for name in ("prompt_column", "answer_column", "max_prompts", "shuffle")),
    *("env.skip_solved", "env.skip_hopeless_after"),
    *("ref_model.refresh_every", "train.sync_iter", "train.weight_update_frequency"),
    *("train.dialog_turns_per_batch", "train.total_dialog_turns", "train.topk_size", "train.buffer_size"),
    *("train.empty_replay_buffer", "train.restart_from", "train.accumulate_expert_set", "train.max_policy_age"),
    *("train.collection_timeout", "train.stop_patience", "train.selection_threshold", "train.selection_percentile"),
    *("train.selection_percentile_end", "train.selection_ties", "train.dedup", "train.min_reward"),
)
NEAR = 0.6  # similarity from which a guess helps more than a list; found by trying misspellings


@cache
def leaf_keys() -> tuple[str, ...]:
    """The dotted name of every key that holds a value (free dictionaries count as one key)."""
    return tuple(key for key, kind in _walk(Config) if not dataclasses.is_dataclass(kind))


@cache
def sections() -> tuple[str, ...]:
    """The dotted name of every group of keys."""
    return tuple(key for key, kind in _walk(Config) if dataclasses.is_dataclass(kind))


@cache
def free_sections() -> tuple[str, ...]:
    """The dictionaries in which any key is legal, as they are handed on unread."""
    return tuple(key for key, kind in _walk(Config) if get_origin(kind) is dict)


def is_free(key: str) -> bool:
    """Whether `key` lies inside a free dictionary."""
    return any(key.startswith(section + ".") for section in free_sections())


def is_known(key: str) -> bool:
    """Whether `key` is a key, a section, or lies inside a free dictionary."""
    return key in leaf_keys() or key in sections() or is_free(key)


def is_for_training(key: str) -> bool:
    """Whether a key, or what lies inside one, says nothing to an evaluation alone (`eval.only=true`)."""
    if key in USED_BY_EVALUATIONS:
        return False
    return key in ONLY_FOR_TRAINING or key.startswith(TRAINING_SECTIONS)


def is_for_sampling(key: str) -> bool:
    """Whether a key says nothing to a run on an expert set."""
    if key in USED_WITHOUT_ENGINE:
        return False
    return key in ONLY_FOR_SAMPLING or key.startswith(SAMPLING_SECTIONS)


def explain_unknown(key: str) -> str:
    """One line for a key that is not in the schema: its successor, why it is gone, or the nearest known key."""
    if key in SUCCESSORS:
        return f"{key} had no effect and is gone: use {SUCCESSORS[key]}."
    for old, reason in GONE.items():
        if key == old or key.startswith(old + "."):
            return f"{key} had no effect and is gone: {reason}. Remove it."
    score, nearest = max((_similarity(key, known), known) for known in leaf_keys() + sections())
    if score >= NEAR:
        return f"{key} is not a configuration key: did you mean {nearest}?"
    return f"{key} is not a configuration key: {_list_siblings(key)}."


def explain_error(error: OmegaConfBaseException) -> str:
    """One line with key, value and rule for what OmegaConf refused (its own messages have several)."""
    key = str(error.full_key or error.key or "")
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and key and not is_known(key):
        return explain_unknown(key)
    rule = str(error.msg).splitlines()[0].rstrip(".")
    if "is not Optional" in rule or "Incompatible value 'None'" in rule:
        rule = "null is not allowed, give a value"
    return f"{key}: {rule}." if key else f"{rule}."


def _walk(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, kind = prefix + field.name, hints[field.name]
        yield key, kind
        if dataclasses.is_dataclass(kind):
            yield from _walk(kind, key + ".")


def _similarity(key: str, known: str) -> float:
    """0 to 1. The last component counts most, and in it the order of words not at all: update_weight, weight_update."""
    leaf, known_leaf = (_sorted_words(name.rpartition(".")[2]) for name in (key, known))
    return 0.7 * _ratio(leaf, known_leaf) + 0.3 * _ratio(key, known)


def _ratio(left: str, right: str) -> float:
    return difflib.SequenceMatcher(a=left, b=right, autojunk=False).ratio()


def _sorted_words(name: str) -> str:
    return "_".join(sorted(name.split("_")))


def _list_siblings(key: str) -> str:
    section = key.rpartition(".")[0]
    while section and section not in sections():
        section = section.rpartition(".")[0]
    names = [name for name in leaf_keys() + sections() if name.rpartition(".")[0] == section]
    where = f"{section} has" if section else "the top level has"
    return f"{where} {', '.join(name.rpartition('.')[2] for name in names)}"
