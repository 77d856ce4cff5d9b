"""Seconds of a weight push against its bytes, for each way that weights take without a GPU.

    python extras/benchmarks/push.py [--megabytes 10 100 1000] [--pushes 10] [--ways vllm shards transformers adapters]

Ways: `vllm` hands the object store's memory to vLLM in the engine's process; `shards` hands it on to the processes of
two shards, in a file in memory; `transformers` copies it into a Hugging Face model; `adapters` sends adapters of rank 8
alone, to vLLM. The model is a random Qwen2 of about the given size in float32. Push is what the trainer spends while
the engine is idle, loading included; load is the engine's part. The first pushes, which allocate and are probed, do not
count. The probe proves that the weights arrive.
"""

import argparse
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from expert_iteration.chat_template import load_tokenizer
from expert_iteration.cli import compose_config
from expert_iteration.cluster import ray_running, start_actor
from expert_iteration.config import Config
from expert_iteration.engine_client import CONCURRENCY_GROUPS, EngineActor, EngineClient, EnginePool
from expert_iteration.interruption import StopSignals
from expert_iteration.lora import add_adapters
from expert_iteration.policy_reader import PolicyReader
from expert_iteration.resolve import resolve_config
from expert_iteration.tiny import ensure_tiny_model
from expert_iteration.transformers_engine import TransformersEngine
from expert_iteration.vllm_engine import VLLMEngine
from expert_iteration.weight_transport import PackedTransport
from expert_iteration.weight_update import WeightUpdater

PROBE = [[3, 1, 4, 1, 5, 9, 2, 6]]
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--pushes", type=int, default=10)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    arguments = parser.parse_args()
    cfg = resolve_config(compose_config("ei_tiny", overrides=["train_model.lora.enabled=true"]), "sync")
    print(f"{'way':>12} {'MB sent':>9} {'push s (sd)':>18} {'load s (sd)':>18} {'GB/s':>6}")
    with ray_running(cfg, StopSignals()), tempfile.TemporaryDirectory() as folder:
        for megabytes in arguments.megabytes:
            path = Path(folder, str(megabytes))
            save_random_model(path, megabytes * 10**6)
            for way in arguments.ways:
                measure(way, cfg, path, arguments.pushes)


def save_random_model(path: Path, num_bytes: int) -> None:
    tokenizer = load_tokenizer(str(ensure_tiny_model(0)))
    tokenizer.save_pretrained(path)
    hidden = 256 if num_bytes < 50 * 10**6 else 1024
    per_layer = 4 * (4 * hidden**2 + 3 * hidden * 4 * hidden)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=max(1, round(num_bytes / per_layer)),
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=1024,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)


def vllm(cfg: Config, path: Path, **options) -> VLLMEngine:
    return VLLMEngine(str(path), cfg.inference_model, **options)


def shards(cfg: Config, path: Path) -> VLLMEngine:
    cfg.inference_model.num_devices = 2
    return vllm(cfg, path)


def transformers(cfg: Config, path: Path) -> TransformersEngine:
    return TransformersEngine(str(path), cfg.inference_model, batch_size=1)


def adapters(cfg: Config, path: Path) -> VLLMEngine:
    return vllm(cfg, path, lora=cfg.train_model.lora)


WAYS = {"vllm": vllm, "shards": shards, "transformers": transformers, "adapters": adapters}


def measure(way: str, cfg: Config, path: Path, num_pushes: int) -> None:
    actor = start_actor(EngineActor, {"concurrency_groups": CONCURRENCY_GROUPS}, partial(WAYS[way], cfg, path))
    pool = EnginePool([EngineClient(actor)])
    policy = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if way == "adapters":
        policy = add_adapters(policy, cfg.train_model.lora, seed=0)
    updater = WeightUpdater(
        pool, PackedTransport(pool, torch.float32), PolicyReader(), probe=PROBE, adapters_only=way == "adapters"
    )
    pool.wait_until_ready(print)
    updater.verify_start(policy)
    pushes = []
    for number in range(WARM_UP + num_pushes):
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
        metrics = updater.push_weights(policy)
        assert number or "weights/probe_diff" in metrics  # which raises where the weights have not arrived
        pushes.append(metrics)
    counted = pushes[WARM_UP:]
    megabytes = counted[0]["weights/bytes"] / 10**6
    seconds = [push["weights/push_seconds"] for push in counted]
    loads = [push["weights/load_seconds"] for push in counted]
    rate = megabytes / 1000 / statistics.mean(seconds)
    print(f"{way:>12} {megabytes:9.2f} {spread(seconds):>18} {spread(loads):>18} {rate:6.2f}", flush=True)
    actor.__ray_terminate__.remote()


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({statistics.pstdev(values):.3f})"


if __name__ == "__main__":
    main()
