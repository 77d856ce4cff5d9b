"""Log-probs under the reference model, for the responses that were kept and no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDictBase, lazy_stack
from torch import nn
from torchrl.data import Composite, Unbounded
from torchrl.envs.llm.transforms import RetrieveLogProb as TorchRLRetrieveLogProb
from torchrl.envs.transforms import Transform

from expert_iteration.loss import RESPONSE_MASK_KEY, TOKENS_KEY, pad_rows, token_log_probs

Scorer = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


class ReferenceScorer:
    """Scores token ids with a frozen model; a plain class that an actor may own.

    Args:
        model: a Hugging Face causal language model, on the device where it is to run; it is put in eval mode.
        pad_token_id: any valid id; padding is masked.
        micro_batch_size: rows that go through the model at once; what bounds the memory.
        autocast_dtype: precision of the forward pass; None: that of the parameters. With the learner's dtype over
            float32 weights the KL of an untrained policy is 0 but for the padding's rounding.
    """

    def __init__(
        self,
        model: nn.Module,
        pad_token_id: int,
        micro_batch_size: int,
        autocast_dtype: torch.dtype | None = None,
    ):
        self.model = model.eval()
        self.pad_token_id = pad_token_id
        self.micro_batch_size = micro_batch_size
        self.device = next(model.parameters()).device
        self._autocast = torch.autocast(self.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None)

    @torch.inference_mode()
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
        for start in range(0, len(order), self.micro_batch_size):
            indices = order[start : start + self.micro_batch_size]
            log_probs = self._score_micro_batch([rows[index] for index in indices])
            scored.update(zip(indices, log_probs, strict=True))
        return [scored[index] for index in range(len(rows))]

    __call__ = score

    def _score_micro_batch(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        input_ids, attention_mask = pad_rows(rows, self.pad_token_id)
        with self._autocast:
            log_probs = token_log_probs(self.model, input_ids.to(self.device), attention_mask.to(self.device))
        # Copies, for a slice would keep (and pickle) the padded batch it is a view of.
        return [values[: len(row)].clone() for values, row in zip(log_probs.cpu(), rows, strict=True)]


class RetrieveLogProb(TorchRLRetrieveLogProb):
    """Writes the reference's log-probs of the response tokens into rows, before they are stored.

    On the writer's side call `transform(rows)`, or append it to a replay buffer: `extend` scores (the inverse
    direction), and sampling leaves rows that carry log-probs alone. None, which a selector returns when it keeps
    nothing, passes through.

    Args:
        scorer: list of ids [T_i] -> list of log-probs [T_i]; a `ReferenceScorer` or a call to an actor that owns one.
        log_probs_full_key: where they go within "next", float32 [T_i], 0 at prompt positions.
        tokens_key: int64 [T_i], prompt and response.
        response_mask_key: bool [T_i], True on response tokens.
    """

    # What is overridden of TorchRL 0.14.1, and why. __init__ and _step: they want a wrapper that re-tokenizes text,
    # where the sampled ids are to be scored, and score in the environment, that is also what will not be kept.
    # transform_observation_spec: it registers "kl_penalty" in place of the key that is written (KeyError in a
    # collector). forward: it would score again what is sampled. _inv_call: TorchRL has none.

    def __init__(
        self,
        scorer: Scorer,
        *,
        log_probs_full_key: NestedKey = ("ref_log_probs", "full"),
        tokens_key: NestedKey = TOKENS_KEY,
        response_mask_key: NestedKey = RESPONSE_MASK_KEY,
    ):
        Transform.__init__(self, in_keys=[tokens_key, response_mask_key], out_keys=[log_probs_full_key])
        self.scorer = scorer
        self.log_probs_full_key = log_probs_full_key
        self.tokens_key = tokens_key
        self.response_mask_key = response_mask_key

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Score the rows of `tensordict` [B], unless they already carry log-probs; they are changed in place."""
        if tensordict.get(("next", self.log_probs_full_key), None, as_list=True) is not None:
            return tensordict
        if not isinstance(tensordict, LazyStackedTensorDict):
            tensordict = lazy_stack(list(tensordict.unbind(0)))
        return super().forward(tensordict)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        log_probs = self.scorer(list(tensordict.get(self.tokens_key, as_list=True)))
        masks = tensordict.get(self.response_mask_key, as_list=True)
        rows = next_tensordict.unbind(0)
        for row, values, mask in zip(rows, log_probs, masks, strict=True):
            row.set(self.log_probs_full_key, values.masked_fill(~mask, 0.0))
        return next_tensordict

    def _inv_call(self, tensordict: TensorDictBase | None) -> TensorDictBase | None:
        return None if tensordict is None else self.forward(tensordict)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Announce the entry that is written: float32, a length of its own in each row."""
        shape = (*observation_spec.shape, -1)
        observation_spec[self.log_probs_full_key] = Unbounded(shape=shape, device=observation_spec.device)
        return observation_spec
