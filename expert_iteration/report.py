"""The report of a run: one HTML page that needs nothing else, and the before/after table as text.

Both read only the files of the run directory, so they can be made again at any time, also of a failed or interrupted
run: what is missing is said to be missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

from expert_iteration.charts import collect_series, draw_all
from expert_iteration.run_directory import (
    CONFIG_FILE,
    METRICS_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    SUMMARY_FILE,
    timeline_file,
)
from expert_iteration.timeline import ACTIVITIES, GENERATING, TRAINING
from expert_iteration.timeline_chart import draw_timeline, list_shares
from expert_iteration.timeline_report import build_timeline, describe_limit, percent

TEMPLATE = Path(__file__).with_name("report.html.jinja")

UNFINISHED = "unfinished"  # the status of a run without a summary
NUM_SAMPLE_PROMPTS = 5
CONFIG_KEYS = ("env.dataset", "model.name", "train.sync", "train.selection", "train.topk_size", "env.repeats")
TITLE = {"task": "env.dataset", "model": "model.name"}
FIGURES = {"pass@1": "pass@1 (sampled)", "greedy": "greedy", "reward": "reward", "pass@k": "pass@{k}"}
# Of summary.json, in words; a part that needs what the summary lacks is left out.
FACTS = {
    "Mode": ("{mode}", "seed {seed}"),
    "Collected": ("{dialog_turns:,} responses",),
    "Kept": (
        "{responses_kept:,} responses",
        "from {groups_kept:,} of {groups_seen:,} groups",
        "{responses_too_old:,} too old to be trained on",
    ),
    "Trained": ("{gradient_steps:,} gradient steps", "{optimizer_steps:,} optimizer steps"),
    "Weights": ("{weight_pushes:,} pushes", "engine within {max_probe_logprob_diff:.1g} nats of the trainer"),
    "Duration": ("{seconds:,.0f} s", "{seconds_to_first_optimizer_step:,.0f} s of them to the first optimizer step"),
    "Speed": ("{collect_tokens_per_second:,.0f} tokens/s collected", "{train_tokens_per_second:,.0f} tokens/s trained"),
}
OMITTED_AT_ZERO = ("responses_too_old",)


def write_report(run_dir: Path) -> Path:
    """Build `report.html` from metrics.jsonl, samples.jsonl, summary.json and .hydra/config.yaml, whichever there are.

    Returns:
        The path of the page.
    """
    import jinja2
    from markupsafe import Markup

    summary, config = read_summary(run_dir), read_config(run_dir)
    series = collect_series(read_jsonl(run_dir / METRICS_FILE))
    columns, rows = evaluation_table(summary)
    inputs = (METRICS_FILE, SAMPLES_FILE, SUMMARY_FILE, CONFIG_FILE)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(fixed=fixed, short=short, percent=percent, markup=Markup)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=", ".join(f"{word} {config[key]}" for word, key in TITLE.items() if key in config),
        run_name="/".join(run_dir.resolve().parts[-2:]),
        status=summary.get("status", UNFINISHED),
        error=summary.get("error"),
        missing=[name for name in inputs if not (run_dir / name).is_file()],
        columns=columns,
        rows=rows,
        num_prompts=_any_evaluation(summary).get("num_prompts"),
        selection=describe_selection(config),
        facts=list_facts(summary),
        time=describe_time(run_dir, sync=config.get("train.sync", True)),
        figures=draw_all(series),
        samples=read_samples(run_dir / SAMPLES_FILE),
        config_text=_read_text(run_dir / CONFIG_FILE),
    )
    path = run_dir / REPORT_FILE
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def print_summary(run_dir: Path) -> str:
    """The text to print at the end of a run: evaluations before, after and best, and where everything is."""
    summary, report = read_summary(run_dir), run_dir / REPORT_FILE
    columns, rows = evaluation_table(summary)
    lines = ["No evaluation on held-out prompts."]
    if rows:
        num_prompts = short(_any_evaluation(summary).get("num_prompts"))
        lines = [_align(f"{num_prompts} held-out prompts", columns)]
        lines += [_align(name, [fixed(value) for value in values]) for name, values in rows]
    status, error = summary.get("status", UNFINISHED), (summary.get("error") or "").strip()
    if status != "completed":
        lines += ["", f"Status: {status}" + (f" ({error.splitlines()[-1]})" if error else "")]
    lines += ["", f"Run directory: {run_dir}", f"Report:        {report if report.is_file() else 'not written'}"]
    return "\n".join(lines)


def evaluation_table(summary: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """The columns before, after and (if there is one) best, and rows of a name and a number per column.

    A number that is not known is None; without any evaluation there are neither columns nor rows.
    """
    evaluations = {name: figures for name, figures in (summary.get("eval") or {}).items() if figures}
    if not evaluations:
        return [], []
    k = short(_any_evaluation(summary).get("k"))
    columns = ["before", "after"] + (["best"] if "best" in evaluations else [])
    rows = [
        (label.format(k=k), [evaluations.get(column, {}).get(name) for column in columns])
        for name, label in FIGURES.items()
    ]
    return columns, rows


def describe_selection(config: Mapping[str, Any]) -> str | None:
    """What was kept of each group, in words; None when the configuration does not say."""
    selection = config.get("train.selection")
    most = f"at most {config.get('train.topk_size')} of {config.get('env.repeats')} responses per prompt"
    wordings = {
        "above_median": f"above_median: {most}, the best of those strictly above the median reward.",
        "random": (
            f"random, the control: {most}, as many as the rule above_median would have kept but drawn whatever their "
            "reward. What rises here is not the selection's doing."
        ),
    }
    return None if selection is None else wordings.get(selection, selection)


def list_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Counts and times of the run as labels and texts; what the summary lacks is left out."""
    known = {
        name: value for name, value in summary.items() if value is not None and (value or name not in OMITTED_AT_ZERO)
    }
    facts = []
    for label, wordings in FACTS.items():
        parts = [wording.format(**known) for wording in wordings if _fields(wording) <= known.keys()]
        if parts:
            facts.append((label, ", ".join(parts)))
    return facts


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


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The first few held-out prompts, each with its responses at the first and at the last evaluation.

    Returns:
        {"prompt", "answer" (or None), "before", "after"}: the latter two are {"step", "responses"}, where equal
        responses are one with a "count"; "after" is None when the prompt was evaluated once.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in read_jsonl(path):
        if row["split"] == "heldout" and (row["prompt"] in rows or len(rows) < NUM_SAMPLE_PROMPTS):
            rows[row["prompt"]] = [*rows.get(row["prompt"], [])[:1], row]
    return [
        {
            "prompt": prompt,
            "answer": found[0].get("answer"),
            "before": _merge_responses(found[0]),
            "after": _merge_responses(found[1]) if len(found) > 1 else None,
        }
        for prompt, found in rows.items()
    ]


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, none if it does not exist; a line cut short by the end of the process is passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json, empty if there is none."""
    return json.loads(_read_text(run_dir / SUMMARY_FILE) or "{}")


def read_config(run_dir: Path) -> dict[str, Any]:
    """The few values of .hydra/config.yaml that the page words, by dotted key; what is missing is not in it."""
    from omegaconf import OmegaConf

    config = OmegaConf.create(_read_text(run_dir / CONFIG_FILE) or "{}")
    values = {key: OmegaConf.select(config, key) for key in CONFIG_KEYS}
    return {key: value for key, value in values.items() if value is not None}


def fixed(value: float | None) -> str:
    """A figure of a table: three decimals, so that columns align; "-" if not known."""
    return "-" if value is None else f"{value:,.3f}"


def short(value: float | None) -> str:
    """A figure in a sentence: three digits, or all of a larger number's whole part; "-" if not known."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _merge_responses(row: Mapping[str, Any]) -> dict[str, Any]:
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for response in row["responses"]:
        identity = (response["text"], response["reward"], response.get("correct"))
        merged.setdefault(identity, {"correct": None, **response, "count": 0})["count"] += 1
    return {"step": row["step"], "responses": list(merged.values())}


def _any_evaluation(summary: Mapping[str, Any]) -> dict[str, Any]:
    """One of the evaluations: the number of prompts and k are the same in all."""
    return next((figures for figures in (summary.get("eval") or {}).values() if figures), {})


def _fields(wording: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(wording) if name}


def _align(label: str, cells: Sequence[str]) -> str:
    return f"{label:<22}" + "".join(f"{cell:>9}" for cell in cells)


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
