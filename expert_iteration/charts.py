"""The curves of a run's report: which metrics are drawn, over what, and how."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from expert_iteration.report_series import (
    ACCEPTED,
    COLLECT_SPEED,
    GROUPS_EQUAL,
    PASS_RATES,
    Point,
    Series,
    running_mean,
    thin,
)

OVER_BATCHES, OVER_STEPS = "batch collected", "gradient step"
MAX_POINTS = 200  # per curve: more cannot be seen and would make the page heavy
MAX_MARKED_POINTS = 40

# Two curves differ in colour (also to colour-blind readers), dash and marker.
COLORS, DASHES, MARKERS = ("#1f5fa8", "#c8590c"), ("-", "--"), (("o", "●"), ("s", "■"))
BANDS = ("#7f2704", "#d9752b", "#f3c27a", "#b9d3e8", "#5b94c6", "#123f7a")  # from bad to good, dark at both ends
FAINT = 0.3  # opacity of the numbers as they were logged, behind their smoothed curve
CHART_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "svg.fonttype": "none",  # text stays text: sharp, selectable, small
    "svg.hashsalt": "report",  # the same run gives the same page
}


@dataclass(frozen=True)
class Chart:
    """What one figure shows: metrics by name with their labels, over batches collected or gradient steps."""

    title: str
    unit: str
    curves: Mapping[str, str]
    over: str
    limits: tuple[float | None, float | None] = (None, None)
    if_constant: bool = True  # whether it is worth its place when nothing in it changes
    if_single: bool = True  # and when it has a single point
    is_smoothed: bool = True  # whether what is drawn strongly is a running mean
    is_stacked: bool = False  # whether curves are bands on top of each other, parts of a whole
    errors: Mapping[str, str] = field(default_factory=dict)  # metrics that are the standard errors of others


ACCURACY = {"eval/pass@1": "pass@1 (sampled)", "eval/greedy": "greedy"}
LOSSES = {"train/loss": "total", "train/loss_sft": "imitation (SFT)"}
SELECTION = {ACCEPTED: "responses kept", GROUPS_EQUAL: "groups of equal rewards"}
GROUPS = {f"pass_rate/{name}": label for name, label in PASS_RATES.items()}
AGES = {"train/policy_age": "mean", "train/max_policy_age": "oldest"}
SPEEDS = {COLLECT_SPEED: "collected", "train/tokens_per_second": "trained, mean so far"}
KL_COEFFICIENT = {"train/kl_to_ref_coeff": "coefficient"}
FORM = {"eval/format_rate": "well-formed", "eval/truncation_rate": "truncated"}
CHARTS = (
    Chart(
        "Held-out accuracy",
        "share correct",
        ACCURACY,
        OVER_STEPS,
        (0.0, 1.0),
        if_single=False,  # the table at the top of the page has it
        is_smoothed=False,
        errors={"eval/pass@1": "eval/pass@1_stderr"},
    ),
    Chart("Form of held-out responses", "share", FORM, OVER_STEPS, (0.0, 1.0), is_smoothed=False, if_constant=False),
    Chart("Reward of collected responses", "mean reward", {"collector/rewards/mean": "reward"}, OVER_BATCHES),
    Chart("KL to the reference", "nats per token", {"train/kl_to_ref": "KL"}, OVER_STEPS, (0.0, None)),
    Chart("Entropy of the policy", "nats per token", {"train/entropy": "entropy"}, OVER_STEPS, (0.0, None)),
    Chart("Loss", "nats per token", LOSSES, OVER_STEPS),
    Chart("Response length", "mean tokens", {"collector/response_length/mean": "length"}, OVER_BATCHES, (0.0, None)),
    Chart(
        "Truncated responses",
        "share of a batch",
        {"collector/truncation_rate": "truncated"},
        OVER_BATCHES,
        (0.0, None),
        if_constant=False,
    ),
    Chart("Selection", "share of a batch", SELECTION, OVER_BATCHES, (0.0, 1.0)),
    Chart("Groups by share of right responses", "share of groups", GROUPS, OVER_BATCHES, (0.0, 1.0), is_stacked=True),
    Chart("Age of trained responses", "weight pushes", AGES, OVER_STEPS, (0.0, None), if_constant=False),
    Chart("Throughput", "tokens per second", SPEEDS, OVER_STEPS, (0.0, None)),
    Chart("KL coefficient", "weight in the loss", KL_COEFFICIENT, OVER_STEPS, if_constant=False, is_smoothed=False),
)
CHART_METRICS = frozenset(name for chart in CHARTS for name in (*chart.curves, *chart.errors.values()))
REWARD_PART = "collector/reward/"
MAX_PARTS = 6


def charts_of(metric_names: Iterable[str]) -> list[Chart]:
    """The charts of a run that has these metrics: `CHARTS`, and beside that of the reward one for each of its parts.

    Parts are drawn before weighting, the first `MAX_PARTS` by name.
    """
    parts = sorted(name for name in metric_names if name.startswith(REWARD_PART))[:MAX_PARTS]
    names = {name: name.removeprefix(REWARD_PART) for name in parts}
    of_parts = [Chart(f"Reward: {label}", "mean part", {name: label}, OVER_BATCHES) for name, label in names.items()]
    place = 1 + next(number for number, chart in enumerate(CHARTS) if "collector/rewards/mean" in chart.curves)
    return [*CHARTS[:place], *of_parts, *CHARTS[place:]]


class Curve(NamedTuple):
    """A drawn metric as the legend under its chart shows it: ends of what is drawn strongly."""

    label: str
    color: str
    marker: str
    first: float
    last: float
    mean_of: int  # numbers behind each point of it


class Figure(NamedTuple):
    """A chart with its picture; without data there are no curves and the picture is empty."""

    chart: Chart
    curves: list[Curve]
    svg: str


def draw_all(charts: Iterable[Chart], series: Series) -> list[Figure]:
    """The charts of a run, without those that are not worth their place."""
    return [draw(chart, series) for chart in charts if _is_worth_its_place(chart, series)]


def draw(chart: Chart, series: Series) -> Figure:
    """A chart as SVG that refers to nothing outside itself."""
    with open_canvas(height=2.6) as canvas:
        from matplotlib.ticker import MaxNLocator

        axes = canvas.subplots()
        curves = _stack(axes, chart, series) if chart.is_stacked else _plot_all(axes, chart, series)
        if not curves:
            return Figure(chart, [], "")
        axes.set(xlabel=chart.over, ylabel=chart.unit)
        _set_limits(axes, chart.limits)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return Figure(chart, curves, to_svg(canvas))


@contextmanager
def open_canvas(height: float) -> Iterator[Any]:
    """A matplotlib figure as wide as all charts, `height` inches high, and meanwhile the charts' style."""
    import matplotlib

    # Its first use on a machine would announce that it looks for fonts.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.WARNING)
    from matplotlib.figure import Figure as Canvas

    # Not pyplot, which would choose a display and keep every figure.
    with matplotlib.rc_context(CHART_STYLE):
        yield Canvas(figsize=(4.6, height), layout="constrained")


