"""`Judge`: what a task says of responses, the reward with its components and whether they are right.

A response whose judging fails costs its reward, never the run: a function that raises, hangs (`reward.workers`) or
gives no finite number. Failures are counted (`reward_failures`), the first is shown, and five in a row end the run.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from expert_iteration.errors import UserError
from expert_iteration.judging_pool import JudgingPool
from expert_iteration.rewards import components_of, total
from expert_iteration.scoring import Scored, Scorer
from expert_iteration.tasks import Problem, Task

DEFAULT_PASS_THRESHOLD = 1.0
MAX_FAILURES_IN_A_ROW = 5

logger = logging.getLogger(__name__)


class Judgement(NamedTuple):
    """Of one response."""

    reward: float
    """Not a number where the judging failed: the response is left out."""
    correct: bool
    components: dict[str, float]
    """What the reward is the weighted sum of, by name and before weighting; {} where it has no parts."""


class Judge:
    """Judges responses as a task does.

    Args:
        task: whose reward and whose idea of a right response.
        pass_threshold: the reward from which on a response is right; None: as the task says, and 1 where it does not.
        workers: processes that judge one response each; 0: a whole batch in this one, without a limit of time.
        timeout: seconds for a response in a worker.
    """

    def __init__(
        self, task: Task, *, pass_threshold: float | None = None, workers: int = 0, timeout: float = math.inf
    ) -> None:
        scorer = Scorer(task.reward, task.correct if pass_threshold is None else None)
        self._pool = JudgingPool(scorer, workers, timeout) if workers else None
        self._score = scorer.score if self._pool is None else self._pool.score
        self._pass_threshold = DEFAULT_PASS_THRESHOLD if pass_threshold is None else pass_threshold
        self._components: dict[str, list[float]] = defaultdict(list)
        self._failures = self._failures_in_a_row = 0
        self._has_warned = False
        self._notes: list[str] = []

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Judgement]:
        """One judgement for each response.

        Args:
            problems: for each response the one it answers.
            responses: without special tokens.

        Raises:
            UserError: the fifth response in a row fails, or a function's result has the wrong form.
        """
        try:
            return [self._conclude(scored) for scored in self._score(problems, responses)]
        except BaseException:
            self.close()  # or this process would not exit before its workers have judged the rest
            raise

    def _conclude(self, scored: Scored) -> Judgement:
        reward = total(scored.reward)
        failure = scored.failure
        if not math.isfinite(reward):
            failure = failure or f"The reward is {reward}."
            reward = math.nan
        if failure is None:
            self._failures_in_a_row = 0
        else:
            self._count_failure(failure)
        correct = reward >= self._pass_threshold if scored.correct is None else bool(scored.correct)
        components = components_of(scored.reward) if math.isfinite(reward) else {}
        for name, value in components.items():
            self._components[name].append(value)
        return Judgement(reward, correct, components)

    def _count_failure(self, failure: str) -> None:
        self._failures += 1
        self._failures_in_a_row += 1
        if not self._has_warned:
            self._has_warned = True
            note = f"note: a response was left out, because it could not be judged:\n{failure.rstrip()}"
            self._notes.append(note)
            logger.warning(note)
        if self._failures_in_a_row == MAX_FAILURES_IN_A_ROW:
            raise UserError(
                f"{MAX_FAILURES_IN_A_ROW} responses in a row could not be judged: mend the reward (reward.fn), or what "
                f"it needs. Of the last one:\n{failure.rstrip()}"
            )

    def take_statistics(self) -> dict[str, float]:
        """Since the last time: the mean of each component, `reward/<component>`, and the number of failures."""
        means = {f"reward/{name}": statistics.fmean(values) for name, values in self._components.items()}
        failures, self._failures = self._failures, 0
        self._components.clear()
        return {**means, "reward_failures": float(failures)}

    def take_notes(self) -> list[str]:
        """Since the last time: what the user is to be told."""
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.close()
