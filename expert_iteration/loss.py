"""The SFT loss with a KL penalty to the reference, on the token ids that the engine sampled.

What is trained is what was sampled: nothing is templated or tokenized again on the way here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torchrl.modules.llm.policies.common import LLMWrapperBase
from torchrl.objectives.llm.sft import SFTLoss as TorchRLSFTLoss
from torchrl.objectives.llm.sft import SFTLossOutput as TorchRLSFTLossOutput
from torchrl.objectives.llm.sft import minor_sft_loss, sft_loss

from expert_iteration.errors import UserError
from expert_iteration.log_probs import as_log_prob_model, pad_rows, token_scores
from expert_iteration.row_keys import IMPORTANCE_WEIGHT_KEY, RESPONSE_MASK_KEY, TOKENS_KEY

LOSS_FUNCTIONS = ("sft", "minor_sft")
REDUCTIONS = ("mean", "sum", "none")


class PaddedBatch(NamedTuple):
    """A batch of B responses with their prompts, right-padded to T tokens."""

    input_ids: torch.Tensor
    """int64 [B, T], prompt then response, the pad id after it."""
    attention_mask: torch.Tensor
    """int64 [B, T], 1 on the tokens of the row, 0 on padding."""
    response_mask: torch.Tensor
    """bool [B, T], True on response tokens."""
    ref_log_probs: torch.Tensor | None
    """float32 [B, T], the reference's log-probs of the response tokens, 0 elsewhere; None if the batch has none."""


def pad_batch(
    ids: Sequence[torch.Tensor],
    response_masks: Sequence[torch.Tensor],
    ref_log_probs: Sequence[torch.Tensor] | None,
    *,
    pad_token_id: int,
    device: torch.device,
) -> PaddedBatch:
    """Pad B ragged rows and move them to `device`.

    Args:
        ids: int64 [T_i] of each row, prompt and response.
        response_masks: bool [T_i], True on response tokens.
        ref_log_probs: float32 [T_i], or None.
        pad_token_id: any valid id; it is masked out of attention and loss.
        device: where the padded tensors go.

    Raises:
        ValueError: ids, mask and reference log-probs of a row differ in length.
    """
    lengths = [len(row) for row in ids]
    for name, rows in (("response mask", response_masks), ("reference log-probs", ref_log_probs)):
        if rows is not None and (found := [len(row) for row in rows]) != lengths:
            raise ValueError(f"The {name} has {found} tokens a row, the ids have {lengths}.")
    input_ids, attention_mask = pad_rows(ids, pad_token_id)
    response_mask = pad_sequence([mask.bool() for mask in response_masks], batch_first=True)
    ref = None if ref_log_probs is None else pad_sequence([row.float() for row in ref_log_probs], batch_first=True)
    return PaddedBatch(
        input_ids.to(device),
        attention_mask.to(device),
        response_mask.to(device),
        None if ref is None else ref.to(device),
    )


class SFTLossOutput(TorchRLSFTLossOutput):
    """TorchRL's, and what is known of the policy beside its loss."""

    # With a default because TorchRL's fields have them; ours is always there.
    entropy: torch.Tensor | None = None
    """Of the next token's whole distribution, nats, reduced as the loss is; without gradient."""


