"""The pictures of a run's timeline: what each process did when, in an excerpt, and its shares over the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from expert_iteration.charts import open_canvas, to_svg
from expert_iteration.timeline import (
    ACTIVITIES,
    COLLECTING,
    EVALUATING,
    GENERATING,
    LOADING_WEIGHTS,
    PUSHING_WEIGHTS,
    REFERENCE,
    SAVING,
    TRAINING,
    WAITING_FOR_DATA,
    WRITING,
)
from expert_iteration.timeline_report import Timeline

# Those of a process also differ in lightness. Weights have one colour where they leave and where they arrive.
COLORS = {
    GENERATING: "#1f5fa8",
    LOADING_WEIGHTS: "#26262b",
    COLLECTING: "#7fb2e0",
    REFERENCE: "#00735c",
    WRITING: "#5b3a94",
    TRAINING: "#c8590c",
    PUSHING_WEIGHTS: "#26262b",
    EVALUATING: "#f0c541",
    SAVING: "#5b3a94",
    WAITING_FOR_DATA: "#a9a9b2",
}
ALWAYS_SHOWN = (PUSHING_WEIGHTS, LOADING_WEIGHTS)  # however short: they are what the lanes exchange
LANE_HEIGHT, WAITING_HEIGHT = 0.72, 0.2  # of the distance between two lanes; waiting is thin, as nothing is done
HEIGHT = 2.1  # inches
EXCERPT_PUSHES = 8  # can be told apart
EXCERPT_SECONDS = 60.0  # where there are no pushes
NUM_COLUMNS = 600  # of an excerpt, about as many as a screen shows
MAX_BINS = 60  # of the whole run


class Share(NamedTuple):
    """An activity's share of the window, 0 to 1, as the legend shows it; what is not done at all has no color."""

    activity: str
    share: float
    color: str | None
    marker: str


class Picture(NamedTuple):
    """An SVG with its words."""

    title: str
    caption: str
    svg: str


class Section(NamedTuple):
    """A part of the window, in seconds since its start, and the unit in which it is shown."""

    start: float
    end: float

    @property
    def unit(self) -> tuple[float, str]:
        """Its seconds, and its name."""
        length = self.end - self.start
        return (1.0, "seconds") if length < 180 else (60.0, "minutes") if length < 10_800 else (3600.0, "hours")

    def __str__(self) -> str:
        size, name = self.unit
        return f"{self.start / size:,.1f} to {self.end / size:,.1f} {name}"


def list_shares(timeline: Timeline, process: str) -> list[Share]:
    """What a process did, without what it never did, and for how much of the time it did nothing."""
    return [
        Share(activity, share, COLORS.get(activity), "▬" if activity == WAITING_FOR_DATA else "■")
        for activity, share in timeline.shares(process).items()
        if round(share, 4) > 0
    ]


def draw_timeline(timeline: Timeline) -> list[Picture]:
    """A readable excerpt of a run, and beside it the whole if that is longer."""
    excerpt = choose_excerpt(timeline)
    if excerpt == whole(timeline):
        return [Picture("What each process did", "The whole run.", draw_excerpt(timeline, excerpt))]
    return [
        Picture("What each process did", f"An excerpt from the middle: {excerpt}.", draw_excerpt(timeline, excerpt)),
        Picture("Shares over the run", "Dotted: where the excerpt lies.", draw_shares(timeline, excerpt)),
    ]


def whole(timeline: Timeline) -> Section:
    """All of the window."""
    return Section(0.0, timeline.seconds)


def choose_excerpt(timeline: Timeline) -> Section:
    """The whole window if that is readable, else of its middle about as much as holds `EXCERPT_PUSHES` pushes."""
    pushes = len(timeline.spans[PUSHING_WEIGHTS].starts)
    length = EXCERPT_PUSHES * timeline.seconds / pushes if pushes else EXCERPT_SECONDS
    if timeline.seconds <= 1.5 * length:
        return whole(timeline)
    return Section((timeline.seconds - length) / 2, (timeline.seconds + length) / 2)


