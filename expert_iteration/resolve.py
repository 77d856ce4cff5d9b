"""From what Hydra composed to a `Config`: keys and types, absolute paths, then the rules of `validation.py`."""

import os
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from expert_iteration.config import Config
from expert_iteration.errors import UserError
from expert_iteration.keys import explain_error, leaf_keys
from expert_iteration.path_keys import PATH_KEYS, absolute
from expert_iteration.validation import RULES, mode_belongs_to_script


def resolve_config(cfg: DictConfig, mode: str) -> Config:
    """The configuration with its types checked, its paths absolute and every rule kept.

    Args:
        cfg: as composed by Hydra, or any dictionary of its form.
        mode: the script's own, "sync" or "async".

    Raises:
        UserError: an unknown or missing key, a wrong type, or the first rule that does not hold.
    """
    config = to_config(cfg)
    mode_belongs_to_script(config, mode)
    for rule in RULES:
        rule(config)
    return config


def to_config(cfg: DictConfig) -> Config:
    """Types and keys only: `cfg` merged onto a clean schema, which refuses what Hydra let pass (`+unknown.key=1`).

    Raises:
        UserError: an unknown or missing key, a wrong type, an interpolation that leads nowhere.
    """
    try:
        merged = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.to_container(cfg)))
        _refuse_missing(merged)
        config = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(explain_error(error)) from error
    _make_paths_absolute(config)
    return config


def _refuse_missing(cfg: DictConfig) -> None:
    missing = [key for key in leaf_keys() if _is_missing(cfg, key)]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: no value is set. A task file takes what it does not decide itself from "
            "config/base.yaml and the mode: its defaults list begins with `base` and `mode: ${mode:sync}`."
        )


def _is_missing(cfg: DictConfig, key: str) -> bool:
    """Without following interpolations, which `OmegaConf.missing_keys` does: their target may be what is missing."""
    section, _, rest = key.partition(".")
    return OmegaConf.is_missing(cfg, section) or bool(rest and _is_missing(cfg[section], rest))


def _make_paths_absolute(cfg: Config) -> None:
    """Workers run in other directories, so a relative path must not leave this process."""
    for key in (*PATH_KEYS, "model.name", "model.chat_template", "reward.fn"):
        section, _, name = key.rpartition(".")
        owner = getattr(cfg, section) if section else cfg
        setattr(owner, name, absolute(key, getattr(owner, name), Path.cwd()))
    cfg.logging.checkpoint_dir = os.path.expanduser(cfg.logging.checkpoint_dir)  # stays relative to the run directory
