"""The buffer of expert responses, in this process and behind Ray as `ei_utils` builds it."""

from itertools import chain, pairwise

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data import LazyStackStorage, SamplerWithoutReplacement

import ei_utils
from expert_iteration.replay_buffer import ExpertReplayBuffer
from expert_iteration.seeds import derive_seed
from expert_iteration.sizes import derive_sizes

BATCH = 3


def make_rows(*names):
    """Ragged rows: number n has reward n, and n + 1 response tokens."""
    return lazy_stack(
        [
            TensorDict(
                {
                    "name": torch.tensor(name),
                    ("tokens", "response"): torch.arange(name + 1),
                    ("next", "reward"): torch.tensor([float(name)]),
                    ("text", "response"): f"text {name}",
                }
            )
            for name in names
        ]
    )


def make_buffer(seed=0, capacity=10):
    return ExpertReplayBuffer(
        storage=LazyStackStorage(capacity),
        sampler=SamplerWithoutReplacement(),
        batch_size=BATCH,
        capacity=capacity,
        seed=seed,
    )


def names(batch):
    return [int(row["name"]) for row in batch.unbind(0)]


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


def test_rows_come_back_as_they_were_written():
    buffer = make_buffer()
    buffer.extend(make_rows(4, 2))
    (batch,) = buffer
    for row in batch.unbind(0):
        name = int(row["name"])
        assert row["tokens", "response"].tolist() == list(range(name + 1))
        assert row["text", "response"] == f"text {name}"


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
    assert buffer.statistics() == {"buffer/size": 0.0, "buffer/write_count": 0.0}
    buffer.extend(make_rows(1, 2, 6))
    # Rewards 1, 2, 6; lengths 2, 3, 7.
    assert buffer.statistics() == {
        "buffer/size": 3.0,
        "buffer/write_count": 3.0,
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
    assert buffer.statistics() == {"buffer/size": 0.0, "buffer/write_count": 4.0}
    buffer.extend(make_rows(2))
    assert buffer.statistics() == {
        "buffer/size": 1.0,
        "buffer/write_count": 5.0,
        "buffer/reward": 2.0,
        "buffer/response_length": 3.0,
    }


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
    assert client.statistics() == local.statistics() == {"buffer/size": 0.0, "buffer/write_count": 10.0}


def test_two_clients_share_the_buffer(remote):
    writer, reader = remote.client(), remote.client()
    reader.empty()
    writer.extend(make_rows(3, 4))
    assert len(reader) == 2
    assert every_row(one_pass(reader)) == [3, 4]
