"""`expert_iteration.checkpoint`: what is in a checkpoint, and when it is there."""

import math
import resource
import signal
import subprocess
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from builders import random_policy
from tensordict import TensorDict, lazy_stack

import ei_utils
from expert_iteration.checkpoint import (
    Checkpointer,
    RunParts,
    load_packed,
    load_rows,
    load_state,
    save_rows,
    weights_fingerprint,
)
from expert_iteration.checkpoint_files import newest_whole, open_checkpoint
from expert_iteration.config import to_plain_dict
from expert_iteration.devices import compute_device_allocation
from expert_iteration.errors import UserError
from expert_iteration.interruption import Interrupted, StopRequest
from expert_iteration.packed_weights import PackedWeights
from expert_iteration.policy_reader import PolicyReader
from expert_iteration.position import Position

# DESIGN section 5: other programs read these.
CONTRACT = {
    "step",
    "optim_step",
    "model_state_dict",
    "optimizer_state_dict",
    "scheduler_state_dict",
    "scaler_state_dict",
    "config",
}


def make_batch(seed):
    ids = torch.randint(400, (8,), generator=torch.Generator().manual_seed(seed))
    row = {
        ("tokens", "full"): ids,
        ("masks", "all_assistant_mask"): torch.arange(8) >= 3,
        ("next", "reward"): torch.tensor([1.0]),
        ("next", "ref_log_probs", "full"): torch.full((8,), -6.0),
    }
    return lazy_stack([TensorDict(row)])


@pytest.fixture
def cfg(make_cfg):
    return make_cfg("optimizer.scheduler.type=cosine_with_warmup", "optimizer.scheduler.warmup_steps=2")


@pytest.fixture
def make_learner(cfg, load_tiny_model, tiny_tokenizer):
    allocation = compute_device_allocation(cfg, num_accelerators=0)
    return lambda: ei_utils.make_learner(cfg, allocation, (load_tiny_model(), tiny_tokenizer))


@pytest.fixture
def learner(make_learner):
    learner = make_learner()
    learner.step(make_batch(0))
    return learner


def checkpointer_of(directory, learner, cfg, **changes):
    """A checkpointer of which all parts but the learner have nothing to say."""
    parts = {
        "position": Position(),
        "collector": SimpleNamespace(state_dict=dict),
        "replay_buffer": SimpleNamespace(state_dict=lambda: {"_storage": [], "_writer_state": None}),
        "learner": learner,
        "weight_updater": SimpleNamespace(state_dict=dict, pushed_weights=None, pushes=0),
        "evaluator": SimpleNamespace(state_dict=dict, latest={}, measured_pushes=0),
        "metrics": SimpleNamespace(state_dict=lambda: {"file_bytes": {}}),
        "reference_updater": SimpleNamespace(version=0, weights=None),
    }
    stop = changes.pop("stop", StopRequest())
    return Checkpointer(
        directory, RunParts(**(parts | changes)), cfg, about={"run_dir": "run"}, clock=lambda: 1.5, stop=stop
    )


def files(directory):
    return sorted(path.name for path in directory.iterdir())


# --- checkpoints ---


def test_a_checkpoint_loads_without_running_code_and_has_what_was_promised(learner, cfg, tmp_path):
    path = checkpointer_of(tmp_path / "made" / "for it", learner, cfg).save()
    assert path == tmp_path / "made" / "for it" / "checkpoint_1.pt"
    loaded = torch.load(path, weights_only=True)
    assert loaded.keys() >= CONTRACT
    assert (loaded["step"], loaded["optim_step"]) == (1, 1)
    assert loaded["config"] == to_plain_dict(cfg)
    assert loaded["config"]["optimizer"]["scheduler"]["type"] == "cosine_with_warmup"
    weights = learner.model.state_dict()
    assert loaded["model_state_dict"].keys() == weights.keys() >= {"lm_head.weight"}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded["model_state_dict"].items())


def tensors_in(state):
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for value in values for tensor in tensors_in(value)]


