"""`expert_iteration.weight_update`: what is pushed, when the probe looks, and what it says when it finds something."""

import math
import re
from pathlib import Path

import pytest
import torch
from builders import random_model

from expert_iteration.engine import AppliedUpdate, OfferReport
from expert_iteration.log_probs import token_log_probs
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
    """An engine that really loads the file: names it does not find stay as they are, as in vLLM.

    A busy one keeps the newest offer until `finish_generation`.
    """

    def __init__(self, model, busy=False):
        self.model, self.busy = model, busy
        self.received, self.versions, self.timeouts, self.probes = [], [], [], 0
        self.offer, self.applied, self.superseded = None, [], 0

    def offer_weights(self, update_info, version, probe, timeout):
        self.timeouts.append(timeout)
        if self.offer is not None:
            Path(self.offer[0]["path"]).unlink()
            self.superseded += 1
        self.offer = update_info, version, probe
        if not self.busy:
            self.apply()
        return self.report()

    def report(self):
        applied, self.applied = self.applied, []
        return OfferReport(applied, self.superseded)

    def apply(self):
        (update_info, version, probe), self.offer = self.offer, None
        weights = torch.load(update_info["path"], weights_only=True)
        Path(update_info["path"]).unlink()
        self.received.append(weights)
        self.versions.append(version)
        self.load(weights)
        scores = None if probe is None else self.token_log_probs(probe)
        self.applied.append(AppliedUpdate(version, 0.25, 0.5, scores))

    def load(self, weights):
        self.model.load_state_dict(weights, strict=False)

    @torch.no_grad()
    def token_log_probs(self, sequences):
        self.probes += 1
        rows = [torch.tensor([sequence]) for sequence in sequences]
        return [token_log_probs(self.model, ids, torch.ones_like(ids))[0].tolist() for ids in rows]


class ForgetfulUpdater(WeightUpdater):
    """Sends no lm_head, as whoever iterates over `named_parameters()` of a tied model."""

    def _weights(self, policy):
        return {name: tensor for name, tensor in super()._weights(policy).items() if name != "lm_head.weight"}


def make_updater(receiver, directory, kind=WeightUpdater, **options):
    return kind(receiver, **{"probe": PROBE, "directory": directory, "wire_dtype": torch.float32, **options})


@pytest.fixture
def policy():
    return make_model()


@pytest.fixture
def receiver(policy):
    return Receiver(engine_model(policy))


# --- a push ---


@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_state_dict_arrives(tmp_path, tied):
    policy = make_model(tied=tied)
    receiver = Receiver(engine_model(policy))
    updater = make_updater(receiver, tmp_path)
    updater.verify_start(policy)
    change(policy)
    updater.push_weights(policy)
    expected = policy.state_dict()
    (weights,) = receiver.received
    assert weights.keys() == expected.keys() >= {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    for name, tensor in receiver.model.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_weights_travel_in_the_dtype_of_the_engine(policy, tmp_path):
    receiver = Receiver(engine_model(policy))
    updater = make_updater(receiver, tmp_path, wire_dtype=torch.bfloat16)
    policy.register_buffer("counts", torch.arange(3))
    updater.push_weights(policy)
    (weights,) = receiver.received
    assert weights.pop("counts").dtype == torch.int64
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}


def test_every_push_is_a_new_version_for_engine_and_metrics(policy, receiver, tmp_path):
    updater = make_updater(receiver, tmp_path, timeout=7.0)
    assert (updater.policy_version, updater.pushes) == (0, 0)
    logged = [updater.push_weights(policy)["weights/policy_version"] for _ in range(3)]
    assert (logged, receiver.versions) == ([1.0, 2.0, 3.0], [1, 2, 3])
    assert (updater.policy_version, updater.pushes) == (3, 3)
    assert receiver.timeouts == [7.0] * 3


def test_a_push_reports_how_long_it_took_and_waited(policy, receiver, tmp_path):
    metrics = make_updater(receiver, tmp_path).push_weights(policy)
    assert (metrics["weights/wait_seconds"], metrics["weights/load_seconds"]) == (0.25, 0.5)
    assert metrics["weights/push_seconds"] > 0


def test_nothing_stays_in_the_directory(policy, receiver, tmp_path):
    updater = make_updater(receiver, tmp_path)
    updater.push_weights(policy)
    assert list(tmp_path.iterdir()) == []


class DeafReceiver(Receiver):
    def offer_weights(self, update_info, version, probe, timeout):
        assert Path(update_info["path"]).exists()
        raise TimeoutError(f"did not take version {version} within {timeout:g} s")


def test_a_push_that_failed_does_not_count_and_leaves_no_file(policy, tmp_path):
    updater = make_updater(DeafReceiver(policy), tmp_path, timeout=3.0)
    with pytest.raises(TimeoutError, match="did not take version 1 within 3 s"):
        updater.push_weights(policy)
    assert list(tmp_path.iterdir()) == []
    assert (updater.policy_version, updater.pushes) == (0, 0)


def test_a_push_leaves_the_policy_in_the_mode_it_was_in(policy, receiver, tmp_path):
    updater = make_updater(receiver, tmp_path, probe_frequency=1)
    for training in (True, False):
        policy.train(training)
        assert updater.push_weights(policy)["weights/probe_diff"] < CLOSE
        assert policy.training == training


# --- an engine that is busy ---


