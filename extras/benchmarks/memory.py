"""Peak memory of a training step with logits of all tokens at once, and in chunks; gradient checkpointing off and on.

    python extras/benchmarks/memory.py [--vocabulary 150000] [--rows 4] [--length 512] [--rounds 3]

A random Qwen2 in float32 on the CPU (Linux), all of it trained or adapters alone. Each step runs in a process of its
own; the figure is the peak of its resident memory minus what it held when the step began, weights included. `whole` is
the plain computation: the model's own logits of all tokens, and their cross-entropy.
"""

import argparse
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

KINDS = ("full", "lora")
LOGITS = ("whole", "chunks")
CHECKPOINTING = ("off", "on")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", nargs=3, metavar=("KIND", "LOGITS", "CHECKPOINTING"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(*run_step(arguments, *arguments.step))
        return
    whole = arguments.rows * arguments.length * arguments.vocabulary * 4 / 2**20
    print(f"{arguments.rows} x {arguments.length} tokens x {arguments.vocabulary} words in float32: {whole:.0f} MiB")
    for variant in product(KINDS, CHECKPOINTING, LOGITS):
        kind, checkpointing, logits = variant
        rounds = [run_in_process(kind, logits, checkpointing) for _ in range(arguments.rounds)]
        peaks, seconds = zip(*rounds, strict=True)
        print(
            f"{kind:>5}, checkpointing {checkpointing:>3}, {logits:>6}: {statistics.mean(peaks):6.0f} MiB "
            f"(from {min(peaks):.0f} to {max(peaks):.0f}), {statistics.mean(seconds):5.1f} s",
            flush=True,
        )


def run_in_process(*variant: str) -> tuple[float, float]:
    """Peak in MiB and seconds of a step, in a fresh process with the same arguments."""
    command = [sys.executable, *sys.argv, "--step", *variant]
    peak, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return float(peak), float(seconds)


def run_step(arguments: argparse.Namespace, kind: str, logits: str, checkpointing: str) -> tuple[float, float]:
    import torch
    import torch.nn.functional as F
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from expert_iteration.config import LoraConfig
    from expert_iteration.log_probs import LogProbModel
    from expert_iteration.lora import add_adapters

    config = Qwen2Config(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).train()
    if kind == "lora":
        model = add_adapters(model, LoraConfig(enabled=True, r=8, alpha=16.0, dropout=0.0), seed=0)
    if checkpointing == "on":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    in_chunks = LogProbModel(model)  # which passes a few tokens through the model, to warm it up

    def at_once(input_ids, attention_mask):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
        return -F.cross_entropy(logits.float().flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")

    input_ids = torch.randint(arguments.vocabulary, (arguments.rows, arguments.length))
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is counted anew from here on
    before, start = memory_mib("VmRSS"), time.perf_counter()
    log_probs = (in_chunks if logits == "chunks" else at_once)(input_ids, torch.ones_like(input_ids))
    log_probs.mean().backward()
    seconds = time.perf_counter() - start
    return memory_mib("VmHWM") - before, seconds


def memory_mib(name: str) -> float:
    """A figure of this process by its name in /proc: VmRSS is what it holds now, VmHWM the peak of that."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    return kib / 1024


if __name__ == "__main__":
    main()
