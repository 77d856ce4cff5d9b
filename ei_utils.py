"""From configuration to objects: the builders that both scripts use, and the hooks that users edit.

Everything here is called in the training process, which `expert_iteration/run.py` starts, or in an actor it creates.
TorchRL, which takes seconds to load, is imported by the builders that need it: those that only start an actor come
first in a run, so that the actors load while the training process does.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ray.util.queue import Empty, Full

from expert_iteration import timeline
from expert_iteration.accelerators import own_memory_sizes
from expert_iteration.actors import (
    BackgroundCollector,
    CollectorActor,
    CollectorClient,
    ReferenceActor,
    ReferenceClient,
)
from expert_iteration.chat_template import load_tokenizer
from expert_iteration.cluster import start_actor
from expert_iteration.config import (
    Config,
    InferenceBackend,
    Parallel,
    RestartFrom,
    Selection,
    learning_rate,
    num_engines,
    num_references,
)
from expert_iteration.devices import DeviceAllocation, compute_device_allocation, parallel_kind
from expert_iteration.engine import Engine, Sampling
from expert_iteration.engine_client import CONCURRENCY_GROUPS, EngineActor, EngineClient, EnginePool
from expert_iteration.engine_memory import engine_cache_bytes, engine_memory_share
from expert_iteration.model_shape import read_model_shape
from expert_iteration.models import load_model, model_path
from expert_iteration.places import Places, given
from expert_iteration.remote import Waiting
from expert_iteration.run_directory import BATCH_METRIC, EXPERT_SET_FOLDER, log_file, process_name, timeline_file
from expert_iteration.schedule import KLSchedule, create_cosine_scheduler_with_warmup, make_scheduler
from expert_iteration.seeds import derive_seed
from expert_iteration.selection_advice import advise
from expert_iteration.sizes import batches_ahead, derive_sizes, responses_per_gradient_step
from expert_iteration.tasks import Task
from expert_iteration.turns import Turns

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torch import nn
    from torchrl.data import RayReplayBuffer
    from torchrl.envs.llm import DatasetChatEnv

    from expert_iteration.adapter_reference import AdapterReference
    from expert_iteration.collector import ExpertCollector
    from expert_iteration.evaluation import Evaluator
    from expert_iteration.judging import Judge
    from expert_iteration.learner import Learner, StepResult
    from expert_iteration.metrics import Metrics
    from expert_iteration.policy_reader import PolicyReader
    from expert_iteration.prompt_stream import PromptStream
    from expert_iteration.reference_update import LoadableReference, ReferenceUpdater
    from expert_iteration.replay_buffer import BufferReader
    from expert_iteration.sampler import RewardPrioritizedSampler
    from expert_iteration.train_ranks import RankGroup
    from expert_iteration.weight_transport import WeightTransport
    from expert_iteration.weight_update import WeightUpdater
    from expert_iteration.without_engine import ExpertSetCollector, NoEvaluator, NoWeightUpdater

__all__ = [
    "RemoteDataLogger",
    "compute_device_allocation",
    "create_cosine_scheduler_with_warmup",
    "get_collector_client",
    "get_hf_model",
    "get_inference_model",
    "get_ref_model",
    "get_tokenizer",
    "get_train_model",
    "load_policy",
    "log_training_metrics",
    "make_collector",
    "make_env",
    "make_evaluator",
    "make_judge",
    "make_learner",
    "make_policy_reader",
    "make_prompts",
    "make_reference_updater",
    "make_replay_buffer",
    "make_sampler",
    "make_weight_updater",
    "start_collector",
    "start_ranks",
]


class RemoteDataLogger:
    """Post-processing hook of the collector: sums up every batch and sends the record to the training process.

    Edit `log_data` to add metrics of what is collected. Records travel through a Ray queue, so that one process writes
    all metrics. When nobody empties the queue the oldest records make room; `collector/dropped_records` counts them.

    Args:
        log_queue: a `ray.util.queue.Queue` of bounded size.
    """

    def __init__(self, log_queue: Any) -> None:
        self.log_queue = log_queue
        self._batches = self._dropped_records = 0
        self._last_time: float | None = None

    def __call__(self, data: TensorDictBase) -> TensorDictBase:
        """Log a batch and hand it on unchanged."""
        self._batches += 1
        self.log_data(data)
        return data

    def log_data(self, data: TensorDictBase) -> None:
        """Send one record for a batch of responses: rewards, lengths in tokens, versions, seconds between batches."""
        rows = data.unbind(0)
        now = time.monotonic()
        elapsed = 0.0 if self._last_time is None else now - self._last_time
        self._last_time = now
        # A reward that is not finite costs its response (the selector counts it), not the statistics of the others.
        rewards = [reward for row in rows if math.isfinite(reward := row["next", "reward"].item())]
        lengths = [len(row["tokens", "response"]) for row in rows]
        versions = [row["policy_version"].item() for row in rows]
        truncated = [row["finish_reason"] == "length" for row in rows]
        self.send(
            _describe("collector/rewards", rewards)
            | _describe("collector/response_length", lengths)
            | {
                "collector/policy_version/mean": statistics.fmean(versions),
                "collector/policy_version/min": min(versions),
                "collector/policy_version/max": max(versions),
                "collector/truncation_rate": statistics.fmean(truncated),
                "collector/response_tokens": sum(lengths),
                "collector/time/elapsed": elapsed,
            }
        )

    def send(self, record: dict[str, float]) -> None:
        """Queue a record without ever waiting for room; `collector/batch` says to which batch it belongs."""
        record[BATCH_METRIC] = float(self._batches)
        record["collector/dropped_records"] = float(self._dropped_records)
        while True:
            try:
                self.log_queue.put_nowait(record)
                return
            except Full:
                self._drop_oldest()
                record["collector/dropped_records"] = float(self._dropped_records)

    def state_dict(self) -> dict[str, int]:
        """What was counted so far."""
        return {"batches": self._batches, "dropped_records": self._dropped_records}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on counting from `state_dict`."""
        self._batches, self._dropped_records = state["batches"], state["dropped_records"]

    def _drop_oldest(self) -> None:
        try:
            self.log_queue.get_nowait()
            self._dropped_records += 1
        except Empty:
            pass  # the training process was quicker: there is room now


