"""The engine's side of transfers from the trainer's accelerator, for which both must be at it at the same time.

Weights that lie in memory an engine fetches when it comes to load them. Over NCCL, and through CUDA IPC, the trainer
sends them instead, in the steps of vLLM's weight transfer. So the thread that is about to load holds the engine's gate
and says that it is ready, and meanwhile the trainer takes its steps in another thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from expert_iteration.engine import Engine, OfferedWeights
from expert_iteration.packed_weights import PackedWeights
from expert_iteration.vllm_engine import VLLMEngine


@dataclass(frozen=True)
class SentByTrainer:
    """Weights that the trainer sends once the engine is ready for them."""

    timeout: float  # seconds that it may take

    def get(self) -> PackedWeights:
        """They cannot be fetched."""
        raise TypeError("The trainer sends these weights: only a ReceivingEngine can load them.")


class Meeting:
    """Where the thread that holds the gate and the trainer's sender wait for each other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._loading: int | None = None  # the version that the gate is held for
        self._sending_since: float | None = None
        self._failure: str | None = None
        self._withdrawn = 0  # no version up to this one will be loaded any more

    def hold(self, version: int, timeout: float) -> None:
        """Say that the engine is ready for a version, and return once it has arrived.

        Raises:
            TimeoutError: it has not within `timeout` seconds.
            RuntimeError: the trainer could not send it.
        """
        with self._changed:
            self._loading, self._sending_since, self._failure = version, None, None
            self._changed.notify_all()
            ended = self._changed.wait_for(lambda: self._loading is None, timeout)
            self._loading = None
            if self._failure is not None:
                raise RuntimeError(f"Weights version {version} did not arrive: {self._failure}")
            if not ended:
                raise TimeoutError(self._explain(version, timeout))

    def await_ready(self, version: int, timeout: float) -> bool | None:
        """Whether the engine is ready for a version; False if it never will be, None if that is open after a while."""
        with self._changed:
            self._changed.wait_for(lambda: self._loading == version or self._withdrawn >= version, timeout)
            if self._loading == version:
                return True
            return False if self._withdrawn >= version else None

    def begin(self) -> None:
        """The trainer has begun to send."""
        self._sending_since = time.monotonic()

    def end(self, failure: str | None = None) -> None:
        """Everything has arrived, or the trainer has failed."""
        with self._changed:
            self._loading, self._failure = None, failure
            self._changed.notify_all()

    def withdraw(self, version: int) -> None:
        """No version up to this one will be loaded any more."""
        with self._changed:
            self._withdrawn = version
            self._changed.notify_all()

    def _explain(self, version: int, timeout: float) -> str:
        limit = f"within weight_update.timeout={timeout:g} s"
        if self._sending_since is None:
            return f"The engine was ready for weights version {version}, but the trainer did not send them {limit}."
        return (
            f"The trainer began to send weights version {version} {time.monotonic() - self._sending_since:.0f} s ago, "
            f"but they did not arrive {limit}. Raise weight_update.timeout if the way is only slow."
        )


class Receiving(Engine):
    """An engine whose weights the trainer sends, in calls that must not queue behind a generation.

    Subclasses have vLLM's methods of a weight transfer at `_llm`.
    """

    _llm: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._meeting = Meeting()
        self._applying = threading.Lock()

    def _apply_offer(self) -> None:
        with self._applying:
            super()._apply_offer()

    def _load(self, weights: OfferedWeights, version: int) -> None:
        assert isinstance(weights, SentByTrainer)
        self._meeting.hold(version, weights.timeout)
        self._llm.update_weight_version(str(version))
        # Cached prefixes hold keys and values of the old weights.
        self._llm.reset_prefix_cache()

    def withdraw_weights(self, version: int) -> None:
        """Drop the weights that wait, and return once none are being loaded: what was offered may be overwritten then.

        Args:
            version: the newest that was offered.
        """
        with self._offer_lock:
            self._superseded += self._offer is not None
            self._offer = None
        # Whoever took the offer before it was dropped loads it first, for which its sender must not have given up.
        with self._applying:
            self._meeting.withdraw(version)

    def await_ready(self, version: int, timeout: float) -> bool | None:
        """See `Meeting.await_ready`."""
        return self._meeting.await_ready(version, timeout)

    def transfer_failed(self, failure: str) -> None:
        """The trainer could not send what the engine is ready for."""
        self._meeting.end(f"the trainer could not send them: {failure}")

    def init_weight_transfer_engine(self, request: dict[str, Any]) -> None:
        """Meet the trainer for the first time; no generation runs meanwhile."""
        with self._gate:
            self._llm.init_weight_transfer_engine(request)

    def start_weight_update(self) -> None:
        """First step of a transfer; the thread that is ready for it holds the gate."""
        self._meeting.begin()
        with self._telling_of_failure():
            self._llm.start_weight_update()

    def update_weights(self, request: dict[str, Any]) -> None:
        """Second step, once for each part of the weights."""
        with self._telling_of_failure():
            self._llm.update_weights(request)

    def finish_weight_update(self) -> None:
        """Last step."""
        with self._telling_of_failure():
            self._llm.finish_weight_update()
        self._meeting.end()

    @contextmanager
    def _telling_of_failure(self) -> Iterator[None]:
        """Release the thread that waits for the weights at once: over NCCL the sender may never hear of the error."""
        try:
            yield
        except Exception as error:
            self._meeting.end(f"the engine could not receive them: {error!r}")
            raise


class ReceivingVLLMEngine(Receiving, VLLMEngine):
    """`VLLMEngine` whose weights the trainer sends; `weight_backend` is vLLM's name of the way, "nccl" or "ipc"."""
