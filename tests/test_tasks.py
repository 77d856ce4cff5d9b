"""`expert_iteration.tasks` and what it is made of: which rows become problems, which are held out, who judges."""

import datetime
import json
import random
import re
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from expert_iteration import hub_data, rewards, tasks, tiny
from expert_iteration.config import AnswerMode, Dataset
from expert_iteration.errors import UserError
from expert_iteration.prompt_limit import PromptLimit

ROOT = Path(__file__).parents[1]
DATA = ROOT / "../shared/data"
GSM8K = DATA / "gsm8k/train.jsonl"
IFEVAL = DATA / "ifeval/input_data.jsonl"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No test asks the hub, whatever the machine can reach."""
    monkeypatch.setattr(hub_data, "_ask_hub", lambda name: ConnectionError("no network here"))


@pytest.fixture
def load(make_cfg):
    """A function that loads a task: of a data set, from a path, with further keys of `env`."""

    def load(dataset, path=None, num_prompts=2, *, fn=None, mode="auto", seed=0, **env):
        cfg = make_cfg()
        cfg.env.dataset, cfg.env.dataset_path = Dataset(dataset), None if path is None else str(path)
        cfg.eval.num_prompts, cfg.reward.fn, cfg.reward.answer_mode, cfg.seed = num_prompts, fn, AnswerMode(mode), seed
        for key, value in env.items():
            assert key in vars(cfg.env)
            setattr(cfg.env, key, value)
        return tasks.load_task(cfg)

    return load


def gsm8k_rows(count, word="apples"):
    return [{"question": f"{i} {word} and {i}?", "answer": f"{i}+{i}\n#### {2 * i}"} for i in range(count)]


def write_jsonl(path, content):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in content))
    return path


def questions(problems):
    return [problem.question for problem in problems]


def test_importing_tasks_loads_nothing_heavy():
    code = (
        "import sys, expert_iteration.tasks; print(*{'torch', 'ray', 'vllm', 'datasets', 'sympy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


# Held-out problems


@pytest.fixture
def saved(tmp_path):
    """A function that saves splits of rows and says where."""

    def save(**splits):
        parts = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"

    return save


def test_a_test_split_is_held_out_and_leaves_no_question_in_training(load, saved):
    test = gsm8k_rows(5, "pears")
    again = {**test[4], "question": f" {test[4]['question'].upper().replace(' ', '  ')}"}
    path = saved(train=[*gsm8k_rows(10), test[0], again], test=test)
    task = load("gsm8k", path, 5)
    assert sorted(questions(task.heldout)) == sorted(row["question"] for row in test)
    assert questions(task.train) == [row["question"] for row in gsm8k_rows(10)]
    [note] = task.notes
    assert note.startswith("note: 2 training prompts were left out, for they are held out for evaluation as well")
    assert "'0 pears and 0?', '4 PEARS AND 4?'" in note
    fewer = load("gsm8k", path, 2)
    assert fewer.heldout == task.heldout[:2]
    assert fewer.train == task.train  # nothing of the test split is trained on, asked or not
    with pytest.raises(UserError, match=r"eval.num_prompts \(6\) is more than the 5"):
        load("gsm8k", path, 6)
    with pytest.raises(UserError, match="no training question that is not held out"):
        load("gsm8k", saved(train=test[:3], test=test))


def test_held_out_rows_do_not_depend_on_order_or_seed(load, tmp_path):
    content = gsm8k_rows(40)
    first = load("gsm8k", write_jsonl(tmp_path / "a.jsonl", content), 10)
    random.Random(0).shuffle(content)
    second = load("gsm8k", write_jsonl(tmp_path / "b.jsonl", content), 10, seed=7)
    assert first.heldout == second.heldout
    assert len(first.heldout) == 10
    assert set(questions(first.train)).isdisjoint(questions(first.heldout))
    assert questions(first.heldout) != [row["question"] for row in gsm8k_rows(10)]
    assert first.notes == ()


def test_duplicates_of_a_held_out_question_leave_training_too(load, tmp_path):
    content = [{**row, "answer": f"{row['answer']}{extra}"} for extra in ("", "0") for row in gsm8k_rows(10)]
    task = load("gsm8k", write_jsonl(tmp_path / "a.jsonl", content), 4)
    assert len(set(questions(task.heldout))) == 4
    assert len(task.train) == 12
    assert set(questions(task.train)).isdisjoint(questions(task.heldout))
    assert task.notes[0].startswith("note: 4 training prompts were left out")
    assert task.notes[1] == "note: 6 training prompts repeat an earlier one; all are trained on"
    reverse = load("gsm8k", write_jsonl(tmp_path / "b.jsonl", content[::-1]), 4)
    assert reverse.heldout == task.heldout


def test_more_than_half_held_out_is_refused(load, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", gsm8k_rows(9))
    assert len(load("gsm8k", path, 4).heldout) == 4
    with pytest.raises(UserError, match=r"eval.num_prompts \(5\) is more than half of the 9.*at most 4"):
        load("gsm8k", path, 5)


def test_splits_are_chosen_by_name(load, saved):
    easy, hard = gsm8k_rows(6), gsm8k_rows(4, "pears")
    path = saved(easy=easy, hard=hard, test=gsm8k_rows(3, "plums"))
    task = load("gsm8k", path, 3, split="easy")
    assert (len(task.train), len(task.heldout)) == (6, 3)
    task = load("gsm8k", path, 4, split="easy", eval_split="hard")
    assert sorted(questions(task.heldout)) == sorted(row["question"] for row in hard)
    task = load("gsm8k", path, 1, split="test")  # as asked for, with problems of its own held out
    assert (len(task.train), len(task.heldout)) == (2, 1)
    for keys, key in (({"split": "dev"}, "env.split=dev"), ({"eval_split": "dev"}, "env.eval_split=dev")):
        with pytest.raises(UserError, match=rf"{key} is no split of .*saved: choose one of easy, hard, test\."):
            load("gsm8k", path, **keys)
    with pytest.raises(UserError, match=r"has the splits easy, hard, test and no 'train': name the one .* env\.split"):
        load("gsm8k", path)


def test_the_only_split_is_trained_on_unless_it_is_for_evaluation(load, saved):
    assert len(load("gsm8k", saved(all=gsm8k_rows(6))).train) == 4
    assert len(load("gsm8k", saved(all=gsm8k_rows(6), test=gsm8k_rows(2, "pears"))).train) == 6
    with pytest.raises(UserError, match="the splits test and no 'train'"):
        load("gsm8k", saved(test=gsm8k_rows(6)))


def test_max_prompts_bounds_training_alone(load, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", gsm8k_rows(40))
    whole = load("gsm8k", path, 10)
    first = load("gsm8k", path, 10, max_prompts=8, shuffle=False)
    assert (first.train, first.heldout) == (whole.train[:8], whole.heldout)
    drawn = load("gsm8k", path, 10, max_prompts=8)
    assert drawn.train != first.train
    assert [problem for problem in whole.train if problem in drawn.train] == drawn.train  # in the data's order
    assert load("gsm8k", path, 10, max_prompts=8, seed=1).train != drawn.train
    more = load("gsm8k", path, 10, max_prompts=12)
    assert all(problem in more.train for problem in drawn.train)
    assert load("gsm8k", path, 10, max_prompts=31).train == whole.train
    assert len(load("tiny", max_prompts=5).train) == 5


# Rows and columns


def test_unusable_rows_are_skipped_counted_and_the_first_three_named(load, tmp_path):
    bad = [
        "{not json",
        [1, 2],
        {"question": "", "answer": "#### 1"},
        {"question": "Why?"},
        {"question": "Why?", "answer": "x ####"},
        {"question": "Half \ud800", "answer": "1"},
        {"question": "Why?", "answer": float("nan")},
        {"question": ["Why?"], "answer": "1"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [*bad, *gsm8k_rows(3)])
    task = load("gsm8k", path, 0)
    assert len(task.train) == 3
    assert task.notes == (
        f"note: {path}, train: 8 of 11 rows were skipped: row 1 (no JSON object), row 2 (no JSON object), "
        "row 3 (empty 'question'), ...",
    )


def test_a_message_does_not_repeat_a_long_row(load, tmp_path):
    long = {"x" * 100_000: "y" * 100_000}
    with pytest.raises(UserError, match="lacks the column") as error:
        load("gsm8k", write_jsonl(tmp_path / "rows.jsonl", [long]))
    assert len(str(error.value)) < 800
    content = [{"nums": "1" * 100_000, "target": 24}, *[{"nums": [i, 3], "target": 2} for i in range(4)]]
    [note] = load("countdown", write_jsonl(tmp_path / "rows.jsonl", content), 1).notes
    assert len(note) < 500


def test_more_cells_than_columns_are_no_row(load, tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\nWhy?,1\nWhy not, then?,2\nHow?,3\n")
    task = load("gsm8k", tmp_path / "rows.csv", 1)
    assert len(task.train + task.heldout) == 2
    assert "row 2 (more cells than columns)" in task.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "no usable row \\(0 rows read\\)"),
        ("empty.json", "[]", "no usable row"),
        ("blank.jsonl", '{"question": " ", "answer": "1"}', "no usable row \\(1 rows read: row 1 \\(empty 'question'"),
        (
            "columns.jsonl",
            '{"prompt": "x", "answer": "1"}',
            r"lacks the column 'question' \(env.prompt_column\); it has ",
        ),
        (
            "columns.csv",
            "q,a\n1,2\n",
            r"'question' \(env.prompt_column\), 'answer' \(env.answer_column\); it has 'a', 'q':",
        ),
    ],
)
def test_a_file_without_usable_rows_is_refused(load, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load("gsm8k", tmp_path / name)


@pytest.mark.parametrize("dataset", ["gsm8k", "math", "custom"])
def test_columns_have_the_names_that_are_given(load, tmp_path, dataset):
    content = [{"q": f"{i}?", "a": i, "question": "no", "answer": "#### 0", "problem": "no"} for i in range(4)]
    path = write_jsonl(tmp_path / "rows.jsonl", content)
    task = load(dataset, path, 1, prompt_column="q", answer_column="a")
    problems = sorted(task.train + task.heldout, key=lambda problem: problem.question)
    assert [(problem.question, problem.answer) for problem in problems] == [(f"{i}?", str(i)) for i in range(4)]
    assert problems[0].metadata == {"question": "no", "answer": "#### 0", "problem": "no"}
    with pytest.raises(UserError, match=r"lacks the column 'why' \(env\.answer_column\)"):
        load(dataset, path, 1, prompt_column="q", answer_column="why")


def test_numbers_and_truths_as_answers_become_text(load, tmp_path):
    content = [{"question": "How many?", "answer": 72}, {"question": "Really?", "answer": True}]
    path = write_jsonl(tmp_path / "rows.jsonl", content)
    problem, other = load("gsm8k", path, 0).train
    assert problem == tasks.Problem("How many?", "72")
    assert rewards.gsm8k_correct("<answer>72</answer>", problem.answer)
    assert other.answer == "true"


def test_what_is_no_answer_is_called_what_it_is(load, tmp_path):
    table = {"prompt": ["1?", "2?", "3?"], "answer": [Decimal("1.50"), Decimal("1E+2"), None]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    task = load("custom", tmp_path / "rows.parquet", 0, answer_column="answer")
    assert [problem.answer for problem in task.train] == ["1.50", "100.00"]
    assert "row 3 (no 'answer')" in task.notes[0]
    table = {"prompt": ["1?"], "answer": [datetime.date(2024, 1, 1)], "several": [["1"]]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "rows.parquet")
    for column, kind in (("answer", "date"), ("several", "list")):
        with pytest.raises(UserError, match=f"'{column}' is a {kind}, not a text or a finite number"):
            load("custom", tmp_path / "rows.parquet", 0, answer_column=column)


def test_prompt_and_answer_of_one_column_are_refused(load, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", gsm8k_rows(4))
    with pytest.raises(UserError, match="the prompt and the answer would both be the column 'question'"):
        load("custom", path, answer_column="question")


def test_a_mistake_tells_which_rows_were_skipped_before(load, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*["garbage"] * 9, *gsm8k_rows(3)])
    with pytest.raises(UserError, match=r"at most 1\. \(Before, .*: 9 of 12 rows were skipped: row 1 \(no JSON object"):
        load("gsm8k", path, 2)
    with pytest.raises(UserError, match="training: give more rows, or a split for evaluation"):
        load("gsm8k", write_jsonl(path, gsm8k_rows(1)), 1)


# Prompts of chat messages


def chat(*turns):
    return [{"role": role, "content": text} for role, text in turns]


def test_a_prompt_may_be_one_message_of_the_user(load, tmp_path):
    content = [
        {"prompt": chat(("user", "One?")), "answer": 1},
        {"prompt": "Two?", "answer": 2},
        {"prompt": chat(("user", "Three?"), ("assistant", "3"), ("user", "Four?")), "answer": 4},
        {"prompt": chat(("assistant", "Five.")), "answer": 5},
        {"prompt": [], "answer": 6},
        {"prompt": [{"role": "user", "content": [{"type": "text"}]}], "answer": 7},
    ]
    task = load("custom", write_jsonl(tmp_path / "rows.jsonl", content), 0, answer_column="answer")
    assert questions(task.train) == ["One?", "Two?"]
    assert task.system_prompt is None
    [note] = task.notes
    assert "4 of 6 rows were skipped: row 3 ('prompt' has the turns user, assistant, user, not one of the user)" in note
    assert "row 5 ('prompt' has the turns of nobody" in note


def test_the_system_message_of_all_rows_is_the_tasks_system_prompt(load, tmp_path):
    content = [{"prompt": chat(("system", "Be brief."), ("user", f"{i}?")), "answer": i} for i in range(3)]
    content += [{"prompt": chat(("system", "Be long."), ("user", "3?")), "answer": 3}, {"prompt": "4?", "answer": 4}]
    path = write_jsonl(tmp_path / "rows.jsonl", content)
    task = load("custom", path, 0, answer_column="answer")
    assert (task.system_prompt, questions(task.train)) == ("Be brief.", ["0?", "1?", "2?"])
    assert "row 4 (another system message than most rows': env.system_prompt replaces them all)" in task.notes[0]
    first = [{"prompt": "5?", "answer": 5}]
    task = load("custom", write_jsonl(tmp_path / "first.jsonl", first + content), 0, answer_column="answer")
    assert (task.system_prompt, len(task.train)) == ("Be brief.", 3)
    for given, used in (("Be kind.", "Be kind."), ("", None)):
        task = load("custom", path, 0, answer_column="answer", system_prompt=given)
        assert (task.system_prompt, len(task.train), task.notes) == (used, 5, ())


# The hub


def test_a_hub_that_is_neither_cached_nor_reachable_answers_at_once(load, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    offline, start = datasets.config.HF_HUB_OFFLINE, time.monotonic()
    with pytest.raises(UserError, match=r"openai/gsm8k is neither cached nor reachable \(ConnectionError: no network"):
        load("gsm8k")
    # No retries: those alone would take more than 20 s.
    assert time.monotonic() - start < 10
    assert datasets.config.HF_HUB_OFFLINE is offline


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            GatedRepoError,
            r"ORG/DATA is gated: accept its terms at https://huggingface.co/datasets/ORG/DATA and export HF_T",
        ),
        (RepositoryNotFoundError, r"ORG/DATA is unknown to the hub, or private: check its spelling .*HF_TOKEN"),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(load, monkeypatch, tmp_path, error, message):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_data, "_ask_hub", lambda name: error.__new__(error))
    with pytest.raises(UserError, match=message):
        load("gsm8k", dataset_name="ORG/DATA")


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.undo()
    import huggingface_hub

    class Silent:
        def auth_check(self, *args, **kwargs):
            time.sleep(30)

    monkeypatch.setattr(huggingface_hub, "HfApi", Silent)
    monkeypatch.setattr(hub_data, "PATIENCE_SECONDS", 0.2)
    start = time.monotonic()
    assert isinstance(hub_data._ask_hub("openai/gsm8k"), TimeoutError)
    assert time.monotonic() - start < 5


@pytest.fixture
def on_hub(monkeypatch):
    """What `datasets.load_dataset` is asked for, and finds: training and test questions."""
    splits = {"train": gsm8k_rows(10), "test": gsm8k_rows(4, "pears")}
    loaded = datasets.DatasetDict({name: datasets.Dataset.from_list(content) for name, content in splits.items()})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: (asked.append(args), loaded)[1])
    return asked


def test_a_hub_data_set_uses_its_own_test_split(load, on_hub):
    task = load("gsm8k", num_prompts=3)
    assert (len(task.train), len(task.heldout)) == (10, 3)
    load("gsm8k", dataset_config="socratic")
    load("gsm8k", dataset_name="ORG/DATA")
    load("custom", dataset_name="ORG/DATA", dataset_config="c", answer_column="answer")
    asked = [("openai/gsm8k", "main"), ("openai/gsm8k", "socratic"), ("ORG/DATA", None), ("ORG/DATA", "c")]
    assert on_hub == asked


def test_an_unknown_configuration_shows_those_that_there_are(load, monkeypatch):
    def refuse(name, config):
        raise ValueError("BuilderConfig 'c' not found. Available: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(hub_data, "_ask_hub", lambda name: None)
    with pytest.raises(UserError, match=r"openai/gsm8k with env\.dataset_config=c cannot be loaded .*'socratic'"):
        load("gsm8k", dataset_config="c")


# The tasks


def test_tiny_task_holds_out_a_prefix_of_its_list(load):
    task = load("tiny", num_prompts=40)
    assert task.system_prompt == tiny.SYSTEM_PROMPT
    assert len(task.train) == 4000
    assert questions(task.heldout) == [problem.question for problem in tiny.heldout_problems()[:40]]
    results = [problem.answer.partition("#### ")[2] for problem in task.heldout]
    responses = [f"<think>so</think><answer>{result}</answer>" for result in results]
    assert task.reward(task.heldout, responses) == [1.0] * 40
    assert task.correct(task.heldout, responses) == [True] * 40
    with pytest.raises(UserError, match=r"eval.num_prompts \(201\).*at most 200"):
        load("tiny", num_prompts=201)


def test_own_reward_replaces_the_reward_and_not_the_pass(load, tmp_path):
    (tmp_path / "own.py").write_text("def shortest(problems, responses):\n    return [-len(r) for r in responses]\n")
    task = load("tiny", num_prompts=1, fn=f"{tmp_path / 'own.py'}:shortest")
    right = f"<answer>{task.heldout[0].answer.partition('#### ')[2]}</answer>"
    assert task.reward(task.heldout, [right]) == [-len(right)]
    assert task.correct(task.heldout, [right]) == [True]


@pytest.mark.parametrize("dataset", ["tiny", "gsm8k"])
def test_a_system_prompt_of_ones_own_or_none(load, tmp_path, dataset):
    path = write_jsonl(tmp_path / "rows.jsonl", gsm8k_rows(4)) if dataset == "gsm8k" else None
    own = load(dataset, path).system_prompt
    assert own
    assert load(dataset, path, system_prompt="Be kind.").system_prompt == "Be kind."
    assert load(dataset, path, system_prompt="").system_prompt is None


def test_the_answer_mode_is_where_gsm8k_looks(load, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", gsm8k_rows(4))
    anywhere, boxed = load("gsm8k", path), load("gsm8k", path, mode="boxed")
    problem = tasks.Problem("?", "#### 4")
    assert anywhere.correct([problem] * 2, ["<answer>4</answer>", r"\boxed{4}"]) == [True, True]
    assert boxed.correct([problem] * 2, ["<answer>4</answer>", r"\boxed{4}"]) == [False, True]


def test_custom_answers_are_compared_as_numbers_or_texts(load, tmp_path):
    content = [{"question": "How many?", "answer": 1200, "level": 3}, {"question": "Who?", "answer": "Ada Lovelace"}]
    task = load("custom", write_jsonl(tmp_path / "rows.jsonl", content), 0, answer_column="answer")
    number, name = task.train
    assert (number.metadata, task.system_prompt, task.notes) == ({"level": 3}, None, ())
    given = [(number, "It is $1,200.00"), (number, "1201"), (name, "<answer>ada  lovelace.</answer>"), (name, "Ada")]
    problems, responses = zip(*given, strict=True)
    assert task.correct(problems, responses) == [True, False, True, False]
    assert task.reward(problems, responses) == [1.0, 0.0, 1.0, 0.0]
    assert (task.has_format("Ada"), task.has_format("")) == (True, False)
    strict = load("custom", tmp_path / "rows.jsonl", 0, answer_column="answer", mode="answer_tag")
    assert strict.correct([number, number], ["1200", "<answer>1200</answer>"]) == [False, True]
    assert (strict.has_format("1200"), strict.has_format("<answer>1200</answer>")) == (False, True)


@pytest.mark.parametrize(("answer", "text"), [(1e-5, "0.00001"), (1e16, "1" + "0" * 16), (12.0, "12.0")])
def test_numbers_of_a_column_are_written_out(load, tmp_path, answer, text):
    rows = [{"prompt": "How many?", "answer": answer}, {"prompt": "How few?", "answer": answer}]
    task = load("custom", write_jsonl(tmp_path / "rows.jsonl", rows), 1, answer_column="answer")
    assert task.heldout[0].answer == text
    assert task.correct(task.heldout, [f"<answer>{text}</answer>"]) == [True]


def test_custom_data_without_answers_leave_what_is_right_to_the_reward(load, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"{i}?", "answer": i} for i in range(4)])
    (tmp_path / "own.py").write_text("def longest(problems, responses):\n    return [len(r) for r in responses]\n")
    task = load("custom", path, 1, fn=f"{tmp_path / 'own.py'}:longest")
    assert task.correct is None
    assert task.reward(task.train[:1], ["four"]) == [4]
    assert sorted(problem.metadata["answer"] for problem in task.train + task.heldout) == [0, 1, 2, 3]
    [note] = task.notes
    assert "counts as right if its reward is at least 1 (reward.pass_threshold)" in note


@pytest.mark.parametrize(
    ("overrides", "bar"),
    [
        (["train.selection=topk", "train.min_reward=0.5"], "0.5 is kept (train.min_reward)"),
        (["train.selection=threshold"], "1 is kept (train.selection_threshold)"),
        (["train.selection=threshold", "train.min_reward=0.5"], "1 is kept (train.selection_threshold)"),
        (["train.selection=threshold", "train.min_reward=2"], "2 is kept (train.min_reward)"),
        (["train.selection=random", "train.min_reward=0.5"], None),
        (["eval.only=true", "train.min_reward=0.5"], None),
        ([], None),
    ],
)
def test_what_selection_asks_for_is_said_of_a_reward_that_is_not_the_tasks(make_cfg, overrides, bar):
    assert tasks.load_task(make_cfg(*overrides)).notes == ()
    notes = tasks.load_task(make_cfg("reward.fn=tiny", *overrides)).notes
    assert notes == (() if bar is None else (f"note: of this reward, too, nothing below {bar}",))


def test_math_takes_solutions_or_answers(load, tmp_path):
    solved = [{"problem": f"{i}?", "solution": rf"So \boxed{{{i}}}.", "level": "1"} for i in range(4)]
    task = load("math", write_jsonl(tmp_path / "a.jsonl", [*solved, {"problem": "4?", "solution": "4"}]), 1)
    assert len(task.train) == 3
    assert "row 5 (nothing boxed in solution)" in task.notes[0]
    [problem] = task.heldout
    answers = [f"<answer>{problem.question[:-1]}.0</answer>", "<answer>9</answer>", "9"]
    assert task.correct([problem] * 3, answers) == [True, False, False]
    assert task.reward([problem] * 3, answers) == [1.0, 0.1, 0.0]
    both = [{**row, "answer": str(number)} for number, row in enumerate(solved)]
    task = load("math", write_jsonl(tmp_path / "b.jsonl", both), 1)
    assert sorted(problem.answer for problem in task.train + task.heldout) == ["0", "1", "2", "3"]
    with pytest.raises(UserError, match=r"lacks the column 'answer' or 'solution' \(env\.answer_column\)"):
        load("math", write_jsonl(tmp_path / "c.jsonl", [{"problem": "1?"}]))


def test_countdown_makes_problems_or_takes_rows(load, tmp_path):
    task = load("countdown", num_prompts=500)
    assert (len(task.train), len(task.heldout)) == (10_000, 500)
    content = [{"nums": [3, 8, i], "target": 24, "id": i} for i in range(1, 5)]
    bad = [{"nums": [3, "x"], "target": 24}, {"nums": [3], "target": -1}, {"nums": [3], "target": 2.5}, {"nums": 3}]
    path = write_jsonl(tmp_path / "rows.jsonl", [*content, {"nums": [1, 8, 3], "target": 24}, *bad])
    task = load("countdown", path, 1, prompt_column="idle")
    assert "4 of 9 rows were skipped: row 6 (nums is not a list of whole numbers)" in task.notes[0]
    # The same numbers in another order are the same problem.
    assert task.notes[1].startswith(("note: 1 training prompts were left out", "note: 1 training prompts repeat"))
    assert len(task.train) + len(task.heldout) in (4, 5)
    problem = next(problem for problem in task.train if problem.metadata["numbers"] == [3, 8, 2])
    assert problem.metadata == {"numbers": [3, 8, 2], "target": 24, "id": 2}
    assert "[3, 8, 2]" in problem.question
    answers = ["<answer>8 * 3</answer>", "<answer>8 + 3</answer>", "24"]
    assert task.reward([problem] * 3, answers) == [1.0, 0.1, 0.0]
    assert task.correct([problem] * 3, answers) == [True, False, False]
    (tmp_path / "rows.csv").write_text('nums,target\n"[3, 8]",24\n"[4, 6]",24\n')
    assert load("countdown", tmp_path / "rows.csv", 1).train[0].metadata["target"] == 24
    (tmp_path / "rows.csv").write_text('nums,target\n"[44 19\n 35]",98\n[3;8],24\n"[3.5, 8]",24\n')  # NumPy's form
    task = load("countdown", tmp_path / "rows.csv", 0)
    assert task.train[0].metadata["numbers"] == [44, 19, 35]
    assert task.notes[0].endswith(
        "row 2 (nums is not a list of whole numbers), row 3 (nums is not a list of whole numbers)"
    )


def test_ifeval_rows_keep_what_their_scorer_needs(load, tmp_path):
    good = {"key": 1, "prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    bad = [{**good, "kwargs": []}, {**good, "instruction_id_list": "punctuation:no_comma"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [good, *bad])
    task = load("ifeval", path, 0)
    [problem] = task.train
    assert problem.answer == ""
    assert problem.metadata == {key: good[key] for key in ("key", "instruction_id_list", "kwargs")}
    assert "2 of 3 rows were skipped" in task.notes[0]
    with pytest.raises(UserError, match="lacks the column 'kwargs'; it has 'instruction_id_list', 'key', 'prompt'"):
        load("ifeval", write_jsonl(path, [{key: value for key, value in good.items() if key != "kwargs"}]))


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K's training file is not here")
def test_real_gsm8k_is_read_whole_and_its_own_answers_are_right(load):
    task = load("gsm8k", GSM8K, 200)
    assert (len(task.train), len(task.heldout)) == (7273, 200)
    problems = task.train + task.heldout
    results = [problem.answer.rpartition("#### ")[2] for problem in problems]
    assert all(task.correct(problems, [f"<answer>{result}</answer>" for result in results]))
    assert set(task.reward(problems, [f"<answer>{result}1</answer>" for result in results])) == {0.1}


@pytest.mark.skipif(not IFEVAL.is_file(), reason="IFEval's prompts are not here")
def test_real_ifeval_is_scored_on_every_instruction(load):
    task = load("ifeval", IFEVAL, 40)
    assert (len(task.train), len(task.heldout)) == (500, 40)


# Prompts that are too long


def short(limit):
    """A limit of so many characters, the system prompt's among them."""
    return PromptLimit(lambda system, question: len(question) + len(system or ""), lambda: limit)