def log_training_metrics(
    metrics: Metrics,
    result: StepResult,
    batch: TensorDictBase,
    learner: Learner,
    replay_buffer: BufferReader,
    policy_version: int,
) -> None:
    """Hand one gradient step's figures to the metrics: loss terms, counters, versions and ages, the buffer.

    Args:
        metrics: writes their mean every `train.logging_frequency` gradient steps.
        result: what `learner.step` returned.
        batch: the micro-batch of the step.
        learner: for its counters.
        replay_buffer: asked for its statistics, a few numbers.
        policy_version: of the weights last pushed. A response's age is that minus the version that made it.
    """
    versions = [row["policy_version"].item() for row in batch.unbind(0)]
    ages = [policy_version - version for version in versions]
    buffer = replay_buffer.statistics()
    writes = max(1.0, buffer["buffer/write_count"])
    metrics.training(
        result,
        optim_step=learner.optimizer_steps,
        bad_steps=learner.bad_steps,
        data_read_count=learner.responses_trained,
        policy_version=statistics.fmean(versions),
        policy_age=statistics.fmean(ages),
        max_policy_age=max(ages),
        steps_per_second=learner.gradient_steps / learner.seconds,
        tokens_per_second=learner.tokens_trained / learner.seconds,
        gradient_steps_per_write=learner.gradient_steps / writes,
        optim_steps_per_write=learner.optimizer_steps / writes,
        **buffer,
    )


def get_tokenizer(cfg: Config) -> Any:
    """The tokenizer of the start model, with its chat template."""
    return load_tokenizer(model_path(cfg), cfg.model.trust_remote_code, cfg.model.chat_template)


def get_hf_model(
    cfg: Config, *, section: str, dtype: str, attn_implementation: str, device: str, quantized: bool = False
) -> Any:
    """The start model as a Hugging Face model, in evaluation mode; `section` of `cfg` is whose keys errors name."""
    return load_model(
        model_path(cfg),
        dtype=dtype,
        attn_implementation=attn_implementation,
        device=device,
        trust_remote_code=cfg.model.trust_remote_code,
        quantized=quantized,
        section=section,
    )


