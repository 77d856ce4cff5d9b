"""`expert_iteration.interruption`: the first signal asks, the second ends; and what shells expect of both."""

import os
import signal
import time

import pytest

from expert_iteration.cluster import start_actor
from expert_iteration.interruption import SIGNALS, Interrupted, StopRequest, StopSignals
from expert_iteration.mailbox import Mailbox, MailboxActor


@pytest.fixture(autouse=True)
def handlers_as_they_were():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(signum):
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_ends_what_has_nothing_to_save(signum):
    with pytest.raises(Interrupted) as error, StopSignals():
        send(signum)
    assert error.value.exit_code == 128 + signum
    assert str(error.value) == signal.Signals(signum).name


@pytest.mark.parametrize("signum", SIGNALS)
def test_the_first_of_a_run_at_work_is_noted_and_the_second_ends_it(signum):
    with StopSignals() as signals, signals.deferred():
        send(signum)
        assert signals.received == signum
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)


def test_afterwards_all_is_as_it_was():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_ray_neither_takes_the_signals_nor_do_its_processes_die_of_a_notice():
    with StopSignals() as signals:
        with signals.while_ray_starts():
            assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray does
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)


def test_the_training_process_stops_only_where_it_looks():
    stop = StopRequest()
    stop.listen(lambda: None)
    stop.check()
    send(signal.SIGINT)
    with pytest.raises(Interrupted, match="SIGINT"):
        stop.check()


def test_the_training_process_hears_of_the_signal_that_another_has_received(ray_session):
    mailbox = Mailbox(start_actor(MailboxActor, {}))
    stop = StopRequest()
    stop.listen(mailbox.stop_asked)
    mailbox.put("first")
    mailbox.put("second")
    assert mailbox.take() == ["first", "second"]
    assert mailbox.take() == []
    assert stop.signum is None
    mailbox.ask_to_stop(signal.SIGTERM)
    deadline = time.monotonic() + 60
    while stop.signum is None and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(Interrupted, match="SIGTERM"):
        stop.check()
