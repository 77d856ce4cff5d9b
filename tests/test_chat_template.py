"""`expert_iteration.chat_template`: which template is used, what it makes of a prompt, and what ends a turn in it."""

import logging
import shutil

import pytest
from chat_tokenizers import (
    BARE,
    CHATML,
    GEMMA,
    LLAMA_3,
    MISTRAL,
    THINKING,
    base_tokenizer,
    gemma_tokenizer,
    llama_tokenizer,
    make_tokenizer,
    qwen_base_tokenizer,
)
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

from expert_iteration.chat_template import (
    PLAIN_TEMPLATE,
    chat_prompt_ids,
    describe_chat_template,
    end_of_turn_id,
    load_tokenizer,
    stop_token_ids,
)
from expert_iteration.errors import UserError


def end_of_turn(tokenizer):
    return tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))


def prompt(tokenizer, system_prompt="Be brief.", question="question"):
    return tokenizer.convert_ids_to_tokens(chat_prompt_ids(tokenizer, system_prompt, question))


def text_of(tokenizer, *contents):
    """The text of a dialog that begins with a system message."""
    turns = [
        {"role": role, "content": text} for role, text in zip(("system", "user", "assistant"), contents, strict=False)
    ]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=len(turns) == 2)


@pytest.fixture
def saved(tmp_path):
    """A function from a tokenizer to the folder of a model that has it."""

    def save(tokenizer, folder=tmp_path / "model", config=LlamaConfig):
        config().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return save


# --- the end of a turn ---


def test_the_tiny_model_ends_its_turn_with_im_end(tiny_tokenizer):
    assert end_of_turn(tiny_tokenizer) == "<|im_end|>"


@pytest.mark.parametrize("eos", ["<|eot_id|>", "<|end_of_text|>"])
def test_llama_3_ends_its_turn_with_eot_id_whatever_ends_a_text(eos):
    tokenizer = llama_tokenizer(eos)
    assert end_of_turn(tokenizer) == "<|eot_id|>"
    stops = stop_token_ids(tokenizer, tokenizer.convert_tokens_to_ids("<|end_of_text|>"))
    assert tokenizer.convert_ids_to_tokens(stops) == ["<|eot_id|>", "<|end_of_text|>"]


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


def test_a_thought_that_a_template_puts_before_a_response_does_not_hide_its_end():
    assert end_of_turn(qwen_base_tokenizer(THINKING)) == "<|im_end|>"


def test_a_template_without_an_end_of_turn_ends_with_the_end_of_text():
    assert end_of_turn(make_tokenizer(BARE, ["</s>"], eos_token="</s>")) == "</s>"


def test_a_turn_that_nothing_ends_is_refused():
    with pytest.raises(UserError, match=r"would not stop.*model\.chat_template"):
        end_of_turn_id(make_tokenizer(BARE, []))


# --- prompts ---


def test_a_prompt_is_templated_once_up_to_where_the_response_begins():
    tokenizer = llama_tokenizer()
    words = "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> Be brief . <|eot_id|> "
    words += "<|start_header_id|> user <|end_header_id|> question <|eot_id|> <|start_header_id|> assistant"
    # One <|begin_of_text|>: the template writes it, and the tokenizer, which would by itself, adds no other.
    expected = [*words.split(), "<|end_header_id|>"]
    assert prompt(tokenizer) == expected
    assert tokenizer("question")["input_ids"][0] == tokenizer.bos_token_id
    assert all(type(token) is int for token in chat_prompt_ids(tokenizer, "Be brief.", "question"))


def test_without_a_system_prompt_there_is_no_system_turn():
    tokens = prompt(llama_tokenizer(), None)
    assert (tokens.count("system"), tokens.count("user"), tokens.count("<|eot_id|>")) == (0, 1, 1)


def test_what_a_template_begins_of_the_response_belongs_to_the_prompt(saved):
    tokenizer = load_tokenizer(saved(qwen_base_tokenizer(THINKING)))
    assert text_of(tokenizer, "Be brief.", "question").endswith("<|im_start|>assistant\n<think>\n")
    assert prompt(tokenizer)[-4:] == ["assistant", *["<unk>"] * 3]  # "<", "think" and ">" are no words of this one


# --- which template ---


def test_the_tokenizers_own_is_used_as_it_is(saved, tiny_folder):
    assert load_tokenizer(str(tiny_folder)).chat_template == CHATML
    tokenizer = load_tokenizer(saved(llama_tokenizer()))
    assert tokenizer.chat_template == LLAMA_3
    assert describe_chat_template(tokenizer, "Be brief.") == []


