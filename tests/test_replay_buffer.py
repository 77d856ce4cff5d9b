"""The buffer of expert responses, in this process and behind Ray as `ei_utils` builds it."""

import io
from itertools import chain, pairwise

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data import LazyStackStorage

import ei_utils
from expert_iteration.replay_buffer import BufferReader, ExpertReplayBuffer
from expert_iteration.sampler import RewardPrioritizedPass, RewardPrioritizedSampler
from expert_iteration.seeds import derive_seed
from expert_iteration.sizes import derive_sizes

BATCH = 3
DEFAULTS = {"alpha": 0.8, "epsilon": 1e-6}  # as in config/base.yaml


def make_rows(*names, version=0):
    """Ragged rows: number n has reward n, and n + 1 response tokens."""
    return lazy_stack(
        [
            TensorDict(
                {
                    "policy_version": torch.tensor(version),
                    ("tokens", "response"): torch.arange(name + 1),
                    ("tokens", "full"): torch.arange(name + 3),
                    ("next", "reward"): torch.tensor([float(name)]),
                    ("text", "response"): f"text {name}",
                }
            )
            for name in names
        ]
    )


def make_buffer(seed=0, capacity=10, kind=RewardPrioritizedPass, **options):
    return ExpertReplayBuffer(
        storage=LazyStackStorage(capacity),
        sampler=kind(capacity, **DEFAULTS | options),
        batch_size=BATCH,
        capacity=capacity,
        seed=seed,
    )


def make_drawn_buffer(**options):
    """A buffer as in async mode: drawn with replacement, the least reward not too rarely."""
    return make_buffer(kind=RewardPrioritizedSampler, **{"epsilon": 0.2} | options)


def name_of(row):
    return int(row["next", "reward"])


def names(batch):
    return [name_of(row) for row in batch.unbind(0)]


def one_pass(buffer):
    """The rows of each batch in one pass over the buffer."""
    return [names(batch) for batch in buffer]


def one_pass_by_next(buffer):
    """The same through `next`, which is how a client in another process iterates."""
    batches = []
    while (batch := buffer.next()) is not None:
        batches.append(names(batch))
    return batches


def every_row(batches):
    return sorted(chain.from_iterable(batches))


@pytest.mark.parametrize("run", [one_pass, one_pass_by_next])
def test_a_pass_gives_every_row_once_and_the_last_batch_is_smaller(run):
    buffer = make_buffer()
    buffer.extend(make_rows(*range(7)))
    for _ in range(3):
        batches = run(buffer)
        assert [len(batch) for batch in batches] == [3, 3, 1]
        assert every_row(batches) == list(range(7))


def test_every_pass_has_another_order_and_a_seed_repeats_them():
    first, second, other = (make_buffer(seed) for seed in (1, 1, 2))
    for buffer in (first, second, other):
        buffer.extend(make_rows(*range(10)))
    passes = [one_pass(first) for _ in range(4)]
    assert all(one != other for one, other in pairwise(passes))
    assert [one_pass(second) for _ in range(4)] == passes
    assert [one_pass(other) for _ in range(4)] != passes


@pytest.mark.parametrize("run", [one_pass, one_pass_by_next])
def test_a_pass_over_an_empty_buffer_is_over_at_once(run):
    buffer = make_buffer()
    assert run(buffer) == []
    buffer.extend(make_rows(0, 1))
    assert every_row(run(buffer)) == [0, 1]
    buffer.empty()
    assert run(buffer) == []
    buffer.extend(make_rows(5))
    assert run(buffer) == [[5]]


def test_emptying_ends_a_pass_that_was_broken_off():
    buffer = make_buffer()
    buffer.extend(make_rows(*range(7)))
    assert len(names(buffer.next())) == BATCH
    buffer.empty()
    assert buffer.next() is None
    buffer.extend(make_rows(*range(7)))
    assert [len(batch) for batch in one_pass_by_next(buffer)] == [3, 3, 1]


def test_what_is_trained_of_a_row_comes_back_as_it_was_written_and_the_rest_stays():
    buffer = make_buffer()
    buffer.extend(make_rows(4, 2))
    (batch,) = buffer
    for row in batch.unbind(0):
        assert row["tokens", "full"].tolist() == list(range(name_of(row) + 3))
        assert set(row.keys(True, True)) == {("tokens", "full"), ("next", "reward"), "policy_version"}
    for row in buffer[:].unbind(0):
        assert row["text", "response"] == f"text {name_of(row)}"


