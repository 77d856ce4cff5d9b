"""The reference model's work: log-probs of given tokens.

Imports no TorchRL, which would take longer to load than most reference models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from expert_iteration.log_probs import pad_rows, token_log_probs
from expert_iteration.models import evaluating
from expert_iteration.packed_weights import PackedWeights


class ReferenceScorer:
    """Scores token ids in evaluation mode; a plain class that an actor may own.

    Args:
        model: what `token_log_probs` takes, on the device where it is to run.
        pad_token_id: any valid id; padding is masked.
        micro_batch_size: rows that go through the model at once; what bounds the memory.
    """

    def __init__(self, model: nn.Module, pad_token_id: int, micro_batch_size: int):
        self.model = model
        self.pad_token_id = pad_token_id
        self.micro_batch_size = micro_batch_size
        self.device = next(model.parameters()).device

    # Not inference_mode, in which FSDP would gather weights that cannot be trained afterwards.
    @torch.no_grad()
    def score(
        self, rows: Sequence[torch.Tensor] | torch.Tensor, mask: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Log-prob of each token given its predecessors, by row.

        Args:
            rows: int64 ids [T_i] of each row; or padded ids [B, T] together with `mask`.
            mask: [B, T], true on the tokens of a row (padding may be on either side).

        Returns:
            float32 [T_i] on the CPU for each row, in the order given; position 0 is 0.
        """
        if mask is not None:
            rows = [ids[keep] for ids, keep in zip(rows, mask.bool(), strict=True)]
        # Rows of like length share a micro-batch, so that little of it is padding.
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        scored: dict[int, torch.Tensor] = {}
        with evaluating(self.model):
            for start in range(0, len(order), self.micro_batch_size):
                indices = order[start : start + self.micro_batch_size]
                log_probs = self._score_micro_batch([rows[index] for index in indices])
                scored.update(zip(indices, log_probs, strict=True))
        return [scored[index] for index in range(len(rows))]

    __call__ = score

    def load(self, weights: PackedWeights) -> None:
        """Score with these weights from now on: a whole state dict, copied; raises as `PackedWeights.copy_to`."""
        weights.copy_to(self.model.state_dict())

    def _score_micro_batch(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        input_ids, attention_mask = pad_rows(rows, self.pad_token_id)
        log_probs = token_log_probs(self.model, input_ids.to(self.device), attention_mask.to(self.device))
        # Copies, for a slice would keep (and pickle) the padded batch it is a view of.
        return [values[: len(row)].clone() for values, row in zip(log_probs.cpu(), rows, strict=True)]