class SFTLoss(TorchRLSFTLoss):
    """Supervised fine-tuning on kept responses, with a KL penalty to the reference model.

    `loss_sft` is minus the mean over responses of the mean log-prob of a response's tokens; `kl_to_ref` the mean over
    responses of the mean of k3 = exp(ref - lp) - 1 - (ref - lp) over the same tokens, and `loss_kl_to_ref` is
    `kl_to_ref_coeff` times that (k3: John Schulman, "Approximating KL Divergence", 2020; as in TorchRL). Equal
    micro-batches therefore accumulate to the large batch. A response without tokens counts as a response and adds 0.

    `loss_function="minor_sft"` is 2/beta times TorchRL's MinorSFT (Xie et al., 2024, arXiv:2408.10642): its gradient
    at the reference is that of `sft`, so a learning rate means the same for both.

    Where the batch has "importance_weight" [B], which prioritized sampling gives it, both terms of a response are
    multiplied by its weight before the reduction, whose mean still divides by B. `kl_to_ref` and `entropy`, which is
    that of the policy's distributions over the response's tokens, are not weighted.

    Trained are the ids of the batch. A batch without ids but with TorchRL's ("history", "full") is templated and
    tokenized with `tokenizer_kwargs`, which have no other use.

    Args:
        actor_network: what `token_log_probs` takes, or a TorchRL wrapper around a Hugging Face model.
        tokenizer: gives the pad id and tokenizes histories; default: the wrapper's.
        tokenizer_kwargs: for `History.apply_chat_template`, for instance {"chat_template_name": a name of TorchRL's};
            by default histories are put into the tokenizer's own template.
        reduction: over responses: mean, sum or none (losses of shape [B]).
        normalize_by_seq_length: mean over a response's tokens; sum if False. Holds for both terms.
        kl_to_ref_coeff: weight of the KL term, at least 0. None and 0 mean that there is no such term; `kl_to_ref` is
            then still reported, without gradient, where the batch carries reference log-probs.
        loss_function: "sft" or "minor_sft".
        beta: MinorSFT's beta.
        device: used when neither the batch nor the model says one.

    Raises:
        UserError (a ValueError): no tokenizer, an unknown `loss_function` or `reduction`, a negative coefficient,
            `minor_sft` together with a KL coefficient.
        ValueError (in forward): a term needs reference log-probs that the batch does not have.

    Forward takes a tensordict of B rows and returns an `SFTLossOutput`; `loss_kl_to_ref` and `kl_to_ref` are None where
    there is none.
    """

    # What is overridden of TorchRL 0.14.1, and why. __init__: it silences the KL of minor_sft with a warning and writes
    # into the caller's tokenizer_kwargs. forward: it compares the engine's masks with the log-probs of re-templated,
    # re-tokenized text (two tokens longer: ValueError), cannot stack ragged ids, averages the KL over prompt positions
    # too, and its minor_sft has beta/2 times the gradient of sft. Keys: the ids are not among those it knows.

    @dataclass
    class _AcceptedKeys(TorchRLSFTLoss._AcceptedKeys):
        tokens: NestedKey = TOKENS_KEY
        response_mask: NestedKey = RESPONSE_MASK_KEY
        importance_weight: NestedKey = IMPORTANCE_WEIGHT_KEY

    default_keys = _AcceptedKeys

    def __init__(
        self,
        actor_network: nn.Module,
        tokenizer: Any = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
        normalize_by_seq_length: bool = True,
        kl_to_ref_coeff: float | None = None,
        loss_function: Literal["sft", "minor_sft"] = "sft",
        beta: float = 0.1,
        device: torch.device | None = None,
    ):
        _check_options(reduction, kl_to_ref_coeff, loss_function, beta)
        wrapped = isinstance(actor_network, LLMWrapperBase)
        if tokenizer is None and not (wrapped and actor_network.tokenizer is not None):
            raise UserError("SFTLoss needs a tokenizer: a Hugging Face model does not carry one, pass tokenizer=.")
        super().__init__(
            actor_network,
            tokenizer=tokenizer,
            tokenizer_kwargs=dict(tokenizer_kwargs or {}),
            reduction=reduction,
            normalize_by_seq_length=normalize_by_seq_length,
            kl_to_ref_coeff=kl_to_ref_coeff,
            loss_function=loss_function,
            beta=beta,
            device=device,
        )
        as_log_prob_model(self.model)  # which examines the model: now, and not in the middle of the first step

    def _set_in_keys(self) -> None:
        self.in_keys = [self.tensor_keys.tokens, self.tensor_keys.response_mask]
        if self.kl_to_ref_coeff or self.loss_function == "minor_sft":
            self.in_keys.append(self.tensor_keys.ref_log_prob)
        self.out_keys: list[NestedKey] = []

    @property
    def model(self) -> nn.Module:
        """The model that is trained, without TorchRL's wrapper."""
        actor = self.actor_network
        return actor.model if isinstance(actor, LLMWrapperBase) else actor

    def forward(self, tensordict: TensorDictBase) -> SFTLossOutput:
        """Loss of a batch of B rows; see the class for its keys and terms."""
        batch = self._pad(tensordict)
        log_probs, entropies = token_scores(self.model, batch.input_ids, batch.attention_mask, batch.response_mask)
        weights = self._importance_weights(tensordict, log_probs.device)
        kl = loss_kl = None
        if batch.ref_log_probs is not None:
            kl = self._kl_per_response(log_probs, batch.ref_log_probs, batch.response_mask)
        elif self.kl_to_ref_coeff or self.loss_function == "minor_sft":
            raise ValueError(
                f"The batch has no {self.tensor_keys.ref_log_prob}, which {self.loss_function=} with "
                f"{self.kl_to_ref_coeff=} needs: score the kept responses with RetrieveLogProb before they are written."
            )
        if self.kl_to_ref_coeff and kl is not None:
            loss_kl = self.kl_to_ref_coeff * self._reduce(weights * kl)
        return SFTLossOutput(
            loss_sft=self._reduce(weights * self._imitation_loss(log_probs, batch)),
            loss_kl_to_ref=loss_kl,
            kl_to_ref=None if kl is None else self._reduce(kl.detach()),
            entropy=self._reduce(self._per_response(entropies, batch.response_mask)),
        )

    def _importance_weights(self, tensordict: TensorDictBase, device: torch.device) -> torch.Tensor:
        """Float32 [B] of the batch, or [] of 1 where it has none."""
        weights = tensordict.get(self.tensor_keys.importance_weight, None)
        return torch.ones((), device=device) if weights is None else weights.to(device)

    def _imitation_loss(self, log_probs: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
        """SFT's or MinorSFT's loss of each response, [B]."""
        responses = self._per_response(log_probs, batch.response_mask)
        if self.loss_function == "sft":
            return sft_loss(responses, "none")
        assert batch.ref_log_probs is not None  # forward has refused such a batch
        ref_responses = self._per_response(batch.ref_log_probs, batch.response_mask)
        return 2 / self.beta * minor_sft_loss(responses, ref_responses, self.beta, "none")

    def _kl_per_response(self, log_probs: torch.Tensor, ref: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        # Masked before exp: at a prompt token (ref = 0) exp overflows from a log-prob of -89 on, and the zero gradient
        # that a mask applied afterwards sends back becomes 0 * inf = NaN.
        diff = (ref - log_probs).masked_fill(~mask, 0.0)
        return self._per_response(diff.expm1() - diff, mask)

    def _per_response(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean (or sum) over response tokens: [B, T] -> [B]; 0 for a response without tokens."""
        total = values.masked_fill(~mask, 0.0).sum(-1)
        return total / mask.sum(-1).clamp(min=1) if self.normalize_by_seq_length else total

    def _reduce(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.reduction == "none" else getattr(values, self.reduction)()

    def _pad(self, tensordict: TensorDictBase) -> PaddedBatch:
        ids = tensordict.get(self.tensor_keys.tokens, None, as_list=True)
        if ids is None:
            ids, masks = self._tokenize_history(tensordict)
        else:
            masks = tensordict.get(self.tensor_keys.response_mask, as_list=True)
        ref = tensordict.get(self.tensor_keys.ref_log_prob, None, as_list=True)
        pad_token_id = 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        parameter = next(self.model.parameters(), self._device_fallback)
        return pad_batch(ids, masks, ref, pad_token_id=pad_token_id, device=parameter.device)

    def _tokenize_history(self, tensordict: TensorDictBase) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        history = tensordict[self.tensor_keys.history]
        kwargs = self.tokenizer_kwargs
        if not {"chat_template", "chat_template_name"} & kwargs.keys():
            # TorchRL would otherwise guess a template from the tokenizer's name.
            kwargs = kwargs | {"chat_template": self.tokenizer.chat_template}
        tokenized = history.apply_chat_template(tokenizer=self.tokenizer, **kwargs)
        return tokenized.get("input_ids", as_list=True), tokenized.get("assistant_masks", as_list=True)


def _check_options(reduction: str, kl_to_ref_coeff: float | None, loss_function: str, beta: float) -> None:
    """Refuse what TorchRL would only meet, or silently ignore, in the middle of a run."""
    if loss_function not in LOSS_FUNCTIONS:
        raise UserError(f"loss_function ({loss_function!r}) is unknown: choose one of {', '.join(LOSS_FUNCTIONS)}.")
    if reduction not in REDUCTIONS:
        raise UserError(f"reduction ({reduction!r}) is unknown: choose one of {', '.join(REDUCTIONS)}.")
    if kl_to_ref_coeff is not None and kl_to_ref_coeff < 0:
        raise UserError(f"kl_to_ref_coeff ({kl_to_ref_coeff}) must be at least 0.")
    if loss_function == "minor_sft" and kl_to_ref_coeff:
        raise UserError(
            f"kl_to_ref_coeff ({kl_to_ref_coeff}) has no place in minor_sft, whose distance to the reference is "
            "implicit: set kl_to_ref_coeff to null, or use loss_function=sft."
        )
    if loss_function == "minor_sft" and beta <= 0:
        raise UserError(f"The beta of minor_sft ({beta}) must be above 0.")
