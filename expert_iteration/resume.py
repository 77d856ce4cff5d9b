"""Going on with an earlier run: where it stands, whether it fits, and its directory as it was at the checkpoint.

All of it happens in the process with the terminal, before Ray starts, but for `rewind`: that is the training process's,
once nothing can be refused any more. Importing this module loads no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from omegaconf import OmegaConf

from expert_iteration.checkpoint_files import (
    DamagedCheckpointError,
    SavedCheckpoint,
    list_folders,
    newest_whole,
    open_checkpoint,
    remove_checkpoint,
    step_of,
)
from expert_iteration.config import Config, Resume, to_plain_dict
from expert_iteration.errors import UserError
from expert_iteration.expert_set_reader import digest_of_examples
from expert_iteration.keys import leaf_keys
from expert_iteration.path_keys import absolute
from expert_iteration.run_directory import (
    BEST_FOLDER,
    CONFIG_FILE,
    EVAL_REWARDS_FILE,
    EXPERT_SET_FOLDER,
    LAST_FOLDER,
    METRICS_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    SUMMARY_FILE,
    TIMELINE_FOLDER,
    is_of_batches,
    settings_folder,
    write_whole,
)
from expert_iteration.sizes import Sizes

if TYPE_CHECKING:
    from expert_iteration.tasks import Task

# What may differ between a run and its continuation, as sections and keys: how long the run is, how often it does what
# nothing else depends on, what it shows, and on what machine it runs.
MAY_CHANGE = (
    *("resume", "resume_from", "device", "placement", "ray", "logging", "eval", "inference_model.backend"),
    *("train.total_dialog_turns", "train.total_optimizer_steps", "train.collection_timeout", "train.max_bad_steps"),
    *("train.checkpoint_frequency", "train.keep_checkpoints", "train.logging_frequency", "train.stop_patience"),
    *("train.weight_update_frequency", "train.max_ahead", "env.num_envs", "train.from_expert_set"),
    *("train_model.gradient_checkpointing", "train_model.attn_implementation", "train_model.num_threads"),
    *("inference_model.num_devices", "inference_model.num_replicas", "inference_model.gpu_memory_utilization"),
    *("inference_model.attn_implementation", "inference_model.enforce_eager", "inference_model.num_threads"),
    *("inference_model.enable_prefix_caching", "inference_model.kv_cache_gib"),
    *("ref_model.num_threads", "ref_model.attn_implementation", "model.compile", "model.trust_remote_code"),
    *("weight_update", "expert_set", "tiny.cache_dir", "reward.workers", "reward.timeout", "reward.openai_url"),
    *("reward.openai_concurrency", "reward.openai_retries", "reward.openai_timeout"),
)
# Of these the exceptions: later checkpoints would lie elsewhere, and the best so far was the best by another figure.
MAY_NOT = ("logging.checkpoint_dir", "eval.metric")
# What belongs to a run in its directory, beside checkpoints and logs.
RUN_FILES = (
    *(METRICS_FILE, SAMPLES_FILE, EVAL_REWARDS_FILE, SUMMARY_FILE, REPORT_FILE, TIMELINE_FOLDER),
    *(EXPERT_SET_FOLDER, LAST_FOLDER, BEST_FOLDER),
)
SHOWN_CHANGES = 20


@dataclass(frozen=True)
class Fingerprint:
    """What tells whether positions and token ids of a run mean in another what they mean in this one."""

    tokenizer: str
    data: str


def find_checkpoint(cfg: Config, run_dir: Path) -> tuple[SavedCheckpoint | None, list[str]]:
    """The checkpoint that a run is to go on from, None to start afresh, and lines that say what was passed over.

    Raises:
        UserError: `resume_from` leads to no whole checkpoint, or to another directory than the run's.
    """
    if cfg.resume_from is not None:
        return _find_named(Path(cfg.resume_from), run_dir, cfg)
    if cfg.resume is Resume.never:
        return None, []
    checkpoint, complaints = newest_whole(run_dir / cfg.logging.checkpoint_dir)
    if checkpoint is not None and Path(cfg.logging.checkpoint_dir).is_absolute():
        _refuse_checkpoints_of_another(checkpoint, run_dir)
    if checkpoint is None and (aside := _set_aside(run_dir, run_dir / cfg.logging.checkpoint_dir)):
        complaints.append(f"no whole checkpoint is there: starting afresh; what lay there is now in {aside.name}/")
    return checkpoint, complaints


def _refuse_checkpoints_of_another(checkpoint: SavedCheckpoint, run_dir: Path) -> None:
    if (owner := checkpoint.manifest["run_dir"]) != str(run_dir):
        raise UserError(
            f"logging.checkpoint_dir ({checkpoint.folder.parent}) holds the checkpoints of another run ({owner}): give "
            "each run its own."
        )


def _find_named(path: Path, run_dir: Path, cfg: Config) -> tuple[SavedCheckpoint, list[str]]:
    if run_directory_of(path) != run_dir:
        raise UserError(
            f"resume_from ({path}) goes on in its own run directory, but hydra.run.dir is {run_dir}: leave it out."
        )
    if path != run_dir:
        checkpoint = _open_named(path)
        return checkpoint, []
    directory = run_dir / cfg.logging.checkpoint_dir
    found, complaints = newest_whole(directory)
    if found is None:
        reasons = "; ".join(complaints) or f"{directory} holds none"
        raise UserError(f"resume_from ({path}) has no whole checkpoint to go on from: {reasons}.")
    return found, [f"note: {complaint}" for complaint in complaints]


def _open_named(path: Path) -> SavedCheckpoint:
    try:
        checkpoint = open_checkpoint(_folder_of(path))
        checkpoint.verify()
    except DamagedCheckpointError as error:
        raise UserError(
            f"resume_from ({path}) cannot be gone on from: {error}. Give the run's directory to take the newest "
            "checkpoint that is whole."
        ) from error
    return checkpoint


def _folder_of(path: Path) -> Path:
    """The folder of a checkpoint, which may be named by its `.pt`."""
    return path.with_suffix("") if path.suffix == ".pt" else path


def run_directory_of(path: Path) -> Path:
    """The directory of the run that `path`, a run directory or a checkpoint, belongs to.

    Raises:
        UserError: it is neither.
    """
    if not path.exists():
        raise UserError(f"resume_from ({path}) does not exist: give a run directory or a checkpoint in one.")
    for folder in (path, *path.parents):
        if (folder / CONFIG_FILE).is_file():
            return folder
    try:  # a checkpoint on another disk than its run
        manifest = open_checkpoint(_folder_of(path)).manifest
    except DamagedCheckpointError as error:
        raise UserError(
            f"resume_from ({path}) is neither a run directory, with a {CONFIG_FILE}, nor a checkpoint: {error}."
        ) from error
    return Path(manifest["run_dir"])


def _set_aside(run_dir: Path, checkpoints: Path) -> Path | None:
    """Move what an earlier run left, without a whole checkpoint, out of the way; returns where, None if nothing was."""
    left = [path for name in RUN_FILES if (path := run_dir / name).exists()]
    left += [*list_folders(checkpoints), *checkpoints.glob("checkpoint_*.pt")]
    if not left:
        return None
    number = 1 + len(list(run_dir.glob("abandoned-*")))
    aside = run_dir / f"abandoned-{number}"
    aside.mkdir()
    for path in left:
        shutil.move(path, aside / path.name)
    return aside


def fingerprint(task: Task, tokenizer: Any) -> Fingerprint:
    """Of what a run's prompts are and how they are told to the model."""
    about_tokens = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, str(tokenizer.special_tokens_map)]
    # Not those that are held out, of which there may be more or fewer; taken out of training, they change that too.
    problems = [[problem.question, problem.answer, problem.metadata] for problem in task.train]
    data = _digest([*problems, digest_of_examples(task.examples)])
    return Fingerprint(tokenizer=_digest(about_tokens), data=data)


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def check_fits(checkpoint: SavedCheckpoint, cfg: Config, sizes: Sizes, found: Fingerprint) -> list[str]:
    """Lines that list what changed since the checkpoint was saved, all of which may.

    Raises:
        UserError: it does not fit; lists every difference that may not be.
    """
    manifest = checkpoint.manifest
    changes = list(_changes(manifest["config"], to_plain_dict(cfg)))
    refused = [text for key, text in changes if not _may_change(key)]
    if manifest["tokenizer"] != found.tokenizer:
        refused.append("another tokenizer, so token ids mean something else")
    if manifest["data"] != found.data:
        refused.append("other prompts, so the position in the data set means something else")
    for name, size in (("turns_per_batch", sizes.turns_per_batch), ("buffer_size", sizes.buffer_size)):
        if manifest[name] > size:
            refused.append(f"{name.replace('_', ' ')}: {manifest[name]} -> {size}")
    if refused:
        raise UserError(
            f"The run does not fit the checkpoint {checkpoint.folder}:\n  " + "\n  ".join(refused) + "\nGive the "
            "settings that it was saved with (without --config-name, resume_from takes them from the run), or start a "
            "run of its own with another hydra.run.dir."
        )
    shown = [text for key, text in changes if not key.startswith("resume")]
    more = [f"and {len(shown) - SHOWN_CHANGES} more"] if len(shown) > SHOWN_CHANGES else []
    return [f"changed since the checkpoint: {text}" for text in (*shown[:SHOWN_CHANGES], *more)]


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys whose values differ, each with a text. A key that the older version did not have is none."""
    for key in leaf_keys():
        before, after = _select(old, key), _select(new, key)
        if before is not ... and before != after:
            yield key, f"{key}: {before} -> {after}"


def _select(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        if name not in value:
            return ...
        value = value[name]
    return value


def _may_change(key: str) -> bool:
    return key not in MAY_NOT and any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)


def rewind(run_dir: Path, checkpoint: SavedCheckpoint) -> list[str]:
    """Make a run directory what it was when the checkpoint was saved; returns lines that say what went.

    Done again after a crash in the middle, it has the same end.
    """
    manifest = checkpoint.manifest
    # First, for what is cut below is what a later checkpoint would go on from.
    later = [folder for folder in list_folders(checkpoint.folder.parent) if step_of(folder) > checkpoint.step]
    for folder in later:
        remove_checkpoint(folder)
    for name, num_bytes in manifest["file_bytes"].items():
        _cut(run_dir / name, num_bytes, manifest["num_batches"])
    for name in (SUMMARY_FILE, REPORT_FILE):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / LAST_FOLDER, ignore_errors=True)  # of an end that is none any more
    from expert_iteration.expert_set import drop_shards_after

    drop_shards_after(run_dir / EXPERT_SET_FOLDER, manifest["num_batches"])
    return [f"removed {folder.name}, which lies beyond" for folder in later]


def _cut(path: Path, num_bytes: int, num_batches: int) -> None:
    """Keep the first bytes of a file of JSON lines, without lines of batches that are collected again."""
    if not path.exists():
        return
    kept = path.read_bytes()[:num_bytes].decode()
    lines = [line for line in kept.splitlines(keepends=True) if is_of_batches(json.loads(line), num_batches)]
    write_whole(path, "".join(lines))


def earlier_command(run_dir: Path) -> tuple[list[str], list[str]]:
    """The flags for the configuration, and the overrides, with which a run was started last, as Hydra has noted them.

    Relative paths among the overrides are made absolute, for they are of the directory where the user stood.
    """
    folder = settings_folder(run_dir)
    if not all((folder / name).is_file() for name in ("hydra.yaml", "overrides.yaml")):
        return [], []
    hydra = OmegaConf.load(folder / "hydra.yaml").hydra
    name, cwd = OmegaConf.select(hydra, "job.config_name"), OmegaConf.select(hydra, "runtime.cwd")
    sources = OmegaConf.select(hydra, "runtime.config_sources") or []
    flags = [] if name is None else ["--config-name", name]
    for source in sources:
        if source.provider == "command-line":
            flags += ["--config-dir", source.path]
    # Interpolations as they were written: they are of the configuration, and lead nowhere in this list.
    overrides = cast(list[str], OmegaConf.to_container(OmegaConf.load(folder / "overrides.yaml"), resolve=False))
    return flags, overrides if cwd is None else [_absolute_path(override, Path(cwd)) for override in overrides]


def _absolute_path(override: str, cwd: Path) -> str:
    parsed = OverridesParser.create().parse_override(override)
    if parsed.value_type is not ValueType.ELEMENT:  # a key that is left out has no value
        return override
    value = parsed.value()
    if isinstance(value, str) and value.startswith("${"):
        return override  # what it stands for may be absolute
    changed = absolute(parsed.key_or_group, value, cwd)
    if changed == value:
        return override
    written = f"[{','.join(map(quoted, changed))}]" if isinstance(changed, list) else quoted(changed)
    return f"{parsed.get_key_element()}={written}"


def quoted(text: str) -> str:
    """As Hydra's grammar wants it, in which spaces and commas, for instance, mean something."""
    if re.fullmatch(r"[\w./:-]+", text):
        return text
    return "'" + text.replace("'", r"\'") + "'"
