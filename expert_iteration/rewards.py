"""Scores: problems and responses in, rewards and passes out.

A reward function takes a whole batch: `reward(problems, responses) -> list of floats`, one for each response, where
`problems[i]` (an `expert_iteration.tasks.Problem`) is what `responses[i]` answers and responses are text without
special tokens. Your own plugs in with `reward.fn=package.module:function` or `reward.fn=path/to/file.py:function`;
a reward that is not finite leaves its response out. It is called in the collector's process with all responses of an
engine batch, so it may ask a model or a service for many at once.

TorchRL and IFEval's libraries are imported when the first IFEval response is scored.
"""

import functools
import hashlib
import importlib
import importlib.util
import logging
import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from expert_iteration.errors import UserError

if TYPE_CHECKING:
    from expert_iteration.tasks import Problem

logger = logging.getLogger(__name__)

RewardFn = Callable[[Sequence["Problem"], Sequence[str]], list[float]]
CorrectFn = Callable[[Sequence["Problem"], Sequence[str]], list[bool]]

IFEVAL_REQUIREMENTS = ("nltk", "langdetect", "immutabledict")

_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
_INTEGER = re.compile(r"[+-]?\d+")


def _inside(tag: re.Pattern[str], response: str) -> str:
    """What the first such tag holds, stripped; "" without one. Only the first counts, so guessing twice is no use."""
    match = tag.search(response)
    return match[1].strip() if match else ""


def _value(answer: str) -> Decimal | str:
    """A number where the text is one ("1,234", "$5.00", "18."), else the text without those marks."""
    text = answer.strip().replace(",", "").replace("$", "").replace("%", "").rstrip(".")
    return Decimal(text) if _NUMBER.fullmatch(text) else text


def _ground_truth(answer: str) -> Decimal | str:
    """The value after `####`, or of the whole text where the mark is missing."""
    return _value(answer.rpartition("####")[2])


def gsm8k_correct(response: str, answer: str) -> bool:
    """Whether `<answer>` holds the ground truth, compared as numbers: 72, 72.0 and $72 are equal.

    Args:
        response: text, special tokens removed.
        answer: the ground truth, bare or ending in `#### 72`.
    """
    given = _inside(_ANSWER, response)
    return given != "" and _value(given) == _ground_truth(answer)


def gsm8k_reward(response: str, answer: str) -> float:
    """1.0 for the right number in `<answer>`, 0.1 for a wrong one, 0.0 without one.

    The values of TorchRL's `GSM8KRewardParser`, which compares text ("5" and "05" differ there).
    """
    if gsm8k_correct(response, answer):
        return 1.0
    return 0.1 if _inside(_ANSWER, response) else 0.0


def tiny_correct(response: str, answer: str) -> bool:
    """Whether `<answer>` holds the right integer."""
    given = _inside(_ANSWER, response)
    return _INTEGER.fullmatch(given) is not None and Decimal(given) == _ground_truth(answer)


def tiny_reward(response: str, answer: str) -> float:
    """1.0 for the right integer in `<answer>` after thinking, 0.9 without a thought.

    A wrong response earns 0.1 for a thought and 0.1 for any integer. Closeness earns nothing: it would let wrong
    responses win whole groups.
    """
    thought = _inside(_THINK, response) != ""
    if tiny_correct(response, answer):
        return 1.0 if thought else 0.9
    return 0.1 * (thought + (_INTEGER.fullmatch(_inside(_ANSWER, response)) is not None))


def score_each(score: Callable[[str, str], Any], problems: Sequence["Problem"], responses: Sequence[str]) -> list[Any]:
    """Apply `score(response, answer)` to each pair; `functools.partial` of it is a batched function."""
    return [score(response, problem.answer) for problem, response in zip(problems, responses, strict=True)]


gsm8k_rewards: RewardFn = functools.partial(score_each, gsm8k_reward)
gsm8k_corrects: CorrectFn = functools.partial(score_each, gsm8k_correct)
tiny_rewards: RewardFn = functools.partial(score_each, tiny_reward)
tiny_corrects: CorrectFn = functools.partial(score_each, tiny_correct)


def ifeval_rewards(problems: Sequence["Problem"], responses: Sequence[str]) -> list[float]:
    """TorchRL's IFEval reward, 0 to 1.15: shares of followed instructions plus 0.15 for the think and answer tags.

    As in TorchRL, only what stands in the first `<answer>` is judged; without one no instruction counts as followed.
    """
    return [_ifeval_score(problem, response)[0] for problem, response in zip(problems, responses, strict=True)]


def ifeval_corrects(problems: Sequence["Problem"], responses: Sequence[str]) -> list[bool]:
    """Whether every instruction is followed (IFEval's prompt-level strict accuracy), judged as in `ifeval_rewards`."""
    return [_ifeval_score(problem, response)[1] for problem, response in zip(problems, responses, strict=True)]


