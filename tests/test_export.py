"""`expert_iteration.export`: folders that others load, that score as the policy does, and that are whole."""

import json
import os
import resource

import pytest
import torch
from builders import random_policy
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2ForCausalLM

from expert_iteration.chat_template import chat_prompt_ids
from expert_iteration.checkpoint_files import tidy
from expert_iteration.errors import UserError
from expert_iteration.export import Exporter, make_generation_config, save_pretrained
from expert_iteration.policy_reader import PolicyReader
from expert_iteration.transformers_engine import TransformersEngine

FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
LORA = "train_model.lora.enabled=true"


@pytest.fixture
def make_exporter(make_cfg, tiny_folder, tiny_tokenizer):
    """A function from a policy to what exports it."""

    def make(policy, *overrides):
        cfg = make_cfg(f"model.name={tiny_folder}", *overrides)
        return Exporter(cfg, policy, tiny_tokenizer, PolicyReader())

    return make


@pytest.fixture
def sequences(tiny_tokenizer):
    """Prompts with responses."""
    prompt = chat_prompt_ids(tiny_tokenizer, "Be brief.", "Amy has 3 apples. How many?")
    return [prompt + tiny_tokenizer(f"<think>{n}</think><answer>{n}</answer>")["input_ids"] for n in (3, 12)]


def changed(model):
    """The model after some training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def files(folder):
    return {path.name for path in folder.iterdir()}


# --- the exported policy ---


@pytest.mark.parametrize("has_adapters", [False, True])
def test_the_folder_scores_as_the_policy_does(
    load_tiny_model, make_exporter, tiny_tokenizer, sequences, tmp_path, has_adapters
):
    policy = random_policy(load_tiny_model()) if has_adapters else changed(load_tiny_model())
    make_exporter(policy, *([LORA] if has_adapters else [])).export(tmp_path / "last", card="# A card\n")
    assert files(tmp_path) == {"last"}
    assert files(tmp_path / "last") == FILES | ({"adapters"} if has_adapters else set())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "last")
    scores, expected, start = (
        torch.tensor(PolicyReader().score(model, sequences)[0]) for model in (loaded, policy, load_tiny_model())
    )
    assert (expected - start).abs().max() > 0.1
    # Adapters are added to the weights in place of the products: rounding of float32.
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4 if has_adapters else 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "last")
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert (tmp_path / "last" / "README.md").read_text() == "# A card\n"


def test_the_adapters_alone_give_the_policy_too(
    load_tiny_model, make_exporter, sequences, tmp_path, tiny_folder, tiny_tokenizer
):
    policy = random_policy(load_tiny_model())
    make_exporter(policy, LORA).export(tmp_path / "last", card="")
    folder = tmp_path / "last" / "adapters"
    tokenizer_files = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert files(folder) == {"adapter_config.json", "adapter_model.safetensors"} | tokenizer_files
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny_tokenizer.chat_template
    loaded = PeftModel.from_pretrained(load_tiny_model(), folder)
    assert PolicyReader().score(loaded, sequences) == PolicyReader().score(policy, sequences)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_folder)


def test_adapters_name_a_hub_model_by_its_id(load_tiny_model, make_exporter, tmp_path):
    make_exporter(random_policy(load_tiny_model()), LORA, "model.name=ORG/MODEL").export(tmp_path / "last", card="")
    config = json.loads((tmp_path / "last" / "adapters" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "ORG/MODEL"


def test_the_weights_are_in_the_engines_type(load_tiny_model, make_exporter, tmp_path):
    make_exporter(load_tiny_model(), "inference_model.torch_dtype=bfloat16").export(tmp_path / "last", card="")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "last").dtype is torch.bfloat16


def test_it_generates_as_the_run_did(make_cfg, tiny_tokenizer):
    config = make_cfg("inference_model.temperature=0.8", "inference_model.top_p=0.9").inference_model
    published = GenerationConfig(eos_token_id=7, bos_token_id=3, repetition_penalty=1.3, top_k=20)
    made = make_generation_config(config, tiny_tokenizer, published).to_diff_dict()
    made.pop("transformers_version")
    assert made == {
        "bos_token_id": 3,
        "eos_token_id": [tiny_tokenizer.convert_tokens_to_ids("<|im_end|>"), 7],
        "pad_token_id": tiny_tokenizer.pad_token_id,
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 0,
        "max_new_tokens": 32,
    }


def test_engines_stop_where_they_stopped_before(load_tiny_model, make_exporter, tmp_path, tiny_folder, make_cfg):
    make_exporter(load_tiny_model()).export(tmp_path / "last", card="")
    config, folders = make_cfg().inference_model, (tiny_folder, tmp_path / "last")
    stops = [TransformersEngine(str(folder), config, batch_size=1)._stop_token_ids for folder in folders]
    assert stops[0] == stops[1]


# --- whole or not there ---


def test_a_folder_takes_the_place_of_the_one_before(load_tiny_model, make_exporter, tmp_path, sequences):
    policy = load_tiny_model()
    exporter = make_exporter(policy)
    exporter.export(tmp_path / "best", card="one")
    (tmp_path / "best" / "left.over").touch()
    changed(policy)
    exporter.export(tmp_path / "best", card="two")
    assert files(tmp_path) == {"best"}
    assert files(tmp_path / "best") == FILES
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "best")
    assert PolicyReader().score(loaded, sequences) == PolicyReader().score(policy, sequences)


def test_a_full_disk_leaves_the_folder_before_and_says_so(load_tiny_model, make_exporter, tmp_path, monkeypatch):
    policy = load_tiny_model()
    exporter = make_exporter(policy)
    exporter.export(tmp_path / "best", card="one")

    save, limits = exporter._tokenizer.save_pretrained, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_on_a_full_disk(folder):
        assert files(tmp_path) == {"best", ".best.tmp"}
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # less than tokenizer.json
        try:
            save(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(exporter._tokenizer, "save_pretrained", save_on_a_full_disk)
    with pytest.raises(UserError, match=r"best \(File too large \(os error 27\)\).*resume_from"):
        exporter.export(tmp_path / "best", card="two")
    assert files(tmp_path) == {"best"}
    assert (tmp_path / "best" / "README.md").read_text() == "one"
    AutoModelForCausalLM.from_pretrained(tmp_path / "best")


def test_a_mistake_is_no_full_disk(load_tiny_model, make_exporter, tmp_path, monkeypatch):
    exporter = make_exporter(load_tiny_model())
    monkeypatch.setattr(exporter._tokenizer, "save_pretrained", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exporter.export(tmp_path / "best", card="")


def test_a_crash_between_two_names_is_mended(load_tiny_model, make_exporter, tmp_path):
    make_exporter(load_tiny_model()).export(tmp_path / "best", card="one")
    os.rename(tmp_path / "best", tmp_path / ".best.old")
    (tmp_path / ".best.tmp" / "adapters").mkdir(parents=True)
    tidy(tmp_path / "best")
    assert files(tmp_path) == {"best"}
    assert files(tmp_path / "best") == FILES
    tidy(tmp_path / "best")  # where nothing is amiss
    assert files(tmp_path / "best") == FILES


# --- the model in it ---


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