def test_a_push_to_a_busy_engine_returns_and_what_became_of_it_comes_with_a_later_one(policy, receiver, tmp_path):
    updater = make_updater(receiver, tmp_path)
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


def test_the_newest_push_takes_the_place_of_one_that_waits(policy, receiver, tmp_path):
    updater = make_updater(receiver, tmp_path)
    updater.verify_start(policy)
    receiver.busy = True
    superseded = []
    for seed in range(3):
        change(policy, seed)
        superseded.append(updater.push_weights(policy)["weights/superseded"])
        assert len(list(tmp_path.iterdir())) == 1
    assert superseded == [0.0, 1.0, 2.0]
    receiver.busy = False
    change(policy, seed=4)
    metrics = updater.push_weights(policy)
    assert receiver.versions == [4]
    assert (metrics["weights/engine_version"], metrics["weights/superseded"]) == (4.0, 3.0)
    assert metrics["weights/probe_diff"] < CLOSE


def test_weights_that_a_busy_engine_got_wrong_are_found_at_the_next_push(policy, receiver, tmp_path):
    updater = make_updater(receiver, tmp_path, ForgetfulUpdater)
    updater.verify_start(policy)
    receiver.busy = True
    change(policy)
    updater.push_weights(policy)
    receiver.apply()
    with pytest.raises(WeightMismatchError, match=r"version 1 of 2.*expected but not sent: lm_head\.weight"):
        updater.push_weights(policy)


def test_the_probe_goes_on_looking_until_an_engine_has_answered(policy, receiver, tmp_path):
    updater = make_updater(receiver, tmp_path)
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


def test_a_probe_that_was_superseded_is_asked_for_again(policy, receiver, tmp_path):
    updater = make_updater(receiver, tmp_path, probe_frequency=2)
    updater.verify_start(policy)
    answered = []
    for number in range(1, 9):  # each generation of the engine spans two pushes
        receiver.busy = number % 2 == 1
        change(policy, number)
        answered.append("weights/probe_diff" in updater.push_weights(policy))
    assert receiver.versions == [2, 4, 6, 8]
    assert answered == [False, True] * 4


def test_what_the_engine_loaded_last_is_checked_at_the_end(policy, receiver, tmp_path):
    updater = make_updater(receiver, tmp_path, ForgetfulUpdater)
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
    policy, receiver, tmp_path, frequency, changes, expected
):
    updater = make_updater(receiver, tmp_path, probe_frequency=frequency)
    assert updater.verify_start(policy)["weights/probe_diff"] < CLOSE
    assert receiver.probes == 1
    assert probed(updater, policy, changes) == expected
    assert receiver.probes == 1 + sum(expected)


def test_a_change_too_small_to_see_does_not_end_the_looking(policy, receiver, tmp_path):
    updater = make_updater(receiver, tmp_path, tolerance=0.05)
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


def test_an_engine_with_another_model_is_found_at_the_start(policy, tmp_path):
    with pytest.raises(WeightMismatchError):
        make_updater(Receiver(make_model(seed=1)), tmp_path).verify_start(policy)


def test_a_dropped_head_is_found_by_the_first_push_of_changed_weights(policy, receiver, tmp_path):
    updater = make_updater(receiver, tmp_path, ForgetfulUpdater)
    updater.verify_start(policy)
    updater.push_weights(policy)  # of unchanged weights, where nothing can be seen
    change(policy)
    with pytest.raises(WeightMismatchError, match=r"expected but not sent: lm_head\.weight\.$"):
        updater.push_weights(policy)


def test_the_error_names_the_worst_token_its_log_probs_and_the_tolerance(policy, tmp_path):
    class Stretcher(Receiver):
        """Scores one token 2 lower, and another 1 lower."""

        def token_log_probs(self, sequences):
            scores = super().token_log_probs(sequences)
            scores[1][2] -= 2.0
            scores[0][3] -= 1.0
            return scores

    receiver = Stretcher(engine_model(policy))
    trainer = Receiver.token_log_probs(receiver, PROBE)[1][2]
    updater = make_updater(receiver, tmp_path, tolerance=0.05)
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
def test_a_score_that_is_no_number_is_a_mismatch(policy, tmp_path, value):
    class Broken(Receiver):
        def token_log_probs(self, sequences):
            scores = super().token_log_probs(sequences)
            scores[0][1] = value
            return scores

    updater = make_updater(Broken(engine_model(policy)), tmp_path, tolerance=1e9)
    with pytest.raises(WeightMismatchError, match="position 1 of probe sequence 0"):
        updater.verify_start(policy)


def test_weights_that_are_no_numbers_are_a_mismatch_even_if_they_arrive(policy, receiver, tmp_path):
    updater = make_updater(receiver, tmp_path)
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
def test_the_tolerance_is_that_of_the_coarser_dtype_unless_given(receiver, tmp_path, wire, autocast, tolerance):
    options = {"wire_dtype": wire, "autocast_dtype": autocast}
    assert make_updater(receiver, tmp_path, **options).tolerance == tolerance
    assert make_updater(receiver, tmp_path, **options, tolerance=0.01).tolerance == 0.01


def test_the_trainer_scores_the_probe_as_it_trains(policy, receiver, tmp_path):
    policy.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    seen: list[torch.dtype] = []
    make_updater(receiver, tmp_path, autocast_dtype=torch.bfloat16).verify_start(policy)
    assert set(seen) == {torch.bfloat16}
