"""What was kept, as a data set: how it is written, who can load it, and what is trained on of it."""

import json
import shutil

import datasets
import pyarrow.parquet
import pytest
import torch
from local_runs import run_algorithm
from scripted_engine import ScriptedEngine
from tensordict import TensorDict, lazy_stack
from whole_runs import Run, shown, without_times

from expert_iteration import tiny
from expert_iteration.chat_template import chat_prompt_ids, end_of_turn_id
from expert_iteration.checkpoint_files import open_checkpoint
from expert_iteration.errors import UserError
from expert_iteration.expert_set import SCHEMA, ExpertSetWriter, drop_shards_after
from expert_iteration.expert_set_reader import ExampleEncoder, digest_of_examples, read_expert_set
from expert_iteration.tasks import Problem, Task

SYSTEM_PROMPT = "Answer with a digit."
PROBLEMS = [Problem("One more than 1?", "2"), Problem("One more than 2?", "3")]


def right(problems, texts):
    return [text == problem.answer for problem, text in zip(problems, texts, strict=True)]


TASK = Task("digits", SYSTEM_PROMPT, PROBLEMS, [], reward=right, correct=right, has_format=str.isdigit)


def a_row(text, reward, *, group=0, problem=0, **entries):
    """A row as the environment makes it, as far as the set asks."""
    return TensorDict(
        {
            "query": PROBLEMS[problem].question,
            ("text", "response"): text,
            ("tokens", "prompt"): torch.tensor([7, 8]),
            ("tokens", "response"): torch.tensor([1, 2, 3]),
            ("next", "reward"): torch.tensor([reward]),
            ("next", "correct"): torch.tensor([text == PROBLEMS[problem].answer]),
            "group_id": torch.tensor(group),
            "prompt_index": torch.tensor(problem),
            "policy_version": torch.tensor(5),
            "finish_reason": "stop",
            **entries,
        }
    )


def write(folder, batch, rows, kept, *, token_ids=False, task=TASK):
    writer = ExpertSetWriter(folder, task, token_ids=token_ids)
    writer.write(writer.describe(lazy_stack(rows), lazy_stack(kept)), batch)


def test_a_disk_that_cannot_be_written_to_is_an_answer(tmp_path):
    (tmp_path / "expert_set").touch()  # where the folder would be
    rows = [a_row("2", 1.0), a_row("3", 0.0)]
    with pytest.raises(UserError, match=r"batch_000001\.parquet could not be written .*make room"):
        write(tmp_path / "expert_set", 1, rows, rows[:1])


def read(path):
    return pyarrow.parquet.read_table(path).to_pylist()


# --- writing ---


def test_a_response_comes_with_what_its_group_says_of_it(tmp_path):
    first = [a_row("4", 0.5), a_row("2", 1.0), a_row("2", 1.0), a_row("x", float("nan"))]
    second = [a_row("3", 0.2, group=1, problem=1), a_row("", 0.1, group=1, problem=1)]
    write(tmp_path, 12, [*first, *second], [first[1], first[2], first[0], second[0]])
    [path] = tmp_path.iterdir()
    assert path.name == "batch_000012.parquet"
    rows = read(path)
    assert [(row["rank"], row["group_size"], row["group_pass_rate"], row["correct"]) for row in rows] == [
        (1, 4, 0.5, True),
        (1, 4, 0.5, True),
        (3, 4, 0.5, False),
        (1, 2, 0.5, True),
    ]
    assert rows[3] == {
        "prompt": "One more than 2?",
        "system_prompt": SYSTEM_PROMPT,
        "response": "3",
        "answer": "3",
        "reward": pytest.approx(0.2),
        "rank": 1,
        "group_size": 2,
        "group_pass_rate": 0.5,
        "correct": True,
        "group_id": 1,
        "prompt_index": 1,
        "policy_version": 5,
        "iteration": 12,
        "finish_reason": "stop",
    }


