"""What a run leaves behind: checkpoints to look into, and the model as an ordinary Hugging Face folder."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from expert_iteration import timeline
from expert_iteration.config import Config, to_plain_dict

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
        self._config = to_plain_dict(cfg)
        self._last_step = -1

    def save(self) -> Path:
        """Write `checkpoint_<gradient step>.pt`; saving twice at one step writes once.

        It loads on any machine, whatever was trained on, with `torch.load(path, weights_only=True)`: step, optim_step,
        model_state_dict, optimizer_state_dict, scheduler_state_dict, scaler_state_dict, config, and the learner's
        further counters.
        """
        step = self._learner.gradient_steps
        path = self._directory / f"checkpoint_{step}.pt"
        if step == self._last_step:
            return path
        self._directory.mkdir(parents=True, exist_ok=True)
        state = {
            **self._learner.state_dict(),
            "model_state_dict": self._learner.model.state_dict(),
            "config": self._config,
        }
        temporary = path.with_suffix(".tmp")
        try:
            with timeline.span(timeline.SAVING):
                torch.save(_to_cpu(state, {}), temporary)
                # Whoever sees the name sees a whole file.
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self._last_step = step
        return path


def _to_cpu(state: Any, moved: dict[Any, torch.Tensor]) -> Any:
    """A nested state with its tensors on the CPU, those in `moved` taken from there: tied ones are written once."""
    if isinstance(state, dict):
        return {key: _to_cpu(value, moved) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_to_cpu(value, moved) for value in state)
    if not isinstance(state, torch.Tensor):
        return state
    identity = state.device, state.data_ptr(), state.dtype, state.shape, state.stride()
    if identity not in moved:
        moved[identity] = state.cpu()
    return moved[identity]


def save_pretrained(model: Any, tokenizer: Any, directory: Path, dtype: torch.dtype) -> None:
    """Save model and tokenizer as a Hugging Face folder, floating-point weights in `dtype` (the engine's)."""
    # Tied tensors are cast once, or transformers would take the copies for two and write both.
    cast: dict[Any, torch.Tensor] = {}
    weights = {}
    for name, tensor in model.state_dict().items():
        target = dtype if tensor.is_floating_point() else tensor.dtype
        identity = tensor.data_ptr(), tensor.shape
        weights[name] = cast.setdefault(identity, tensor.detach().to("cpu", target))
    model.save_pretrained(directory, state_dict=weights)
    # transformers writes the dtype of the model in memory, in which whoever loads the folder would get it.
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
