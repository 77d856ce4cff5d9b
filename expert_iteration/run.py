"""A run from start to end: the process with the terminal, the process that trains, and how both stop.

The process that the user started (the driver) checks, starts Ray, follows what the training process says, and touches
no accelerator. The training process is a Ray task that holds the training devices: it starts the actors, calls the
script's `train` with its collaborators and writes the run directory.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expert_iteration.config import Config
from expert_iteration.devices import compute_device_allocation, count_accelerators
from expert_iteration.models import model_path, thread_environment
from expert_iteration.screen import RemoteScreen, Screen, redirect_output
from expert_iteration.sizes import derive_sizes, describe_sizes

Train = Callable[..., None]
PROJECT_ROOT = Path(__file__).resolve().parent.parent
STOP_SECONDS = 60  # for the training process to write its summary after Ctrl-C


def run(cfg: Config, train: Train, run_dir: Path) -> None:
    """Run the algorithm `train` with the configured parts, in `run_dir`.

    Raises:
        UserError: a mistake that shows only once data, model or cluster are looked at.
        Exception: whatever ended the training process, once everything is stopped and summary and report are written.
    """
    import ray
    from ray.util.queue import Queue

    started = _process_start()
    model_path(cfg)  # builds the tiny model, if that is wanted and missing, while the terminal is still ours
    sizes = derive_sizes(cfg)
    screen = Screen(sizes.num_batches * sizes.turns_per_batch, run_dir / "run.log")
    for line in (f"run directory: {run_dir}", *describe_sizes(sizes, cfg)):
        screen.say(line)
    _start_ray(cfg)
    try:
        queue = Queue(actor_options={"num_cpus": 0})
        task = _submit(cfg, train, run_dir, queue, started)
        _follow(task, queue, screen)
    except BaseException as error:
        _write_summary_of_failure(cfg, run_dir, error, started)
        raise
    finally:
        ray.shutdown()
        screen.close()
        _conclude(run_dir)


def _process_start() -> float:
    import psutil

    return psutil.Process().create_time()


def _start_ray(cfg: Config) -> None:
    """Start Ray on this machine, or join the cluster of `ray.init_config.address`."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's notice that a future release will stop hiding accelerators from actors without any.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options = {name: value for name, value in cfg.ray.init_config.items() if value is not None}
    # Actors import the package and ei_utils from any working directory.
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH"))))}
    runtime_env = options.get("runtime_env", {})
    options["runtime_env"] = runtime_env | {"env_vars": environment | runtime_env.get("env_vars", {})}
    ray.init(**{"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR} | options)


def _submit(cfg: Config, train: Train, run_dir: Path, queue: Any, started: float) -> Any:
    import ray

    num_accelerators = int(ray.cluster_resources().get("GPU", 0)) or count_accelerators()
    allocation = compute_device_allocation(cfg, num_accelerators)
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": len(allocation["train_model_devices"])}
    options |= {name: value for name, value in cfg.ray.train_handler_config.items() if value is not None}
    options["runtime_env"] = {"env_vars": thread_environment(cfg.train_model.num_threads)}
    task = ray.remote(max_retries=0)(train_process).options(**options)
    return task.remote(cfg, train, run_dir, allocation, RemoteScreen(queue), started)


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
    cfg: Config, train: Train, run_dir: Path, allocation: Any, screen: RemoteScreen, started: float
) -> None:
    """What the Ray task with the training devices does: build the parts, train, leave results behind."""
    log_dir = run_dir / "logs"
    redirect_output(log_dir / "trainer.log")
    from expert_iteration.session import Session

    with Session(cfg, run_dir, allocation, screen, started) as session:
        train(cfg, **session.collaborators())
        session.finish()


def _write_summary_of_failure(cfg: Config, run_dir: Path, error: BaseException, started: float) -> None:
    """The least a program that reads the run directory must find, if the training process could not write it."""
    path = run_dir / "summary.json"
    if path.exists():
        return
    from expert_iteration.summary import failure_summary

    path.write_text(json.dumps(failure_summary(cfg, error, started), indent=2))


def _conclude(run_dir: Path) -> None:
    """The report, and on the terminal what was learned and where everything lies."""
    from expert_iteration.report import print_summary, write_report

    write_report(run_dir)
    print(print_summary(run_dir))