def to_svg(canvas: Any) -> str:
    """The picture as an SVG element, to be called while the canvas is open."""
    stream = io.StringIO()
    # No metadata, which holds links and the date, and no prologue, which names a file on the web.
    canvas.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]


def _is_worth_its_place(chart: Chart, series: Series) -> bool:
    curves = [series.get(name, ()) for name in chart.curves]
    varies = any(len({point.value for point in points}) > 1 for points in curves)
    return (chart.if_constant or varies) and (chart.if_single or max(map(len, curves)) != 1)


def _stack(axes: Any, chart: Chart, series: Series) -> list[Curve]:
    """Draw all metrics of a chart as bands on top of each other, the first at the bottom; none where one is missing."""
    curves = [series.get(name, ()) for name in chart.curves]
    if min(map(len, curves)) == 0:
        return []
    size = math.ceil(len(curves[0]) / MAX_POINTS)
    places = thin(range(1, len(curves[0]) + 1), size)
    smooth = [running_mean([point.value for point in points]) for points in curves]
    width = smooth[0][1]
    bands = [thin(means, size) for means, _ in smooth]
    if len(places) == 1:  # a band of no width would not be seen
        places, bands = [places[0] - 0.5, places[0] + 0.5], [band * 2 for band in bands]
    axes.stackplot(places, bands, colors=BANDS, linewidth=0)
    return [
        Curve(label, color, MARKERS[1][1], band[0], band[-1], max(size, width))
        for label, color, band in zip(chart.curves.values(), BANDS, bands, strict=True)
    ]


def _plot_all(axes: Any, chart: Chart, series: Series) -> list[Curve]:
    """Draw each metric of a chart that has numbers as a curve."""
    curves = []
    for index, (name, label) in enumerate(chart.curves.items()):
        points = series.get(name)
        if points:
            curves.append(_plot(axes, chart, points, index, label))
            _plot_errors(axes, points, series.get(chart.errors.get(name, ""), ()), index)
    return curves


def _plot(axes: Any, chart: Chart, points: Sequence[Point], index: int, label: str) -> Curve:
    """Draw the `index`-th curve of a chart: its numbers as they are, and over them, if they are many, their means."""
    size = math.ceil(len(points) / MAX_POINTS)
    places = [point.step if chart.over == OVER_STEPS else number for number, point in enumerate(points, 1)]
    values = [point.value for point in points]
    means, width = running_mean(values) if chart.is_smoothed else (values, 1)
    xs, ys = thin(places, size), thin(means, size)
    if width > 1:
        _plot_faintly(axes, xs, values, size, COLORS[index])
    marker, character = MARKERS[index]
    axes.plot(
        xs,
        ys,
        color=COLORS[index],
        linestyle=DASHES[index],
        linewidth=1.8,
        marker=marker if len(xs) <= MAX_MARKED_POINTS and width == 1 else None,
        markersize=4,
        clip_on=False,  # a marker on the frame is shown whole
    )
    return Curve(label, COLORS[index], character, ys[0], ys[-1], max(size, width))


def _plot_faintly(axes: Any, xs: Sequence[float], values: Sequence[float], size: int, color: str) -> None:
    """The numbers themselves; of more than can be seen, the range of each `size` neighbours."""
    if size == 1:
        axes.plot(xs, values, color=color, alpha=FAINT, linewidth=1.0)
        return
    chunks = [values[start : start + size] for start in range(0, len(values), size)]
    axes.fill_between(xs, [min(chunk) for chunk in chunks], [max(chunk) for chunk in chunks], color=color, alpha=FAINT)


def _plot_errors(axes: Any, points: Sequence[Point], errors: Sequence[Point], index: int) -> None:
    """Bars of a standard error to either side; nothing where errors are not known for all points."""
    if len(errors) == len(points):
        xs, ys = [point.step for point in points], [point.value for point in points]
        sizes = [error.value for error in errors]
        axes.errorbar(xs, ys, sizes, fmt="none", ecolor=COLORS[index], elinewidth=1.0, capsize=2.5)


def _set_limits(axes: Any, limits: tuple[float | None, float | None]) -> None:
    """Fix the ends of the y axis that are given; the margin at the other end is a share of the whole axis."""
    axes.update_datalim([(axes.dataLim.x0, limit) for limit in limits if limit is not None])
    axes.autoscale_view()
    axes.set_ylim(*limits)
