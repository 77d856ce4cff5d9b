"""A user's own reward function: from `package.module:function` or `file.py:function` to something that travels."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from expert_iteration.errors import UserError
from expert_iteration.rewards import Reward, RewardFn
from expert_iteration.scoring import FailedReward

if TYPE_CHECKING:
    from expert_iteration.tasks import Problem


def load_reward_fn(spec: str) -> RewardFn:
    """The user's batched reward function, its result checked for length and form at each call.

    What it gives crosses processes as `spec` and is loaded again there, because Ray pickles modules by reference and
    a file is no importable module. The text of a file travels along: other hosts of a cluster have no such file.

    Args:
        spec: `package.module:function` or `path/to/file.py:function`.

    Raises:
        UserError: no such module, file or function, or not callable. What the module itself raises is not caught.
    """
    place = spec.rpartition(":")[0]
    return _UserReward(spec, _read_source(spec, Path(place)) if place.endswith(".py") else None)


def with_absolute_path(spec: str, directory: Path) -> str:
    """The same function, its file not relative to `directory` any more, if it is in a file."""
    place, _, name = spec.rpartition(":")
    return f"{directory / Path(place).expanduser()}:{name}" if place.endswith(".py") else spec


class _UserReward:
    def __init__(self, spec: str, source: bytes | None) -> None:
        self._spec = spec
        self._source = source
        self._function = _find_function(spec, source)

    def __reduce__(self) -> tuple[type[_UserReward], tuple[str, bytes | None]]:
        return _UserReward, (self._spec, self._source)

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Reward]:
        rewards = self._function(problems, responses)
        if isinstance(rewards, Iterator):
            rewards = list(rewards)  # what it raises is its own, and no wrong form
        try:
            values = [self._checked(reward) for reward in rewards]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"reward.fn={self._spec} gave {str(rewards)[:200]}: return a list of numbers, or of dictionaries from "
                "names to numbers or to pairs of number and weight (None where there is no reward)."
            ) from error
        if len(values) != len(responses):
            raise UserError(
                f"reward.fn={self._spec} gave {len(values)} rewards for {len(responses)} responses: return one each."
            )
        return values

    def _checked(self, reward: Any) -> Reward:
        """A reward in plain types, whatever kinds of number (NumPy's, torch's) it is made of; None is a failure."""
        if reward is None:
            return FailedReward(f"reward.fn={self._spec} gave None for the response.")
        if isinstance(reward, FailedReward):
            return reward
        if not isinstance(reward, Mapping):
            return float(reward)
        return {str(name): _part(value) for name, value in reward.items()}


def _part(value: Any) -> float | tuple[float, float]:
    if not isinstance(value, tuple | list):
        return float(value)
    number, weight = value
    return float(number), float(weight)


def _read_source(spec: str, path: Path) -> bytes:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UserError(f"reward.fn={spec}: there is no file {path}: correct the path, or make it absolute.")
    return path.read_bytes()


def _find_function(spec: str, source: bytes | None) -> Callable[..., Any]:
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UserError(
            f"reward.fn={spec} names no function: write package.module:function or path/to/file.py:function."
        )
    module = _module_by_name(spec, place) if source is None else _module_from_source(Path(place), source)
    if name not in vars(module):
        raise UserError(f"reward.fn={spec}: {place} defines no {name!r}: correct the name after the colon.")
    function = vars(module)[name]
    if not callable(function):
        raise UserError(f"reward.fn={spec}: {name!r} is of type {type(function).__name__}: name a function.")
    return function


def _module_by_name(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module missing inside the user's module is for the user to see as it is.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"reward.fn={spec}: Python finds no module {error.name!r}: install it, put its directory on PYTHONPATH, "
            "or write path/to/file.py:function."
        ) from error


def _module_from_source(path: Path, source: bytes) -> ModuleType:
    path = path.expanduser().resolve()
    name = f"reward_fn_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    # Dataclasses and pickle look a class's module up here.
    sys.modules[name] = module
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module
