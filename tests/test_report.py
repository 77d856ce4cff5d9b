"""The report of a run: what the page and the terminal say, of whole and of broken run directories."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from expert_iteration.charts import CHARTS, MAX_POINTS, Point, collect_series, draw, draw_all, thin
from expert_iteration.metrics import Metrics
from expert_iteration.report import (
    describe_selection,
    list_facts,
    print_summary,
    read_jsonl,
    read_samples,
    write_report,
)
from expert_iteration.run_directory import timeline_file

ROOT = Path(__file__).resolve().parent.parent
BEFORE = {"pass@1": 0.3275, "greedy": 0.44, "reward": 0.451, "pass@k": 0.75, "k": 4.0, "num_prompts": 1319.0}
AFTER = {"pass@1": 0.7775, "greedy": 0.87, "reward": 0.82, "pass@k": 0.8831, "k": 4.0, "num_prompts": 1319.0}
SUMMARY = {
    "status": "completed",
    "error": None,
    "mode": "sync",
    "seed": 3,
    "gradient_steps": 12_000,
    "optimizer_steps": 3_000,
    "dialog_turns": 4096,
    "groups_seen": 512,
    "groups_kept": 180,
    "responses_kept": 247,
    "weight_pushes": 16,
    "max_probe_logprob_diff": 7.2e-6,
    "seconds": 83.2,
    "seconds_to_first_optimizer_step": 41.5,
    "collect_tokens_per_second": 8412.3,
    "train_tokens_per_second": None,
    "eval": {"before": BEFORE, "after": AFTER, "best": None},
}
CONFIG = """
env: {dataset: gsm8k, repeats: 8}
model: {name: ORG/MODEL}
train: {selection: above_median, topk_size: 2, kl_to_ref_coeff: 1e-1}
eval: {temperature: "${inference_model.temperature}"}
"""


def respond(text, reward, correct):
    return {"text": text, "reward": reward, "correct": correct, "kept": False}


def evaluation(good, num_prompts=1):
    responses = [respond("<b>4</b>", 1.0, True)] * good + [respond("<script>alert(5)</script>", 0.1, False)] * (
        4 - good
    )
    return [{"prompt": f"2+2={n}?", "answer": "#### 4", "responses": responses} for n in range(num_prompts)]


def write_run(run_dir, summary=SUMMARY, config=CONFIG):
    """A run directory as a run leaves it, the metrics and samples through the run's own sink."""
    metrics = Metrics(run_dir, loggers=[], logging_frequency=1, clock=lambda: 1.0)
    metrics.log({"eval/pass@1": 0.3275, "eval/greedy": 0.44}, step=0)
    metrics.samples(evaluation(good=1), step=0, split="heldout")
    for batch in range(4):
        metrics.log({"collector/rewards/mean": 0.4 + 0.1 * batch, "collector/response_length/mean": 250.0}, step=batch)
        metrics.log({"selection/batch_kept": 40 - 10 * batch}, step=batch)
        metrics.log({"train/loss": 1.0, "train/loss_sft": 0.9, "train/kl_to_ref": 0.1}, step=batch + 1)
        metrics.log({"train/policy_age": 0.5 * batch, "train/max_policy_age": batch}, step=batch + 1)
    metrics.log({"eval/pass@1": 0.7775, "eval/greedy": 0.87}, step=4)
    metrics.samples(evaluation(good=3), step=4, split="heldout")
    metrics.close()
    (run_dir / "summary.json").write_text(json.dumps(summary))
    (run_dir / ".hydra").mkdir()
    (run_dir / ".hydra" / "config.yaml").write_text(config)


