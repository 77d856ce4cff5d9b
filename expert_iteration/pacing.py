"""How asynchronous training keeps step with collection: as many gradient steps as belong to what was collected.

Sampling from a buffer could go on for ever. What is collected decides how long it does: each response that is kept owes
`train.epochs` draws on average, or each part of the run its part of `train.total_optimizer_steps`. Training waits when
it has made what is owed, and ends when it has and nothing more is to come.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING

from expert_iteration.actors import kept_nothing
from expert_iteration.config import Config
from expert_iteration.position import Position
from expert_iteration.selection_advice import advise
from expert_iteration.sizes import ceil_div, due_gradient_steps

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from expert_iteration.actors import BackgroundCollector, CollectedBatch
    from expert_iteration.learner import Learner
    from expert_iteration.metrics import Metrics
    from expert_iteration.replay_buffer import BufferReader


class Debt:
    """The gradient steps that are owed, all in all, after each batch that was collected.

    Args:
        cfg: reads what `due_gradient_steps` does.
        position: where the debt is noted, and where that of a resumed run stands.
    """

    def __init__(self, cfg: Config, position: Position) -> None:
        self._cfg = cfg
        self._position = position

    @property
    def steps(self) -> int:
        """Gradient steps owed so far, those that are made already included."""
        return self._position.owed[-1] if self._position.owed else 0

    @property
    def batches(self) -> int:
        """Batches that owe them."""
        return len(self._position.owed)

    def add(self, batch: CollectedBatch) -> None:
        """Another batch was collected."""
        self._position.responses_kept += batch.responses_kept
        self._position.owed.append(due_gradient_steps(self._cfg, self._position.responses_kept, batch.progress))

    def batches_worked_off(self, gradient_steps: int) -> int:
        """Batches, from the first on, of which everything is made after so many steps."""
        return bisect_right(self._position.owed, gradient_steps)


def paced_batches(
    cfg: Config,
    position: Position,
    collector: BackgroundCollector,
    replay_buffer: BufferReader,
    learner: Learner,
    metrics: Metrics,
) -> Iterator[TensorDictBase]:
    """A micro-batch whenever a gradient step is owed, until the run's are made; waits for the collector otherwise.

    Between two micro-batches, what has been collected meanwhile is taken note of: its records are logged, and the
    schedule learns how many optimizer steps share the progress it makes. Where nothing in the buffer is young enough
    (`train.max_policy_age`) no step is made: collection goes on, whatever `train.max_ahead` says, and is waited for.

    Raises:
        TimeoutError: nothing to train on came for `train.collection_timeout` seconds.
        ProcessDiedError: the collector, or what it needs, is dead.
    """
    debt = Debt(cfg, position)
    num_empty, said = 0, False
    since = time.monotonic()
    while True:
        for data in collector.arrived():
            debt.add(data)
            metrics.drain(learner.gradient_steps)
            learner.plan(_optimizer_steps_to_come(cfg, debt, learner), until=data.progress)
            num_empty += 1
            if len(replay_buffer):
                since, num_empty = time.monotonic(), 0
        owed = debt.steps - learner.gradient_steps
        batch = replay_buffer.sample() if owed > 0 else None
        starved = owed > 0 and batch is None
        collector.go_on(debt.batches if starved else debt.batches_worked_off(learner.gradient_steps))
        if batch is not None:
            yield batch
            since, num_empty = time.monotonic(), 0
        elif collector.finished:
            break
        else:
            advice = advise(cfg.train.selection, cfg.train.min_reward)
            why = _nothing_young_enough(cfg) if starved else kept_nothing(num_empty, advice)
            if starved and not said:
                collector.say(f"note: {why}; waiting for new ones")
                said = True
            collector.wait(since, why)
    if starved:
        collector.say(f"note: {owed} gradient steps were not made: {_nothing_young_enough(cfg)}")


def _optimizer_steps_to_come(cfg: Config, debt: Debt, learner: Learner) -> int:
    """Optimizer steps that end from now on, one for the window that is open included."""
    accumulation = cfg.train.gradient_accumulation_steps
    return ceil_div(debt.steps, accumulation) - learner.gradient_steps // accumulation


def _nothing_young_enough(cfg: Config) -> str:
    if cfg.train.max_policy_age is None:
        return "no response was kept"
    return f"no response in the buffer is at most {cfg.train.max_policy_age} pushes old (train.max_policy_age)"
