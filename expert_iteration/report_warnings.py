"""What looks wrong in a run: since which step, and what to do about it. The report shows it at its top."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from expert_iteration.report_series import GROUPS_EQUAL, GROUPS_KEPT, Point, Series, in_windows
from expert_iteration.selection_advice import WITHIN_GROUPS

# Numbers are judged in windows (`in_windows`), so that one odd micro-batch or batch is no alarm. Those of evaluations
# are not: each is a mean over all held-out responses, and a run may have two.

# Of the entropy at the start. Training sharpens the policy: runs of the tiny task that learn go down to about a half.
COLLAPSED_ENTROPY = 0.2
# A response that the limit cut off has no answer. A few are usual; beyond this they are what the run is about.
MOST_TRUNCATED = 0.2
MOST_GROUPS = 0.5  # "most" groups of a batch
# Of the way from the lowest to the highest reward that the run has seen: above this there is little left to win, and
# above the half what all responses of a group have in common is rather right than wrong.
SATURATED, RATHER_RIGHT = 0.95, 0.5

SOMETHING_HARDER = (
    "There is little left to learn from these prompts: take harder ones, or a reward that tells the good from the "
    "better. Or the run is done, and train.stop_patience would end it."
)

MEAN_REWARD, LEAST_REWARD, GREATEST_REWARD = (f"collector/rewards/{name}" for name in ("mean", "min", "max"))
WARNING_METRICS = frozenset(
    {
        "train/entropy",
        "train/kl_to_ref",
        "train/bad_steps",
        "collector/truncation_rate",
        "collector/dropped_records",
        "eval/truncation_rate",
        "selection/batch_kept",
        GROUPS_KEPT,
        GROUPS_EQUAL,
        MEAN_REWARD,
        LEAST_REWARD,
        GREATEST_REWARD,
    }
)


class RunWarning(NamedTuple):
    """What is wrong, since when, and what to do."""

    title: str
    when: str
    remedy: str


class Stretch(NamedTuple):
    """The last stretch of numbers in which something was wrong."""

    lowest: float
    highest: float
    when: str


def find_warnings(
    series: Series, *, kl_budget: float | None, error: str | None, advice: str = WITHIN_GROUPS
) -> list[RunWarning]:
    """Everything that looks wrong in a run, the gravest first.

    Args:
        series: of `WARNING_METRICS`, as far as the run has them.
        kl_budget: nats per token (`logging.kl_budget`); None where it is not known.
        error: of summary.json.
        advice: what to change where selection keeps too little, as `selection_advice.advise` says.
    """
    advice = f"{advice[0].upper()}{advice[1:]}."
    saturated = list(_saturated_reward(series))
    return [
        *_engine_mismatch(error),
        *_bad_steps(series),
        *_entropy_collapse(series),
        *_kl_above_budget(series, kl_budget),
        *_truncation(series),
        *_nothing_kept(series, advice),
        *(saturated or _few_groups_kept(series, advice)),
        *_lost_records(series),
    ]


def _engine_mismatch(error: str | None) -> Iterator[RunWarning]:
    if error is not None and error.startswith("WeightMismatchError"):
        yield RunWarning(
            "The engine did not hold the trainer's weights",
            "at the end, which is why the run stopped",
            "The error above names the tensors that were not sent. What was collected since the last good probe came "
            "from an unknown policy.",
        )


def _bad_steps(series: Series) -> Iterator[RunWarning]:
    counts = [point for point in series.get("train/bad_steps", ()) if point.value > 0]
    if counts:
        yield RunWarning(
            f"{counts[-1].value:.0f} optimizer steps were skipped, for their loss or gradient was not finite",
            f"since gradient step {counts[0].step}",
            "Lower optimizer.lr or optimizer.clip_grad_norm, or set train_model.torch_dtype=float32.",
        )


def _entropy_collapse(series: Series) -> Iterator[RunWarning]:
    windows = in_windows(series.get("train/entropy", ()))
    if windows and (found := _last_stretch(windows, lambda value: value < COLLAPSED_ENTROPY * windows[0].value)):
        yield RunWarning(
            f"Entropy collapse: down to {found.lowest:.2g} nats per token, from {windows[0].value:.2g} at the start",
            found.when,
            "The policy hardly varies its responses, so that groups have nothing to choose from. Raise "
            "train.kl_to_ref_coeff or inference_model.temperature, lower optimizer.lr, or stop earlier.",
        )


def _kl_above_budget(series: Series, budget: float | None) -> Iterator[RunWarning]:
    windows = in_windows(series.get("train/kl_to_ref", ()))
    if budget is not None and (found := _last_stretch(windows, lambda value: value > budget)):
        yield RunWarning(
            f"KL to the reference up to {found.highest:.3g} nats per token, above logging.kl_budget ({budget:g})",
            found.when,
            "The policy has gone far from the reference: compare held-out responses by eye. Raise "
            "train.kl_to_ref_coeff, or lower optimizer.lr or train.epochs.",
        )


def _truncation(series: Series) -> Iterator[RunWarning]:
    collected = in_windows(series.get("collector/truncation_rate", ()))
    evaluated = series.get("eval/truncation_rate", ())
    if evaluated and evaluated[-1].value <= MOST_TRUNCATED:
        evaluated = ()  # whatever was before, the policy as it is now ends its responses
    for points, whose in ((collected, "collected"), (evaluated, "held-out")):
        if found := _last_stretch(points, lambda value: value > MOST_TRUNCATED):
            yield RunWarning(
                f"Up to {found.highest:.0%} of {whose} responses were truncated",
                found.when,
                "Raise inference_model.max_tokens (and max_model_len), or let the reward prefer short responses.",
            )


def _nothing_kept(series: Series, advice: str) -> Iterator[RunWarning]:
    kept = series.get("selection/batch_kept", ())
    empty = [point for point in kept if point.value == 0]
    if empty:
        title = f"Nothing was kept of {len(empty)} of {len(kept)} batches"
        yield RunWarning(title, f"first after gradient step {empty[0].step}", advice)


def _few_groups_kept(series: Series, advice: str) -> Iterator[RunWarning]:
    if found := _last_stretch(in_windows(series.get(GROUPS_KEPT, ())), lambda value: value < 1 - MOST_GROUPS):
        title = f"Most groups are dropped: down to {found.lowest:.0%} kept a response"
        yield RunWarning(title, found.when, advice)


def _saturated_reward(series: Series) -> Iterator[RunWarning]:
    heights = in_windows(_relative_rewards(series))
    if found := _last_stretch(heights, lambda value: value > SATURATED):
        title = f"The reward is saturated: its mean is {found.highest:.0%} of the way from its minimum to its maximum"
        yield RunWarning(title, found.when, SOMETHING_HARDER)
        return
    equal = _last_stretch(in_windows(series.get(GROUPS_EQUAL, ())), lambda value: value > MOST_GROUPS)
    if equal and heights and heights[-1].value > RATHER_RIGHT:
        title = f"The reward is saturated: in up to {equal.highest:.0%} of groups all responses have the same one"
        yield RunWarning(title, equal.when, SOMETHING_HARDER)


def _relative_rewards(series: Series) -> list[Point]:
    """Mean rewards as the share of the way from the lowest to the highest reward of the run."""
    least = min((point.value for point in series.get(LEAST_REWARD, ())), default=0.0)
    greatest = max((point.value for point in series.get(GREATEST_REWARD, ())), default=0.0)
    if greatest <= least:
        return []
    return [Point(step, (value - least) / (greatest - least)) for step, value in series.get(MEAN_REWARD, ())]


def _lost_records(series: Series) -> Iterator[RunWarning]:
    lost = [point for point in series.get("collector/dropped_records", ()) if point.value > 0]
    if lost:
        yield RunWarning(
            f"{lost[-1].value:.0f} records of the collector were lost, for the trainer did not read them in time",
            f"since gradient step {lost[0].step}",
            "Curves over batches have gaps there; the training itself is not affected.",
        )


def _last_stretch(points: Sequence[Point], is_bad: Callable[[float], bool]) -> Stretch | None:
    """When something was last bad; None if it never was."""
    flags = [is_bad(point.value) for point in points]
    if True not in flags:
        return None
    end = len(flags) - flags[::-1].index(True)
    start = next((index + 1 for index in reversed(range(end)) if not flags[index]), 0)
    values = [point.value for point in points[start:end]]
    since = points[start].step
    when = f"since gradient step {since}" if end == len(flags) else f"gradient steps {since} to {points[end].step}"
    return Stretch(min(values), max(values), when)