def write_timeline(run_dir, num_batches):
    """Of a synchronous run: 6 s of generation that are waited for, 3 s of training, 1 s of pushing, and so on."""
    spans = {"engine": [], "collector": [], "trainer": []}
    for start in range(1_700_000_000, 1_700_000_000 + 10 * num_batches, 10):
        spans["engine"].append(("generating", start, start + 6))
        spans["collector"].append(("collecting", start, start + 6))
        spans["trainer"] += [
            ("waiting for data", start, start + 6),
            ("training", start + 6, start + 9),
            ("pushing weights", start + 9, start + 10),
        ]
    for process, found in spans.items():
        lines = [json.dumps({"activity": activity, "start": start, "end": end}) for activity, start, end in found]
        path = Path(timeline_file(run_dir, process))
        path.parent.mkdir(exist_ok=True)
        # The process was killed while it wrote its last line.
        path.write_text("\n".join([*lines, '{"activity": "train']))


def list_figures(page):
    """Titles of the figures of a page that have a picture."""
    figures = re.findall(r"<figure>\s*<h3>(.*?)</h3>(.*?)</figure>", page.read_text(), flags=re.DOTALL)
    return [title for title, content in figures if "<svg" in content]


def read_text(path):
    """The words of a page, without tags and runs of white space."""
    body = path.read_text().split("</style>", 1)[1]
    return " ".join(re.sub(r"<svg.*?</svg>|<[^>]+>", " ", body, flags=re.DOTALL).split())


def test_the_page_says_what_happened(tmp_path):
    write_run(tmp_path)
    path = write_report(tmp_path)
    text = read_text(path)
    assert path == tmp_path / "report.html"
    assert "Expert iteration: task gsm8k, model ORG/MODEL" in text
    assert "completed" in text
    assert "1,319 held-out prompts before after pass@1 (sampled) 0.328 0.777 greedy 0.440 0.870" in text
    assert "reward 0.451 0.820 pass@4 0.750 0.883" in text
    assert "at most 2 of 8 responses per prompt, the best of those strictly above the median" in text
    assert "12,000 gradient steps, 3,000 optimizer steps" in text
    assert "8,412 tokens/s collected" in text
    assert "tokens/s trained" not in text  # null in the summary
    assert "kl_to_ref_coeff: 1e-1" in text  # the configuration as it stands in its file
    assert "Not in the run directory" not in text
    assert "No data" not in text


def test_the_page_shows_every_curve_with_its_ends(tmp_path):
    write_run(tmp_path)
    page = write_report(tmp_path)
    assert list_figures(page) == [chart.title for chart in CHARTS if chart.title != "KL coefficient"]
    text = read_text(page)
    for caption in ("pass@1 (sampled) 0.328 → 0.777", "greedy 0.44 → 0.87", "reward 0.4 → 0.7", "length 250 → 250"):
        assert caption in text
    assert "kept 40 → 10" in text
    assert "mean 0 → 1.5 ■ oldest 0 → 3" in text


def test_the_kl_coefficient_is_shown_when_it_changes(tmp_path):
    write_run(tmp_path)
    metrics = Metrics(tmp_path, loggers=[], logging_frequency=1)
    metrics.log({"train/kl_to_ref_coeff": 0.1}, step=1)
    metrics.log({"train/kl_to_ref_coeff": 0.1}, step=2)
    assert "KL coefficient" not in list_figures(write_report(tmp_path))
    metrics.log({"train/kl_to_ref_coeff": 0.05}, step=3)
    page = write_report(tmp_path)
    assert "KL coefficient" in list_figures(page)
    assert "coefficient 0.1 → 0.05" in read_text(page)


def test_what_does_not_change_is_drawn_all_the_same():
    series = {name: [Point(1, 0.5), Point(2, 0.5)] for chart in CHARTS for name in chart.curves}
    drawn = [figure.chart.title for figure in draw_all(series) if figure.curves]
    assert drawn == [chart.title for chart in CHARTS if chart.title != "KL coefficient"]