def test_a_file_takes_its_place(saved, tmp_path):
    (tmp_path / "mine.jinja").write_text(MISTRAL + "\n")
    tokenizer = load_tokenizer(saved(base_tokenizer()), chat_template=str(tmp_path / "mine.jinja"))
    assert text_of(tokenizer, "Be brief.", "question") == "[INST] Be brief.\n\nquestion [/INST]"
    assert end_of_turn(tokenizer) == "</s>"


def test_of_several_the_default_is_used_or_the_one_that_is_named(saved):
    several = qwen_base_tokenizer({"default": CHATML, "thinking": THINKING})
    folder = saved(several)
    assert (
        load_tokenizer(folder).chat_template == load_tokenizer(folder, chat_template="default").chat_template == CHATML
    )
    assert load_tokenizer(folder, chat_template="thinking").chat_template == THINKING
    with pytest.raises(
        UserError, match=r"^model\.chat_template \(rag\) .* has default, thinking: .*or plain, or give a"
    ):
        load_tokenizer(folder, chat_template="rag")


def test_of_several_without_a_default_one_must_be_named(saved):
    folder = saved(qwen_base_tokenizer({"thinking": THINKING, "tools": CHATML}))
    with pytest.raises(UserError, match=r"^model\.chat_template \(null\).*several templates \(thinking, tools\)"):
        load_tokenizer(folder)
    assert load_tokenizer(folder, chat_template="tools").chat_template == CHATML


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for message in messages %}", r"TemplateSyntaxError: .*endfor"),
        ("{{ messages[0]['content'] + name }}", r"UndefinedError: 'name' is undefined"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("no template at all", "it leaves out what the user says"),
        ("{{ messages[0]['content'] + eos_token }}", "it leaves out what the assistant says"),
        (GEMMA.replace("messages[0]['role'] == 'system'", "true"), "TemplateError: System role not supported"),
    ],
)
def test_a_file_that_is_no_template_is_refused_with_the_reason(saved, tmp_path, template, reason):
    path = tmp_path / "mine.jinja"
    path.write_text(template)
    with pytest.raises(UserError, match=rf"^model\.chat_template \({path}\) cannot be used \({reason}") as error:
        load_tokenizer(saved(base_tokenizer()), chat_template=str(path))
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_refused(saved, tmp_path):
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"cannot be read \('utf-8' codec"):
        load_tokenizer(saved(base_tokenizer()), chat_template=str(tmp_path / "bytes.jinja"))


def test_a_template_of_the_models_own_that_fails_is_refused_by_the_models_name(saved):
    folder = saved(make_tokenizer("{{ oops(", ["</s>"], eos_token="</s>"))
    with pytest.raises(UserError, match=rf"^The chat template of model\.name \({folder}\) cannot be used"):
        load_tokenizer(folder)


def test_a_template_whose_turns_nothing_ends_is_refused_when_it_is_loaded(saved):
    with pytest.raises(UserError, match="generation would not stop"):
        load_tokenizer(saved(make_tokenizer(BARE, [])))


# --- a base model's plain template ---


def test_a_base_model_gets_a_plain_one_that_ends_with_its_own_end_token(saved):
    base = base_tokenizer()
    tokenizer = load_tokenizer(saved(base))
    assert text_of(tokenizer, "Be brief.", "question") == "Be brief.\n\nUser:\nquestion\n\nAssistant:\n"
    assert text_of(tokenizer, "Be brief.", "question", "42").endswith("Assistant:\n42</s>")
    assert end_of_turn(tokenizer) == "</s>"
    assert stop_token_ids(tokenizer, None) == [base.eos_token_id]
    assert tokenizer.get_vocab() == base.get_vocab()
    assert tokenizer.special_tokens_map == base.special_tokens_map
    assert tokenizer.pad_token is None
    (note,) = describe_chat_template(tokenizer, "Be brief.")
    assert note.startswith("note: the chat template is the plain one")
    assert "end with </s>" in note


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_plain_text_begins_as_the_tokenizer_would_begin_it(saved, adds_bos):
    base = make_tokenizer(None, ["<s>", "</s>"], adds_bos=adds_bos, bos_token="<s>", eos_token="</s>")
    tokens = prompt(load_tokenizer(saved(base)))
    assert tokens.count("<s>") == adds_bos == (tokens[0] == "<s>")


