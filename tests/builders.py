"""What several test files build."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


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
