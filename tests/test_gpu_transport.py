"""Transfers that the trainer and an engine must meet for: the way that is chosen, the meeting, time limits, sleep.

On a CPU everything is real but the wire: a sender that hands the tensors over in its calls stands for NCCL and CUDA
IPC, which tests marked `gpu` use.
"""

import threading
import time
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from expert_iteration.devices import compute_device_allocation
from expert_iteration.engine import Completion, Sampling
from expert_iteration.engine_client import CONCURRENCY_GROUPS, EngineActor, EngineClient, EnginePool
from expert_iteration.gpu_transport import (
    SENDING,
    GpuTransport,
    PackedSource,
    Way,
    choose_way,
    connect_ipc,
    connect_nccl,
)
from expert_iteration.packed_weights import PackedWeights
from expert_iteration.receiving_engine import Meeting, Receiving, ReceivingVLLMEngine, SentByTrainer
from expert_iteration.turns import Turns

TIMEOUT = 20.0  # for what takes milliseconds
PROBE = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]
GREEDY = Sampling(max_tokens=8, temperature=0.0)


# --- the way ---


@pytest.mark.parametrize(
    ("num_accelerators", "overrides", "way"),
    [
        (0, (), Way.object_store),
        (1, (), Way.ipc),
        (2, ("ref_model.num_devices=1",), Way.nccl),  # the reference shares the trainer's, the engine has its own
        (3, (), Way.nccl),
        (6, ("inference_model.num_devices=2", "inference_model.num_replicas=2"), Way.nccl),
        (3, ("placement=colocated",), Way.ipc),
        (1, ("inference_model.backend=transformers",), Way.object_store),
        (1, ("eval.only=true",), Way.object_store),
        (3, ("train_model.lora.enabled=true", "weight_update.lora_only=true"), Way.object_store),
    ],
)
def test_the_way_follows_the_placement(make_cfg, num_accelerators, overrides, way):
    cfg = make_cfg("device=auto", *overrides)
    assert choose_way(cfg, compute_device_allocation(cfg, num_accelerators)) is way


# --- the meeting ---


def test_an_engine_that_no_weights_reach_says_that_the_trainer_is_late():
    with pytest.raises(TimeoutError, match=r"engine was ready for .* version 3, but the trainer did not send"):
        Meeting().hold(3, timeout=0.01)


def test_a_transfer_that_does_not_end_in_time_is_told_from_one_that_never_began():
    meeting = Meeting()
    holder = threading.Thread(target=lambda: (meeting.await_ready(3, TIMEOUT), meeting.begin()))
    holder.start()
    with pytest.raises(TimeoutError, match=r"began to send weights version 3 .* did not arrive"):
        meeting.hold(3, timeout=0.2)
    holder.join()


def test_whoever_waits_to_send_is_told_when_the_weights_were_withdrawn():
    meeting = Meeting()
    answers = []
    waiting = [threading.Thread(target=lambda: answers.append(meeting.await_ready(2, TIMEOUT))) for _ in range(2)]
    for thread in waiting:
        thread.start()
    meeting.withdraw(1)
    assert answers == []
    meeting.withdraw(2)
    for thread in waiting:
        thread.join(TIMEOUT)
    assert answers == [False, False]
    assert meeting.await_ready(2, TIMEOUT) is False
    assert meeting.await_ready(3, timeout=0.01) is None


# --- transfers between processes ---


class Library:
    """In the place of vLLM: a state dict, and the methods of a weight transfer."""

    def __init__(self):
        self.weights, self.version = {}, "0"

    def init_weight_transfer_engine(self, request):
        pass

    def start_weight_update(self):
        self.incoming = {}

    def update_weights(self, request):
        self.incoming |= request["update_info"]

    def finish_weight_update(self):
        self.weights = self.incoming

    def update_weight_version(self, version):
        self.version = version

    def reset_prefix_cache(self):
        pass


class ToyEngine(Receiving):
    """Answers with the sums of its weights; generates for as long as a file is there."""

    def __init__(self, held):
        super().__init__()
        self._llm = Library()
        self._held = held

    def _sample(self, prompts, sampling, seed):
        while self._held.exists():
            time.sleep(0.005)
        return [[Completion(self._sums(), "stop", int(self._llm.version))]]

    def _score(self, sequences):
        return [self._sums()]

    def _sums(self):
        return [tensor.sum().item() for tensor in self._llm.weights.values()]