@pytest.mark.parametrize("token_ids", [True, False])
def test_the_hugging_face_library_loads_all_batches_and_nothing_half_written(tmp_path, token_ids):
    folder = tmp_path / "expert_set"
    unprompted = Task("digits", None, PROBLEMS, [], reward=right, correct=right, has_format=str.isdigit)
    for batch, task in ((1, unprompted), (10, TASK)):  # whose files would have other types if they were found out
        rows = [a_row("2", 1.0), a_row("3", 0.0)]
        write(folder, batch, rows, rows[:1], token_ids=token_ids, task=task)
    (folder / ".batch_000011.parquet.tmp").write_bytes(b"half a file")
    loaded = datasets.load_dataset("parquet", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded["iteration"] == [1, 10]
    assert loaded["system_prompt"] == [None, SYSTEM_PROMPT]
    assert set(loaded.features) - set(SCHEMA.names) == (
        {"prompt_token_ids", "response_token_ids"} if token_ids else set()
    )
    if token_ids:
        assert loaded[0]["prompt_token_ids"] == [7, 8]
        assert loaded[0]["response_token_ids"] == [1, 2, 3]


def test_a_batch_that_is_collected_again_replaces_its_own(tmp_path):
    for text in ("3", "2"):
        rows = [a_row(text, 1.0), a_row("x", 0.0)]
        write(tmp_path, 2, rows, rows[:1])
    [path] = tmp_path.iterdir()
    assert [row["response"] for row in read(path)] == ["2"]


def test_what_lies_beyond_a_checkpoint_goes(tmp_path):
    for batch in (1, 2, 10):
        rows = [a_row("2", 1.0), a_row("x", 0.0)]
        write(tmp_path, batch, rows, rows[:1])
    (tmp_path / ".batch_000011.parquet.tmp").touch()
    (tmp_path / "notes.txt").touch()
    drop_shards_after(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "batch_000001.parquet",
        "batch_000002.parquet",
        "notes.txt",
    ]
    drop_shards_after(tmp_path / "missing", 0)


# --- reading ---


@pytest.fixture
def encoder(tiny_tokenizer):
    return ExampleEncoder(tiny_tokenizer, system_prompt=SYSTEM_PROMPT, max_length=100, ends_turn=True)


@pytest.fixture
def texts_of(tiny_tokenizer):
    """What an example's prompt and response say, special tokens and all."""
    return lambda example: (tiny_tokenizer.decode(example.prompt_ids), tiny_tokenizer.decode(example.response_ids))


ROW = {"prompt": "How many?", "response": "So many."}


def as_jsonl(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_a_text_gets_the_template_and_its_end(encoder, tiny_tokenizer):
    example = encoder.encode(ROW)
    assert list(example.prompt_ids) == chat_prompt_ids(tiny_tokenizer, SYSTEM_PROMPT, "How many?")
    ids = tiny_tokenizer("So many.")["input_ids"]
    assert list(example.response_ids) == [*ids, end_of_turn_id(tiny_tokenizer)]
    assert example.reward == 1.0


@pytest.mark.parametrize(("own", "expected"), [("Be brief.", "Be brief."), (None, None)])
def test_a_row_may_have_a_system_prompt_of_its_own_or_none(encoder, tiny_tokenizer, own, expected):
    example = encoder.encode({**ROW, "system_prompt": own})
    assert list(example.prompt_ids) == chat_prompt_ids(tiny_tokenizer, expected, "How many?")


def test_only_whole_responses_teach_to_stop(encoder, tiny_tokenizer):
    end = tiny_tokenizer.decode([end_of_turn_id(tiny_tokenizer)])
    whole, cut, ended = (
        list(encoder.encode({**ROW, **entries}).response_ids)
        for entries in ({"finish_reason": "stop"}, {"finish_reason": "length"}, {"response": "So many." + end})
    )
    assert whole == ended
    assert cut == whole[:-1]
    endless = ExampleEncoder(tiny_tokenizer, system_prompt=None, max_length=100, ends_turn=False)
    assert list(endless.encode(ROW).response_ids) == cut


def test_token_ids_are_taken_as_they_are_if_they_are_this_tokenizers(encoder, tiny_tokenizer, texts_of):
    letters = [tiny_tokenizer(letter)["input_ids"][0] for letter in "So many."]  # as one may sample it
    prompt = tiny_tokenizer("Another form: How many? ")["input_ids"]
    ids = {"prompt_token_ids": prompt, "response_token_ids": letters}
    assert texts_of(encoder.encode({**ROW, **ids})) == ("Another form: How many? ", "So many.")
    assert encoder.num_sampled == 1
    templated = encoder.encode(ROW)
    for strange in (
        {"response_token_ids": letters[:-1]},
        {"response_token_ids": [10**6]},
        {"response_token_ids": []},
        {"response_token_ids": None},
        {"prompt_token_ids": letters},
        {"prompt_token_ids": [-1]},
    ):
        assert encoder.encode({**ROW, **ids, **strange}) == templated
    assert encoder.num_sampled == 1


def test_rows_that_cannot_be_used_are_counted_and_three_of_them_shown(tmp_path, encoder):
    path = as_jsonl(
        tmp_path / "set.jsonl",
        {**ROW, "reward": 0.5},
        "no json",
        {"prompt": "How many?"},
        {**ROW, "response": " "},
        {**ROW, "response": "so many " * 100},
        {**ROW, "reward": "high"},
        {**ROW, "reward": float("nan")},
        {**ROW, "system_prompt": 3},
        {**ROW, "reward": -2},
    )
    examples, notes = read_expert_set(path, encoder)
    assert [example.reward for example in examples] == [0.5, -2.0]
    assert notes == [
        f"expert set: 2 responses from {path}, 0 of them by their token ids",
        "note: 7 of 9 rows were skipped: row 2 (no JSON object), row 3 (no response), row 4 (empty response), ...",
    ]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path, encoder, texts_of):
    for batch, text in ((10, "3"), (2, "2")):
        rows = [a_row(text, 0.5), a_row("x", 0.0)]
        write(tmp_path, batch, rows, rows[:1], token_ids=True)
    (tmp_path / ".batch_000011.parquet.tmp").write_bytes(b"half a file")
    examples, _ = read_expert_set(tmp_path, encoder)
    assert [texts_of(example)[1][0] for example in examples] == ["2", "3"]
    assert encoder.num_sampled == 0  # the ids above are not those of the texts
    [one, _] = examples
    assert read_expert_set(tmp_path / "batch_000002.parquet", encoder)[0] == [one]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a folder without a .parquet file"),
        ("", r"holds no usable row \(0 rows read\)"),
        ('{"question": "How?", "answer": "So."}', r"row 1 \(no prompt\).*It has the columns question, answer"),
        ("[1]", r"row 1 \(no JSON object\)"),
        (b"\xff\xfe", "set.jsonl cannot be read .*mend or remove it"),
    ],
)
def test_a_set_without_anything_to_train_on_is_refused(tmp_path, encoder, content, message):
    path = tmp_path / "set.jsonl"
    if content is None:
        path = tmp_path
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_expert_set(path, encoder)


