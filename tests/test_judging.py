"""`Judge`: failures cost responses, never the run; processes with a time limit, and how they end."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from expert_iteration.errors import UserError
from expert_iteration.judging import MAX_FAILED_PROMPTS, Judge
from expert_iteration.reward_registry import load_built_in
from expert_iteration.reward_sum import RewardSum
from expert_iteration.scoring import FailedReward
from expert_iteration.tasks import Problem, Task
from expert_iteration.user_functions import load_reward_fn

ROOT = Path(__file__).parents[1]
# In a file, as a user's, so that it travels.
FUNCTIONS = """
import os, sys, time

def by_word(problems, responses):
    return [one(response) for response in responses]

def one(response):
    if response == "raise":
        raise ZeroDivisionError("by a response")
    if response == "infinite":
        return float("inf")
    if response == "hang":
        while True:
            pass
    if response == "leave":
        sys.exit(4)
    if response == "none":
        return None
    if response == "too much":
        return 1e39
    if response == "exit":
        os._exit(3)
    if response == "sleep":
        time.sleep(0.2)
    return float(len(response))

def in_parts(problems, responses):
    return [{"length": one(response), "half": (one(response), -0.5)} for response in responses]

def one_by_one(problems, responses):
    for response in responses:
        yield one(response)

def wrong_form(problems, responses):
    return ["good"] * len(responses)

def is_right(problems, responses):
    return [one(response) == float(problem.answer) for problem, response in zip(problems, responses, strict=True)]

def loaded_modules(problems, responses):
    return [float("torch" in sys.modules or "ray" in sys.modules)] * len(responses)

def has_verifier(problems, responses):
    return [float("math_verify" in sys.modules)] * len(responses)

def main_module(problems, responses):
    return [float(sys.modules["__main__"].__spec__.name == "expert_iteration.judging_worker")] * len(responses)
