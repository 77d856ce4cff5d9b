"""`expert_iteration.answers` and `math_answers`: where an answer is found, how it is read, what is no way to guess."""

from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from expert_iteration import math_answers
from expert_iteration.answers import MODES, find_answer, holds_answer, read_number
from expert_iteration.config import AnswerMode
from expert_iteration.errors import UserError
from expert_iteration.tasks import Problem

REPEATABLE = settings(max_examples=100, deadline=None, derandomize=True)


# How a number is read

READ_TABLE = [
    ("72", 72),
    ("072.50", "72.5"),
    ("18.", 18),
    (".5", "1/2"),
    ("1,234,567.5", "1234567.5"),
    ("1,00,000", 100_000),
    ("$18.00", 18),
    ("-$5", -5),
    ("$-5", -5),
    ("€3", 3),
    ("£ 3", 3),
    ("USD 72", 72),
    ("US$72", 72),
    ("Rs.500", 500),
    ("72 USD", 72),
    ("72 dollars", 72),
    ("10%", 10),
    ("72 apples", 72),
    ("The answer is 72.", 72),
    ("**72**", 72),
    ("**72** apples", 72),
    ("_72_", 72),
    ("5 km/h", 5),
    ("72 cm^2", 72),
    ("72 m²", 72),
    ("90°", 90),
    ("3/4", "3/4"),
    ("3 / 4", "3/4"),
    ("1 1/2", "3/2"),
    ("-1 1/2", "-3/2"),
    ("1½", "3/2"),
    ("-½", "-1/2"),
    ("\u22125", -5),
    ("\u20135", -5),
    ("minus 5", -5),
    ("+5", 5),
    ("(-5)", -5),
    ("5 million", 5_000_000),
    # A sign apart from its number.
    ("- 72", -72),
    (r"-\frac{1}{2}", "-1/2"),
    (r"- \frac{1}{2}", "-1/2"),
    (r"-\,5", -5),
    ("-~5", -5),
    ("-(5)", -5),
    (r"-\left(5\right)", -5),
    (r"-\text{5}", -5),
    ("-**5**", -5),
    ("-_5_", -5),
    ("- $5", -5),
    ("minus (5)", -5),
    ("The total is - 5", -5),
    ("3 + 4 = - 7", -7),
    ("- 72 apples", -72),
    ("72-year-old", 72),
    ("3+4=7", 7),
    ("x = 72", 72),
    (r"\boxed{72}", 72),
    (r"\text{72}", 72),
    (r"72\text{ apples}", 72),
    (r"72\text{ cm}^2", 72),
    (r"90^\circ", 90),
    (r"\$18\%", 18),
    (r"-\$5", -5),
    (r"1{,}234", 1234),
    (r"1\,234", 1234),
    (r"1,\!234", 1234),
    (r"$\frac{3}{4}$", "3/4"),
    (r"\dfrac34", "3/4"),
    (r"-\tfrac{1}{2}", "-1/2"),
    (r"1\frac{1}{2}", "3/2"),
    # Several numbers, or something else than a number: never a guess.
    ("3 or 4", None),
    ("3, 4", None),
    ("3+4", None),
    ("2+2", None),
    ("10-15", None),
    ("10 - 5", None),
    ("10 minus 5", None),
    ("x-5", None),
    ("--5", None),
    ("-\n5", None),
    (r"-\sqrt{16}", None),
    (r"-\frac{-1}{2}", None),
    ("1.2.3", None),
    ("1,23", None),
    ("1/0", None),
    ("1/2/3", None),
    ("1e2", None),
    ("5^2", None),
    ("10^{2}", None),
    ("10**2", None),
    ("10 ** (-2)", None),
    ("2**n", None),
    ("1\n1/2", None),
    ("5²", None),
    ("√16", None),
    (r"\sqrt{16}", None),
    (r"2\pi", None),
    ("x2", None),
    ("NaN", None),
    ("three", None),
    ("", None),
    ("9" * 5000, None),
    ("1/" + "9" * 5000, None),
]


