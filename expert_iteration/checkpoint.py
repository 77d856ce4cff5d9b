"""What a run leaves behind: checkpoints to look into, and the model as an ordinary Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from expert_iteration import timeline
from expert_iteration.config import Config, to_plain_dict
from expert_iteration.models import without_weights
from expert_iteration.policy_reader import PolicyReader

if TYPE_CHECKING:
    from expert_iteration.learner import Learner


class Checkpointer:
    """Writes the checkpoints of a run.

    Args:
        directory: where they go.
        learner: its model, counters and states are saved.
        cfg: the whole configuration, saved as a plain dictionary.
    """

    def __init__(self, directory: Path, learner: Learner, cfg: Config) -> None:
        self._directory = directory
        self._learner = learner
        self._about: dict[str, Any] = {"config": to_plain_dict(cfg)}
        if cfg.train_model.lora.enabled:
            self._about["base_model"] = cfg.model.name
        self._last_step = -1

    def save(self) -> Path:
        """Write `checkpoint_<gradient step>.pt`; saving twice at one step writes once.

        It loads on any machine, whatever was trained on, with `torch.load(path, weights_only=True)`: step, optim_step,
        model_state_dict, optimizer_state_dict, scheduler_state_dict, scaler_state_dict, config, and the learner's
        further counters. With LoRA model_state_dict holds the adapters alone, and base_model says of which model.
        """
        step = self._learner.gradient_steps
        path = self._directory / f"checkpoint_{step}.pt"
        if step == self._last_step:
            return path
        self._directory.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        try:
            with timeline.span(timeline.SAVING):
                torch.save({**self._learner.checkpoint(), **self._about}, temporary)
                # Whoever sees the name sees a whole file.
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self._last_step = step
        return path


    def stop_if_asked(self) -> None:
        """End the run where the user, or the machine, has asked it to stop, with everything saved."""


def save_pretrained(
    policy: nn.Module, tokenizer: Any, directory: Path, dtype: torch.dtype, reader: PolicyReader | None = None
) -> None:
    """Save policy and tokenizer as a Hugging Face folder: an ordinary model, whatever the policy is while it trains.

    Args:
        policy: a Hugging Face model, or PEFT's wrapper of one; it may be quantized or sharded.
        tokenizer: of the model.
        directory: the folder.
        dtype: of the floating-point weights in the folder (the engine's).
        reader: reads the policy; by default one for a policy that lies in this process alone.
    """
    # transformers writes down the dtype of the model that saves, in which whoever loads the folder gets it.
    model = without_weights(policy).to(dtype)
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
    tokenizer.save_pretrained(directory)