def test_every_tensor_is_on_the_cpu_when_it_is_written(learner, cfg, tmp_path, monkeypatch):
    """A checkpoint of a GPU must load where there is none; here `cpu` marks what it was asked to move."""
    move, save, moved, written = torch.Tensor.cpu, torch.save, [], []

    def cpu(tensor):
        moved.append(move(tensor).clone())
        return moved[-1]

    def look_and_save(state, file):
        if file.name.endswith(".pt.tmp"):
            written.extend(tensors_in(state))
        save(state, file)

    state = learner.state_dict()
    nested = {"extra": [torch.ones(2), (torch.zeros(3), {"deep": torch.ones(1)})]}
    monkeypatch.setattr(learner, "state_dict", lambda: state | nested)
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch, "save", look_and_save)
    path = checkpointer_of(tmp_path, learner, cfg).save()
    num_expected = len(tensors_in([state, nested, learner.model.state_dict()]))
    assert len(written) == num_expected > 3 * len(list(learner.model.parameters()))
    assert {id(tensor) for tensor in written} == {id(tensor) for tensor in moved}
    loaded = torch.load(path, weights_only=True)
    assert [part.shape for part in tensors_in(loaded["extra"])] == [(2,), (3,), (1,)]
    # Tied weights moved one by one would be two.
    assert loaded["model_state_dict"]["lm_head.weight"].data_ptr() == (
        loaded["model_state_dict"]["model.embed_tokens.weight"].data_ptr()
    )


