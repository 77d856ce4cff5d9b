"""Whether a text follows one of IFEval's instructions, for each of the 25 kinds.

The verdicts are those of google-research's `instruction_following_eval` (Apache 2.0), of which TorchRL has a copy,
except where a docstring says so. The checkers need no data files, draw nothing at random, and take time in proportion
to the text: the benchmark's regular expressions take time in proportion to its square, and 100 kB of line breaks,
which a model that has lost its way does write, would hold a run up for minutes. Keywords are words here, not regular
expressions ("C++" is none); none of the benchmark's has a character that means something in one.

Imports nltk and langdetect; not torch, as each of `reward.workers` processes comes here first.
"""

import functools
import json
import logging
import re
from collections.abc import Callable, Sequence

import langdetect
import nltk
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer, PunktTokenizer

from expert_iteration.ifeval_instructions import Instruction

logger = logging.getLogger(__name__)

Check = Callable[[str], bool]

_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
# Where a full stop does not end a sentence, if nltk's trained list of such words is not installed.
_ABBREVIATIONS = (
    "mr mrs ms messrs dr prof st jr sr gen col capt lt sgt maj rev hon gov sen rep pres inc ltd co corp bros vs jan "
    "feb apr aug sep sept oct nov dec tue tues wed thu thurs fri u.s u.k u.n u.s.a d.c a.m p.m ph.d m.d b.a m.a"
)


def check_of(instruction: Instruction) -> Check:
    """What says whether a text that is not empty follows an instruction. It raises nothing, whatever the text."""
    return functools.partial(_CHECKS[instruction.kind], **dict(instruction.arguments))


