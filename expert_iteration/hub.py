"""The Hugging Face hub, asked once and quickly, before anything large is loaded."""

import json
import re
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

from expert_iteration.errors import UserError

BUILT_IN = "tiny"
TIME_LIMIT = 10.0
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")  # of a model or a data set
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def is_hub_id(name: str) -> bool:
    """Whether a `model.name` is neither a path nor the built-in model."""
    return name != BUILT_IN and not name.startswith(("/", ".", "~"))


def check_model_available(name: str, time_limit: float = TIME_LIMIT) -> None:
    """Refuses a hub model that is neither in the local cache nor to be had from the hub.

    Loading it would find out too, but only after several attempts with growing waits and with a long traceback.

    Args:
        name: as `model.name`; paths and the built-in model pass.
        time_limit: seconds that the hub has to answer.

    Raises:
        UserError: unknown, private or gated name, no network, no answer in time.
    """
    if not is_hub_id(name) or cached_folder(name) is not None:
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    error = ask(lambda: get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=time_limit), time_limit)
    if error is not None:
        raise UserError(_explain(name, error)) from error


def cached_folder(name: str) -> Path | None:
    """Where the hub model `name` lies in the local cache, if configuration, tokenizer and all weights are there.

    Loading from the folder asks the network nothing; loading by the name would, for every file, in every process.
    """
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    has_tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES)
    return folder if has_tokenizer and _has_weights(folder) else None


def _has_weights(folder: Path) -> bool:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all((folder / shard).is_file() for shard in shards)
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def ask(question: Callable[[], object], time_limit: float) -> BaseException | None:
    """Ask the hub something once: None if it answers in time, else what went wrong.

    In a daemon thread, because looking up a host's address knows no time limit.
    """
    answer: Future[object] = Future()

    def run() -> None:
        try:
            answer.set_result(question())
        except BaseException as error:  # handed over to the waiting thread
            answer.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return answer.exception(timeout=time_limit)
    except TimeoutError as error:
        return error


def _explain(name: str, error: BaseException) -> str:
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    if Path(name).exists():
        return f"model.name ({name}) is taken for a hub id, but such a path exists here: write ./{name} to use it."
    if isinstance(error, GatedRepoError):
        return f"model.name ({name}) is gated: accept its terms at https://huggingface.co/{name} and export HF_TOKEN."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"model.name ({name}) is unknown to the hub, or private: check its spelling, or export HF_TOKEN of an "
            "account that may read it."
        )
    if isinstance(error, EntryNotFoundError):
        return f"model.name ({name}) has no config.json on the hub: it is not a model that transformers can load."
    return (
        f"model.name ({name}) is not in the local cache and the hub cannot be reached ({_brief(error)}): check the "
        f"network, download it elsewhere and give its folder as a path, or use model.name={BUILT_IN}."
    )


def _brief(error: BaseException) -> str:
    text = str(error).partition("\n")[0].strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
