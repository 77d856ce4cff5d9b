"""What the user sees of a run, and that nothing else gets onto the screen."""

import os
import subprocess
import sys

import pytest

import expert_iteration.screen
from expert_iteration.config import Selection
from expert_iteration.screen import Progress, RemoteScreen, Screen, StepProgress
from expert_iteration.selection_advice import ADVICE, advise


class FakeScreen:
    def __init__(self):
        self.lines, self.bars = [], []

    def say(self, text):
        self.lines.append(text)

    def progress(self, done, **figures):
        self.bars.append((done, figures))


@pytest.fixture
def screen():
    return FakeScreen()


def collected(seen, kept, turns=256, batch_kept=12):
    return {
        "selection/groups_seen": seen,
        "selection/groups_kept": kept,
        "selection/batch_kept": batch_kept,
        "collector/dialog_turns": turns,
    }


# --- Progress: from metrics to the screen ---


@pytest.mark.parametrize(("every", "shown"), [(-1, [1, 2, 3]), (float("inf"), [3])])
def test_where_nothing_is_collected_the_bar_follows_the_steps_to_the_last(screen, monkeypatch, every, shown):
    monkeypatch.setattr(expert_iteration.screen, "SHOW_EVERY", every)
    progress = StepProgress(screen)
    progress.log_metrics({"timeit/training": 0.1}, step=0)
    for step in (1, 2, 3):
        progress.log_metrics({"train/loss": step / 8}, step=step)
    for _ in range(2):
        progress.close()
    assert screen.bars == [(step, {"loss": f"{step / 8:.3f}"}) for step in shown]


def test_the_bar_follows_the_batches_with_reward_and_kept_responses(screen):
    progress = Progress(screen)
    # The data logger's record of a batch comes first, selection's after it.
    progress.log_metrics({"collector/rewards/mean": 0.12345}, step=0)
    assert screen.bars == []
    progress.log_metrics(collected(32, 30), step=0)
    progress.log_metrics({"train/loss": 1.0, "optim_step": 3.0}, step=1)
    progress.log_metrics({"collector/rewards/mean": 0.5}, step=4)
    progress.log_metrics(collected(64, 60, turns=512, batch_kept=64), step=4)
    assert screen.bars == [
        (256, {"reward": "0.123", "kept": "12", "steps": "0"}),
        (512, {"reward": "0.500", "kept": "64", "steps": "3"}),
    ]


def test_the_bar_shows_training_that_goes_on_without_a_batch_now_and_then(screen, monkeypatch):
    progress = Progress(screen)
    progress.log_metrics({"optim_step": 1.0}, step=1)
    assert screen.bars == []  # nothing is collected yet
    progress.log_metrics(collected(32, 30), step=1)
    progress.log_metrics({"optim_step": 2.0}, step=2)  # shown a moment ago
    monkeypatch.setattr(expert_iteration.screen, "SHOW_EVERY", 0.0)
    progress.log_metrics({"optim_step": 3.0}, step=3)
    assert [figures["steps"] for _, figures in screen.bars] == ["1", "3"]


def test_evaluations_are_said(screen):
    figures = {"eval/pass@1": 0.3275, "eval/pass@1_stderr": 0.0214, "eval/greedy": 0.44, "eval/reward": 0.5}
    Progress(screen).log_metrics(figures, step=16)
    assert screen.lines == ["evaluation after 16 gradient steps: pass@1 0.328 ± 0.021, greedy 0.440, reward 0.500"]


def warnings(screen, *counts):
    progress = Progress(screen)
    progress.log_metrics({"collector/rewards/mean": 0.5}, step=0)
    for seen, kept in counts:
        progress.log_metrics(collected(seen, kept), step=0)
    return screen.lines


def test_dropping_more_than_half_of_the_groups_is_said_once_with_the_remedies(screen):
    (line,) = warnings(screen, (32, 20), (64, 31), (96, 31))
    assert line.startswith("note: 33 of 64 groups")
    for remedy in ("finer reward", "env.repeats", "prompts"):
        assert remedy in line


