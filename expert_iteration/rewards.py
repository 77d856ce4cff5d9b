"""Scores: problems and responses in, rewards and passes out.

A reward function takes a whole batch: `reward(problems, responses) -> list of floats`, one for each response, where
`problems[i]` (an `expert_iteration.tasks.Problem`) is what `responses[i]` answers and responses are text without
special tokens. Your own plugs in with `reward.fn=package.module:function` or `reward.fn=path/to/file.py:function`;
a reward that is not finite leaves its response out. It is called in the collector's process with all responses of an
engine batch, so it may ask a model or a service for many at once.

IFEval's are in `ifeval.py`.
"""

import functools
import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from expert_iteration.errors import UserError

if TYPE_CHECKING:
    from expert_iteration.tasks import Problem

RewardFn = Callable[[Sequence["Problem"], Sequence[str]], list[float]]
CorrectFn = Callable[[Sequence["Problem"], Sequence[str]], list[bool]]
FormatFn = Callable[[str], bool]

THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
_INTEGER = re.compile(r"[+-]?\d+")


def _inside(tag: re.Pattern[str], response: str) -> str:
    """What the first such tag holds, stripped; "" without one. Only the first counts, so guessing twice is no use."""
    match = tag.search(response)
    return match[1].strip() if match else ""


def _value(answer: str) -> Decimal | str:
    """A number where the text is one ("1,234", "$5.00", "18."), else the text without those marks."""
    text = answer.strip().replace(",", "").replace("$", "").replace("%", "").rstrip(".")
    return Decimal(text) if _NUMBER.fullmatch(text) else text


def _ground_truth(answer: str) -> Decimal | str:
    """The value after `####`, or of the whole text where the mark is missing."""
    return _value(answer.rpartition("####")[2])


def gsm8k_correct(response: str, answer: str) -> bool:
    """Whether `<answer>` holds the ground truth, compared as numbers: 72, 72.0 and $72 are equal.

    Args:
        response: text, special tokens removed.
        answer: the ground truth, bare or ending in `#### 72`.
    """
    given = _inside(ANSWER, response)
    return given != "" and _value(given) == _ground_truth(answer)


def gsm8k_reward(response: str, answer: str) -> float:
    """1.0 for the right number in `<answer>`, 0.1 for a wrong one, 0.0 without one.

    The values of TorchRL's `GSM8KRewardParser`, which compares text ("5" and "05" differ there).
    """
    if gsm8k_correct(response, answer):
        return 1.0
    return 0.1 if _inside(ANSWER, response) else 0.0


def tiny_correct(response: str, answer: str) -> bool:
    """Whether `<answer>` holds the right integer."""
    given = _inside(ANSWER, response)
    return _INTEGER.fullmatch(given) is not None and Decimal(given) == _ground_truth(answer)


def tiny_reward(response: str, answer: str) -> float:
    """1.0 for the right integer in `<answer>` after thinking, 0.9 without a thought.

    A wrong response earns 0.1 for a thought and 0.1 for any integer. Closeness earns nothing: it would let wrong
    responses win whole groups.
    """
    thought = _inside(THINK, response) != ""
    if tiny_correct(response, answer):
        return 1.0 if thought else 0.9
    return 0.1 * (thought + (_INTEGER.fullmatch(_inside(ANSWER, response)) is not None))


def has_thought_and_answer(response: str) -> bool:
    """Whether a response has the form that tiny and gsm8k ask for: something in `<think>` and in `<answer>`."""
    return _inside(THINK, response) != "" and _inside(ANSWER, response) != ""


def has_answer(response: str) -> bool:
    """Whether there is something in `<answer>`, without which ifeval judges nothing."""
    return _inside(ANSWER, response) != ""


def score_each(score: Callable[[str, str], Any], problems: Sequence["Problem"], responses: Sequence[str]) -> list[Any]:
    """Apply `score(response, answer)` to each pair; `functools.partial` of it is a batched function."""
    return [score(response, problem.answer) for problem, response in zip(problems, responses, strict=True)]


gsm8k_rewards: RewardFn = functools.partial(score_each, gsm8k_reward)
gsm8k_corrects: CorrectFn = functools.partial(score_each, gsm8k_correct)
tiny_rewards: RewardFn = functools.partial(score_each, tiny_reward)
tiny_corrects: CorrectFn = functools.partial(score_each, tiny_correct)


def load_reward_fn(spec: str) -> RewardFn:
    """The user's batched reward function, its result checked for length and type at each call.

    What it gives crosses processes as `spec` and is loaded again there, because Ray pickles modules by reference and
    a file is no importable module. The text of a file travels along: other hosts of a cluster have no such file.

    Args:
        spec: `package.module:function` or `path/to/file.py:function`.

    Raises:
        UserError: no such module, file or function, or not callable. What the module itself raises is not caught.
    """
    place = spec.rpartition(":")[0]
    return _UserReward(spec, _read_source(spec, Path(place)) if place.endswith(".py") else None)


class _UserReward:
    def __init__(self, spec: str, source: bytes | None) -> None:
        self._spec = spec
        self._source = source
        self._function = _find_function(spec, source)

    def __reduce__(self) -> tuple[type["_UserReward"], tuple[str, bytes | None]]:
        return _UserReward, (self._spec, self._source)

    def __call__(self, problems: Sequence["Problem"], responses: Sequence[str]) -> list[float]:
        rewards = self._function(problems, responses)
        try:
            values = [float(reward) for reward in rewards]
        except (TypeError, ValueError) as error:
            raise UserError(f"reward.fn={self._spec} gave {str(rewards)[:200]}: return a list of numbers.") from error
        if len(values) != len(responses):
            raise UserError(
                f"reward.fn={self._spec} gave {len(values)} rewards for {len(responses)} responses: return one each."
            )
        return values


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
