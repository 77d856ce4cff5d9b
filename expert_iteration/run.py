"""A run from start to end: the process with the terminal, the process that trains, and how both stop.

The process that the user started (the driver) checks, starts Ray, follows what the training process says, and touches
no accelerator. The training process is a Ray task that holds the training devices: it starts the actors, calls the
script's `train` with its collaborators and writes the run directory.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from expert_iteration import timeline
from expert_iteration.accelerators import memory_sizes
from expert_iteration.chat_template import chat_prompt_ids, describe_chat_template, load_tokenizer
from expert_iteration.checkpoint_files import SavedCheckpoint, list_folders
from expert_iteration.cluster import ray_running, start_actor
from expert_iteration.config import Config, learning_rate, num_engines
from expert_iteration.devices import DeviceAllocation
from expert_iteration.errors import UserError
from expert_iteration.expert_set_reader import task_of_expert_set
from expert_iteration.interruption import Interrupted, StopRequest, StopSignals
from expert_iteration.mailbox import Mailbox, MailboxActor
from expert_iteration.memory import check_memory, describe_allocation
from expert_iteration.model_shape import read_model_shape
from expert_iteration.models import context_length, model_path
from expert_iteration.places import Places
from expert_iteration.prompt_limit import PromptLimit
from expert_iteration.resume import check_fits, find_checkpoint, fingerprint
from expert_iteration.run_directory import (
    METRICS_FILE,
    SUMMARY_FILE,
    log_file,
    timeline_file,
    write_whole,
)
from expert_iteration.screen import RemoteScreen, Screen, redirect_output
from expert_iteration.sizes import Sizes, derive_sizes, describe_sizes
from expert_iteration.sweep import is_sweep
from expert_iteration.tasks import Task, load_task

Train = Callable[..., None]
Work = Callable[..., None]  # as `evaluate`


def run(cfg: Config, train: Train, run_dir: Path) -> None:
    """Run the algorithm `train` with the configured parts, in `run_dir`.

    Raises:
        UserError: a mistake that shows only once data, model or cluster are looked at.
        Exception: whatever ended the training process, once everything is stopped and summary and report are written.
    """
    with StopSignals() as signals:
        start = _prepare(cfg, run_dir)
        screen = _open_screen(cfg, start.sizes, run_dir / "run.log")
        for line in start.lines:
            screen.say(line)
        try:
            work = evaluate if cfg.eval.only else partial(train_with, train)
            _run_on_ray(cfg, work, start, run_dir, screen, signals)
        except BaseException as error:
            _write_summary_of_failure(cfg, run_dir, error, start.started)
            raise
        finally:
            screen.close()
            _conclude(cfg, run_dir)


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    task: Task
    sizes: Sizes
    checkpoint: SavedCheckpoint | None
    """To go on from."""
    about: dict[str, Any]
    """What the manifests of its checkpoints say of it."""
    settings: Path
    """Hydra's files of this command line's settings."""
    started: float
    """When the user's process started, in seconds since the epoch; earlier by as much as the run had run before."""
    lines: list[str]
    """To be shown."""


def _prepare(cfg: Config, run_dir: Path) -> Start:
    """What can be found out while nothing else runs: data or a tokenizer that cannot be used end the run here.

    The tiny model is built if it is wanted and missing. A directory that is gone on with is looked at, not touched.
    """
    started = _start_time()
    checkpoint, passed_over = find_checkpoint(cfg, run_dir)
    if checkpoint is None:
        _refuse_used_directory(cfg, run_dir)
    task, tokenizer, notes = _prepare_task(cfg)
    notes += describe_chat_template(tokenizer, task.system_prompt)
    if task.examples:
        cfg.train.total_dialog_turns = len(task.examples)  # from which sizes follow
    sizes, found = derive_sizes(cfg), fingerprint(task, tokenizer)
    lines = [f"run directory: {run_dir}", *passed_over, *describe_sizes(sizes, cfg), *notes, *_describe_optimizer(cfg)]
    if checkpoint is not None:
        lines += check_fits(checkpoint, cfg, sizes, found)
        started -= checkpoint.manifest["seconds"]
    about = asdict(found) | {
        "run_dir": str(run_dir),
        "turns_per_batch": sizes.turns_per_batch,
        "buffer_size": sizes.buffer_size,
        "total_turns": sizes.num_batches * sizes.turns_per_batch,
    }
    settings = run_dir / str(HydraConfig.get().output_subdir)
    return Start(task, sizes, checkpoint, about, settings, started, lines)


def _open_screen(cfg: Config, sizes: Sizes, log_path: Path) -> Screen:
    if cfg.eval.only:
        return Screen(0, log_path)
    if not num_engines(cfg):
        return Screen(sizes.max_gradient_steps, log_path, "step")
    return Screen(sizes.num_batches * sizes.turns_per_batch, log_path)


def _run_on_ray(cfg: Config, work: Work, start: Start, run_dir: Path, screen: Screen, signals: StopSignals) -> None:
    import ray

    with ray_running(cfg, signals) as places:
        for line in _describe_models(cfg, places.allocation):
            screen.say(line)
        mailbox = Mailbox(start_actor(MailboxActor, {}))
        # One call, after which the process exits by itself; Ray would kill it, before what it registered for its exit.
        remote = ray.remote(max_retries=0, max_calls=1)(train_process)
        process = remote.options(**places.trainer(0))
        _follow(process.remote(cfg, work, start, run_dir, places, mailbox), mailbox, screen, signals)


def _start_time() -> float:
    """When the user started this run, in seconds since the epoch: with the process, or as a later job of a sweep."""
    import psutil

    return time.time() if is_sweep() else psutil.Process().create_time()


