"""Asynchronous expert iteration: collect in the background, train on what the buffer holds, push weights now and then.

    python expert-iteration-async.py mode=async                         # GSM8K, three GPUs

The command line and the configuration are complete; the loop is not there yet, and a run is refused with the command
that does the same work synchronously.
"""

from pathlib import Path

from expert_iteration import cli
from expert_iteration.config import Config
from expert_iteration.errors import UserError


def main(cfg: Config, run_dir: Path) -> None:
    """Refuses to run."""
    raise UserError(
        "Asynchronous training is not available in this version: use `python expert-iteration-sync.py mode=sync` with "
        "the same overrides; train.sync_iter=false there generates the next batch while it trains."
    )


if __name__ == "__main__":
    cli.run(main, mode="async")
