"""`expert_iteration.rewards` and `reward_registry`: the tables of each reward, and TorchRL's values."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_iteration import reward_registry, rewards
from expert_iteration.errors import UserError
from expert_iteration.tasks import Problem


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
    (answered("3 or 72"), "#### 72", 0.1),
    (answered("5") + answered("72"), "#### 72", 0.1),
    (answered(""), "#### 72", 0.0),
    (answered("  "), "#### 72", 0.0),
    ("<think>72</think>72", "#### 72", 0.0),
    ("<answer>72", "#### 72", 0.0),
    ("", "#### 72", 0.0),
]


# Where TorchRL compares text, or looks at a thought: its value is the last column.
GSM8K_DIFFERENCES = [
    (answered("72 clips"), "#### 72", 1.0, 0.1),
    (answered("072"), "#### 72", 1.0, 0.1),
    (answered("144/2"), "#### 72", 1.0, 0.1),
    (answered(r"\boxed{72}"), "#### 72", 1.0, 0.1),
    (answered("70 + 2 = 72"), "#### 72", 1.0, 0.1),
    (answered("\u22123"), "#### -3", 1.0, 0.1),
    (answered("7,2"), "#### 72", 0.1, 1.0),
    ("<think><answer>5</answer></think><answer>72</answer>", "#### 72", 1.0, 0.1),
    ("<think><answer>72</answer></think>", "#### 72", 0.0, 1.0),
]


def torchrls_reward(response: str, answer: str) -> float:
    from torchrl.envs.llm.reward.gsm8k import GSM8KRewardParser

    parser = GSM8KRewardParser()
    thought, stated = parser.extract_tags(response)
    return parser._single_correctness_reward(answer.split("#### ")[1], stated, thought)["reward"].item()


@pytest.mark.parametrize(("response", "answer", "expected"), GSM8K_TABLE)
def test_gsm8k_reward_has_torchrls_values(response, answer, expected):
    assert rewards.gsm8k_reward(response, answer) == expected
    assert rewards.gsm8k_correct(response, answer, "answer_tag") == (expected == 1.0)
    assert torchrls_reward(response, answer) == pytest.approx(expected)


@pytest.mark.parametrize(("response", "answer", "expected", "torchrls"), GSM8K_DIFFERENCES)
def test_gsm8k_reward_differs_from_torchrls_where_it_should(response, answer, expected, torchrls):
    assert rewards.gsm8k_reward(response, answer) == expected
    assert torchrls_reward(response, answer) == pytest.approx(torchrls)


@pytest.mark.parametrize("answer", ["72", "72.0", "so\n#### 72"])
def test_ground_truth_may_be_bare(answer):
    assert rewards.gsm8k_reward(answered("72"), answer) == 1.0


def test_pass_is_looked_for_where_the_mode_says_and_the_reward_in_the_tag():
    problems, responses = [Problem("", "#### 72")] * 2, ["so \\boxed{72}", answered("72")]
    assert rewards.gsm8k_corrects(problems, responses) == [True, True]
    assert rewards.gsm8k_corrects(problems, responses, "answer_tag") == [False, True]
    assert rewards.gsm8k_corrects(problems, responses, "boxed") == [True, False]
    assert rewards.gsm8k_rewards(problems, responses) == [0.0, 1.0]
    with pytest.raises(UserError, match="answer_mode=tag is unknown"):
        rewards.gsm8k_correct("72", "72", "tag")


@pytest.mark.parametrize("stated", ["NaN", "sNaN", "Infinity", "1e2", "9" * 5000, "yes"])
def test_odd_answers_are_wrong_and_raise_nothing(stated):
    assert rewards.gsm8k_reward(answered(stated), "#### 72") == 0.1
    assert rewards.tiny_correct(answered(stated), "#### 72") is False


@pytest.mark.parametrize(
    ("response", "parts", "total"),
    [
        (answered("72"), {"answer": 1.0, "format": 1.0}, 1.2),
        ("<answer>72</answer>", {"answer": 1.0, "format": 0.5}, 1.1),
        ("<think>so</think>72", {"answer": 1.0, "format": 0.5}, 1.1),
        ("it is 72", {"answer": 1.0, "format": 0.0}, 1.0),
        (answered("5"), {"answer": 0.0, "format": 1.0}, 0.2),
        (answered("5 or 72"), {"answer": 0.0, "format": 0.5}, 0.1),
        ("", {"answer": 0.0, "format": 0.0}, 0.0),
    ],
)
def test_gsm8k_granular_is_the_sum_of_its_parts(response, parts, total):
    (reward,) = rewards.gsm8k_granular_rewards([Problem("", "#### 72")], [response])
    assert rewards.components_of(reward) == parts
    assert rewards.total(reward) == pytest.approx(total)


def test_brevity_tells_right_answers_apart_and_no_wrong_ones():
    responses = [f"<think>{'so ' * count}</think><answer>{value}</answer>" for value in (72, 5) for count in (9, 90)]
    scored = rewards.gsm8k_granular_brief_rewards([Problem("", "#### 72")] * 4, responses)
    short, long, wrong, wrong_long = map(rewards.total, scored)
    assert short > long > 1.2
    assert wrong == wrong_long == pytest.approx(0.2)


FORMS = ("{}", "<answer>{}</answer>", "<think>so</think>{}", "<think>so</think><answer>{}</answer>", "#### {}", "{}!")
FORMS += ("<think>{0}</think>", "<think>{0}</think><answer></answer>", "<answer>{0} or 7</answer>", "\\boxed{{{}}}", "")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(FORMS), st.sampled_from(["72", "$72.00", "71", "0"]), st.text(max_size=50))),
    st.sampled_from([rewards.gsm8k_granular_rewards, rewards.gsm8k_granular_brief_rewards]),
)
def test_no_wrong_answer_earns_as_much_as_a_right_one(drawn, reward):
    responses = [text + form.format(value) for form, value, text in drawn]
    problems = [Problem("", "#### 72")] * len(responses)
    totals = [rewards.total(scored) for scored in reward(problems, responses)]
    right = rewards.gsm8k_corrects(problems, responses)
    assert all(value >= 1 for value, correct in zip(totals, right, strict=True) if correct)
    assert all(value <= 0.2 for value, correct in zip(totals, right, strict=True) if not correct)


# The registry


@pytest.mark.parametrize("name", reward_registry.REWARDS)
def test_built_in_rewards_are_found_by_name_and_travel(name):
    reward = pickle.loads(pickle.dumps(reward_registry.load_built_in(name)))
    assert list(reward([], [])) == []


def test_unknown_built_in_reward_is_refused():
    with pytest.raises(UserError, match=r"reward\.fn=gsm9k is unknown.*gsm8k_granular.*module:function"):
        reward_registry.load_built_in("gsm9k")


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