def test_the_page_says_where_the_time_went(tmp_path):
    write_run(tmp_path)
    write_timeline(tmp_path, num_batches=4)
    page = write_report(tmp_path)
    assert list_figures(page)[:2] == ["What each process did", "Held-out accuracy"]
    text = read_text(page)
    assert "Generation and training take turns: the trainer waited for data 60% of the time" in text
    assert "(train.sync_iter=false or the asynchronous script would overlap them)" in text
    assert "engine ■ generating 60% idle 40% collector ■ collecting 60% idle 40%" in text
    assert "trainer ■ training 30% ■ pushing weights 10% ▬ waiting for data 60% overlap" in text
    assert "overlap generating while training 0% (0 s)" in text
    assert "Shares of the 40 s from the start of the first collection" in text
    assert "The whole run." in text


def test_the_remedy_is_that_of_the_mode(tmp_path):
    write_run(tmp_path, config=CONFIG.replace("train: {", "train: {sync: false, "))
    write_timeline(tmp_path, num_batches=4)
    assert "(train.deterministic=false or a larger train.max_ahead would" in read_text(write_report(tmp_path))


def test_a_long_run_shows_an_excerpt_and_the_whole(tmp_path):
    write_run(tmp_path)
    write_timeline(tmp_path, num_batches=100)
    page = write_report(tmp_path)
    assert list_figures(page)[:3] == ["What each process did", "Shares over the run", "Held-out accuracy"]
    assert "An excerpt from the middle: 460.0 to 540.0 seconds." in read_text(page)


def test_a_run_without_a_timeline_has_no_section_of_it(tmp_path):
    write_run(tmp_path)
    assert "Where the time went" not in write_report(tmp_path).read_text()


def test_the_page_shows_samples_and_escapes_them(tmp_path):
    write_run(tmp_path)
    page = write_report(tmp_path)
    assert "<script" not in page.read_text()
    text = read_text(page)
    before, after = text.split("Before (gradient step 0)")[1].split("After (gradient step 4)")
    assert "✓ correct · reward 1 &lt;b&gt;4&lt;/b&gt;" in before
    assert "✗ wrong · reward 0.1 · 3 times &lt;script&gt;" in before
    assert "✓ correct · reward 1 · 3 times" in after


def test_the_page_needs_nothing_else(tmp_path):
    write_run(tmp_path)
    write_timeline(tmp_path, num_batches=100)
    page = write_report(tmp_path).read_text()
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!#)", page)
    assert not re.findall(r"url\((?!#)|@import|<link|<script", page)


def test_the_same_run_gives_the_same_page(tmp_path):
    write_run(tmp_path)
    write_timeline(tmp_path, num_batches=100)
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()


def test_a_failed_run_has_a_page(tmp_path):
    error = "Traceback\nRuntimeError: a < b & c"
    evaluations = {"before": BEFORE, "after": None, "best": BEFORE}
    write_run(tmp_path, {"status": "failed", "error": error, "eval": evaluations})
    page = write_report(tmp_path)
    assert "RuntimeError: a &lt; b &amp; c" in page.read_text()
    assert "before after best pass@1 (sampled) 0.328 - 0.328" in read_text(page)
    assert "Status: failed (RuntimeError: a < b & c)" in print_summary(tmp_path)


def test_reading_a_run_directory_loads_neither_torch_nor_ray():
    code = "import sys, expert_iteration.report; print({'torch', 'torchrl', 'ray'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_an_empty_run_directory_has_a_page(tmp_path):
    text = read_text(write_report(tmp_path))
    assert "Not in the run directory: metrics.jsonl, samples.jsonl, summary.json, .hydra/config.yaml." in text
    assert "unfinished" in text
    assert "No evaluation on held-out prompts." in text
    assert text.count("No data:") == len(CHARTS) - 1  # the KL coefficient has no place of its own
    assert "Status: unfinished" in print_summary(tmp_path)


