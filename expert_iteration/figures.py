"""The figures of an evaluation, from judged responses; all but `k` and `num_prompts` are means over prompts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Judged(NamedTuple):
    """A response, and what the task says of it."""

    text: str  # without special tokens
    reward: float
    correct: bool
    has_format: bool
    num_tokens: int  # with the end-of-turn token
    is_truncated: bool  # whether the limit of tokens ended it


def compute_figures(sampled: Sequence[Sequence[Judged]], greedy: Sequence[bool], k: int) -> dict[str, float]:
    """The figures, by the names under which they are logged in the scope `eval/`.

    Args:
        sampled: for each prompt its sampled responses, the same number n for all.
        greedy: for each prompt whether the greedy response is correct.
        k: of `pass@k`, at most n.

    Returns:
        `pass@1` (share of sampled responses that are correct), `pass@1_stderr` (`standard_error`), `pass@k`
        (`pass_at_k`), `k`, `greedy` (share of greedy responses that are correct), `reward` (of sampled responses whose
        reward is finite; NaN if none is), `response_length` (tokens), `truncation_rate` (share that the limit of tokens
        ended), `format_rate` (share that has the form that the task asks for), `num_prompts`.
    """
    responses = [response for group in sampled for response in group]
    rates = [statistics.fmean(response.correct for response in group) for group in sampled]
    rewards = [response.reward for response in responses if math.isfinite(response.reward)]
    return {
        "pass@1": statistics.fmean(rates),
        "pass@1_stderr": standard_error(rates),
        "pass@k": statistics.fmean(pass_at_k(len(group), sum(one.correct for one in group), k) for group in sampled),
        "k": float(k),
        "greedy": statistics.fmean(greedy),
        "reward": statistics.fmean(rewards) if rewards else math.nan,
        "response_length": statistics.fmean(response.num_tokens for response in responses),
        "truncation_rate": statistics.fmean(response.is_truncated for response in responses),
        "format_rate": statistics.fmean(response.has_format for response in responses),
        "num_prompts": float(len(sampled)),
    }


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that at least one of k samples is correct, without bias: 1 - C(n - c, k) / C(n, k).

    Chen et al., 2021, arXiv:2107.03374. At k = n it is whether any is; at k = 1 the share that is.
    """
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def standard_error(means: Sequence[float]) -> float:
    """Of the mean over prompts, given each prompt's own mean: their standard deviation / sqrt(number of prompts).

    Prompts are drawn, not responses: those to one prompt are alike, and counting them one by one would make the error
    too small (Miller, 2024, arXiv:2411.00640). NaN for a single prompt, which has no spread.
    """
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan
