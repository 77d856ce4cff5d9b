"""Run directories as runs leave them, made up, and what a report's page says in words."""

import json
import re
from pathlib import Path

from expert_iteration.metrics import Metrics
from expert_iteration.run_directory import timeline_file

BEFORE = {
    "pass@1": 0.3275,
    "pass@1_stderr": 0.0112,
    "greedy": 0.44,
    "reward": 0.451,
    "pass@k": 0.75,
    "k": 4.0,
    "num_prompts": 1319.0,
}
AFTER = {**BEFORE, "pass@1": 0.7775, "pass@1_stderr": 0.0098, "greedy": 0.87, "reward": 0.82, "pass@k": 0.8831}
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
logging: {kl_budget: 1.0}
"""


def respond(text, reward, correct):
    """A held-out response."""
    return {"text": text, "reward": reward, "correct": correct, "kept": False}


def evaluation(good, num_prompts=1):
    """Held-out prompts with four responses, so many of them good, in the form of samples.jsonl."""
    responses = [respond("<b>4</b>", 1.0, True)] * good + [respond("<script>alert(5)</script>", 0.1, False)] * (
        4 - good
    )
    return [{"prompt": f"2+2={n}?", "answer": "#### 4", "responses": responses} for n in range(num_prompts)]


def collected(prompt, kept=1):
    """A training prompt with four responses, the first of them kept."""
    responses = [{"text": f"{prompt} is {n}", "reward": n / 4, "kept": n >= 4 - kept} for n in range(4)]
    return {"prompt": prompt, "responses": responses}


def write_run(run_dir, summary=SUMMARY, config=CONFIG):
    """Metrics and samples through the run's own sink; a summary or a configuration of None is not written."""
    metrics = Metrics(run_dir, loggers=[], logging_frequency=1, clock=lambda: 1.0)
    log_evaluation(metrics, BEFORE, good=1, step=0)
    for batch in range(4):
        metrics.log(
            {
                "collector/rewards/mean": 0.4 + 0.1 * batch,
                "collector/rewards/min": 0.1,
                "collector/rewards/max": 1.0,
                "collector/response_length/mean": 250.0,
                "collector/response_tokens": 8000,
                "collector/batch": batch + 1,
            },
            step=batch,
        )
        seen = batch + 1
        metrics.log(
            {
                "selection/responses_seen": 64 * seen,
                "selection/responses_kept": 16 * seen,
                "selection/groups_seen": 8 * seen,
                "selection/groups_kept": 6 * seen,
                "selection/groups_all_equal": 2 * seen,
                "selection/groups_by_pass_rate/000": seen,
                "selection/groups_by_pass_rate/001_025": 2 * seen,
                "selection/groups_by_pass_rate/026_050": 2 * seen,
                "selection/groups_by_pass_rate/051_075": seen,
                "selection/groups_by_pass_rate/076_099": seen,
                "selection/groups_by_pass_rate/100": seen,
                "selection/batch_kept": 16,
                "collector/time/collect": 2.0,
                "collector/batch": batch + 1,
            },
            step=batch,
        )
        metrics.log(
            {
                "train/loss": 1.0,
                "train/loss_sft": 0.9,
                "train/kl_to_ref": 0.1,
                "train/entropy": 0.5 - 0.1 * batch,
                "train/policy_age": 0.5 * batch,
                "train/max_policy_age": batch,
                "train/tokens_per_second": 900.0,
            },
            step=batch + 1,
        )
    log_evaluation(metrics, AFTER, good=3, step=4)
    metrics.close()
    if summary is not None:
        (run_dir / "summary.json").write_text(json.dumps(summary))
    if config is not None:
        (run_dir / ".hydra").mkdir()
        (run_dir / ".hydra" / "config.yaml").write_text(config)


def log_evaluation(metrics, figures, good, step):
    """An evaluation as the evaluator logs it."""
    metrics.log({f"eval/{name}": value for name, value in figures.items()}, step)
    metrics.samples(evaluation(good), step, split="heldout")
    metrics.rewards([1.0] * good + [0.1] * (4 - good), step)


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
    """The words of a page, without tags, scripts and runs of white space."""
    body = path.read_text().split("</style>", 1)[1]
    pictures_and_scripts = r"<(svg|script|template)\b.*?</\1>"
    return " ".join(re.sub(rf"{pictures_and_scripts}|<[^>]+>", " ", body, flags=re.DOTALL).split())