@pytest.mark.parametrize(("text", "value"), READ_TABLE)
def test_a_number_is_read_exactly_or_not_at_all(text, value):
    assert read_number(text) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    ("given", "truth", "same"),
    [
        ("72 apples", "72", True),
        ("72", "72 apples", True),
        ("72", "x = 72", True),
        ("0.75", r"\frac{3}{4}", True),
        ("0.3333", "1/3", False),
        # A text that holds a number is no number, and is compared as text.
        ("22", "Catch 22", False),
        ("5", "- 5", False),
        ("-5", "- 5", True),
        # Words after the number are part of it, where the response has any.
        ("72 pears", "72", True),
        ("72 pears", "so\n#### 72", True),
        ("5 pears", "5 apples", False),
        ("There are 5.0 Apples in all", "5 apples", True),
        ("3 m", "3 cm", False),
        (r"3\text{ cm}", "3 cm", True),
        ("3", r"3\text{ cm}", True),
        ("5 m²", "5 m^2", True),
        # What runs on in letters is no number.
        ("2", "2x", False),
        ("2y", "2x", False),
        ("2X", "2x", True),
        ("7th Avenue", "7th Street", False),
        ("catch  22.", "Catch 22", True),
        ("Paris", "paris", True),
        ("", "", False),
        ("...", ".", False),
    ],
)
def test_truth_that_begins_with_a_number_is_one(given, truth, same):
    assert holds_answer(f"<answer>{given}</answer>", truth) is same


# Where it is looked for