def get_train_model(cfg: Config, allocation: DeviceAllocation) -> nn.Module:
    """The policy to be trained: what is trained of it in float32, a frozen base in the forward pass's type.

    Ray shows this process its own accelerator only.
    """
    from expert_iteration.lora import add_adapters

    lora = cfg.train_model.lora
    is_sharded = parallel_kind(cfg, allocation) is Parallel.fsdp
    # Updates of a usual size vanish in half precision; autocast lowers the forward pass only. Nothing updates a base.
    base_dtype = autocast_dtype(cfg) if lora.enabled else None
    model = get_hf_model(
        cfg,
        section="train_model",
        dtype=str(base_dtype or torch.float32).removeprefix("torch."),
        attn_implementation=cfg.train_model.attn_implementation,
        # Sharded, the model moves to the accelerators layer by layer: none has room for the whole.
        device="cuda" if allocation["train_model_devices"] and not is_sharded else "cpu",
        quantized=cfg.train_model.quantization.enabled,
    )
    if lora.enabled:
        model = add_adapters(model, lora, derive_seed(cfg.seed, "lora"))
    if cfg.train_model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def get_inference_model(cfg: Config, places: Places, run_dir: Path) -> EnginePool:
    """Start the engines with the start model, each in an actor of its own; returns at once, they load meanwhile."""
    count = num_engines(cfg)
    replicas = []
    for index in range(count):
        name = process_name("engine", index, count)
        actor = start_actor(
            EngineActor,
            places.engine(index) | {"concurrency_groups": CONCURRENCY_GROUPS},
            partial(make_engine, cfg, places.allocation),
            log_path=log_file(run_dir, name),
            # The report shows one lane for all engines, the first's.
            timeline_path=timeline_file(run_dir, timeline.ENGINE if index == 0 else name),
        )
        replicas.append(EngineClient(actor, name))
    return EnginePool(replicas)


def make_engine(cfg: Config, allocation: DeviceAllocation) -> Engine:
    """What an engine's actor consists of; called in its process."""
    path, trust = model_path(cfg), cfg.model.trust_remote_code
    # An engine that is only evaluated is sent nothing.
    lora = cfg.train_model.lora if cfg.weight_update.lora_only and not cfg.eval.only else None
    if cfg.inference_model.backend is InferenceBackend.transformers:
        from expert_iteration.transformers_engine import TransformersEngine

        return TransformersEngine(
            path,
            cfg.inference_model,
            # Not capped at the collection's batch: of it depends which response gets which random numbers, and an
            # evaluation alone should repeat that of a run.
            batch_size=cfg.env.num_envs,
            device="cuda" if allocation["inference_model_devices"] else "cpu",
            trust_remote_code=trust,
            chat_template=cfg.model.chat_template,
            lora=lora,
        )
    from expert_iteration.gpu_transport import Way, choose_way
    from expert_iteration.receiving_engine import ReceivingVLLMEngine
    from expert_iteration.vllm_engine import VLLMEngine

    shape, sizes, way = read_model_shape(path, trust), own_memory_sizes(), choose_way(cfg, allocation)
    is_sent_to = way is not Way.object_store
    return (ReceivingVLLMEngine if is_sent_to else VLLMEngine)(
        path,
        cfg.inference_model,
        seed=derive_seed(cfg.seed, "engine"),
        trust_remote_code=trust,
        chat_template=cfg.model.chat_template,
        lora=lora,
        weight_backend=way.value if is_sent_to else None,
        sleeps=allocation["sleeps"],
        memory_share=engine_memory_share(cfg, allocation, shape, sizes),
        cache_bytes=engine_cache_bytes(cfg, allocation, shape, sizes),
    )


def get_ref_model(cfg: Config, places: Places, run_dir: Path) -> ReferenceClient | None:
    """Start the replicas of the frozen start model, each in an actor of its own; returns at once.

    None where the policy with its adapters off is the reference (`ref_model.num_devices`).
    """
    count = num_references(cfg)
    actors = {}
    for index in range(count):
        name = process_name("reference", index, count)
        actors[name] = start_actor(
            ReferenceActor,
            places.reference(index),
            partial(
                get_hf_model,
                cfg,
                section="ref_model",
                dtype=cfg.ref_model.torch_dtype.value,
                attn_implementation=cfg.ref_model.attn_implementation,
                device="cuda" if places.allocation["ref_model_devices"] else "cpu",
                quantized=cfg.ref_model.quantization.enabled,
            ),
            micro_batch_size=cfg.env.num_envs,
            log_path=log_file(run_dir, name),
        )
    return ReferenceClient(actors) if actors else None