class HandsOver:
    """In the place of vLLM's trainer side: hands the tensors over in the calls; `pause` comes between them."""

    def __init__(self, engine, source, pause):
        self.engine, self.source, self.pause = engine, source, pause
        engine.init_weight_transfer_engine({})

    def send_weights(self):
        self.engine.start_weight_update()
        for name, tensor in self.source:
            self.engine.update_weights({name: tensor})
            self.pause()
        self.engine.finish_weight_update()


class Trainer:
    """Weights whose elements are all the version's number, and a transport for them."""

    def __init__(self, pool, timeout=TIMEOUT):
        self.pause = lambda: None
        connect = partial(HandsOver, pause=lambda: self.pause())
        self.transport = GpuTransport(pool, connect, torch.float32, timeout=timeout, device="cpu")

    def push(self, version, probe=None):
        weights = {"first": torch.full((2,), float(version)), "second": torch.full((3,), float(version))}
        return self.transport.send(lambda: iter(weights.items()), version, probe, TIMEOUT)


@pytest.fixture(scope="module")
def toys(ray_session, tmp_path_factory):
    """Two engines, and the files that hold up their generations."""
    import ray

    held = [tmp_path_factory.mktemp("toys") / "held" for _ in range(2)]
    actor_class = ray.remote(num_cpus=0, concurrency_groups=CONCURRENCY_GROUPS)(EngineActor)
    actors = [actor_class.remote(partial(ToyEngine, file)) for file in held]
    pool = EnginePool([EngineClient(actor, f"engine-{index}") for index, actor in enumerate(actors)])
    pool.wait_until_ready(print)
    yield pool, held
    for actor in actors:
        ray.kill(actor)


@pytest.fixture
def toy(toys):
    """The first of them."""
    return EnginePool(toys[0].replicas[:1]), toys[1][0]


def ask(engine):
    (answer,) = engine.get(engine.call("sample", [[1]], Sampling(max_tokens=1), 0))[0]
    return answer


@contextmanager
def busy(engine, held):
    """While the body runs the engine generates; yields the list that its answer comes to."""
    answers = []
    held.touch()
    generation = threading.Thread(target=lambda: answers.append(ask(engine)))
    generation.start()
    while not engine.health().generating_seconds:
        time.sleep(0.005)
    yield answers
    held.unlink(missing_ok=True)
    generation.join(TIMEOUT)


def test_an_idle_engine_has_loaded_and_scored_the_weights_when_the_push_returns(toy):
    pool, _ = toy
    sent = Trainer(pool).push(1, probe=[[1]])
    ((update,),) = [report.applied for report in sent.reports]
    assert (update.version, update.probe_scores) == (1, [[2.0, 3.0]])
    assert (sent.names, sent.num_bytes) == ({"first", "second"}, 5 * 4)
    assert ask(pool.replicas[0]) == Completion([2.0, 3.0], "stop", 1)


def test_a_push_to_a_busy_engine_returns_and_the_newest_is_what_the_next_generation_gets(toy):
    pool, held = toy
    trainer = Trainer(pool)
    trainer.push(1)
    with busy(pool.replicas[0], held) as before:
        superseded = [trainer.push(version).reports[0].superseded for version in (2, 3, 4)]
        assert pool.replicas[0].health().version == 1
    assert before == [Completion([2.0, 3.0], "stop", 1)]
    # Two of them were withdrawn. The last is loaded without the trainer's doing anything more.
    assert [count - superseded[0] for count in superseded] == [0, 1, 2]
    assert ask(pool.replicas[0]) == Completion([8.0, 12.0], "stop", 4)
    assert [update.version for update in pool.report()[0].applied] == [4]
    for thread in threading.enumerate():
        if thread.name.startswith(SENDING):
            thread.join(TIMEOUT)
            assert not thread.is_alive(), "waits to send what was withdrawn"


def test_a_busy_engine_keeps_no_other_waiting(toys):
    pool, held = toys
    trainer = Trainer(pool)
    trainer.push(1)
    with busy(pool.replicas[0], held[0]):
        reports = trainer.push(2).reports
        assert [[update.version for update in report.applied] for report in reports] == [[], [2]]
        assert ask(pool.replicas[1]).policy_version == 2
    assert ask(pool.replicas[0]).policy_version == 2


