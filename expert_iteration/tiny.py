"""The embedded default task: two-step word problems, a sloppy teacher, and the cache of the tiny model.

Numbers decide the split: a combination (family, a, b, c) is either trained on or held out, so a held-out problem asks
for a calculation never seen. The teacher knows the right way and often does not take it; expert iteration makes the
model prefer it. That gain is sharpening: the digits it still gets wrong at the end are wrong from the start.

This module imports neither torch nor transformers; `tiny_model` (tokenizer, warm start) is imported on a cache miss.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from expert_iteration.errors import UserError

SYSTEM_PROMPT = "Think, then answer with a number."
HELDOUT_COMBINATIONS = 203
HELDOUT_PROBLEMS = 200
TRAIN_PROBLEMS_PER_FAMILY = 1000
# Raise it when code changes the weights and no constant does: cached models are then built anew.
CODE_VERSION = 1

START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
PAD = "<|endoftext|>"
SPECIAL_TOKENS = (PAD, START_OF_TURN, END_OF_TURN)
# Tokens of their own, but not special: decoding with skip_special_tokens keeps them for the reward.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# With the ten digits, every number up to 99 is one token; results reach 34.
NUMBERS = tuple(str(number) for number in range(10, 100))

# ChatML. The generation block marks what an assistant mask covers: the response and the token that ends the turn.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

NAMES = (
    "Amy", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jack",
    "Kate", "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tom", "Zoe",
)  # fmt: skip
THINGS = (
    "apples", "balls", "books", "cards", "coins", "eggs", "flags", "hats",
    "keys", "lamps", "nuts", "pens", "rings", "shells", "stamps", "toys",
)  # fmt: skip

# operators of the two steps -> wordings. {x} acts, {y} is a second person, {t} the things.
WORDINGS = {
    "+-": (
        "{x} has {a} {t}. {y} gives {x} {b} more {t}. Then {x} loses {c} {t}. How many {t} does {x} have now?",
        "{x} finds {a} {t} and buys {b} more. {y} takes {c} of them. How many {t} are left?",
    ),
    "-+": (
        "{x} has {a} {t}. {x} gives {b} {t} to {y}. Then {x} finds {c} {t}. How many {t} does {x} have now?",
        "There are {a} {t} in a box. {x} takes out {b} and {y} puts in {c}. How many {t} are in the box?",
    ),
    "*+": (
        "{x} has {a} bags with {b} {t} in each. {y} gives {x} {c} more {t}. How many {t} does {x} have now?",
        "{x} buys {b} {t} a day for {a} days and finds {c} more. How many {t} does {x} have?",
    ),
    "*-": (
        "{x} has {a} bags with {b} {t} in each. Then {x} loses {c} {t}. How many {t} does {x} have now?",
        "{x} fills {a} boxes with {b} {t} each. {y} takes {c} of them. How many {t} are left?",
    ),
}


class Combination(NamedTuple):
    """The numbers of a problem: `a op1 b op2 c`, with `ops` one of the keys of `WORDINGS`."""

    ops: str
    a: int
    b: int
    c: int

    @property
    def steps(self) -> tuple[str, int, str, int]:
        """First calculation, its result, second calculation, its result: ("2+4=6", 6, "6-3=3", 3)."""
        first = {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.ops[0]]
        second = first + self.c if self.ops[1] == "+" else first - self.c
        return f"{self.a}{self.ops[0]}{self.b}={first}", first, f"{first}{self.ops[1]}{self.c}={second}", second


class TinyProblem(NamedTuple):
    """A combination put into words."""

    combination: Combination
    question: str

    @property
    def answer(self) -> str:
        """Ground truth in GSM8K's form: the calculations, then `#### result`."""
        first, _, second, result = self.combination.steps
        return f"{first}, {second}\n#### {result}"


@dataclass(frozen=True)
class Recipe:
    """The numbers of the warm start and the shape of the model."""

    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 384
    max_position_embeddings: int = 2048
    steps: int = 800
    batch_size: int = 16
    lr: float = 4e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    warmup_steps: int = 30
    clip_grad_norm: float = 1.0
    prompt_weight: float = 0.3
    """Weight of the mean prompt-token loss beside the mean response-token loss."""
    teacher: dict[str, tuple[float, float]] = field(default_factory=lambda: {"-": (0.32, 0.60), "+": (0.42, 0.40)})
    """Second operator -> shares of (careful, hasty) responses; the rest forgets the answer tag."""

    def digest(self) -> str:
        """Eight hex digits that change with whatever decides the weights, the seed apart."""
        words = [WORDINGS, NAMES, THINGS, SYSTEM_PROMPT, CHAT_TEMPLATE, SPECIAL_TOKENS, TAGS, NUMBERS]
        everything = [CODE_VERSION, asdict(self), words, split_combinations()]
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:8]