def make_prompts(cfg: Config, task: Task, state: Mapping[str, Any] | None = None) -> PromptStream:
    """The stream of training prompts, from its `state_dict` on if given."""
    from expert_iteration.prompt_stream import PromptStream

    return PromptStream(
        task.train,
        derive_seed(cfg.seed, "data"),
        shuffle=cfg.env.shuffle,
        skip_solved=cfg.env.skip_solved,
        skip_hopeless_after=cfg.env.skip_hopeless_after,
        state=state,
    )


def make_judge(cfg: Config, task: Task, where: str = "in collection") -> Judge:
    """What says which reward responses deserve, and which are right; of a failure the user is told `where` it was."""
    from expert_iteration.judging import Judge

    return Judge(
        task,
        pass_threshold=cfg.reward.pass_threshold,
        workers=cfg.reward.workers,
        timeout=cfg.reward.timeout,
        where=where,
    )


def make_env(
    cfg: Config, task: Task, tokenizer: Any, prompts: PromptStream | None = None, judge: Judge | None = None
) -> DatasetChatEnv:
    """The chat environment of the task; edit it to add transforms of your own.

    Args:
        cfg: sizes, and what prompts and judge are made of where they are not given.
        task: how prompts are put.
        tokenizer: of the model, with its chat template.
        prompts: from `make_prompts`.
        judge: from `make_judge`.
    """
    from expert_iteration.environment import make_task_env

    return make_task_env(
        task,
        tokenizer,
        prompts or make_prompts(cfg, task),
        judge or make_judge(cfg, task),
        num_envs=derive_sizes(cfg).num_envs,
        repeats=cfg.env.repeats,
    )


def make_replay_buffer(cfg: Config) -> RayReplayBuffer:
    """The buffer's actor; `.client()` of it is what collector and trainer hold."""
    from torchrl.data import LazyStackStorage, RayReplayBuffer

    from expert_iteration.replay_buffer import ExpertReplayBuffer

    capacity = derive_sizes(cfg).buffer_size
    return RayReplayBuffer(
        replay_buffer_cls=ExpertReplayBuffer,
        remote_config={"num_cpus": 0, "num_gpus": 0, **given(cfg.ray.replay_buffer_config)},
        storage=partial(LazyStackStorage, capacity),
        sampler=make_sampler(cfg, capacity),
        batch_size=responses_per_gradient_step(cfg),
        capacity=capacity,
        seed=derive_seed(cfg.seed, "buffer"),
    )


def make_sampler(cfg: Config, capacity: int) -> Callable[[], RewardPrioritizedSampler]:
    """What builds the buffer's sampler in its actor: passes in sync mode, draws with replacement in async mode."""
    from expert_iteration.sampler import RewardPrioritizedPass, RewardPrioritizedSampler

    train = cfg.train
    # Drawn by reward, the random control would be selected after all, and learn.
    by_reward = train.prioritized_sampling and train.selection is not Selection.random
    alpha = train.prioritized_sampling_alpha if by_reward else 0.0
    epsilon = train.prioritized_sampling_epsilon
    if train.sync:
        return partial(RewardPrioritizedPass, capacity, alpha=alpha, epsilon=epsilon)
    beta = train.prioritized_sampling_beta
    return partial(RewardPrioritizedSampler, capacity, alpha=alpha, epsilon=epsilon, beta=beta)


def start_collector(
    cfg: Config,
    task: Task,
    engine: EnginePool,
    reference: ReferenceClient | None,
    log_queue: Any,
    run_dir: Path,
    state: Mapping[str, Any] | None = None,
) -> Any:
    """Start the collector's actor, from `ExpertCollector.state_dict` if given; returns its handle at once.

    None where there is no engine to collect from.
    """
    if not num_engines(cfg):
        return None
    return start_actor(
        CollectorActor,
        given(cfg.ray.collector_config),
        partial(make_collector, cfg, task, engine, reference, log_queue, run_dir, state),
        log_file(run_dir, "collector"),
        timeline_file(run_dir, timeline.COLLECTOR),
    )


