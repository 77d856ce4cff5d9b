"""Waiting for other processes: what died is named, and no wait is silent or endless."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

SAY_EVERY = 60.0
CHECK_EVERY = 1.0


class ProcessDiedError(RuntimeError):
    """A process of the run has died; says which, and where its output is."""


def get_from(process: str, reference: Any, timeout: float | None = None) -> Any:
    """`ray.get` of a call to the actor that runs `process` ("engine", "collector", ...).

    Raises:
        ProcessDiedError: the actor is dead.
        ray.exceptions.GetTimeoutError: no answer within `timeout` seconds.
    """
    import ray
    from ray.exceptions import RayActorError

    try:
        return ray.get(reference, timeout=timeout)
    except RayActorError as error:
        raise ProcessDiedError(f"The {process}'s process has died (logs/{process}.log): {error}") from error


def wait_aloud(
    reference: Any,
    say: Callable[[str], None],
    describe: Callable[[float], str],
    since: float,
    timeout: float = math.inf,
    check: Callable[[], None] | None = None,
) -> bool:
    """Wait for a Ray call to end, and say so every minute.

    Args:
        reference: of the call.
        say: shows a line to the user.
        describe: the line, given the seconds waited so far.
        since: `time.monotonic()` from which on they count.
        timeout: after so many of them it is not waited for any longer.
        check: called at once and every second meanwhile; it may raise to end the wait.

    Returns:
        Whether the call has ended.
    """
    import ray

    if check is not None:
        check()
    step = SAY_EVERY if check is None else min(SAY_EVERY, CHECK_EVERY)
    said = time.monotonic()
    while not ray.wait([reference], timeout=max(0.0, min(step, since + timeout - time.monotonic())))[0]:
        now = time.monotonic()
        if check is not None:
            check()
        if now - since >= timeout:
            return False
        if now - said >= SAY_EVERY:
            say(describe(now - since))
            said = now
    return True


class Waiting:
    """Waits for responses, says so every minute, and gives up after a while.

    Args:
        timeout: seconds (`train.collection_timeout`).
        say: shows a line to the user.
        diagnose: what the other side does meanwhile, in a few words.
        check: called every second meanwhile; it may raise to end the wait.
    """

    def __init__(
        self,
        timeout: float,
        say: Callable[[str], None],
        diagnose: Callable[[], str],
        check: Callable[[], None] | None = None,
    ) -> None:
        self.timeout = timeout
        self.say = say
        self.check = check
        self._diagnose = diagnose

    def wait(self, reference: Any, since: float, why: str | None = None) -> None:
        """Return once the call behind `reference` has ended.

        Args:
            reference: of a Ray call.
            since: `time.monotonic()` from which on there was nothing to work on.
            why: the reason, where it is not that the other side is slow.

        Raises:
            TimeoutError: there was nothing for `timeout` seconds.
        """

        def describe(waited: float) -> str:
            return f"still waiting for responses after {waited:.0f} s: {why or self._diagnose()}"

        if not wait_aloud(reference, self.say, describe, since, self.timeout, self.check):
            reason = why or (
                f"{self._diagnose()}. Raise train.collection_timeout if it is only slow, or lower "
                "train.dialog_turns_per_batch or inference_model.max_tokens"
            )
            raise TimeoutError(
                f"There were no responses to go on with for {time.monotonic() - since:.0f} s "
                f"(train.collection_timeout={self.timeout:g}): {reason}."
            )
