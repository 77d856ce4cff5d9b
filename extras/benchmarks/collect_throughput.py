"""Tokens per second that the collector gathers, against bare vLLM on the same prompts, in one process.

    python extras/benchmarks/collect_throughput.py [--rounds 5] [--batch 256] [OVERRIDES]

Bare is one `LLM.generate` call on the batch's prompts, as token ids. Collected is the whole way of a batch:
environment, policy, reward, records, selection; without reference scoring and without Ray. Rounds alternate, so that
both meet the same noise; the figure is the ratio.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from queue import Queue

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ei_utils
from expert_iteration.cli import compose_config
from expert_iteration.models import model_path
from expert_iteration.resolve import resolve_config
from expert_iteration.tasks import load_task
from expert_iteration.vllm_engine import VLLMEngine


class TimedEngine(VLLMEngine):
    """Remembers the prompts and the number of tokens of the last call."""

    def sample(self, prompts, sampling, seed):
        self.last_prompts, self.last_sampling = prompts, sampling
        groups = super().sample(prompts, sampling, seed)
        self.tokens = sum(len(completion.token_ids) for group in groups for completion in group)
        return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("overrides", nargs="*", help="of ei_tiny's configuration, such as reward.workers=2")
    arguments = parser.parse_args()
    sizes = [
        f"train.dialog_turns_per_batch={arguments.batch}",
        f"env.num_envs={arguments.batch}",
        f"train.total_dialog_turns={(arguments.rounds + 1) * arguments.batch}",
    ]
    cfg = resolve_config(compose_config("ei_tiny", overrides=[*sizes, *arguments.overrides]), "sync")
    engine = TimedEngine(model_path(cfg), cfg.inference_model, chat_template=cfg.model.chat_template)
    collector = ei_utils.make_collector(cfg, load_task(cfg), engine, None, Queue(), Path("unused"))
    ratios, bare_rates, collect_rates = [], [], []
    for number in range(arguments.rounds + 1):
        start = time.perf_counter()
        collector.collect()
        collect_rate = engine.tokens / (time.perf_counter() - start)
        prompts = engine.last_prompts
        engine._llm.reset_prefix_cache()
        start = time.perf_counter()
        engine.sample(prompts, engine.last_sampling, seed=number)
        bare_rate = engine.tokens / (time.perf_counter() - start)
        engine._llm.reset_prefix_cache()
        if number:  # the first round compiles kernels
            bare_rates.append(bare_rate)
            collect_rates.append(collect_rate)
            ratios.append(collect_rate / bare_rate)
    for name, values in (("bare vLLM", bare_rates), ("collected", collect_rates)):
        print(f"{name:>10}: {statistics.mean(values):8.0f} tokens/s (sd {statistics.pstdev(values):.0f})")
    print(f"     ratio: {statistics.mean(ratios):8.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