def get_collector_client(
    cfg: Config,
    task: Task,
    actor: Any,
    reference: ReferenceClient | None,
    replay_buffer: Any,
    waiting: Waiting,
    turns: Turns,
) -> CollectorClient | BackgroundCollector | ExpertSetCollector:
    """The trainer's view of the collector: batch after batch, or in the background; or an expert set as one batch.

    Args:
        cfg: decides which, and how many batches.
        task: has the expert set.
        actor: from `start_collector`.
        reference: scores the expert set.
        replay_buffer: a client of the buffer, for the collector to write into.
        waiting: how to wait for a batch.
        turns: of engine and trainer on an accelerator that they share.
    """
    from expert_iteration.reference import RetrieveLogProb
    from expert_iteration.without_engine import ExpertSetCollector

    if not num_engines(cfg):
        retrieve_log_prob = None if reference is None else RetrieveLogProb(reference.score)
        return ExpertSetCollector(task.examples, replay_buffer, retrieve_log_prob)
    num_batches = derive_sizes(cfg).num_batches
    if cfg.train.sync:
        # The engine generates the next batch while the learner trains on this one.
        overlap = cfg.train.sync_iter is False
        advice = advise(cfg.train.selection, cfg.train.min_reward)
        return CollectorClient(
            actor, replay_buffer, num_batches, overlap=overlap, waiting=waiting, turns=turns, advice=advice
        )
    return BackgroundCollector(actor, replay_buffer, num_batches, batches_ahead=batches_ahead(cfg), waiting=waiting)


def make_collector(
    cfg: Config,
    task: Task,
    engine: EnginePool,
    reference: ReferenceClient | None,
    log_queue: Any,
    run_dir: Path,
    state: Mapping[str, Any] | None = None,
) -> ExpertCollector:
    """What the collector's actor consists of; called in its process."""
    from expert_iteration.collector import ExpertCollector
    from expert_iteration.expert_set import ExpertSetWriter
    from expert_iteration.policy import EnginePolicy
    from expert_iteration.reference import RetrieveLogProb
    from expert_iteration.selection import TopKRewardSelector

    tokenizer = get_tokenizer(cfg)
    sizes = derive_sizes(cfg)
    inference = cfg.inference_model
    prompts = make_prompts(cfg, task, None if state is None else state["prompts"])
    judge = make_judge(cfg, task)
    return ExpertCollector(
        make_env=partial(make_env, cfg, task, tokenizer, prompts, judge),
        prompts=prompts,
        judge=judge,
        policy=EnginePolicy(
            engine,
            tokenizer,
            Sampling(max_tokens=inference.max_tokens, temperature=inference.temperature, top_p=inference.top_p),
            seed=cfg.seed,
            keep_stop_token=inference.include_stop_str_in_output,
        ),
        selector=TopKRewardSelector(
            cfg.env.repeats,
            cfg.train.topk_size,
            group_key="group_id",
            text_key=("text", "response"),
            tokens_key=("tokens", "response"),
            correct_key=("next", "correct"),
            selection=cfg.train.selection.value,
            threshold=cfg.train.selection_threshold,
            percentile=cfg.train.selection_percentile,
            percentile_end=cfg.train.selection_percentile_end,
            num_groups=sizes.num_batches * sizes.groups_per_batch,
            ties=cfg.train.selection_ties.value,
            dedup=cfg.train.dedup,
            min_reward=cfg.train.min_reward,
            seed=derive_seed(cfg.seed, "selection"),
        ),
        retrieve_log_prob=None if reference is None else RetrieveLogProb(reference.score),
        postproc=RemoteDataLogger(log_queue),
        dialog_turns_per_batch=sizes.turns_per_batch,
        num_batches=sizes.num_batches,
        num_sample_groups=cfg.logging.num_samples,
        expert_set=ExpertSetWriter(run_dir / EXPERT_SET_FOLDER, task, token_ids=cfg.expert_set.token_ids)
        if cfg.expert_set.save
        else None,
        state=state,
    )


def start_ranks(cfg: Config, places: Places, run_dir: Path) -> RankGroup | None:
    """Start the further training ranks, which load the policy meanwhile; None where this process is the only one."""
    from expert_iteration.train_ranks import RankGroup

    count = cfg.train_model.num_devices
    if count == 1:
        return None
    backend = "cpu:gloo,cuda:nccl" if places.allocation["train_model_devices"] else "gloo"
    options = [places.trainer(rank) for rank in range(1, count)]
    return RankGroup(partial(load_policy, cfg, places.allocation), options, run_dir, backend)


def load_policy(cfg: Config, allocation: DeviceAllocation) -> tuple[nn.Module, Any]:
    """Model and tokenizer, as every training rank loads them."""
    return get_train_model(cfg, allocation), get_tokenizer(cfg)