def _stands_in_relation(count: int, relation: str, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


# Sentences and words


@functools.cache
def _sentence_tokenizer() -> PunktSentenceTokenizer:
    """nltk's, with its trained parameters where they are installed; they are never downloaded.

    Without them the same algorithm (Punkt; Kiss and Strunk, 2006) runs with a list of abbreviations. Measured against
    the trained parameters it counts as many sentences in 99.6 % of GSM8K's questions and 99.4 % of its solutions.
    """
    try:
        return PunktTokenizer("english")
    except LookupError:
        logger.warning(
            "nltk's punkt_tab is not installed: IFEval splits sentences with a short list of abbreviations instead. "
            "For the benchmark's own counts: python -m nltk.downloader punkt_tab"
        )
        parameters = PunktParameters()
        parameters.abbrev_types = set(_ABBREVIATIONS.split())
        return PunktSentenceTokenizer(parameters)


def _has_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    return _stands_in_relation(len(_sentence_tokenizer().tokenize(text)), relation, num_sentences)


def _has_words(text: str, *, num_words: int, relation: str) -> bool:
    return _stands_in_relation(len(nltk.regexp_tokenize(text, r"\w+")), relation, num_words)


def _has_capital_words(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """The benchmark splits the text into sentences first, which needs data and changes no count.

    It parts a word from the full stop after it, and "STOP." is in capitals as "STOP" is.
    """
    words = nltk.word_tokenize(text, preserve_line=True)
    return _stands_in_relation(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def _has_letter(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """Any character: two of the prompts ask for "#" and "!". TorchRL draws a letter of the alphabet in their place."""
    return _stands_in_relation(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _has_keywords(text: str, *, keywords: Sequence[str]) -> bool:
    return all(re.search(re.escape(keyword), text, flags=re.IGNORECASE) for keyword in keywords)


def _has_keyword_often(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    count = len(re.findall(re.escape(keyword.strip()), text, flags=re.IGNORECASE))
    return _stands_in_relation(count, relation, frequency)


def _lacks_words(text: str, *, forbidden_words: Sequence[str]) -> bool:
    r"""Words as they are; \b would find no end of "C++"."""
    words = "|".join(re.escape(word) for word in forbidden_words)
    return re.search(rf"(?<!\w)(?:{words})(?!\w)", text, flags=re.IGNORECASE) is None


# Languages


@functools.cache
def _languages() -> langdetect.DetectorFactory:
    """A detector of our own with its own seed: langdetect's is unseeded, and half loaded for a second thread."""
    factory = langdetect.DetectorFactory()
    factory.load_profile(langdetect.PROFILES_DIRECTORY)
    factory.set_seed(0)
    return factory


def _is_in_language(text: str, *, language: str) -> bool:
    """A text in which nothing can be told, such as "42!", counts as followed, as in the benchmark."""
    detector = _languages().create()
    detector.append(text)
    try:
        return detector.detect() == language
    except langdetect.LangDetectException:
        return True


def _is_english_in_capitals(text: str) -> bool:
    return text.isupper() and _is_in_language(text, language="en")


def _is_english_in_small_letters(text: str) -> bool:
    return text.islower() and _is_in_language(text, language="en")


# Forms


def _has_placeholders(text: str, *, num_placeholders: int) -> bool:
    # What stands after a line's last bracket could only be searched in vain, once for each opening one.
    lines = (line[: line.rfind("]") + 1] for line in text.split("\n"))
    return sum(len(re.findall(r"\[.*?\]", line)) for line in lines) >= num_placeholders


def _has_title(text: str) -> bool:
    lines = (line[: line.rfind(">>") + 2] for line in text.split("\n") if ">>" in line)
    titles = (title for line in lines for title in re.findall(r"<<.+>>", line))
    return any(title.lstrip("<").rstrip(">").strip() for title in titles)


def _has_postscript(text: str, *, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(patterns.get(marker, re.escape(marker.lower())), text.lower()) is not None


def _has_bullets(text: str, *, num_bullets: int) -> bool:
    # White space before a bullet is that of its line; to look over the lines before it as well changes no count.
    stars = re.findall(r"^[^\S\n]*\*[^\*].*$", text, flags=re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-.*$", text, flags=re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def _is_json(text: str) -> bool:
    inside = text.strip().removeprefix("```json").removeprefix("```Json").removeprefix("```JSON").removeprefix("```")
    try:
        json.loads(inside.removesuffix("```").strip())
    # The second: of thousands of brackets that open, as the parser calls itself for each.
    except (ValueError, RecursionError):
        return False
    return True


def _is_an_option(text: str) -> bool:
    return any(option in text for option in _OPTIONS)


def _has_highlights(text: str, *, num_highlights: int) -> bool:
    single = [part.strip("*") for part in re.findall(r"\*[^\n\*]*\*", text)]
    double = [part[2:-2] for part in re.findall(r"\*\*[^\n\*]*\*\*", text)]
    return sum(part.strip() != "" for part in single + double) >= num_highlights


def _has_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def _has_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Between dividers; there may be nothing before the first and after the last, but something between two."""
    are_filled = [part.strip() != "" for part in text.split("***")]
    return all(are_filled[1:-1]) and sum(are_filled) == num_paragraphs


def _has_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """The paragraph is looked for among all that double line breaks part, and those that are empty are not counted."""
    parts = [part.strip() for part in text.split("\n\n")]
    if sum(part != "" for part in parts) != num_paragraphs or parts[nth_paragraph - 1] == "":
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split("[.,?!'\"]", word)[0].lower() == first_word.lower()


# The whole response


def _has_two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    filled = [part for part in parts if part]
    return "" not in parts[1:-1] and len(filled) == 2 and filled[0] != filled[1]


def _repeats(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends_with(text: str, *, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _is_quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _lacks_commas(text: str) -> bool:
    return "," not in text


_CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _has_keywords,
    "keywords:frequency": _has_keyword_often,
    "keywords:forbidden_words": _lacks_words,
    "keywords:letter_frequency": _has_letter,
    "language:response_language": _is_in_language,
    "length_constraints:number_sentences": _has_sentences,
    "length_constraints:number_paragraphs": _has_paragraphs,
    "length_constraints:number_words": _has_words,
    "length_constraints:nth_paragraph_first_word": _has_first_word,
    "detectable_content:number_placeholders": _has_placeholders,
    "detectable_content:postscript": _has_postscript,
    "detectable_format:number_bullet_lists": _has_bullets,
    "detectable_format:constrained_response": _is_an_option,
    "detectable_format:number_highlighted_sections": _has_highlights,
    "detectable_format:multiple_sections": _has_sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": _has_title,
    "combination:two_responses": _has_two_responses,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends_with,
    "startend:quotation": _is_quoted,
    "change_case:capital_word_frequency": _has_capital_words,
    "change_case:english_capital": _is_english_in_capitals,
    "change_case:english_lowercase": _is_english_in_small_letters,
    "punctuation:no_comma": _lacks_commas,
}
