"""What the policy's entropy costs: a forward and backward pass with it and without, the same tokens in turn.

    python extras/benchmarks/entropy.py [--rounds 15]

Random Qwen2 models in float32 on one core of the CPU, from one that is nearly all backbone to one that is nearly all
head. The figures are medians of CPU seconds, which others on the machine disturb less than the clock, and the median of
the ratios of neighbours.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# Vocabulary, width, layers, rows, length.
SHAPES = ((60, 128, 2, 16, 60), (5_000, 128, 4, 4, 128), (150_000, 512, 8, 1, 128))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    for shape in SHAPES:
        measure(*shape, rounds=rounds)


def measure(vocabulary: int, width: int, layers: int, rows: int, length: int, *, rounds: int) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from expert_iteration.log_probs import LogProbModel, token_log_probs, token_scores

    torch.set_num_threads(1)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LogProbModel(Qwen2ForCausalLM(config).train())
    ids = torch.randint(vocabulary, (rows, length))

    def seconds(with_entropies: bool) -> float:
        start = time.process_time()
        mask = torch.ones_like(ids)
        log_probs = token_scores(model, ids, mask).log_probs if with_entropies else token_log_probs(model, ids, mask)
        log_probs.mean().backward()
        return time.process_time() - start

    seconds(True)  # memory is there, and gradients
    pairs = [(seconds(False), seconds(True)) for _ in range(rounds)]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    ratios = sorted(after / before for before, after in pairs)
    print(
        f"{vocabulary:>7} words, width {width}, {layers} layers, {rows} x {length} tokens: "
        f"{medians[0]:.4f} s without, {medians[1]:.4f} s with, "
        f"ratio {statistics.median(ratios):.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
