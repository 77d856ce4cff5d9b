"""What `resume_from` and `resume=auto` mean for a command line: where Hydra puts its files, and which settings hold.

Hydra would make a new run directory before anybody could say that an earlier one is to be gone on with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString

from expert_iteration.errors import UserError
from expert_iteration.resume import earlier_command, quoted, run_directory_of
from expert_iteration.run_directory import CONFIG_FILE

RUN_DIR = "hydra.run.dir"
OF_RESUMING = ("resume", "resume_from")


def continue_command(
    overrides: Sequence[Override], config_name: str | None, multirun: bool
) -> tuple[list[str], list[str]]:
    """What is to be added to a command line that goes on with a run.

    `resume_from` alone goes on with the run's own settings: its configuration's name and its overrides are taken from
    its directory, unless the command line names a configuration.

    Args:
        overrides: as given.
        config_name: as given with `--config-name`, or None.
        multirun: whether it is a sweep.

    Returns:
        flags, and overrides to stand before the given ones.

    Raises:
        UserError: `resume_from` leads nowhere, `resume=auto` stands without a run directory, or either in a sweep.
    """
    given = {override.get_key_element(): override.value() for override in overrides if not override.is_sweep_override()}
    source, is_auto = _text(given, "resume_from"), _text(given, "resume") == "auto"
    if source is None and not is_auto:
        return [], []
    if multirun:
        raise UserError("resume and resume_from go on with one run: leave them out, or --multirun.")
    if source is None:
        return [], _beside_the_first(_named_directory(given))
    run_dir = run_directory_of(_absolute(source))
    added = _beside_the_first(run_dir)
    if RUN_DIR not in given:
        added.append(f"{RUN_DIR}={quoted(str(run_dir))}")
    if config_name is not None:
        return [], added
    flags, earlier = earlier_command(run_dir)
    kept = [text for text in earlier if _key(text) not in given and _key(text) not in OF_RESUMING]
    return flags, [*added, *kept]


def _named_directory(given: Mapping[str, Any]) -> Path:
    named = _text(given, RUN_DIR)
    if named is None:
        raise UserError(
            f"resume (auto) needs {RUN_DIR}=DIR, the directory to go on in: without it every run makes a new one."
        )
    return _absolute(named)


def _beside_the_first(run_dir: Path) -> list[str]:
    """Hydra's files of the continuation go beside those of the run's start, which stay as they are."""
    first = (run_dir / CONFIG_FILE).parent
    if not first.is_dir():
        return []
    number = 1 + len(list(first.glob("resumed-*")))
    return [f"hydra.output_subdir={first.name}/resumed-{number}"]


def _text(given: Mapping[str, Any], key: str) -> str | None:
    value = given.get(key)
    if isinstance(value, QuotedString):
        return value.text
    return None if value is None else str(value)


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(Path(path).expanduser()))  # as Hydra does, without ..


def _key(override: str) -> str:
    return OverridesParser.create().parse_override(override).get_key_element()