def test_a_line_cut_short_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "eval/greedy": 0.5}\n{"step": 2, "eval/gr')
    assert list(read_jsonl(path)) == [{"step": 1, "eval/greedy": 0.5}]


def test_the_terminal_gets_an_aligned_table_and_the_paths(tmp_path):
    write_run(tmp_path, {**SUMMARY, "eval": {"before": BEFORE, "after": AFTER, "best": AFTER}})
    expected = f"""\
1,319 held-out prompts   before    after     best
pass@1 (sampled)          0.328    0.777    0.777
greedy                    0.440    0.870    0.870
reward                    0.451    0.820    0.820
pass@4                    0.750    0.883    0.883

Run directory: {tmp_path}
Report:        """
    assert print_summary(tmp_path) == expected + "not written"
    write_report(tmp_path)
    assert print_summary(tmp_path) == expected + str(tmp_path / "report.html")


def test_the_control_is_called_one():
    config = {"train.selection": "random", "train.topk_size": 2, "env.repeats": 8}
    assert describe_selection(config).startswith("random, the control: at most 2 of 8 responses per prompt")
    assert describe_selection({}) is None


def test_facts_leave_out_what_the_summary_lacks():
    summary = {"mode": "async", "seconds": 12.0, "seconds_to_first_optimizer_step": None, "groups_seen": 3}
    assert list_facts(summary) == [("Mode", "async"), ("Duration", "12 s")]


def test_responses_too_old_are_told_when_there_are_any():
    summary = {"responses_kept": 2000, "responses_too_old": 1312}
    assert list_facts(summary) == [("Kept", "2,000 responses, 1,312 too old to be trained on")]
    assert list_facts({**summary, "responses_too_old": 0}) == [("Kept", "2,000 responses")]
    assert list_facts({"responses_kept": 0}) == [("Kept", "0 responses")]


def test_samples_are_the_first_and_the_last_evaluation_of_five_prompts(tmp_path):
    metrics = Metrics(tmp_path, loggers=[], logging_frequency=1)
    metrics.samples(evaluation(good=1, num_prompts=7), step=0, split="heldout")
    metrics.samples(evaluation(good=4, num_prompts=7), step=5, split="train")
    assert [(sample["prompt"], sample["after"]) for sample in read_samples(tmp_path / "samples.jsonl")] == [
        (f"2+2={n}?", None) for n in range(5)
    ]
    metrics.samples(evaluation(good=2, num_prompts=7), step=5, split="heldout")
    metrics.samples(evaluation(good=4, num_prompts=7), step=5, split="heldout")
    first = read_samples(tmp_path / "samples.jsonl")[0]
    assert first["before"]["step"] == 0
    assert [response["count"] for response in first["before"]["responses"]] == [1, 3]
    assert first["after"] == {"step": 5, "responses": [{**respond("<b>4</b>", 1.0, True), "count": 4}]}


def test_series_are_those_of_the_charts_without_nulls():
    lines = [
        {"step": 0, "selection/batch_kept": 4, "train/loss": None},
        {"step": 2, "selection/batch_kept": 0, "collector/dialog_turns": 16},
    ]
    assert collect_series(lines) == {"selection/batch_kept": [Point(0, 4), Point(2, 0)]}


def test_long_curves_are_thinned_to_means():
    assert thin([1.0, 3.0, 5.0, 7.0, 9.0], size=2) == [2.0, 6.0, 9.0]
    chart = next(chart for chart in CHARTS if "train/kl_to_ref" in chart.curves)
    figure = draw(chart, {"train/kl_to_ref": [Point(step, float(step)) for step in range(10 * MAX_POINTS)]})
    (curve,) = figure.curves
    assert (curve.first, curve.last, curve.mean_of) == (4.5, 10 * MAX_POINTS - 5.5, 10)
    short = draw(chart, {"train/kl_to_ref": [Point(step, float(step)) for step in range(MAX_POINTS)]})
    assert short.curves[0].mean_of == 1
    # Ten times the data is drawn with about as many points; a tenth is for the longer numbers of the ticks.
    assert len(figure.svg) == pytest.approx(len(short.svg), rel=0.1)


def test_a_prompt_evaluated_once_has_no_after(tmp_path):
    row = {"step": 0, "split": "heldout", "prompt": "1+1?", "responses": [{"text": "2", "reward": 1.0}]}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    page = write_report(tmp_path).read_text()
    assert page.count("Not evaluated.") == 1
