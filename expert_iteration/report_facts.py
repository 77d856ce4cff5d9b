"""What a run was set to do and what it did, in words."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Any

# Of .hydra/config.yaml: what the page words.
CONFIG_KEYS = (
    "env.dataset",
    "env.repeats",
    "eval.only",
    "model.name",
    "train.dedup",
    "train.from_expert_set",
    "train.min_reward",
    "train.selection",
    "train.selection_percentile",
    "train.selection_percentile_end",
    "train.selection_threshold",
    "train.sync",
    "train.topk_size",
)
TITLE = {"task": "env.dataset", "model": "model.name"}
# Of summary.json, in words; a part that needs what the summary lacks is left out.
FACTS = {
    "Mode": ("{mode}", "seed {seed}"),
    "Collected": ("{dialog_turns:,} responses",),
    "Kept": (
        "{responses_kept:,} responses",
        "from {groups_kept:,} of {groups_seen:,} groups",
        "{responses_too_old:,} too old to be trained on",
    ),
    "Trained": ("{gradient_steps:,} gradient steps", "{optimizer_steps:,} optimizer steps"),
    "Weights": ("{weight_pushes:,} pushes", "engine within {max_probe_logprob_diff:.1g} nats of the trainer"),
    "Duration": ("{seconds:,.0f} s", "{seconds_to_first_optimizer_step:,.0f} s of them to the first optimizer step"),
    "Speed": ("{collect_tokens_per_second:,.0f} tokens/s collected", "{train_tokens_per_second:,.0f} tokens/s trained"),
}
OMITTED_AT_ZERO = ("responses_too_old",)
# What a run is not there to do is no fact of it, by the key that says so: labels and names of the summary.
OMITTED_WITH = {
    "train.from_expert_set": ("Collected", "Kept", "Weights", "collect_tokens_per_second"),
    "eval.only": ("Collected", "Kept", "Trained", "Weights", "Speed"),
}


def read_config(text: str) -> dict[str, Any]:
    """What the report reads of a configuration file's text, by dotted key; what is missing is not in it."""
    from omegaconf import OmegaConf

    config = OmegaConf.merge({"logging": {"kl_budget": None}}, OmegaConf.create(text))
    values = {key: OmegaConf.select(config, key) for key in CONFIG_KEYS}
    values["logging.kl_budget"] = config.logging.kl_budget
    return {key: value for key, value in values.items() if value is not None}


def is_partial(config: Mapping[str, Any]) -> bool:
    """Whether the run was not there to do all that other runs do."""
    return any(config.get(key) for key in OMITTED_WITH)


def describe_title(config: Mapping[str, Any]) -> str:
    """Task and model of a run, as far as its configuration says them."""
    return ", ".join(f"{word} {config[key]}" for word, key in TITLE.items() if key in config)


def describe_selection(config: Mapping[str, Any]) -> str | None:
    """What was kept of each group, in words; None when nothing was selected, or the configuration does not say."""
    if config.get("eval.only"):
        return None
    if expert_set := config.get("train.from_expert_set"):
        return f"none: trained on the expert set {expert_set}."
    selection = config.get("train.selection")
    most = f"at most {config.get('train.topk_size')} of {config.get('env.repeats')} responses per prompt"
    wordings = {
        "above_median": f"above_median: {most}, the best of those strictly above the median reward.",
        "topk": f"topk: {most}, the best where not all rewards are equal.",
        "threshold": f"threshold: {most}, of those with a reward of {config.get('train.selection_threshold')} or more.",
        "percentile": (
            f"percentile: {most}, of those that reach the batch's percentile {config.get('train.selection_percentile')}"
            f" at the start of the run, {config.get('train.selection_percentile_end')} at its end."
        ),
        "random": (
            f"random, the control: {most}, as many as the rule above_median would have kept but drawn whatever their "
            "reward. What rises here is not the selection's doing."
        ),
    }
    if selection is None:
        return None
    duplicates = " Duplicates were dropped before." if config.get("train.dedup") else ""
    has_least = "train.min_reward" in config and selection != "random"  # under which it only lowers how many are drawn
    least = f" None with a reward below {config['train.min_reward']}." if has_least else ""
    return wordings.get(selection, selection) + duplicates + least


def list_facts(summary: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Counts and times of the run as labels and texts; what the summary lacks is left out."""
    omitted = {name for key, names in OMITTED_WITH.items() if config.get(key) for name in names}
    known = {
        name: value
        for name, value in summary.items()
        if value is not None and name not in omitted and (value or name not in OMITTED_AT_ZERO)
    }
    facts = []
    for label, wordings in FACTS.items():
        parts = [wording.format(**known) for wording in wordings if _fields(wording) <= known.keys()]
        if parts and label not in omitted:
            facts.append((label, ", ".join(parts)))
    return facts


def short(value: float | None) -> str:
    """A figure in a sentence: three digits, or all of a larger number's whole part; "-" if not known."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _fields(wording: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(wording) if name}