def test_a_broken_parquet_file_is_named(tmp_path, encoder):
    (tmp_path / "batch_000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"batch_000001\.parquet cannot be read"):
        read_expert_set(tmp_path, encoder)


def test_a_digest_tells_sets_apart(encoder):
    examples, again = ([encoder.encode({**ROW, "reward": reward}) for reward in (0.0, 1.0)] for _ in range(2))
    others = [encoder.encode({**ROW, "response": response}) for response in ("So", "So many")]
    assert digest_of_examples(examples) == digest_of_examples(again)
    assert len({digest_of_examples(part) for part in (examples, examples[::-1], examples[:1], others)}) == 4


# --- runs: one saves a set, others train on it ---

RUN = (
    "env.repeats=4",
    "env.num_envs=8",
    "train.dialog_turns_per_batch=16",
    "train.total_dialog_turns=48",
    "train.topk_size=1",
    "eval.frequency=0",
    "eval.num_prompts=3",
    "inference_model.max_tokens=30",
    "logging.backend=none",
)
PASSES = (
    "train.epochs=6",
    "train.optim_batch_size=4",
    "train.gradient_accumulation_steps=2",
    "train.checkpoint_frequency=4",
    "optimizer.lr=3e-3",
    "optimizer.scheduler.type=linear",
    "logging.backend=none",
)


@pytest.fixture(scope="module")
def save_set(load_script, make_cfg, tiny_folder, tiny_tokenizer, tmp_path_factory):
    """A function that runs the algorithm and returns where its set is."""
    from expert_iteration.models import load_model

    def save(*overrides):
        run_dir = tmp_path_factory.mktemp("saving") / "run"
        cfg = make_cfg(f"model.name={tiny_folder}", *RUN, "expert_set.save=true", *overrides)
        model = load_model(str(tiny_folder), dtype="float32", attn_implementation="sdpa", device="cpu")
        run_algorithm(load_script("expert-iteration-sync"), cfg, ScriptedEngine(model, tiny_tokenizer), run_dir)
        return run_dir / "expert_set"

    return save


@pytest.fixture(scope="module")
def saved(save_set):
    """The set of three batches of four groups, in each of which one response is the best."""
    return save_set("expert_set.token_ids=true")


@pytest.fixture(scope="module")
def train_on(load_script, make_cfg, tiny_folder):
    """A function that trains on a set, as a run without an engine does."""

    def train(path, run_dir, *overrides, **kwargs):
        cfg = make_cfg(f"model.name={tiny_folder}", f"train.from_expert_set={path}", *PASSES, *overrides)
        return run_algorithm(load_script("expert-iteration-sync"), cfg, None, run_dir, **kwargs)

    return train


@pytest.fixture(scope="module")
def trained(train_on, saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "run"
    return folder, train_on(saved, folder)


def test_a_run_saves_what_it_keeps_batch_by_batch(saved, tiny_tokenizer):
    assert sorted(path.name for path in saved.iterdir()) == [f"batch_00000{batch}.parquet" for batch in (1, 2, 3)]
    combinations = {problem.question: problem.combination for problem in tiny.train_problems()}
    for batch in (1, 2, 3):
        rows = read(saved / f"batch_00000{batch}.parquet")
        assert len(rows) == 4
        for row in rows:
            assert row["iteration"] == batch
            assert row["policy_version"] == batch - 1
            assert row["response"] == tiny.respond(combinations[row["prompt"]], "careful")
            assert (row["reward"], row["rank"], row["correct"], row["group_pass_rate"]) == (1, 1, True, 0.25)
            assert row["system_prompt"] == tiny.SYSTEM_PROMPT
            assert row["prompt_token_ids"] == chat_prompt_ids(tiny_tokenizer, tiny.SYSTEM_PROMPT, row["prompt"])
            assert tiny_tokenizer.decode(row["response_token_ids"]) == row["response"] + tiny.END_OF_TURN


def test_where_nothing_is_kept_nothing_is_written(save_set, tmp_path):
    (tmp_path / "rewards.py").write_text("def equal(problems, responses):\n    return [1.0 for _ in responses]\n")
    assert not save_set(f"reward.fn={tmp_path / 'rewards.py'}:equal", "train.total_dialog_turns=16").exists()


def test_what_the_control_keeps_is_written_too(save_set):
    rows = [row for path in save_set("train.selection=random").iterdir() for row in read(path)]
    assert len(rows) == 12
    assert {row["rank"] for row in rows} > {1}
    assert "prompt_token_ids" not in rows[0]


def test_texts_become_the_ids_that_were_sampled(saved, tmp_path, encoder):
    rows = [row for path in sorted(saved.iterdir()) for row in read(path)]
    texts = [{key: row[key] for key in ("prompt", "response", "reward", "system_prompt")} for row in rows]
    templated, _ = read_expert_set(as_jsonl(tmp_path / "texts.jsonl", *texts), encoder)
    assert encoder.num_sampled == 0
    assert read_expert_set(saved, encoder)[0] == templated
    assert encoder.num_sampled == len(rows) == 12


def test_training_on_a_set_makes_its_loss_fall_in_passes_over_all_of_it(trained):
    _, run = trained
    losses, rates = shown(run.lines, "train/loss_sft"), shown(run.lines, "learning_rate")
    assert len(losses) == 18  # 12 responses / 4 a gradient step, 6 epochs
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])  # measured: 0.59
    assert shown(run.lines, "train/kl_to_ref")[0] == pytest.approx(0, abs=1e-6)
    assert shown(run.lines, "train/kl_to_ref")[-1] > 0
    assert set(shown(run.lines, "buffer/size")) == {12, 0}  # emptied at the end
    # Down to 0 after nine optimizer steps, of which each is made at the rate before it.
    assert rates[-1] == pytest.approx(3e-3 / 9)
    assert run.checkpoints == [f"checkpoint_{step}.pt" for step in (12, 16, 18)]


