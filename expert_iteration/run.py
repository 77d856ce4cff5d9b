"""A run from start to end: the process with the terminal, the process that trains, and how both stop.

The process that the user started (the driver) checks, starts Ray, follows what the training process says, and touches
no accelerator. The training process is a Ray task that holds the training devices: it starts the actors, calls the
script's `train` with its collaborators and writes the run directory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expert_iteration import timeline
from expert_iteration.accelerators import memory_sizes
from expert_iteration.cluster import ray_running
from expert_iteration.config import Config, learning_rate
from expert_iteration.devices import DeviceAllocation
from expert_iteration.errors import UserError
from expert_iteration.memory import check_memory, describe_allocation
from expert_iteration.model_shape import read_model_shape
from expert_iteration.models import chat_prompt_ids, context_length, load_tokenizer, model_path
from expert_iteration.places import Places
from expert_iteration.run_directory import METRICS_FILE, SUMMARY_FILE, log_file, timeline_file
from expert_iteration.screen import RemoteScreen, Screen, redirect_output
from expert_iteration.sizes import derive_sizes, describe_sizes
from expert_iteration.sweep import is_sweep
from expert_iteration.tasks import Task, load_task, without_long_prompts

Train = Callable[..., None]
STOP_SECONDS = 60  # for the training process to write its summary after Ctrl-C


def run(cfg: Config, train: Train, run_dir: Path) -> None:
    """Run the algorithm `train` with the configured parts, in `run_dir`.

    Raises:
        UserError: a mistake that shows only once data, model or cluster are looked at.
        Exception: whatever ended the training process, once everything is stopped and summary and report are written.
    """
    started = _start_time()
    _refuse_used_directory(run_dir)
    # While nothing else runs: data or a tokenizer that cannot be used end the run here, and the tiny model is built if
    # it is wanted and missing.
    task, notes = _prepare_task(cfg)
    sizes = derive_sizes(cfg)
    screen = Screen(sizes.num_batches * sizes.turns_per_batch, run_dir / "run.log")
    for line in (f"run directory: {run_dir}", *describe_sizes(sizes, cfg), *notes, _describe_optimizer(cfg)):
        screen.say(line)
    try:
        _run_on_ray(cfg, train, task, run_dir, screen, started)
    except BaseException as error:
        _write_summary_of_failure(cfg, run_dir, error, started)
        raise
    finally:
        screen.close()
        _conclude(run_dir)


def _run_on_ray(cfg: Config, train: Train, task: Task, run_dir: Path, screen: Screen, started: float) -> None:
    import ray
    from ray.util.queue import Queue

    with ray_running(cfg) as places:
        for line in _describe_models(cfg, places.allocation):
            screen.say(line)
        queue = Queue(actor_options={"num_cpus": 0})
        # One call, after which the process exits by itself; Ray would kill it, before what it registered for its exit.
        remote = ray.remote(max_retries=0, max_calls=1)(train_process)
        process = remote.options(**places.trainer(0))
        _follow(process.remote(cfg, train, task, run_dir, places, RemoteScreen(queue), started), queue, screen)


def _start_time() -> float:
    """When the user started this run, in seconds since the epoch: with the process, or as a later job of a sweep."""
    import psutil

    return time.time() if is_sweep() else psutil.Process().create_time()


def _refuse_used_directory(run_dir: Path) -> None:
    used = [name for name in (METRICS_FILE, SUMMARY_FILE) if (run_dir / name).exists()]
    if used:
        raise UserError(
            f"The run directory {run_dir} holds a run already ({', '.join(used)}): give another hydra.run.dir, or "
            "remove it. Two runs in one directory would mix their metrics."
        )


def _prepare_task(cfg: Config) -> tuple[Task, list[str]]:
    """The task, without prompts that leave no room for a response, and lines that describe it."""
    task = load_task(cfg)
    name = model_path(cfg)
    trust = cfg.model.trust_remote_code
    tokenizer = load_tokenizer(name, trust)
    limit = context_length(name, cfg.inference_model.max_model_len, trust) - cfg.inference_model.max_tokens
    task, dropped = without_long_prompts(
        task, lambda problem: len(chat_prompt_ids(tokenizer, task.system_prompt, problem.question)), limit
    )
    notes = [f"{task.name}: {len(task.train)} prompts for training, {len(task.heldout)} held out for evaluation"]
    if dropped:
        notes.append(f"note: {dropped} prompts were left out, for they have more than {limit} tokens")
    return task, notes


def _describe_models(cfg: Config, allocation: DeviceAllocation) -> list[str]:
    """Which model sits where with how much memory; raises UserError where it cannot fit, before anything loads."""
    shape, sizes = read_model_shape(model_path(cfg), cfg.model.trust_remote_code), memory_sizes(cfg)
    notes = check_memory(cfg, allocation, shape, sizes)
    return [*describe_allocation(cfg, allocation, shape, sizes), *notes]


def _describe_optimizer(cfg: Config) -> str:
    lora = cfg.train_model.lora
    trained = f"adapters of rank {lora.r}" if lora.enabled else "full fine-tuning"
    chosen = " (optimizer.lr=null)" if cfg.optimizer.lr is None else ""
    return f"{cfg.optimizer.name} at a learning rate of {learning_rate(cfg):g}{chosen}, {trained}"


def _follow(task: Any, queue: Any, screen: Screen) -> None:
    """Show what the training process says until it ends; Ctrl-C asks it to stop and waits for its summary."""
    import ray

    try:
        _show_until_done(task, queue, screen, timeout=None)
    except KeyboardInterrupt:
        screen.say("stopping: writing the summary (Ctrl-C again to stop at once)")
        ray.cancel(task)
        _show_until_done(task, queue, screen, timeout=STOP_SECONDS)
        raise
    ray.get(task)


def _show_until_done(task: Any, queue: Any, screen: Screen, timeout: float | None) -> None:
    import ray

    deadline = None if timeout is None else time.monotonic() + timeout
    done: list[Any] = []
    while not done and (deadline is None or time.monotonic() < deadline):
        done, _ = ray.wait([task], timeout=0.5)
        for message in queue.get_nowait_batch(queue.qsize()):
            screen.handle(message)


def train_process(
    cfg: Config, train: Train, task: Task, run_dir: Path, places: Places, screen: RemoteScreen, started: float
) -> None:
    """What the Ray task with the training devices does: build the parts, train, leave results behind."""
    redirect_output(log_file(run_dir, timeline.TRAINER))
    timeline.record_to(timeline_file(run_dir, timeline.TRAINER))
    from expert_iteration.session import Session

    with Session(cfg, task, run_dir, places, screen, started) as session:
        session.start()
        train(cfg, **session.collaborators())
        session.finish()


def _write_summary_of_failure(cfg: Config, run_dir: Path, error: BaseException, started: float) -> None:
    """The least a program that reads the run directory must find, if the training process could not write it."""
    path = run_dir / SUMMARY_FILE
    if path.exists():
        return
    from expert_iteration.summary import failure_summary

    path.write_text(json.dumps(failure_summary(cfg, error, started), indent=2))


def _conclude(run_dir: Path) -> None:
    """The report, and on the terminal what was learned and where everything lies."""
    from expert_iteration.report import print_summary, write_report

    write_report(run_dir)
    print(print_summary(run_dir))
