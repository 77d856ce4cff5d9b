"""Tokens per second that the collector gathers, against bare vLLM on the same prompts, in one process.

    python extras/benchmarks/collect_throughput.py [--rounds 5] [--batch 256]

Bare is one `LLM.generate` call on the batch's prompts, as token ids. Collected is the whole way of a batch:
environment, policy, reward, records, selection; without reference scoring and without Ray. Rounds alternate, so that
both meet the same noise; the figure is the ratio.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ei_utils
from expert_iteration.cli import compose_config
from expert_iteration.collector import ExpertCollector
from expert_iteration.engine import Sampling
from expert_iteration.models import model_path
from expert_iteration.policy import EnginePolicy
from expert_iteration.resolve import resolve_config
from expert_iteration.selection import TopKRewardSelector
from expert_iteration.tasks import load_task
from expert_iteration.vllm_engine import VLLMEngine


class TimedEngine(VLLMEngine):
    """Remembers the prompts and the number of tokens of the last call."""

    def sample(self, prompts, sampling, seed):
        self.last_prompts = prompts
        groups = super().sample(prompts, sampling, seed)
        self.tokens = sum(len(completion.token_ids) for group in groups for completion in group)
        return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256)
    arguments = parser.parse_args()
    cfg = resolve_config(
        compose_config(
            "ei_tiny", overrides=[f"train.dialog_turns_per_batch={arguments.batch}", f"env.num_envs={arguments.batch}"]
        ),
        "sync",
    )
    tokenizer = ei_utils.get_tokenizer(cfg)
    engine = TimedEngine(model_path(cfg), cfg.inference_model)
    sampling = Sampling(max_tokens=cfg.inference_model.max_tokens, temperature=cfg.inference_model.temperature)
    collector = ExpertCollector(
        make_env=lambda: ei_utils.make_env(cfg, load_task(cfg), tokenizer),
        policy=EnginePolicy(engine, tokenizer, sampling, seed=0),
        selector=TopKRewardSelector(cfg.env.repeats, cfg.train.topk_size, group_key="group_id"),
        retrieve_log_prob=lambda rows: rows,
        postproc=lambda batch: batch,
        log_record=lambda record: None,
        dialog_turns_per_batch=arguments.batch,
        num_batches=arguments.rounds + 1,
        num_sample_groups=0,
    )
    ratios, bare_rates, collect_rates = [], [], []
    for number in range(arguments.rounds + 1):
        start = time.perf_counter()
        collector.collect()
        collect_rate = engine.tokens / (time.perf_counter() - start)
        prompts = engine.last_prompts
        engine._llm.reset_prefix_cache()
        start = time.perf_counter()
        TimedEngine.sample(engine, prompts, sampling, seed=number)
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
