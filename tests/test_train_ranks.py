"""`expert_iteration.train_ranks`: what becomes of a run when one of its training ranks fails.

Ray imports this file in the ranks' processes, so it loads nothing heavy.
"""

import os
import signal
import time

import psutil
import pytest

from expert_iteration.errors import UserError
from expert_iteration.remote import ProcessDiedError
from expert_iteration.train_ranks import RankGroup

SOON = 60  # seconds, for a machine that is very busy; collective operations themselves wait for ten minutes


def load():
    """What a rank loads here: torch alone."""
    import torch.distributed

    return torch.distributed.__name__


def refuse():
    raise UserError("model.name (nowhere) is on no host.")


def build(loaded, rank, ranks):
    """In place of a learner, the rank's number and process."""
    return rank, os.getpid()


def exchange(_):
    """Waits until every rank comes here."""
    import torch
    import torch.distributed as dist

    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item()


def die(rank_and_process):
    print("about to die", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def fail(rank_and_process):
    raise ZeroDivisionError(f"rank {rank_and_process[0]} divides by zero")


def identify(rank_and_process):
    return rank_and_process


@pytest.fixture(scope="module")
def groups(ray_session, tmp_path_factory):
    """Groups by number of ranks, of which each test uses up one; their processes start at the same time."""
    sizes = [2, 2, 3]
    made = [RankGroup(load, [{}] * (size - 1), tmp_path_factory.mktemp("run"), "gloo") for size in sizes]
    yield made
    for group in made:
        group._end()


@pytest.fixture
def join(groups):
    """A function that takes a group of so many ranks which nobody has used, and joins it."""
    joined = []

    def join(size):
        group = next(group for group in groups if group.size == size)
        groups.remove(group)
        joined.append(group)
        group.join(print)
        assert group.build(build, None) == (0, os.getpid())
        return group

    yield join
    for group in joined:
        group._end()
        group.leave()


def wait_until_gone(process):
    deadline = time.monotonic() + SOON
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {process} is still there"
        time.sleep(0.05)


def test_a_rank_that_dies_is_named_with_its_log_while_the_others_wait_for_it(join):
    group = join(3)
    with group.together(exchange) as totals:
        assert exchange(None) == 3.0
    assert totals == [3.0, 3.0]
    named = pytest.raises(ProcessDiedError, match=r"trainer-2 has died .*trainer-2\.log.*\n(.*\n)*.*about to die")
    with named, group.together([exchange, die]):
        exchange(None)


def test_an_error_of_a_rank_surfaces_while_rank_0_waits_for_it(join):
    group = join(2)
    with pytest.raises(ProcessDiedError) as caught, group.together(fail):
        exchange(None)
    message = str(caught.value)
    assert "trainer-1 has failed with ZeroDivisionError (" in message
    assert "trainer-1.log): rank 1 divides by zero\n" in message
    # The traceback is in the log, whose end is in the message.
    assert 'in fail\n      raise ZeroDivisionError(f"rank' in message


def test_an_error_of_rank_0_surfaces_as_itself_and_stops_the_others(join):
    group = join(2)
    with group.together(identify) as identities:
        pass
    ((_, process),) = identities
    with pytest.raises(ZeroDivisionError, match="rank 0"), group.together(exchange):
        fail((0, os.getpid()))
    wait_until_gone(process)


def test_a_mistake_that_shows_while_a_rank_loads_is_a_user_error(ray_session, tmp_path):
    group = RankGroup(refuse, [{}], tmp_path, "gloo")
    with pytest.raises(UserError, match=r"trainer-1: model\.name \(nowhere\)"):
        group.join(print)
