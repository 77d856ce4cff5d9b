"""`Judge`: what a task says of responses, the reward with its components and whether they are right.

A response whose judging fails costs its reward, never the run: a function that raises, hangs (`reward.workers`) or
gives no finite number (in float32, as which it is stored). Failures are counted (`reward_failures`), the first is
shown, and five prompts in a row, of which no response could be judged, end the run: not one bad row, nor one bad group.
"""

from __future__ import annotations

import ctypes
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
MAX_FAILED_PROMPTS = 5
"""In a row."""

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
        where: the responses come from, as the user is told: "in collection".
    """

    def __init__(
        self,
        task: Task,
        *,
        pass_threshold: float | None = None,
        workers: int = 0,
        timeout: float = math.inf,
        where: str = "",
    ) -> None:
        scorer = Scorer(task.reward, task.correct if pass_threshold is None else None)
        self._pool = JudgingPool(scorer, workers, timeout) if workers else None
        self._score = scorer.score if self._pool is None else self._pool.score
        self._pass_threshold = DEFAULT_PASS_THRESHOLD if pass_threshold is None else pass_threshold
        self._components: dict[str, list[float]] = defaultdict(list)
        self._where = where and f" {where}"
        self._failures = 0
        self._failed_prompts: set[str] = set()  # since the last response that could be judged
        self._has_warned = False
        self._notes: list[str] = []

    def __call__(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Judgement]:
        """One judgement for each response.

        Args:
            problems: for each response the one it answers.
            responses: without special tokens.

        Raises:
            UserError: all responses to five prompts in a row fail, or a function's result has the wrong form.
        """
        try:
            scored = self._score(problems, responses)
            return [self._conclude(problem, one) for problem, one in zip(problems, scored, strict=True)]
        except BaseException:
            self.close()  # or this process would not exit before its workers have judged the rest
            raise

    def _conclude(self, problem: Problem, scored: Scored) -> Judgement:
        reward = total(scored.reward)
        failure = scored.failure
        if not math.isfinite(ctypes.c_float(reward).value):
            failure = failure or f"The reward is {reward}, which is no finite number in float32."
            reward = math.nan
        if failure is None:
            self._failed_prompts.clear()
        else:
            self._count_failure(problem, failure)
        correct = reward >= self._pass_threshold if scored.correct is None else bool(scored.correct)
        components = components_of(scored.reward) if math.isfinite(reward) else {}
        for name, value in components.items():
            self._components[name].append(value)
        return Judgement(reward, correct, components)

    def _count_failure(self, problem: Problem, failure: str) -> None:
        self._failures += 1
        self._failed_prompts.add(problem.question)
        if not self._has_warned:
            self._has_warned = True
            note = f"note: a response{self._where} was left out, because it could not be judged:\n{failure.rstrip()}"
            self._notes.append(note)
            logger.warning(note)
        if len(self._failed_prompts) == MAX_FAILED_PROMPTS:
            raise UserError(
                f"Of {MAX_FAILED_PROMPTS} prompts in a row no response{self._where} could be judged: mend the reward "
                f"(reward.fn), or what it needs. Of the last one:\n{failure.rstrip()}"
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
