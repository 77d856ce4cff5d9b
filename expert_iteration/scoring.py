"""Asking the functions of a task what they say of responses, each response's failure kept apart from the others."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from expert_iteration.errors import UserError
from expert_iteration.rewards import CorrectFn, Reward, RewardFn

if TYPE_CHECKING:
    from expert_iteration.tasks import Problem

logger = logging.getLogger(__name__)


class FailedReward(float):
    """Not a number, and why: what a reward function that works on many responses at once gives for one of them."""

    reason: str

    def __new__(cls, reason: str) -> FailedReward:
        """Args: reason: shown to the user, a traceback or a sentence."""
        failed = super().__new__(cls, math.nan)
        failed.reason = reason
        return failed

    def __reduce__(self) -> tuple[type[FailedReward], tuple[str]]:
        return FailedReward, (self.reason,)


class Scored(NamedTuple):
    """What the functions say of one response."""

    reward: Reward
    correct: bool | None
    """None: nobody was asked."""
    failure: str | None
    """The traceback of what went wrong."""


@dataclass(frozen=True)
class Scorer:
    """A reward, and what is right; both batched functions that pickle can send to other processes."""

    reward: RewardFn
    correct: CorrectFn | None

    def score(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Scored]:
        """Score a batch, as `ask_all` asks.

        Raises:
            UserError: from the functions.
        """
        rewards = ask_all(self.reward, problems, responses)
        if self.correct is None:
            return [Scored(reward, None, _reason(reward)) for reward in rewards]
        corrects = ask_all(self.correct, problems, responses)
        return [
            Scored(reward, False if _reason(correct) else bool(correct), _reason(reward) or _reason(correct))
            for reward, correct in zip(rewards, corrects, strict=True)
        ]


def ask_all(
    function: Callable[[Sequence[Problem], Sequence[str]], Sequence[Any]],
    problems: Sequence[Problem],
    responses: Sequence[str],
) -> Sequence[Any]:
    """What a function says of a batch; `FailedReward` of the responses at which it raises, or wants to end the process.

    One that raises is called again with each response alone, which shows whose fault it was.

    Raises:
        UserError: from the function.
    """
    try:
        return function(problems, responses)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if len(responses) == 1:
            return [FailedReward(traceback.format_exc())]
        logger.warning("%s in a batch of %d responses: each is judged alone", type(error).__name__, len(responses))
    return [ask_all(function, [problem], [response])[0] for problem, response in zip(problems, responses, strict=True)]


def _reason(result: Any) -> str | None:
    return result.reason if isinstance(result, FailedReward) else None
