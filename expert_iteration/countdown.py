r"""Countdown: combine given numbers with + - * / to a target, each at most once. Its problems and its reward.

The game and the values of the reward are those of TorchRL's `CountdownEnv` and `CountdownRewardParser`; sizes are those
of the data set Jiayi-Pan/Countdown-Tasks-3to4: three or four numbers below 100, targets from 10 to 100. Unlike
TorchRL's, a problem's target is never replaced by the sum of its numbers, and an expression is parsed, not run: exact,
and with `=`, `x`, `\times` and `\div` as models write them.
"""

import ast
import operator
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from expert_iteration.answers import find_answer

if TYPE_CHECKING:
    from expert_iteration.problems import Problem

SYSTEM_PROMPT = (
    "Find an arithmetic expression that equals the target. Think step by step between <think> and </think>. "
    "Then write the expression alone, such as (25 + 3) * 4, between <answer> and </answer>."
)
# Fixed, as positions in the training problems are part of a checkpoint, and held-out problems part of a result.
SEED = 0
HELDOUT_PROBLEMS = 500
TRAIN_PROBLEMS = 10_000
LARGEST_NUMBER = 99
TARGETS = range(10, 101)
MAX_LENGTH = 200  # characters of an expression: four numbers need 30, and Python's parser stacks nothing dangerous
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
SIGNS = (
    (re.compile(r"\\times|\\cdot|[\u00d7\u00b7\u2217\u2219\u22c5]|(?<=[\d)\s])[xX](?=[\d(\s])"), "*"),
    (re.compile(r"\\div|\u00f7"), "/"),
    (re.compile(r"[\u2212\u2013]"), "-"),
    (re.compile(r"\\left|\\right|\\[()\[\]]|\$"), " "),
    (re.compile(r"\["), "("),
    (re.compile(r"\]"), ")"),
    (re.compile(r"\s"), " "),  # such as a no-break space
)
# Full-width characters, as they are on East Asian keyboards. NFKC would turn 5² into 52 as well.
WIDE = {0xFEE0 + code: code for code in range(ord("!"), ord("~") + 1)}
MARKS = "*_`"  # Markdown's, around an expression
EXPRESSION = re.compile(r"[\d\s+\-*/()]+", re.ASCII)

Numbers = tuple[int, ...]


def make_problems() -> tuple[list[tuple[Numbers, int]], list[tuple[Numbers, int]]]:
    """Numbers and targets to train on and to evaluate with, which share none; the same on every machine."""
    rng = random.Random(SEED)
    problems: dict[tuple[Numbers, int], tuple[Numbers, int]] = {}
    while len(problems) < HELDOUT_PROBLEMS + TRAIN_PROBLEMS:
        numbers = tuple(rng.randint(1, LARGEST_NUMBER) for _ in range(rng.choice((3, 4))))
        target = _combine(numbers, rng)
        # One of the numbers as target would be a problem without a calculation.
        if target is not None and target in TARGETS and target not in numbers:
            problems.setdefault((tuple(sorted(numbers)), target), (numbers, target))
    made = list(problems.values())
    return made[HELDOUT_PROBLEMS:], made[:HELDOUT_PROBLEMS]


def _combine(numbers: Numbers, rng: random.Random) -> int | None:
    """What some expression of all the numbers gives, None where a quotient in it is not whole.

    Two of the numbers at a time are replaced by a result.
    """
    pool = list(numbers)
    while len(pool) > 1:
        rng.shuffle(pool)
        left, right, sign = pool.pop(), pool.pop(), rng.choice("+-*/")
        if sign == "/":
            if right == 0 or left % right:
                return None
            pool.append(left // right)
        else:
            pool.append(left + right if sign == "+" else left - right if sign == "-" else left * right)
    return pool[0]


def describe_question(numbers: Sequence[int], target: int) -> str:
    """The user's turn, in TorchRL's words."""
    return (
        f"Using the numbers {list(numbers)}, create an arithmetic expression that equals {target}. You may use each "
        "number at most once. Only use +, -, *, / and parentheses."
    )


def describe_answer(numbers: Sequence[int], target: int) -> str:
    """The ground truth, in TorchRL's form."""
    return f"target={target}, numbers={','.join(map(str, numbers))}"


def countdown_correct(response: str, numbers: Sequence[int], target: int) -> bool:
    """Whether the first `<answer>` holds an expression of the numbers that equals the target.

    Args:
        response: text, special tokens removed.
        numbers: each may be used at most once, and need not be used.
        target: to be met exactly.
    """
    answer = _without_marks((find_answer(response, "answer_tag") or "").translate(WIDE))
    # "12 * 2 = 24": what is claimed must be the target too.
    expression, equals, claimed = answer.partition("=")
    return evaluate(expression, numbers) == target and (not equals or evaluate(claimed, [target]) == target)


def countdown_reward(response: str, numbers: Sequence[int], target: int) -> float:
    """1.0 for a right expression in the first `<answer>`, 0.1 for anything else in it, 0.0 without one."""
    if countdown_correct(response, numbers, target):
        return 1.0
    return 0.1 if find_answer(response, "answer_tag") else 0.0


def countdown_rewards(problems: Sequence["Problem"], responses: Sequence[str]) -> list[float]:
    """`countdown_reward` of each; `metadata` has `numbers` and `target`."""
    return [
        countdown_reward(response, problem.metadata["numbers"], problem.metadata["target"])
        for problem, response in zip(problems, responses, strict=True)
    ]


def countdown_corrects(problems: Sequence["Problem"], responses: Sequence[str]) -> list[bool]:
    """`countdown_correct` of each."""
    return [
        countdown_correct(response, problem.metadata["numbers"], problem.metadata["target"])
        for problem, response in zip(problems, responses, strict=True)
    ]


def evaluate(expression: str, numbers: Sequence[int]) -> Fraction | None:
    r"""The exact value of an expression that uses each of the numbers at most once; None: it is none, or has no value.

    There are + - * / (also as x, the signs of print, and LaTeX's but for `\frac`), a minus before what follows, and
    parentheses, also square ones. Markdown's marks around it and a period behind it do not count.
    """
    text = _without_marks(expression.translate(WIDE)) if len(expression) <= MAX_LENGTH else ""
    for sign, plain in SIGNS:
        text = sign.sub(plain, text)
    if not EXPRESSION.fullmatch(text):
        return None
    try:
        # Without line breaks, of which Python's grammar has its own opinion.
        tree = ast.parse(" ".join(text.split()), mode="eval").body
        return None if Counter(_numbers_in(tree)) - Counter(numbers) else _value(tree)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _without_marks(text: str) -> str:
    """Without a last period, and the marks before it that stand behind it as well, in reverse."""
    text = text.strip().removesuffix(".").rstrip()
    count = len(text) - len(text.lstrip(MARKS))
    if count and text[:count] == text[: -count - 1 : -1]:
        text = text[count:-count].strip().removesuffix(".")
    return text


def _numbers_in(tree: ast.expr) -> list[int]:
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, int)]


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"{type(node).__name__} is not arithmetic")