def test_what_is_done_to_a_batch_does_not_reach_the_buffer():
    buffer = make_buffer()
    buffer.extend(make_rows(4))
    (batch,) = buffer
    batch[0]["tokens", "full"].zero_()
    (again,) = buffer
    assert again[0]["tokens", "full"].tolist() == list(range(7))


@pytest.mark.parametrize("run", [one_pass, one_pass_by_next])
def test_rows_added_between_passes_belong_to_the_next(run):
    buffer = make_buffer()
    buffer.extend(make_rows(0, 1))
    assert every_row(run(buffer)) == [0, 1]
    buffer.extend(make_rows(2, 3))
    assert every_row(run(buffer)) == [0, 1, 2, 3]


@pytest.mark.parametrize(("asked", "kept"), [({}, 0.0), ({"empty_write_count": False}, 4.0)])
def test_emptying_keeps_the_count_of_all_writes_when_asked(asked, kept):
    buffer = make_buffer()
    buffer.extend(make_rows(0, 1, 2, 3))
    buffer.empty(**asked)
    assert len(buffer) == 0
    assert buffer.write_count == buffer.statistics()["buffer/write_count"] == kept


def test_statistics_are_of_what_is_stored_and_count_all_writes():
    buffer = make_buffer(capacity=4)
    assert buffer.statistics() == {"buffer/size": 0.0, "buffer/write_count": 0.0, "buffer/dropped_too_old": 0.0}
    buffer.extend(make_rows(1, 2, 6))
    # Rewards 1, 2, 6; lengths 2, 3, 7.
    assert buffer.statistics() == {
        "buffer/size": 3.0,
        "buffer/write_count": 3.0,
        "buffer/dropped_too_old": 0.0,
        "buffer/reward": 3.0,
        "buffer/response_length": 4.0,
    }


def test_statistics_follow_what_is_overwritten():
    buffer = make_buffer(capacity=4)
    buffer.extend(make_rows(1, 2, 6))
    buffer.extend(make_rows(20, 30, 40))  # the fourth slot, then the first and second: 6 stays
    assert every_row(one_pass(buffer)) == [6, 20, 30, 40]
    figures = buffer.statistics()
    assert (figures["buffer/size"], figures["buffer/write_count"]) == (4.0, 6.0)
    assert (figures["buffer/reward"], figures["buffer/response_length"]) == (24.0, 25.0)


def test_statistics_forget_what_was_emptied():
    buffer = make_buffer(capacity=4)
    buffer.extend(make_rows(10, 20, 30, 40))
    buffer.empty(empty_write_count=False)
    assert buffer.statistics() == {"buffer/size": 0.0, "buffer/write_count": 4.0, "buffer/dropped_too_old": 0.0}
    buffer.extend(make_rows(2))
    assert buffer.statistics() == {
        "buffer/size": 1.0,
        "buffer/write_count": 5.0,
        "buffer/dropped_too_old": 0.0,
        "buffer/reward": 2.0,
        "buffer/response_length": 3.0,
    }


def test_of_more_rows_than_there_is_room_for_the_last_stay():
    buffer = make_drawn_buffer(capacity=4, alpha=100.0)  # only the greatest reward is ever drawn
    buffer.extend(make_rows(9, 8, 7, 1, 2, 3))  # 2 and 3 in the slots of 9 and 8
    assert sorted(names(buffer[:])) == [1, 2, 3, 7]
    assert set(names(buffer.draw(0))) == {7}
    assert buffer.statistics()["buffer/reward"] == (1 + 2 + 3 + 7) / 4


def test_a_row_may_be_added_alone():
    buffer = make_buffer()
    assert [buffer.add(make_rows(name)[0]) for name in (4, 2)] == [0, 1]
    assert every_row(one_pass(buffer)) == [2, 4]


def test_a_higher_reward_comes_sooner_in_a_pass():
    buffer, positions = make_buffer(), []
    buffer.extend(make_rows(*range(10)))
    for _ in range(50):
        order = list(chain.from_iterable(one_pass(buffer)))
        positions.append([order.index(name) for name in range(10)])
    means = torch.tensor(positions, dtype=torch.float).mean(0)
    # One comes behind another in proportion to their priorities, which sums up to 6.2 and 2.7 for rewards 1 and 9; the
    # standard deviation of the difference of two means of 50 passes is 0.5.
    assert means[0] == 9.0
    assert means[1] > means[9] + 2


