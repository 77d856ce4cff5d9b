"""Hugging Face models: loading them, and what is done with a loaded one."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_iteration.errors import UserError
from expert_iteration.hub import BUILT_IN, cached_folder, is_hub_id

if TYPE_CHECKING:
    from torch import nn

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


def context_length(name: str, max_model_len: int | None, trust_remote_code: bool = False) -> int:
    """Tokens that a prompt and its response may have together: `max_model_len`, or what the model was made for."""
    if max_model_len is not None:
        return max_model_len
    from transformers import AutoConfig

    refuse_untrusted_code(name, trust_remote_code)
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    return config.get_text_config().max_position_embeddings


def load_model(
    name: str,
    *,
    dtype: str,
    attn_implementation: str,
    device: str,
    trust_remote_code: bool = False,
    quantized: bool = False,
    section: str = "train_model",
) -> Any:
    """A Hugging Face causal language model in evaluation mode.

    Args:
        name: hub id or local folder.
        dtype: of the weights, by torch's name; with `quantized`, of those that are not linear layers, and of the
            products of those that are.
        attn_implementation: by transformers' name.
        device: a torch device, "cpu" or "cuda".
        trust_remote_code: whether Python code that comes with the model may run.
        quantized: hold the weights of all linear layers but the head in 4 bits: NF4 with double quantization
            (Dettmers et al., 2023, arXiv:2305.14314), by bitsandbytes.
        section: of the configuration that asks, for messages.

    Raises:
        UserError: the attention implementation is unknown, not installed or not made for this model; bitsandbytes is
            not installed; the model comes with code of its own that may not run.
    """
    from transformers import AutoModelForCausalLM

    refuse_untrusted_code(name, trust_remote_code)
    _check_attention(name, attn_implementation, trust_remote_code, section)
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
    }
    model: Any
    if not quantized:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
        return model.to(device).eval()
    config = _quantization_config(dtype, section)
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config, device_map={"": device}, **options)
    if device == "cpu":
        _avoid_cpu_faults(model, section)
    return model.eval()


def refuse_untrusted_code(name: str, trust_remote_code: bool) -> None:
    """Refuse a model that only its own code can load, before any of it runs.

    Raises:
        UserError: it is such a model, and `trust_remote_code` is false.
    """
    if trust_remote_code:
        return
    from transformers import CONFIG_MAPPING, PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(name)
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise UserError(
            f"model.name ({name}) comes with Python code of its own: set model.trust_remote_code=true if you trust its "
            "authors, or choose another model."
        )


def _check_attention(name: str, attn_implementation: str, trust_remote_code: bool, section: str) -> None:
    """Without weights, which may take minutes to load."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) and attn_implementation == "sdpa":
        # Transformers leaves the cap out without a word; the engine does not, and the probe would find them apart.
        raise UserError(
            f"{section}.attn_implementation (sdpa) cannot cap attention scores, as {name} does: set "
            f"{section}.attn_implementation=eager, or flash_attention_2 where it is installed."
        )
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(
                config, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{section}.attn_implementation ({attn_implementation}) cannot be used with {name} ({error}): install "
            f"what it needs, or set {section}.attn_implementation=sdpa or eager."
        ) from error


def _quantization_config(dtype: str, section: str) -> Any:
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"{section}.quantization.enabled (true) needs the package bitsandbytes: `pip install bitsandbytes`, or set "
            f"{section}.quantization.enabled=false."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _avoid_cpu_faults(model: nn.Module, section: str) -> None:
    """Keep clear of what bitsandbytes 0.50.2 does wrong on CPUs, without an error of its own.

    At a forward pass in evaluation mode, where the CPU has AVX512-BF16, it packs the weights anew, for good, for a
    kernel that has no backward pass: the training after it gets wrong gradients. And it takes every row of a weight to
    begin a new block of 64 values that share a scale, which is so only where 64 divides the row's length.
    """
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            weight: Any = module.weight
            if module.in_features % weight.blocksize:
                raise UserError(
                    f"{section}.quantization.enabled (true) does not work on a CPU for this model: {name} has "
                    f"{module.in_features} inputs, which is no multiple of {weight.blocksize}. Set "
                    f"{section}.quantization.enabled=false."
                )


def compile_forward(model: nn.Module) -> None:
    """Compile the backbone of a Hugging Face model, or of PEFT's wrapper of one, in place.

    Names in the state dict stay as they are, and the head runs as it is, in the chunks of `log_probs.py`. Lengths may
    change from batch to batch without compiling again. To be called after gradient checkpointing was enabled.
    """
    hf_model = hugging_face_model(model)
    # transformers lets the embeddings' outputs require gradients for checkpointing of the reentrant kind, which is not
    # ours. The compiled graph would break there.
    hf_model.disable_input_require_grads()
    hf_model.base_model.compile(dynamic=True)


def hugging_face_model(model: nn.Module) -> Any:
    """The Hugging Face model that `model` is, or that it wraps as PEFT does; None where there is none."""
    from transformers import PreTrainedModel

    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def without_weights(model: nn.Module) -> Any:
    """The Hugging Face model that `model` is or wraps, on torch's meta device, without adapters and quantization.

    Its `save_pretrained(folder, state_dict=weights)` writes an ordinary folder, and empties the dictionary. That of a
    quantized model writes its own state dict instead, without a word.
    """
    import torch

    hf_model = hugging_face_model(model)
    config = copy.deepcopy(hf_model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        empty = type(hf_model)(config)
    empty.generation_config = hf_model.generation_config
    return empty


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode, without dropout; afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
