"""The rules of `validation.py` for the section `reward`: which functions, with which weights, and which server."""

import math
from pathlib import Path
from urllib.parse import urlsplit

from expert_iteration.config import Config, Dataset
from expert_iteration.errors import UserError
from expert_iteration.reward_sum import NAMES, OPENAI, component_name, named_functions

MATH = "math"  # as `reward.fn`: the verifier (`math_answers.py`)
WITH_NUMBERS = (Dataset.gsm8k, Dataset.tiny, Dataset.custom)
JUDGED = {
    "tiny": WITH_NUMBERS,
    "gsm8k": WITH_NUMBERS,
    "gsm8k_granular": WITH_NUMBERS,
    "gsm8k_granular_brief": WITH_NUMBERS,
    MATH: (Dataset.math, *WITH_NUMBERS),
    "ifeval": (Dataset.ifeval,),
    "countdown": (Dataset.countdown,),
}
"""By reward the data sets that have what it compares with (custom: in `env.answer_column`)."""
FORMS = f"one of {', '.join(NAMES)}, package.module:function, file.py:function, or a list of such"


def reward_function_has_a_place(cfg: Config) -> None:
    """A name of ours; or a module or a file, then a function's name."""
    for spec in named_functions(cfg.reward):
        place, colon, name = spec.rpartition(":") if isinstance(spec, str) else ("", "", "")
        if not colon and name in NAMES:
            continue
        is_module = all(part.isidentifier() for part in place.split("."))
        if not name.isidentifier() or not (place.endswith(".py") or is_module):
            raise UserError(f"reward.fn ({spec}) must be {FORMS}.")
        if place.endswith(".py") and not Path(place).is_file():
            raise UserError(f"reward.fn ({spec}): the file {place} does not exist.")
    if cfg.reward.fn == []:
        raise UserError(f"reward.fn ([]) sums up nothing: give {FORMS}, or null for the task's own.")


def rewards_have_what_they_compare_with(cfg: Config) -> None:
    """A ground truth of their kind; a run on an expert set scores nothing."""
    if cfg.train.from_expert_set is not None:
        return
    for name in named_functions(cfg.reward):
        datasets = JUDGED.get(name)
        if datasets is not None and cfg.env.dataset not in datasets:
            raise UserError(
                f"reward.fn ({name}) finds nothing to compare with in env.dataset={cfg.env.dataset}: it judges "
                f"{', '.join(datasets)}. Leave it out, or set env.dataset to one of these."
            )
        if datasets is not None and cfg.env.dataset is Dataset.custom and cfg.env.answer_column is None:
            raise UserError(
                f"reward.fn ({name}) needs ground truths: set env.answer_column (null) to the column that has them."
            )


def summed_rewards_have_different_names(cfg: Config) -> None:
    """Under which they are logged."""
    names = [component_name(spec) for spec in named_functions(cfg.reward)]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(
            f"reward.fn ({cfg.reward.fn}) names {', '.join(sorted(twice))} twice, and what is summed is logged by the "
            "name of its function: rename one."
        )


def reward_weights_belong_to_functions(cfg: Config) -> None:
    """One each, in their order."""
    weights, fn = cfg.reward.weights, cfg.reward.fn
    if weights is None:
        return
    if not isinstance(fn, list):
        raise UserError(f"reward.weights ({weights}) are of the functions that reward.fn ({fn}) lists: make it a list.")
    if len(weights) != len(fn) or not all(map(math.isfinite, weights)):
        raise UserError(
            f"reward.weights ({weights}) must be {len(fn)} finite numbers, one for each of reward.fn ({fn})."
        )


def openai_reward_has_an_address(cfg: Config) -> None:
    """Of a server."""
    url = cfg.reward.openai_url
    if url is None:
        if OPENAI in named_functions(cfg.reward):
            raise UserError(
                "reward.openai_url (null) must be the address of a server for reward.fn=openai, such as "
                "http://host:8000/v1."
            )
        return
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise UserError(f"reward.openai_url ({url}) must be an address such as http://host:8000/v1.")


def openai_prompt_exists(cfg: Config) -> None:
    """Whether it holds what it must shows when it is read."""
    path = cfg.reward.openai_prompt
    if path is not None and not Path(path).is_file():
        raise UserError(f"reward.openai_prompt ({path}) is no file: correct it, or set it to null.")


def workers_wait_for_the_server(cfg: Config) -> None:
    """A worker that is killed while it waits for an answer fails a response for nothing."""
    reward = cfg.reward
    if OPENAI in named_functions(reward) and reward.workers and reward.timeout < reward.openai_timeout:
        raise UserError(
            f"reward.timeout ({reward.timeout:g}) would end workers that wait for a server up to reward.openai_timeout "
            f"({reward.openai_timeout:g}): set reward.workers=0, which asks for all responses at once, or raise "
            "reward.timeout."
        )


def verifier_has_a_time_limit(cfg: Config) -> None:
    """Of some expressions SymPy would be at work for ever, and with it the collector."""
    reward = cfg.reward
    if reward.workers == 0 and (cfg.env.dataset is Dataset.math or MATH in named_functions(reward)):
        raise UserError(
            f"reward.workers ({reward.workers}) must be at least 1 to verify mathematics, some of which takes for "
            "ever: set reward.workers=2, which are stopped after reward.timeout."
        )


REWARD_RULES = (
    reward_function_has_a_place,
    rewards_have_what_they_compare_with,
    summed_rewards_have_different_names,
    reward_weights_belong_to_functions,
    openai_reward_has_an_address,
    openai_prompt_exists,
    workers_wait_for_the_server,
    verifier_has_a_time_limit,
)
