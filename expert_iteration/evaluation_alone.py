"""A model that is only evaluated (`eval.only=true`): engines and an evaluation, and nothing that trains."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ei_utils
from expert_iteration.cluster import stop_actors
from expert_iteration.config import Config
from expert_iteration.interruption import StopRequest
from expert_iteration.places import Places
from expert_iteration.remote import Waiting
from expert_iteration.screen import Progress, RemoteScreen
from expert_iteration.summary import Summary, write_summary
from expert_iteration.wandb_logger import make_loggers

if TYPE_CHECKING:
    from expert_iteration.run import Start


@dataclass
class Untouched:
    """In place of a learner and a weight updater, of which the summary asks the counters: nothing was done."""

    gradient_steps: int = 0
    optimizer_steps: int = 0
    bad_steps: int = 0
    tokens_trained: int = 0
    seconds: float = 0.0
    first_optimizer_step_time: float | None = None
    pushes: int = 0
    policy_version: int = 0


def evaluate_alone(
    cfg: Config, start: Start, run_dir: Path, places: Places, screen: RemoteScreen, stop: StopRequest
) -> None:
    """Evaluate `model.name` as a run does, and leave metrics, samples and summary in the run directory.

    Args:
        cfg: the configuration.
        start: has the task.
        run_dir: of the run.
        places: where the engines live.
        screen: to the terminal.
        stop: whether the run was asked to end.
    """

    def elapsed() -> float:
        return time.time() - start.started

    # First what only starts a process: the engine loads its model while this process loads TorchRL.
    engine = ei_utils.get_inference_model(cfg, places, run_dir)
    from expert_iteration.metrics import Metrics

    engine.waiting = Waiting(cfg.train.collection_timeout, screen.say, engine.describe, stop.check)
    summary = Summary(cfg)
    loggers = make_loggers(cfg, run_dir, "sync" if cfg.train.sync else "async")
    metrics = Metrics(run_dir, loggers=[*loggers, summary, Progress(screen)], logging_frequency=1, clock=elapsed)
    error: BaseException | None = None
    try:
        engine.wait_until_ready(screen.say, stop.check)
        evaluator = ei_utils.make_evaluator(
            cfg, engine, start.task, ei_utils.get_tokenizer(cfg), metrics, say=screen.say
        )
        with closing(evaluator):
            evaluator.evaluate(step=0, pushes=0)
    except BaseException as raised:
        error = raised
        raise
    finally:
        metrics.close()
        write_summary(run_dir, summary.to_dict(error, Untouched(), Untouched(), start.started))
        stop_actors(engine.actors)
