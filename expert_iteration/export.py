"""A policy as an ordinary Hugging Face folder, for others' tools: `last/` of a run, and `best/`.

The folder holds the merged model in the engine's dtype, the tokenizer with its chat template, how to generate, a model
card, and with LoRA the adapters by themselves with a tokenizer, in a folder of their own: `from_pretrained` on a folder
that has both would apply them twice.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from expert_iteration import timeline
from expert_iteration.chat_template import stop_token_ids
from expert_iteration.checkpoint_files import replacing
from expert_iteration.config import Config, InferenceModelConfig
from expert_iteration.errors import UserError
from expert_iteration.hub import is_hub_id
from expert_iteration.models import hugging_face_model, model_path, without_weights
from expert_iteration.policy_reader import PolicyReader

if TYPE_CHECKING:
    from transformers import GenerationConfig

ADAPTERS = "adapters"


class Exporter:
    """Saves a run's policy as a folder.

    Args:
        cfg: the configuration.
        policy: in the trainer.
        tokenizer: of the model.
        reader: reads the policy, which may be sharded or quantized.
    """

    def __init__(self, cfg: Config, policy: nn.Module, tokenizer: Any, reader: PolicyReader) -> None:
        self._cfg = cfg
        self._policy = policy
        self._tokenizer = tokenizer
        self._reader = reader

    def export(self, folder: Path, card: str) -> None:
        """Save the policy as it is now, in place of a folder that is there; whoever sees the name sees a whole folder.

        Args:
            folder: where.
            card: the text of its README.md.

        Raises:
            UserError: it cannot be written, for instance on a full disk; the folder that was there stays.
        """
        try:
            with timeline.span(timeline.SAVING), replacing(folder) as new:
                self._save(new)
                (new / "README.md").write_text(card, encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"The model could not be saved as {folder} ({error}). Make room, and go on from the last checkpoint "
                "with resume_from."
            ) from error

    def _save(self, folder: Path) -> None:
        config = self._cfg.inference_model
        published = hugging_face_model(self._policy).generation_config
        save_pretrained(
            self._policy,
            self._tokenizer,
            folder,
            getattr(torch, config.torch_dtype.value),
            self._reader,
            make_generation_config(config, self._tokenizer, published),
        )
        if self._cfg.train_model.lora.enabled:
            self._save_adapters(folder / ADAPTERS)
            _save_tokenizer(self._tokenizer, folder / ADAPTERS)  # without which its chat template would be the base's

    def _save_adapters(self, folder: Path) -> None:
        from expert_iteration.lora import ADAPTER, save_adapters

        policy: Any = self._policy  # PEFT's wrapper
        config = copy.copy(policy.peft_config[ADAPTER])
        name = self._cfg.model.name
        # Of a hub model that lies in the local cache, PEFT has noted the folder.
        config.base_model_name_or_path = name if is_hub_id(name) else model_path(self._cfg)
        config.target_modules = sorted(config.target_modules)  # a set, which would be written in any order
        config.inference_mode = True  # as PEFT itself saves it
        save_adapters(folder, config, self._reader.adapters(self._policy))


def save_pretrained(
    policy: nn.Module,
    tokenizer: Any,
    directory: Path,
    dtype: torch.dtype,
    reader: PolicyReader | None = None,
    generation_config: GenerationConfig | None = None,
) -> None:
    """Save policy and tokenizer as a Hugging Face folder: an ordinary model, whatever the policy is while it trains.

    Args:
        policy: a Hugging Face model, or PEFT's wrapper of one; it may be quantized or sharded.
        tokenizer: of the model.
        directory: the folder.
        dtype: of the floating-point weights in the folder (the engine's).
        reader: reads the policy; by default one for a policy that lies in this process alone.
        generation_config: how to generate; by default as the start model's publisher said.

    Raises:
        OSError, SafetensorError: a file cannot be written, for instance on a full disk.
    """
    # transformers writes down the dtype of the model that saves, in which whoever loads the folder gets it.
    model = without_weights(policy).to(dtype)
    if generation_config is not None:
        model.generation_config = generation_config
    # Tied tensors must be one here too, or transformers would write both.
    first_names: dict[int, str] = {}
    tied_to = {
        name: first_names.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in (reader or PolicyReader()).weights(policy):
        target = dtype if tensor.is_floating_point() else tensor.dtype
        first = tied_to[name]
        weights[name] = weights[first] if first in weights else tensor.to("cpu", target)
    model.save_pretrained(directory, state_dict=weights)
    _save_tokenizer(tokenizer, directory)


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:
        # The tokenizers library, which is Rust, has no class of its own for what the system answers: it raises
        # Exception("No space left on device (os error 28)").
        if type(error) is Exception:
            raise OSError(str(error)) from error
        raise


def make_generation_config(
    config: InferenceModelConfig, tokenizer: Any, published: GenerationConfig
) -> GenerationConfig:
    """How to generate as the run did: the tokens at which its engines stop, and its sampling.

    Args:
        config: the `inference_model` section.
        tokenizer: of the model.
        published: the start model's own; what else it says, such as a repetition penalty, the engines leave out.
    """
    from transformers import GenerationConfig

    stops = stop_token_ids(tokenizer, published.eos_token_id)
    return GenerationConfig(
        bos_token_id=published.bos_token_id,
        eos_token_id=stops,
        pad_token_id=stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        do_sample=True,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=0,  # left open, transformers would take 50
        max_new_tokens=config.max_tokens,
    )
