"""Log-probs of tokens under a Hugging Face model, and entropies of the distributions over them.

The one place where they are computed: the policy in training, the reference scorer and the probe of a weight push all
call it, so their numbers differ only by weights and precision.

The logits of all tokens never stand in memory at once: over 150,000 words those of 8,000 tokens take 5 GB in float32,
and several times that in training. The model's backbone runs once, and its head on a chunk of tokens after the other,
again in the backward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from expert_iteration.models import evaluating, hugging_face_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

CHUNK_BYTES = 128 * 2**20  # of a chunk's logits in float32; a pass holds three or four tensors of this size
LEAST_CHUNK_TOKENS = 16  # however large the vocabulary: smaller chunks leave the matrix units idle


class LogitRule(NamedTuple):
    """What a model family does to the outputs of its head before they are logits."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, outputs: torch.Tensor) -> torch.Tensor:
        """Logits of head outputs, of the same shape and dtype."""
        logits = outputs if self.scale == 1.0 else outputs * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class TokenScores(NamedTuple):
    """What a model says of tokens, each given its predecessors."""

    log_probs: torch.Tensor
    """float32 [B, T], of the tokens themselves."""
    entropies: torch.Tensor
    """float32 [B, T], nats, without gradient: of the model's whole distribution over the token at that place."""


# By model, so that each is examined once. Weak, for models come and go.
_rules: WeakKeyDictionary[nn.Module, LogitRule | None] = WeakKeyDictionary()


class LogProbModel(nn.Module):
    """A causal language model whose forward pass gives log-probs of tokens, in place of logits.

    Backbone and head are both reached within one forward call, so this is the module to wrap in
    `DistributedDataParallel` or to shard with `fully_shard`. Shard the head together with the root: how often it is
    called depends on the number of tokens, which differs from rank to rank.

    When it is built it is proven on a few tokens that backbone, head and what is known of the model's family give the
    model's own logits. Where they do not, and for models that are not of Hugging Face's class, the logits are computed
    whole. Build it before the model is sharded.

    Args:
        model: a Hugging Face causal language model, or PEFT's wrapper of one, with its adapters on or off.

    Attributes:
        model: the same.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        if model not in _rules:
            _rules[model] = _find_logit_rule(model)
        self._logit_rule = _rules[model]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        target_mask: torch.Tensor | None = None,
        with_entropies: bool = False,
    ) -> torch.Tensor | TokenScores:
        """See `token_log_probs`, and with entropies `token_scores`."""
        wanted = (attention_mask if target_mask is None else target_mask)[:, 1:].bool()
        targets = input_ids[:, 1:]
        if self._logit_rule is None:
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
            whole = _score(logits.flatten(0, 1), targets.flatten(), with_entropies)
            tables = [values.view(targets.shape) for values in whole]
        else:
            backbone, head = _backbone_and_head(self.model)
            hidden = _hidden_states(backbone, input_ids, attention_mask)[:, :-1]
            found = _score_by_chunks(head, self._logit_rule, hidden[wanted], targets[wanted], with_entropies)
            tables = [values.new_zeros(targets.shape).masked_scatter(wanted, values) for values in found]
        padded = [F.pad(table, (1, 0)) for table in tables]
        return TokenScores(*padded) if with_entropies else padded[0]


def token_log_probs(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    target_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probability of each token given its predecessors.

    Args:
        model: a Hugging Face causal language model, PEFT's wrapper of one, or a `LogProbModel`, bare or distributed.
        input_ids: int64 [B, T], right-padded.
        attention_mask: [B, T], 1 on real tokens.
        target_mask: [B, T], true on the tokens whose log-probs are asked for, all others save their share of the
            head's work; None: `attention_mask`.

    Returns:
        float32 [B, T]. Position 0 has no predecessor and gets 0; values outside `target_mask` mean nothing and are to
        be masked. The log-softmax is taken in float32 whatever the model's precision, as bfloat16 keeps only three
        digits.
    """
    return as_log_prob_model(model)(input_ids, attention_mask, target_mask)


def token_scores(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    target_mask: torch.Tensor | None = None,
) -> TokenScores:
    """`token_log_probs`, and entropies at the same places; arguments and shapes as there."""
    return as_log_prob_model(model)(input_ids, attention_mask, target_mask, with_entropies=True)


def as_log_prob_model(model: nn.Module) -> nn.Module:
    """`model` where it gives log-probs itself, otherwise a `LogProbModel` around it."""
    return model if isinstance(model, LogProbModel | DistributedDataParallel) else LogProbModel(model)


