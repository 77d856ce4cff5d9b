"""`expert_iteration.engine_client`: real actors around an engine that answers what it was asked."""

import json
import os
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import ray
import torch

from expert_iteration import engine_client
from expert_iteration.engine import Completion, Engine, Sampling
from expert_iteration.engine_client import CONCURRENCY_GROUPS, EngineActor, EngineClient, EnginePool
from expert_iteration.packed_weights import PackedWeights
from expert_iteration.remote import ProcessDiedError, Waiting
from expert_iteration.seeds import derive_seed

SAMPLING = Sampling(max_tokens=4, num_samples=2)


class EchoEngine(Engine):
    """A response is: the engine's number, its prompt's first token, the seed.

    A prompt of [-n] takes n tenths of a second, and weights take as long to load as they say.
    """

    def __init__(self, number):
        super().__init__()
        self.number, self.weights = number, {}

    def _sample(self, prompts, sampling, seed):
        time.sleep(max(0, -prompts[0][0]) / 10)
        return [
            [Completion([self.number, ids[0], seed], "stop", self._version)] * sampling.num_samples for ids in prompts
        ]

    def _score(self, sequences):
        return [[self.weights["scale"].item() * token for token in ids] for ids in sequences]

    def _load(self, weights, version):
        self.weights = {name: tensor.clone() for name, tensor in weights.get()}
        time.sleep(self.weights["seconds"].item())


def start(make_engine, *paths):
    return ray.remote(num_cpus=0, concurrency_groups=CONCURRENCY_GROUPS)(EngineActor).remote(make_engine, *paths)


@pytest.fixture(scope="module")
def pool(ray_session):
    pool = EnginePool([EngineClient(start(partial(EchoEngine, number)), f"engine-{number}") for number in range(2)])
    pool.wait_until_ready(print)
    yield pool
    for actor in pool.actors:
        ray.kill(actor)


def pack(scale, seconds=0.0):
    weights = {"scale": torch.tensor(scale), "seconds": torch.tensor(seconds)}
    packed = PackedWeights.allocate(weights.items(), torch.float32)
    packed.pack(weights.items())
    return packed


# --- sampling ---


def test_whole_groups_go_to_the_least_loaded_replica_and_results_keep_the_order_of_prompts(pool):
    prompts = [[1]] * 4 + [[2]] * 2 + [[3]] * 1 + [[4]] * 1 + [[5]] * 4
    groups = pool.sample(prompts, SAMPLING, seed=7)
    assert [completion.token_ids[1] for completion, _ in groups] == [ids[0] for ids in prompts]
    # After the first group engine 1 is the less loaded until both have four; the tie goes to engine 0.
    assert [completion.token_ids[0] for completion, _ in groups] == [0] * 4 + [1] * 2 + [1] + [1] + [0] * 4


def test_each_replica_samples_from_a_seed_of_its_own_and_a_call_repeats(pool):
    prompts = [[1], [2], [3]]
    groups = pool.sample(prompts, SAMPLING, seed=7)
    assert [completion.token_ids[2] for completion, _ in groups] == [derive_seed(7, index) for index in (0, 1, 0)]
    assert pool.sample(prompts, SAMPLING, seed=7) == groups
    assert pool.sample(prompts, SAMPLING, seed=8) != groups


def test_a_replica_that_works_for_another_gets_less(pool):
    other = pool.replicas[0].call("sample", [[-10]] * 3, SAMPLING, 0)  # six responses, a second
    while not pool.replicas[0].health().responses:
        time.sleep(0.01)
    groups = pool.sample([[1]] * 2 + [[2]], SAMPLING, seed=0)  # four and two: with them engine 1 is as loaded
    assert [completion.token_ids[0] for completion, _ in groups] == [1, 1, 1]
    ray.get(other)


def test_replicas_work_at_once(pool):
    with ThreadPoolExecutor() as executor:
        sampled = executor.submit(pool.sample, [[-5], [-6]], SAMPLING, 0)
        at_once = False
        while not sampled.done():
            at_once = at_once or all(replica.health().responses for replica in pool.replicas)
    assert at_once
    assert [completion.token_ids[0] for completion, _ in sampled.result()] == [0, 1]


def test_prompts_may_be_fewer_than_replicas(pool):
    assert len(pool.sample([[1]], SAMPLING, seed=0)) == 1
    assert pool.sample([], SAMPLING, seed=0) == []


def test_the_client_travels_to_other_processes(pool):
    @ray.remote(num_cpus=0)
    def sample(pool):
        return pool.sample([[1], [2]], SAMPLING, 0)

    assert ray.get(sample.remote(pool)) == pool.sample([[1], [2]], SAMPLING, 0)
    assert pickle.loads(pickle.dumps(EnginePool([]))).names == []


# --- waiting, and what is said meanwhile ---


def test_samples_are_waited_for_as_the_pool_was_told(pool):
    said = []
    pool.waiting = Waiting(0.3, said.append, pool.describe)
    try:
        with pytest.raises(TimeoutError, match=r"collection_timeout=0\.3\): engine-0 has been generating for"):
            pool.sample([[-8], [1]], SAMPLING, seed=0)
    finally:
        pool.waiting = None
    while pool.replicas[0].health().responses:  # it goes on
        time.sleep(0.05)


