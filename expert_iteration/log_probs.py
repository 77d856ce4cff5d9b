"""Log-probs of tokens under a Hugging Face model.

The one place where they are computed: the policy in training, the reference scorer and the probe of a weight push all
call it, so their numbers differ only by weights and precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence


def token_log_probs(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token given its predecessors.

    Args:
        model: a Hugging Face causal language model.
        input_ids: int64 [B, T], right-padded.
        attention_mask: [B, T], 1 on real tokens.

    Returns:
        float32 [B, T]. Position 0 has no predecessor and gets 0; values at padding mean nothing and are to be masked.
        The log-softmax is taken in float32 whatever the model's precision, as bfloat16 keeps only three digits.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    targets = input_ids[:, 1:]
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return F.pad(-losses.view(targets.shape), (1, 0))


def pad_rows(rows: Sequence[torch.Tensor], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad 1-D id tensors to (input_ids, attention_mask), both int64 [B, T]."""
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = pad_sequence(list(rows), batch_first=True, padding_value=pad_token_id)
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return input_ids, attention_mask.to(input_ids.device)