def make_learner(
    cfg: Config,
    allocation: DeviceAllocation,
    loaded: tuple[nn.Module, Any],
    rank: int = 0,
    ranks: RankGroup | None = None,
) -> Learner:
    """Loss, optimizer, schedule, and what turns micro-batches into optimizer steps; runs in every rank's process.

    Args:
        cfg: the configuration.
        allocation: which model has which devices.
        loaded: from `load_policy`.
        rank: of this process.
        ranks: on rank 0, where there are others.
    """
    from transformers import set_seed

    from expert_iteration.data_parallel import Alone, Replicas, Shards
    from expert_iteration.learner import Learner
    from expert_iteration.log_probs import LogProbModel
    from expert_iteration.loss import SFTLoss
    from expert_iteration.models import compile_forward
    from expert_iteration.optimizer import make_optimizer
    from expert_iteration.parallel_learner import ParallelLearner

    set_seed(derive_seed(cfg.seed, "training", rank))  # dropout differs from rank to rank; adapters have their own seed
    policy, tokenizer = loaded
    log_prob_model = LogProbModel(policy)
    device = "cuda" if allocation["train_model_devices"] else "cpu"
    if cfg.train_model.num_devices == 1:
        parallel: Alone = Alone()
    elif parallel_kind(cfg, allocation) is Parallel.fsdp:
        parallel = Shards(device)
    else:
        parallel = Replicas()
    parallel.prepare(log_prob_model, autocast_dtype(cfg))
    if cfg.model.compile:
        compile_forward(policy)
    loss_fn = SFTLoss(
        actor_network=log_prob_model,
        tokenizer=tokenizer,
        kl_to_ref_coeff=cfg.train.kl_to_ref_coeff,
        loss_function=cfg.train.loss_function.value,
        beta=cfg.train.minor_sft_beta,
    )
    optimizer = make_optimizer(policy, cfg.optimizer, learning_rate(cfg))
    kl_start, kl_to_ref_schedule = cfg.train.kl_to_ref_coeff, cfg.train.kl_to_ref_schedule
    make = Learner if ranks is None else partial(ParallelLearner, ranks=ranks)
    return make(
        policy,
        loss_fn,
        optimizer,
        make_scheduler(optimizer, cfg.optimizer.scheduler, derive_sizes(cfg).max_optimizer_steps),
        gradient_accumulation_steps=cfg.train.gradient_accumulation_steps,
        clip_grad_norm=cfg.optimizer.clip_grad_norm,
        autocast_dtype=autocast_dtype(cfg),
        max_bad_steps=cfg.train.max_bad_steps,
        eval_mode=cfg.train_model.eval,
        kl_schedule=KLSchedule(kl_start, kl_to_ref_schedule.end, kl_to_ref_schedule.type) if kl_start else None,
        parallel=parallel,
        reference=make_adapter_reference(cfg, policy, log_prob_model, ranks) if rank == 0 else None,
        keep_start=cfg.train.restart_from is RestartFrom.base,
    )


def make_adapter_reference(
    cfg: Config, policy: Any, log_prob_model: nn.Module, ranks: RankGroup | None
) -> AdapterReference | None:
    """The policy with its adapters off, which scores responses when they are drawn first; None where actors score."""
    if num_references(cfg):
        return None
    from expert_iteration.adapter_reference import AdapterReference, BaseScorer
    from expert_iteration.parallel_learner import ParallelBaseScorer

    # In the trainer memory is sized by training's micro-batches.
    size, dtype = cfg.train.optim_batch_size, autocast_dtype(cfg)
    scorer = (
        BaseScorer(policy, model=log_prob_model, micro_batch_size=size, autocast_dtype=dtype)
        if ranks is None
        else ParallelBaseScorer(ranks, policy, log_prob_model, micro_batch_size=size, autocast_dtype=dtype)
    )
    return AdapterReference(scorer.score, derive_sizes(cfg).buffer_size)


def make_policy_reader(cfg: Config, learner: Learner, ranks: RankGroup | None) -> PolicyReader:
    """How pushes, probes and `last/` read the policy."""
    from expert_iteration.parallel_learner import ParallelPolicyReader
    from expert_iteration.policy_reader import PolicyReader

    if ranks is None:
        return PolicyReader(autocast_dtype(cfg))
    return ParallelPolicyReader(learner, ranks, autocast_dtype(cfg))


