"""`expert_iteration.weights_directory`: where weights pass through, and that nothing of them stays."""

from collections import namedtuple

import pytest

from expert_iteration import weights_directory
from expert_iteration.weights_directory import choose_directory, remove_directories

NUM_BYTES = 1000


@pytest.fixture
def set_free(tmp_path, monkeypatch):
    """A function that gives the shared memory, a folder here, so many free bytes."""
    memory = tmp_path / "shm"
    memory.mkdir()
    monkeypatch.setattr(weights_directory, "SHARED_MEMORY", memory)

    def set_free(num_bytes):
        usage = namedtuple("usage", "total used free")(10**9, 10**9 - num_bytes, num_bytes)
        monkeypatch.setattr(weights_directory.shutil, "disk_usage", {memory: usage}.__getitem__)
        return memory

    return set_free


@pytest.mark.parametrize(("free", "fits"), [(3 * NUM_BYTES + 1, True), (3 * NUM_BYTES, False)])
def test_weights_pass_through_shared_memory_if_three_versions_fit_there(tmp_path, set_free, free, fits):
    memory, run_dir = set_free(free), tmp_path / "run"
    directory = choose_directory(run_dir, NUM_BYTES)
    assert directory.is_dir()
    assert directory.parent == (memory if fits else run_dir)


def test_without_shared_memory_they_pass_through_the_run_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_directory, "SHARED_MEMORY", tmp_path / "not there")
    assert choose_directory(tmp_path / "run", NUM_BYTES).parent == tmp_path / "run"


def test_two_runs_never_share_a_directory(tmp_path, set_free):
    set_free(10**6)
    assert choose_directory(tmp_path / "one", NUM_BYTES) != choose_directory(tmp_path / "two", NUM_BYTES)


@pytest.mark.parametrize("free", [10**6, 0])
def test_what_a_killed_run_left_is_found_again_and_removed_and_nothing_else(tmp_path, set_free, free):
    set_free(free)
    directory, other = (choose_directory(tmp_path / name, NUM_BYTES) for name in ("run", "other"))
    for folder in (directory, other):
        (folder / "weights-3.pt").write_bytes(b"a version in flight")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "summary.json").write_text("{}")
    for _ in range(2):  # the second time there is nothing, which is no error
        remove_directories(tmp_path / "run")
    assert not directory.exists()
    assert (other / "weights-3.pt").exists()
    assert (tmp_path / "run" / "summary.json").exists()
