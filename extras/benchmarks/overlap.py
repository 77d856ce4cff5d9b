"""How much time the asynchronous script saves where generation and training take about as long.

    python extras/benchmarks/overlap.py [--rounds 3] [--epochs 4] [--batches 16]

Both scripts collect as many responses and make as many optimizer steps and weight pushes, with one core for what
collects (engine, collector, reference) and another for the trainer, which stand for dedicated devices. A reward that
tells all responses apart has every group keep as many. Rounds alternate, so that both meet the same noise. Time counts
from the first collection to the last training step, as the timelines of the runs have it; start-up and evaluation are
outside. The figure is the ratio of each round. Needs Linux (cores are given out by thread).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from expert_iteration import timeline
from expert_iteration.report import read_jsonl
from expert_iteration.run_directory import SUMMARY_FILE, timeline_file

ROOT = Path(__file__).resolve().parents[2]
MICRO_BATCH, TOPK, GROUPS, REPEATS = 16, 2, 32, 8
REWARD = "def spread(problems, responses):\n    return [index % 8 + 1.0 for index in range(len(responses))]\n"
# By the names that Ray gives to its processes.
CORES = {"ray::EngineActor": 0, "ray::CollectorActor": 0, "ray::ReferenceActor": 0, "ray::train_process": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batches", type=int, default=16)
    arguments = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            seconds = {}
            for mode in ("sync", "async"):
                run_dir = Path(folder) / f"{mode}-{number}"
                run(mode, run_dir, arguments.epochs, arguments.batches)
                seconds[mode] = describe(mode, run_dir)
            ratios.append(seconds["async"] / seconds["sync"])
            print(f"round {number}: ratio {ratios[-1]:.3f}", flush=True)
    print(f"async / sync: {statistics.mean(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")


def run(mode: str, run_dir: Path, epochs: int, batches: int) -> None:
    """One run of a script to its end, its processes on their cores."""
    reward = run_dir.parent / "reward.py"
    reward.write_text(REWARD)
    steps_per_batch = epochs * GROUPS * TOPK // MICRO_BATCH
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / f"expert-iteration-{mode}.py"),
            *("--config-name", "ei_tiny"),
            f"hydra.run.dir={run_dir}",
            f"reward.fn={reward}:spread",
            f"train.epochs={epochs}",
            f"train.total_dialog_turns={batches * GROUPS * REPEATS}",
            f"train.weight_update_frequency={steps_per_batch}",
            *("inference_model.num_threads=1", "train_model.num_threads=1", "ref_model.num_threads=1"),
            *("train.checkpoint_frequency=0", "eval.frequency=0", "eval.num_prompts=8", "logging.backend=none"),
        ],
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None:
        give_out_cores(psutil.Process(process.pid))
        time.sleep(1)
    if process.returncode:
        raise SystemExit(f"{run_dir} failed: see {run_dir}/logs")


def give_out_cores(driver: psutil.Process) -> None:
    """Put every thread of the run's processes on its core; a process may come and go meanwhile."""
    try:
        for child in driver.children(recursive=True):
            core = CORES.get(child.cmdline()[0].split(".")[0] if child.cmdline() else "")
            if core is not None:
                for thread in child.threads():
                    os.sched_setaffinity(thread.id, {core})
    except (psutil.NoSuchProcess, ProcessLookupError):
        pass


def describe(mode: str, run_dir: Path) -> float:
    """Print what a run did, and return how long it took after start-up."""
    collected = spans(run_dir, timeline.COLLECTOR, timeline.COLLECTING)
    generated = spans(run_dir, timeline.ENGINE, timeline.GENERATING)
    trained = spans(run_dir, timeline.TRAINER, timeline.TRAINING)
    start, end = collected[0]["start"], trained[-1]["end"]
    summary = json.loads((run_dir / SUMMARY_FILE).read_text())
    generating = total(span for span in generated if start <= span["start"] <= end)
    print(
        f"{mode:>5}: {end - start:6.2f} s for {summary['dialog_turns']} turns, {summary['optimizer_steps']} optimizer "
        f"steps, {summary['weight_pushes']} pushes; collecting {total(collected):.2f} s (of which generating "
        f"{generating:.2f} s), training {total(trained):.2f} s",
        flush=True,
    )
    return end - start


def spans(run_dir: Path, process: str, activity: str) -> list[dict]:
    return [line for line in read_jsonl(Path(timeline_file(run_dir, process))) if line["activity"] == activity]


def total(found) -> float:
    return sum(span["end"] - span["start"] for span in found)


if __name__ == "__main__":
    main()
