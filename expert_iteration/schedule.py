"""The learning rate and the KL coefficient over a run whose number of optimizer steps becomes known only as it goes.

How many responses a batch keeps varies, so nobody can say at the start how many optimizer steps there will be. The
schedule therefore follows the run's *progress*, a fraction from 0 to 1, and each batch says how its optimizer steps
share out the progress it makes: `plan(step, num_steps, until)`. The KL coefficient follows the same progress. Where
each batch fine-tunes the start model anew, each also has a whole schedule of learning rates: over the run, the last
batch, which makes the final model, would be trained at rates near 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from expert_iteration.errors import UserError

SCHEDULES = ("cosine_with_warmup", "linear", "constant")
KL_SCHEDULES = ("constant", "linear", "cosine")


class ProgressSchedule:
    """Optimizer step -> learning-rate factor in [0, 1], for `torch.optim.lr_scheduler.LambdaLR`.

    LambdaLR saves the attributes of a callable object in its state dict; here they are plain numbers and strings.

    The decay follows the progress at the start of a step, and a warm-up the progress (or the number of steps) at its
    end, so that neither the first nor the last step is lost to a factor of 0. Past progress 1 the factor stays put.

    Args:
        shape: "cosine_with_warmup" (half a cosine wave per 0.5 `num_cycles`, as in Hugging Face's
            `get_cosine_schedule_with_warmup`), "linear" (to 0) or "constant"; all of them after the warm-up.
        warmup: a fraction (below 1) of the run's progress, or a number of optimizer steps.
        num_training_steps: optimizer steps of the whole run, as far as is known at the start.
        num_cycles: waves of the cosine.

    Raises:
        UserError: an unknown shape, a negative warm-up or one of 1.5 steps, fewer than one training step.
    """

    def __init__(self, shape: str, warmup: float, num_training_steps: int, num_cycles: float = 0.5):
        if shape not in SCHEDULES:
            raise UserError(f"optimizer.scheduler.type ({shape!r}) is unknown: choose one of {', '.join(SCHEDULES)}.")
        if warmup < 0 or (warmup > 1 and warmup != int(warmup)):
            raise UserError(
                f"optimizer.scheduler.warmup_steps ({warmup}) must be a fraction of the run below 1, or a whole "
                "number of optimizer steps."
            )
        if num_training_steps < 1:
            raise UserError(
                f"A schedule needs at least one optimizer step, got num_training_steps={num_training_steps}."
            )
        # A plain str, for a configuration enum would not load with weights_only=True.
        self.shape, self.warmup, self.num_cycles = str(shape), warmup, num_cycles
        # The current piece of the map from optimizer steps to progress. The pieces before it are never asked again.
        self.start_step, self.start_progress = 0, 0.0
        self.end_step, self.end_progress = num_training_steps, 1.0
        self.is_whole_in_piece = False  # whether warm-up and decay lie in the current piece, not in the run
        self.warmup_end = warmup if warmup < 1 else self.progress(warmup)

    def plan(self, step: int, num_steps: int, until: float, *, anew: bool = False) -> None:
        """Say that the next `num_steps` optimizer steps, from `step` on, take the run to the fraction `until`.

        With `num_steps` 0 (a batch that kept nothing) the progress jumps. It never goes back.

        Args:
            step: optimizer steps made so far.
            num_steps: that follow.
            until: fraction of the run.
            anew: these steps have a whole schedule of learning rates to themselves, from the warm-up to the end of the
                decay. The run's progress is the same without.

        Raises:
            ValueError: `num_steps` negative, `until` outside (0, 1].
        """
        if num_steps < 0 or not 0 < until <= 1:
            raise ValueError(f"plan() wants num_steps >= 0 and 0 < until <= 1, got {num_steps=} and {until=}.")
        reached = self.progress(step)
        self.start_step, self.end_step = step, step + num_steps
        self.start_progress, self.end_progress = reached, max(reached, until)
        self.is_whole_in_piece = anew
        if self.warmup >= 1 and (anew or step <= self.warmup):
            self.warmup_end = self._position(self._first_step + self.warmup)

    def rescale(self, ratio: float) -> None:
        """The run is longer (or shorter) than it was planned: what was the whole of it is `ratio` of it.

        Rates that had fallen rise again, to where they would be now in a run that was as long from the start.
        """
        self.start_progress = min(1.0, self.start_progress * ratio)
        self.end_progress = min(1.0, self.end_progress * ratio)
        if self.warmup >= 1 and not self.is_whole_in_piece:
            self.warmup_end = min(1.0, self.warmup_end * ratio)

    def progress(self, step: float) -> float:
        """Fraction of the run that is over when optimizer step `step` begins; flat outside the planned piece."""
        if step >= self.end_step:
            return self.end_progress  # which the sum may miss by a rounding
        return self.start_progress + self._share(step) * (self.end_progress - self.start_progress)

    def __call__(self, step: int) -> float:
        """Factor of the learning rate in optimizer step `step` (counted from 0)."""
        warm = self._warmup_factor(step + 1)
        if warm < 1 or self.warmup_end >= 1:
            return warm
        decayed = (self._position(step) - self.warmup_end) / (1 - self.warmup_end)
        return _decay(self.shape, min(1.0, max(0.0, decayed)), self.num_cycles)

    def _warmup_factor(self, steps_done: int) -> float:
        if self.warmup == 0:
            return 1.0
        done = steps_done - self._first_step if self.warmup >= 1 else self._position(steps_done)
        return min(1.0, done / self.warmup)

    @property
    def _first_step(self) -> int:
        """Optimizer step at which the schedule of learning rates begins."""
        return self.start_step if self.is_whole_in_piece else 0

    def _position(self, step: float) -> float:
        """Fraction of the schedule of learning rates that is over when optimizer step `step` begins."""
        return self._share(step) if self.is_whole_in_piece else self.progress(step)

    def _share(self, step: float) -> float:
        """Fraction of the planned piece that is over when optimizer step `step` begins; flat outside it."""
        if step >= self.end_step:
            return 1.0
        return max(0.0, (step - self.start_step) / (self.end_step - self.start_step))


@dataclass(frozen=True)
class KLSchedule:
    """Progress of the run, from 0 to 1 -> coefficient of the KL term, from `start` to `end`.

    Args:
        start: the coefficient at progress 0.
        end: the coefficient at progress 1; above `start` it rises.
        shape: "constant" (always `start`), "linear" or "cosine" (half a wave).

    Raises:
        UserError: an unknown shape.
    """

    start: float
    end: float
    shape: str

    def __post_init__(self) -> None:
        if self.shape not in KL_SCHEDULES:
            raise UserError(
                f"train.kl_to_ref_schedule.type ({self.shape!r}) is unknown: choose one of {', '.join(KL_SCHEDULES)}."
            )

    def __call__(self, progress: float) -> float:
        """Coefficient of a step that begins when this fraction of the run is over; exactly `end` at 1."""
        share = _decay(self.shape, progress)
        return share * self.start + (1.0 - share) * self.end


def progress(scheduler: LambdaLR) -> float:
    """Fraction of the run that is over when the scheduler's coming optimizer step begins."""
    return _schedule_of(scheduler).progress(scheduler.last_epoch)


