"""The reference model in an actor of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class ReferenceActor:
    """Loads the frozen start model in its process and scores with it.

    Args:
        name: hub id or folder of the model.
        dtype, attn_implementation, device: how to load it.
        pad_token_id: any valid id; padding is masked.
        micro_batch_size: rows scored at once.
        log_path: where this process's output goes.
    """

    def __init__(
        self,
        name: str,
        *,
        dtype: str,
        attn_implementation: str,
        device: str,
        pad_token_id: int,
        micro_batch_size: int,
        log_path: str,
    ) -> None:
        # Imported here, for the module is also imported where only the client is needed.
        from expert_iteration.models import load_model
        from expert_iteration.reference import ReferenceScorer
        from expert_iteration.screen import redirect_output

        redirect_output(log_path)
        model = load_model(name, dtype=dtype, attn_implementation=attn_implementation, device=device)
        self._scorer = ReferenceScorer(model, pad_token_id, micro_batch_size)

    def score(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """See `ReferenceScorer.score`."""
        return self._scorer.score(rows)


class ReferenceClient:
    """A picklable handle on the reference's actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def score(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """See `ReferenceScorer.score`."""
        import ray

        return ray.get(self._actor.score.remote(rows))