# --- drawing ---


def test_a_draw_is_a_micro_batch_of_rows_as_they_were_written():
    buffer = make_drawn_buffer()
    buffer.extend(make_rows(1, 5))
    batches = [buffer.draw(0) for _ in range(50)]
    assert {len(batch) for batch in batches} == {BATCH}
    rows = list(chain.from_iterable(batch.unbind(0) for batch in batches))
    assert {name_of(row) for row in rows} == {1, 5}
    for row in rows:
        assert len(row["tokens", "full"]) == name_of(row) + 3
        assert "importance_weight" not in row


def test_drawn_rows_carry_their_importance_weight_and_stored_ones_do_not():
    buffer = make_drawn_buffer(beta=1.0, alpha=1.0)
    buffer.extend(make_rows(1, 5))  # heights 1.8 and 5.8
    found = {}
    for _ in range(50):
        batch = buffer.draw(0)
        assert batch["importance_weight"].shape == (BATCH,)
        found |= {name_of(row): row["importance_weight"].item() for row in batch.unbind(0)}
    assert found == pytest.approx({1: 1.0, 5: 1.8 / 5.8})
    assert all("importance_weight" not in row for row in buffer[:].unbind(0))


def test_of_an_empty_buffer_nothing_is_drawn():
    buffer = make_drawn_buffer()
    assert buffer.draw(0) is None
    buffer.extend(make_rows(1))
    assert names(buffer.draw(0)) == [1] * BATCH
    buffer.empty()
    assert buffer.draw(0) is None


# --- age ---


def buffer_of_three_ages(**options):
    """Rows 0 and 1 of policy version 0, row 2 of version 1, rows 3 and 4 of version 2."""
    buffer = make_drawn_buffer(**options)
    for version, new in enumerate([(0, 1), (2,), (3, 4)]):
        buffer.extend(make_rows(*new, version=version))
    return buffer


def test_what_is_too_old_is_never_drawn_again():
    buffer = buffer_of_three_ages(alpha=0.0)
    for min_version, expected in [(0, {0, 1, 2, 3, 4}), (1, {2, 3, 4}), (2, {3, 4}), (0, {3, 4})]:
        drawn = chain.from_iterable(names(buffer.draw(min_version)) for _ in range(50))
        assert set(drawn) == expected
        assert len(buffer) == len(expected)
    assert buffer.draw(3) is None
    assert len(buffer) == 0


def test_what_is_too_old_is_counted_once_and_in_no_other_statistic():
    buffer = buffer_of_three_ages()
    assert [buffer.evict_older_than(version) for version in (1, 1, 2, 0)] == [2, 0, 1, 0]
    # Rewards 3, 4; lengths 4, 5.
    assert buffer.statistics() == {
        "buffer/size": 2.0,
        "buffer/write_count": 5.0,
        "buffer/dropped_too_old": 3.0,
        "buffer/reward": 3.5,
        "buffer/response_length": 4.5,
    }
    buffer.empty(empty_write_count=False)
    assert buffer.statistics()["buffer/dropped_too_old"] == 3.0
    buffer.empty()
    assert buffer.statistics()["buffer/dropped_too_old"] == 0.0


def test_a_row_that_is_too_old_when_it_is_written_is_evicted_too():
    buffer = buffer_of_three_ages()
    assert len(buffer.draw(2)) == BATCH
    buffer.extend(make_rows(7, version=1))
    buffer.extend(make_rows(8, version=3))
    assert buffer.evict_older_than(2) == 1
    assert buffer.statistics()["buffer/reward"] == (3 + 4 + 8) / 3


def test_the_place_of_what_was_too_old_is_taken_by_new_rows():
    buffer = buffer_of_three_ages(capacity=5, alpha=0.0)
    buffer.evict_older_than(2)
    buffer.extend(make_rows(7, 8, version=3))  # the slots of 0 and 1; that of 2 stays dropped
    assert set(chain.from_iterable(names(buffer.draw(0)) for _ in range(50))) == {3, 4, 7, 8}
    assert buffer.statistics()["buffer/reward"] == (3 + 4 + 7 + 8) / 4


