"""The report of a run: what the page and the terminal say, of whole and of broken run directories."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from run_directories import (
    AFTER,
    BEFORE,
    CONFIG,
    SUMMARY,
    collected,
    evaluation,
    list_figures,
    log_evaluation,
    read_text,
    write_run,
    write_timeline,
)

from expert_iteration.charts import CHARTS, MAX_POINTS, charts_of, draw, draw_all
from expert_iteration.config import Selection
from expert_iteration.metrics import Metrics
from expert_iteration.report import ROWS_AT_ONCE, describe_time, main, print_summary, read_jsonl, write_report
from expert_iteration.report_facts import describe_selection, list_facts, read_config
from expert_iteration.report_series import Point, collect_series

ROOT = Path(__file__).resolve().parent.parent
ONLY_IF_CHANGING = {chart.title for chart in CHARTS if not chart.if_constant}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """The page of a completed run with a long timeline."""
    run_dir = tmp_path_factory.mktemp("run")
    write_run(run_dir)
    write_timeline(run_dir, num_batches=100)
    return write_report(run_dir)


def test_the_page_says_what_happened(long_run):
    text = read_text(long_run)
    assert long_run.name == "report.html"
    assert "Expert iteration: task gsm8k, model ORG/MODEL" in text
    assert "completed" in text
    assert "No warnings." in text
    assert "1,319 held-out prompts before after pass@1 (sampled) 0.328 ± 0.011 0.777 ± 0.010 greedy 0.440 0.870" in text
    assert "reward 0.451 0.820 pass@4 0.750 0.883" in text
    assert "at most 2 of 8 responses per prompt, the best of those strictly above the median" in text
    assert "12,000 gradient steps, 3,000 optimizer steps" in text
    assert "8,412 tokens/s collected" in text
    assert "tokens/s trained" not in text  # null in the summary
    assert "kl_to_ref_coeff: 1e-1" in text  # the configuration as it stands in its file
    assert "Not in the run directory" not in text
    assert "Nothing was logged" not in text


def test_the_page_shows_every_curve_with_its_ends(long_run):
    curves = [chart.title for chart in CHARTS if chart.if_constant or chart.title == "Age of trained responses"]
    times = ["What each process did", "Shares over the run"]
    assert list_figures(long_run) == ["Reward of held-out responses", *curves, *times]
    text = read_text(long_run)
    assert "An excerpt from the middle: 460.0 to 540.0 seconds." in text
    for caption in ("pass@1 (sampled) 0.328 → 0.777", "greedy 0.44 → 0.87", "reward 0.4 → 0.7", "length 250 → 250"):
        assert caption in text
    assert "before (gradient step 0): 4 responses ■ after (gradient step 4): 4 responses" in text
    assert "responses kept 0.25 → 0.25 ■ groups of equal rewards 0.25 → 0.25" in text
    assert "entropy 0.5 → 0.2" in text
    assert "mean 0 → 1.5 ■ oldest 0 → 3" in text
    assert "collected 4,000 → 4,000 ■ trained, mean so far 900 → 900" in text


def test_the_kl_coefficient_is_shown_when_it_changes():
    points = [Point(1, 0.1), Point(2, 0.1)]
    shown = [figure.chart.title for figure in draw_all(CHARTS, {"train/kl_to_ref_coeff": points}) if figure.curves]
    assert shown == []
    figure = draw_all(CHARTS, {"train/kl_to_ref_coeff": [*points, Point(3, 0.05)]})[-1]
    assert figure.chart.title == "KL coefficient"
    assert (figure.curves[0].first, figure.curves[0].last) == (0.1, 0.05)


def test_what_does_not_change_is_drawn_all_the_same():
    series = {name: [Point(1, 0.5), Point(2, 0.5)] for chart in CHARTS for name in chart.curves}
    drawn = [figure.chart.title for figure in draw_all(CHARTS, series) if figure.curves]
    assert drawn == [chart.title for chart in CHARTS if chart.title not in ONLY_IF_CHANGING]


def test_the_page_shows_what_looks_wrong(tmp_path):
    write_run(tmp_path, config=CONFIG.replace("kl_budget: 1.0", "kl_budget: 0.05"))
    text = read_text(write_report(tmp_path))
    assert "KL to the reference up to 0.1 nats per token, above logging.kl_budget (0.05) since gradient step 1" in text
    assert "No warnings." not in text


def test_the_page_says_where_the_time_went(tmp_path):
    write_run(tmp_path)
    write_timeline(tmp_path, num_batches=4)
    page = write_report(tmp_path)
    assert list_figures(page)[-1] == "What each process did"
    text = read_text(page)
    assert "Generation and training take turns: the trainer waited for data 60% of the time" in text
    assert "(train.sync_iter=false or the asynchronous script would overlap them)" in text
    assert "engine ■ generating 60% idle 40% collector ■ collecting 60% idle 40%" in text
    assert "trainer ■ training 30% ■ pushing weights 10% ▬ waiting for data 60% overlap" in text
    assert "overlap generating while training 0% (0 s)" in text
    assert "Shares of the 40 s from the start of the first collection" in text
    assert "The whole run." in text


def test_the_remedy_is_that_of_the_mode(tmp_path):
    write_timeline(tmp_path, num_batches=4)
    assert "(train.sync_iter=false or the async" in describe_time(tmp_path, sync=True)["limit"]
    assert "(train.deterministic=false or a larger train.max_ahead would" in describe_time(tmp_path, False)["limit"]


def test_the_page_shows_samples_and_escapes_them(long_run):
    assert "<script>alert" not in long_run.read_text()
    text = read_text(long_run)
    before, after = text.split("Before (gradient step 0)")[1].split("After (gradient step 4)")
    assert "✓ correct · reward 1 &lt;b&gt;4&lt;/b&gt;" in before
    assert "✗ wrong · reward 0.1 · 3 times &lt;script&gt;" in before
    assert "✓ correct · reward 1 · 3 times" in after


def test_without_scripts_the_page_shows_the_newest_rows(tmp_path):
    metrics = Metrics(tmp_path, loggers=[], logging_frequency=1)
    metrics.samples([collected("0?"), collected("1?")], step=3, split="train")
    metrics.samples([collected(f"{n}+{n}?") for n in range(ROWS_AT_ONCE + 5)], step=9, split="train")
    page = write_report(tmp_path)
    _, rows = read_text(page).split("split step prompt mean reward kept")
    assert rows.startswith(" train 9 0+0? 0.375 1 of 4 ★ kept · reward 0.75 0+0? is 3 reward 0.5 0+0? is 2")
    assert [f"{n}+{n}? is 3" in rows for n in range(ROWS_AT_ONCE + 1)] == [True] * ROWS_AT_ONCE + [False]
    assert f"The first {ROWS_AT_ONCE} of {ROWS_AT_ONCE + 7} rows." in rows


def test_half_a_character_makes_no_page_fail(tmp_path):
    row = {"step": 9, "split": "train", **collected("half \ud83d of a smile")}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    assert "half ? of a smile" in read_text(write_report(tmp_path))


def test_the_page_needs_nothing_else(long_run):
    page = long_run.read_text()
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert re.findall(r"(?:src|href)\s*=\s*[\"'](?!#)[^\"']*", page) == ['href="data:,']
    assert not re.findall(r"url\((?!#)|@import", page)


def test_the_same_run_gives_the_same_page(long_run):
    before = long_run.read_bytes()
    assert write_report(long_run.parent).read_bytes() == before


def test_a_failed_run_has_a_page(tmp_path):
    error = "Traceback\nRuntimeError: a < b & c"
    evaluations = {"before": BEFORE, "after": None, "best": BEFORE}
    write_run(tmp_path, {"status": "failed", "error": error, "eval": evaluations})
    page = write_report(tmp_path)
    assert "RuntimeError: a &lt; b &amp; c" in page.read_text()
    assert "before after best pass@1 (sampled) 0.328 ± 0.011 - 0.328 ± 0.011" in read_text(page)
    assert "Status: failed (RuntimeError: a < b & c)" in print_summary(tmp_path)


def test_a_run_that_is_going_on_has_a_page_with_the_evaluations_so_far(tmp_path):
    write_run(tmp_path, summary=None)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')  # is being written
    text = read_text(write_report(tmp_path))
    assert "unfinished" in text
    assert "Not in the run directory: summary.json. The run has not come to its end" in text
    assert "before after pass@1 (sampled) 0.328 ± 0.011 0.777 ± 0.010" in text


def test_a_model_that_was_only_evaluated_has_a_page_without_training(tmp_path):
    metrics = Metrics(tmp_path, loggers=[], logging_frequency=1)
    log_evaluation(metrics, BEFORE, good=1, step=0)
    summary = {**SUMMARY, "gradient_steps": 0, "dialog_turns": 0, "eval": dict.fromkeys(SUMMARY["eval"], BEFORE)}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text(CONFIG.replace("eval: {", "eval: {only: true, "))
    page = write_report(tmp_path)
    text = read_text(page)
    assert "held-out prompts score pass@1 (sampled) 0.328 ± 0.011" in text
    assert list_figures(page) == ["Reward of held-out responses"]
    assert "Mode sync, seed 3 Duration 83 s" in text
    for absent in (
        "gradient steps,",
        "Selection above",
        "Collected",
        "Weights",
        "tokens/s",
        "Nothing was logged",
        "after",
    ):
        assert absent not in text
    assert "Held-out prompts 2+2=0? Expected: #### 4 Responses (gradient step 0) ✓ correct" in text


def test_a_run_on_an_expert_set_has_a_page_without_collection(tmp_path):
    metrics = Metrics(tmp_path, loggers=[], logging_frequency=1)
    for step in (1, 2):
        metrics.log({"train/loss": 1.0, "train/entropy": 0.5, "train/tokens_per_second": 900.0}, step)
    summary = {**SUMMARY, "dialog_turns": 0, "groups_seen": 0, "collect_tokens_per_second": 0.0, "eval": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text(CONFIG.replace("train: {", "train: {from_expert_set: my/set, "))
    page = write_report(tmp_path)
    assert list_figures(page) == ["Entropy of the policy", "Loss", "Throughput"]
    text = read_text(page)
    assert "No evaluation on held-out prompts." in text
    assert "Selection none: trained on the expert set my/set. Mode sync, seed 3 Trained 12,000" in text
    assert "Collected" not in text
    assert "tokens/s collected" not in text


def test_reading_a_run_directory_loads_neither_torch_nor_ray():
    code = "import sys, expert_iteration.report; print({'torch', 'torchrl', 'ray'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_command_of_the_readme_writes_a_report(tmp_path):
    assert "`python -m expert_iteration.report RUN_DIR`" in (ROOT / "README.md").read_text()
    write_run(tmp_path)
    command = [sys.executable, "-m", "expert_iteration.report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}/report.html\n", "")
    assert "completed" in read_text(tmp_path / "report.html")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no run \(neither metrics.jsonl nor summary.json\): give the"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match="missing is no folder"):
        main([str(tmp_path / "missing")])
    assert list(tmp_path.iterdir()) == []


def test_an_empty_run_directory_has_a_page(tmp_path):
    text = read_text(write_report(tmp_path))
    assert "Not in the run directory: metrics.jsonl, samples.jsonl, summary.json, .hydra/config.yaml." in text
    assert "unfinished" in text
    assert "No evaluation on held-out prompts." in text
    titles = ", ".join(chart.title for chart in CHARTS if chart.title not in ONLY_IF_CHANGING)
    assert f"Nothing was logged for: {titles}." in text
    assert "Where the time went" not in text
    assert "Status: unfinished" in print_summary(tmp_path)


def test_a_line_cut_short_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "eval/greedy": 0.5}\n{"step": 2, "eval/gr')
    assert list(read_jsonl(path)) == [{"step": 1, "eval/greedy": 0.5}]


def test_the_terminal_gets_an_aligned_table_and_the_paths(tmp_path):
    write_run(tmp_path, {**SUMMARY, "eval": {"before": BEFORE, "after": AFTER, "best": AFTER}})
    expected = f"""\