def make_weight_transport(cfg: Config, allocation: DeviceAllocation, engine: EnginePool) -> WeightTransport:
    """How weights get to the engines: over NCCL, through CUDA IPC, or through Ray's object store."""
    from expert_iteration.gpu_transport import GpuTransport, Way, choose_way, connect_ipc, connect_nccl
    from expert_iteration.weight_transport import PackedTransport

    way, dtype = choose_way(cfg, allocation), getattr(torch, cfg.inference_model.torch_dtype.value)
    if way is Way.object_store:
        return PackedTransport(engine, dtype)
    connect = connect_ipc if way is Way.ipc else connect_nccl(cfg.inference_model.num_devices)
    return GpuTransport(engine, connect, dtype, timeout=cfg.weight_update.timeout)


def make_reference_updater(cfg: Config, reference: LoadableReference | None, reader: PolicyReader) -> ReferenceUpdater:
    """What makes the policy the reference now and then, if it is to be (`ref_model.refresh_every`)."""
    from expert_iteration.reference_update import ReferenceUpdater

    return ReferenceUpdater(
        reference,
        reader,
        dtype=getattr(torch, cfg.ref_model.torch_dtype.value),
        every=cfg.ref_model.refresh_every,
        timeout=cfg.weight_update.timeout,
    )


def make_weight_updater(
    cfg: Config,
    allocation: DeviceAllocation,
    engine: EnginePool,
    reader: PolicyReader,
    reference: ReferenceUpdater,
    task: Task,
    tokenizer: Any,
) -> WeightUpdater | NoWeightUpdater:
    """What pushes the policy's weights to the engines: `push_weights(policy_training)`.

    Args:
        cfg: the `weight_update` section and the dtypes.
        allocation: which model has which devices.
        engine: the engines' client.
        reader: of the policy.
        reference: is given the weights too, now and then.
        task: its held-out problems make the probe.
        tokenizer: of the model.
    """
    from expert_iteration.evaluation import probe_sequences
    from expert_iteration.weight_update import WeightUpdater
    from expert_iteration.without_engine import NoWeightUpdater

    if not num_engines(cfg):
        return NoWeightUpdater()

    return WeightUpdater(
        engine,
        make_weight_transport(cfg, allocation, engine),
        reader,
        reference=reference,
        probe=probe_sequences(tokenizer, task.heldout, task.system_prompt),
        adapters_only=cfg.weight_update.lora_only,
        is_quantized=cfg.train_model.quantization.enabled,
        probe_frequency=cfg.weight_update.probe_frequency,
        tolerance=cfg.weight_update.probe_tolerance,
        timeout=cfg.weight_update.timeout,
    )


def make_evaluator(
    cfg: Config,
    engine: EnginePool,
    task: Task,
    tokenizer: Any,
    metrics: Metrics,
    *,
    on_best: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> Evaluator | NoEvaluator:
    """Evaluation of the engine's policy on held-out prompts.

    Args:
        cfg: the `eval` section, and how responses are sampled.
        engine: the engines' client.
        task: its held-out problems.
        tokenizer: of the model.
        metrics: where figures go.
        on_best: called when a trained policy is the best so far.
        say: shows a line to the user.
    """
    from expert_iteration.best import Best
    from expert_iteration.evaluation import Evaluator
    from expert_iteration.without_engine import NoEvaluator

    if not num_engines(cfg):
        return NoEvaluator()
    return Evaluator(
        engine,
        tokenizer,
        task,
        make_judge(cfg, task, "in evaluation"),
        Sampling(
            max_tokens=cfg.inference_model.max_tokens,
            temperature=cfg.eval.temperature,
            top_p=cfg.inference_model.top_p,
            num_samples=cfg.eval.num_samples,
        ),
        k=cfg.eval.k or cfg.eval.num_samples,
        best=Best(cfg.eval.metric, cfg.train.stop_patience),
        on_best=on_best,
        seed=cfg.seed,
        metrics=metrics,
        num_report=cfg.logging.num_samples,
        say=say,
    )


def autocast_dtype(cfg: Config) -> torch.dtype | None:
    """In which the policy's forward pass computes, None without mixed precision."""
    dtype = getattr(torch, cfg.train_model.torch_dtype.value)
    return dtype if cfg.train.mixed_precision and dtype is not torch.float32 else None


def _describe(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (0 for a single value), least and greatest; nothing of nothing."""
    if not values:
        return {}
    return {
        f"{name}/mean": statistics.fmean(values),
        f"{name}/std": statistics.pstdev(values),
        f"{name}/min": min(values),
        f"{name}/max": max(values),
    }
