"""The chat template of a model: which one, what it makes of a prompt, and what ends a turn in it.

The tokenizer's own by default, or what `model.chat_template` names. `load_tokenizer` leaves a tokenizer whose
`chat_template` is the one text that is used, everywhere: for prompts, in the environment, in exported folders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from expert_iteration.errors import UserError
from expert_iteration.models import refuse_untrusted_code

PLAIN = "plain"  # the value of `model.chat_template` for the template below
TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")

# For models without a template. Words only, as they have no tokens for roles, and the end token that they know.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant:\n' + message['content'] + eos_token }}"
    "{% else %}"
    "{{ ('User:\n' if message['role'] == 'user' else '') + message['content'] + '\n\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
BEGINNING = "{{ bos_token }}"
# Before a template that refuses or ignores system messages: what such a message says begins the user's first turn, as
# in Gemma 3's own template.
FOLDED_SYSTEM_PROMPT = (
    "{% if messages | length > 1 and messages[0]['role'] == 'system' %}"
    "{% set messages = [{'role': messages[1]['role'],"
    " 'content': messages[0]['content'] + '\n\n' + messages[1]['content']}] + messages[2:] %}"
    "{% endif %}"
)

# What a template is tried with: words that none would write by itself.
SYSTEM, QUESTION, RESPONSE = "Some-System-Text", "Some-Question-Text", "Some-Response-Text"
SYSTEM_TURN = {"role": "system", "content": SYSTEM}
USER_TURN = {"role": "user", "content": QUESTION}
ASSISTANT_TURN = {"role": "assistant", "content": RESPONSE}


def is_template_file(value: str) -> bool:
    """Whether a `model.chat_template` is a path; else it is a name."""
    return "/" in value or value.endswith(TEMPLATE_SUFFIXES)


def load_tokenizer(name: str, trust_remote_code: bool = False, chat_template: str | None = None) -> Any:
    """The tokenizer of a model, whose `chat_template` is the one text that its turns are written in.

    Args:
        name: hub id or local folder.
        trust_remote_code: whether Python code that comes with the model may run.
        chat_template: as `model.chat_template`.

    Raises:
        UserError: there is no tokenizer, or it has code of its own that may not run; there is no such template, or it
            cannot be used; nothing would end a turn.
    """
    tokenizer = _load(name, trust_remote_code)
    text = _find(tokenizer, name, chat_template)
    source = f"The chat template of model.name ({name})"
    if chat_template is not None:
        source = f"model.chat_template ({chat_template})"
    _check(tokenizer, text, source)
    takes_system_prompt = _takes_system_prompt(tokenizer, text)
    tokenizer.chat_template = text if takes_system_prompt else FOLDED_SYSTEM_PROMPT + text
    end_of_turn_id(tokenizer)
    return tokenizer


def describe_chat_template(tokenizer: Any, system_prompt: str | None) -> list[str]:
    """Lines that say what a user may not expect of the template of a tokenizer from `load_tokenizer`."""
    notes = []
    if tokenizer.chat_template.endswith(PLAIN_TEMPLATE):
        notes.append(
            f"note: the chat template is the plain one, as of models that have none: turns begin with User: and "
            f"Assistant:, and responses end with {tokenizer.eos_token} (model.chat_template takes another)"
        )
    if tokenizer.chat_template.startswith(FOLDED_SYSTEM_PROMPT) and system_prompt is not None:
        notes.append("note: the chat template has no place for a system prompt, which begins the user's turn instead")
    if beginning := _left_to_the_model(tokenizer):
        notes.append(
            f"note: the chat template ignores add_generation_prompt, so each response has to begin with {beginning!r} "
            "itself, which the template writes before an assistant's text (model.chat_template takes another)"
        )
    return notes


def chat_prompt_ids(tokenizer: Any, system_prompt: str | None, question: str) -> list[int]:
    """Token ids of a prompt: the chat template around system prompt and question, up to where the response begins."""
    messages = [{"role": "user", "content": question}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    return tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        tokenizer_kwargs={"verbose": False},  # no warning of a prompt that is too long: those are left out
    )


def end_of_turn_id(tokenizer: Any) -> int:
    """The token with which the chat template ends the assistant's turn: it stops generation and is trained.

    Not always the tokenizer's own end token: there are base models with one for a text's end and another for a turn's.

    Raises:
        UserError: the template writes no special token after the assistant's text, and the tokenizer has no end token.
    """
    text = tokenizer.apply_chat_template([USER_TURN, ASSISTANT_TURN], tokenize=False)
    ending = tokenizer(text[text.rindex(RESPONSE) + len(RESPONSE) :], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    candidates = [token for token in ending if token in special]
    if candidates:
        return candidates[0]
    if tokenizer.eos_token_id is None:
        raise UserError(
            "The chat template ends the assistant's turn with no special token, and the tokenizer has no end token: "
            "generation would not stop. Give a template that writes one, with model.chat_template."
        )
    return tokenizer.eos_token_id


def stop_token_ids(tokenizer: Any, published: int | list[int] | None) -> list[int]:
    """The tokens at which every engine stops: the end of the turn, and what ends a text.

    vLLM adds the latter by itself: the tokenizer's own end token, and what the model's publisher lists.

    Args:
        tokenizer: of the model.
        published: the `eos_token_id` of the model's generation configuration.
    """
    listed = published if isinstance(published, list) else [published]
    candidates = {end_of_turn_id(tokenizer), tokenizer.eos_token_id, *listed}
    return sorted(token for token in candidates if token is not None)


def _load(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    refuse_untrusted_code(name, trust_remote_code)
    remedy = (
        "copy those of its base model (tokenizer.json, tokenizer_config.json) into its folder and give that as a path, "
        "or choose another model."
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"model.name ({name}) has no tokenizer that can be loaded ({reason}): {remedy}") from error
    # Where files are missing, transformers 5 makes a tokenizer of special tokens alone, for some kinds of models.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise UserError(f"model.name ({name}) comes without the files of a tokenizer: {remedy}")
    return tokenizer


def _find(tokenizer: Any, name: str, wanted: str | None) -> str:
    """The text of the template that is wanted."""
    own = tokenizer.chat_template or {}
    templates = own if isinstance(own, dict) else {"default": own}
    names = ", ".join(templates) or "none"
    if wanted == PLAIN or (wanted is None and not templates):
        return _plain(tokenizer, name)
    if wanted is None:
        if "default" in templates:
            return templates["default"]
        raise UserError(
            f"model.chat_template (null): the tokenizer of {name} has several templates ({names}) and no default: "
            "name one of them."
        )
    if is_template_file(wanted):
        return _read(Path(wanted))
    if wanted in templates:
        return templates[wanted]
    raise UserError(
        f"model.chat_template ({wanted}) is no template of {name}, which has {names}: name one of these, or {PLAIN}, "
        f"or give a file, by a path with a / in it or a name that ends in {TEMPLATE_SUFFIXES[0]}."
    )


def _plain(tokenizer: Any, name: str) -> str:
    """The plain template, for a tokenizer that has an end token; it begins a text as the tokenizer itself would."""
    if tokenizer.eos_token is None:
        raise UserError(
            f"model.name ({name}) has a tokenizer without a chat template and without an end token, so nothing would "
            "end a response: give a file with a template that writes a token of its vocabulary after the response, "
            "with model.chat_template."
        )
    begins = tokenizer.bos_token_id is not None and tokenizer(QUESTION)["input_ids"][0] == tokenizer.bos_token_id
    return BEGINNING + PLAIN_TEMPLATE if begins else PLAIN_TEMPLATE


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template ({path}) cannot be read ({error}): correct it.") from error


def _check(tokenizer: Any, text: str, source: str) -> None:
    """Refuse what is no template, or one of something else than turns."""
    for turns, needed in (([USER_TURN], QUESTION), ([USER_TURN, ASSISTANT_TURN], RESPONSE)):
        rendered, reason = _render(tokenizer, text, turns)
        if needed not in rendered:
            role = turns[-1]["role"]
            raise UserError(
                f"{source} cannot be used ({reason or f'it leaves out what the {role} says'}): give a Jinja template "
                "that writes user's and assistant's turns, with model.chat_template."
            )


def _takes_system_prompt(tokenizer: Any, text: str) -> bool:
    """There are templates that raise an error at a system message, and others that drop it without a word."""
    rendered, _ = _render(tokenizer, text, [SYSTEM_TURN, USER_TURN])
    return SYSTEM in rendered


def _left_to_the_model(tokenizer: Any) -> str:
    """What stands between a prompt and the response in a dialog, where the template does not begin it; white space
    apart.
    """
    with_beginning, without = (
        tokenizer.apply_chat_template([USER_TURN], tokenize=False, add_generation_prompt=flag) for flag in (True, False)
    )
    dialog = tokenizer.apply_chat_template([USER_TURN, ASSISTANT_TURN], tokenize=False)
    before = dialog[: dialog.rindex(RESPONSE)]
    if with_beginning != without or not before.startswith(without):
        return ""
    return before.removeprefix(without).strip()


def _render(tokenizer: Any, text: str, turns: list[dict[str, str]]) -> tuple[str, str]:
    """What a template makes of turns, and "" or, where it fails, "" and the reason in one line."""
    from jinja2 import TemplateError

    try:
        is_prompt = turns[-1]["role"] == "user"
        return tokenizer.apply_chat_template(
            turns, chat_template=text, tokenize=False, add_generation_prompt=is_prompt
        ), ""
    # Jinja's own errors, and what expressions in a template raise.
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        return "", f"{type(error).__name__}: {' '.join(str(error).split())}"