1,319 held-out prompts         before          after           best
pass@1 (sampled)        0.328 ± 0.011  0.777 ± 0.010  0.777 ± 0.010
greedy                          0.440          0.870          0.870
reward                          0.451          0.820          0.820
pass@4                          0.750          0.883          0.883

Run directory: {tmp_path}
Report:        """
    assert print_summary(tmp_path) == expected + "not written"
    write_report(tmp_path)
    assert print_summary(tmp_path) == expected + str(tmp_path / "report.html")


def test_the_control_is_called_one():
    config = {"train.selection": "random", "train.topk_size": 2, "env.repeats": 8}
    assert describe_selection(config).startswith("random, the control: at most 2 of 8 responses per prompt")
    assert describe_selection({}) is None


@pytest.mark.parametrize("selection", list(Selection))
def test_selection_is_told_with_what_it_depends_on(selection):
    numbers = {"selection_threshold": 0.25, "selection_percentile": 35, "selection_percentile_end": 85}
    config = {f"train.{name}": value for name, value in numbers.items()} | {"train.selection": str(selection)}
    text = describe_selection({**config, "train.topk_size": 2, "env.repeats": 8})
    assert text.startswith(str(selection))
    assert "at most 2 of 8 responses" in text
    assert ("0.25" in text) == (selection is Selection.threshold)
    assert [value for value in ("35", "85") if value in text] == (["35", "85"] if selection == "percentile" else [])
    limited = describe_selection({**config, "train.dedup": True, "train.min_reward": 0.75})
    assert "Duplicates" in limited
    assert ("0.75" in limited) == (selection is not Selection.random)


def test_each_part_of_a_reward_has_a_chart_beside_that_of_the_reward():
    names = {"collector/reward/right", "collector/reward/brief", "eval/reward/right", "collector/rewards/mean"}
    series = {name: [Point(1, 0.25), Point(2, 0.5)] for name in names}
    titles = [figure.chart.title for figure in draw_all(charts_of(names), series) if figure.curves]
    assert titles == ["Reward of collected responses", "Reward: brief", "Reward: right"]
    assert charts_of([]) == list(CHARTS)


def test_groups_by_pass_rate_are_bands_that_make_up_the_whole(tmp_path):
    write_run(tmp_path)
    chart = next(chart for chart in CHARTS if chart.is_stacked)
    series = collect_series(read_jsonl(tmp_path / "metrics.jsonl"), chart.curves)
    figure = draw(chart, series)
    assert [curve.label for curve in figure.curves][:: len(chart.curves) - 1] == ["none right", "all right"]
    assert len({curve.color for curve in figure.curves}) == len(chart.curves)
    assert sum(curve.last for curve in figure.curves) == pytest.approx(1)
    assert figure.curves[1].last == pytest.approx(2 / 8)
    assert draw(chart, {name: points[:1] for name, points in series.items()}).curves  # of a single batch, too
    assert draw(chart, {}).curves == []


def test_of_a_configuration_is_read_what_it_has():
    assert read_config("") == {}
    assert read_config("train: {sync: false}\nlogging: {kl_budget: 0.5}") == {
        "train.sync": False,
        "logging.kl_budget": 0.5,
    }


def test_facts_leave_out_what_the_summary_lacks():
    summary = {"mode": "async", "seconds": 12.0, "seconds_to_first_optimizer_step": None, "groups_seen": 3}
    assert list_facts(summary, {}) == [("Mode", "async"), ("Duration", "12 s")]


def test_responses_too_old_are_told_when_there_are_any():
    summary = {"responses_kept": 2000, "responses_too_old": 1312}
    assert list_facts(summary, {}) == [("Kept", "2,000 responses, 1,312 too old to be trained on")]
    assert list_facts({**summary, "responses_too_old": 0}, {}) == [("Kept", "2,000 responses")]
    assert list_facts({"responses_kept": 0}, {}) == [("Kept", "0 responses")]


def test_long_curves_are_smoothed_and_thinned():
    chart = next(chart for chart in CHARTS if "train/kl_to_ref" in chart.curves)
    figure = draw(chart, {"train/kl_to_ref": [Point(step, float(step)) for step in range(10 * MAX_POINTS)]})
    (curve,) = figure.curves
    assert (curve.first, curve.mean_of) == (4.5, 201)
    assert curve.last == pytest.approx(10 * MAX_POINTS - 53, abs=1)  # the mean of the last twentieth
    longer = draw(chart, {"train/kl_to_ref": [Point(step, float(step)) for step in range(100 * MAX_POINTS)]})
    # Ten times the data is drawn with about as many points; a tenth is for the longer numbers of the ticks.
    assert len(longer.svg) == pytest.approx(len(figure.svg), rel=0.1)


def test_few_numbers_are_drawn_as_they_are():
    chart = next(chart for chart in CHARTS if "train/kl_to_ref" in chart.curves)
    (curve,) = draw(chart, {"train/kl_to_ref": [Point(step, float(step % 2)) for step in range(19)]}).curves
    assert (curve.first, curve.last, curve.mean_of) == (0.0, 0.0, 1)


def test_pass_at_1_has_bars_of_its_standard_error_where_it_is_known_of_all_points():
    chart = CHARTS[0]
    series = {"eval/pass@1": [Point(0, 0.3), Point(4, 0.7)], "eval/pass@1_stderr": [Point(0, 0.1), Point(4, 0.1)]}
    with_bars = draw(chart, series).svg
    assert "LineCollection" in with_bars
    assert "LineCollection" not in draw(chart, {**series, "eval/pass@1_stderr": [Point(4, 0.1)]}).svg


def test_a_prompt_that_was_evaluated_once_has_no_after(tmp_path):
    metrics = Metrics(tmp_path, loggers=[], logging_frequency=1)
    metrics.samples(evaluation(good=1, num_prompts=3), step=0, split="heldout")
    metrics.samples(evaluation(good=1, num_prompts=1), step=5, split="heldout")  # was interrupted
    text = read_text(write_report(tmp_path))
    assert text.count("After (gradient step 5)") == 1
    assert text.count("After Not evaluated.") == 2