def test_what_the_engines_do_is_described(pool):
    idle = "rewards or the reference are at work (logs/collector.log)"
    assert pool.describe() == f"the engines are idle; {idle}"
    assert EnginePool(pool.replicas[:1]).describe() == f"the engine is idle; {idle}"
    busy = [replica.call("sample", [[-10]], SAMPLING, 0) for replica in pool.replicas]
    while not all(replica.health().responses for replica in pool.replicas):
        time.sleep(0.01)
    zero, one = pool.describe().split("; ")
    assert zero.startswith("engine-0 has been generating for ")
    assert one.endswith(" s (logs/engine-1.log)")
    ray.get(busy)


def test_an_engine_that_does_not_answer_is_described(pool, monkeypatch):
    monkeypatch.setattr(engine_client, "HEALTH_SECONDS", 0.0)
    assert "engine-1 did not answer within 0 s (logs/engine-1.log)" in pool.describe()
    alone = EnginePool([EngineClient(pool.actors[0])])
    assert alone.describe() == "the engine did not answer within 0 s (logs/engine.log)"


class FailingEngine(EchoEngine):
    def __init__(self):
        raise RuntimeError("no such model")


def test_an_engine_that_fails_to_load_is_named(pool):
    actor = start(EchoEngine)  # without its number
    both = EnginePool([pool.replicas[0], EngineClient(actor, "engine-1")])
    with pytest.raises(ProcessDiedError, match=r"engine-1's process has died \(logs/engine-1\.log\)"):
        both.wait_until_ready(print)


def test_the_engines_are_waited_for(pool):
    pool.wait_until_ready(print)


def test_an_engine_is_built_in_its_own_process_which_writes_log_and_timeline(ray_session, tmp_path):
    actor = start(SayingEngine, str(tmp_path / "engine.log"), str(tmp_path / "engine.jsonl"))
    EnginePool([EngineClient(actor)]).sample([[-1]], SAMPLING, seed=0)
    ray.kill(actor)
    pid = re.search(r"built in process (\d+)", (tmp_path / "engine.log").read_text())[1]
    assert int(pid) != os.getpid()
    (span,) = map(json.loads, (tmp_path / "engine.jsonl").read_text().splitlines())
    assert span["activity"] == "generating"


class SayingEngine(EchoEngine):
    def __init__(self):
        print("built in process", os.getpid())
        super().__init__(0)


# --- weights ---


def test_weights_reach_all_replicas_which_score_the_probe_with_them(pool):
    for version, scale in ((1, 2.0), (2, 3.0)):
        reports = pool.offer_weights(pack(scale), version, [[1, 2]], timeout=60.0)
        scores = [[update.version, update.probe_scores] for report in reports for update in report.applied]
        assert scores == [[version, [[scale, 2 * scale]]]] * 2
    assert pool.token_log_probs([[5]]) == [[[15.0]]] * 2
    assert {completion.policy_version for group in pool.sample([[1], [2]], SAMPLING, 0) for completion in group} == {2}


def test_a_busy_replica_does_not_keep_another_from_its_weights(pool):
    pool.offer_weights(pack(1.0), 2, None, timeout=60.0)
    busy = pool.replicas[0].call("sample", [[-10]], SAMPLING, 0)
    while not pool.replicas[0].health().responses:
        time.sleep(0.01)
    first, second = (
        pool.offer_weights(pack(scale), version, None, timeout=60.0) for version, scale in ((3, 2.0), (4, 3.0))
    )
    assert [[len(report.applied) for report in reports] for reports in (first, second)] == [[0, 1], [0, 1]]
    assert [report.superseded for report in second] == [1, 0]
    ((completion, _),) = ray.get(busy)
    assert completion.policy_version == 2
    assert pool.token_log_probs([[1]]) == [[[3.0]]] * 2
    assert [[update.version for update in report.applied] for report in pool.report()] == [[4], []]


def test_the_side_that_is_late_is_named_and_no_other(pool):
    busy = pool.replicas[0].call("sample", [[-20]], SAMPLING, 0)  # takes the offer, to load it afterwards
    while not pool.replicas[0].health().responses:
        time.sleep(0.01)
    with pytest.raises(TimeoutError) as error:
        pool.offer_weights(pack(1.0, seconds=1.5), 5, None, timeout=0.5)
    text = str(error.value)
    assert text.startswith(
        "Weights version 5 left the trainer, but were not taken within weight_update.timeout=0.5 s: engine-1 has been "
        "loading weights for "
    )
    assert "engine-0" not in text
    ray.get(busy)
    pool.offer_weights(pack(1.0), 6, None, timeout=60.0)


def test_a_replica_that_died_is_named_though_another_is_late(pool):
    dead = EngineClient(start(partial(EchoEngine, 2)), "engine-2")
    three = EnginePool([*pool.replicas, dead])
    three.wait_until_ready(print)
    ray.kill(dead.actor)
    with pytest.raises(ProcessDiedError, match="engine-2's process has died"):
        three.offer_weights(pack(1.0, seconds=1.5), 7, None, timeout=0.5)
    pool.token_log_probs([[1]])  # which waits


def test_an_error_while_loading_reaches_the_trainer(pool):
    wrong = PackedWeights.allocate([("noise", torch.zeros(1))], torch.float32)
    with pytest.raises(KeyError, match="seconds"):
        pool.offer_weights(wrong, 8, None, timeout=60.0)
