"""Which keys hold paths, and what their values are from any other directory."""

import os
from pathlib import Path
from typing import Any

from expert_iteration.chat_template import is_template_file
from expert_iteration.user_functions import with_absolute_path

# Whose values are always paths. Not logging.checkpoint_dir, which is relative to the run directory.
PATH_KEYS = ("env.dataset_path", "train.from_expert_set", "tiny.cache_dir", "reward.openai_prompt", "resume_from")


def absolute(key: str, value: Any, directory: Path) -> Any:
    """A key's value, its path, where it has one, not relative to `directory` any more."""
    if key == "reward.fn" and isinstance(value, list):
        return [with_absolute_path(str(spec), directory) for spec in value]
    if not isinstance(value, str) or value == "":
        return value
    if key == "reward.fn":
        return with_absolute_path(value, directory)
    if not _is_path(key, value):
        return value
    path = str(directory / Path(value).expanduser())
    return os.path.normpath(path) if key == "resume_from" else path  # without .., as Hydra has run directories


def _is_path(key: str, value: str) -> bool:
    if key == "model.name":
        return value.startswith(("/", ".", "~"))
    if key == "model.chat_template":
        return is_template_file(value)
    return key in PATH_KEYS
