"""IFEval's instructions: the 25 kinds that there are, the arguments of each, and what of a row cannot be judged.

Imports nothing: rows are checked before any library of the checkers is there.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "keywords:existence": ("keywords",),
    "keywords:frequency": ("keyword", "frequency", "relation"),
    "keywords:forbidden_words": ("forbidden_words",),
    "keywords:letter_frequency": ("letter", "let_frequency", "let_relation"),
    "language:response_language": ("language",),
    "length_constraints:number_sentences": ("num_sentences", "relation"),
    "length_constraints:number_paragraphs": ("num_paragraphs",),
    "length_constraints:number_words": ("num_words", "relation"),
    "length_constraints:nth_paragraph_first_word": ("num_paragraphs", "nth_paragraph", "first_word"),
    "detectable_content:number_placeholders": ("num_placeholders",),
    "detectable_content:postscript": ("postscript_marker",),
    "detectable_format:number_bullet_lists": ("num_bullets",),
    "detectable_format:constrained_response": (),
    "detectable_format:number_highlighted_sections": ("num_highlights",),
    "detectable_format:multiple_sections": ("section_spliter", "num_sections"),
    "detectable_format:json_format": (),
    "detectable_format:title": (),
    "combination:two_responses": (),
    "combination:repeat_prompt": ("prompt_to_repeat",),
    "startend:end_checker": ("end_phrase",),
    "startend:quotation": (),
    "change_case:capital_word_frequency": ("capital_frequency", "capital_relation"),
    "change_case:english_capital": (),
    "change_case:english_lowercase": (),
    "punctuation:no_comma": (),
}
"""Each kind with its arguments, all of which it needs (Zhou et al., 2023, arXiv:2311.07911)."""

RELATIONS = ("less than", "at least")
_COUNTS = {"frequency", "let_frequency", "capital_frequency", "nth_paragraph"}
_LISTS = {"keywords", "forbidden_words"}
# What langdetect can tell; any other could never be followed.
_LANGUAGES = (
    "af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr ne nl no pa pl pt ro "
    "ru sk sl so sq sv sw ta te th tl tr uk ur vi zh-cn zh-tw"
)
LANGUAGES = frozenset(_LANGUAGES.split())


class Instruction(NamedTuple):
    """One verifiable instruction; hashable."""

    kind: str
    arguments: tuple[tuple[str, int | str | tuple[str, ...]], ...]
    """Names and values, those of `ARGUMENTS[kind]`."""


def read_instructions(ids: Any, kwargs: Any) -> tuple[Instruction, ...]:
    """The instructions of a row.

    Args:
        ids: `instruction_id_list`, a list of kinds.
        kwargs: as many dictionaries of arguments. Parquet gives each of them the columns of all, so those that are
            None are not there, and may have made floats of integers.

    Raises:
        ValueError: something that cannot be judged, said in a few words. The benchmark's checkers would draw a missing
            or impossible argument at random, which has nothing to do with what the prompt asks.
    """
    if not isinstance(ids, list) or not ids or not all(isinstance(kind, str) for kind in ids):
        raise ValueError("instruction_id_list is not a list of names")
    if not isinstance(kwargs, list) or len(kwargs) != len(ids) or not all(isinstance(one, Mapping) for one in kwargs):
        raise ValueError("kwargs is not a list of one dictionary an instruction")
    return tuple(_read_instruction(kind, arguments) for kind, arguments in zip(ids, kwargs, strict=True))


def _read_instruction(kind: str, given: Mapping[str, Any]) -> Instruction:
    if kind not in ARGUMENTS:
        raise ValueError(f"unknown instruction {kind}")
    arguments = {name: _read_argument(name, value) for name, value in given.items() if not _is_missing(value)}
    if set(arguments) != set(ARGUMENTS[kind]):
        needed = ", ".join(ARGUMENTS[kind]) or "no arguments"
        raise ValueError(f"{kind} takes {needed}, and has {', '.join(arguments) or 'none'}")
    if "nth_paragraph" in arguments and not 1 <= arguments["nth_paragraph"] <= arguments["num_paragraphs"]:
        raise ValueError(f"nth_paragraph={arguments['nth_paragraph']} of {arguments['num_paragraphs']} paragraphs")
    return Instruction(kind, tuple(sorted(arguments.items())))


def _is_missing(value: Any) -> bool:
    return value is None or value == [] or value != value  # NaN, a missing number of pandas


def _read_argument(name: str, value: Any) -> Any:
    if name in _COUNTS or name.startswith("num_"):
        is_right, expected = _is_whole(value) and value >= 0, "a whole number"
        value = int(value) if is_right else value
    elif name in _LISTS:
        is_right, expected = isinstance(value, list) and all(_is_text(word) for word in value), "a list of words"
        value = tuple(value) if is_right else value
    elif name.endswith("relation"):
        is_right, expected = value in RELATIONS, " or ".join(RELATIONS)
    elif name == "language":
        is_right, expected = _is_text(value) and value in LANGUAGES, "a language that langdetect knows"
    elif name == "letter":
        is_right, expected = _is_text(value) and len(value.strip()) == 1, "one character"
    else:
        is_right, expected = _is_text(value), "a text"
    if not is_right:
        raise ValueError(f"{name}={value!r:.40} is not {expected}")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_whole(value: Any) -> bool:
    return type(value) is int or (isinstance(value, float) and value.is_integer())
