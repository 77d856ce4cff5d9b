"""Tiny random models of well-known families, as Hugging Face folders with the tiny task's tokenizer."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the least that vLLM has kernels for on a CPU
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,  # large enough that log-probs differ from token to token
}
# What sets a family apart: tied or untied head, grouped queries, biases, sliding windows, soft-capped logits, norms.
FAMILIES = {
    "qwen2.5-tied": lambda **sizes: Qwen2Config(**sizes | {"hidden_size": 128}, tie_word_embeddings=True),
    "qwen2.5-untied": lambda **sizes: Qwen2Config(**sizes | {"hidden_size": 128}, tie_word_embeddings=False),
    "qwen3": lambda **sizes: Qwen3Config(**sizes, tie_word_embeddings=True),
    "llama-3": lambda **sizes: LlamaConfig(**sizes, tie_word_embeddings=False, rope_theta=500_000.0),
    "gemma": lambda **sizes: GemmaConfig(**sizes | {"num_key_value_heads": 1}),
    "gemma-2": lambda **sizes: Gemma2Config(**sizes, sliding_window=32, query_pre_attn_scalar=32),
    "gemma-3": lambda **sizes: Gemma3TextConfig(**sizes, sliding_window=32, query_pre_attn_scalar=32),
    "mistral": lambda **sizes: MistralConfig(**sizes, sliding_window=32),
}


def make_chat_folder(tokenizer, folder):
    """A Llama with random weights and this tokenizer, as its publisher would have put it on the hub."""
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_family_folder(family, tiny_folder, folder):
    """A model of `family` with random weights and the tokenizer that lies in `tiny_folder`."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = FAMILIES[family](**SIZES, **ids, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