def mixed_rows(start):
    """Of 24 questions of 4 characters every third with more."""
    return [{"question": f"{i}?" + " and more" * (i % 3 == 0), "answer": "1"} for i in range(start, start + 24)]


@pytest.mark.parametrize("splits", [{"train": 100}, {"train": 100, "test": 200}])
def test_long_prompts_are_left_out_before_numbers_are_chosen(make_cfg, saved, splits):
    path = saved(**{name: mixed_rows(start) for name, start in splits.items()})
    given = ("env.dataset=gsm8k", f"env.dataset_path={path}", "env.system_prompt=S", "eval.num_prompts=8")
    task = tasks.load_task(make_cfg(*given, "env.max_prompts=6"), short(5))
    assert (len(task.train), len(task.heldout)) == (6, 8)
    assert {len(problem.question) for problem in [*task.train, *task.heldout]} == {4}
    unlimited = tasks.load_task(make_cfg(*given, "eval.num_prompts=12")).heldout
    in_order = [problem for problem in unlimited if len(problem.question) == 4]
    assert in_order[:8] == task.heldout[: len(in_order)]
    [note] = tasks.load_task(make_cfg(*given), short(5)).notes
    assert re.match(r"note: \d+ prompts were left out, .*than 5 tokens \(.*max_tokens\): '\d+\? and more' \(14\)", note)
    assert tasks.load_task(make_cfg(*given), short(14)).notes == ()
    with pytest.raises(
        UserError, match=r"8\) is more than the 0 held-out .* short enough: raise .*max_model_len, or l"
    ):
        tasks.load_task(make_cfg(*given), short(4))


