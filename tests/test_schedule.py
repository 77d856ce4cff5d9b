"""`expert_iteration.schedule`: learning rate and KL coefficient over a number of steps not known beforehand."""

import io
import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from expert_iteration.errors import UserError
from expert_iteration.schedule import (
    KLSchedule,
    ProgressSchedule,
    create_cosine_scheduler_with_warmup,
    make_scheduler,
    plan,
    progress,
    rescale,
)

# Factors are a few float64 operations on numbers of order 1.
CLOSE = 1e-12


def make_optimizer(lr: float = 1.0, groups: int = 2) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(groups)], lr=lr)


def rates(scheduler, steps: int) -> list[float]:
    """Learning rates of the next optimizer steps."""
    found = []
    for _ in range(steps):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_cosine_is_that_of_hugging_face_after_the_warm_up():
    ours = rates(create_cosine_scheduler_with_warmup(make_optimizer(), 4, 20), 20)
    theirs = rates(get_cosine_schedule_with_warmup(make_optimizer(), 4, 20), 20)
    assert ours[4:] == pytest.approx(theirs[4:], abs=CLOSE)
    assert ours[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=CLOSE)  # theirs begins with a step at rate 0


@pytest.mark.parametrize("shape", ["cosine_with_warmup", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.1, 5, 1])
def test_the_first_step_counts_and_nothing_rises_after_the_warm_up(shape, warmup):
    schedule = ProgressSchedule(shape, warmup, num_training_steps=50)
    factors = [schedule(step) for step in range(200)]
    peak = factors.index(1.0)
    assert 0 < factors[0] <= 1
    assert peak == {0: 0, 0.1: 4, 5: 4, 1: 0}[warmup]
    assert all(a < b for a, b in pairwise(factors[: peak + 1]))
    assert all(a >= b for a, b in pairwise(factors[peak:]))
    assert factors[49] > 0
    assert factors[50:] == pytest.approx([1.0 if shape == "constant" else 0.0] * 150, abs=CLOSE)


def test_linear_falls_by_equal_steps():
    assert rates(make_scheduler(make_optimizer(2.0), settings("linear", 0), 4), 5) == [2.0, 1.5, 1.0, 0.5, 0.0]


@pytest.mark.parametrize(("num_cycles", "last"), [(0.5, 0.0), (0.25, 0.5), (1.0, 1.0), (1.5, 0.0)])
def test_num_cycles_is_honoured_and_the_end_is_held(num_cycles, last):
    schedule = ProgressSchedule("cosine_with_warmup", 0, 40, num_cycles)
    assert schedule(40) == pytest.approx(last, abs=CLOSE)
    assert schedule(1000) == schedule(40)
    if num_cycles == 1.5:
        assert schedule(40 // 3) < 0.01
        assert schedule(2 * 40 // 3) > 0.98


def test_a_plan_spreads_the_progress_of_a_batch_over_its_steps():
    schedule = ProgressSchedule("linear", 0, num_training_steps=1000)
    schedule.plan(0, num_steps=4, until=0.2)
    assert [schedule(step) for step in range(6)] == pytest.approx([1.0, 0.95, 0.9, 0.85, 0.8, 0.8], abs=CLOSE)
    schedule.plan(4, num_steps=2, until=1.0)
    assert [schedule(step) for step in range(4, 9)] == pytest.approx([0.8, 0.4, 0.0, 0.0, 0.0], abs=CLOSE)


def test_a_warm_up_in_steps_ends_at_the_peak_wherever_the_plans_put_it():
    """Steps 4 and 5 end the warm-up in the second batch, a quarter of the way: the decay has the other three."""
    schedule = ProgressSchedule("linear", 5, num_training_steps=1000)
    schedule.plan(0, num_steps=4, until=0.2)
    assert [schedule(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8], abs=CLOSE)
    schedule.plan(4, num_steps=2, until=0.3)
    assert [schedule(4), schedule(5)] == [1.0, 1.0]
    schedule.plan(6, num_steps=7, until=1.0)
    assert schedule(6) == pytest.approx(0.7 / 0.75, abs=CLOSE)
    assert schedule(13) == pytest.approx(0.0, abs=CLOSE)


def test_a_batch_without_steps_moves_the_progress_on_at_once():
    schedule = ProgressSchedule("linear", 0, num_training_steps=10)
    schedule.plan(0, num_steps=0, until=0.5)
    schedule.plan(0, num_steps=5, until=1.0)
    assert [schedule(step) for step in range(6)] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.0], abs=CLOSE)


def test_progress_never_goes_back():
    schedule = ProgressSchedule("linear", 0, num_training_steps=10)
    schedule.plan(5, num_steps=5, until=0.2)  # the guess at the start was too low: half of it is done already
    assert [schedule(step) for step in (5, 7, 10)] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("warmup", [0.1, 6])
