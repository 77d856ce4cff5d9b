"""Data sets of the Hugging Face hub, from the network or from the cache of an earlier download."""

import contextlib
from collections.abc import Iterator

from expert_iteration.errors import UserError
from expert_iteration.hub import ask
from expert_iteration.rows import Splits, brief, splits_of

PATIENCE_SECONDS = 8.0
ELSEWHERE = "or give a local copy with env.dataset_path"


def read_hub(name: str, config: str | None) -> Splits:
    """The splits of the data set `name`; of which configuration, where it has several.

    The hub is asked once whether it will hand the data set out: `load_dataset` alone would try for more than 20
    seconds where there is no network. Whatever it says, the cache is looked into.

    Raises:
        UserError: unknown, private or gated name, unknown configuration, neither network nor cache.
    """
    import datasets

    refusal = _ask_hub(name)
    try:
        with contextlib.nullcontext() if refusal is None else _datasets_offline():
            return splits_of(datasets.load_dataset(name, config))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # A RuntimeError says that the data set is a script.
        raise UserError(_explain(name, config, refusal, error)) from error


def _ask_hub(name: str) -> BaseException | None:
    """What keeps the hub from handing out a data set; None if nothing does."""
    from huggingface_hub import HfApi

    return ask(lambda: HfApi().auth_check(name, repo_type="dataset"), PATIENCE_SECONDS)


@contextlib.contextmanager
def _datasets_offline() -> Iterator[None]:
    """Make `datasets` go to its cache at once; it reads HF_HUB_OFFLINE only when it is imported."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _explain(name: str, config: str | None, refusal: BaseException | None, error: BaseException) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(refusal, GatedRepoError):
        return (
            f"The data set {name} is gated: accept its terms at https://huggingface.co/datasets/{name} and export "
            f"HF_TOKEN, {ELSEWHERE}."
        )
    if isinstance(refusal, RepositoryNotFoundError):
        return (
            f"The data set {name} is unknown to the hub, or private: check its spelling (env.dataset_name), export "
            f"HF_TOKEN of an account that may read it, {ELSEWHERE}."
        )
    if refusal is not None:
        return (
            f"The data set {name} is neither cached nor reachable ({_describe(refusal)}): connect to the Hugging Face "
            f"hub once, {ELSEWHERE}."
        )
    which = "" if config is None else f" with env.dataset_config={config}"
    return (
        f"The data set {name}{which} cannot be loaded ({_describe(error)}): name one of its configurations with "
        f"env.dataset_config, another data set with env.dataset_name, {ELSEWHERE}."
    )


def _describe(error: BaseException) -> str:
    # Long enough for the names of a data set's configurations.
    return brief(f"{type(error).__name__}: {error}", 400)
