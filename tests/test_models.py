"""`expert_iteration.models`: what a tokenizer and its chat template say of a turn, and how models are loaded."""

import pytest
import torch
from chat_tokenizers import BARE, CHATML, MISTRAL, llama_tokenizer, make_tokenizer, qwen_base_tokenizer

from expert_iteration.errors import UserError
from expert_iteration.models import (
    chat_prompt_ids,
    end_of_turn_id,
    load_model,
    load_tokenizer,
    model_path,
)


def end_of_turn(tokenizer):
    return tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))


# --- the end of a turn ---


def test_the_tiny_model_ends_its_turn_with_im_end(tiny_tokenizer):
    assert end_of_turn(tiny_tokenizer) == "<|im_end|>"


@pytest.mark.parametrize("eos", ["<|eot_id|>", "<|end_of_text|>"])
def test_llama_3_ends_its_turn_with_eot_id_whatever_ends_a_text(eos):
    assert end_of_turn(llama_tokenizer(eos)) == "<|eot_id|>"


def test_a_base_model_ends_its_turn_as_the_template_says_and_not_with_its_end_of_text():
    tokenizer = qwen_base_tokenizer()
    assert tokenizer.eos_token == "<|endoftext|>"
    assert end_of_turn(tokenizer) == "<|im_end|>"


def test_an_end_of_turn_right_behind_the_text_is_found():
    tokenizer = make_tokenizer(MISTRAL, ["</s>"], eos_token="</s>")
    assert end_of_turn(tokenizer) == "</s>"


def test_an_end_of_turn_that_is_added_but_not_special_is_found():
    tokenizer = make_tokenizer(CHATML, ["<|endoftext|>", "<|im_start|>"], eos_token="<|endoftext|>")
    tokenizer.add_tokens(["<|im_end|>"])
    assert "<|im_end|>" not in tokenizer.all_special_tokens
    assert end_of_turn(tokenizer) == "<|im_end|>"


def test_a_template_without_an_end_of_turn_ends_with_the_end_of_text():
    assert end_of_turn(make_tokenizer(BARE, ["</s>"], eos_token="</s>")) == "</s>"


def test_a_turn_that_nothing_ends_is_refused():
    with pytest.raises(UserError, match="would not stop"):
        end_of_turn_id(make_tokenizer(BARE, []))


# --- prompts ---


def test_a_prompt_is_templated_once_up_to_where_the_response_begins():
    tokenizer = llama_tokenizer()
    words = "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> Be brief . <|eot_id|> "
    words += "<|start_header_id|> user <|end_header_id|> question <|eot_id|> <|start_header_id|> assistant"
    # One <|begin_of_text|>: the template writes it, and the tokenizer, which would by itself, adds no other.
    expected = [*words.split(), "<|end_header_id|>"]
    ids = chat_prompt_ids(tokenizer, "Be brief.", "question")
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert tokenizer("question")["input_ids"][0] == tokenizer.bos_token_id
    assert all(type(token) is int for token in ids)


def test_without_a_system_prompt_there_is_no_system_turn():
    tokenizer = llama_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(chat_prompt_ids(tokenizer, None, "question"))
    assert (tokens.count("system"), tokens.count("user"), tokens.count("<|eot_id|>")) == (0, 1, 1)


# --- loading ---


def test_a_tokenizer_without_a_chat_template_is_refused_by_name(tmp_path):
    make_tokenizer(None, ["</s>"], eos_token="</s>").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="without a chat template") as refusal:
        load_tokenizer(str(tmp_path))
    assert f"model.name ({tmp_path})" in str(refusal.value)


def test_a_saved_template_comes_back(tiny_folder):
    assert load_tokenizer(str(tiny_folder)).chat_template == CHATML


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_loaded_in_its_dtype_ready_to_score(tiny_folder, dtype):
    model = load_model(str(tiny_folder), dtype=dtype, attn_implementation="eager", device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.config._attn_implementation == "eager"
    assert not model.training


def test_the_model_is_the_one_named_or_the_built_in(make_cfg, tiny_folder, tmp_path, monkeypatch):
    assert model_path(make_cfg(f"model.name={tiny_folder}")) == str(tiny_folder)
    assert model_path(make_cfg("model.name=ORG/MODEL")) == "ORG/MODEL"
    asked = []
    monkeypatch.setattr(
        "expert_iteration.tiny.ensure_tiny_model",
        lambda seed, cache_dir: asked.append((seed, cache_dir)) or tmp_path / "built",
    )
    assert model_path(make_cfg("tiny.model_seed=3", f"tiny.cache_dir={tmp_path}")) == str(tmp_path / "built")
    assert asked == [(3, tmp_path)]