def test_whatever_the_batches_keep_the_run_ends_at_the_end_of_the_cosine(warmup):
    draw = random.Random(0)
    for _ in range(20):
        kept = [draw.randrange(8) for _ in range(30)] + [2]
        scheduler = create_cosine_scheduler_with_warmup(make_optimizer(), warmup, num_training_steps=40)
        found = []
        for index, steps in enumerate(kept):
            plan(scheduler, steps, until=(index + 1) / len(kept))
            found += rates(scheduler, steps)
        peak = found.index(max(found))
        assert found[0] > 0
        assert found[peak] > 0.98
        assert all(a >= b for a, b in pairwise(found[peak:]))
        assert 0 < found[-1] < 0.01
        assert scheduler.optimizer.param_groups[1]["lr"] == pytest.approx(0.0, abs=CLOSE)


def test_a_plan_changes_the_coming_rate_of_every_group():
    scheduler = create_cosine_scheduler_with_warmup(make_optimizer(3.0), 0.5, num_training_steps=1000)
    before = scheduler.get_last_lr()
    plan(scheduler, num_steps=10, until=1.0)
    assert before == pytest.approx([3.0 / 500] * 2, abs=CLOSE)
    assert [group["lr"] for group in scheduler.optimizer.param_groups] == pytest.approx([0.6, 0.6], abs=CLOSE)
    assert scheduler.get_last_lr() == pytest.approx([0.6, 0.6], abs=CLOSE)


@pytest.mark.parametrize("shape", ["cosine_with_warmup", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.25, 3])
def test_a_plan_made_anew_is_a_whole_schedule_within_the_same_progress_of_the_run(shape, warmup):
    scheduler = make_scheduler(make_optimizer(), settings(shape, warmup), 1000)
    for steps, until in ((8, 0.2), (20, 0.5), (12, 1.0)):
        before = progress(scheduler)
        plan(scheduler, steps, until, anew=True)
        whole = rates(make_scheduler(make_optimizer(), settings(shape, warmup), steps), steps)
        assert progress(scheduler) == before
        assert rates(scheduler, steps) == pytest.approx(whole, abs=CLOSE)
        assert min(whole) > 0
        assert progress(scheduler) == until


def test_a_warm_up_that_is_longer_than_a_plan_made_anew_never_ends():
    scheduler = make_scheduler(make_optimizer(), settings("linear", 10), 1000)
    for until in (0.5, 1.0):
        plan(scheduler, 4, until, anew=True)
        assert rates(scheduler, 4) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=CLOSE)


def test_a_plan_made_anew_after_bad_steps_begins_where_the_optimizer_stands():
    scheduler = make_scheduler(make_optimizer(), settings("linear", 0), 1000)
    plan(scheduler, 4, 0.5, anew=True)
    rates(scheduler, 3)
    plan(scheduler, 2, 1.0, anew=True)
    assert progress(scheduler) == pytest.approx(0.375, abs=CLOSE)
    assert rates(scheduler, 2) == pytest.approx([1.0, 0.5], abs=CLOSE)


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("warmup", [0.3, 8])
def test_a_restored_scheduler_continues(warmup, anew):
    def start():
        return create_cosine_scheduler_with_warmup(make_optimizer(), warmup, num_training_steps=100)

    scheduler = start()
    plan(scheduler, 10, until=0.2, anew=anew)
    rates(scheduler, 10)
    plan(scheduler, 20, until=0.5, anew=anew)
    rates(scheduler, 15)
    saved = io.BytesIO()
    torch.save([scheduler.state_dict(), scheduler.optimizer.state_dict()], saved)
    saved.seek(0)
    state, optimizer_state = torch.load(saved, weights_only=True)
    restored = start()
    restored.optimizer.load_state_dict(optimizer_state)
    restored.load_state_dict(state)
    for which in (scheduler, restored):
        rates(which, 5)
        plan(which, 10, until=1.0)
    assert rates(restored, 10) == rates(scheduler, 10)


def settings(type_: str, warmup_steps: float, enabled: bool = True) -> SimpleNamespace:
    return SimpleNamespace(enabled=enabled, type=type_, warmup_steps=warmup_steps, num_cycles=0.5)


