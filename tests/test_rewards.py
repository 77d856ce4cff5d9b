"""`expert_iteration.rewards` and `ifeval`: the tables of each reward, TorchRL's values, and a user's own function."""

import logging
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest

from expert_iteration import ifeval, rewards
from expert_iteration.errors import UserError
from expert_iteration.tasks import Problem

ROOT = Path(__file__).parents[1]


def answered(text: str) -> str:
    return f"<think>so</think><answer>{text}</answer>"


# GSM8K

GSM8K_TABLE = [
    (answered("72"), "48+24 = <<48+24=72>>72\n#### 72", 1.0),
    (answered(" 72\n"), "#### 72", 1.0),
    ("<answer>72</answer>", "#### 72", 1.0),
    (answered("1,234"), "#### 1234", 1.0),
    (answered("1234"), "#### 1,234", 1.0),
    (answered("$18.00"), "#### 18", 1.0),
    (answered("18."), "#### 18", 1.0),
    (answered("-3"), "#### -3", 1.0),
    (answered("7"), "#### 72", 0.1),
    (answered("72 clips"), "#### 72", 0.1),
    (answered("5") + answered("72"), "#### 72", 0.1),
    (answered(""), "#### 72", 0.0),
    (answered("  "), "#### 72", 0.0),
    ("<think>72</think>72", "#### 72", 0.0),
    ("<answer>72", "#### 72", 0.0),
    ("", "#### 72", 0.0),
]


@pytest.mark.parametrize(("response", "answer", "expected"), GSM8K_TABLE)
def test_gsm8k_reward(response, answer, expected):
    assert rewards.gsm8k_reward(response, answer) == expected
    assert rewards.gsm8k_correct(response, answer) == (expected == 1.0)


def test_gsm8k_reward_has_torchrls_values():
    from torchrl.envs.llm.reward.gsm8k import GSM8KRewardParser

    parser = GSM8KRewardParser()
    for response, answer, expected in GSM8K_TABLE:
        thought, given = parser.extract_tags(response)
        scored = parser._single_correctness_reward(answer.split("#### ")[1], given, thought)
        assert scored["reward"] == pytest.approx(expected)


@pytest.mark.parametrize("answer", ["72", "72.0", "so\n#### 72"])
def test_ground_truth_may_be_bare(answer):
    assert rewards.gsm8k_reward(answered("72"), answer) == 1.0


def test_gsm8k_compares_as_numbers_where_torchrl_compares_text():
    assert rewards.gsm8k_correct(answered("072.50"), "#### 72.5")


@pytest.mark.parametrize("given", ["NaN", "sNaN", "Infinity", "1e2", "9" * 5000, "yes"])
def test_odd_answers_are_wrong_and_raise_nothing(given):
    assert rewards.gsm8k_reward(answered(given), "#### 72") == 0.1
    assert rewards.tiny_correct(answered(given), "#### 72") is False


# Tiny


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>2+4=6, 6-3=3</think><answer>3</answer>", 1.0),
        ("<think>2+4=6, 6-3=3</think><answer>3</answer><|im_end|>", 1.0),
        ("<think>nonsense</think><answer> 3 </answer>", 1.0),
        ("<answer>3</answer>", 0.9),
        ("<think> </think><answer>3</answer>", 0.9),
        ("<think>2+4=6</think><answer>6</answer>", 0.2),
        ("<think>2+4=6</think><answer>4</answer>", 0.2),
        ("<think>2+4=6, 6-3=3</think>3", 0.1),
        ("<think>2+4=6</think><answer>three</answer>", 0.1),
        ("<think>2+4=6</think><answer>3.0</answer>", 0.1),
        ("<answer>6</answer>", 0.1),
        ("<answer></answer>", 0.0),
        ("<think>2+4=6, 6-3=3", 0.0),
        ("3", 0.0),
        ("", 0.0),
    ],
)
def test_tiny_reward(response, expected):
    assert rewards.tiny_reward(response, "2+4=6, 6-3=3\n#### 3") == pytest.approx(expected)
    assert rewards.tiny_correct(response, "#### 3") == (expected >= 0.9)


