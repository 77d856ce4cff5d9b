"""`expert_iteration.checkpoint`: what is in a checkpoint, when it is there, and the model as a Hugging Face folder."""

import json

import pytest
import torch
from builders import random_policy
from safetensors import safe_open
from tensordict import TensorDict, lazy_stack
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

import ei_utils
from expert_iteration.checkpoint import Checkpointer, save_pretrained
from expert_iteration.config import to_plain_dict
from expert_iteration.devices import compute_device_allocation
from expert_iteration.policy_reader import PolicyReader

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


def files(directory):
    return sorted(path.name for path in directory.iterdir())


# --- checkpoints ---


def test_a_checkpoint_loads_without_running_code_and_has_what_was_promised(learner, cfg, tmp_path):
    path = Checkpointer(tmp_path / "made" / "for it", learner, cfg).save()
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

    def look_and_save(state, path):
        written.extend(tensors_in(state))
        save(state, path)

    state = learner.state_dict()
    nested = {"extra": [torch.ones(2), (torch.zeros(3), {"deep": torch.ones(1)})]}
    monkeypatch.setattr(learner, "state_dict", lambda: state | nested)
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch, "save", look_and_save)
    path = Checkpointer(tmp_path, learner, cfg).save()
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
    loaded = torch.load(Checkpointer(tmp_path, learner, cfg).save(), weights_only=True)
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
    loaded = torch.load(Checkpointer(tmp_path, learner, cfg).save(), weights_only=True)
    assert loaded["base_model"] == "tiny"
    adapters = dict(PolicyReader().adapters(learner.model))
    assert loaded["model_state_dict"].keys() == adapters.keys()
    assert all("lora_" in name for name in adapters)
    other = start(seed=1)
    other.load_checkpoint(loaded)
    assert learner.step(make_batch(1)) == other.step(make_batch(1))


def test_each_step_has_a_checkpoint_of_its_own_and_nothing_else_is_left(learner, cfg, tmp_path):
    checkpointer = Checkpointer(tmp_path, learner, cfg)
    checkpointer.save()
    learner.step(make_batch(1))
    checkpointer.save()
    assert files(tmp_path) == ["checkpoint_1.pt", "checkpoint_2.pt"]
    assert torch.load(tmp_path / "checkpoint_2.pt", weights_only=True)["step"] == 2


def test_a_step_is_written_once(learner, cfg, tmp_path):
    checkpointer = Checkpointer(tmp_path, learner, cfg)
    path = checkpointer.save()
    path.write_bytes(b"not written again")
    assert checkpointer.save() == path
    assert path.read_bytes() == b"not written again"


def test_an_error_while_saving_leaves_the_previous_checkpoint_and_no_part_of_the_new(
    learner, cfg, tmp_path, monkeypatch
):
    checkpointer = Checkpointer(tmp_path, learner, cfg)
    checkpointer.save()
    learner.step(make_batch(1))

    def fill_the_disk(state, path):
        path.write_bytes(b"half a checkpoint")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill_the_disk)
        with pytest.raises(OSError, match="No space left"):
            checkpointer.save()
    assert files(tmp_path) == ["checkpoint_1.pt"]
    assert torch.load(tmp_path / "checkpoint_1.pt", weights_only=True)["step"] == 1
    checkpointer.save()
    assert files(tmp_path) == ["checkpoint_1.pt", "checkpoint_2.pt"]


def test_the_name_appears_only_when_the_file_is_whole(learner, cfg, tmp_path, monkeypatch):
    save, seen = torch.save, []

    def look_while_saving(state, path):
        save(state, path)
        seen.append(files(tmp_path))

    monkeypatch.setattr(torch, "save", look_while_saving)
    Checkpointer(tmp_path, learner, cfg).save()
    ((name,),) = seen
    assert not name.endswith(".pt")
    assert files(tmp_path) == ["checkpoint_1.pt"]


# --- Hugging Face folders ---


def untied(model):
    """The same model with a head of its own."""
    config = type(model.config).from_dict({**model.config.to_dict(), "tie_word_embeddings": False})
    copy = Qwen2ForCausalLM(config)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        copy.lm_head.weight.mul_(1.5)
    return copy.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_gives_the_model_back(load_tiny_model, tiny_tokenizer, tmp_path, tied, dtype):
    model = load_tiny_model() if tied else untied(load_tiny_model())
    save_pretrained(model, tiny_tokenizer, tmp_path, dtype)
    as_saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in as_saved.parameters()} == {dtype}
    # Computed in float32 on both sides, so that rounding the weights is the only difference there may be.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    chat = [{"role": "user", "content": "Amy has 3 apples."}]
    ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=False)
    assert ids.tolist() == tiny_tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=False).tolist()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_adapters_are_saved_merged_as_an_ordinary_model(load_tiny_model, tiny_tokenizer, tmp_path):
    policy = random_policy(load_tiny_model()).eval()
    save_pretrained(policy, tiny_tokenizer, tmp_path, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in load_tiny_model().named_parameters()}
    ids = torch.arange(8)[None]
    with torch.no_grad():
        found, expected = loaded(ids).logits, policy(ids).logits
        assert (expected - load_tiny_model()(ids).logits).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_tied_weights_that_are_read_as_copies_are_written_once(load_tiny_model, tiny_tokenizer, tmp_path):
    """As of a sharded policy, whose tensors are gathered one by one."""

    class CopyingReader(PolicyReader):
        def _whole(self, tensor):
            return tensor.clone()

    save_pretrained(load_tiny_model(), tiny_tokenizer, tmp_path, torch.float32, CopyingReader())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {"model.embed_tokens.weight"} == {"model.embed_tokens.weight", "lm_head.weight"} & set(file.keys())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_are_written_once(load_tiny_model, tiny_tokenizer, tmp_path, dtype):
    save_pretrained(load_tiny_model(), tiny_tokenizer, tmp_path, dtype)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {dtype}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True


def test_saving_leaves_the_model_as_it_was_and_may_be_repeated(load_tiny_model, tiny_tokenizer, tmp_path):
    model = load_tiny_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        save_pretrained(model, tiny_tokenizer, tmp_path, torch.bfloat16)
    assert model.training
    assert str(model.config.dtype).removeprefix("torch.") == "float32"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
