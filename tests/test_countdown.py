"""`expert_iteration.countdown`: its problems can be solved, and its reward cannot be fooled."""

import hashlib
import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_iteration.countdown import (
    HELDOUT_PROBLEMS,
    MAX_LENGTH,
    TARGETS,
    TRAIN_PROBLEMS,
    countdown_correct,
    countdown_corrects,
    countdown_reward,
    countdown_rewards,
    evaluate,
    make_problems,
)
from expert_iteration.problems import make_countdown_problem

PROBLEMS = make_problems()


def solve(numbers, target):
    """An expression of all the numbers, by trying them all."""
    pool = [(Fraction(number), str(number)) for number in numbers]
    return next((text for value, text in _combinations(pool) if value == target), None)


def _combinations(pool):
    if len(pool) == 1:
        yield pool[0]
    for i, j in itertools.permutations(range(len(pool)), 2):
        (left, left_text), (right, right_text) = pool[i], pool[j]
        rest = [item for k, item in enumerate(pool) if k not in (i, j)]
        values = {"+": left + right, "-": left - right, "*": left * right, **({"/": left / right} if right else {})}
        for sign, value in values.items():
            yield from _combinations([*rest, (value, f"({left_text} {sign} {right_text})")])


# Problems


def test_problems_are_the_same_everywhere_and_share_none():
    # Of these: a checkpoint's position and an evaluation's result mean nothing with others.
    assert hashlib.sha256(repr(PROBLEMS).encode()).hexdigest().startswith("69e5f17e89b2e0c5")
    train, heldout = ({(tuple(sorted(numbers)), target) for numbers, target in part} for part in PROBLEMS)
    assert (len(train), len(heldout)) == (TRAIN_PROBLEMS, HELDOUT_PROBLEMS)
    assert not train & heldout
    assert all(target in TARGETS and target not in numbers for part in PROBLEMS for numbers, target in part)
    assert {len(numbers) for numbers, _ in PROBLEMS[0]} == {3, 4}


def test_problems_have_solutions_that_are_right():
    for numbers, target in (*PROBLEMS[0][:15], *PROBLEMS[1][:15]):
        expression = solve(numbers, target)
        assert countdown_reward(f"<think>so</think><answer>{expression}</answer>", numbers, target) == 1.0


def test_batches_are_scored_one_by_one():
    problems = [make_countdown_problem([3, 8], 24), make_countdown_problem([4, 6], 10)]
    assert problems[0].answer == "target=24, numbers=3,8"
    responses = ["<answer>3 * 8</answer>", "<answer>4 * 6</answer>"]
    assert countdown_rewards(problems, responses) == [1.0, 0.1]
    assert countdown_corrects(problems, responses) == [True, False]


# The reward


@pytest.mark.parametrize(
    "answer",
    [
        "8 / (3 - 8 / 3)",  # by way of thirds, exactly
        "3*8",
        " 3 *\n 8 ",
        "8 - -8 + 8",  # every number as often as it is there
        "((((3))))*8",
        "3 x 8",
        r"3 \times 8",
        r"$3 \cdot 8$",
        r"\left(8 - 5\right) \times 8",
        "3 \u00d7 8",
        "(5 \u2212 2) * 8",
        "48 \u00f7 2",
        "3 * 8 = 24",
        "3*8=24",
        "3 * 8 = 24.",
        "**3 * 8** = `24`",
        "**`3 * 8`**.",
        "3\u00a0*\u202f8",
        "3 \u2217 8",
        "3 \u2219 8",
        "\uff13\uff0a\uff18",
        "[8 - 5] * 8",
    ],
)
def test_what_is_right(answer):
    assert countdown_reward(f"<answer>{answer}</answer>", [3, 3, 8, 8, 8, 5, 2, 48], 24) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "24",  # not one of the numbers
        "x = 24",
        "3 * 8 = 25",
        "3 * 8 = 24 = 24",
        "24 = 3 * 8",
        "3 * 8 = 3 * 8",
        "8 + 8 + 8",  # there are two
        "3 * 8.0",
        "3(8)",
        "3 8",
        "8 ** 3 / 8",
        "50 // 2 - 1",
        "(3, 8)",
        "3 * 8 #",
        "3 * 08",
        "3 * 8 or 5 + 19",
        "3 * 8 *",
        "*3 * 8**",
        "8\u00b2 - 1",
        "The answer is 3 * 8",
        r"\frac{48}{2}",
        "8 / (3 - 3)",
        "__import__('os')",
        "()",
        "(" * 150 + "3" + ")" * 150,
        "-" * 10_000 + "3",
        "9" * 100_000,
    ],
)
def test_what_is_wrong(answer):
    assert countdown_reward(f"<answer>{answer}</answer>", [3, 3, 8, 8, 50, 48, 2, 1], 24) == 0.1


@pytest.mark.parametrize("response", ["3 * 8", "", "<answer></answer>", "<answer>3 * 8", "3 * 8</answer>"])
def test_without_an_answer_there_is_no_reward(response):
    assert countdown_reward(response, [3, 8], 24) == 0.0
    assert not countdown_correct(response, [3, 8], 24)


def test_only_the_first_answer_counts_and_no_thought():
    assert countdown_reward("<answer>3 + 8</answer><answer>3 * 8</answer>", [3, 8], 24) == 0.1
    assert countdown_reward("<think><answer>3 + 8</answer></think><answer>3 * 8</answer>", [3, 8], 24) == 1.0


EXPRESSIONS = st.recursive(
    st.integers(0, 12).map(lambda n: (str(n), Fraction(n), [n])),
    lambda parts: st.tuples(parts, parts, st.sampled_from("+-*/")).map(lambda p: _joined(*p)),
    max_leaves=6,
)


def _joined(left, right, sign):
    a, b = left[1], right[1]
    defined = a is not None and b is not None and not (sign == "/" and b == 0)
    value = (
        {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[sign]() if defined else None
    )
    return f"({left[0]}{sign}{right[0]})", value, left[2] + right[2]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(EXPRESSIONS, st.randoms(use_true_random=False))
def test_an_expression_has_its_value_and_needs_its_numbers(expression, rng):
    text, value, numbers = expression
    rng.shuffle(numbers)
    assert evaluate(text, numbers) == value
    assert evaluate(text, [*numbers, 7]) == value
    assert evaluate(text, numbers[1:]) is None


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.text(alphabet="0123456789+-*/() =.x\n\\", max_size=MAX_LENGTH) | st.text())
def test_any_text_has_a_reward(text):
    assert countdown_reward(f"<answer>{text}</answer>", [1, 2, 3], 6) in (0.0, 0.1, 1.0)
    assert countdown_reward(text, [1, 2, 3], 6) in (0.0, 0.1, 1.0)
