"""Low-rank adapters (Hu et al., 2021, arXiv:2106.09685), by PEFT: added, merged, switched off, saved.

Adapters are float32 whatever the base is, for in half precision updates of a usual size vanish. The base is frozen.
Importing this module imports PEFT, which takes a second: modules that also serve runs without adapters import it late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from safetensors.torch import save_file
from torch import nn

from expert_iteration.config import LoraConfig
from expert_iteration.models import evaluating, hugging_face_model

ADAPTER = "default"  # PEFT's name for an adapter that nobody named


def peft_config(lora: LoraConfig) -> peft.LoraConfig:
    """The adapters as PEFT and vLLM describe them: on every linear layer but the head."""
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=lora.dropout,
    )


def add_adapters(model: nn.Module, lora: LoraConfig, seed: int) -> peft.PeftModel:
    """Freeze a Hugging Face model and put adapters into it, in place.

    The adapters begin as nothing: one of their two factors is random, the other zero.

    Args:
        model: may be quantized; its own dtype stays.
        lora: rank, scale and dropout.
        seed: of the random factors, which are the same on every device.

    Returns:
        PEFT's wrapper of the same model, in evaluation mode if the model is. Trainable are the adapters, in float32.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed the caller's accelerators too. PEFT draws on the CPU.
        torch.random.default_generator.manual_seed(seed)
        policy = peft.get_peft_model(model, peft_config(lora))
    return policy.train(model.training)


@torch.no_grad()
def merged_weights(
    policy: nn.Module, whole: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict of the model without adapters, its weights with them: W + scaling * B @ A where there are some.

    One layer at a time is merged, in float32, so there is never a copy of the model. 4-bit weights are dequantized.

    Args:
        policy: PEFT's wrapper or the Hugging Face model within.
        whole: a parameter or a shard of it -> the whole tensor.

    Yields:
        the Hugging Face model's own names, in its order, with tensors that may be gone once the next is asked for.
    """
    model = hugging_face_model(policy)
    for name, tensor in model.state_dict().items():
        # PEFT has put each layer into another, as its base_layer. bitsandbytes adds names below that of a weight.
        layer_name, is_inside, part = name.partition(".base_layer.")
        if not is_inside and ".lora_" not in name:
            yield name, whole(tensor)
        elif part == "weight":
            yield f"{layer_name}.weight", _merged_weight(model.get_submodule(layer_name), whole)
        elif part == "bias":
            yield f"{layer_name}.bias", whole(tensor)


def _merged_weight(layer: Any, whole: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    base = layer.get_base_layer().weight
    dense = dequantize_bnb_weight(base) if get_bnb_param_type(base) else whole(base)
    first, second = whole(layer.lora_B[ADAPTER].weight), whole(layer.lora_A[ADAPTER].weight)
    if layer.fan_in_fan_out:  # a layer like GPT-2's, whose weight is [in, out]
        first, second = second.T, first.T
    return torch.addmm(dense.float(), first, second, alpha=layer.scaling[ADAPTER])


@contextmanager
def adapters_off(policy: peft.PeftModel) -> Iterator[None]:
    """`policy` as its frozen base, in evaluation mode; afterwards as it was."""
    with evaluating(policy), policy.disable_adapter():
        yield


def adapter_state_dict(policy: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters alone, by PEFT's names in `adapter_model.safetensors`; not copied."""
    # "auto" would ask the hub whether the base's vocabulary was changed.
    return peft.get_peft_model_state_dict(policy, save_embedding_layers=False)


def save_adapters(folder: Path, config: peft.LoraConfig, adapters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write adapters as PEFT's folder, which PEFT and vLLM load.

    Args:
        folder: is made.
        config: of the adapters.
        adapters: tensors by the names of `adapter_state_dict`.
    """
    config.save_pretrained(str(folder))
    # Copies, for safetensors refuses tensors that lie in one buffer.
    tensors = {name: tensor.to("cpu", copy=True) for name, tensor in adapters}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME)


def load_adapter_state(policy: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put what `adapter_state_dict` gave back into adapters of the same configuration.

    Raises:
        ValueError: names are missing or unknown.
    """
    if (found := set(state)) != (expected := set(adapter_state_dict(policy))):
        raise ValueError(
            f"These are other adapters than the policy's: missing {sorted(expected - found)[:3]}, unknown "
            f"{sorted(found - expected)[:3]}. Use the train_model.lora section that they were made with."
        )
    peft.set_peft_model_state_dict(policy, dict(state))