PLACES = {
    "answer_tag": "I count 3.\n<answer>{}</answer> Good.",
    "hash": "I count 3.\n#### {}\nDone in 5 minutes.",
    "boxed": r"I count 3, so \boxed{{{}}} in 5 minutes.",
    "last_number": "I count 3, then {}",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_looks_in_its_place_only(mode, place):
    text = PLACES[place].format("72")
    seen = mode in (place, "auto") or (mode == "last_number" and place == "answer_tag")
    assert holds_answer(text, "72", mode) is seen


@pytest.mark.parametrize(
    ("response", "mode", "found"),
    [
        # One answer counts, whatever else is said.
        ("<answer>5</answer><answer>72</answer>", "auto", "5"),
        ("#### 5\n#### 72", "hash", "5"),
        (r"\boxed{5} and \boxed{72}", "boxed", "72"),
        (r"\boxed{5} and \boxed{72}", "auto", "72"),
        ("5 or 72", "last_number", "72"),
        # The first form that is there, in the order of the module.
        (r"1 \boxed{2} <answer>4</answer> #### 3", "auto", "4"),
        ("1 \\boxed{2}\n#### 3\n4", "auto", "3"),
        (r"1 \boxed{2} 3", "auto", "2"),
        ("1 2 3", "auto", "3"),
        # The dash of a list, too, is a minus; that of a range, a subtraction or a rule is none.
        ("So:\n- 72", "auto", "- 72"),
        ("5\u20137", "auto", "7"),
        ("10 - 5", "auto", "5"),
        ("So:\n---\n72", "auto", "72"),
        # Braces within braces.
        (r"\boxed{\frac{3}{4}} 5", "auto", r"\frac{3}{4}"),
        (r"\boxed{\text{a \} b}}", "boxed", r"\text{a \} b}"),
        (r"\fbox{7}", "boxed", "7"),
        # What is not complete is not there.
        ("<answer>72", "answer_tag", None),
        ("<answer>72", "auto", "72"),
        (r"7 \boxed{72", "boxed", None),
        # Headings are no answers.
        ("#### 1. Add\n2\n#### Total\n7\n#### $72", "auto", "$72"),
        ("#### Step 1\n72 apples", "auto", "72"),
        # Thoughts are no answers.
        ("<think>72</think>I do not know", "auto", None),
        ("<think><answer>72</answer></think><answer>5</answer>", "auto", "5"),
        (r"<think>\boxed{5} #### 6</think> 72", "auto", "72"),
        ("it may be 5</think>72", "auto", "72"),
        ("<think>a<think>5</think>6</think>72", "auto", "72"),
        ("<think>it may be 72", "auto", None),
        ("<think>it may be <answer>72</answer>", "auto", "72"),
        ("", "auto", None),
    ],
)
def test_one_answer_of_a_response_is_found(response, mode, found):
    assert find_answer(response, mode) == found


@pytest.mark.parametrize(
    ("response", "mode", "right"),
    [
        ("Paris.", "auto", True),
        ("<think>Rome or Paris?</think>\nParis", "auto", True),
        ("It is Paris", "auto", False),
        ("It is\n#### Paris", "hash", True),
        (r"\boxed{Paris}", "boxed", True),
        ("Paris", "answer_tag", False),
    ],
)
def test_an_answer_in_words(response, mode, right):
    assert holds_answer(response, "Paris", mode) is right


def test_modes_are_those_of_the_configuration():
    assert set(MODES) == {mode.value for mode in AnswerMode}
    with pytest.raises(UserError, match=r"answer_mode=tag is unknown.*answer_tag"):
        holds_answer("72", "72", "tag")


# Any number, in any writing, at any place

integers = st.integers(-(10**12), 10**12)
decimals = st.decimals(-(10**9), 10**9, places=3)
fractions = st.fractions(-1000, 1000, max_denominator=1000)
numbers = st.one_of(integers.map(Fraction), decimals.map(Fraction), fractions)


@st.composite
def writings(draw, value: Fraction) -> str:
    """One of the supported ways to write a number."""
    size = abs(value)
    plain = str(size)
    if 1000 % size.denominator == 0:
        pattern = draw(st.sampled_from(["{}", "{:,}"]))
        whole, part = divmod(size, 1)
        digits = f"{int(part * 1000):03}" + "0" * draw(st.integers(0, 2))
        ending = f".{digits}" if part or draw(st.booleans()) else draw(st.sampled_from(["", "."]))
        plain = pattern.format(int(whole)) + ending
        if not whole and part and draw(st.booleans()):
            plain = ending
        plain = plain.replace(",", draw(st.sampled_from([",", "{,}", ",\\!", "\\,"])))
    elif draw(st.booleans()):
        command = draw(st.sampled_from(["frac", "dfrac", "tfrac"]))
        plain = f"\\{command}{{{size.numerator}}}{{{size.denominator}}}"
    elif size > 1 and draw(st.booleans()):
        whole, part = divmod(size, 1)
        plain = f"{whole} {part}"
    currency = draw(st.sampled_from(["", "", "$", "\\$", "€", "£"])) if "\\" not in plain else ""
    around = draw(st.sampled_from(["{}", "{}", "({})", "**{}**", "\\text{{{}}}", "{{{}}}", "\\left({}\\right)"]))
    if value >= 0:
        return draw(st.sampled_from(["", "", "+"])) + currency + plain
    sign = draw(st.sampled_from(["-", "\u2212", "minus ", "- ", "\u2212 ", "-\\,", "-~"]))
    return sign + around.format(currency + plain)


words = st.sampled_from(["", " apples", " km/h", "%", "\\%", "\\text{ cm}^2", " m²", " USD", " dollars each"])
starts = st.sampled_from(["", " ", "**", "The total is ", "x = ", "3 + 4 = "])


@REPEATABLE
@given(st.data(), numbers, numbers, st.sampled_from(sorted(PLACES)))
def test_a_number_equals_itself_however_it_is_written_and_no_other(data, value, other, place):
    assume(other != value)
    written = data.draw(writings(value))
    # Words between #### and a number make it a heading, and so does a period between a number and words.
    stated = written.removesuffix(".") if place == "hash" else data.draw(starts) + written
    response = PLACES[place].format(stated + data.draw(words))
    truth = f"Some steps.\n#### {data.draw(writings(value))}"
    for mode in (place, "auto"):
        assert holds_answer(response, truth, mode)
        assert not holds_answer(response, str(other), mode)


@REPEATABLE
@given(st.lists(numbers, min_size=2, max_size=4), st.sampled_from([" or ", ", ", " and ", "; ", "\n", " + "]))
def test_several_numbers_in_one_answer_are_none(values, separator):
    text = separator.join(str(value) for value in values)
    assert read_number(text) is None
    assert not any(holds_answer(f"<answer>{text}</answer>", str(value)) for value in values)


PIECES = ["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "{", "}", "####", "\n", "-", "$", ",", ".", "="]
PIECES += ["/", "^", "\\frac", "\\sqrt{", "½", "1", "234", " ", "e", "million", "\\,", "{,}", "~", "USD", "minus "]
texts = st.one_of(st.text(max_size=200), st.lists(st.sampled_from(PIECES), max_size=60).map("".join))


@REPEATABLE
@given(texts, texts, st.sampled_from(MODES))
def test_arbitrary_text_raises_nothing(response, truth, mode):
    assert holds_answer(response, truth, mode) in (True, False)
    assert read_number(response) is None or isinstance(read_number(response), Fraction)


@pytest.mark.timeout(120)
def test_long_texts_are_harmless():
    """Milliseconds each. What took steps without bound would run into the time limit, as would a number so long."""
    for piece in [*PIECES, "1,23,", "1,234,", "1 1/", "#### 1\n", "5^", "1 million "]:
        text = (piece * 50_000)[:50_000]
        assert not holds_answer(text, "72")
        assert not holds_answer(f"<answer>{text}</answer>", "72")


# MATH


@pytest.mark.parametrize(
    ("solution", "given", "right"),
    [
        (r"so the answer is $\boxed{\frac{1}{2}}$.", "0.5", True),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", True),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", True),
        (r"\boxed{(3, \frac{\pi}{2})}", r"\left(3, \pi/2\right)", True),
        (r"\boxed{1,2,3}", "3, 2, 1", True),
        (r"\boxed{\text{(E)}}", "E", True),
        (r"\boxed{\text{Friday}}", r"\text{Friday}", True),
        (r"\boxed{10\%}", "10", True),
        (r"\boxed{5}", r"$5\text{ cm}$.", True),
        (r"\boxed{72}", "x = 72", True),
        ("72", r"\boxed{72}", True),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
        (r"\boxed{\frac{1}{2}}", "0.51", False),
        (r"\boxed{11_2}", "11_3", False),
        (r"\boxed{2516_8}", "2516_{8}", True),
        (r"\boxed{2516_8}", "2516", True),
        ("3 + 4 = 7\n#### 7", "7", True),
        (r"\boxed{3}", "3 or 4", False),
        (r"\boxed{3}", "$3$ or $4$", False),
        (r"\boxed{3}", "3, 4", False),
        (r"\boxed{x}", "}{", False),
        (r"\boxed{3}", "9" * 10_000, False),
    ],
)
def test_math_compares_objects(solution, given, right):
    problems = [Problem("", solution)] * 2
    responses = [f"<think>3</think><answer>{given}</answer>", f"<think>3</think>so \\boxed{{{given}}}."]
    if given == "}{":
        del responses[1], problems[1]
    assert math_answers.math_corrects(problems, responses) == [right] * len(problems)
    assert math_answers.math_rewards(problems, responses) == [1.0 if right else 0.1] * len(problems)


def test_math_without_an_answer_earns_nothing():
    responses = ["The answer is 3", "<think>\\boxed{3}</think>3", "<answer> </answer>", "\\boxed{3", ""]
    problems = [Problem("", "\\boxed{3}")] * len(responses)
    assert math_answers.math_rewards(problems, responses) == [0.0] * len(responses)


def test_math_verifies_an_answer_once():
    before = math_answers._is_same.cache_info().misses
    problems, responses = [Problem("", "\\boxed{31}")] * 8, ["\\boxed{30+1}"] * 8
    assert all(math_answers.math_corrects(problems, responses))
    assert math_answers.math_rewards(problems, responses) == [1.0] * 8
    assert math_answers._is_same.cache_info().misses == before + 1


def test_missing_verifier_is_refused_with_the_requirements_file(monkeypatch):
    math_answers.check_requirements()
    monkeypatch.setattr(math_answers, "REQUIREMENTS", ("no_such_library",))
    with pytest.raises(UserError, match=r"no_such_library.*requirements_gsm8k\.txt"):
        math_answers.check_requirements()