def test_rows_that_age_during_a_pass_are_left_out_of_it():
    buffer = make_buffer()
    buffer.extend(make_rows(*range(5), version=0))
    buffer.extend(make_rows(*range(5, 10), version=1))
    seen = names(buffer.next())
    buffer.evict_older_than(1)
    rest = one_pass_by_next(buffer)
    assert every_row(rest) == sorted({5, 6, 7, 8, 9} - set(seen))
    assert every_row(one_pass(buffer)) == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(("max_age", "expected"), [(0, {3, 4}), (1, {2, 3, 4}), (2, {0, 1, 2, 3, 4})])
def test_a_reader_samples_what_is_at_most_so_many_versions_old(max_age, expected):
    reader = BufferReader(buffer_of_three_ages(alpha=0.0), max_policy_age=max_age, policy_version=lambda: 2)
    assert set(chain.from_iterable(names(reader.sample()) for _ in range(50))) == expected


def test_a_reader_follows_the_policy():
    pushed = []
    reader = BufferReader(buffer_of_three_ages(), max_policy_age=1, policy_version=lambda: len(pushed))
    for size, dropped in [(5, 0.0), (5, 0.0), (3, 2.0), (2, 3.0), (0, 5.0)]:
        assert len(reader) == size
        assert (reader.sample() is not None) == (size > 0)
        assert reader.statistics()["buffer/dropped_too_old"] == dropped
        pushed.append("weights")


def test_a_reader_without_a_limit_drops_nothing():
    reader = BufferReader(buffer_of_three_ages(), max_policy_age=None, policy_version=lambda: 1000)
    assert reader.sample() is not None
    assert len(reader) == 5
    assert reader.statistics()["buffer/dropped_too_old"] == 0.0


def test_a_readers_pass_is_over_what_is_not_too_old():
    buffer = make_buffer()
    buffer.extend(make_rows(0, 1, version=0))
    buffer.extend(make_rows(2, 3, 4, 5, version=1))
    reader = BufferReader(buffer, max_policy_age=2, policy_version=lambda: 3)
    for _ in range(2):
        batches = [names(batch) for batch in reader]
        assert [len(batch) for batch in batches] == [3, 1]
        assert every_row(batches) == [2, 3, 4, 5]
    reader.empty(empty_write_count=False)
    assert list(reader) == []
    assert reader.statistics()["buffer/write_count"] == 6.0


# --- state ---


