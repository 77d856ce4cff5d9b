"""The few lines between a command line and Hydra, shared by both scripts.

A script calls `run(main, mode="sync")`. Its `main(cfg, run_dir)` gets a checked `Config` and imports what is heavy
itself, so that a mistake, or a look at the configuration (`--cfg job`), answers in a second.
"""

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from expert_iteration import keys
from expert_iteration.config import Config, register_schema
from expert_iteration.devices import check_devices
from expert_iteration.effects import settings_without_effect
from expert_iteration.errors import UserError
from expert_iteration.hub import check_model_available
from expert_iteration.installation import check_installation
from expert_iteration.interruption import Interrupted
from expert_iteration.resolve import resolve_config
from expert_iteration.resume_command import continue_command
from expert_iteration.sweep import SweepTable, share_group

CONFIG_DIR = Path(__file__).resolve().parent.parent / "config"
DEFAULT_CONFIG = "ei_gsm8k"
HYDRA_VERSION = "1.3"
MULTIRUN_FLAGS = ("--multirun", "-m")

Main = Callable[[Config, Path], None]


def run(main: Main, mode: str) -> NoReturn:
    """Runs a script's `main` under Hydra with the process's arguments, and exits.

    The exit code is 0, 1 after any failed job (the other jobs of a sweep have run), or after a signal 128 and its
    number: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1.
    """
    sys.exit(launch(main, mode, sys.argv[1:]))


def launch(main: Main, mode: str, arguments: Sequence[str]) -> int:
    """As `run`, with given arguments, returning the exit code."""
    prepare_hydra(mode)
    # Hydra then raises what it would print as several lines with a remark on this variable.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    table = SweepTable(_explain)
    failed = False

    # Hydra names the job after the file of the function it finds behind __wrapped__: the script, not this module.
    @functools.wraps(main)
    def job(cfg: DictConfig) -> None:
        nonlocal failed
        try:
            with table.row():
                _run_job(main, cfg, mode)
        except Exception as error:
            # Not raised again: in a sweep Hydra would show the first failure only, at the end, and skip its callbacks.
            _print_failure(error)
            failed = True

    try:
        sys.argv = [sys.argv[0], *prepare_arguments(arguments)]
        hydra.main(version_base=HYDRA_VERSION, config_path=str(CONFIG_DIR), config_name=DEFAULT_CONFIG)(job)()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        _print_failure(error)
        return 1
    except OSError as error:
        # Hydra's own files, before the job has begun, whose errors do not come here.
        print(
            f"Error: {error.filename} cannot be written ({error.strerror}): give another hydra.run.dir.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt as error:
        interrupted = error if isinstance(error, Interrupted) else Interrupted()
        print(f"Interrupted ({interrupted}).", file=sys.stderr)
        return interrupted.exit_code
    finally:
        if table:
            print(table.to_text())
    return 1 if failed else 0


def prepare_hydra(mode: str) -> None:
    """Registers the schema, and the resolver behind `mode: ${mode:sync}` in the defaults lists.

    The resolver's argument is for composing without a script; each script puts its own mode in its place.
    """
    register_schema()
    OmegaConf.register_new_resolver("mode", lambda _: mode, replace=True)


def compose_config(config_name: str = DEFAULT_CONFIG, mode: str = "sync", overrides: Sequence[str] = ()) -> DictConfig:
    """What a script composes, without the command line: for tests, notebooks and benchmarks.

    `resolve_config(compose_config("ei_tiny"), "sync")` gives the checked `Config`.
    """
    prepare_hydra(mode)
    with hydra.initialize_config_dir(version_base=HYDRA_VERSION, config_dir=str(CONFIG_DIR)):
        return hydra.compose(config_name, overrides=list(overrides))


def prepare_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line as Hydra accepts it: flags first, then checked overrides.

    Hydra's parser refuses overrides on both sides of a flag, as in `mode=sync --multirun train.topk_size=4,8`, and
    `--cfg` together with `--multirun`, which here shows the first job of the sweep.

    Raises:
        UserError: an override of an unknown key, however it is written (`key=`, `+key=`, `++key=`, `~key`), or a
            `resume_from` that leads nowhere.
        HydraException: an override that is none.
    """
    parsed = get_args_parser().parse_intermixed_args(list(arguments))
    if parsed.shell_completion:
        return list(arguments)
    given = set(parsed.overrides)
    flags = [argument for argument in arguments if argument not in given]
    group_dirs = [CONFIG_DIR, *(Path(folder) for folder in (parsed.config_path, parsed.config_dir) if folder)]
    overrides = OverridesParser.create().parse_overrides([_quote_home(text) for text in parsed.overrides])
    more_flags, earlier = continue_command(overrides, parsed.config_name, parsed.multirun)
    checked = earlier + [_check_override(override, group_dirs) for override in overrides]
    flags += more_flags
    if parsed.cfg and parsed.multirun:
        flags = [flag for flag in flags if flag not in MULTIRUN_FLAGS]
        checked = [_first_value(override) for override in OverridesParser.create().parse_overrides(checked)]
    return flags + checked


def _check_override(override: Override, group_dirs: Sequence[Path]) -> str:
    """The override as Hydra wants it; a key of a free dictionary need not be there before it is set."""
    key, text = override.key_or_group, str(override.input_line)
    is_group = any((folder / key).is_dir() for folder in group_dirs)
    if is_group or key.split(".")[0].split("/")[0] == "hydra":
        return text
    if not keys.is_known(key):
        raise UserError(keys.explain_unknown(key))
    plain = not (override.is_add() or override.is_force_add() or override.is_delete())
    return f"++{text}" if plain and keys.is_free(key) else text


def _quote_home(override: str) -> str:
    """`key=~/folder` as Hydra's grammar wants it; shells leave the ~ there as it is."""
    key, _, value = override.partition("=")
    return f"{key}='{value}'" if value.startswith("~") and not set(value) & set("',") else override


def _first_value(override: Override) -> str:
    if not override.is_sweep_override():
        return str(override.input_line)
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


def _run_job(main: Main, cfg: DictConfig, mode: str) -> None:
    check_installation()
    config = resolve_config(cfg, mode)
    check_devices(config)
    check_model_available(config.model.name)
    share_group(config)
    for line in settings_without_effect(config, given_keys(HydraConfig.get().overrides.task)):
        print(line, file=sys.stderr)
    main(config, Path(HydraConfig.get().runtime.output_dir))


def given_keys(overrides: Sequence[str]) -> list[str]:
    """The dotted keys that overrides set, those inside a dictionary (`optimizer={name:SGD,lr:0.1}`) one by one."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [key for override in parsed for key in _leaves(override.key_or_group, override.value())]


def _leaves(key: str, value: object) -> list[str]:
    if not isinstance(value, dict):
        return [key]
    return [leaf for name, part in value.items() for leaf in _leaves(f"{key}.{name}", part)]


def _print_failure(error: Exception) -> None:
    """A mistake that the user can mend in one line, anything else with its traceback."""
    if isinstance(error, UserError | HydraException | OmegaConfBaseException):
        print(f"Error: {_explain(error)}", file=sys.stderr)
    else:
        traceback.print_exception(error)


def _explain(error: BaseException) -> str:
    """What a line can say of an error."""
    if isinstance(error, OmegaConfBaseException):
        return keys.explain_error(error)
    if isinstance(error, HydraException):
        refused = error.__cause__ or error.__context__  # overrides, files
        return keys.explain_error(refused) if isinstance(refused, OmegaConfBaseException) else str(error)
    # Ray raises an error of a task as an instance of its class whose text is the worker's traceback.
    return str(getattr(error, "cause", error))
