"""The sizes of a model from which its memory follows, known before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal language model.

    Attributes:
        parameters: all of them, tied ones once.
        linear_parameters: weights of the linear layers but the head: what adapters sit on, and what four bits can hold.
        linear_ends: inputs and outputs of these layers, summed up: adapters of rank r have r x as many parameters.
        widest: the most inputs or outputs that one of them has.
        layers: decoder layers.
        hidden: width of the hidden states.
        heads: attention heads, which the devices of an engine share out.
        kv_heads: heads whose keys and values are cached.
        head_dim: width of a head.
        vocab: words that the head scores.
        context: tokens that a sequence may have.
        window: tokens of a sequence that every layer keeps in its cache at most.
    """

    parameters: int
    linear_parameters: int
    linear_ends: int
    widest: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    window: int


def read_model_shape(name: str, trust_remote_code: bool = False) -> ModelShape:
    """The shape of a model from its configuration alone.

    Args:
        name: local folder, or hub id.
        trust_remote_code: whether code that comes with the model may run.
    """
    from transformers import AutoConfig

    return shape_of(AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code), trust_remote_code)


def shape_of(config: PretrainedConfig, trust_remote_code: bool = False) -> ModelShape:
    """The shape of the model that a Hugging Face configuration describes.

    The model is built on torch's meta device, where tensors have shapes and no memory. So the numbers are exact for
    every architecture, and arithmetic for each family need not be kept up to date.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    head = model.get_output_embeddings()
    # GPT-2's linear layers are of a class of their own; PEFT puts adapters on them too.
    linears = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]
    text = config.get_text_config()
    heads = text.num_attention_heads
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear_parameters=sum(weight.numel() for weight in linears),
        linear_ends=sum(sum(weight.shape) for weight in linears),
        widest=max(max(weight.shape) for weight in linears),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        # Families leave out what follows from the rest.
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        context=text.max_position_embeddings,
        window=_window(text),
    )


def _window(text: PretrainedConfig) -> int:
    """The sliding window where every layer has one; families that mix layers say of each what it attends to."""
    window = getattr(text, "sliding_window", None)
    if window is None or "full_attention" in (getattr(text, "layer_types", None) or ()):
        return text.max_position_embeddings
    return min(text.max_position_embeddings, window)
