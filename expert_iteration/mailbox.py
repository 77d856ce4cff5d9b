"""Between the process with the terminal and the training process: what is to be shown, and whether to stop.

Ray's own way to stop a task, cancelling it, also fails every call that the task makes afterwards, such as those that
save its checkpoint. Importing this module loads nothing.
"""

from __future__ import annotations

from typing import Any


class MailboxActor:
    """Keeps messages until they are taken, and one wish."""

    def __init__(self) -> None:
        self._messages: list[Any] = []
        self._stop: int | None = None

    def put(self, message: Any) -> None:
        """Leave a message."""
        self._messages.append(message)

    def take(self) -> list[Any]:
        """The messages since the last call, in order."""
        messages, self._messages = self._messages, []
        return messages

    def ask_to_stop(self, signum: int) -> None:
        """Ask the training process to stop, because of a signal."""
        self._stop = signum

    def stop_asked(self) -> int | None:
        """The signal because of which it is to stop; None: it is not."""
        return self._stop


class Mailbox:
    """A picklable handle on the actor.

    Args:
        actor: a `MailboxActor`.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def put(self, message: Any) -> None:
        """Leave a message; it is there when this returns."""
        import ray

        ray.get(self._actor.put.remote(message))

    def take(self) -> list[Any]:
        """See `MailboxActor.take`."""
        import ray

        return ray.get(self._actor.take.remote())

    def ask_to_stop(self, signum: int) -> None:
        """See `MailboxActor.ask_to_stop`."""
        import ray

        ray.get(self._actor.ask_to_stop.remote(signum))

    def stop_asked(self) -> int | None:
        """See `MailboxActor.stop_asked`."""
        import ray

        return ray.get(self._actor.stop_asked.remote())
