"""Tokenizer and Hugging Face models: loading them, and what their chat template says of a turn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_iteration.errors import UserError
from expert_iteration.hub import BUILT_IN, cached_folder, is_hub_id

if TYPE_CHECKING:
    from expert_iteration.config import Config


def model_path(cfg: Config) -> str:
    """What transformers and vLLM load: a folder, or the hub id of a model that is not in the local cache yet.

    The tiny model is built when it is missing, with a progress bar; that takes about a minute.
    """
    if cfg.model.name != BUILT_IN:
        folder = cached_folder(cfg.model.name) if is_hub_id(cfg.model.name) else None
        return cfg.model.name if folder is None else str(folder)
    from expert_iteration.tiny import ensure_tiny_model

    cache_dir = None if cfg.tiny.cache_dir is None else Path(cfg.tiny.cache_dir)
    return str(ensure_tiny_model(cfg.tiny.model_seed, cache_dir))


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, with the chat template that its turns are written in.

    Raises:
        UserError: it has no chat template.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.chat_template is None:
        raise UserError(
            f"model.name ({name}) has a tokenizer without a chat template, so its turns have no form: choose the "
            "instruction-tuned version of the model, or save the tokenizer with a template."
        )
    return tokenizer


def context_length(name: str, max_model_len: int | None) -> int:
    """Tokens that a prompt and its response may have together: `max_model_len`, or what the model was made for."""
    if max_model_len is not None:
        return max_model_len
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name).max_position_embeddings


def load_model(name: str, *, dtype: str, attn_implementation: str, device: str) -> Any:
    """A Hugging Face causal language model in evaluation mode.

    Args:
        name: hub id or local folder.
        dtype: of the weights, by torch's name.
        attn_implementation: by transformers' name.
        device: a torch device.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attn_implementation)
    return model.to(device).eval()


def end_of_turn_id(tokenizer: Any) -> int:
    """The token with which the chat template ends the assistant's turn: it stops generation and is trained.

    Not always the tokenizer's own end token: base models of the Qwen family end a text with `<|endoftext|>` and a turn
    with `<|im_end|>`.

    Raises:
        UserError: the template writes no special token after the assistant's text, and the tokenizer has no end token.
    """
    marker = "response"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": marker}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ending = tokenizer(text[text.rindex(marker) + len(marker) :], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    candidates = [token for token in ending if token in special]
    if candidates:
        return candidates[0]
    if tokenizer.eos_token_id is None:
        raise UserError("The chat template ends the assistant's turn with no special token: generation would not stop.")
    return tokenizer.eos_token_id


def chat_prompt_ids(tokenizer: Any, system_prompt: str | None, question: str) -> list[int]:
    """Token ids of a prompt: the chat template around system prompt and question, up to where the response begins."""
    messages = [{"role": "user", "content": question}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
