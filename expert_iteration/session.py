"""The training process: builds the parts, hands them to the script's `train`, and leaves the results behind."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from ray.util.queue import Queue
from transformers import set_seed

import ei_utils
from expert_iteration.checkpoint import Checkpointer, save_pretrained
from expert_iteration.cluster import stop_actors
from expert_iteration.config import Config
from expert_iteration.places import Places
from expert_iteration.position import Position
from expert_iteration.remote import Waiting, get_from
from expert_iteration.run_directory import SUMMARY_FILE, write_whole
from expert_iteration.screen import Progress, RemoteScreen
from expert_iteration.seeds import derive_seed
from expert_iteration.summary import Summary
from expert_iteration.tasks import Task
from expert_iteration.turns import Turns
from expert_iteration.wandb_logger import make_loggers

if TYPE_CHECKING:
    from expert_iteration.learner import Learner

LOG_QUEUE_SIZE = 1000


class Session:
    """Everything a run needs beside the algorithm.

    Leaving the context writes `summary.json`, also after an error or Ctrl-C, and clears what would stay behind.

    Args:
        cfg: the configuration.
        task: prompts, rewards and what is held out.
        run_dir: of the run.
        places: where the processes of the run live.
        screen: to the terminal.
        started: when the user's process started, in seconds since the epoch.
    """

    def __init__(
        self, cfg: Config, task: Task, run_dir: Path, places: Places, screen: RemoteScreen, started: float
    ) -> None:
        set_seed(derive_seed(cfg.seed, "training"))
        self._cfg, self._run_dir, self._screen, self._started = cfg, run_dir, screen, started
        # First what only starts a process: the actors load their models while this process loads TorchRL and its own.
        self._engine = ei_utils.get_inference_model(cfg, places, run_dir)
        reference = ei_utils.get_ref_model(cfg, places, run_dir)
        self._ranks = ei_utils.start_ranks(cfg, places, run_dir)
        log_queue = Queue(LOG_QUEUE_SIZE, actor_options={"num_cpus": 0})
        collector = ei_utils.start_collector(cfg, task, self._engine, reference, log_queue, run_dir)
        self._references = {} if reference is None else reference.actors
        self._actors = [*self._engine.actors, *self._references.values(), collector]
        turns = self._engine.turns = Turns(self._engine if places.allocation["sleeps"] else None)
        self._seconds = {"timeit/start/actors_started": self._elapsed()}

        from expert_iteration.metrics import Metrics
        from expert_iteration.replay_buffer import BufferReader

        self._buffer_owner = ei_utils.make_replay_buffer(cfg)
        buffer = self._buffer_owner.client()
        waiting = Waiting(cfg.train.collection_timeout, screen.say, self._engine.describe)
        self._engine.waiting = waiting  # for evaluations; the collector has a client of its own, which is waited for
        self.position = Position()
        self.collector = ei_utils.get_collector_client(cfg, collector, buffer, waiting, turns)
        self.learner = self._make_learner(ei_utils.load_policy(cfg, places.allocation), places)
        self.learner.turns = turns
        self.policy_training = self.learner.model
        self._reader = ei_utils.make_policy_reader(cfg, self.learner, self._ranks)
        self._summary = Summary(cfg)
        loggers = make_loggers(cfg, run_dir, "sync" if cfg.train.sync else "async")
        self.metrics = Metrics(
            run_dir,
            loggers=[*loggers, self._summary, Progress(screen)],
            log_queue=log_queue,
            logging_frequency=cfg.train.logging_frequency,
            clock=self._elapsed,
        )
        self.weight_updater = ei_utils.make_weight_updater(
            cfg, places.allocation, self._engine, self._reader, task, self._tokenizer
        )
        self.replay_buffer = BufferReader(
            buffer,
            max_policy_age=cfg.train.max_policy_age,
            policy_version=lambda: self.weight_updater.policy_version,
        )
        self.evaluator = ei_utils.make_evaluator(cfg, self._engine, task, self._tokenizer, self.metrics)
        self.checkpointer = Checkpointer(run_dir / cfg.logging.checkpoint_dir, self.learner, cfg)
        self._seconds["timeit/start/trainer_ready"] = self._elapsed()

    def _make_learner(self, loaded: tuple[Any, Any], places: Places) -> Learner:
        _, self._tokenizer = loaded
        build = partial(ei_utils.make_learner, self._cfg, places.allocation)
        if self._ranks is None:
            return build(loaded)
        self._ranks.join(self._screen.say)
        return self._ranks.build(build, loaded)

    def collaborators(self) -> dict[str, Any]:
        """What `train` takes, by name."""
        return {
            "position": self.position,
            "collector": self.collector,
            "replay_buffer": self.replay_buffer,
            "learner": self.learner,
            "policy_training": self.policy_training,
            "weight_updater": self.weight_updater,
            "evaluator": self.evaluator,
            "checkpointer": self.checkpointer,
            "metrics": self.metrics,
        }

    def __enter__(self) -> Self:
        return self

    def start(self) -> None:
        """Wait for the engine, and prove that it has loaded the same weights as this process."""
        self._screen.say("waiting for the engine, which loads the model (logs/engine.log)")
        self._engine.wait_until_ready(self._screen.say)
        self._seconds["timeit/start/engine_ready"] = self._elapsed()
        for name, actor in self._references.items():
            get_from(name, actor.__ray_ready__.remote())  # a reference that cannot load says so before anything runs
        self.metrics.log(self._seconds | self.weight_updater.verify_start(self.policy_training), step=0)

    def finish(self) -> None:
        """What a completed run leaves beside its metrics: a last checkpoint, and the model as `last/`."""
        self.metrics.drain(self.learner.gradient_steps)
        # What was dropped since the last step is counted too, and what the engine loaded last is checked.
        last = self.replay_buffer.statistics() | self.weight_updater.read_reports()
        self.metrics.log(last, self.learner.gradient_steps)
        self.checkpointer.save()
        dtype = getattr(torch, self._cfg.inference_model.torch_dtype.value)
        save_pretrained(self.policy_training, self._tokenizer, self._run_dir / "last", dtype, self._reader)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.metrics.close()
        finally:
            self._conclude(error)

    def _conclude(self, error: BaseException | None) -> None:
        from expert_iteration.metrics import plain

        summary = self._summary.to_dict(error, self.learner, self.weight_updater, self._started)
        # Plain: JSON has no word for numbers that are not finite.
        write_whole(self._run_dir / SUMMARY_FILE, json.dumps(plain(summary), indent=2))
        ranks = [] if self._ranks is None else self._ranks.actors
        stop_actors([*self._actors, *ranks, self._buffer_owner._rb])
        if self._ranks is not None:
            self._ranks.leave()

    def _elapsed(self) -> float:
        """Seconds since the user's process started."""
        return time.time() - self._started
