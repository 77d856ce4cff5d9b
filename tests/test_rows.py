"""`expert_iteration.rows`: files, directories and saved data sets, and what is wrong with them."""

import csv
import json

import datasets
import pytest

from expert_iteration.errors import UserError
from expert_iteration.rows import brief, first_three, read_path

ROWS = [{"question": f"{i} apples and {i}?", "answer": f"#### {2 * i}"} for i in range(10)]


def read(path):
    """All splits, with their rows."""
    return {split: rows() for split, rows in read_path(path).items()}


def write_jsonl(path, rows=ROWS):
    path.write_text("\n".join(json.dumps(row) for row in rows))


def write_json(path, rows=ROWS):
    path.write_text(json.dumps(rows))


def write_csv(path, rows=ROWS):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows=ROWS):
    datasets.Dataset.from_list(rows).to_parquet(str(path))


FORMS = {
    "rows.jsonl": write_jsonl,
    "rows.JSONL": write_jsonl,
    "rows.json": write_json,
    "one_object_a_line.json": write_jsonl,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
    "directory": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(str(path)),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_gives_the_same_rows(tmp_path, name):
    FORMS[name](tmp_path / name)
    assert read(tmp_path / name) == {"train": ROWS}


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        ({"train.jsonl": 6, "test.jsonl": 4}, {"train": 6, "test": 4}),
        ({"train.csv": 6, "test.parquet": 4, "README.md": None, "train_notes.txt": None}, {"train": 6, "test": 4}),
        ({"data/train-00000-of-00001.parquet": 6, "data/dev-00000-of-00001.parquet": 4}, {"train": 6, "dev": 4}),
        ({"part-0.jsonl": 6, "part-1.jsonl": 4}, {"train": 10}),
    ],
)
def test_files_of_a_directory_are_splits_by_their_names(tmp_path, files, splits):
    left = list(ROWS)
    for name, count in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if count is None:
            path.write_text("text")
        else:
            FORMS[f"rows{path.suffix}"](path, [left.pop(0) for _ in range(count)])
    found = read(tmp_path)
    assert {split: len(rows) for split, rows in found.items()} == splits
    assert [row for split in splits for row in found[split]] == ROWS


def test_a_saved_data_set_keeps_its_splits(tmp_path):
    splits = {"train": ROWS[:6], "test": ROWS[6:]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved") == splits


def test_separators_that_json_allows_in_a_string_do_not_split_a_row(tmp_path):
    row = {"question": "one\u2028two\x85three", "answer": "1"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    assert read(tmp_path / "rows.jsonl") == {"train": [row]}


@pytest.mark.parametrize("line", ["{not json", "[" * 100_000, '{"answer": ' + "1" * 5000 + "}"])
def test_a_line_that_cannot_be_read_leaves_the_others_readable(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}')
    assert read(tmp_path / "rows.jsonl") == {"train": [{"a": 1}, None, {"a": 2}]}


def test_a_cell_of_any_length_leaves_a_csv_file_readable(tmp_path):
    write_csv(tmp_path / "rows.csv", [{"a": "x" * 200_000}, {"a": "short"}])
    limit = csv.field_size_limit()
    assert read(tmp_path / "rows.csv")["train"][1] == {"a": "short"}
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.json", '[{"question": ', "broken.json cannot be read .*mend the file"),
        ("object.json", '{"question": "x"}', "a JSON dict, not a list of rows"),
        ("deep.json", "[" * 100_000, "nested too deeply"),
        ("broken.parquet", "no parquet", "cannot be read"),
        ("rows.txt", "x", "unknown form: give one of .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / name)
    assert len(str(error.value)) < 500


def test_a_column_that_comes_twice_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("q,a,q,,\n1,2,3,,\n")
    with pytest.raises(UserError, match=r"rows\.csv cannot be read .its header has 'q' more than once"):
        read(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text("q,a,,\n1,2,,\n")  # as spreadsheets write empty columns
    assert read(tmp_path / "rows.csv")["train"][0]["a"] == "2"


def test_numbers_of_float32_are_those_that_were_written(tmp_path):
    numbers = [0.1, 1e-5, 3e20, None, 16777216.0]
    kinds = datasets.Features({"a": datasets.Value("float32"), "b": datasets.Value("float64")})
    made = datasets.Dataset.from_dict({"a": numbers, "b": [1 / 3] * 5}, features=kinds)
    made.to_parquet(str(tmp_path / "rows.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    for name in ("rows.parquet", "saved"):
        assert read(tmp_path / name)["train"] == [{"a": number, "b": 1 / 3} for number in numbers]


def test_a_directory_may_have_any_name(tmp_path):
    folder = tmp_path / "my [1] *data?"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl")
    assert read(folder) == {"train": ROWS}


def test_other_paths_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(UserError, match=r"latin\.jsonl cannot be read"):
        read(tmp_path / "latin.jsonl")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.txt").touch()
    with pytest.raises(UserError, match=r"no file of the form \.jsonl, \.json, \.csv, \.parquet and no saved data set"):
        read(tmp_path / "texts")


def test_what_a_message_repeats_is_short():
    assert brief("one\n two") == "one two"
    assert brief("x" * 100_000) == "x" * 120 + "..."
    assert first_three(["a", "b", "c", "d"]) == "a, b, c, ..."