def _refuse_used_directory(cfg: Config, run_dir: Path) -> None:
    used = [name for name in (METRICS_FILE, SUMMARY_FILE) if (run_dir / name).exists()]
    if used:
        raise UserError(
            f"The run directory {run_dir} holds a run already ({', '.join(used)}): give another hydra.run.dir, or "
            "remove it. Two runs in one directory would mix their metrics. resume_from goes on with one."
        )
    checkpoints = run_dir / cfg.logging.checkpoint_dir
    if list_folders(checkpoints):
        raise UserError(
            f"logging.checkpoint_dir ({checkpoints}) holds the checkpoints of another run: give each run its own."
        )


def _prepare_task(cfg: Config) -> tuple[Task, Any, list[str]]:
    """The task, without prompts that leave no room for a response, the tokenizer, and lines that describe the task."""
    if cfg.train.from_expert_set is not None:
        return task_of_expert_set(cfg, Path(cfg.train.from_expert_set))
    trust = cfg.model.trust_remote_code

    # Not before the data are read: a mistake there is told at once, and the tiny model takes a minute to build.
    @cache
    def tokenizer() -> Any:
        return load_tokenizer(model_path(cfg), trust, cfg.model.chat_template)

    def find_limit() -> int:
        context = context_length(model_path(cfg), cfg.inference_model.max_model_len, trust)
        return context - cfg.inference_model.max_tokens

    limit = PromptLimit(lambda system, question: len(chat_prompt_ids(tokenizer(), system, question)), find_limit)
    task = load_task(cfg, limit)
    training = "" if cfg.eval.only else f"{len(task.train)} prompts for training, "
    notes = [f"{task.name}: {training}{len(task.heldout)} held out for evaluation", *task.notes]
    return task, tokenizer(), notes


def _describe_models(cfg: Config, allocation: DeviceAllocation) -> list[str]:
    """Which model sits where with how much memory; raises UserError where it cannot fit, before anything loads."""
    shape, sizes = read_model_shape(model_path(cfg), cfg.model.trust_remote_code), memory_sizes(cfg)
    notes = check_memory(cfg, allocation, shape, sizes)
    return [*describe_allocation(cfg, allocation, shape, sizes), *notes]


def _describe_optimizer(cfg: Config) -> list[str]:
    if cfg.eval.only:
        return []
    lora = cfg.train_model.lora
    trained = f"adapters of rank {lora.r}" if lora.enabled else "full fine-tuning"
    chosen = " (optimizer.lr=null)" if cfg.optimizer.lr is None else ""
    return [f"{cfg.optimizer.name} at a learning rate of {learning_rate(cfg):g}{chosen}, {trained}"]


def _follow(task: Any, mailbox: Mailbox, screen: Screen, signals: StopSignals) -> None:
    """Show what the training process says until it ends; the first signal asks it to stop, and it is waited for.

    Raises:
        Interrupted: it was asked to stop and has; or a second signal came.
        Exception: what ended it.
    """
    import ray

    done: list[Any] = []
    asked = False
    with signals.deferred():
        while not done:
            done, _ = ray.wait([task], timeout=0.5)
            for message in mailbox.take():
                screen.handle(message)
            if signals.received is not None and not asked:
                screen.say("stopping after this optimizer step, with a checkpoint (once more to stop at once)")
                mailbox.ask_to_stop(signals.received)
                asked = True
    if (signum := ray.get(task)) is not None:
        raise Interrupted(signum)


def train_process(cfg: Config, work: Work, start: Start, run_dir: Path, places: Places, mailbox: Mailbox) -> int | None:
    """What the Ray task with the training devices does: the run's `work`, its output going to a file.

    Returns:
        The signal that ended the run before its end; None where it came to it.
    """
    redirect_output(log_file(run_dir, timeline.TRAINER))
    timeline.record_to(timeline_file(run_dir, timeline.TRAINER))
    timeline.mark_session()
    stop = StopRequest()
    stop.listen(mailbox.stop_asked)
    try:
        work(cfg, start, run_dir, places, RemoteScreen(mailbox), stop)
    except Interrupted as interrupted:
        return interrupted.signum
    return None


def train_with(
    train: Train, cfg: Config, start: Start, run_dir: Path, places: Places, screen: RemoteScreen, stop: StopRequest
) -> None:
    """Build the parts, hand them to the script's `train`, leave results behind."""
    from expert_iteration.session import Session

    with Session(cfg, start, run_dir, places, screen, stop) as session:
        session.start()
        try:
            train(cfg, **session.collaborators())
        except Interrupted:
            session.save_unfinished()
            raise
        session.finish()


def evaluate(cfg: Config, start: Start, run_dir: Path, places: Places, screen: RemoteScreen, stop: StopRequest) -> None:
    """Evaluate the model and train nothing."""
    from expert_iteration.evaluation_alone import evaluate_alone

    evaluate_alone(cfg, start, run_dir, places, screen, stop)


def _write_summary_of_failure(cfg: Config, run_dir: Path, error: BaseException, started: float) -> None:
    """The least a program that reads the run directory must find, if the training process could not write it."""
    path = run_dir / SUMMARY_FILE
    if path.exists():
        return
    from expert_iteration.summary import failure_summary

    write_whole(path, json.dumps(failure_summary(cfg, error, started), indent=2))


def _conclude(cfg: Config, run_dir: Path) -> None:
    """The report, and on the terminal what was learned, where everything lies, and how to go on with what is no end."""
    from expert_iteration.report import print_summary, read_summary, write_report

    write_report(run_dir)
    print(print_summary(run_dir))
    if read_summary(run_dir).get("status") != "completed" and list_folders(run_dir / cfg.logging.checkpoint_dir):
        mode = "sync" if cfg.train.sync else "async"
        print(f"Go on with:    python expert-iteration-{mode}.py mode={mode} resume_from={run_dir}")
