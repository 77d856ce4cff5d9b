"""Expected memory as a sum of terms, each with a text, so that the arithmetic can be read; and the common terms."""

from dataclasses import dataclass
from typing import NamedTuple

from expert_iteration.config import Config, Dtype
from expert_iteration.devices import DeviceAllocation
from expert_iteration.model_shape import ModelShape

MIB, GIB = 2**20, 2**30
BYTES = {Dtype.float32: 4, Dtype.bfloat16: 2, Dtype.float16: 2}
# NF4 in blocks of 64 weights with a scale of 8 bits each, and 32 bits for 256 of those (double quantization).
FOUR_BITS = (4 + 8 / 64 + 32 / (64 * 256)) / 8
# Of a prompt, where only the length of a response is configured.
PROMPT_TOKENS = 512
# Log-probs are computed in chunks of 128 MiB of logits in float32: four such tensors at the peak.
LOGITS = 4 * 128 * MIB
# What CUDA takes in every process, and what the libraries do on the CPU.
PROCESS = GIB // 2


class Term(NamedTuple):
    """A summand: its text, the bytes that are expected, and how many of them are certain."""

    text: str
    expected: float
    certain: float = 0.0


@dataclass(frozen=True)
class ModelMemory:
    """Memory of one model, alike in each of its places.

    Attributes:
        kind: train, inference or reference.
        devices: its accelerators; none on the CPU.
        places: number of its accelerators, or of its processes on the CPU.
        terms: summands for one place.
    """

    kind: str
    devices: list[int]
    places: int
    terms: list[Term]

    @property
    def expected(self) -> float:
        """Bytes in one place."""
        return sum(term.expected for term in self.terms)

    @property
    def certain(self) -> float:
        """Bytes in one place that it cannot do without."""
        return sum(term.certain for term in self.terms)

    @property
    def arithmetic(self) -> str:
        """The terms, and what they make."""
        return f"{' + '.join(term.text for term in self.terms)} = {in_gib(self.expected)}"


def product(number: int, noun: str, factor: str, num_bytes: float, parts: str = "") -> Term:
    """A certain term: so many things of so many bytes each."""
    return Term(f"{count(number)} {noun} x {factor}{parts}", num_bytes, num_bytes)


def frozen_weights(shape: ModelShape, width: int, quantized: bool, ranks: int = 1) -> list[Term]:
    """Weights that are not trained, of `width` bytes each; those of linear layers in four bits if so asked."""
    if not quantized:
        parts = shared(ranks, "ranks")
        return [product(shape.parameters, "parameters", f"{width} bytes", shape.parameters * width / ranks, parts)]
    others = shape.parameters - shape.linear_parameters
    return [
        product(shape.linear_parameters, "weights", f"{FOUR_BITS:.2f} bytes", shape.linear_parameters * FOUR_BITS),
        product(others, "others", f"{width} bytes", others * width),
    ]


def forward_pass(shape: ModelShape, rows: int, length: int, width: int) -> Term:
    """The largest moment of a pass that keeps nothing: three tensors within an MLP and four of hidden states."""
    tokens = rows * length
    num_bytes = width * tokens * (3 * shape.widest + 4 * shape.hidden) + chunk_of_logits(shape, tokens)
    return Term(f"forward pass of {rows} x {length} tokens ~{in_gib(num_bytes)}", num_bytes)


def chunk_of_logits(shape: ModelShape, tokens: int) -> float:
    """Bytes of the logits of a chunk of tokens, and of what is computed from them."""
    return min(LOGITS, 4 * 4 * tokens * shape.vocab)


def process(allocation: DeviceAllocation) -> Term:
    """What a process takes beside its model. Of libraries much is shared between processes, so nothing is certain."""
    if allocation["placement"] == "cpu":
        return Term(f"libraries ~{in_gib(PROCESS)}", PROCESS)
    return Term(f"CUDA {in_gib(PROCESS)}", PROCESS, PROCESS)


def response_tokens(cfg: Config, shape: ModelShape) -> int:
    """Tokens of a long response with its prompt, as far as they can be known."""
    return min(longest_sequence(cfg, shape), PROMPT_TOKENS + cfg.inference_model.max_tokens)


def longest_sequence(cfg: Config, shape: ModelShape) -> int:
    """Tokens that prompt and response may have together."""
    return cfg.inference_model.max_model_len or shape.context


def num_adapter_parameters(cfg: Config, shape: ModelShape) -> int:
    """Parameters of the low-rank adapters: two matrices beside each linear layer."""
    return cfg.train_model.lora.r * shape.linear_ends


def shared(parts: int, noun: str) -> str:
    """The end of a product that is shared out, or nothing."""
    return f" / {parts} {noun}" if parts > 1 else ""


def count(number: int) -> str:
    """A number of things, for people."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return str(number)


def in_gib(num_bytes: float) -> str:
    """Bytes for people, in MiB where they are few."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= 0.1 * GIB else f"{num_bytes / MIB:.1f} MiB"
