"""Asynchronous expert iteration: one loop imitates the best responses while the next are being collected.

    python expert-iteration-async.py mode=async                         # GSM8K, three GPUs
    python expert-iteration-async.py mode=async --config-name ei_tiny   # a tiny model, on a CPU

Any key of `config/` may be overridden on the command line, e.g. `train.topk_size=8`; `--cfg job` shows what results.
"""

from pathlib import Path

from expert_iteration import cli
from expert_iteration.config import Config


def train() -> None:
    """The algorithm."""


def main(cfg: Config, run_dir: Path) -> None:
    """Builds the parts and trains; `ei_utils` is imported here because it takes seconds to load."""
    import ei_utils

    ei_utils.run(cfg, train, run_dir)


if __name__ == "__main__":
    cli.run(main, mode="async")