# Form


@pytest.mark.parametrize(
    ("response", "has_both", "has_answer"),
    [
        ("<think>2+4=6</think><answer>6</answer>", True, True),
        ("<think>2+4=6</think> so <answer>six</answer>.", True, True),
        ("<answer>6</answer>", False, True),
        ("<think>2+4=6</think>6", False, False),
        ("<think>2+4=6<answer>6</answer>", False, True),
        ("<think>2+4=6</think><answer>6", False, False),
        ("<think> </think><answer>6</answer>", False, True),
        ("<think>2+4=6</think><answer>\n</answer>", False, False),
        ("", False, False),
    ],
)
def test_form_is_what_the_system_prompt_asks_for_right_or_wrong(response, has_both, has_answer):
    assert rewards.has_thought_and_answer(response) is has_both
    assert rewards.has_answer(response) is has_answer


def test_batched_functions_keep_the_order_and_refuse_unequal_lengths():
    problems = [Problem("", "#### 1"), Problem("", "#### 2")]
    assert rewards.tiny_rewards(problems, ["<answer>1</answer>", "<answer>1</answer>"]) == [0.9, 0.1]
    assert rewards.gsm8k_corrects(problems, ["<answer>1</answer>", "<answer>2</answer>"]) == [True, True]
    with pytest.raises(ValueError, match="zip"):
        rewards.gsm8k_rewards(problems, ["<answer>1</answer>"])


# IFEval


def ifeval_problem(*instructions: tuple[str, dict]) -> Problem:
    names, kwargs = zip(*instructions, strict=True)
    return Problem("Write.", "", {"key": 1, "instruction_id_list": list(names), "kwargs": list(kwargs)})


NO_COMMA = ("punctuation:no_comma", {})
THREE_SENTENCES = ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 3})
TWO_CAPITALS = ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 2})


@pytest.mark.parametrize(
    ("problem", "response", "reward", "correct"),
    [
        (ifeval_problem(NO_COMMA), answered("No comma here."), 1.15, True),
        (ifeval_problem(NO_COMMA), "<answer>No comma here.</answer>", 1.1, True),
        (ifeval_problem(NO_COMMA), answered("One, two."), 0.15, False),
        (ifeval_problem(NO_COMMA), "No comma here.", 0.0, False),
        # Half of the instructions followed: 0.3 / 2 + 0.1 / 2 of the two shares, and the tags.
        (ifeval_problem(NO_COMMA, THREE_SENTENCES), answered("One. Two."), 0.35, False),
        (ifeval_problem(THREE_SENTENCES), answered("I met Dr. No. Who? Him!"), 1.15, True),
        (ifeval_problem(THREE_SENTENCES), answered("I met Dr. No. Who?"), 0.15, False),
        (ifeval_problem(TWO_CAPITALS), answered("LOOK here. STOP. Now."), 1.15, True),
        (ifeval_problem(TWO_CAPITALS), answered("LOOK here. Stop. Now."), 0.15, False),
    ],
)
def test_ifeval_reward_and_pass(problem, response, reward, correct):
    assert ifeval.ifeval_rewards([problem], [response]) == [pytest.approx(reward)]
    assert ifeval.ifeval_corrects([problem], [response]) == [correct]


def test_argument_that_torchrl_replaces_by_a_drawn_one_gives_the_same_score_each_time():
    no_letter = ("keywords:letter_frequency", {"letter": "#", "let_relation": "at least", "let_frequency": 1})
    problems, responses = [ifeval_problem(no_letter)] * 50, [answered("acegikmoqsuwy")] * 50
    state = random.getstate()
    # Half of the alphabet is there: fifty draws that agree by chance would be one in 2^49.
    assert len(set(ifeval.ifeval_rewards(problems, responses))) == 1
    assert random.getstate() == state


def test_missing_punkt_is_said_once_a_process(caplog):
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        ifeval._scorer.cache_clear()
        with caplog.at_level(logging.WARNING):
            ifeval.ifeval_rewards([ifeval_problem(THREE_SENTENCES)] * 3, [answered("One.")] * 3)
        assert sum("punkt_tab" in record.message for record in caplog.records) == 1
    else:
        pytest.skip("punkt_tab is installed")