"""


@pytest.fixture
def functions(tmp_path) -> Path:
    path = tmp_path / "functions.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture
def make_judge(functions):
    judges = []

    def make(reward: str = "by_word", correct: str | None = None, **kwargs) -> Judge:
        found = None if correct is None else load_reward_fn(f"{functions}:{correct}")
        task = Task("test", None, [], [], load_reward_fn(f"{functions}:{reward}"), found, bool)
        judges.append(Judge(task, **kwargs))
        return judges[-1]

    yield make
    for judge in judges:
        judge.close()


def judge_all(judge: Judge, *responses: str, answer: str = "1"):
    """Each to a prompt of its own."""
    return judge([Problem(f"{place}?", answer) for place in range(len(responses))], responses)


def is_kept(judgements) -> list[bool]:
    return [math.isfinite(judgement.reward) for judgement in judgements]


HERE = {"workers": 0}
POOL = {"workers": 2, "timeout": 60.0}
IMPATIENT = {"workers": 2, "timeout": 1.0}


@pytest.mark.parametrize("where", [HERE, POOL], ids=["here", "pool"])
def test_a_failure_costs_its_response_only(make_judge, where):
    judge = make_judge(**where)
    judgements = judge_all(judge, "a", "raise", "abc", "infinite", "ab")
    assert is_kept(judgements) == [True, False, True, False, True]
    assert [judgement.reward for judgement in judgements if judgement.correct] == [1.0, 3.0, 2.0]
    assert judge.take_statistics() == {"reward_failures": 2}
    assert judge.take_statistics() == {"reward_failures": 0}


@pytest.mark.parametrize("where", [HERE, POOL], ids=["here", "pool"])
def test_the_first_failure_is_shown_once_with_its_traceback(make_judge, where, caplog):
    judge = make_judge(**where, where="in evaluation")
    judge_all(judge, "infinite", "a", "raise")
    judge_all(judge, "raise")
    [note] = judge.take_notes()
    assert "a response in evaluation was left out" in note
    assert "The reward is inf" in note
    assert [record.getMessage() for record in caplog.records if record.name.endswith("judging")] == [note]
    assert judge.take_notes() == []
    other = make_judge(**where)
    judge_all(other, "a", "raise")
    [note] = other.take_notes()
    assert "functions.py" in note
    assert "ZeroDivisionError: by a response" in note


@pytest.mark.parametrize("where", [HERE, POOL], ids=["here", "pool"])
def test_five_failed_prompts_in_a_row_end_the_run_with_the_last_traceback(make_judge, where):
    judge = make_judge(**where)
    judge_all(judge, *["raise"] * (MAX_FAILED_PROMPTS - 1), "a", "infinite", "raise", "raise")
    with pytest.raises(UserError, match=r"(?s)Of 5 prompts in a row.*ZeroDivisionError: by a response"):
        judge_all(judge, "infinite", "raise", *["a"] * 100)  # the row goes on from batch to batch


def test_failures_of_one_prompt_count_once(make_judge):
    """A row that no response can be judged for, or a group of like responses, ends no run."""
    judge = make_judge()
    problems = [Problem(f"{place // 8}?", "1") for place in range(32)]
    assert len(problems) > MAX_FAILED_PROMPTS
    assert is_kept(judge(problems, ["raise"] * 32)) == [False] * 32
    assert judge.take_statistics() == {"reward_failures": 32}
    with pytest.raises(UserError, match=f"Of {MAX_FAILED_PROMPTS} prompts in a row"):
        judge([Problem("another?", "1")], ["raise"])


@pytest.mark.parametrize("where", [HERE, POOL], ids=["here", "pool"])
def test_what_else_is_a_failure_of_one_response(make_judge, where):
    judge = make_judge(**where)
    assert is_kept(judge_all(judge, "leave", "a", "none", "too much", "ab")) == [False, True, False, False, True]
    for response, reason in (("leave", "SystemExit: 4"), ("none", "gave None"), ("too much", "float32")):
        judge = make_judge(**where)
        judge_all(judge, response)
        assert reason in judge.take_notes()[0]


def test_what_a_generator_raises_is_a_failure_and_no_wrong_form(make_judge):
    judge = make_judge("one_by_one")
    assert is_kept(judge_all(judge, "a", "raise", "ab")) == [True, False, True]
    assert "ZeroDivisionError: by a response" in judge.take_notes()[0]


def test_only_the_function_that_raised_is_asked_again(functions):
    """One of a sum that asks a server about the whole batch is not asked once more, nor response by response."""
    sizes = []

    def served(problems, responses):
        sizes.append(len(responses))
        return [1.0] * len(responses)

    reward = RewardSum(["served", "by_word"], [served, load_reward_fn(f"{functions}:by_word")], [1.0, 1.0])
    correct = lambda problems, responses: [served([], [response]) == [1.0] for response in responses]  # noqa: E731
    judge = Judge(Task("test", None, [], [], reward, correct, bool))
    judgements = judge_all(judge, "a", "raise", "ab")
    assert is_kept(judgements) == [True, False, True]
    assert judgements[2].components == {"served": 1.0, "by_word": 2.0}
    assert [judgement.correct for judgement in judgements] == [True] * 3
    assert sizes == [3, 1, 1, 1]  # the last three by `correct`


def test_what_is_right_fails_like_the_reward(make_judge):
    judge = make_judge("in_parts", "is_right")
    judgements = judge_all(judge, "a", "ab", "raise")
    assert [judgement.correct for judgement in judgements] == [True, False, False]
    assert judge.take_statistics() == {"reward/length": 1.5, "reward/half": 1.5, "reward_failures": 1}
    only_right_fails = make_judge("loaded_modules", "is_right")
    assert [judgement.correct for judgement in judge_all(only_right_fails, "raise", "a")] == [False, True]
    assert only_right_fails.take_statistics() == {"reward_failures": 1}
    assert "ZeroDivisionError" in only_right_fails.take_notes()[0]


@pytest.mark.parametrize("where", [HERE, POOL], ids=["here", "pool"])
def test_a_result_of_the_wrong_form_ends_the_run_at_once(make_judge, where):
    with pytest.raises(UserError, match="return a list of numbers"):
        judge_all(make_judge("wrong_form", **where), "a")


def test_a_reward_function_may_say_itself_which_response_failed():
    task = Task("test", None, [], [], lambda problems, responses: [FailedReward("no answer came"), 2.0], None, bool)
    judge = Judge(task)
    assert is_kept(judge_all(judge, "a", "b")) == [False, True]
    assert "no answer came" in judge.take_notes()[0]


def test_a_threshold_decides_what_is_right_in_place_of_the_task(make_judge):
    judge = make_judge("by_word", "is_right", pass_threshold=2.0)
    assert [judgement.correct for judgement in judge_all(judge, "a", "ab", "raise")] == [False, True, False]


# The pool


def test_a_pool_judges_as_this_process_does_and_in_order(make_judge):
    responses = ["sleep", "a", "abc", "sleep", "ab", ""]  # so that later ones are ready before earlier ones
    assert judge_all(make_judge("in_parts", "is_right", **POOL), *responses) == judge_all(
        make_judge("in_parts", "is_right"), *responses
    )


def test_what_hangs_or_dies_is_replaced(make_judge):
    judge = make_judge(**IMPATIENT)
    judgements = judge_all(judge, "hang", "a", "exit", "ab", "hang", "abc")
    assert is_kept(judgements) == [False, True] * 3
    assert is_kept(judge_all(judge, "a", "ab", "abc", "abcd")) == [True] * 4
    assert judge.take_statistics()["reward_failures"] == 3
    assert "within 1 s (reward.timeout)" in judge.take_notes()[0]


def test_a_process_that_ended_is_named_with_its_exit_code(make_judge):
    judge = make_judge(**POOL)
    judge_all(judge, "exit")
    assert "has ended (exit code 3)" in judge.take_notes()[0]


def test_workers_are_plain_interpreters(make_judge):
    """They load neither torch nor the parent's main module again, which under Ray is Ray's."""
    assert judge_all(make_judge("loaded_modules", **POOL), "a")[0].reward == 0.0
    assert judge_all(make_judge("main_module", **POOL), "a")[0].reward == 1.0


def test_workers_import_before_the_first_response_counts(functions):
    """What `math` imports when it is called takes no time from the response that it is called for."""
    has_verifier = load_reward_fn(f"{functions}:has_verifier")  # asked first
    reward = RewardSum(["imported", "math"], [has_verifier, load_built_in("math")], [1.0, 1.0])
    judge = Judge(Task("test", None, [], [], reward, None, bool), workers=1)  # without a limit of time
    [judgement] = judge_all(judge, "<answer>1</answer>")
    judge.close()
    assert judgement.components == {"imported": 1.0, "math": 1.0}


def test_functions_that_load_here_only_are_refused(make_judge, functions):
    broken = make_judge(**POOL)
    broken._pool._scorer.reward._source = b"import a_module_that_is_only_here"
    with pytest.raises(UserError, match=r"(?s)reward\.workers.*a_module_that_is_only_here"):
        judge_all(broken, "a")


def children() -> list[psutil.Process]:
    return [
        child for child in psutil.Process().children() if "expert_iteration.judging_worker" in " ".join(child.cmdline())
    ]


def wait_until(holds, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def test_workers_start_with_the_first_response_and_end_with_close(make_judge):
    judge = make_judge(**POOL)
    assert children() == []
    judge_all(judge, "sleep", "sleep")
    assert len(children()) == 2
    judge.close()
    assert wait_until(lambda: children() == [])


def test_the_fifth_failure_does_not_wait_for_the_rest(make_judge):
    judge = make_judge(**IMPATIENT)
    with pytest.raises(UserError, match="in a row"):
        judge_all(judge, *["hang"] * 1000)
    assert wait_until(lambda: children() == [])
    # Threads that went on, for 500 s, would keep this process from exiting.
    assert wait_until(lambda: not any(thread.name.startswith("judging") for thread in threading.enumerate()))


PARENT = """
import sys
from expert_iteration.judging import Judge
from expert_iteration.tasks import Problem, Task
from expert_iteration.user_functions import load_reward_fn

judge = Judge(Task("test", None, [], [], load_reward_fn(sys.argv[1] + ":by_word"), None, bool), workers=2, timeout=600)
judge([Problem("q", "a")] * 2, ["sleep", "sleep"])
print("ready", flush=True)
judge([Problem("q", "a")] * 2, ["hang", "a"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker that hangs outlives its parent")
def test_no_worker_outlives_a_parent_that_is_killed(functions):
    """Neither the one that waits for work nor the one in a function that never returns."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(functions)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline() == "ready\n"
    workers = psutil.Process(parent.pid).children()
    assert len(workers) == 2
    assert wait_until(lambda: max(worker.cpu_times().user for worker in workers) > 0.2)  # one hangs
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert wait_until(lambda: not any(is_running(worker) for worker in workers))


def test_ctrl_c_is_not_for_workers(make_judge):
    judge = make_judge(**POOL)
    judge_all(judge, "sleep", "sleep")
    assert {os.getpgid(child.pid) for child in children()}.isdisjoint({os.getpgid(0)})


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