def test_the_scheduler_of_the_configuration():
    assert rates(make_scheduler(make_optimizer(), settings("constant", 0.5), 4), 4) == [0.5, 1.0, 1.0, 1.0]
    off = make_scheduler(make_optimizer(), settings("linear", 2, enabled=False), 4)
    assert rates(off, 6) == [1.0] * 6
    cosine = rates(make_scheduler(make_optimizer(), settings("cosine_with_warmup", 2), 9), 9)
    assert cosine == rates(create_cosine_scheduler_with_warmup(make_optimizer(), 2, 9), 9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("exponential", 0, 10), "cosine_with_warmup, linear, constant"),
        (("linear", -1, 10), "warmup_steps"),
        (("linear", 1.5, 10), "warmup_steps"),
        (("linear", 0, 0), "at least one"),
    ],
)
def test_what_makes_no_schedule_is_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        ProgressSchedule(*arguments)


@pytest.mark.parametrize(("num_steps", "until"), [(-1, 0.5), (1, 0.0), (1, 1.1)])
def test_what_makes_no_plan_is_refused(num_steps, until):
    with pytest.raises(ValueError, match="plan"):
        ProgressSchedule("linear", 0, 10).plan(0, num_steps, until)


# --- the KL coefficient ---


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [0.8, 0.8, 0.8, 0.8, 0.8]),
        ("linear", [0.8, 0.65, 0.5, 0.35, 0.2]),
        ("cosine", [0.8, 0.5 + 0.3 * 0.5**0.5, 0.5, 0.5 - 0.3 * 0.5**0.5, 0.2]),  # the cosines of 0, 45, .. 180 degrees
    ],
)
def test_the_kl_coefficient_goes_from_start_to_end(shape, expected):
    schedule = KLSchedule(start=0.8, end=0.2, shape=shape)
    assert [schedule(quarter / 4) for quarter in range(5)] == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_kl_coefficient_is_exact_at_both_ends_and_may_rise(shape):
    # 0.1 and 0.7 are no binary fractions: start + (end - start) would miss the end by a rounding.
    for start, end in ((0.7, 0.1), (0.1, 0.7), (0.3, 0.0)):
        schedule = KLSchedule(start, end, shape)
        assert (schedule(0.0), schedule(1.0)) == (start, end)
        assert min(start, end) < schedule(0.5) < max(start, end)


@pytest.mark.parametrize(("shape", "kl_shape"), [("linear", "linear"), ("cosine_with_warmup", "cosine")])
def test_the_kl_coefficient_falls_with_a_learning_rate_of_the_same_shape(shape, kl_shape):
    scheduler, schedule = make_scheduler(make_optimizer(), settings(shape, 0), 1000), KLSchedule(1.0, 0.0, kl_shape)
    found, expected = [], []
    for steps, until in ((3, 0.2), (0, 0.5), (4, 1.0)):
        plan(scheduler, steps, until)
        for _ in range(steps):
            found.append(schedule(progress(scheduler)))
            expected += rates(scheduler, 1)
    assert found == expected
    assert found[0] == 1.0
    assert (schedule(progress(scheduler)), scheduler.get_last_lr()[0]) == (0.0, 0.0)


def test_progress_does_not_wait_for_the_warm_up_or_need_a_schedule_of_rates():
    for optimizer_settings in (settings("linear", 0.5), settings("linear", 2, enabled=False)):
        scheduler = make_scheduler(make_optimizer(), optimizer_settings, 4)
        found = []
        for _ in range(5):
            found.append(progress(scheduler))
            rates(scheduler, 1)
        assert found == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_an_unknown_shape_of_the_kl_coefficient_is_refused():
    with pytest.raises(UserError, match=r"kl_to_ref_schedule\.type \('cosine_with_warmup'\).*constant, linear, cosine"):
        KLSchedule(1.0, 0.0, "cosine_with_warmup")


# --- a run that is made longer ---


@pytest.mark.parametrize("warmup", [0.1, 2])
def test_a_run_that_is_made_longer_has_the_rates_of_one_that_was_as_long(warmup):
    def rates(scheduler, num_batches, of):
        found = []
        for batch in range(1, num_batches + 1):
            plan(scheduler, 5, until=batch / of)
            for _ in range(5):
                found.append(scheduler.get_last_lr()[0])
                scheduler.optimizer.step()
                scheduler.step()
        return found

    def start(num_steps):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, ProgressSchedule("cosine_with_warmup", warmup, num_steps))

    whole = rates(start(40), 8, of=8)
    scheduler = start(20)
    rates(scheduler, 4, of=4)
    assert scheduler.get_last_lr()[0] == 0.0
    rescale(scheduler, 0.5)
    assert progress(scheduler) == 0.5
    later = []
    for batch in range(5, 9):
        plan(scheduler, 5, until=batch / 8)
        for _ in range(5):
            later.append(scheduler.get_last_lr()[0])
            scheduler.optimizer.step()
            scheduler.step()
    # A warm-up that is counted in steps was a larger part of the shorter run.
    assert later == pytest.approx(whole[20:], abs=0.02)
    assert later[0] > 0.3
