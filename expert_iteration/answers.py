r"""The answer in a response: where it stands, and whether it is the right number.

Where it is looked for:
    answer_tag: in the first `<answer>...</answer>`.
    hash: after the first `####` that a number follows on its line, as in GSM8K (a Markdown heading is no answer).
    boxed: in the last `\boxed{...}`, as MATH's own scorer does: what is boxed before are intermediate results.
    last_number: the last number of the text.
    auto: the first of these forms, in this order, that is there and complete.
One answer of a response is judged, whatever else it says: guessing twice is no use. What is thought in a closed
`<think>` block (also one that the prompt opened) is no answer in any mode, and in an open one only `<answer>` counts.

How it is read: exactly, as a fraction. An answer states one number; with words, units or a currency around it, but of
several numbers none counts, lest "3 or 4" be right twice. After an equals sign only what follows the last one is read.
A percent sign is a unit ("10%" is 10), "5 million" is 5,000,000, "1.5e3", powers, roots and multiples of pi are no
number, nor is one of more than 40 digits. A minus may stand apart from its number ("- 5", "-(5)", "-\text{5}"), also
where it may have been meant as the dash of a list or after a word; one that stands between two things ("10 - 5", "x-5")
belongs to neither, and what it leaves is no single number. Nothing is evaluated, and the time is linear in the length
of the text.
"""

import re
import unicodedata
from fractions import Fraction

from expert_iteration.errors import UserError

MODES = ("auto", "answer_tag", "hash", "boxed", "last_number")
FORMS = MODES[1:]
# Longer than any answer: whole solutions inside a tag are not searched for a number.
MAX_ANSWER_CHARS = 500
MAX_DIGITS = 40

# Repetitions are bounded or possessive, so that no text takes more than a few steps a character.
# What may stand between a sign and its number: spaces, marks, brackets, a currency, LaTeX commands but for roots.
_BETWEEN = r"(?:[^\S\n]|[*_`$€£¥₹(\[{]|\\(?!sqrt)[A-Za-z]{1,20}+)"
_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{2,3}){0,12},[0-9]{3}(?![0-9])|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++)"
_NUMBER = re.compile(
    rf"""
    (?P<odd_before>(?:/|√|\\sqrt\s?\{{?)\s?)?
    (?<![\w^])                                          # "x2" and "m2" hold no number
    (?P<sign>(?<![\w)\]}}+-])[-+](?:{_BETWEEN}|[-+]){{0,8}})?  # "10-15" is a range
    [$€£¥₹]?[^\S\n]?(?<![^\W_])(?<!\^)
    (?:(?P<whole>[0-9]{{1,{MAX_DIGITS}}})[^\S\n]{{1,3}}(?=[0-9]{{1,{MAX_DIGITS}}}\s?/\s?[0-9]))?
    (?P<number>{_DIGITS})
    (?:\s?/\s?(?P<denominator>{_DIGITS}))?
    (?P<odd_after>[eE][-+]?[0-9]++|\*\*(?=\w)|\s?(?:\^|\*\*(?=\s?[-+(]{{0,2}}[0-9])|π|\\pi\b|\\sqrt\b|√)|[⁰¹²³⁴-⁹])?
    (?:\s{{0,3}}(?P<scale>(?i:hundred|thousand|million|billion|trillion))\b)?
    """,
    re.VERBOSE,
)
_AFTER_MINUS = re.compile(r"-(?:\s|" + _BETWEEN + r"){0,8}\Z")
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def _as_latex(fraction: str) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", fraction).partition("\u2044")
    return f"\\frac{{{numerator}}}{{{denominator}}}"