def pad_rows(rows: Sequence[torch.Tensor], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad 1-D id tensors to (input_ids, attention_mask), both int64 [B, T]."""
    lengths = torch.tensor([len(row) for row in rows])
    input_ids = pad_sequence(list(rows), batch_first=True, padding_value=pad_token_id)
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return input_ids, attention_mask.to(input_ids.device)


def _score(logits: torch.Tensor, targets: torch.Tensor, with_entropies: bool) -> tuple[torch.Tensor, ...]:
    """Logits [N, V] and targets [N] -> log-probs of the targets and, where wanted, entropies, float32 [N]."""
    # The two operations of which F.cross_entropy consists.
    log_probs = F.log_softmax(logits.float(), dim=-1)
    of_targets = -F.nll_loss(log_probs, targets, reduction="none")
    if not with_entropies:
        return (of_targets,)
    # Last, and without gradient: checkpointing stops its second run where nothing more is needed, which is before this.
    with torch.no_grad():
        return of_targets, -log_probs.exp().mul_(log_probs).sum(-1)


def _score_by_chunks(
    head: nn.Linear, logit_rule: LogitRule, hidden: torch.Tensor, targets: torch.Tensor, with_entropies: bool
) -> list[torch.Tensor]:
    """Hidden states [N, H] and the tokens [N] that they predict -> what `_score` gives of their logits."""

    def of_chunk(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _score(logit_rule(head(hidden)), targets, with_entropies)

    size = max(LEAST_CHUNK_TOKENS, CHUNK_BYTES // (4 * head.out_features))
    # Where there is nothing to predict there is one empty chunk, and the result hangs on the parameters all the same.
    chunks = list(zip(hidden.split(size), targets.split(size), strict=True))
    if not torch.is_grad_enabled():
        return _join([of_chunk(*chunk) for chunk in chunks])
    # A head draws no random numbers, so their state need not be kept for the second run.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    with _uncached_autocast(hidden.device.type):
        return _join([checkpoint(of_chunk, *chunk, **options) for chunk in chunks])


def _join(chunks: Sequence[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    """Of the scores of each chunk those of all."""
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


def _uncached_autocast(device_type: str) -> torch.autocast:
    """Autocast as it is, but casting weights at each use.

    From its cache all chunks would use the same copy of the head's weight, in whose half precision their gradients
    would be summed.
    """
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return torch.autocast(device_type, dtype, enabled, cache_enabled=False)


def _find_logit_rule(model: nn.Module) -> LogitRule | None:
    """The rule by which backbone and head give the model's own logits; None where none is known."""
    hf_model = hugging_face_model(model)
    if hf_model is None:
        return None
    rule = _rule_of_family(hf_model.config.get_text_config())
    parts = _backbone_and_head(model)
    if parts[0] is not hf_model and isinstance(parts[1], nn.Linear) and _gives_own_logits(model, *parts, rule):
        return rule
    logger.warning(
        "%s computes its logits in a way of its own. They are computed whole, which in training takes about 12 bytes "
        "for each token and each word of the vocabulary.",
        type(hf_model).__name__,
    )
    return None


def _rule_of_family(config: PretrainedConfig) -> LogitRule:
    """By the configuration's names: Cohere's logit_scale, Granite's logits_scaling, Gemma's final_logit_softcapping."""
    factor, divisor = _number(config, "logit_scale", 1.0), _number(config, "logits_scaling", 1.0)
    return LogitRule(factor / divisor, _number(config, "final_logit_softcapping", 0.0) or None)


def _number(config: PretrainedConfig, name: str, default: float) -> float:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else default


@torch.no_grad()
def _gives_own_logits(model: nn.Module, backbone: nn.Module, head: nn.Linear, rule: LogitRule) -> bool:
    """Whether backbone, head and rule give the logits of `model` itself on a few tokens."""
    input_ids = torch.arange(min(8, head.out_features), device=head.weight.device)[None]
    mask = torch.ones_like(input_ids)
    with evaluating(model), _loud(head), _any_attention(hugging_face_model(model)):
        expected = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[0]
        found = rule(head(_hidden_states(backbone, input_ids, mask)[0]))
    # The same operations on the same numbers; a rule that is missing or wrong changes them by far more.
    return torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2)


@contextmanager
def _any_attention(hf_model: PreTrainedModel) -> Iterator[None]:
    """Attention that computes in every dtype on every device: flash attention would refuse float32, and the CPU."""
    chosen = hf_model.config._attn_implementation
    hf_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        hf_model.set_attn_implementation(chosen)


@contextmanager
def _loud(head: nn.Linear) -> Iterator[None]:
    """The head's outputs scaled to a maximum of 50: those of an untrained model are too small for a cap to show."""
    handle = head.register_forward_hook(lambda module, args, outputs: outputs * (50 / outputs.abs().max()))
    try:
        yield
    finally:
        handle.remove()


def _hidden_states(backbone: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The backbone's last hidden states, [B, T, H]."""
    return backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def _backbone_and_head(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """The two parts of the Hugging Face model that `model` is or wraps."""
    hf_model = hugging_face_model(model)
    return hf_model.base_model, hf_model.get_output_embeddings()
