"""Weights & Biases as one of a run's loggers, through TorchRL's logger.

Importing this module loads neither wandb nor TorchRL: the configuration's rules ask it whether there is a login.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from expert_iteration.config import Config, LoggingBackend, LoggingMode, to_plain_dict
from expert_iteration.errors import UserError

if TYPE_CHECKING:
    from torchrl.record.loggers.wandb import WandbLogger

SAMPLE_COLUMNS = ("step", "split", "prompt", "response", "reward", "kept")
WANDB_TIMEOUT = 30  # seconds to reach the W&B server; its own default of 90 is a long silence before a run


class WandbRunLogger:
    """A W&B run, through TorchRL's logger.

    That logger gives each scope its own step column and leaves W&B's global step alone, which W&B would refuse to take
    backwards: several lines may share a gradient step, and none is lost.
    """

    def __init__(self, logger: WandbLogger) -> None:
        self.logger = logger

    @property
    def run_id(self) -> str:
        """By which W&B knows the run, also one that goes on later."""
        return self.logger.experiment.id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One row of the run's history."""
        self.logger.log_metrics(dict(metrics), step=step)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int, split: str) -> None:
        """A table of all responses, under `samples/<split>`, and one of them as text, under `history`."""
        import wandb

        table = wandb.Table(columns=list(SAMPLE_COLUMNS), data=sample_table(rows, step, split))
        first = rows[0]["responses"][0]
        text = f"{rows[0]['prompt']}\n\n{first['text']}\n\nreward: {first['reward']}"
        self.logger.log_metrics({f"samples/{split}": table, "history": text}, step=step)

    def close(self) -> None:
        """Finish the run: waits until W&B has written (offline) or sent (online) everything."""
        self.logger.close()


def make_loggers(cfg: Config, run_dir: Path, mode_name: str, run_id: str | None = None) -> list[WandbRunLogger]:
    """The loggers that the configuration asks for: W&B's, or none."""
    if cfg.logging.backend == LoggingBackend.none or cfg.logging.mode == LoggingMode.disabled:
        return []
    return [make_wandb_logger(cfg, run_dir, mode_name, run_id)]


def make_wandb_logger(cfg: Config, run_dir: Path, mode_name: str, run_id: str | None = None) -> WandbRunLogger:
    """A W&B run under `run_dir`/wandb that prints nothing.

    Args:
        cfg: stored whole with the run. `logging.mode` null: as WANDB_MODE says, else online with a login, else offline.
        run_dir: of the run.
        mode_name: "sync" or "async", for the names of project and run.
        run_id: of a run that this one goes on with; None: a new one.

    Raises:
        UserError: online, and W&B refuses or cannot be reached.
    """
    # Settings.silent does not cover the line about the login; this does.
    os.environ["WANDB_SILENT"] = "true"
    import wandb
    from torchrl.record.loggers.wandb import WandbLogger

    try:
        logger = WandbLogger(
            exp_name=wandb_run_name(cfg, mode_name),
            save_dir=str(run_dir),
            project=cfg.logging.project or f"ei-{mode_name}",
            # TorchRL's own offline=True would leave WANDB_MODE set for later jobs of a sweep.
            mode=wandb_mode(cfg.logging.mode),
            entity=cfg.logging.entity,
            group=cfg.logging.group,
            tags=list(cfg.logging.tags),
            config=to_plain_dict(cfg),
            # TorchRL's list of installed packages is stored as config["env"], in place of our section of that name.
            log_env_packages=False,
            id=run_id,
            # Offline, W&B writes a second record of the same id beside the first; `wandb sync` joins them.
            resume=None if run_id is None else "allow",
            settings=wandb.Settings(silent=True, console="off", init_timeout=WANDB_TIMEOUT),
        )
    except wandb.errors.Error as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"W&B cannot log online ({reason}): use logging.mode=offline, or run `wandb login`.") from error
    return WandbRunLogger(logger)


def wandb_run_name(cfg: Config, mode_name: str) -> str:
    """`ei-sync-<experiment>-<dataset>-<model>`, the experiment left out when there is none."""
    parts = ["ei", mode_name, cfg.logging.experiment_name, cfg.env.dataset.value, PurePath(cfg.model.name).name]
    return "-".join(part for part in parts if part)


def wandb_mode(mode: LoggingMode | None) -> str:
    """W&B's mode: the one configured, else WANDB_MODE, else online where there is a login."""
    if mode is not None:
        return mode.value
    return os.environ.get("WANDB_MODE") or ("online" if has_wandb_login() else "offline")


def has_wandb_login() -> bool:
    """Whether there is an API key, in the environment or where `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        return host in netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser()).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def sample_table(rows: Iterable[Mapping[str, Any]], step: int, split: str) -> list[list[Any]]:
    """Rows of samples.jsonl flattened to one row a response, in the order of SAMPLE_COLUMNS."""
    return [
        [step, split, row["prompt"], response["text"], response["reward"], response.get("kept")]
        for row in rows
        for response in row["responses"]
    ]