def draw_excerpt(timeline: Timeline, excerpt: Section) -> str:
    """What each process did when, as SVG: a lane a process, a bar while it did the same, to the nearest column."""
    edges = np.linspace(*excerpt, NUM_COLUMNS + 1)
    with open_canvas(HEIGHT) as canvas:
        axes = _lanes(canvas, excerpt)
        for lane, activities in enumerate(ACTIVITIES.values()):
            shown = _choose_shown(_shares(timeline, activities, edges), activities)
            for index, activity in enumerate(activities):
                starts, ends = _runs(shown == index)
                height = WAITING_HEIGHT if activity == WAITING_FOR_DATA else LANE_HEIGHT
                axes.broken_barh(
                    np.stack([edges[starts], edges[ends] - edges[starts]], axis=1),
                    (lane - height / 2, height),
                    facecolors=COLORS[activity],
                    gid=_gid("excerpt", activity),
                )
        return to_svg(canvas)


def draw_shares(timeline: Timeline, excerpt: Section) -> str:
    """The share of each activity in each part of the window, stacked, as SVG; dotted lines enclose the excerpt."""
    # With less than a push in each, turns of generation and training would make a comb of them.
    num_bins = min(MAX_BINS, len(timeline.spans[PUSHING_WEIGHTS].starts) or MAX_BINS)
    edges = np.linspace(*whole(timeline), num_bins + 1)
    with open_canvas(HEIGHT) as canvas:
        axes = _lanes(canvas, whole(timeline))
        for lane, activities in enumerate(ACTIVITIES.values()):
            levels = np.cumsum(_shares(timeline, activities, edges), axis=0)
            # The axis points down.
            floor = lane + LANE_HEIGHT / 2
            heights = floor - LANE_HEIGHT * np.vstack([np.zeros(num_bins), levels])
            for index, activity in enumerate(activities):
                axes.stairs(
                    heights[index + 1],
                    edges,
                    baseline=heights[index],
                    fill=True,
                    color=COLORS[activity],
                    gid=_gid("shares", activity),
                )
        for time in excerpt:
            axes.axvline(time, color="black", linestyle=":", linewidth=1.0)
        return to_svg(canvas)


def _lanes(canvas: Any, section: Section) -> Any:
    """Axes over a section's seconds with a lane a process, lane 0 at the top."""
    from matplotlib.ticker import MaxNLocator

    axes = canvas.subplots()
    size, unit = section.unit
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(section.start / size, section.end / size)
    axes.set_xticks([tick * size for tick in ticks], [f"{tick:,.6g}" for tick in ticks])
    axes.set_yticks(range(len(ACTIVITIES)), ACTIVITIES)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=section, ylim=(len(ACTIVITIES) - 0.5, -0.5), xlabel=f"{unit} since the first collection began")
    return axes


def _shares(timeline: Timeline, activities: Sequence[str], edges: np.ndarray) -> np.ndarray:
    """The share [activity, bin] of the time between neighbouring edges."""
    seconds = [np.diff(timeline.spans[activity].seconds_before(edges)) for activity in activities]
    return np.stack(seconds) / np.diff(edges)


def _choose_shown(shares: np.ndarray, activities: Sequence[str]) -> np.ndarray:
    """The index of the activity that each column shows, len(activities) where it shows none: what took the longest."""
    shown = np.argmax([*shares, 1.0 - shares.sum(axis=0)], axis=0)
    for index, activity in enumerate(activities):
        if activity in ALWAYS_SHOWN:
            shown[shares[index] > 0] = index
    return shown


def _runs(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index of the first flag of each run of true ones, and that of the flag after its last."""
    changes = np.diff(flags.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(changes == 1), np.flatnonzero(changes == -1)


def _gid(picture: str, activity: str) -> str:
    """The id of an activity's shapes in the page."""
    return f"{picture}-{activity.replace(' ', '-')}"
