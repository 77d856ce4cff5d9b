"""Both algorithms with all their real parts in this process: neither Ray nor its actors."""

import dataclasses
import json
import time
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

from torchrl.data import LazyStackStorage

import ei_utils
from expert_iteration.actors import CollectedBatch
from expert_iteration.checkpoint import Checkpointer, RunParts, load_state
from expert_iteration.devices import compute_device_allocation
from expert_iteration.expert_set_reader import task_of_expert_set
from expert_iteration.interruption import StopRequest
from expert_iteration.metrics import Metrics
from expert_iteration.position import Position
from expert_iteration.replay_buffer import BufferReader, ExpertReplayBuffer
from expert_iteration.run_directory import read_jsonl
from expert_iteration.scorer import ReferenceScorer
from expert_iteration.sizes import responses_per_gradient_step
from expert_iteration.summary import Summary
from expert_iteration.tasks import load_task

# Overrides for three batches that keep four responses each, in micro-batches of four.
THREE_BATCHES = (
    "env.repeats=4",
    "env.num_envs=8",
    "train.dialog_turns_per_batch=16",
    "train.total_dialog_turns=48",
    "train.topk_size=1",
    "train.optim_batch_size=4",
)


class LocalPool:
    """`EnginePool` around one engine of this process."""

    names = ("engine",)

    def __init__(self, engine):
        self.engine = engine

    def sample(self, prompts, sampling, seed):
        return self.engine.sample(prompts, sampling, seed)

    def token_log_probs(self, sequences):
        return [self.engine.token_log_probs(sequences)]

    def offer_weights(self, weights, version, probe, timeout):
        return [self.engine.offer_weights(weights, version, probe)]

    def report(self):
        return [self.engine.report()]


class LocalReference:
    """`ReferenceClient` around one scorer of this process."""

    def __init__(self, scorer):
        self.score, self.load = scorer.score, lambda weights, timeout: scorer.load(weights)


class LocalCollector:
    """`CollectorClient` and `BackgroundCollector` without an actor; the latter's batches come when waited for."""

    def __init__(self, collector, replay_buffer, num_batches):
        self.collector, self.replay_buffer, self.num_batches = collector, replay_buffer, num_batches
        self.written, self.current, self.ready, self.latest = 0, None, [], None

    finished = property(lambda self: self.written == self.num_batches and not self.ready)

    def __iter__(self):
        if self.current is not None:
            yield dataclasses.replace(self.current, is_resumed=True)
        while self.written < self.num_batches:
            self.current = self.collect()
            yield self.current
            self.current = None

    def collect(self):
        self.written += 1
        self.collector.collect()
        return self.collector.write(self.replay_buffer)

    def state_dict(self):
        batches = {"current": self.current, "latest": self.latest}
        return {name: batch and dataclasses.asdict(batch) for name, batch in batches.items()}

    def load_state_dict(self, state, writer_state):
        self.written = writer_state["num_written"] if writer_state else 0
        self.current, self.latest = (state[name] and CollectedBatch(**state[name]) for name in ("current", "latest"))

    def start(self):
        pass

    def arrived(self):
        batches, self.ready = self.ready, []
        return batches

    def go_on(self, worked_off):
        pass

    def wait(self, since, why=None):
        self.latest = self.collect()
        self.ready.append(self.latest)

    def say(self, text):
        pass


def find_task(cfg):
    """As `run.py` does."""
    if cfg.train.from_expert_set is None:
        return load_task(cfg)
    task, _, _ = task_of_expert_set(cfg, Path(cfg.train.from_expert_set))
    cfg.train.total_dialog_turns = len(task.examples)
    return task


def run_algorithm(script, cfg, engine, run_dir, checkpoint=None, stop=None):
    """One run with the engines' client given, from a checkpoint on if that is given; returns what the tests look at.

    Without an engine for a run on an expert set.
    """
    state = None if checkpoint is None else load_state(checkpoint.folder)
    run_dir.mkdir(exist_ok=checkpoint is not None)
    task, log_queue, started = find_task(cfg), SimpleQueue(), time.time()
    sizes, allocation, summary = ei_utils.derive_sizes(cfg), compute_device_allocation(cfg, 0), Summary(cfg)
    buffer = ExpertReplayBuffer(
        storage=LazyStackStorage(sizes.buffer_size),
        sampler=ei_utils.make_sampler(cfg, sizes.buffer_size),
        batch_size=responses_per_gradient_step(cfg),
        capacity=sizes.buffer_size,
        seed=0,
    )
    loaded = ei_utils.load_policy(cfg, allocation)
    _, tokenizer = loaded
    reference = None
    if ei_utils.num_references(cfg):
        base = ei_utils.get_hf_model(
            cfg,
            section="ref_model",
            dtype="float32",
            attn_implementation=cfg.ref_model.attn_implementation,
            device="cpu",
        )
        reference = LocalReference(ReferenceScorer(base, pad_token_id=0, micro_batch_size=8))
    writer_state = state and state["buffer"]["_writer_state"]
    if engine is None:
        collector = ei_utils.get_collector_client(cfg, task, None, reference, buffer, waiting=None, turns=None)
    else:
        made = ei_utils.make_collector(cfg, task, engine, reference, log_queue, run_dir, writer_state)
        collector = LocalCollector(made, buffer, sizes.num_batches)
    metrics = Metrics(run_dir, loggers=[summary], log_queue=log_queue, logging_frequency=1)
    learner = ei_utils.make_learner(cfg, allocation, loaded)
    policy = learner.model
    policy_reader = ei_utils.make_policy_reader(cfg, learner, None)
    reference_updater = ei_utils.make_reference_updater(cfg, reference, policy_reader)
    updater = ei_utils.make_weight_updater(cfg, allocation, engine, policy_reader, reference_updater, task, tokenizer)
    verified = updater.verify_start(policy)
    reader = BufferReader(
        buffer, max_policy_age=cfg.train.max_policy_age, policy_version=lambda: updater.policy_version
    )
    parts = RunParts(
        position=Position(),
        collector=collector,
        replay_buffer=reader,
        learner=learner,
        weight_updater=updater,
        evaluator=ei_utils.make_evaluator(cfg, engine, task, tokenizer, metrics),
        metrics=metrics,
        reference_updater=reference_updater,
    )
    total_turns = sizes.num_batches * sizes.turns_per_batch
    about = {"run_dir": str(run_dir), "total_turns": total_turns}
    checkpoints = run_dir / "checkpoints"
    clock = lambda: time.time() - started  # noqa: E731
    checkpointer = Checkpointer(checkpoints, parts, cfg, about=about, clock=clock, stop=stop or StopRequest())
    if checkpoint is None:
        metrics.log(verified, step=0)
    else:
        parts.load(checkpoint, state, policy, total_turns)
        checkpointer.resumed_at(checkpoint.step)
        summary.go_on_from(read_jsonl(run_dir / "metrics.jsonl"))
    collaborators = {name: part for name, part in vars(parts).items() if name != "reference_updater"}
    script.train(cfg, policy_training=policy, checkpointer=checkpointer, **collaborators)
    checkpointer.save()
    metrics.log(reader.statistics() | updater.read_reports(), learner.gradient_steps)
    metrics.close()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(
        engine=engine,
        policy=policy,
        lines=lines,
        task=task,
        summary=summary.to_dict(None, learner, updater, started),
        checkpoints=sorted(path.name for path in checkpoints.glob("*.pt")),
    )
