"""A run that trains on an expert set (`train.from_expert_set`): what stands where others have an engine.

The script's `train` is the same: it goes over one batch, the whole set, pushes nothing and evaluates nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torch import nn
from torchrl._utils import timeit

from expert_iteration import timeline
from expert_iteration.actors import CollectedBatch
from expert_iteration.expert_set_reader import Example
from expert_iteration.row_keys import RESPONSE_ID_KEY, RESPONSE_MASK_KEY, TOKENS_KEY

if TYPE_CHECKING:
    from expert_iteration.reference import RetrieveLogProb

ROWS_AT_ONCE = 1024  # scored and written: what is on the way beside the buffer


class ExpertSetCollector:
    """In place of a `CollectorClient`: iterating it yields one batch, once the whole set lies in the buffer.

    Args:
        examples: at least one.
        replay_buffer: a client of the buffer.
        retrieve_log_prob: scores the rows with the reference; None: they are written without its log-probs.
    """

    def __init__(
        self, examples: Sequence[Example], replay_buffer: Any, retrieve_log_prob: RetrieveLogProb | None
    ) -> None:
        self._examples = examples
        self._replay_buffer = replay_buffer
        self._retrieve_log_prob = retrieve_log_prob
        self._is_written = self._is_worked_off = False

    def __iter__(self) -> Iterator[CollectedBatch]:
        if self._is_worked_off:
            return
        is_resumed = self._is_written
        if not is_resumed:
            with timeit("wait_for_data"), timeline.span(timeline.WAITING_FOR_DATA):
                self._write()
        count = len(self._examples)
        yield CollectedBatch(count, count, responses_kept=count, samples=[], is_resumed=is_resumed)
        self._is_worked_off = True

    def _write(self) -> None:
        for start in range(0, len(self._examples), ROWS_AT_ONCE):
            part = self._examples[start : start + ROWS_AT_ONCE]
            rows = lazy_stack([_as_row(number, example) for number, example in enumerate(part, start)])
            if self._retrieve_log_prob is not None:
                rows = self._retrieve_log_prob(rows)
            self._replay_buffer.write_batch(rows.consolidate(), {"num_written": 1})
        self._is_written = True

    def state_dict(self) -> dict[str, Any]:
        """How far its one batch has come."""
        return {"is_written": self._is_written, "is_worked_off": self._is_worked_off}

    def load_state_dict(self, state: Mapping[str, Any], writer_state: Mapping[str, Any] | None) -> None:
        """Go on from `state_dict`, with the same set and a buffer that holds what it held then.

        Args:
            state: from there.
            writer_state: nobody else writes.
        """
        self._is_written, self._is_worked_off = state["is_written"], state["is_worked_off"]


class NoWeightUpdater:
    """In place of a `WeightUpdater`: there is nobody to push to."""

    policy_version = pushes = 0
    pushed_weights = None

    def verify_start(self, policy: nn.Module) -> dict[str, float]:
        """Nothing to prove."""
        return {}

    def push_weights(self, policy: nn.Module) -> dict[str, float]:
        """Nothing happens, and no push is counted."""
        return {}

    def read_reports(self) -> dict[str, float]:
        """Nothing comes."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to go on with."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], policy: nn.Module, pushed: Any) -> None:
        """Nothing to go on with."""


class NoEvaluator:
    """In place of an `Evaluator`: there is nothing to sample with."""

    is_pending = has_stalled = False
    measured_pushes = 0

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}

    def evaluate(self, step: int, pushes: int) -> dict[str, float]:
        """Nothing is measured."""
        return {}

    def close(self) -> None:
        """Nothing is held."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to go on with."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to go on with."""


def _as_row(number: int, example: Example) -> TensorDictBase:
    """A row as the collector writes it, as far as anything reads it."""
    prompt, response = (
        torch.frombuffer(ids, dtype=torch.int32).long() for ids in (example.prompt_ids, example.response_ids)
    )
    return TensorDict(
        {
            ("tokens", "prompt"): prompt,
            ("tokens", "response"): response,
            TOKENS_KEY: torch.cat([prompt, response]),
            RESPONSE_MASK_KEY: torch.arange(len(prompt) + len(response)) >= len(prompt),
            ("next", "reward"): torch.tensor([example.reward]),
            "policy_version": torch.tensor(0),  # whoever made it, no policy of this run is older or younger
            RESPONSE_ID_KEY: torch.tensor(number),
        }
    )