def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(learner, make_learner, cfg, tmp_path):
    loaded = torch.load(checkpointer_of(tmp_path, learner, cfg).save(), weights_only=True)
    other = make_learner()
    other.load_checkpoint(loaded)
    for seed in (1, 2):
        assert learner.step(make_batch(seed)) == other.step(make_batch(seed))
    for one, two in zip(learner.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_checkpoint_of_other_weights_is_refused(learner):
    state = learner.checkpoint()
    state["model_state_dict"]["lm_head.bias"] = torch.zeros(3)
    del state["model_state_dict"]["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"2 tensors .* such as lm_head\.bias, model\.norm\.weight"):
        learner.load_checkpoint(state)


def test_with_adapters_a_checkpoint_holds_them_alone_and_names_their_base(
    make_cfg, load_tiny_model, tiny_tokenizer, tmp_path
):
    cfg = make_cfg("train_model.lora.enabled=true", "ref_model.num_devices=1")
    allocation = compute_device_allocation(cfg, num_accelerators=0)

    def start(seed):
        return ei_utils.make_learner(cfg, allocation, (random_policy(load_tiny_model(), seed), tiny_tokenizer))

    learner = start(seed=0)
    learner.step(make_batch(0))
    loaded = torch.load(checkpointer_of(tmp_path, learner, cfg).save(), weights_only=True)
    assert loaded["base_model"] == "tiny"
    adapters = dict(PolicyReader().adapters(learner.model))
    assert loaded["model_state_dict"].keys() == adapters.keys()
    assert all("lora_" in name for name in adapters)
    other = start(seed=1)
    other.load_checkpoint(loaded)
    assert learner.step(make_batch(1)) == other.step(make_batch(1))


def test_each_step_has_a_checkpoint_of_its_own_and_nothing_else_is_left(learner, cfg, tmp_path):
    checkpointer = checkpointer_of(tmp_path, learner, cfg)
    checkpointer.save()
    learner.step(make_batch(1))
    checkpointer.save()
    assert files(tmp_path) == ["checkpoint_1", "checkpoint_1.pt", "checkpoint_2", "checkpoint_2.pt"]
    assert torch.load(tmp_path / "checkpoint_2.pt", weights_only=True)["step"] == 2


def test_a_step_is_written_once(learner, cfg, tmp_path):
    checkpointer = checkpointer_of(tmp_path, learner, cfg)
    path = checkpointer.save()
    path.write_bytes(b"not written again")
    assert checkpointer.save() == path
    assert path.read_bytes() == b"not written again"


def test_the_name_appears_only_when_the_file_is_whole(learner, cfg, tmp_path, monkeypatch):
    save, seen = torch.save, []

    def look_while_saving(state, file):
        save(state, file)
        seen.append(files(tmp_path))

    monkeypatch.setattr(torch, "save", look_while_saving)
    checkpointer_of(tmp_path, learner, cfg).save()
    assert seen == [[".checkpoint_1.pt.tmp"], [".checkpoint_1.tmp", "checkpoint_1.pt"]]


def test_the_manifest_says_where_the_run_stands_and_the_files_are_as_it_says(learner, cfg, tmp_path):
    evaluator = SimpleNamespace(state_dict=dict, latest={"pass@1": 0.25, "reward": math.nan}, measured_pushes=0)
    writer_state = {"num_written": 3}
    buffer = SimpleNamespace(state_dict=lambda: {"_storage": [{"a": torch.ones(2)}], "_writer_state": writer_state})
    checkpointer_of(
        tmp_path, learner, cfg, evaluator=evaluator, replay_buffer=buffer, position=Position(pushed_at=1)
    ).save()
    checkpoint = open_checkpoint(tmp_path / "checkpoint_1")
    checkpoint.verify()
    manifest = checkpoint.manifest
    assert {name: manifest[name] for name in ("step", "optimizer_steps", "num_batches", "seconds", "score")} == {
        "step": 1,
        "optimizer_steps": 1,
        "num_batches": 3,
        "seconds": 1.5,
        "score": 0.25,
    }
    assert manifest["evaluation"]["reward"] is None
    assert manifest["config"]["train"]["topk_size"] == 2
    assert set(manifest["files"]) == {"checkpoint_1.pt", "checkpoint_1/state.pt", "checkpoint_1/buffer.td"}
    state = load_state(checkpoint.folder)
    assert torch.equal(state["buffer"]["_storage"][0]["a"], torch.ones(2))


@pytest.mark.parametrize(("pushed_at", "measured_pushes"), [(0, 0), (1, 1)])
def test_a_score_is_of_the_weights_that_are_saved_or_there_is_none(learner, cfg, tmp_path, pushed_at, measured_pushes):
    evaluator = SimpleNamespace(state_dict=dict, latest={"pass@1": 0.25}, measured_pushes=measured_pushes)
    checkpointer_of(tmp_path, learner, cfg, evaluator=evaluator, position=Position(pushed_at=pushed_at)).save()
    assert open_checkpoint(tmp_path / "checkpoint_1").manifest["score"] is None


def test_a_checkpoint_from_before_its_evaluation_is_written_again(learner, cfg, tmp_path):
    evaluator = SimpleNamespace(state_dict=dict, latest={}, measured_pushes=0)
    checkpointer = checkpointer_of(tmp_path, learner, cfg, evaluator=evaluator, position=Position(pushed_at=1))
    checkpointer.save()
    evaluator.latest = {"pass@1": 0.5}
    checkpointer.save()
    assert open_checkpoint(tmp_path / "checkpoint_1").manifest["score"] is None
    checkpointer.save(again=True)
    checkpoint = open_checkpoint(tmp_path / "checkpoint_1")
    checkpoint.verify()
    assert checkpoint.manifest["score"] == 0.5


def test_rows_come_back_with_texts_and_lengths_of_their_own(tmp_path):
    rows = [
        {"tokens": {"full": torch.arange(n)}, "text": {"response": "é" * n}, "finish_reason": "stop"} for n in (3, 5)
    ]
    save_rows(rows, tmp_path / "rows")
    loaded = load_rows(tmp_path / "rows")
    (tmp_path / "rows").unlink()
    assert [row["text"]["response"] for row in loaded] == ["ééé", "ééééé"]
    assert [row["tokens"]["full"].tolist() for row in loaded] == [[0, 1, 2], [0, 1, 2, 3, 4]]


def packed(value):
    weights = {"a": torch.full((3,), value), "b": torch.full((2, 2), value, dtype=torch.bfloat16)}
    made = PackedWeights.allocate(weights.items(), torch.float32)
    made.pack(weights.items())
    return made


@pytest.mark.parametrize(
    ("overrides", "pushed_at", "kept"),
    [
        ((), 0, False),  # the engine is pushed to before it is used again
        (("train.weight_update_frequency=4",), 0, True),
        (("train.weight_update_frequency=4",), 1, False),  # it has what the checkpoint has
    ],
)
def test_the_weights_of_the_last_push_are_kept_where_the_engine_goes_on_with_them(
    make_cfg, learner, tmp_path, overrides, pushed_at, kept
):
    updater = SimpleNamespace(state_dict=dict, pushed_weights=packed(2.0), pushes=0)
    position = Position(pushed_at=pushed_at)
    checkpointer_of(tmp_path, learner, make_cfg(*overrides), weight_updater=updater, position=position).save()
    loaded = load_packed(tmp_path / "checkpoint_1" / "engine.safetensors")
    assert (loaded is not None) == kept
    if loaded is not None:
        assert {name: tensor.tolist() for name, tensor in loaded} == {"a": [2.0] * 3, "b": [[2.0] * 2] * 2}
        assert loaded.layout == updater.pushed_weights.layout


def test_models_of_one_shape_have_other_fingerprints(load_tiny_model):
    first, second = load_tiny_model(), load_tiny_model()
    assert weights_fingerprint(first) == weights_fingerprint(second)
    second.model.norm.weight.data[0] += 1e-6
    assert weights_fingerprint(first) != weights_fingerprint(second)


# --- disks that are full, and directories that may not be written to ---


@contextmanager
def files_no_larger_than(num_bytes):
    """As on a full disk, writing fails in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def big_rows():
    return {"_storage": [{"a": torch.ones(4_000_000)}], "_writer_state": None}


BIG = {  # what is too big, by the part that is asked for it
    "weights": {},
    "state": {"collector": SimpleNamespace(state_dict=lambda: {"big": torch.ones(4_000_000)})},
    "pushed": {"weight_updater": SimpleNamespace(state_dict=dict, pushed_weights=None)},
}


@pytest.mark.parametrize("part", BIG)
def test_a_disk_that_fills_up_leaves_the_checkpoint_before_and_says_so(make_cfg, learner, tmp_path, part):
    cfg = make_cfg("train.weight_update_frequency=4")
    if part == "pushed":
        BIG[part]["weight_updater"].pushed_weights = PackedWeights([], torch.ones(16_000_000, dtype=torch.uint8))
    checkpointer_of(tmp_path, learner, cfg).save()
    before = files(tmp_path)
    learner.step(make_batch(1))
    checkpointer = checkpointer_of(tmp_path, learner, cfg, **BIG[part])
    limit = 1_000_000 if part == "weights" else 15_000_000
    with files_no_larger_than(limit), pytest.raises(UserError, match=r"checkpoint_2\.pt could not be written") as error:
        checkpointer.save()
    assert "File too large" in str(error.value)
    assert str(tmp_path / "checkpoint_1") in str(error.value)
    assert set(before) <= set(files(tmp_path)) <= {*before, "checkpoint_2.pt"}
    checkpoint, complaints = newest_whole(tmp_path)
    assert (checkpoint.step, complaints) == (1, [])
    checkpointer.save()
    assert newest_whole(tmp_path)[0].step == 2


# Two checkpoints of the tiny model take 11 MB; the rows of a mapped file must not kill the process.
@pytest.mark.parametrize(
    ("megabytes", "parts"), [(8, {}), (16, {"replay_buffer": SimpleNamespace(state_dict=big_rows)})]
)
def test_a_full_disk(learner, cfg, tmp_path, megabytes, parts):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let tests mount a small disk")
    try:
        checkpointer_of(disk, learner, cfg).save()
        learner.step(make_batch(1))
        with pytest.raises(UserError, match="No space left on device"):
            checkpointer_of(disk, learner, cfg, **parts).save()
        assert newest_whole(disk)[0].step == 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_directory_that_cannot_be_made_is_said(learner, cfg, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Not a directory.*There is none before it.*resume_from"):
        checkpointer_of(tmp_path / "file" / "checkpoints", learner, cfg).save()


# --- being asked to stop ---


def test_a_run_that_is_asked_to_stop_saves_first(learner, cfg, tmp_path):
    stop = StopRequest()
    checkpointer = checkpointer_of(tmp_path, learner, cfg, stop=stop)
    checkpointer.stop_if_asked()
    assert files(tmp_path) == []
    stop.signum = signal.SIGTERM
    with pytest.raises(Interrupted, match="SIGTERM"):
        checkpointer.stop_if_asked()
    assert newest_whole(tmp_path)[0].step == 1
