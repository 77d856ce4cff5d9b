"""IFEval: does a response follow every instruction it was given? TorchRL's scorer, called on plain text.

TorchRL and the libraries of the scorer are imported when the first response is scored.
"""

import contextlib
import functools
import importlib.util
import logging
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from expert_iteration.errors import UserError
from expert_iteration.rewards import ANSWER, THINK

if TYPE_CHECKING:
    from expert_iteration.tasks import Problem

logger = logging.getLogger(__name__)

REQUIREMENTS = ("nltk", "langdetect", "immutabledict")


def ifeval_rewards(problems: Sequence["Problem"], responses: Sequence[str]) -> list[float]:
    """TorchRL's IFEval reward, 0 to 1.15: shares of followed instructions plus 0.15 for the think and answer tags.

    As in TorchRL, only what stands in the first `<answer>` is judged; without one no instruction counts as followed.
    """
    return [_score(problem, response)[0] for problem, response in zip(problems, responses, strict=True)]


def ifeval_corrects(problems: Sequence["Problem"], responses: Sequence[str]) -> list[bool]:
    """Whether every instruction is followed (IFEval's prompt-level strict accuracy), judged as in `ifeval_rewards`."""
    return [_score(problem, response)[1] for problem, response in zip(problems, responses, strict=True)]


def check_requirements() -> None:
    """Refuse early, and without importing them, when a library of the IFEval scorer is missing."""
    missing = [name for name in REQUIREMENTS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"env.dataset=ifeval needs {', '.join(missing)} to score responses: pip install -r requirements_ifeval.txt."
        )


@functools.cache
def _scorer() -> Any:
    """TorchRL's scorer, once a process, made repeatable and independent of nltk's data files."""
    check_requirements()
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


@contextlib.contextmanager
def _same_draws_each_time(seed: str) -> Iterator[None]:
    """Scores repeat, and the caller's random state stays: TorchRL's checkers draw an argument they do not accept.

    google/IFEval has one such: `letter_frequency` of "#", which is no letter, so another is drawn in its place.
    """
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def _score(problem: "Problem", response: str) -> tuple[float, bool]:
    """Reward, and whether every instruction is followed."""
    scorer = _scorer()
    from tensordict import NonTensorData, TensorDict
    from torchrl.envs.llm.reward.ifeval._scorer import _process_results

    answers = ANSWER.findall(response)
    row = TensorDict({name: NonTensorData(problem.metadata[name]) for name in ("key", "instruction_id_list", "kwargs")})
    with _same_draws_each_time(problem.question):
        score = _process_results(row, answers[0] if answers else "", prompt=problem.question)
    reward = scorer.default_reward_aggregator(score, think_blocks=THINK.findall(response), answer_blocks=answers)
    return float(reward), bool(score.prompt_level_strict_acc)