def check_ifeval_requirements() -> None:
    """Refuse early, and without importing them, when a library of the IFEval scorer is missing."""
    missing = [name for name in IFEVAL_REQUIREMENTS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"env.dataset=ifeval needs {', '.join(missing)} to score responses: pip install -r requirements_ifeval.txt."
        )


@functools.cache
def _ifeval_scorer() -> Any:
    """TorchRL's scorer, once a process, made repeatable and independent of nltk's data files."""
    check_ifeval_requirements()
    import langdetect
    from torchrl.envs.llm.reward.ifeval import IfEvalScorer

    # langdetect draws at random for short texts unless it is seeded.
    langdetect.DetectorFactory.seed = 0
    _make_independent_of_punkt()
    return IfEvalScorer()


def _make_independent_of_punkt() -> None:
    """Let two instruction kinds work without nltk's punkt_tab data, which no package ships.

    length_constraints:number_sentences then splits sentences with the scorer's own regular expressions, and
    change_case:capital_word_frequency takes the text as one sentence (a full stop inside it stays with its word,
    which counts all the same). With punkt_tab installed (`python -m nltk.downloader punkt_tab`) nothing is replaced.
    """
    import nltk
    from torchrl.envs.llm.reward.ifeval import _instructions, _instructions_util

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        logger.warning("nltk's punkt_tab is not installed: IFEval counts sentences with regular expressions instead.")
        _instructions.count_sentences = lambda text: len(_instructions_util.split_into_sentences(text))
        _instructions.nltk = _NltkWithoutPunkt


class _NltkWithoutPunkt:
    """Stands for the one function of nltk that TorchRL's instruction checkers call."""

    @staticmethod
    def word_tokenize(text: str) -> list[str]:
        import nltk

        return nltk.word_tokenize(text, preserve_line=True)


def _ifeval_score(problem: "Problem", response: str) -> tuple[float, bool]:
    """Reward, and whether every instruction is followed."""
    scorer = _ifeval_scorer()
    from tensordict import NonTensorData, TensorDict
    from torchrl.envs.llm.reward.ifeval._scorer import _process_results

    answers = _ANSWER.findall(response)
    row = TensorDict({name: NonTensorData(problem.metadata[name]) for name in ("key", "instruction_id_list", "kwargs")})
    score = _process_results(row, answers[0] if answers else "", prompt=problem.question)
    reward = scorer.default_reward_aggregator(score, think_blocks=_THINK.findall(response), answer_blocks=answers)
    return float(reward), bool(score.prompt_level_strict_acc)


def load_reward_fn(spec: str) -> RewardFn:
    """The user's batched reward function, its result checked for length and type at each call.

    Call it in each process that scores, with the same `spec`: a function from a file is no importable module, so it
    does not survive pickling. A relative path is looked up from the current directory of that process.

    Args:
        spec: `package.module:function` or `path/to/file.py:function`.

    Raises:
        UserError: no such module, file or function, or not callable. What the module itself raises is not caught.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise UserError(
            f"reward.fn={spec} names no function: write package.module:function or path/to/file.py:function."
        )
    module = _module_from_file(spec, Path(place)) if place.endswith(".py") else _module_by_name(spec, place)
    if name not in vars(module):
        raise UserError(f"reward.fn={spec}: {place} defines no {name!r}: correct the name after the colon.")
    function = vars(module)[name]
    if not callable(function):
        raise UserError(f"reward.fn={spec}: {name!r} is a {type(function).__name__}, not a function: name a function.")
    return functools.partial(_checked_rewards, spec, function)


def _module_by_name(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module missing inside the user's module is for the user to see as it is.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(
            f"reward.fn={spec}: Python finds no module {error.name!r}: install it, put its directory on PYTHONPATH, "
            "or write path/to/file.py:function."
        ) from error


def _module_from_file(spec: str, path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UserError(f"reward.fn={spec}: there is no file {path}: correct the path, or make it absolute.")
    name = f"reward_fn_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    # A .py file always has a loader.
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    # Dataclasses and pickle look a class's module up here.
    sys.modules[name] = module
    module_spec.loader.exec_module(module)
    return module


def _checked_rewards(spec: str, function: Any, problems: Sequence["Problem"], responses: Sequence[str]) -> list[float]:
    rewards = function(problems, responses)
    try:
        values = [float(reward) for reward in rewards]
    except (TypeError, ValueError) as error:
        raise UserError(f"reward.fn={spec} gave {rewards!r:.200}: return a list of numbers.") from error
    if len(values) != len(responses):
        raise UserError(f"reward.fn={spec} gave {len(values)} rewards for {len(responses)} responses: return one each.")
    return values
