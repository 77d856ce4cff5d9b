"""The optimizer of the configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from expert_iteration.config import OptimizerConfig
from expert_iteration.errors import UserError

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
}


def make_optimizer(model: nn.Module, cfg: OptimizerConfig, lr: float) -> Optimizer:
    """The optimizer of the configuration over the trainable parameters of `model`.

    Weight decay acts on matrices only: decaying norms and biases (fewer than two dimensions) pulls them away from what
    they are for without making the model simpler.

    Args:
        model: parameters with `requires_grad` are trained.
        cfg: name (AdamW, Adam or SGD), weight_decay, betas (no effect on SGD).
        lr: peak learning rate, `config.learning_rate(cfg)`: what `cfg.lr=None` means depends on what is trained.

    Raises:
        UserError: an unknown name, or a model without trainable parameters.
    """
    if cfg.name not in OPTIMIZERS:
        raise UserError(f"optimizer.name ({cfg.name!r}) is unknown: choose one of {', '.join(OPTIMIZERS)}.")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise UserError("The model has no trainable parameter.")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": lr}
    if cfg.name != "SGD":
        options["betas"] = tuple(cfg.betas)
    return OPTIMIZERS[cfg.name]([group for group in groups if group["params"]], **options)
