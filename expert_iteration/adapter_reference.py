"""The reference under LoRA: the policy with its adapters off, in the trainer.

The adapters begin as nothing and the base is frozen, so the base is the start model; no second model is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase
from torch import nn

from expert_iteration.row_keys import REF_LOG_PROBS_KEY, RESPONSE_ID_KEY, RESPONSE_MASK_KEY, TOKENS_KEY
from expert_iteration.scorer import ReferenceScorer

if TYPE_CHECKING:
    from peft import PeftModel

Score = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


class AdapterReference:
    """Gives batches the reference's log-probs, scoring each response once.

    Args:
        score: list of ids [T_i] -> list of log-probs [T_i], by the start model: a `BaseScorer`'s `score`.
        capacity: responses whose log-probs are kept, at 4 bytes a token; beyond it the oldest, of the smallest id, make
            room. The buffer's size is enough for every response to be scored once: it drops its oldest too.

    Attributes:
        scored: responses that were scored.
        hits: rows whose response was known already.
    """

    def __init__(self, score: Score, capacity: int) -> None:
        self._score = score
        self._capacity = capacity
        self._log_probs: dict[int, torch.Tensor] = {}  # by response id
        self.scored = self.hits = 0

    def attach(self, batch: TensorDictBase) -> TensorDictBase:
        """Write ("next", "ref_log_probs", "full") into the rows that lack it, in place; returns the batch.

        Args:
            batch: B rows with token ids, response mask and "response_id". A response may be there twice.

        Returns:
            the same, with float32 [T_i] a row, 0 at prompt positions.
        """
        rows = [row for row in batch.unbind(0) if row.get(REF_LOG_PROBS_KEY, None) is None]
        # Of its own, for the cache may be smaller than the batch.
        known = {number: self._log_probs[number] for row in rows if (number := _id(row)) in self._log_probs}
        unknown = {_id(row): row for row in rows if _id(row) not in known}
        known |= self._score_rows(unknown)
        self.hits += len(rows) - len(unknown)
        batch.unlock_()  # as a batch comes that was consolidated to travel
        for row in rows:
            row.set(REF_LOG_PROBS_KEY, known[_id(row)])
        return batch

    def state_dict(self) -> dict[int, torch.Tensor]:
        """The log-probs that are kept, by response id; scored in another micro-batch their last digits would differ."""
        return dict(self._log_probs)

    def load_state_dict(self, state: Mapping[int, torch.Tensor]) -> None:
        """Go on with what `state_dict` gave."""
        self._log_probs = dict(state)

    def _score_rows(self, rows: dict[int, TensorDictBase]) -> dict[int, torch.Tensor]:
        """Score the rows, by response id, and keep what comes out."""
        if not rows:
            return {}
        scored = self._score([row.get(TOKENS_KEY) for row in rows.values()])
        log_probs = {
            number: values.masked_fill(~row.get(RESPONSE_MASK_KEY), 0.0)
            for (number, row), values in zip(rows.items(), scored, strict=True)
        }
        self.scored += len(rows)
        self._log_probs.update(log_probs)
        while len(self._log_probs) > self._capacity:
            del self._log_probs[min(self._log_probs)]
        return log_probs


def _id(row: TensorDictBase) -> int:
    return int(row.get(RESPONSE_ID_KEY))


class BaseScorer:
    """Scores token ids with the frozen base of a policy that is being trained.

    Args:
        policy: PEFT's wrapper.
        micro_batch_size: rows that go through the model at once.
        autocast_dtype: in which the trainer computes, so that the reference differs by the adapters alone; None: none.
        model: what is called to score, where that is not `policy` itself but a `LogProbModel` around it.
    """

    def __init__(
        self,
        policy: PeftModel,
        *,
        micro_batch_size: int,
        autocast_dtype: torch.dtype | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self._policy = policy
        # Any id does for padding, which is masked.
        self._scorer = ReferenceScorer(model or policy, pad_token_id=0, micro_batch_size=micro_batch_size)
        self._autocast_dtype = autocast_dtype

    def score(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """See `ReferenceScorer.score`. Adapters and training mode are afterwards as they were."""
        from expert_iteration.lora import adapters_off

        dtype = self._autocast_dtype
        autocast = torch.autocast(self._scorer.device.type, dtype, enabled=dtype is not None)
        with adapters_off(self._policy), autocast:
            return self._scorer.score(rows)