@pytest.mark.parametrize(
    ("rule", "remedy", "other"),
    [
        ("above_median", "train.selection=topk or threshold", "train.selection_threshold"),
        ("topk", "train.selection=threshold", "train.selection=topk"),
        ("threshold", "a lower train.selection_threshold", "env.repeats"),
        ("percentile", "a lower train.selection_percentile", "env.repeats"),
        ("random", "as above_median", "train.selection=topk"),
        (None, "env.repeats", "train.selection="),
    ],
)
def test_what_to_do_about_dropped_groups_depends_on_the_rule(screen, rule, remedy, other):
    for least, is_said in ((None, False), (0.5, True)):
        progress = Progress(screen, advise(rule, least))
        progress.log_metrics({"collector/rewards/mean": 0.5} | collected(64, 31), step=0)
        line = screen.lines.pop()
        assert remedy in line
        assert other not in line
        assert ("a lower train.min_reward (now 0.5)" in line) == is_said


def test_there_is_advice_for_every_rule():
    assert set(ADVICE) == set(Selection)


def test_dropping_half_of_the_groups_is_not_worth_a_word(screen):
    assert warnings(screen, (32, 16), (64, 32)) == []


# --- Screen: the terminal and run.log ---


def test_what_the_screen_says_is_in_the_log_at_once(tmp_path, capsys):
    terminal = Screen(512, tmp_path / "run.log")
    terminal.say("waiting for the engine")
    assert (tmp_path / "run.log").read_text() == "waiting for the engine\n"
    terminal.progress(256, {"reward": "0.123", "kept": "12"})
    terminal.close()
    assert (tmp_path / "run.log").read_text().splitlines()[1:] == ["256 turns, reward 0.123, kept 12"]
    assert "waiting for the engine" in capsys.readouterr().out


def test_without_a_length_there_is_no_bar(tmp_path, capsys):
    terminal = Screen(0, tmp_path / "run.log")
    terminal.say("waiting for the engine")
    terminal.close()
    assert capsys.readouterr() == ("waiting for the engine\n", "")


def test_messages_of_the_training_process_reach_the_screen(tmp_path):
    class Wire:
        """A queue of any process."""

        def __init__(self):
            self.messages = []

        def put(self, message):
            self.messages.append(message)

    wire = Wire()
    remote, terminal = RemoteScreen(wire), Screen(512, tmp_path / "run.log")
    remote.say("hello")
    remote.progress(128, reward="0.5")
    for message in wire.messages:
        terminal.handle(message)
    terminal.close()
    assert (tmp_path / "run.log").read_text().splitlines() == ["hello", "128 turns, reward 0.5"]


# --- redirect_output ---

CHATTER = """
import os, subprocess, sys
from expert_iteration.screen import redirect_output
print("before")
redirect_output({path!r})
print("printed")
print("complained", file=sys.stderr)
os.write(1, b"native out\\n")
os.write(2, b"native err\\n")
subprocess.run(["sh", "-c", "echo child out; echo child err >&2"], check=True)
print("seen at once:", "printed" in open({path!r}).read())
print("no line end", end="")
raise ValueError("last words")
"""


def test_a_redirected_process_shows_nothing_and_logs_all(tmp_path):
    log = tmp_path / "logs" / "deep" / "engine.log"
    result = subprocess.run(
        [sys.executable, "-c", CHATTER.format(path=str(log))],
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout, result.stderr) == ("before\n", "")
    text = log.read_text()
    for words in ("printed", "complained", "native out", "native err", "child out", "child err", "no line end"):
        assert text.count(words) == 1, words
    assert "seen at once: True" in text
    assert "ValueError: last words" in text
    assert "before" not in text


def test_two_processes_append_to_one_log(tmp_path):
    code = "from expert_iteration.screen import redirect_output; redirect_output({!r}); print('here')"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code.format(str(tmp_path / "a.log"))], check=True)
    assert (tmp_path / "a.log").read_text() == "here\nhere\n"
