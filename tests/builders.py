"""What several test files build."""

import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from expert_iteration.config import LoraConfig


def random_model(vocab_size: int, seed: int = 0, **config) -> Qwen2ForCausalLM:
    """A Qwen2 of two layers in training mode, its weights large enough that its log-probs differ."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            **config,
        )
    )


def random_policy(model: PreTrainedModel, seed: int = 0, *, r: int = 4, alpha: float = 8.0, dropout: float = 0.0):
    """The model with adapters that say something, as after training."""
    from expert_iteration.lora import add_adapters

    policy = add_adapters(model, LoraConfig(enabled=True, r=r, alpha=alpha, dropout=dropout), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))  # the same on any device
    return policy
