"""The report of a run: one HTML page that needs nothing else, and the before/after table as text.

    python -m expert_iteration.report outputs/DATE/TIME

writes `report.html` anew, of a finished, failed or interrupted run as of one that is still going on: only the files of
the run directory are read, and what is missing is said to be missing.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from expert_iteration.charts import CHART_METRICS, REWARD_PART, charts_of, draw_all
from expert_iteration.errors import UserError
from expert_iteration.report_facts import (
    describe_selection,
    describe_title,
    is_partial,
    list_facts,
    read_config,
    short,
)
from expert_iteration.report_samples import browse, compare, read_groups
from expert_iteration.report_series import Series, collect_series
from expert_iteration.report_warnings import WARNING_METRICS, find_warnings
from expert_iteration.reward_histogram import Histogram, draw_histogram, first_and_last
from expert_iteration.run_directory import (
    CONFIG_FILE,
    EVAL_REWARDS_FILE,
    METRICS_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    SUMMARY_FILE,
    read_jsonl,
    settings_folder,
    timeline_file,
    write_whole,
)
from expert_iteration.score_table import figure_of, score_table
from expert_iteration.selection_advice import advise
from expert_iteration.timeline import ACTIVITIES, GENERATING, TRAINING
from expert_iteration.timeline_chart import draw_timeline, list_shares
from expert_iteration.timeline_report import build_timeline, describe_limit, percent

TEMPLATE, STYLE, SCRIPT = (Path(__file__).with_name(f"report.{suffix}") for suffix in ("html.jinja", "css", "js"))

UNFINISHED = "unfinished"  # the status of a run without a summary
ROWS_AT_ONCE = 20  # of the samples to browse
EVALUATED = "eval/pass@1"  # a line of metrics.jsonl that has it is an evaluation


def write_report(run_dir: Path) -> Path:
    """Build `report.html` from the files of a run directory, whichever there are.

    Returns:
        The path of the page.
    """
    import jinja2
    from markupsafe import Markup

    summary, config_text = read_summary(run_dir), _read_text(settings_folder(run_dir) / Path(CONFIG_FILE).name)
    config, metrics = read_config(config_text or "{}"), run_dir / METRICS_FILE
    evaluations = read_evaluations(summary) or evaluations_so_far(read_jsonl(metrics))
    series = collect_series(read_jsonl(metrics), CHART_METRICS | WARNING_METRICS, prefix=REWARD_PART)
    figures = draw_all(charts_of(series), series)
    groups = read_groups(read_jsonl(run_dir / SAMPLES_FILE))
    columns, rows = score_table(evaluations)
    inputs = (METRICS_FILE, SAMPLES_FILE, SUMMARY_FILE, CONFIG_FILE)
    script = SCRIPT.read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(short=short, percent=percent, markup=Markup)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        style=STYLE.read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=describe_title(config),
        run_name="/".join(run_dir.resolve().parts[-2:]),
        status=summary.get("status", UNFINISHED),
        error=summary.get("error"),
        missing=[name for name in inputs if not (run_dir / name).is_file()],
        warnings=find_warnings(
            series,
            kl_budget=config.get("logging.kl_budget"),
            error=summary.get("error"),
            advice=advise(config.get("train.selection"), config.get("train.min_reward")),
        ),
        columns=columns,
        rows=rows,
        num_prompts=figure_of(evaluations, "num_prompts"),
        selection=describe_selection(config),
        facts=list_facts(summary, config),
        figures=[figure for figure in figures if figure.curves],
        unlogged=[figure.chart.title for figure in figures if not figure.curves and not is_partial(config)],
        histogram=draw_rewards(run_dir, series),
        time=describe_time(run_dir, sync=config.get("train.sync", True)),
        comparisons=compare(groups),
        samples=browse(groups),
        rows_at_once=ROWS_AT_ONCE,
        config_text=config_text,
    )
    path = run_dir / REPORT_FILE
    # Responses may hold halves of characters, which UTF-8 cannot write.
    write_whole(path, page.encode("utf-8", errors="replace").decode("utf-8"))
    return path


def print_summary(run_dir: Path) -> str:
    """The text to print at the end of a run: evaluations before, after and best, and where everything is."""
    summary, report = read_summary(run_dir), run_dir / REPORT_FILE
    evaluations = read_evaluations(summary)
    columns, rows = score_table(evaluations)
    lines = ["No evaluation on held-out prompts."]
    if rows:
        lines = [_align(f"{short(figure_of(evaluations, 'num_prompts'))} held-out prompts", columns)]
        lines += [_align(name, cells) for name, cells in rows]
    status, error = summary.get("status", UNFINISHED), (summary.get("error") or "").strip()
    if status != "completed":
        lines += ["", f"Status: {status}" + (f" ({error.splitlines()[-1]})" if error else "")]
    lines += ["", f"Run directory: {run_dir}", f"Report:        {report if report.is_file() else 'not written'}"]
    return "\n".join(lines)


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json, empty if there is none."""
    return json.loads(_read_text(run_dir / SUMMARY_FILE) or "{}")