def test_where_all_prompts_to_train_on_are_too_long_that_is_told(make_cfg, saved):
    path = saved(train=mixed_rows(100)[2::3], test=gsm8k_rows(3, ""))
    cfg = make_cfg("env.dataset=gsm8k", f"env.dataset_path={path}", "env.system_prompt=", "eval.num_prompts=2")
    with pytest.raises(UserError, match=r"left for training.*max_tokens\. \(Before, 8 prompts were left out"):
        tasks.load_task(cfg, short(10))


# Where nothing is trained


@pytest.fixture
def alone(make_cfg):
    """A function that loads what an evaluation alone asks of rows like GSM8K's."""
    cfg = make_cfg("env.dataset=gsm8k", "eval.only=true", "env.eval_split=train")  # which a training may not have

    def load(path, num_prompts, eval_split=None):
        cfg.env.dataset_path, cfg.env.eval_split, cfg.eval.num_prompts = str(path), eval_split, num_prompts
        return tasks.load_task(cfg)

    return load


def test_an_evaluation_alone_needs_no_split_to_train_on(alone, saved):
    rows = gsm8k_rows(9)
    for name in ("test", "dev", "train"):
        task = alone(saved(**{name: rows}), 9)
        assert (task.train, sorted(questions(task.heldout))) == ([], sorted(row["question"] for row in rows))
    path = saved(train=rows, test=gsm8k_rows(2, "pears"), dev=gsm8k_rows(3, "plums"))
    for split, word in (("dev", "plums"), ("train", "apples"), (None, "pears")):
        assert [word in problem.question for problem in alone(path, 2, split).heldout] == [True, True]
    with pytest.raises(UserError, match=r"\(10\) is more than the 9 held-out problems"):
        alone(path, 10, "train")
    with pytest.raises(UserError, match=r"the splits a, b and no 'train'"):
        alone(saved(a=rows, b=rows), 1)


def test_an_evaluation_alone_asks_what_a_run_on_the_same_file_holds_out(alone, load, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", gsm8k_rows(20))
    assert alone(path, 5).heldout == load("gsm8k", path, 5).heldout
