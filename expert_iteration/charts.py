"""The curves of a run's report: which metrics are drawn, over what, and how."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

OVER_BATCHES, OVER_STEPS = "batch collected", "gradient step"
MAX_POINTS = 200  # per curve: more cannot be seen and would make the page heavy
MAX_MARKED_POINTS = 40

# Two curves differ in colour (also to colour-blind readers), dash and marker.
COLORS, DASHES, MARKERS = ("#1f5fa8", "#c8590c"), ("-", "--"), (("o", "●"), ("s", "■"))
CHART_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.grid": True,
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


ACCURACY = {"eval/pass@1": "pass@1 (sampled)", "eval/greedy": "greedy"}
LOSSES = {"train/loss": "total", "train/loss_sft": "imitation (SFT)"}
AGES = {"train/policy_age": "mean", "train/max_policy_age": "oldest"}
KL_COEFFICIENT = {"train/kl_to_ref_coeff": "coefficient"}
CHARTS = (
    Chart("Held-out accuracy", "share correct", ACCURACY, OVER_STEPS, (0.0, 1.0)),
    Chart("Reward of collected responses", "mean reward", {"collector/rewards/mean": "reward"}, OVER_BATCHES),
    Chart("KL to the start model", "nats per token", {"train/kl_to_ref": "KL"}, OVER_STEPS, (0.0, None)),
    Chart("Loss", "nats per token", LOSSES, OVER_STEPS),
    Chart("Response length", "mean tokens", {"collector/response_length/mean": "length"}, OVER_BATCHES, (0.0, None)),
    Chart("Kept responses per batch", "responses", {"selection/batch_kept": "kept"}, OVER_BATCHES, (0.0, None)),
    Chart("Age of trained responses", "weight pushes", AGES, OVER_STEPS, (0.0, None)),
    Chart("KL coefficient", "weight in the loss", KL_COEFFICIENT, OVER_STEPS, (0.0, None), if_constant=False),
)


class Point(NamedTuple):
    """A number of metrics.jsonl and the gradient step of its line."""

    step: int
    value: float


class Curve(NamedTuple):
    """A drawn metric as the legend under its chart shows it."""

    label: str
    color: str
    marker: str
    first: float
    last: float
    mean_of: int  # numbers behind each point


class Figure(NamedTuple):
    """A chart with its picture; without data there are no curves and the picture is empty."""

    chart: Chart
    curves: list[Curve]
    svg: str


def collect_series(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """The numbers that the charts show, by name, in the order of the lines of metrics.jsonl; nulls are left out."""
    wanted = {name for chart in CHARTS for name in chart.curves}
    series: dict[str, list[Point]] = {}
    for line in lines:
        for name in wanted & line.keys():
            if line[name] is not None:
                series.setdefault(name, []).append(Point(line["step"], line[name]))
    return series


def draw_all(series: Mapping[str, Sequence[Point]]) -> list[Figure]:
    """The charts of a run, without those that only matter when something in them changes, and nothing does."""
    return [draw(chart, series) for chart in CHARTS if chart.if_constant or _varies(chart, series)]


def draw(chart: Chart, series: Mapping[str, Sequence[Point]]) -> Figure:
    """A chart as SVG that refers to nothing outside itself."""
    with open_canvas(height=2.6) as canvas:
        from matplotlib.ticker import MaxNLocator

        axes = canvas.subplots()
        curves = []
        for index, (name, label) in enumerate(chart.curves.items()):
            points = series.get(name)
            if points:
                curves.append(_plot(axes, chart, points, index, label))
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


def thin(values: Sequence[float], size: int) -> list[float]:
    """The means of each `size` neighbours; the last may have fewer."""
    chunks = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(chunk) / len(chunk) for chunk in chunks]


def _varies(chart: Chart, series: Mapping[str, Sequence[Point]]) -> bool:
    return any(len({point.value for point in series.get(name, ())}) > 1 for name in chart.curves)


def _plot(axes: Any, chart: Chart, points: Sequence[Point], index: int, label: str) -> Curve:
    """Draw the `index`-th curve of a chart."""
    size = math.ceil(len(points) / MAX_POINTS)
    xs = thin([point.step if chart.over == OVER_STEPS else number for number, point in enumerate(points, 1)], size)
    ys = thin([point.value for point in points], size)
    marker, character = MARKERS[index]
    axes.plot(
        xs,
        ys,
        color=COLORS[index],
        linestyle=DASHES[index],
        linewidth=1.8,
        marker=marker if len(xs) <= MAX_MARKED_POINTS else None,
        markersize=4,
        clip_on=False,  # a marker on the frame is shown whole
    )
    return Curve(label, COLORS[index], character, ys[0], ys[-1], size)


def _set_limits(axes: Any, limits: tuple[float | None, float | None]) -> None:
    """Fix the ends of the y axis that are given; the margin at the other end is a share of the whole axis."""
    axes.update_datalim([(axes.dataLim.x0, limit) for limit in limits if limit is not None])
    axes.autoscale_view()
    axes.set_ylim(*limits)
