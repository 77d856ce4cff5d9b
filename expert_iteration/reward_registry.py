"""The rewards that ship with the suite, by the names that `reward.fn` takes. Importing this loads none of them."""

import importlib
from typing import TYPE_CHECKING, Any

from expert_iteration.errors import UserError

if TYPE_CHECKING:
    from expert_iteration.rewards import RewardFn

# module:function of a batched reward (`rewards.RewardFn`) that needs no configuration.
REWARDS = {
    "tiny": "expert_iteration.rewards:tiny_rewards",
    "gsm8k": "expert_iteration.rewards:gsm8k_rewards",
    "gsm8k_granular": "expert_iteration.rewards:gsm8k_granular_rewards",
    "gsm8k_granular_brief": "expert_iteration.rewards:gsm8k_granular_brief_rewards",
    "math": "expert_iteration.math_answers:math_rewards",
    "ifeval": "expert_iteration.ifeval:ifeval_rewards",
    "countdown": "expert_iteration.countdown:countdown_rewards",
}
# module:function that raises UserError where a library is missing that the reward of this name needs.
CHECKS = {
    "math": "expert_iteration.math_answers:check_requirements",
    "ifeval": "expert_iteration.ifeval:check_requirements",
}


def load_built_in(name: str) -> "RewardFn":
    """The reward of this name.

    Raises:
        UserError: there is none, or a library that it needs is missing.
    """
    if name not in REWARDS:
        raise UserError(
            f"reward.fn={name} is unknown: choose one of {', '.join(REWARDS)}, or write package.module:function or "
            "path/to/file.py:function."
        )
    if name in CHECKS:
        _function(CHECKS[name])()
    return _function(REWARDS[name])


def _function(place: str) -> Any:
    module, _, name = place.partition(":")
    return vars(importlib.import_module(module))[name]