def test_weights_are_not_overwritten_while_they_are_being_sent(toy):
    pool, held = toy
    trainer = Trainer(pool)
    trainer.push(1)
    half_sent, go_on = threading.Event(), threading.Event()
    with busy(pool.replicas[0], held):
        trainer.push(2)
        trainer.pause = lambda: (half_sent.set(), go_on.wait(TIMEOUT))
    answers = []
    generation = threading.Thread(target=lambda: answers.append(ask(pool.replicas[0])))
    generation.start()
    assert half_sent.wait(TIMEOUT)
    second = threading.Thread(target=trainer.push, args=(3,))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    go_on.set()
    second.join(TIMEOUT)
    generation.join(TIMEOUT)
    # What the engine loaded is whole: it generated with all of version 2.
    assert answers == [Completion([4.0, 6.0], "stop", 2)]
    assert ask(pool.replicas[0]) == Completion([6.0, 9.0], "stop", 3)


def test_weights_that_are_about_to_be_loaded_are_no_longer_withdrawn(tmp_path):
    class SlowToWake(ToyEngine):
        def _load(self, weights, version):
            waking.set()
            awake.wait(TIMEOUT)
            super()._load(weights, version)

    waking, awake = threading.Event(), threading.Event()
    engine = SlowToWake(tmp_path / "held")
    offer = threading.Thread(target=engine.offer_weights, args=(SentByTrainer(TIMEOUT), 1))
    withdrawal = threading.Thread(target=engine.withdraw_weights, args=(1,))
    offer.start()
    assert waking.wait(TIMEOUT)
    withdrawal.start()
    assert engine.await_ready(1, timeout=0.2) is None
    awake.set()
    assert engine.await_ready(1, TIMEOUT) is True
    engine.start_weight_update()
    engine.finish_weight_update()
    for thread in (offer, withdrawal):
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    assert engine.version() == 1


def test_what_keeps_the_trainer_from_sending_is_the_engine_s_error(toy):
    pool, _ = toy
    trainer = Trainer(pool)

    def fail():
        raise ValueError("the wire is cut")

    trainer.pause = fail
    message = r"version 1 did not arrive: the trainer could not send them: ValueError\('the wire is cut'\)"
    with pytest.raises(RuntimeError, match=message):
        trainer.push(1)
    trainer.pause = lambda: None
    trainer.push(2)
    assert ask(pool.replicas[0]).policy_version == 2


# --- turns ---


class SleepingEngine:
    slept = 0

    def sleep(self):
        self.slept += 1


def test_the_engine_sleeps_once_for_each_turn_of_the_trainer():
    engine = SleepingEngine()
    turns = Turns(engine)
    slept = []
    for turn in (
        turns.to_engine,
        turns.to_trainer,
        turns.to_trainer,
        turns.to_engine,
        turns.to_engine,
        turns.to_trainer,
    ):
        turn()
        slept.append(engine.slept)
    assert slept == [0, 1, 1, 1, 1, 2]
    Turns().to_trainer()  # nothing is shared


@pytest.mark.parametrize(
    "use",
    [
        lambda pool: pool.sample([[1]], GREEDY, seed=0),
        lambda pool: pool.token_log_probs([[1]]),
        lambda pool: Trainer(pool).push(1),
    ],
    ids=["sample", "score", "push"],
)
def test_using_the_engine_gives_it_the_turn(toy, use):
    pool, _ = toy
    engine = SleepingEngine()
    pool.turns = Turns(engine)
    pool.turns.to_trainer()
    use(pool)
    pool.turns.to_trainer()
    assert engine.slept == 2


# --- vLLM ---


class HandsOverPacked(HandsOver):
    """Hands everything over at once, in the form that our own backend of vLLM's worker takes."""

    def send_weights(self):
        self.engine.start_weight_update()
        self.engine.update_weights({"weights": self.source.weights})
        self.engine.finish_weight_update()


@pytest.fixture(scope="module")
def start_vllm(ray_session, tiny_folder, make_cfg):
    """A function that starts a `ReceivingVLLMEngine` on the tiny model and returns its pool."""
    import ray

    actors = []

    def start(config, options=None, **engine_options):
        actor_class = ray.remote(num_cpus=0, concurrency_groups=CONCURRENCY_GROUPS, **options or {})(EngineActor)
        make_engine = partial(ReceivingVLLMEngine, str(tiny_folder), config, **engine_options)
        actors.append(actor_class.remote(make_engine))
        pool = EnginePool([EngineClient(actors[-1])])
        pool.wait_until_ready(print)
        return pool

    yield start
    for actor in actors:
        ray.kill(actor)


