"""Both algorithms with all their real parts in this process: neither Ray nor its actors."""

import json
import time
from queue import SimpleQueue
from types import SimpleNamespace

from torchrl.data import LazyStackStorage

import ei_utils
from expert_iteration.checkpoint import Checkpointer
from expert_iteration.devices import compute_device_allocation
from expert_iteration.metrics import Metrics
from expert_iteration.position import Position
from expert_iteration.replay_buffer import BufferReader, ExpertReplayBuffer
from expert_iteration.scorer import ReferenceScorer
from expert_iteration.sizes import responses_per_gradient_step
from expert_iteration.summary import Summary
from expert_iteration.tasks import load_task


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


class LocalCollector:
    """`CollectorClient` and `BackgroundCollector` without an actor; the latter's batches come when waited for."""

    def __init__(self, collector, replay_buffer, num_batches):
        self.collector, self.replay_buffer, self.num_batches = collector, replay_buffer, num_batches
        self.ready, self.latest = [], None

    finished = property(lambda self: self.num_batches == 0 and not self.ready)

    def __iter__(self):
        while self.num_batches:
            yield self.collect()

    def collect(self):
        self.num_batches -= 1
        self.collector.collect()
        return self.collector.write(self.replay_buffer)

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


def run_algorithm(script, cfg, engine, run_dir):
    """One run with the engines' client given; returns what the tests look at."""
    run_dir.mkdir()
    task, log_queue, started = load_task(cfg), SimpleQueue(), time.time()
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
        reference = ReferenceScorer(base, pad_token_id=0, micro_batch_size=8)
    collector = ei_utils.make_collector(cfg, task, engine, reference, log_queue)
    metrics = Metrics(run_dir, loggers=[summary], log_queue=log_queue, logging_frequency=1)
    learner = ei_utils.make_learner(cfg, allocation, loaded)
    policy = learner.model
    policy_reader = ei_utils.make_policy_reader(cfg, learner, None)
    updater = ei_utils.make_weight_updater(cfg, allocation, engine, policy_reader, task, tokenizer)
    metrics.log(updater.verify_start(policy), step=0)
    reader = BufferReader(
        buffer, max_policy_age=cfg.train.max_policy_age, policy_version=lambda: updater.policy_version
    )
    script.train(
        cfg,
        position=Position(),
        collector=LocalCollector(collector, buffer, sizes.num_batches),
        replay_buffer=reader,
        learner=learner,
        policy_training=policy,
        weight_updater=updater,
        evaluator=ei_utils.make_evaluator(cfg, engine, task, tokenizer, metrics),
        checkpointer=Checkpointer(run_dir / "checkpoints", learner, cfg),
        metrics=metrics,
    )
    metrics.log(reader.statistics() | updater.read_reports(), learner.gradient_steps)
    metrics.close()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(
        engine=engine,
        policy=policy,
        lines=lines,
        task=task,
        summary=summary.to_dict(None, learner, updater, started),
        checkpoints=sorted(path.name for path in (run_dir / "checkpoints").glob("*")),
    )
