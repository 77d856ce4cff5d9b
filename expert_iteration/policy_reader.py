"""How other parts read the policy while it is trained: its weights by name, and the log-probs it gives to tokens.

Nobody else looks into the policy, so adapters, 4-bit weights and shards are this module's affair alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from expert_iteration.log_probs import token_log_probs
from expert_iteration.models import evaluating, hugging_face_model


class PolicyReader:
    """Reads a policy that lies in this process alone.

    Args:
        autocast_dtype: in which the trainer computes, None for none.
    """

    def __init__(self, autocast_dtype: torch.dtype | None = None) -> None:
        self.autocast_dtype = autocast_dtype

    def weights(self, policy: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole Hugging Face state dict by name, in a fixed order; a tensor may be gone once the next is asked for.

        Whole, because vLLM's packed lm_head stays stale when tied weights are sent only once. Adapters are merged into
        the weights, in float32; 4-bit weights are dequantized.
        """
        if hugging_face_model(policy) in (None, policy):
            return ((name, self._whole(tensor.detach())) for name, tensor in policy.state_dict().items())
        from expert_iteration.lora import merged_weights  # a model within another: PEFT's wrapper

        return merged_weights(policy, self._whole)

    def adapters(self, policy: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """The adapters alone, by PEFT's names in `adapter_model.safetensors`, in a fixed order; float32."""
        from expert_iteration.lora import adapter_state_dict

        return ((name, self._whole(tensor)) for name, tensor in adapter_state_dict(policy).items())

    # Not inference_mode, in which FSDP would gather weights that cannot be trained afterwards.
    @torch.no_grad()
    def score(self, policy: nn.Module, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-prob of every token of each sequence given its predecessors, in evaluation mode; the first gets 0."""
        device = next(policy.parameters()).device
        autocast = torch.autocast(device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)
        with evaluating(policy), autocast:
            # One sequence at a time: the probe is small, and without padding there is nothing to get wrong.
            return [
                token_log_probs(policy, ids, torch.ones_like(ids))[0].tolist()
                for ids in (torch.tensor([sequence], device=device) for sequence in sequences)
            ]

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of which `tensor` is what lies in this process: itself."""
        return tensor