def test_the_plain_one_can_be_asked_for(saved):
    tokenizer = load_tokenizer(saved(qwen_base_tokenizer()), chat_template="plain")
    assert tokenizer.chat_template == PLAIN_TEMPLATE
    assert end_of_turn(tokenizer) == "<|endoftext|>"


def test_without_a_template_and_an_end_token_there_is_no_way(saved):
    folder = saved(make_tokenizer(None, ["</s>"]))
    with pytest.raises(UserError, match=rf"^model\.name \({folder}\) .*without an end token.*model\.chat_template"):
        load_tokenizer(folder)


# --- system prompts that have no place ---


@pytest.mark.parametrize(("tokenizer", "end"), [(gemma_tokenizer(), "<end_of_turn>"), (None, "</s>")])
def test_a_system_prompt_that_a_template_refuses_or_drops_begins_the_users_turn(saved, tokenizer, end):
    tokenizer = tokenizer or make_tokenizer(MISTRAL, ["</s>"], eos_token="</s>")
    loaded = load_tokenizer(saved(tokenizer))
    assert chat_prompt_ids(loaded, "Be brief.", "question") == chat_prompt_ids(tokenizer, None, "Be brief.\n\nquestion")
    assert chat_prompt_ids(loaded, None, "question") == chat_prompt_ids(tokenizer, None, "question")
    assert "Be brief.\n\nquestion" in text_of(loaded, "Be brief.", "question", "42")
    assert end_of_turn(loaded) == end
    assert describe_chat_template(loaded, None) == []
    (note,) = describe_chat_template(loaded, "Be brief.")
    assert "no place for a system prompt" in note


def test_saved_with_the_tokenizer_it_means_the_same_to_others(saved, tmp_path):
    loaded = load_tokenizer(saved(gemma_tokenizer()))
    loaded.save_pretrained(tmp_path / "last")
    other = AutoTokenizer.from_pretrained(tmp_path / "last")
    assert text_of(other, "Be brief.", "question", "42") == text_of(loaded, "Be brief.", "question", "42")
    again = saved(other, tmp_path / "last")
    assert load_tokenizer(again).chat_template == loaded.chat_template  # folded once


# --- missing tokenizers ---


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_a_model_without_a_tokenizer_is_refused_by_name(tmp_path, config):
    """Of a Qwen2 transformers would make one with a vocabulary of one token."""
    config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^model\.name \({tmp_path}\) .*tokenizer\.json") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_damaged_tokenizer_is_refused_by_name(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=rf"^model\.name \({folder}\) has no tokenizer that can be loaded \("):
        load_tokenizer(str(folder))


# --- what a user may not expect ---


@pytest.mark.parametrize(
    ("template", "beginning"),
    [
        ("{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}", "[assistant]"),
        (MISTRAL, None),  # the response follows the user's turn at once
        (BARE, None),
        (CHATML, None),
        (THINKING, None),
        (LLAMA_3, None),
    ],
)
def test_a_template_that_leaves_the_beginning_of_the_turn_to_the_model_is_told(template, beginning):
    tokenizer = make_tokenizer(template, ["<s>", "</s>"], eos_token="</s>", bos_token="<s>")
    notes = [note for note in describe_chat_template(tokenizer, None) if "add_generation_prompt" in note]
    assert len(notes) == (beginning is not None)
    assert beginning is None or f"has to begin with '{beginning}' itself" in notes[0]


def test_a_file_may_begin_with_a_mark_of_its_encoding(saved, tmp_path):
    name = saved(qwen_base_tokenizer())
    (tmp_path / "mine.jinja").write_text(LLAMA_3, encoding="utf-8-sig")
    assert load_tokenizer(name, chat_template=str(tmp_path / "mine.jinja")).chat_template == LLAMA_3


def test_a_template_without_end_is_refused(saved, tmp_path):
    (tmp_path / "mine.jinja").write_text("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}")
    with pytest.raises(UserError, match=r"cannot be used \(RecursionError"):
        load_tokenizer(saved(qwen_base_tokenizer()), chat_template=str(tmp_path / "mine.jinja"))


def test_a_prompt_longer_than_the_tokenizer_knows_draws_no_warning(caplog):
    tokenizer = qwen_base_tokenizer()
    tokenizer.model_max_length = 4
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # it hands nothing on to others
    try:
        assert len(chat_prompt_ids(tokenizer, None, "question " * 9)) > 4
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.records == []