def read_evaluations(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluations of a summary by their names; none where it has none."""
    return summary.get("eval") or {}


def evaluations_so_far(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The first and the last evaluation in the lines of metrics.jsonl, as a summary has them."""
    found = [
        {name.removeprefix("eval/"): value for name, value in line.items() if name.startswith("eval/")}
        for line in lines
        if EVALUATED in line
    ]
    return dict(zip(("before", "after"), [*found[:1], *found[1:][-1:]], strict=False))


def draw_rewards(run_dir: Path, series: Series) -> Histogram | None:
    """The rewards of held-out responses before and after; None without an evaluation."""
    steps = [point.step for point in series.get(EVALUATED, ())]
    return draw_histogram(first_and_last(read_jsonl(run_dir / EVAL_REWARDS_FILE), steps))


def describe_time(run_dir: Path, sync: bool) -> dict[str, Any] | None:
    """Where the run's time went, from the timelines of its processes; None without them.

    Returns:
        {"limit": a sentence, "seconds": of the window that all shares are of, "overlap": the share in which the engine
        generated while the trainer trained, "shares": {process: [`Share`]}, "pictures": [`Picture`]}.
    """
    timeline = build_timeline({process: read_jsonl(Path(timeline_file(run_dir, process))) for process in ACTIVITIES})
    if timeline is None:
        return None
    return {
        "limit": describe_limit(timeline, sync),
        "seconds": timeline.seconds,
        "overlap": timeline.share_of_both(GENERATING, TRAINING),
        "shares": {process: list_shares(timeline, process) for process in ACTIVITIES},
        "pictures": draw_timeline(timeline),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of the run directory named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m expert_iteration.report", description="Write report.html of a run, also while it goes on."
    )
    parser.add_argument("run_dir", type=Path, help="the run directory: outputs/DATE/TIME, or one job's of a sweep")
    try:
        print(write_report(check_run_directory(parser.parse_args(arguments).run_dir)))
    except UserError as error:
        raise SystemExit(f"Error: {error}") from None


def check_run_directory(run_dir: Path) -> Path:
    """The same path.

    Raises:
        UserError: no run was here.
    """
    if not any((run_dir / name).is_file() for name in (METRICS_FILE, SUMMARY_FILE)):
        what = f"holds no run (neither {METRICS_FILE} nor {SUMMARY_FILE})" if run_dir.is_dir() else "is no folder"
        raise UserError(f"{run_dir} {what}: give the directory of one run, such as outputs/DATE/TIME.")
    return run_dir


def _align(label: str, cells: Sequence[str]) -> str:
    return f"{label:<22}" + "".join(f"{cell:>15}" for cell in cells)


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


if __name__ == "__main__":
    main()