def test_missing_ifeval_library_is_refused_with_the_requirements_file(monkeypatch):
    monkeypatch.setattr(ifeval, "REQUIREMENTS", ("nltk", "no_such_library"))
    with pytest.raises(UserError, match=r"no_such_library.*requirements_ifeval\.txt"):
        ifeval.check_requirements()


# A user's function

PROBLEMS = [Problem("How long?", "#### 1"), Problem("How wide?", "#### 2")]
LENGTH_REWARD = """
from dataclasses import dataclass

@dataclass
class Scale:
    factor: "float" = 1.0

def by_length(problems, responses):
    return [Scale().factor * len(response) for response in responses]

too_few = lambda problems, responses: [1.0]
no_numbers = lambda problems, responses: ["good"] * len(responses)
nothing = lambda problems, responses: None
not_a_number = lambda problems, responses: [float("nan")] * len(responses)
number = 3
"""


@pytest.fixture
def reward_file(tmp_path) -> Path:
    path = tmp_path / "my_reward.py"
    path.write_text(LENGTH_REWARD)
    return path


def test_function_from_a_file(reward_file):
    assert rewards.load_reward_fn(f"{reward_file}:by_length")(PROBLEMS, ["a", "bcd"]) == [1.0, 3.0]


def test_function_from_a_file_reaches_another_process(reward_file, tmp_path):
    loaded = rewards.load_reward_fn(f"{reward_file}:by_length")
    (tmp_path / "pickled").write_bytes(pickle.dumps(loaded))
    reward_file.unlink()  # as on another host
    code = (
        "import pickle, sys, pathlib\n"
        "loaded = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "assert loaded([None], ['abcd']) == [4.0]"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "pickled")], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "source", [b"\xef\xbb\xbf" + LENGTH_REWARD.encode(), b"# coding: latin-1\n# \xe9\n" + LENGTH_REWARD.encode()]
)
def test_a_file_may_be_encoded_as_python_allows(tmp_path, source):
    (tmp_path / "encoded.py").write_bytes(source)
    assert rewards.load_reward_fn(f"{tmp_path / 'encoded.py'}:by_length")(PROBLEMS, ["a", "bcd"]) == [1.0, 3.0]


def test_function_from_a_package():
    loaded = rewards.load_reward_fn("expert_iteration.rewards:tiny_rewards")
    assert loaded(PROBLEMS, ["<answer>1</answer>", ""]) == [0.9, 0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "defines no 'missing'"),
        ("number", "'number' is of type int"),
        ("", "names no function"),
    ],
)
def test_file_without_such_a_function_is_refused(reward_file, name, message):
    with pytest.raises(UserError, match=message):
        rewards.load_reward_fn(f"{reward_file}:{name}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no/such/file.py:f", "there is no file"),
        ("no_such_package.rewards:f", "no module 'no_such_package'"),
        ("expert_iteration.no_such_module:f", "no module 'expert_iteration.no_such_module'"),
        ("by_length", "names no function"),
    ],
)
def test_place_that_does_not_exist_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        rewards.load_reward_fn(spec)


def test_errors_of_the_users_own_module_are_shown_as_they_are(tmp_path):
    (tmp_path / "broken.py").write_text("import a_module_the_user_forgot\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_the_user_forgot"):
        rewards.load_reward_fn(f"{tmp_path / 'broken.py'}:f")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "1 rewards for 2 responses"),
        ("no_numbers", "return a list of numbers"),
        ("nothing", "return a list of numbers"),
    ],
)
def test_result_of_the_wrong_form_is_refused(reward_file, name, message):
    with pytest.raises(UserError, match=message):
        rewards.load_reward_fn(f"{reward_file}:{name}")(PROBLEMS, ["a", "b"])


def test_reward_that_is_not_finite_is_left_to_selection(reward_file):
    values = rewards.load_reward_fn(f"{reward_file}:not_a_number")(PROBLEMS, ["a", "b"])
    assert all(value != value for value in values)