def change(policy):
    """What an optimizer step does, more or less, and visibly."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))


def push_and_probe(pool, transport, policy, autocast_dtype=None):
    """The start's probe, and a push of changed weights with its own."""
    from expert_iteration.policy_reader import PolicyReader
    from expert_iteration.weight_update import WeightUpdater

    updater = WeightUpdater(pool, transport, PolicyReader(autocast_dtype), probe=PROBE)
    updater.verify_start(policy)
    change(policy)
    metrics = updater.push_weights(policy)
    assert metrics["weights/engine_version"] == 1
    assert metrics["weights/probe_mean_diff"] <= updater.tolerance
    return metrics


@pytest.mark.vllm
def test_vllm_takes_weights_that_the_trainer_sends_also_while_it_sleeps(start_vllm, make_cfg, load_tiny_model):
    config = make_cfg().inference_model
    pool = start_vllm(config, weight_backend="packed")
    transport = GpuTransport(pool, partial(HandsOverPacked, pause=None), torch.float32, timeout=60.0, device="cpu")
    before = pool.sample(PROBE, GREEDY, seed=0)
    pool.sleep()
    # On a CPU sleep frees nothing, but stops the scheduler as on an accelerator: who is asleep answers nothing.
    assert pool.sample(PROBE, GREEDY, seed=0) == before
    pool.sleep()
    policy = load_tiny_model()
    push_and_probe(pool, transport, policy)
    after = [completion for (completion,) in pool.sample(PROBE, GREEDY, seed=0)]
    assert {completion.policy_version for completion in after} == {1}
    for ids, completion in zip(PROBE, after, strict=True):
        expected = policy.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
        assert completion.token_ids == expected[: len(completion.token_ids)]


@pytest.mark.vllm
def test_vllm_s_trainer_side_takes_our_source_and_client(monkeypatch):
    from vllm.distributed.weight_transfer import nccl_engine
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    weights = {"wide": torch.arange(6.0).reshape(2, 3), "narrow": torch.ones(4, dtype=torch.int64)}
    packed = PackedWeights.allocate(weights.items(), torch.bfloat16)
    packed.pack(weights.items())
    source = PackedSource(packed, "cpu")
    infos, calls, sent = [], [], []
    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", lambda info, **_: infos.append(info))
    connect_nccl(2)(None, source)
    connect_ipc(None, source)
    assert [(info.backend, info.packed, info.is_sender) for info in infos] == [
        ("nccl", True, True),
        ("ipc", True, True),
    ]
    assert infos[0].world_size == 3

    class Client:
        def __getattr__(self, step):
            return lambda *args: calls.append((step, *args))

    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", lambda iterator, **_: sent.extend(iterator))
    trainer_side = nccl_engine.NCCLTrainerWeightTransferEngine(client=Client(), source=source)
    trainer_side.model_update_group = "a group"
    trainer_side.send_weights()
    metadata = {"names": ["wide", "narrow"], "dtype_names": ["bfloat16", "int64"], "shapes": [[2, 3], [4]]}
    assert calls == [("start_weight_update",), ("update_weights", metadata), ("finish_weight_update",)]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in sent)


# --- accelerators ---


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize(("way", "accelerators"), [(Way.ipc, 1), (Way.nccl, 2)])
def test_weights_travel_between_accelerators(start_vllm, make_cfg, load_tiny_model, way, accelerators):
    if torch.cuda.device_count() < accelerators:
        pytest.skip(f"needs {accelerators} accelerators")
    config = make_cfg(
        "inference_model.torch_dtype=bfloat16", "inference_model.gpu_memory_utilization=0.3"
    ).inference_model
    place = {"num_gpus": 0, "runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": str(accelerators - 1)}}}
    pool = start_vllm(config, place, weight_backend=way.value, sleeps=way is Way.ipc)
    connect = connect_ipc if way is Way.ipc else connect_nccl(1)
    transport = GpuTransport(pool, connect, torch.bfloat16, timeout=60.0)
    turns = pool.turns = Turns(pool if way is Way.ipc else None)
    turns.to_trainer()
    push_and_probe(pool, transport, load_tiny_model().cuda(), torch.bfloat16)
    assert pool.sample(PROBE, GREEDY, seed=0)[0][0].policy_version == 1
