"""`expert_iteration.weight_update`: what is pushed, when the probe looks, and what it says when it finds something."""

import math
import re

import pytest
import torch
from builders import random_model

from expert_iteration.engine import AppliedUpdate, OfferReport
from expert_iteration.log_probs import token_log_probs
from expert_iteration.lora import adapter_state_dict, add_adapters, load_adapter_state
from expert_iteration.packed_weights import ALIGNMENT
from expert_iteration.policy_reader import PolicyReader
from expert_iteration.weight_transport import PackedTransport
from expert_iteration.weight_update import WeightMismatchError, WeightUpdater

PROBE = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8]]
# Two float32 computations of one model with different batches; the product allows 1e-3.
CLOSE = 1e-5


def make_model(seed=0, tied=True):
    return random_model(20, seed, tie_word_embeddings=tied).eval()


def engine_model(policy):
    """As vLLM holds it: the packed head is a tensor of its own, also where trainer and checkpoint tie it."""
    model = make_model(tied=False)
    model.load_state_dict(policy.state_dict())
    return model


def change(policy, seed=1):
    """What an optimizer step does, more or less."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


class Receiver:
    """An engine, or a pool of one, that really loads: names it does not find stay as they are, as in vLLM.

    A busy one keeps the newest offer until `finish_generation`.
    """

    names = ("engine",)

    def __init__(self, model, busy=False):
        self.model, self.busy = model, busy
        self.received, self.versions, self.timeouts, self.probes = [], [], [], 0
        self.offer, self.applied, self.superseded = None, [], 0

    def offer_weights(self, weights, version, probe, timeout):
        self.timeouts.append(timeout)
        self.superseded += self.offer is not None
        # A copy, for the trainer packs the next weights into the same buffer.
        self.offer = {name: tensor.clone() for name, tensor in weights}, version, probe
        if not self.busy:
            self.apply()
        return self.report()

    def report(self):
        applied, self.applied = self.applied, []
        return [OfferReport(applied, self.superseded)]

    def apply(self):
        (weights, version, probe), self.offer = self.offer, None
        self.received.append(weights)
        self.versions.append(version)
        self.load(weights)
        scores = None if probe is None else self.score(probe)
        self.applied.append(AppliedUpdate(version, 0.25, 0.5, scores))

    def load(self, weights):
        self.model.load_state_dict(weights, strict=False)

    def token_log_probs(self, sequences):
        return [self.score(sequences)]

    @torch.no_grad()
    def score(self, sequences):
        self.probes += 1
        rows = [torch.tensor([sequence]) for sequence in sequences]
        return [token_log_probs(self.model, ids, torch.ones_like(ids))[0].tolist() for ids in rows]


class ForgetfulReader(PolicyReader):
    """Gives no lm_head, as whoever iterates over `named_parameters()` of a tied model."""

    def weights(self, policy):
        return ((name, tensor) for name, tensor in super().weights(policy) if name != "lm_head.weight")


def make_updater(receiver, reader=None, wire_dtype=torch.float32, **options):
    transport = PackedTransport(receiver, wire_dtype)
    return WeightUpdater(receiver, transport, reader or PolicyReader(), **{"probe": PROBE, **options})


@pytest.fixture
def policy():
    return make_model()


@pytest.fixture
def receiver(policy):
    return Receiver(engine_model(policy))


# --- a push ---


@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_state_dict_arrives(tied):
    policy = make_model(tied=tied)
    receiver = Receiver(engine_model(policy))
    updater = make_updater(receiver)
    updater.verify_start(policy)
    change(policy)
    updater.push_weights(policy)
    expected = policy.state_dict()
    (weights,) = receiver.received
    assert weights.keys() == expected.keys() >= {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    for name, tensor in receiver.model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_weights_travel_in_the_dtype_of_the_engine(policy):
    receiver = Receiver(engine_model(policy))
    updater = make_updater(receiver, wire_dtype=torch.bfloat16)
    policy.register_buffer("counts", torch.arange(3))
    updater.push_weights(policy)
    (weights,) = receiver.received
    assert weights.pop("counts").dtype == torch.int64
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


def test_every_push_is_a_new_version_for_engine_and_metrics(policy, receiver):
    updater = make_updater(receiver, timeout=7.0)
    assert (updater.policy_version, updater.pushes) == (0, 0)
    logged = [updater.push_weights(policy)["weights/policy_version"] for _ in range(3)]
    assert (logged, receiver.versions) == ([1.0, 2.0, 3.0], [1, 2, 3])
    assert (updater.policy_version, updater.pushes) == (3, 3)
    assert receiver.timeouts == [7.0] * 3


def test_a_push_reports_how_long_it_took_and_waited(policy, receiver):
    metrics = make_updater(receiver).push_weights(policy)
    assert (metrics["weights/wait_seconds"], metrics["weights/load_seconds"]) == (0.25, 0.5)
    assert metrics["weights/push_seconds"] > 0


def test_the_bytes_of_a_push_are_those_of_the_weights_in_the_dtype_of_the_engine(policy, receiver):
    tensors = {tensor.data_ptr(): tensor.numel() for tensor in policy.state_dict().values()}  # tied ones once
    for dtype in (torch.float32, torch.bfloat16):
        sent = make_updater(receiver, wire_dtype=dtype).push_weights(policy)["weights/bytes"]
        padding = sent - sum(tensors.values()) * dtype.itemsize
        assert 0 <= padding < ALIGNMENT * len(tensors)


class DeafReceiver(Receiver):
    def offer_weights(self, weights, version, probe, timeout):
        raise TimeoutError(f"did not take version {version} within {timeout:g} s")


def test_a_push_that_failed_does_not_count(policy):
    updater = make_updater(DeafReceiver(policy), timeout=3.0)
    with pytest.raises(TimeoutError, match="did not take version 1 within 3 s"):
        updater.push_weights(policy)
    assert (updater.policy_version, updater.pushes) == (0, 0)


def test_a_push_leaves_the_policy_in_the_mode_it_was_in(policy, receiver):
    updater = make_updater(receiver, probe_frequency=1)
    for training in (True, False):
        policy.train(training)
        assert updater.push_weights(policy)["weights/probe_diff"] < CLOSE
        assert policy.training == training


# --- an engine that is busy ---


def test_a_push_to_a_busy_engine_returns_and_what_became_of_it_comes_with_a_later_one(policy, receiver):
    updater = make_updater(receiver)
    updater.verify_start(policy)
    receiver.busy = True
    change(policy)
    first = updater.push_weights(policy)
    assert receiver.received == []
    assert not {"weights/wait_seconds", "weights/engine_version", "weights/probe_diff"} & first.keys()
    assert (first["weights/policy_version"], updater.policy_version) == (1.0, 1)
    receiver.apply()  # its generation is over
    change(policy, seed=2)
    second = updater.push_weights(policy)
    # The probe compared the first push's weights with what the trainer held then, not with what it holds now.
    assert second["weights/probe_diff"] < CLOSE
    assert (second["weights/policy_version"], second["weights/engine_version"]) == (2.0, 1.0)
    assert second["weights/wait_seconds"] == 0.25


def test_the_newest_push_takes_the_place_of_one_that_waits(policy, receiver):
    updater = make_updater(receiver)
    updater.verify_start(policy)
    receiver.busy = True
    superseded = []
    for seed in range(3):
        change(policy, seed)
        superseded.append(updater.push_weights(policy)["weights/superseded"])
    assert superseded == [0.0, 1.0, 2.0]
    receiver.busy = False
    change(policy, seed=4)
    metrics = updater.push_weights(policy)
    assert receiver.versions == [4]
    assert (metrics["weights/engine_version"], metrics["weights/superseded"]) == (4.0, 3.0)
    assert metrics["weights/probe_diff"] < CLOSE


def test_weights_that_a_busy_engine_got_wrong_are_found_at_the_next_push(policy, receiver):
    updater = make_updater(receiver, ForgetfulReader())
    updater.verify_start(policy)
    receiver.busy = True
    change(policy)
    updater.push_weights(policy)
    receiver.apply()
    with pytest.raises(WeightMismatchError, match=r"version 1 of 2.*expected but not sent: lm_head\.weight"):
        updater.push_weights(policy)


def test_the_probe_goes_on_looking_until_an_engine_has_answered(policy, receiver):
    updater = make_updater(receiver)
    updater.verify_start(policy)
    receiver.busy = True
    for seed in range(2):
        change(policy, seed)
        updater.push_weights(policy)
        assert receiver.offer[2] == PROBE
    receiver.apply()
    updater.push_weights(policy)  # brings the answer
    updater.push_weights(policy)
    assert receiver.offer[2] is None


def test_a_probe_that_was_superseded_is_asked_for_again(policy, receiver):
    updater = make_updater(receiver, probe_frequency=2)
    updater.verify_start(policy)
    answered = []
    for number in range(1, 9):  # each generation of the engine spans two pushes
        receiver.busy = number % 2 == 1
        change(policy, number)
        answered.append("weights/probe_diff" in updater.push_weights(policy))
    assert receiver.versions == [2, 4, 6, 8]
    assert answered == [False, True] * 4


def test_what_the_engine_loaded_last_is_checked_at_the_end(policy, receiver):
    updater = make_updater(receiver, ForgetfulReader())
    updater.verify_start(policy)
    receiver.busy = True
    change(policy)
    updater.push_weights(policy)
    assert updater.read_reports() == {}  # it has not been loaded
    receiver.apply()
    with pytest.raises(WeightMismatchError, match="version 1 of 1"):
        updater.read_reports()


# --- when the probe looks ---


def probed(updater, policy, changes):
    """For each push whether the probe ran; the weights change before those marked True."""
    found = []
    for number, changed in enumerate(changes):
        if changed:
            change(policy, seed=number)
        found.append("weights/probe_diff" in updater.push_weights(policy))
    return found


@pytest.mark.parametrize(
    ("frequency", "changes", "expected"),
    [
        (0, [True, True, True], [True, False, False]),
        (0, [False, False, True, True, False], [True, True, True, False, False]),
        (2, [True, True, True, True, True], [True, False, True, False, True]),
        (3, [False, True, False, True, True, True], [True, True, False, False, True, False]),
        (1, [True, True], [True, True]),
    ],
)
def test_the_probe_looks_until_the_weights_have_changed_and_then_every_so_many_pushes(
    policy, receiver, frequency, changes, expected
):
    updater = make_updater(receiver, probe_frequency=frequency)
    assert updater.verify_start(policy)["weights/probe_diff"] < CLOSE
    assert receiver.probes == 1
    assert probed(updater, policy, changes) == expected
    assert receiver.probes == 1 + sum(expected)


def test_a_change_too_small_to_see_does_not_end_the_looking(policy, receiver):
    updater = make_updater(receiver, tolerance=0.05)
    updater.verify_start(policy)
    deaf = receiver.model.state_dict()  # what an engine that ignores every push goes on with
    receiver.load = lambda weights: None
    with pytest.raises(WeightMismatchError):
        push_small_changes(updater, policy, times=200)
    assert all(torch.equal(value, deaf[name]) for name, value in receiver.model.state_dict().items())
    assert updater.pushes > 1


def push_small_changes(updater, policy, times):
    for _ in range(times):
        with torch.no_grad():
            policy.lm_head.weight.mul_(1.01)
        assert "weights/probe_diff" in updater.push_weights(policy)


# --- what it finds ---


def test_an_engine_with_another_model_is_found_at_the_start(policy):
    with pytest.raises(WeightMismatchError):
        make_updater(Receiver(make_model(seed=1))).verify_start(policy)


def test_a_dropped_head_is_found_by_the_first_push_of_changed_weights(policy, receiver):
    updater = make_updater(receiver, ForgetfulReader())
    updater.verify_start(policy)
    updater.push_weights(policy)  # of unchanged weights, where nothing can be seen
    change(policy)
    with pytest.raises(WeightMismatchError, match=r"expected but not sent: lm_head\.weight\.$"):
        updater.push_weights(policy)


def test_the_error_names_the_worst_token_its_log_probs_and_the_tolerance(policy):
    class Stretcher(Receiver):
        """Scores one token 2 lower, and another 1 lower."""

        def score(self, sequences):
            scores = super().score(sequences)
            scores[1][2] -= 2.0
            scores[0][3] -= 1.0
            return scores

    receiver = Stretcher(engine_model(policy))
    trainer = Receiver.score(receiver, PROBE)[1][2]
    updater = make_updater(receiver, tolerance=0.05)
    with pytest.raises(WeightMismatchError) as error:
        updater.verify_start(policy)
    text = str(error.value)
    assert "id 6 at position 2 of probe sequence 1" in text
    in_trainer, in_engine = map(
        float, re.search(r"log-prob (\S+) in the trainer, (\S+) in the engine\.", text).groups()
    )
    # Five digits behind the point.
    assert (in_trainer, in_engine) == pytest.approx((trainer, trainer - 2), abs=2e-5)
    # 2 and 1 apart at two tokens, over all tokens that have a log-prob.
    assert f"differ by {3 / sum(len(ids) - 1 for ids in PROBE):.2g} in the mean" in text
    assert "weight_update.probe_tolerance is 0.05 (engine torch.float32, trainer torch.float32)" in text
    assert "(version 0 of 0)" in text
    assert "expected but not sent: none" in text


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_score_that_is_no_number_is_a_mismatch(policy, value):
    class Broken(Receiver):
        def score(self, sequences):
            scores = super().score(sequences)
            scores[0][1] = value
            return scores

    updater = make_updater(Broken(engine_model(policy)), tolerance=1e9)
    with pytest.raises(WeightMismatchError, match="position 1 of probe sequence 0"):
        updater.verify_start(policy)


def test_weights_that_are_no_numbers_are_a_mismatch_even_if_they_arrive(policy, receiver):
    updater = make_updater(receiver)
    updater.verify_start(policy)
    with torch.no_grad():
        policy.model.norm.weight.fill_(math.nan)
    with pytest.raises(WeightMismatchError, match=r"differ by inf in the mean.*nan in the trainer, nan in the engine"):
        updater.push_weights(policy)


@pytest.mark.parametrize(
    ("wire", "autocast", "tolerance"),
    [
        (torch.float32, None, 1e-4),
        (torch.float32, torch.bfloat16, 0.05),
        (torch.bfloat16, None, 0.05),
        (torch.float16, None, 0.02),
        (torch.float16, torch.bfloat16, 0.05),
    ],
)
def test_the_tolerance_is_that_of_the_coarser_dtype_unless_given(receiver, wire, autocast, tolerance):
    reader = PolicyReader(autocast)
    assert make_updater(receiver, reader, wire).tolerance == tolerance
    assert make_updater(receiver, reader, wire, tolerance=0.01).tolerance == 0.01


def test_the_trainer_scores_the_probe_as_it_trains(policy, receiver):
    policy.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    seen: list[torch.dtype] = []
    make_updater(receiver, PolicyReader(torch.bfloat16)).verify_start(policy)
    assert set(seen) == {torch.bfloat16}


# --- adapters alone ---


@pytest.fixture
def lora(make_cfg):
    return make_cfg("train_model.lora.enabled=true").train_model.lora


class AdaptedReceiver(Receiver):
    def load(self, weights):
        load_adapter_state(self.model, adapter_state_dict(self.model) | weights)


def change_adapters(policy):
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3)


def test_adapters_travel_alone_if_they_are_to(policy, lora):
    # The engine's adapters begin as others, and do nothing, as the policy's.
    receiver, policy = AdaptedReceiver(add_adapters(make_model(), lora, seed=5)), add_adapters(policy, lora, seed=0)
    updater = make_updater(receiver, adapters_only=True)
    assert updater.verify_start(policy)["weights/probe_diff"] < CLOSE
    change_adapters(policy)
    assert updater.push_weights(policy)["weights/probe_diff"] < CLOSE
    (weights,) = receiver.received
    assert weights.keys() == adapter_state_dict(policy).keys()


@pytest.mark.parametrize(
    ("adapters_only", "dropped", "message"),
    [
        (True, "lora_B.weight", r"not sent: base_model\.model\.model\.layers\.0\.mlp\.down_proj\.lora_B\.weight, base"),
        (
            False,
            "up_proj.weight",
            r"not sent: model\.layers\.0\.mlp\.up_proj\.weight, model\.layers\.1\.mlp\.up_proj\.weight\.$",
        ),
    ],
)
def test_of_a_policy_with_adapters_too_the_error_names_what_was_not_sent(policy, lora, adapters_only, dropped, message):
    class Careless(PolicyReader):
        def weights(self, policy):
            return (item for item in super().weights(policy) if not item[0].endswith(dropped))

        def adapters(self, policy):
            return (item for item in super().adapters(policy) if not item[0].endswith(dropped))

    if adapters_only:
        receiver = AdaptedReceiver(add_adapters(make_model(), lora, seed=5))
    else:
        receiver = Receiver(engine_model(policy))
    policy = add_adapters(policy, lora, seed=0)
    updater = make_updater(receiver, Careless(), adapters_only=adapters_only)
    updater.verify_start(policy)
    change_adapters(policy)
    with pytest.raises(WeightMismatchError, match=message):
        updater.push_weights(policy)


# --- several replicas ---


class Pool:
    """Receivers as an `EnginePool` has them."""

    def __init__(self, *receivers):
        self.receivers = receivers
        self.names = [f"engine-{index}" for index in range(len(receivers))]

    def offer_weights(self, *offer):
        return [report for receiver in self.receivers for report in receiver.offer_weights(*offer)]

    def report(self):
        return [report for receiver in self.receivers for report in receiver.report()]

    def token_log_probs(self, sequences):
        return [scores for receiver in self.receivers for scores in receiver.token_log_probs(sequences)]


@pytest.fixture
def pool(policy):
    return Pool(Receiver(engine_model(policy)), Receiver(engine_model(policy)))


def test_a_push_reaches_every_replica_and_says_which_version_each_has(policy, pool):
    updater = make_updater(pool)
    assert updater.verify_start(policy)["weights/probe_diff"] < CLOSE
    change(policy)
    first = updater.push_weights(policy)
    assert first["weights/probe_diff"] < CLOSE
    assert [receiver.versions for receiver in pool.receivers] == [[1], [1]]
    pool.receivers[1].busy = True
    second = updater.push_weights(policy)
    versions = {name: value for name, value in second.items() if name.startswith("weights/engine_version")}
    expected = {"weights/engine_version": 1.0, "weights/engine_version/0": 2.0, "weights/engine_version/1": 1.0}
    assert versions == expected
    pool.receivers[1].apply()
    caught_up = updater.read_reports()
    assert caught_up["weights/engine_version"] == caught_up["weights/engine_version/1"] == 2.0


def test_of_several_replicas_the_slowest_and_the_most_superseded_count(policy, pool):
    updater = make_updater(pool)
    slow = pool.receivers[1]
    slow.busy = True
    for _ in range(3):
        updater.push_weights(policy)
    slow.apply()
    slow.applied[0] = slow.applied[0]._replace(wait_seconds=9.0)
    metrics = updater.push_weights(policy)
    assert metrics["weights/superseded"] == 2.0
    assert (metrics["weights/wait_seconds"], metrics["weights/load_seconds"]) == (9.0, 0.5)


def test_a_replica_with_other_weights_is_named(policy):
    pool = Pool(Receiver(engine_model(policy)), Receiver(make_model(seed=1)))
    with pytest.raises(WeightMismatchError, match=r"^engine-1 does not hold the trainer's weights \(version 0 of 0\)"):
        make_updater(pool).verify_start(policy)


def test_a_replica_that_ignores_a_push_is_named_though_another_took_it(policy, pool):
    updater = make_updater(pool)
    updater.verify_start(policy)
    pool.receivers[1].load = lambda weights: None
    change(policy)
    with pytest.raises(WeightMismatchError, match=r"^engine-1 .* \(version 1 of 1\)"):
        updater.push_weights(policy)


def test_the_probe_goes_on_until_every_replica_has_answered(policy, pool):
    updater = make_updater(pool)
    updater.verify_start(policy)
    late = pool.receivers[1]
    late.busy = True
    for seed in range(2):
        change(policy, seed)
        assert updater.push_weights(policy)["weights/probe_diff"] < CLOSE  # of the other
        assert late.offer[2] == PROBE
    late.apply()
    assert updater.push_weights(policy)["weights/probe_diff"] < CLOSE
    late.apply()  # loaded, and answered, after this call
    updater.push_weights(policy)
    assert late.offer[2] is None