def saved_and_loaded(state):
    """Through a file's bytes, and only types that `torch.load` trusts."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def go_on(buffer):
    """What a buffer gives from here on, also once more is written."""
    batches = [names(buffer.next()) for _ in range(2)]
    buffer.evict_older_than(1)
    buffer.extend(make_rows(20, 21, version=2))
    return [*batches, *(names(buffer.draw(2)) for _ in range(5)), buffer.statistics(), names(buffer[:])]


@pytest.mark.parametrize("make", [make_buffer, make_drawn_buffer])
def test_a_restored_buffer_goes_on_as_the_saved_one_would_have(make):
    buffer = make(capacity=8)
    buffer.extend(make_rows(*range(5), version=0))
    buffer.extend(make_rows(*range(5, 12), version=2))  # over the first four
    assert buffer.evict_older_than(1) == 1
    buffer.next()  # for passes: the state is that of the middle of one
    state = saved_and_loaded(buffer.state_dict())
    restored = make(seed=9, capacity=8)
    restored.extend(make_rows(30))
    restored.next()
    restored.load_state_dict(state)
    for row, original in zip(restored[:].unbind(0), buffer[:].unbind(0), strict=True):
        assert row["text", "response"] == original["text", "response"] == f"text {name_of(original)}"
        assert row["tokens", "response"].tolist() == original["tokens", "response"].tolist()
        assert row["policy_version"] == original["policy_version"]
    assert go_on(restored) == go_on(buffer)


def test_a_buffer_restored_between_passes_begins_the_next_whatever_it_was_in_the_middle_of():
    buffer, restored = make_buffer(), make_buffer()
    for other in (buffer, restored):
        other.extend(make_rows(*range(7)))
    one_pass_by_next(buffer)
    restored.next()
    restored.load_state_dict(buffer.state_dict())
    assert every_row(one_pass_by_next(restored)) == list(range(7))


def test_a_response_that_grows_too_old_in_the_middle_of_a_pass_is_not_seen():
    buffer, version = make_buffer(), [1]
    reader = BufferReader(buffer, max_policy_age=1, policy_version=lambda: version[0])
    buffer.extend(make_rows(*range(6), version=0))
    buffer.extend(make_rows(6, 7, 8, version=1))
    ages = []
    for batch in reader:  # weights are pushed after each step
        ages += [version[0] - int(row["policy_version"]) for row in batch.unbind(0)]
        version[0] += 1
    assert set(ages) <= {0, 1}
    assert 3 <= len(ages) < 9
    # After the first step's push the six of version 0 are too old, in whatever order the pass would have had them.
    assert reader.statistics()["buffer/dropped_too_old"] >= 6


# --- as configured ---


@pytest.mark.parametrize(
    ("override", "alpha"), [("", 0.8), ("train.prioritized_sampling=false", 0.0), ("train.selection=random", 0.0)]
)
def test_the_configuration_decides_how_the_synchronous_buffer_passes(make_cfg, override, alpha):
    cfg = make_cfg(*filter(None, ["train.prioritized_sampling_epsilon=0.01", override]))
    sampler = ei_utils.make_sampler(cfg, 12)()
    assert type(sampler) is RewardPrioritizedPass
    assert (sampler.alpha, sampler.epsilon, sampler.beta, len(sampler.live)) == (alpha, 0.01, 0.0, 12)


@pytest.mark.parametrize(
    ("overrides", "alpha", "beta"),
    [
        (["train.prioritized_sampling_alpha=0.7", "train.prioritized_sampling_beta=0.3"], 0.7, 0.3),
        (["train.prioritized_sampling=false"], 0.0, 0.0),
        (["train.selection=random"], 0.0, 0.0),  # drawn by reward the control would learn
    ],
)
def test_the_configuration_decides_how_the_asynchronous_buffer_draws(make_cfg, overrides, alpha, beta):
    sampler = ei_utils.make_sampler(make_cfg(*overrides, mode="async"), 12)()
    assert type(sampler) is RewardPrioritizedSampler
    assert (sampler.alpha, sampler.epsilon, sampler.beta, len(sampler.live)) == (alpha, 1e-6, beta, 12)


# --- behind Ray ---


@pytest.fixture(scope="module")
def remote(ray_session, make_cfg):
    """The buffer's owner, of capacity 8 (4 groups x 2 kept), with batches of 3."""
    cfg = make_cfg("train.dialog_turns_per_batch=32", "env.num_envs=32", f"train.optim_batch_size={BATCH}", "seed=5")
    assert derive_sizes(cfg).buffer_size == 8
    owner = ei_utils.make_replay_buffer(cfg)
    yield owner
    owner.shutdown()


def test_a_client_sees_the_buffer_as_it_is_in_its_own_process(remote):
    client, local = remote.client(), make_buffer(derive_seed(5, "buffer"), capacity=8)
    for buffer in (client, local):
        assert one_pass(buffer) == []
        buffer.extend(make_rows(*range(7)))
    assert [one_pass(client) for _ in range(3)] == [one_pass(local) for _ in range(3)]
    assert len(client) == 7
    assert client.statistics() == local.statistics()
    for buffer in (client, local):
        buffer.extend(make_rows(10, 11, 12))
    assert len(client) == 8
    assert client.statistics() == local.statistics()
    for buffer in (client, local):
        buffer.empty(empty_write_count=False)
    assert len(client) == 0
    assert one_pass(client) == []
    assert client.statistics() == local.statistics()
    assert client.statistics()["buffer/write_count"] == 10.0


def test_two_clients_share_the_buffer(remote):
    writer, reader = remote.client(), remote.client()
    reader.empty()
    writer.extend(make_rows(3, 4))
    assert len(reader) == 2
    assert every_row(one_pass(reader)) == [3, 4]


def test_a_reader_of_a_client_is_as_one_of_the_buffer_itself(remote):
    client, local = remote.client(), make_buffer(capacity=8)
    local.load_state_dict(client.state_dict())
    for buffer in (client, local):
        buffer.empty()
        buffer.extend(make_rows(1, 2, 3, version=0))
        buffer.extend(make_rows(4, 5, version=1))
    readers = [BufferReader(buffer, max_policy_age=3, policy_version=lambda: 4) for buffer in (client, local)]
    assert [len(reader) for reader in readers] == [2, 2]
    passes = [[names(batch) for batch in reader] for reader in readers]
    assert passes[0] == passes[1]
    assert every_row(passes[0]) == [4, 5]
    assert names(readers[0].sample()) == names(readers[1].sample())
    assert readers[0].statistics() == readers[1].statistics()
    for reader in readers:
        reader.empty()
        assert len(reader) == 0
        assert reader.sample() is None
