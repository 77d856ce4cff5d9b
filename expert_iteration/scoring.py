"""Asking the functions of a task what they say of responses, each response's failure kept apart from the others."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
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

    def score(self, problems: Sequence[Problem], responses: Sequence[str]) -> Iterator[Scored]:
        """Score a batch with one call of each function, one at a time as they are asked for where a call raises.

        A function that raises is called a second time then, with each response alone, which shows whose fault it was.

        Raises:
            UserError: from the functions.
        """
        try:
            scored = self._score_at_once(problems, responses)
        except UserError:
            raise
        except Exception as error:
            logger.warning("%r in a batch of %d responses: each is judged alone", error, len(responses))
            return map(self.score_one, problems, responses)
        return iter(scored)

    def _score_at_once(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Scored]:
        rewards = self.reward(problems, responses)
        corrects = [None] * len(responses) if self.correct is None else self.correct(problems, responses)
        return [Scored(reward, correct, _reason(reward)) for reward, correct in zip(rewards, corrects, strict=True)]

    def score_one(self, problem: Problem, response: str) -> Scored:
        """Score one response, whatever the functions do.

        Raises:
            UserError: from the functions.
        """
        reward, failure = _attempt(self.reward, problem, response, math.nan)
        if self.correct is None:
            return Scored(reward, None, failure or _reason(reward))
        correct, other_failure = _attempt(self.correct, problem, response, False)
        return Scored(reward, correct, failure or _reason(reward) or other_failure)


def _attempt(
    function: Callable[..., Sequence[Any]], problem: Problem, response: str, otherwise: Any
) -> tuple[Any, str | None]:
    try:
        return function([problem], [response])[0], None
    except UserError:
        raise
    except Exception:
        return otherwise, traceback.format_exc()


def _reason(reward: Reward) -> str | None:
    return reward.reason if isinstance(reward, FailedReward) else None
