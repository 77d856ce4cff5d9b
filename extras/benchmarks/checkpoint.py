"""What a checkpoint costs: size, and time beside writing its tensors alone.

    python extras/benchmarks/checkpoint.py

A model of some 50 million float32 parameters with AdamW's state, and a buffer of 256 responses of 512 tokens. Compared
are `Checkpointer.save` (written, flushed to disk, checksums computed, renamed), and `torch.save` of the same weights
and optimizer state, flushed to disk.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from expert_iteration.checkpoint import Checkpointer
from expert_iteration.cli import compose_config
from expert_iteration.interruption import StopRequest
from expert_iteration.position import Position
from expert_iteration.resolve import resolve_config

ROUNDS = 5
ROWS, TOKENS = 256, 512


class StandInLearner:
    """Weights and optimizer state of a usual size."""

    def __init__(self) -> None:
        config = Qwen2Config(vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=6)
        self.model = Qwen2ForCausalLM(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.gradient_steps = self.optimizer_steps = 0

    def checkpoint(self) -> dict[str, object]:
        """As `Learner.checkpoint`."""
        return {
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
        }

    def process_state(self) -> dict[str, object]:
        """Nothing."""
        return {}


def make_rows() -> list[dict[str, object]]:
    """Rows as the buffer stores them."""
    return [
        {
            "tokens": {
                "full": torch.arange(TOKENS),
                "prompt": torch.arange(128),
                "response": torch.arange(TOKENS - 128),
            },
            "masks": {"all_assistant_mask": torch.arange(TOKENS) >= 128},
            "text": {"prompt": "word " * 128, "response": "word " * (TOKENS - 128)},
            "next": {"reward": torch.ones(1), "ref_log_probs": {"full": torch.zeros(TOKENS)}},
            "policy_version": torch.tensor(0),
        }
        for _ in range(ROWS)
    ]


def make_checkpointer(directory: Path, learner: StandInLearner) -> Checkpointer:
    """A checkpointer of these weights and rows; all else says nothing."""
    rows = make_rows()
    parts = SimpleNamespace(
        position=Position(),
        learner=learner,
        reference_updater=SimpleNamespace(weights=None),
        weight_updater=SimpleNamespace(pushed_weights=None),
        evaluator=SimpleNamespace(latest={}),
        state_dict=lambda: {
            "buffer": {"_storage": list(rows), "_writer_state": None},
            "metrics": {"file_bytes": {}},
        },
    )
    cfg = resolve_config(compose_config("ei_tiny"), "sync")
    about = {"run_dir": str(directory)}
    return Checkpointer(directory, parts, cfg, about=about, clock=time.monotonic, stop=StopRequest())  # type: ignore[arg-type]


def save_bare(learner: StandInLearner, path: Path) -> None:
    """The tensors alone, flushed."""
    with path.open("wb") as file:
        torch.save(learner.checkpoint(), file)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    """Print size, seconds and ratios."""
    learner = StandInLearner()
    parameters = sum(parameter.numel() for parameter in learner.model.parameters())
    seconds: dict[str, list[float]] = {"bare": [], "checkpoint": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpointer = make_checkpointer(folder / "checkpoints", learner)
        for _ in range(ROUNDS):
            start = time.monotonic()
            save_bare(learner, folder / "bare.pt")
            seconds["bare"].append(time.monotonic() - start)
            learner.gradient_steps += 1
            start = time.monotonic()
            checkpointer.save()
            seconds["checkpoint"].append(time.monotonic() - start)
        files = [path for path in (folder / "checkpoints").rglob("*") if path.is_file()]
        last = [path for path in files if f"checkpoint_{ROUNDS}" in str(path)]
        sizes = {path.name: path.stat().st_size / 2**20 for path in last}
    ratios = [whole / bare for whole, bare in zip(seconds["checkpoint"], seconds["bare"], strict=True)]
    print(
        f"{parameters / 1e6:.1f} M parameters; " + ", ".join(f"{name} {size:.1f} MiB" for name, size in sizes.items())
    )
    for name, values in seconds.items():
        print(f"{name:<12} {statistics.median(values):.2f} s (from {min(values):.2f} to {max(values):.2f})")
    print(f"ratio        {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
