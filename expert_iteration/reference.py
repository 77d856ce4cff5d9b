"""Reference log-probs beside the data: the transform that adds them to the responses that were kept, and no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import LazyStackedTensorDict, NestedKey, TensorDictBase, lazy_stack
from torchrl.data import Composite, Unbounded
from torchrl.envs.llm.transforms import RetrieveLogProb as TorchRLRetrieveLogProb
from torchrl.envs.transforms import Transform

from expert_iteration.row_keys import RESPONSE_MASK_KEY, TOKENS_KEY

Scorer = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


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
