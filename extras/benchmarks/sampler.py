"""Time of a prioritized draw from a large buffer, against TorchRL's even draw from the same storage, in one process.

    python extras/benchmarks/sampler.py [--rounds 7] [--rows 100000] [--draws 500]

Even is `ReplayBuffer.sample` with TorchRL's RandomSampler. Drawn is `ExpertReplayBuffer.draw`, with nothing to evict
and no importance weights; weighted has them; changed follows a write of one row, so that priorities are computed again.
Rounds alternate between the four, so that all meet the same noise; the figure is the ratio to even.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data import LazyStackStorage, RandomSampler, ReplayBuffer

from expert_iteration.replay_buffer import ExpertReplayBuffer
from expert_iteration.sampler import RewardPrioritizedSampler

BATCH = 16


def make_rows(count: int, seed: int = 0):
    """Ragged rows of about 60 response tokens with rewards in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(40, 81, (count,), generator=generator).tolist()
    rewards = torch.rand(count, 1, generator=generator)
    return lazy_stack(
        [
            TensorDict(
                {
                    ("tokens", "response"): torch.zeros(length, dtype=torch.int64),
                    ("next", "reward"): reward,
                    "policy_version": torch.tensor(0),
                    ("text", "response"): "text",
                }
            )
            for length, reward in zip(lengths, rewards, strict=True)
        ]
    )


def make_buffer(storage: LazyStackStorage, rows, beta: float) -> ExpertReplayBuffer:
    """A buffer around the storage, which writes the rows there, over the same rows of another."""
    sampler = RewardPrioritizedSampler(len(rows), alpha=0.8, epsilon=1e-6, beta=beta)
    buffer = ExpertReplayBuffer(storage=storage, sampler=sampler, batch_size=BATCH, capacity=len(rows), seed=0)
    buffer.extend(rows)
    return buffer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--draws", type=int, default=500)
    arguments = parser.parse_args()
    rows, storage = make_rows(arguments.rows), LazyStackStorage(arguments.rows)
    drawn, weighted = (make_buffer(storage, rows, beta) for beta in (0.0, 0.4))
    even = ReplayBuffer(storage=storage, sampler=RandomSampler(), batch_size=BATCH)
    slot, reward = torch.tensor([0]), torch.tensor([0.5])

    def draw_after_change():
        drawn.sampler.write(slot, reward)
        drawn.draw(0)

    kinds = {
        "even": even.sample,
        "drawn": lambda: drawn.draw(0),
        "weighted": lambda: weighted.draw(0),
        "changed": draw_after_change,
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(arguments.rounds + 1):
        for name, draw in kinds.items():
            start = time.perf_counter()
            for _ in range(arguments.draws):
                draw()
            if number:  # the first round warms up
                times[name].append((time.perf_counter() - start) / arguments.draws)
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times["even"], strict=True)]
        print(
            f"{name:>8}: {statistics.mean(values) * 1e6:7.0f} us a draw of {BATCH} "
            f"(sd {statistics.pstdev(values) * 1e6:.0f}), ratio {statistics.mean(ratios):5.2f} "
            f"(from {min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
