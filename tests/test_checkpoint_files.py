"""`expert_iteration.checkpoint_files`: which checkpoints are whole, which is the newest, which may go."""

import json

import pytest

from expert_iteration.checkpoint_files import (
    SavedCheckpoint,
    choose_superfluous,
    list_folders,
    newest_whole,
    open_checkpoint,
    prune,
    replacing,
    write_manifest,
)
from expert_iteration.errors import UserError


def save(directory, step, score=None):
    """A checkpoint of two small files."""
    weights, folder = directory / f"checkpoint_{step}.pt", directory / f"checkpoint_{step}"
    weights.write_bytes(b"weights" * step)
    with replacing(folder) as temporary:
        temporary.mkdir()
        (temporary / "state.pt").write_bytes(b"state")
        write_manifest(temporary, [weights, temporary / "state.pt"], {"step": step, "score": score})
    return folder


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_checkpoint_that_is_as_it_was_written_is_whole(tmp_path):
    checkpoint = open_checkpoint(save(tmp_path, 3))
    checkpoint.verify()
    assert (checkpoint.step, checkpoint.weights) == (3, tmp_path / "checkpoint_3.pt")


def cut(folder):
    folder.with_name("checkpoint_3.pt").write_bytes(b"weightsweig")


def change(folder):
    (folder / "state.pt").write_bytes(b"stAte")


def lose(folder):
    folder.with_name("checkpoint_3.pt").unlink()


def lose_manifest(folder):
    (folder / "manifest.json").unlink()


def garble_manifest(folder):
    (folder / "manifest.json").write_text("{")


def age_manifest(folder):
    (folder / "manifest.json").write_text(json.dumps({"format": 0}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "checkpoint_3.pt has 11 bytes in place of 21"),
        (change, "checkpoint_3/state.pt holds other bytes"),
        (lose, "checkpoint_3.pt is missing"),
        (lose_manifest, "no readable manifest.json"),
        (garble_manifest, "no readable manifest.json"),
    ],
)
def test_what_is_wrong_with_a_damaged_one_is_said_and_the_one_before_is_taken(tmp_path, damage, said):
    save(tmp_path, 2)
    damage(save(tmp_path, 3))
    checkpoint, complaints = newest_whole(tmp_path)
    assert checkpoint.step == 2
    (complaint,) = complaints
    assert complaint.startswith("checkpoint_3 is damaged: ")
    assert said in complaint


def test_one_of_another_version_is_no_damage_to_pass_over(tmp_path):
    age_manifest(save(tmp_path, 3))
    with pytest.raises(UserError, match=r"another version \(format 0, this one has 2\)"):
        newest_whole(tmp_path)


def test_there_may_be_none(tmp_path):
    assert newest_whole(tmp_path) == (None, [])
    assert newest_whole(tmp_path / "not there") == (None, [])


def test_steps_are_numbers(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert newest_whole(tmp_path)[0].step == 100
    assert [folder.name for folder in list_folders(tmp_path)] == ["checkpoint_9", "checkpoint_10", "checkpoint_100"]


def test_a_crash_in_the_middle_leaves_what_was_there(tmp_path):
    save(tmp_path, 3)
    before = names(tmp_path)

    def crash():
        with replacing(tmp_path / "checkpoint_3") as temporary:
            temporary.mkdir()
            (temporary / "half").write_text("")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        crash()
    assert names(tmp_path) == before
    open_checkpoint(tmp_path / "checkpoint_3").verify()


def test_a_folder_takes_the_place_of_another(tmp_path):
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "old").write_text("")
    with replacing(tmp_path / "last") as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "new").write_text("")
    assert names(tmp_path / "last") == ["inner", "new"]
    assert names(tmp_path) == ["last"]


@pytest.mark.parametrize(
    ("scores", "keep", "left"),
    [
        ([None] * 5, 3, [3, 4, 5]),
        ([0.1, 0.9, 0.2, 0.3, 0.4], 3, [2, 4, 5]),  # the best stays
        ([0.1, 0.2, 0.3, 0.4, 0.9], 3, [3, 4, 5]),  # the best is the last
        ([0.1, 0.9, 0.2, 0.3, 0.4], 1, [2, 5]),  # last and best always stay
        ([0.9, None, None, None, None], 2, [1, 5]),
        ([0.5, 0.5], 3, [1, 2]),
    ],
)
def test_the_last_and_the_best_stay_and_of_the_others_the_newest(tmp_path, scores, keep, left):
    for step, score in enumerate(scores, start=1):
        save(tmp_path, step, score)
    (tmp_path / "checkpoint_7.pt").write_bytes(b"of a crash before its folder was there")
    (tmp_path / ".checkpoint_8.tmp").mkdir()
    (tmp_path / "notes.txt").write_text("not ours")
    prune(tmp_path, keep)
    expected = [name for step in left for name in (f"checkpoint_{step}", f"checkpoint_{step}.pt")]
    assert names(tmp_path) == sorted([*expected, "notes.txt"])
    for step in left:
        open_checkpoint(tmp_path / f"checkpoint_{step}").verify()


def test_one_that_cannot_be_read_ends_no_run(tmp_path):
    garble_manifest(save(tmp_path, 1))
    for step in (2, 3, 4):
        save(tmp_path, step)
    prune(tmp_path, keep=2)
    assert [folder.name for folder in list_folders(tmp_path)] == ["checkpoint_1", "checkpoint_3", "checkpoint_4"]


def test_none_is_superfluous_where_there_is_none(tmp_path):
    assert choose_superfluous([], 3) == []
    one = SavedCheckpoint(tmp_path, {"step": 1, "score": None})
    assert choose_superfluous([one], 1) == []