def test_without_an_engine_nothing_is_pushed_or_evaluated(trained):
    _, run = trained
    names = {name for line in run.lines for name in line}
    assert not [name for name in names if name.startswith(("eval/", "collector/", "selection/", "weights/"))]
    assert all(len(line) > 2 for line in run.lines)  # no line says nothing
    expected = {"dialog_turns": 0, "weight_pushes": 0, "policy_version": 0, "eval": {}, "optimizer_steps": 9}
    assert {name: run.summary[name] for name in expected} == expected


def test_training_on_a_set_goes_on_from_a_checkpoint(trained, train_on, saved, tmp_path):
    folder, run = trained
    shutil.copytree(folder / "checkpoints", tmp_path / "run" / "checkpoints")
    again = train_on(
        saved, tmp_path / "run", checkpoint=open_checkpoint(tmp_path / "run" / "checkpoints" / "checkpoint_12")
    )
    assert without_times(again.lines) == [line for line in without_times(run.lines) if line["step"] > 12]
    trained_weights = run.policy.state_dict()
    assert all(torch.equal(tensor, trained_weights[name]) for name, tensor in again.policy.state_dict().items())


def test_others_texts_train_too_and_adapters_bring_their_reference(train_on, tmp_path):
    path = as_jsonl(tmp_path / "set.jsonl", *({**ROW, "prompt": f"How many are {n}?"} for n in range(5)))
    run = train_on(path, tmp_path / "run", "train_model.lora.enabled=true", "optimizer.lr=1e-2")
    losses = shown(run.lines, "train/loss_sft")
    assert losses[-1] < losses[0]
    assert shown(run.lines, "train/kl_to_ref")[-1] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_whole_run_on_a_set_needs_no_engine(tmp_path, warm_tiny_model):
    problems = tiny.train_problems()[:40]
    rows = [{"prompt": p.question, "response": tiny.respond(p.combination, "careful")} for p in problems]
    path = as_jsonl(tmp_path / "set.jsonl", *rows, {"prompt": "unanswered"})
    run = Run(tmp_path / "run", "train.from_expert_set=set.jsonl", "logging.backend=none", cwd=tmp_path).wait()
    assert run.process.returncode == 0, run.output
    assert f"expert set: 40 responses from {path}, 0 of them by their token ids" in run.output
    assert "note: 1 of 41 rows were skipped: row 41 (no response)" in run.output
    assert "inference" not in run.output
    assert {log.stem for log in (run.dir / "logs").iterdir()} == {"reference", "trainer"}
    assert run.summary["status"] == "completed"
    assert run.summary["gradient_steps"] == 6  # 40 / 16, 2 epochs
    assert shown(run.metrics, "train/loss_sft")[-1] < shown(run.metrics, "train/loss_sft")[0]
    card = (run.dir / "last" / "README.md").read_text()
    assert "train.epochs" in card
    assert "train.topk_size" not in card
    for name in ("last/config.json", "checkpoints/checkpoint_6.pt", "report.html"):
        assert (run.dir / name).stat().st_size > 0, name