def plan(scheduler: LambdaLR, num_steps: int, until: float, *, anew: bool = False) -> None:
    """`ProgressSchedule.plan` from the scheduler's current step on; the optimizer's learning rates follow at once."""
    step, schedule = scheduler.last_epoch, _schedule_of(scheduler)
    schedule.plan(step, num_steps, until, anew=anew)
    _set_rates(scheduler)


def rescale(scheduler: LambdaLR, ratio: float) -> None:
    """`ProgressSchedule.rescale`; the optimizer's learning rates follow at once."""
    _schedule_of(scheduler).rescale(ratio)
    _set_rates(scheduler)


def _set_rates(scheduler: LambdaLR) -> None:
    """LambdaLR computed the coming step's rates when the step before ended: what was planned since counts."""
    step, schedule = scheduler.last_epoch, _schedule_of(scheduler)
    rates = [base * schedule(step) for base in scheduler.base_lrs]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def create_cosine_scheduler_with_warmup(
    optimizer: Optimizer, num_warmup_steps: float, num_training_steps: int, num_cycles: float = 0.5
) -> LambdaLR:
    """Warm-up, then a cosine to 0 (with the default `num_cycles`) that never rises again after its end.

    Args:
        optimizer: its learning rates are the peak.
        num_warmup_steps: a fraction of the run below 1, or optimizer steps.
        num_training_steps: optimizer steps of the whole run.
        num_cycles: waves of the cosine; 0.5 ends at 0.
    """
    return LambdaLR(optimizer, ProgressSchedule("cosine_with_warmup", num_warmup_steps, num_training_steps, num_cycles))


def make_scheduler(optimizer: Optimizer, scheduler_cfg: Any, num_training_steps: int) -> LambdaLR:
    """The scheduler of `optimizer.scheduler` in the configuration (enabled, type, warmup_steps, num_cycles)."""
    if not scheduler_cfg.enabled:
        return LambdaLR(optimizer, ProgressSchedule("constant", 0, num_training_steps))
    cfg = scheduler_cfg
    schedule = ProgressSchedule(cfg.type, cfg.warmup_steps, num_training_steps, cfg.num_cycles)
    return LambdaLR(optimizer, schedule)


def _schedule_of(scheduler: LambdaLR) -> ProgressSchedule:
    # All parameter groups share one schedule.
    return cast(ProgressSchedule, scheduler.lr_lambdas[0])


def _decay(shape: str, position: float, num_cycles: float = 0.5) -> float:
    """What is left of a height of 1 at `position`, from 0 to 1, of the way down; any other shape is a cosine."""
    if shape == "constant":
        return 1.0
    if shape == "linear":
        return 1.0 - position
    return 0.5 * (1.0 + math.cos(2 * math.pi * num_cycles * position))