def all_combinations() -> list[Combination]:
    """The 1008 combinations: operands 2..9, both factors of a product 2..5, nothing negative on the way."""
    found = []
    for ops in WORDINGS:
        operands = range(2, 6) if ops[0] == "*" else range(2, 10)
        for a, b, c in itertools.product(operands, operands, range(2, 10)):
            combination = Combination(ops, a, b, c)
            _, first, _, result = combination.steps
            if first >= 0 and result >= 0:
                found.append(combination)
    return found


@cache
def split_combinations() -> tuple[tuple[Combination, ...], tuple[Combination, ...]]:
    """(805 to train on, 203 held out), by the order of their hashes: the same on every machine and for every seed."""
    ordered = sorted(all_combinations(), key=lambda c: hashlib.sha256(repr(tuple(c)).encode()).digest())
    return tuple(ordered[HELDOUT_COMBINATIONS:]), tuple(ordered[:HELDOUT_COMBINATIONS])


def put_into_words(combination: Combination, rng: random.Random) -> TinyProblem:
    """A problem with this combination: random wording, names and things."""
    x, y = rng.sample(NAMES, 2)
    wording = rng.choice(WORDINGS[combination.ops])
    _, a, b, c = combination
    return TinyProblem(combination, wording.format(x=x, y=y, t=rng.choice(THINGS), a=a, b=b, c=c))


def _balanced_problems(combinations: tuple[Combination, ...], per_family: int, seed: int) -> list[TinyProblem]:
    """`per_family` problems of each family, families in turn, each walking through its combinations again and again."""
    rng = random.Random(seed)
    columns = []
    for ops in WORDINGS:
        family = [c for c in combinations if c.ops == ops]
        rng.shuffle(family)
        columns.append([put_into_words(c, rng) for c in itertools.islice(itertools.cycle(family), per_family)])
    return [problem for row in zip(*columns, strict=True) for problem in row]


def train_problems() -> list[TinyProblem]:
    """The fixed training list: 4000 problems over the 805 training combinations, families in turn."""
    return _balanced_problems(split_combinations()[0], TRAIN_PROBLEMS_PER_FAMILY, seed=1)


def heldout_problems() -> list[TinyProblem]:
    """The fixed held-out list: 200 problems over the 203 held-out combinations, 50 a family, families in turn."""
    return _balanced_problems(split_combinations()[1], HELDOUT_PROBLEMS // len(WORDINGS), seed=2)


def respond(combination: Combination, style: str) -> str:
    """The teacher's response without the end-of-turn token, its digits never wrong.

    `style`: "careful" takes both steps and is right, "hasty" answers after the first and is wrong, "untagged" takes
    both and leaves the answer tag out.
    """
    first, after_first, second, result = combination.steps
    if style == "hasty":
        return f"<think>{first}</think><answer>{after_first}</answer>"
    think = f"<think>{first}, {second}</think>"
    return f"{think}<answer>{result}</answer>" if style == "careful" else f"{think}{result}"


def sloppy_response(combination: Combination, rng: random.Random, recipe: Recipe) -> str:
    """What the teacher says this time: most often hasty before a subtraction, most often careful before an addition."""
    careful, hasty = recipe.teacher[combination.ops[1]]
    draw = rng.random()
    return respond(combination, "careful" if draw < careful else "hasty" if draw < careful + hasty else "untagged")


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/expert_iteration`, by default `~/.cache/expert_iteration`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expert_iteration"


def ensure_tiny_model(
    model_seed: int, cache_dir: Path | None = None, progress: bool = True, steps: int | None = None
) -> Path:
    """Folder of the warm-started tiny model and its tokenizer, in Hugging Face's format; built when missing.

    Building takes about a minute on one core and gives the same bits on one machine for the same seed. The caller's
    random state and number of threads are as before afterwards. The folder appears complete or not at all, also when
    two processes build it at once or one is killed.

    Args:
        model_seed: seed of the initial weights and of the problems of the warm start.
        cache_dir: where to keep it; `default_cache_dir()` when None.
        progress: say on standard error what is built and show a progress bar.
        steps: optimizer steps of the warm start instead of the recipe's 800 (fewer give a weaker model).

    Raises:
        UserError: the cache directory cannot be written.
    """
    recipe = Recipe() if steps is None else Recipe(steps=steps)
    parent = default_cache_dir() if cache_dir is None else Path(cache_dir)
    target = parent / f"tiny-{recipe.digest()}-seed{model_seed}"
    if target.is_dir():
        return target
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=parent))
    except OSError as error:
        raise UserError(
            f"The tiny model cannot be cached in {parent} ({error.strerror}): make that directory writable, "
            "or set XDG_CACHE_HOME to one that is."
        ) from error
    try:
        _build(scratch / "model", target, recipe, model_seed, progress)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _build(scratch: Path, target: Path, recipe: Recipe, model_seed: int, progress: bool) -> None:
    from expert_iteration.tiny_model import build_tiny_model

    if progress:
        print(f"Warm start of the tiny model (seed {model_seed}), to be kept in {target}", file=sys.stderr)
    build_tiny_model(scratch, recipe, model_seed, progress)
    try:
        os.replace(scratch, target)
    except OSError:
        # Another process was faster; its folder holds the same bits.
        if not target.is_dir():
            raise
