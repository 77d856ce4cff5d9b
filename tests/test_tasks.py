"""`expert_iteration.tasks` and `rows`: reading, splitting and refusing data sets."""

import csv
import json
import logging
import random
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from expert_iteration import rewards, rows, tasks, tiny
from expert_iteration.errors import UserError

DATA = Path(__file__).parents[1] / "../shared/data"
GSM8K = DATA / "gsm8k/train.jsonl"
IFEVAL = DATA / "ifeval/input_data.jsonl"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No test asks the hub, whatever the machine can reach."""
    monkeypatch.setattr(rows, "_hub_answers", lambda hub_id: False)


def config(dataset: str, path: Path | None = None, num_prompts: int = 2, fn: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        env=SimpleNamespace(dataset=dataset, dataset_path=None if path is None else str(path)),
        eval=SimpleNamespace(num_prompts=num_prompts),
        reward=SimpleNamespace(fn=fn),
        tiny=SimpleNamespace(model_seed=0),
        seed=0,
    )


def gsm8k_rows(count: int, word: str = "apples") -> list[dict[str, str]]:
    return [{"question": f"{i} {word} and {i}?", "answer": f"{i}+{i}\n#### {2 * i}"} for i in range(count)]


def write_jsonl(path: Path, content: list) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in content))
    return path


def questions(problems: list[tasks.Problem]) -> list[str]:
    return [problem.question for problem in problems]


# Forms


def write_json(path: Path) -> None:
    path.write_text(json.dumps(gsm8k_rows(10)))


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(gsm8k_rows(10))


def write_parquet(path: Path) -> None:
    datasets.Dataset.from_list(gsm8k_rows(10)).to_parquet(str(path))


def write_directory(path: Path) -> None:
    datasets.Dataset.from_list(gsm8k_rows(10)).save_to_disk(str(path))


FORMS = {
    "rows.jsonl": lambda path: write_jsonl(path, gsm8k_rows(10)),
    "rows.JSONL": lambda path: write_jsonl(path, gsm8k_rows(10)),
    "rows.json": write_json,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
    "directory": write_directory,
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_gives_the_same_task(tmp_path, name):
    FORMS[name](tmp_path / name)
    task = tasks.load_task(config("gsm8k", tmp_path / name))
    assert sorted(questions(task.train + task.heldout)) == sorted(row["question"] for row in gsm8k_rows(10))
    assert len(task.heldout) == 2
    expected = tasks.load_task(config("gsm8k", write_jsonl(tmp_path / "same.jsonl", gsm8k_rows(10))))
    assert (task.train, task.heldout) == (expected.train, expected.heldout)


def test_separators_that_json_allows_in_a_string_do_not_split_a_row(tmp_path):
    row = {"question": "one\u2028two\x85three", "answer": "#### 1"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    assert tasks.load_task(config("gsm8k", tmp_path / "rows.jsonl", 0)).train[0].question == row["question"]


def test_numbers_as_answers_become_text(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "How many?", "answer": 72}])
    problem = tasks.load_task(config("gsm8k", path, 0)).train[0]
    assert problem == tasks.Problem("How many?", "72")
    assert rewards.gsm8k_correct("<answer>72</answer>", problem.answer)


# Held-out problems


def test_test_split_is_held_out_and_leaves_no_question_in_training(tmp_path):
    test = gsm8k_rows(5, "pears")
    splits = {"train": [*gsm8k_rows(10), test[0]], "test": test}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(content) for name, content in splits.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    task = tasks.load_task(config("gsm8k", tmp_path / "saved", 5))
    assert sorted(questions(task.heldout)) == sorted(row["question"] for row in test)
    assert questions(task.train) == [row["question"] for row in gsm8k_rows(10)]
    fewer = tasks.load_task(config("gsm8k", tmp_path / "saved", 2))
    assert fewer.heldout == task.heldout[:2]
    with pytest.raises(UserError, match=r"eval.num_prompts \(6\) is more than the 5"):
        tasks.load_task(config("gsm8k", tmp_path / "saved", 6))


def test_held_out_rows_do_not_depend_on_order_or_seed(tmp_path):
    content = gsm8k_rows(40)
    first = tasks.load_task(config("gsm8k", write_jsonl(tmp_path / "a.jsonl", content), 10))
    random.Random(0).shuffle(content)
    other = config("gsm8k", write_jsonl(tmp_path / "b.jsonl", content), 10)
    other.seed = 7
    second = tasks.load_task(other)
    assert first.heldout == second.heldout
    assert len(first.heldout) == 10
    assert set(questions(first.train)).isdisjoint(questions(first.heldout))
    assert questions(first.heldout) != [row["question"] for row in gsm8k_rows(10)]


def test_duplicates_of_a_held_out_question_leave_training_too(tmp_path):
    content = [{**row, "answer": f"{row['answer']}{extra}"} for extra in ("", "0") for row in gsm8k_rows(10)]
    task = tasks.load_task(config("gsm8k", write_jsonl(tmp_path / "a.jsonl", content), 4))
    assert len(set(questions(task.heldout))) == 4
    assert len(task.train) == 12
    assert set(questions(task.train)).isdisjoint(questions(task.heldout))
    reverse = tasks.load_task(config("gsm8k", write_jsonl(tmp_path / "b.jsonl", content[::-1]), 4))
    assert reverse.heldout == task.heldout


def test_more_than_half_held_out_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", gsm8k_rows(9))
    assert len(tasks.load_task(config("gsm8k", path, 4)).heldout) == 4
    with pytest.raises(UserError, match=r"eval.num_prompts \(5\) is more than half of the 9.*at most 4"):
        tasks.load_task(config("gsm8k", path, 5))


# Rows that cannot be used


def test_unusable_rows_are_skipped_counted_and_the_first_three_named(tmp_path, caplog):
    bad = [
        "{not json",
        [1, 2],
        {"question": "", "answer": "#### 1"},
        {"question": "Why?"},
        {"question": "Why?", "answer": "x ####"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [*bad, *gsm8k_rows(3)])
    with caplog.at_level(logging.WARNING):
        task = tasks.load_task(config("gsm8k", path, 0))
    assert len(task.train) == 3
    [record] = [record.message for record in caplog.records]
    assert "5 of 8 rows skipped" in record
    assert "row 1 (no JSON object), row 2 (no JSON object), row 3 (empty question), ..." in record


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "no usable row \\(0 rows read\\)"),
        ("empty.json", "[]", "no usable row"),
        ("blank.jsonl", '{"question": " ", "answer": "1"}', "no usable row \\(1 rows read: row 1 \\(empty question"),
        ("columns.jsonl", '{"prompt": "x", "answer": "1"}', "lacks the column\\(s\\) question; it has answer, prompt"),
        ("columns.csv", "q,a\n1,2\n", "lacks the column\\(s\\) question, answer; it has a, q"),
        ("broken.json", '[{"question": ', "cannot be read"),
        ("object.json", '{"question": "x"}', "a JSON dict, not a list of rows"),
        ("broken.parquet", "no parquet", "cannot be read"),
        ("rows.txt", "x", "unknown form: give one of .jsonl"),
    ],
)
def test_file_without_usable_rows_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        tasks.load_task(config("gsm8k", tmp_path / name))


def test_other_paths_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        tasks.load_task(config("gsm8k", tmp_path / "nothing.jsonl"))
    with pytest.raises(UserError, match="cannot be read"):
        tasks.load_task(config("gsm8k", tmp_path))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9", "answer": "1"}')
    with pytest.raises(UserError, match="cannot be read"):
        tasks.load_task(config("gsm8k", tmp_path / "latin.jsonl"))
    only_test = datasets.DatasetDict({"test": datasets.Dataset.from_list(gsm8k_rows(3))})
    only_test.save_to_disk(str(tmp_path / "only_test"))
    with pytest.raises(UserError, match="no 'train'"):
        tasks.load_task(config("gsm8k", tmp_path / "only_test"))


def test_unknown_data_set_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="tiny, gsm8k, ifeval"):
        tasks.load_task(config("gsm9k"))


# The hub


def test_hub_that_is_neither_cached_nor_reachable_answers_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    offline, start = datasets.config.HF_HUB_OFFLINE, time.monotonic()
    with pytest.raises(UserError, match=r"openai/gsm8k is neither cached nor reachable.*env\.dataset_path"):
        tasks.load_task(config("gsm8k"))
    # No retries: those alone would take more than 20 s.
    assert time.monotonic() - start < 10
    assert datasets.config.HF_HUB_OFFLINE is offline


def test_hub_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.undo()
    import huggingface_hub

    class Silent:
        def dataset_info(self, *args, **kwargs):
            time.sleep(30)

    monkeypatch.setattr(huggingface_hub, "HfApi", Silent)
    monkeypatch.setattr(rows, "HUB_PATIENCE_SECONDS", 0.2)
    start = time.monotonic()
    assert rows._hub_answers("openai/gsm8k") is False
    assert time.monotonic() - start < 5


def test_hub_data_set_uses_its_own_test_split(monkeypatch):
    splits = {"train": gsm8k_rows(10), "test": gsm8k_rows(4, "pears")}
    loaded = datasets.DatasetDict({name: datasets.Dataset.from_list(content) for name, content in splits.items()})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: (asked.append(args), loaded)[1])
    task = tasks.load_task(config("gsm8k", num_prompts=3))
    assert asked == [("openai/gsm8k", "main")]
    assert (len(task.train), len(task.heldout)) == (10, 3)


# The tasks


def test_tiny_task_holds_out_a_prefix_of_its_list():
    task = tasks.load_task(config("tiny", num_prompts=40))
    assert task.system_prompt == tiny.SYSTEM_PROMPT
    assert len(task.train) == 4000
    assert questions(task.heldout) == [problem.question for problem in tiny.heldout_problems()[:40]]
    results = [problem.answer.partition("#### ")[2] for problem in task.heldout]
    responses = [f"<think>so</think><answer>{result}</answer>" for result in results]
    assert task.reward(task.heldout, responses) == [1.0] * 40
    assert task.correct(task.heldout, responses) == [True] * 40
    with pytest.raises(UserError, match=r"eval.num_prompts \(201\).*at most 200"):
        tasks.load_task(config("tiny", num_prompts=201))
    with pytest.raises(UserError, match="no effect with env"):
        tasks.load_task(config("tiny", Path("rows.jsonl")))


def test_own_reward_replaces_the_reward_and_not_the_pass(tmp_path):
    (tmp_path / "own.py").write_text("def shortest(problems, responses):\n    return [-len(r) for r in responses]\n")
    task = tasks.load_task(config("tiny", num_prompts=1, fn=f"{tmp_path / 'own.py'}:shortest"))
    right = f"<answer>{task.heldout[0].answer.partition('#### ')[2]}</answer>"
    assert task.reward(task.heldout, [right]) == [-len(right)]
    assert task.correct(task.heldout, [right]) == [True]


def test_ifeval_rows_keep_what_their_scorer_needs(tmp_path, caplog):
    good = {"key": 1, "prompt": "Write.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    bad = [{**good, "kwargs": []}, {**good, "instruction_id_list": "punctuation:no_comma"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [good, *bad])
    with caplog.at_level(logging.WARNING):
        task = tasks.load_task(config("ifeval", path, 0))
    [problem] = task.train
    assert problem.answer == ""
    assert problem.metadata == {key: good[key] for key in ("key", "instruction_id_list", "kwargs")}
    assert "2 of 3 rows skipped" in caplog.text
    assert task.correct([problem], ["<answer>Fine.</answer>"]) == [True]


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K's training file is not here")
def test_real_gsm8k_is_read_whole_and_its_own_answers_are_right():
    task = tasks.load_task(config("gsm8k", GSM8K, 200))
    assert (len(task.train), len(task.heldout)) == (7273, 200)
    problems = task.train + task.heldout
    results = [problem.answer.rpartition("#### ")[2] for problem in problems]
    assert all(task.correct(problems, [f"<answer>{result}</answer>" for result in results]))
    assert set(task.reward(problems, [f"<answer>{result}1</answer>" for result in results])) == {0.1}


@pytest.mark.skipif(not IFEVAL.is_file(), reason="IFEval's prompts are not here")
def test_real_ifeval_is_scored_on_every_instruction():
    task = tasks.load_task(config("ifeval", IFEVAL, 40))
    assert (len(task.train), len(task.heldout)) == (500, 40)
    problems = task.train + task.heldout
    responses = ["<think>so</think><answer>Hello there. HOW are you? I am *fine* thanks.</answer>"] * len(problems)
    values = task.reward(problems, responses)
    assert values == task.reward(problems, responses)
    assert all(0.15 <= value <= 1.16 for value in values)
    passes = task.correct(problems, responses)
    assert 0 < sum(passes) < len(problems)
    # Everything followed strictly earns all four shares and both tags.
    assert all((value > 1.14) == passed for value, passed in zip(values, passes, strict=True))


# Prompts that are too long


def test_prompts_without_room_for_a_response_are_left_out():
    def problems(*lengths):
        return [tasks.Problem("x" * length, "1") for length in lengths]

    def length(problem):
        return len(problem.question)

    task = tasks.Task("t", None, problems(3, 9, 4), problems(5, 8), reward=None, correct=None, has_format=None)
    shorter, dropped = tasks.without_long_prompts(task, length, limit=5)
    assert [length(problem) for problem in shorter.train] == [3, 4]
    assert [length(problem) for problem in shorter.heldout] == [5]
    assert dropped == 2
    with pytest.raises(UserError, match="No prompt of t is left for training"):
        tasks.without_long_prompts(task, length, limit=2)
    with pytest.raises(UserError, match="No prompt of t is left for evaluation"):
        tasks.without_long_prompts(task, length, limit=4)
