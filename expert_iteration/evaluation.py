"""Evaluation on held-out prompts, through the same engine that collects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torchrl._utils import timeit

from expert_iteration import timeline
from expert_iteration.engine import Completion, Sampling
from expert_iteration.models import chat_prompt_ids
from expert_iteration.seeds import derive_seed
from expert_iteration.tasks import Problem, Task

if TYPE_CHECKING:
    from expert_iteration.metrics import Metrics


class Sampler(Protocol):
    """What an engine must offer to be evaluated."""

    def sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[Completion]]:
        """Responses to tokenized prompts."""
        ...


class Evaluator:
    """Measures the engine's policy on a task's held-out problems.

    Args:
        engine: the client of the engine.
        tokenizer: of the model, with its chat template.
        task: held-out problems, reward, and what counts as correct.
        sampled: how to sample; `num_samples` responses a problem.
        seed: of the run. Every evaluation draws from the same random states, so that two differ by the policy alone.
        metrics: where figures and samples are logged.
        num_report: problems whose responses are logged with the figures.

    Attributes:
        is_pending: whether an evaluation is due that has not ended: the first, or one that was interrupted.
        measured_pushes: weight pushes that came before the last evaluation.
        has_stalled: whether so many evaluations in a row were no better than the best that the run should end.
    """

    def __init__(
        self,
        engine: Sampler,
        tokenizer: Any,
        task: Task,
        sampled: Sampling,
        *,
        seed: int,
        metrics: Metrics,
        num_report: int,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._task = task
        self._sampled = sampled
        self._greedy = Sampling(max_tokens=sampled.max_tokens, temperature=0.0)
        self._seed = seed
        self._metrics = metrics
        self._num_report = num_report
        self.is_pending = True
        self.measured_pushes = 0
        self.has_stalled = False
        self._prompts = [chat_prompt_ids(tokenizer, task.system_prompt, problem.question) for problem in task.heldout]

    def evaluate(self, step: int, pushes: int) -> dict[str, float]:
        """Measure the policy that the engine now holds, and log the figures (scope `eval/`) and a few samples.

        Args:
            step: gradient steps so far.
            pushes: weight pushes so far, which say what is measured.

        Returns:
            `pass@1` (share of sampled responses that are correct), `greedy` (the same of greedy responses), `reward`
            (mean of the sampled), `pass@k` (share of problems with a correct sampled response), `k`, `num_prompts`,
            `response_length` (mean, tokens).
        """
        self.is_pending, self.measured_pushes = True, pushes
        with timeit("evaluation"), timeline.span(timeline.EVALUATING):
            figures, samples = self._measure()
        self._metrics.log({f"eval/{name}": value for name, value in figures.items()}, step)
        self._metrics.samples(samples, step, "heldout")
        self.is_pending = False
        return figures

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"is_pending": self.is_pending, "measured_pushes": self.measured_pushes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.is_pending, self.measured_pushes = state["is_pending"], state["measured_pushes"]

    def _measure(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        groups = self._engine.sample(self._prompts, self._sampled, derive_seed(self._seed, "eval"))
        greedy = self._engine.sample(self._prompts, self._greedy, derive_seed(self._seed, "eval", "greedy"))
        problems = [problem for problem in self._task.heldout for _ in range(self._sampled.num_samples)]
        texts = self._decode([completion for group in groups for completion in group])
        correct = self._task.correct(problems, texts)
        rewards = self._task.reward(problems, texts)
        greedy_correct = self._task.correct(self._task.heldout, self._decode([group[0] for group in greedy]))
        k = self._sampled.num_samples
        solved = [any(correct[start : start + k]) for start in range(0, len(correct), k)]
        figures = {
            "pass@1": _mean(correct),
            "greedy": _mean(greedy_correct),
            "reward": _mean(rewards),
            "pass@k": _mean(solved),
            "k": float(k),
            "num_prompts": float(len(self._task.heldout)),
            "response_length": _mean([len(completion.token_ids) for group in groups for completion in group]),
        }
        return figures, self._samples(texts, rewards, correct)

    def _samples(self, texts: list[str], rewards: list[float], correct: list[bool]) -> list[dict[str, Any]]:
        k = self._sampled.num_samples
        return [
            {
                "prompt": problem.question,
                "answer": problem.answer,
                "responses": [
                    # Nothing of a held-out problem is ever kept for training.
                    {"text": texts[index], "reward": rewards[index], "correct": correct[index], "kept": False}
                    for index in range(number * k, (number + 1) * k)
                ],
            }
            for number, problem in enumerate(self._task.heldout[: self._num_report])
        ]

    def _decode(self, completions: Sequence[Completion]) -> list[str]:
        return self._tokenizer.batch_decode(
            [completion.token_ids for completion in completions], skip_special_tokens=True
        )


def probe_sequences(tokenizer: Any, problems: Sequence[Problem], system_prompt: str | None) -> list[list[int]]:
    """A few fixed sequences, prompt and ground truth, cut to 128 tokens: the probe of weight pushes."""
    return [
        (
            chat_prompt_ids(tokenizer, system_prompt, problem.question)
            + tokenizer(problem.answer, add_special_tokens=False)["input_ids"]
        )[-128:]
        for problem in problems[:4]
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
