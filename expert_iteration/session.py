"""The training process: builds the parts, hands them to the script's `train`, and leaves the results behind."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ray.util.queue import Queue
from transformers import set_seed

import ei_utils
from expert_iteration.checkpoint import Checkpointer, RunParts, load_state, weights_fingerprint
from expert_iteration.checkpoint_files import SavedCheckpoint, tidy
from expert_iteration.cluster import stop_actors
from expert_iteration.config import Config, num_engines
from expert_iteration.errors import UserError
from expert_iteration.export import Exporter
from expert_iteration.interruption import StopRequest
from expert_iteration.model_card import model_card
from expert_iteration.places import Places
from expert_iteration.position import Position
from expert_iteration.remote import Waiting, get_from
from expert_iteration.resume import rewind
from expert_iteration.run_directory import ACCEPTED_MARK, BEST_FOLDER, LAST_FOLDER, METRICS_FILE, read_jsonl
from expert_iteration.screen import Progress, RemoteScreen, StepProgress
from expert_iteration.seeds import derive_seed
from expert_iteration.selection_advice import advise
from expert_iteration.summary import Summary, write_summary
from expert_iteration.turns import Turns
from expert_iteration.wandb_logger import make_loggers

if TYPE_CHECKING:
    from expert_iteration.learner import Learner
    from expert_iteration.run import Start

LOG_QUEUE_SIZE = 1000


class Session:
    """Everything a run needs beside the algorithm.

    Leaving the context writes `summary.json`, also after an error or Ctrl-C, and clears what would stay behind.

    Args:
        cfg: the configuration.
        start: what the run begins with.
        run_dir: of the run. Gone on with, it is made what it was when the checkpoint was saved.
        places: where the processes of the run live.
        screen: to the terminal.
        stop: whether the run was asked to end.
    """

    def __init__(
        self,
        cfg: Config,
        start: Start,
        run_dir: Path,
        places: Places,
        screen: RemoteScreen,
        stop: StopRequest,
    ) -> None:
        set_seed(derive_seed(cfg.seed, "training"))
        self._cfg, self._run_dir, self._screen = cfg, run_dir, screen
        self._started, self._stop, self._total_turns = start.started, stop, start.about["total_turns"]
        self._task = task = start.task
        self._checkpoint = checkpoint = start.checkpoint
        self._state = None if checkpoint is None else load_state(checkpoint.folder)
        writer_state = None if self._state is None else self._state["buffer"]["_writer_state"]
        # First what only starts a process: the actors load their models while this process loads TorchRL and its own.
        self._engine = ei_utils.get_inference_model(cfg, places, run_dir)
        reference = ei_utils.get_ref_model(cfg, places, run_dir)
        self._ranks = ei_utils.start_ranks(cfg, places, run_dir)
        log_queue = Queue(LOG_QUEUE_SIZE, actor_options={"num_cpus": 0})
        collector = ei_utils.start_collector(cfg, task, self._engine, reference, log_queue, run_dir, writer_state)
        self._references = {} if reference is None else reference.actors
        self._actors = [*self._engine.actors, *self._references.values(), *([] if collector is None else [collector])]
        turns = self._engine.turns = Turns(self._engine if places.allocation["sleeps"] else None)
        self._seconds = {"timeit/start/actors_started": self._elapsed()}

        from expert_iteration.metrics import Metrics
        from expert_iteration.replay_buffer import BufferReader

        self._buffer_owner = ei_utils.make_replay_buffer(cfg)
        buffer = self._buffer_owner.client()
        waiting = Waiting(cfg.train.collection_timeout, screen.say, self._engine.describe, stop.check)
        self._engine.waiting = waiting  # for evaluations; the collector has a client of its own, which is waited for
        self.position = Position()
        self.collector = ei_utils.get_collector_client(cfg, task, collector, reference, buffer, waiting, turns)
        self.learner = self._make_learner(ei_utils.load_policy(cfg, places.allocation), places)
        self.learner.turns = turns
        self.policy_training = self.learner.model
        self._reader = ei_utils.make_policy_reader(cfg, self.learner, self._ranks)
        self._summary = Summary(cfg)
        if checkpoint is not None:
            # Not before: until here the run could be refused, and its directory is to be as it was then.
            for line in rewind(run_dir, checkpoint):
                screen.say(line)
            (start.settings / ACCEPTED_MARK).touch()
        run_id = None if checkpoint is None else checkpoint.manifest["wandb_run_id"]
        loggers = make_loggers(cfg, run_dir, "sync" if cfg.train.sync else "async", run_id)
        advice = advise(cfg.train.selection, cfg.train.min_reward)
        self.metrics = Metrics(
            run_dir,
            loggers=[*loggers, self._summary, Progress(screen, advice) if num_engines(cfg) else StepProgress(screen)],
            log_queue=log_queue,
            logging_frequency=cfg.train.logging_frequency,
            clock=self._elapsed,
        )
        self.reference_updater = ei_utils.make_reference_updater(cfg, reference, self._reader)
        self.weight_updater = ei_utils.make_weight_updater(
            cfg, places.allocation, self._engine, self._reader, self.reference_updater, task, self._tokenizer
        )
        self.replay_buffer = BufferReader(
            buffer,
            max_policy_age=cfg.train.max_policy_age,
            policy_version=lambda: self.weight_updater.policy_version,
        )
        self._exporter = Exporter(cfg, self.policy_training, self._tokenizer, self._reader)
        self.evaluator = ei_utils.make_evaluator(
            cfg,
            self._engine,
            task,
            self._tokenizer,
            self.metrics,
            on_best=self._keep_best,
            say=screen.say,
        )
        self._parts = RunParts(
            position=self.position,
            collector=self.collector,
            replay_buffer=self.replay_buffer,
            learner=self.learner,
            weight_updater=self.weight_updater,
            evaluator=self.evaluator,
            metrics=self.metrics,
            reference_updater=self.reference_updater,
        )
        self.checkpointer = Checkpointer(
            run_dir / cfg.logging.checkpoint_dir,
            self._parts,
            cfg,
            about={
                **start.about,
                "started": start.started,
                "wandb_run_id": next((logger.run_id for logger in loggers), run_id),
                "model": self._model_fingerprint,
            },
            clock=self._elapsed,
            stop=stop,
        )
        self._seconds["timeit/start/trainer_ready"] = self._elapsed()

    def _make_learner(self, loaded: tuple[Any, Any], places: Places) -> Learner:
        policy, self._tokenizer = loaded
        self._model_fingerprint = weights_fingerprint(policy)
        if self._checkpoint is not None and self._checkpoint.manifest["model"] != self._model_fingerprint:
            raise UserError(
                f"model.name ({self._cfg.model.name}) is not the model that {self._checkpoint.folder} was trained "
                "from: its weights are others."
            )
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
        self._engine.wait_until_ready(self._screen.say, self._stop.check)
        self._seconds["timeit/start/engine_ready"] = self._elapsed()
        for name, actor in self._references.items():
            get_from(name, actor.__ray_ready__.remote())  # a reference that cannot load says so before anything runs
        verified = self.weight_updater.verify_start(self.policy_training)
        if self._checkpoint is None:
            self.metrics.log(self._seconds | verified, step=0)
        else:
            self._go_on_from(self._checkpoint)

    def _go_on_from(self, checkpoint: SavedCheckpoint) -> None:
        state, self._state = self._state, None
        assert state is not None
        if (first := state["learner"]["first_optimizer_step_time"]) is not None:
            state["learner"]["first_optimizer_step_time"] = first - checkpoint.manifest["started"] + self._started
        self._parts.load(checkpoint, state, self.policy_training, self._total_turns)
        self.checkpointer.resumed_at(checkpoint.step)
        for name in (BEST_FOLDER, LAST_FOLDER):
            tidy(self._run_dir / name)
        self._summary.go_on_from(read_jsonl(self._run_dir / METRICS_FILE))
        self._screen.say(
            f"going on from {checkpoint.folder.name}, after {checkpoint.manifest['optimizer_steps']} optimizer steps"
        )

    def save_unfinished(self) -> None:
        """Save a run that was asked to stop while it waited, its last optimizer step made of what it has."""
        if self.learner.is_in_window:
            self.metrics.training(self.learner.flush(), optim_step=self.learner.optimizer_steps)
        self.checkpointer.save()

    def finish(self) -> None:
        """What a completed run leaves beside its metrics: a last checkpoint, and the model as `last/`."""
        # First, so that a run that goes on from it, longer, has no line of an end.
        self.checkpointer.save()
        self.metrics.drain(self.learner.gradient_steps)
        # What was dropped since the last step is counted too, and what the engine loaded last is checked.
        last = self.replay_buffer.statistics() | self.weight_updater.read_reports()
        self.metrics.log(last, self.learner.gradient_steps)
        self._export(LAST_FOLDER)

    def _keep_best(self) -> None:
        """What was just evaluated is the best so far: keep it as a folder, and as a checkpoint that stays."""
        self._export(BEST_FOLDER)
        if self._cfg.train.checkpoint_frequency:
            self.checkpointer.save(again=True)

    def _export(self, name: str) -> None:
        """Save the policy, as it is now, as a folder of the run."""
        self.learner.turns.to_trainer()  # where the engine has the accelerator, there is no room to merge adapters
        card = model_card(self._cfg, self._task, self._sum_up(), self._run_dir)
        self._exporter.export(self._run_dir / name, card)

    def _sum_up(self, error: BaseException | None = None) -> dict[str, Any]:
        return self._summary.to_dict(error, self.learner, self.weight_updater, self._started)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.metrics.close()
        finally:
            self._conclude(error)

    def _conclude(self, error: BaseException | None) -> None:
        try:
            write_summary(self._run_dir, self._sum_up(error))
        finally:
            self.evaluator.close()
            ranks = [] if self._ranks is None else self._ranks.actors
            stop_actors([*self._actors, *ranks, self._buffer_owner._rb])
            if self._ranks is not None:
                self._ranks.leave()

    def _elapsed(self) -> float:
        """Seconds since the user's process started."""
        return time.time() - self._started
