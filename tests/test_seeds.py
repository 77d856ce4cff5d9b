"""One seed for a run, a stream of its own for each part."""

import os
import subprocess
import sys

from expert_iteration.seeds import derive_seed


def test_equal_labels_give_equal_seeds_in_every_process():
    code = "from expert_iteration.seeds import derive_seed; print(derive_seed(3, 'rollout', 7))"
    # Python's own hash of a string differs between these two.
    seeds = {
        subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": salt}, text=True)
        for salt in ("1", "2")
    }
    assert seeds == {f"{derive_seed(3, 'rollout', 7)}\n"}


def test_parts_and_runs_do_not_share_a_seed():
    labels = [("data",), ("buffer",), ("selection",), ("engine",), ("eval",), ("eval", "greedy")]
    labels += [("rollout", call) for call in range(1000)]
    seeds = [derive_seed(seed, *label) for seed in range(10) for label in labels]
    assert len(set(seeds)) == len(seeds)


def test_labels_are_not_run_together():
    assert derive_seed(1, "rollout", 23) != derive_seed(1, "rollout", 2, 3) != derive_seed(12, "rollout", 3)


def test_a_seed_fits_every_generator():
    seeds = [derive_seed(seed, "part") for seed in (0, 1, 2**32 - 1)] + [derive_seed(0)]
    assert all(0 <= seed < 2**32 for seed in seeds)
