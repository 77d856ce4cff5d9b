"""How other parts read the policy while it is trained: its weights by name, and the log-probs it gives to tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from expert_iteration.log_probs import token_log_probs


class PolicyReader:
    """Reads a policy that lies in this process alone.

    Args:
        autocast_dtype: in which the trainer computes, None for none.
    """

    def __init__(self, autocast_dtype: torch.dtype | None = None) -> None:
        self.autocast_dtype = autocast_dtype

    def weights(self, policy: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole Hugging Face state dict by name, in a fixed order; a tensor may be gone once the next is asked for.

        Whole, because vLLM's packed lm_head stays stale when tied weights are sent only once.
        """
        for name, tensor in policy.state_dict().items():
            yield name, tensor.detach()

    @torch.inference_mode()
    def score(self, policy: nn.Module, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-prob of every token of each sequence given its predecessors, in evaluation mode; the first gets 0."""
        device = next(policy.parameters()).device
        autocast = torch.autocast(device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext()
        was_training = policy.training
        policy.eval()
        with autocast:
            # One sequence at a time: the probe is small, and without padding there is nothing to get wrong.
            scores = [
                token_log_probs(policy, ids, torch.ones_like(ids))[0].tolist()
                for ids in (torch.tensor([sequence], device=device) for sequence in sequences)
            ]
        policy.train(was_training)
        return scores