_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2013\ufe63\uff0d", "-"),
        "\u2044": "/",
        **{sign: _as_latex(sign) for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"},
    }
)
# LaTeX and words that change what a number is; all other commands are words around it.
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\([$%#&])", r"\1"),
        (r"\{,\}", ","),
        (r"\\!", ""),
        (r"(?<=[0-9])(?:\\[,;: ]|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))", ""),
        (r"\\[,;: ]|~", " "),
        (r"(?<=[0-9])\s?(?=\\[dtc]?frac)", " "),
        (r"\\[dtc]?frac\s?(?:\{([^{}]{1,60})\}|([0-9]))\s?(?:\{([^{}]{1,60})\}|([0-9]))", r"\1\2/\3\4 "),
        (r"\^\s?(?:\{\s?\\circ\s?\}|\\circ\b)", "°"),
        (r"\^\s?(?:\{[^{}]{0,20}\}|[-+]?[0-9]{1,20})", "^"),
        (rf"(?i)\b(?:minus|negative)\b(?={_BETWEEN}{{1,8}}+\.?[0-9])", "-"),
        (r"(?i)\b(?:USD|US(?=\$)|EUR|GBP|INR|Rs\.?)\s?(?=[-+$€£¥₹]?\.?[0-9])", ""),
        # An operator is not apart from what comes before it, lest it be taken for a sign.
        (r"(?<=[0-9)\]}])[^\S\n]{1,3}([-+])(?=[^\S\n])", r"\1"),
    )
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s?\{")
_HEADING = re.compile(r"\s*[0-9]{1,3}\s?[.):]\s+\S")
_LATEX_WORDS = re.compile(r"\\[A-Za-z]+")
_LETTER = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"[^\W\d_⁰¹²³⁴-⁹]+")


def check_mode(mode: str) -> None:
    """Raises UserError for a mode that is none of `MODES`."""
    if mode not in MODES:
        raise UserError(f"reward.answer_mode={mode} is unknown: choose one of {', '.join(MODES)}.")


def holds_answer(response: str, truth: str, mode: str = "auto") -> bool:
    """Whether the answer that a response gives is the ground truth.

    A truth that is one number (`72`, `$5`, `\\frac{3}{4}`, `x = 3`) is compared as a number, whatever words are around
    it in the response. One with words after the number (`5 apples`, `3 cm`) is compared as number and words: the
    response may lack the words, but not have others there. Any other truth, also one whose number runs on in letters
    (`2x`, `7th Street`), is compared as text without regard to case, white space and marks around it; in `auto` a
    response without any of the forms is then an answer as a whole.

    Args:
        response: text, special tokens removed.
        truth: bare, or ending in `#### 72`.
        mode: one of `MODES`.

    Raises:
        UserError: unknown mode.
    """
    check_mode(mode)
    truth = truth.rpartition("####")[2].strip()
    number = _number_at_start(truth)
    given = find_answer(response, mode, numeric=number is not None)
    if given is None:
        return False
    if number is None:
        return _as_text(given) == _as_text(truth) != ""
    if read_number(given) != number:
        return False
    said, wanted = _words_after_number(given), _words_after_number(truth)
    return not said or said[: len(wanted)] == wanted


def find_answer(response: str, mode: str = "auto", *, numeric: bool = True) -> str | None:
    """The text of the one answer that is judged, stripped; None where the response has none of the form.

    Args:
        response: text, special tokens removed.
        mode: one of `MODES`.
        numeric: whether a number is looked for; without, `hash` takes whatever follows the first `####`, and where
            `auto` would take the last number it takes the whole text.

    Raises:
        UserError: unknown mode.
    """
    check_mode(mode)
    said = without_thoughts(response)
    for form in FORMS if mode == "auto" else (mode,):
        # Of an open thought the end is missing: what it says so far is no answer, unless it is tagged as one.
        text = said if form == "answer_tag" else said.partition("<think>")[0]
        if form == "last_number" and mode == "auto" and not numeric:
            return text.strip()
        if (found := _find(form, text, numeric)) is not None:
            return found
    return None


def read_number(text: str) -> Fraction | None:
    """The number that an answer states, exactly; None where it states none, or more than one."""
    match = _only_number(_plain(text))
    return None if match is None else _value(match)


def inside(tag: str, text: str) -> str | None:
    """What the first `<tag>...</tag>` holds, stripped; None without one.

    A regular expression would search to the end of the text for each opening tag again.
    """
    _, opened, rest = text.partition(f"<{tag}>")
    content, closed, _ = rest.partition(f"</{tag}>")
    return content.strip() if opened and closed else None


def boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` (or `\fbox`) holds, stripped, braces within it balanced; None without one."""
    start = max((match.end() for match in _BOX.finditer(text)), default=len(text))
    depth = 1
    for index in range(start, len(text)):
        # A brace after a backslash is one to print.
        if text[index] in "{}" and text[index - 1] != "\\":
            depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return text[start:index].strip()
    return None


def without_thoughts(response: str) -> str:
    """A response without its closed `<think>` blocks; a closing tag alone ends one that began with the response."""
    *closed, rest = response.split("</think>")
    return " ".join([piece.partition("<think>")[0] for piece in closed if "<think>" in piece] + [rest])


def _find(form: str, text: str, numeric: bool) -> str | None:
    if form == "answer_tag":
        return inside("answer", text)
    if form == "boxed":
        return boxed(text)
    if form == "hash":
        lines = (piece.partition("\n")[0] for piece in text.split("####")[1:])
        return next((line.strip() for line in lines if not numeric or _is_number_line(line)), None)
    matches = list(_NUMBER.finditer(_plain(text)))
    return matches[-1][0].strip() if matches else None


def _is_number_line(line: str) -> bool:
    """Whether what follows `####` on its line begins with a number and is no heading such as `#### 1. Add`."""
    return len(line) <= MAX_ANSWER_CHARS and not _HEADING.match(line) and _begins_with_number(_plain(line))


def _number_at_start(truth: str) -> Fraction | None:
    """The number of a truth that is to be compared as one."""
    stated = _after_equals(_plain(truth))
    if not _begins_with_number(stated) or (match := _only_number(stated)) is None:
        return None
    return None if _LETTER.match(stated, match.end()) else _value(match)


def _words_after_number(text: str) -> list[str]:
    """In small letters; there is one number."""
    match = _only_number(_plain(text))
    return [] if match is None else _WORD.findall(_LATEX_WORDS.sub(" ", match.string[match.end() :]).casefold())


def _begins_with_number(plain: str) -> bool:
    match = _NUMBER.search(plain)
    return match is not None and not _LETTER.search(_LATEX_WORDS.sub("", plain[: match.start()]))


def _only_number(plain: str) -> re.Match[str] | None:
    stated = _after_equals(plain)
    if len(stated) > MAX_ANSWER_CHARS:
        return None
    matches = list(_NUMBER.finditer(stated))
    if len(matches) != 1 or _AFTER_MINUS.search(stated, 0, matches[0].start()):
        return None
    return matches[0]


def _after_equals(plain: str) -> str:
    return plain.rpartition("=")[2].strip(" \t\n*_`")


def _plain(text: str) -> str:
    """The text in which `_NUMBER` finds numbers: one minus sign, one way to write a fraction, no LaTeX spacing."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _value(match: re.Match[str]) -> Fraction | None:
    signs = [character for character in match["sign"] or "" if character in "-+"]
    if match["odd_before"] or match["odd_after"] or len(signs) > 1:
        return None
    parts = [(match[name] or "").replace(",", "") for name in ("number", "denominator", "whole")]
    if max(map(len, parts)) > MAX_DIGITS:
        return None
    number, denominator, whole = parts
    value = Fraction(number)
    if denominator:
        if not Fraction(denominator):
            return None
        value /= Fraction(denominator)
    value = (value + int(whole or 0)) * _SCALES.get((match["scale"] or "").lower(), 1)
    return -value if signs == ["-"] else value


def _as_text(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*_$")
