"""What `reward.fn` names, as one reward function: the suite's own, a user's, a model's by address, or their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from expert_iteration.errors import UserError
from expert_iteration.reward_registry import REWARDS, load_built_in
from expert_iteration.rewards import Reward, RewardFn, weighted
from expert_iteration.scoring import FailedReward, ask_all
from expert_iteration.user_functions import load_reward_fn

if TYPE_CHECKING:
    from expert_iteration.config import RewardConfig
    from expert_iteration.tasks import Problem

OPENAI = "openai"  # as `reward.fn`: the model at reward.openai_url
NAMES = (*REWARDS, OPENAI)


def named_functions(reward: RewardConfig) -> list[str]:
    """What `reward.fn` names, in its order; [] where the task's own reward counts."""
    if reward.fn is None:
        return [] if reward.openai_url is None else [OPENAI]
    return list(reward.fn) if isinstance(reward.fn, list) else [reward.fn]


def component_name(spec: str) -> str:
    """Under which a function's reward is logged in a sum: its own name, without where it is."""
    return str(spec).rpartition(":")[2]


def load_reward(reward: RewardConfig) -> RewardFn | None:
    """The reward that the configuration asks for in place of the task's; None: it asks for none.

    Raises:
        UserError: a function, or the server, is not there.
    """
    specs = named_functions(reward)
    functions = [_load(spec, reward) for spec in specs]
    if not isinstance(reward.fn, list):
        return functions[0] if functions else None
    weights = reward.weights or [1.0] * len(functions)
    return RewardSum([component_name(spec) for spec in specs], functions, weights)


def _load(spec: str, reward: RewardConfig) -> RewardFn:
    if spec == OPENAI:
        from expert_iteration.openai_reward import load_openai_reward

        return load_openai_reward(reward)
    return load_reward_fn(spec) if ":" in spec else load_built_in(spec)


class RewardSum:
    """A reward function that adds up others: each is a component, or each of its components is one, `name/component`.

    Args:
        names: of the functions, all different.
        functions: in the same order.
        weights: of each, by which the weights of its own components are multiplied.
    """

    def __init__(self, names: Sequence[str], functions: Sequence[RewardFn], weights: Sequence[float]) -> None:
        if len(set(names)) < len(names) or not len(names) == len(functions) == len(weights):
            raise UserError(f"Rewards are summed by name, with a weight each: {list(names)}, {list(weights)}.")
        self._parts = list(zip(names, functions, weights, strict=True))

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Reward]:
        """The components of each response; each function is called once, with all of them.

        One that raises is called again response by response, and no other with it, such as one that asks a server.
        """
        columns = [
            [_components(name, reward, weight) for reward in ask_all(function, problems, responses)]
            for name, function, weight in self._parts
        ]
        return [_merged(row) for row in zip(*columns, strict=True)]


def _components(name: str, reward: Reward, weight: float) -> dict[str, tuple[float, float]] | FailedReward:
    if isinstance(reward, FailedReward):
        return reward
    if not isinstance(reward, Mapping):
        return {name: (float(reward), weight)}
    parts = {part: weighted(value) for part, value in reward.items()}
    return {f"{name}/{part}": (number, own_weight * weight) for part, (number, own_weight) in parts.items()}


def _merged(row: Sequence[dict[str, tuple[float, float]] | FailedReward]) -> Reward:
    """All components of a response; the first failure, where there is one, for a sum without it would mislead."""
    merged: dict[str, Any] = {}
    for components in row:
        if isinstance(components, FailedReward):
            return components
        merged |= components
    return merged
