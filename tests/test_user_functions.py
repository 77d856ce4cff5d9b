"""What `reward.fn` names: a user's own functions, the suite's by name, several of them summed."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from expert_iteration.cli import compose_config
from expert_iteration.errors import UserError
from expert_iteration.judging import Judge
from expert_iteration.resolve import resolve_config
from expert_iteration.reward_sum import RewardSum, load_reward
from expert_iteration.rewards import components_of, total
from expert_iteration.scoring import FailedReward
from expert_iteration.tasks import Problem, load_task
from expert_iteration.user_functions import load_reward_fn

ROOT = Path(__file__).parents[1]
PROBLEMS = [Problem("How long?", "#### 1"), Problem("How wide?", "#### 2")]
LENGTH_REWARD = """
from dataclasses import dataclass

@dataclass
class Scale:
    factor: "float" = 1.0

def by_length(problems, responses):
    return [Scale().factor * len(response) for response in responses]

def in_parts(problems, responses):
    return [{"length": len(response), "brevity": (-len(response), 0.5)} for response in responses]

too_few = lambda problems, responses: [1.0]
no_numbers = lambda problems, responses: ["good"] * len(responses)
no_pair = lambda problems, responses: [{"part": (1.0, 2.0, 3.0)}] * len(responses)
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
    assert load_reward_fn(f"{reward_file}:by_length")(PROBLEMS, ["a", "bcd"]) == [1.0, 3.0]


def test_function_from_a_file_reaches_another_process(reward_file, tmp_path):
    loaded = load_reward_fn(f"{reward_file}:by_length")
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
    assert load_reward_fn(f"{tmp_path / 'encoded.py'}:by_length")(PROBLEMS, ["a", "bcd"]) == [1.0, 3.0]


def test_function_from_a_package():
    loaded = load_reward_fn("expert_iteration.rewards:tiny_rewards")
    assert loaded(PROBLEMS, ["<answer>1</answer>", ""]) == [0.9, 0.0]


def test_a_function_may_give_components(reward_file):
    rewards = load_reward_fn(f"{reward_file}:in_parts")(PROBLEMS, ["a", "bcd"])
    assert [total(reward) for reward in rewards] == [0.5, 1.5]
    assert total({"a": (1, 0.7), "b": (1, 0.2), "c": (1, 0.1)}) == 1.0  # in binary a little less
    assert components_of(rewards[1]) == {"length": 3.0, "brevity": -3.0}


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
        load_reward_fn(f"{reward_file}:{name}")


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
        load_reward_fn(spec)


def test_errors_of_the_users_own_module_are_shown_as_they_are(tmp_path):
    (tmp_path / "broken.py").write_text("import a_module_the_user_forgot\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_the_user_forgot"):
        load_reward_fn(f"{tmp_path / 'broken.py'}:f")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "1 rewards for 2 responses"),
        ("no_numbers", "return a list of numbers"),
        ("no_pair", "pairs of number and weight"),
        ("nothing", "return a list of numbers"),
    ],
)
def test_result_of_the_wrong_form_is_refused(reward_file, name, message):
    with pytest.raises(UserError, match=message):
        load_reward_fn(f"{reward_file}:{name}")(PROBLEMS, ["a", "b"])


def test_reward_that_is_not_finite_is_left_to_the_judge(reward_file):
    values = load_reward_fn(f"{reward_file}:not_a_number")(PROBLEMS, ["a", "b"])
    assert all(value != value for value in values)


# Sums


def test_a_sum_has_a_component_for_each_function_and_for_each_of_theirs(reward_file):
    functions = [load_reward_fn(f"{reward_file}:{name}") for name in ("by_length", "in_parts")]
    rewards = RewardSum(["by_length", "in_parts"], functions, [1.0, 10.0])(PROBLEMS, ["a", "bcd"])
    assert components_of(rewards[1]) == {"by_length": 3.0, "in_parts/length": 3.0, "in_parts/brevity": -3.0}
    assert [total(reward) for reward in rewards] == [1.0 + 10 * (1 - 0.5), 3.0 + 10 * (3 - 1.5)]


def test_a_sum_without_one_of_its_parts_is_none():
    failing = lambda problems, responses: [1.0, FailedReward("no answer")]  # noqa: E731
    rewards = RewardSum(["a", "b"], [lambda problems, responses: [1.0, 2.0], failing], [1.0, 1.0])(PROBLEMS, ["", ""])
    assert total(rewards[0]) == 2.0
    assert isinstance(rewards[1], FailedReward)
    assert pickle.loads(pickle.dumps(rewards[1])).reason == "no answer"


def configured(*overrides: str):
    return resolve_config(compose_config("ei_tiny", "sync", overrides), "sync")


def test_the_command_line_sums_with_weights(reward_file, monkeypatch):
    monkeypatch.chdir(reward_file.parent)
    cfg = configured("reward.fn=[tiny,my_reward.py:by_length]", "reward.weights=[1,-0.01]")
    assert cfg.reward.fn == ["tiny", f"{reward_file}:by_length"]
    task = load_task(cfg)
    [judgement] = Judge(task)([Problem("1 + 1", "2")], ["<answer>2</answer>"])
    assert judgement.components == {"tiny": 0.9, "by_length": 18.0}
    assert judgement.reward == pytest.approx(0.9 - 0.18)
    assert judgement.correct  # the task's own, whatever the reward


@pytest.mark.parametrize("fn", ["tiny", "[tiny]", "expert_iteration.rewards:tiny_rewards"])
def test_one_function_may_stand_alone_or_in_a_list(fn):
    reward = load_reward(configured(f"reward.fn={fn}").reward)
    assert [total(value) for value in reward(PROBLEMS, ["<answer>1</answer>", ""])] == [0.9, 0.0]


def test_paths_with_blanks_and_commas_are_quoted(tmp_path):
    path = tmp_path / "my, own rewards.py"
    path.write_text(LENGTH_REWARD)
    for fn in (f"reward.fn='{path}:by_length'", f"reward.fn=['{path}:by_length',tiny]"):
        reward = load_reward(configured(fn).reward)
        assert total(reward(PROBLEMS[:1], ["abcd"])[0]) == 4.0


def test_without_a_function_the_tasks_own_counts():
    assert load_reward(configured().reward) is None
