"""Evaluation on held-out prompts, through the same engine that collects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torchrl._utils import timeit

from expert_iteration import timeline
from expert_iteration.best import Best
from expert_iteration.chat_template import chat_prompt_ids
from expert_iteration.engine import Completion, Sampling
from expert_iteration.figures import Judged, compute_figures
from expert_iteration.judging import Judge
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
        task: held-out problems, what counts as well-formed, and further figures where it has any.
        judge: says what responses are worth, and which are right.
        sampled: how to sample; `num_samples` responses a problem.
        k: of `pass@k`, at most that many.
        best: compares the evaluations.
        on_best: called after an evaluation of a trained policy that is the best so far, while the policy in the trainer
            is the one that was measured.
        seed: of the run. Every evaluation draws from the same random states, so that two differ by the policy alone.
        metrics: where figures and samples are logged.
        num_report: problems whose responses are logged with the figures.
        say: shows a line to the user.

    Attributes:
        is_pending: whether an evaluation is due that has not ended: the first, or one that was interrupted.
        measured_pushes: weight pushes that came before the last evaluation.
        latest: the figures of the last evaluation; {} before the first.
    """

    def __init__(
        self,
        engine: Sampler,
        tokenizer: Any,
        task: Task,
        judge: Judge,
        sampled: Sampling,
        *,
        k: int,
        best: Best,
        on_best: Callable[[], None],
        seed: int,
        metrics: Metrics,
        num_report: int,
        say: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._task = task
        self._judge_responses = judge
        self._sampled = sampled
        self._greedy = Sampling(max_tokens=sampled.max_tokens, temperature=0.0)
        self._k = k
        self._best = best
        self._on_best = on_best
        self._seed = seed
        self._metrics = metrics
        self._num_report = num_report
        self._say = say
        self._has_said_stall = False
        self.is_pending = True
        self.measured_pushes = 0
        self.latest: dict[str, float] = {}
        self._prompts = [chat_prompt_ids(tokenizer, task.system_prompt, problem.question) for problem in task.heldout]

    @property
    def has_stalled(self) -> bool:
        """Whether so many evaluations in a row were no better than the best that the run should end."""
        return self._best.has_stalled

    def evaluate(self, step: int, pushes: int) -> dict[str, float]:
        """Measure the policy that the engine now holds, and log the figures (scope `eval/`) and a few samples.

        Args:
            step: gradient steps so far.
            pushes: weight pushes so far, which say what is measured.

        Returns:
            The figures, as `compute_figures` names them.
        """
        self.is_pending, self.measured_pushes = True, pushes
        with timeit("evaluation"), timeline.span(timeline.EVALUATING):
            figures, judged = self._measure()
        self._metrics.log({f"eval/{name}": value for name, value in figures.items()}, step)
        self._metrics.samples(self._samples(judged), step, "heldout")
        self._metrics.rewards([response.reward for group in judged for response in group], step)
        self.latest = figures
        # The start model needs no copy: where nothing beats it, there is no best/.
        is_best = self._best.compare(figures, step) and pushes > 0
        self._say_if_stalled()
        self.is_pending = False
        if is_best:
            self._on_best()
        return figures

    def close(self) -> None:
        """End what judges; nothing can be evaluated any more."""
        self._judge_responses.close()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "is_pending": self.is_pending,
            "measured_pushes": self.measured_pushes,
            "latest": dict(self.latest),
            "best": self._best.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.is_pending, self.measured_pushes = state["is_pending"], state["measured_pushes"]
        self.latest = dict(state["latest"])
        self._best.load_state_dict(state["best"])
        self._say_if_stalled()  # with less patience than before it may have, and then no evaluation need follow

    def _say_if_stalled(self) -> None:
        if self.has_stalled and not self._has_said_stall:
            self._say(self._best.describe_stall())
        self._has_said_stall = self.has_stalled

    def _measure(self) -> tuple[dict[str, float], list[list[Judged]]]:
        groups = self._engine.sample(self._prompts, self._sampled, derive_seed(self._seed, "eval"))
        greedy = self._engine.sample(self._prompts, self._greedy, derive_seed(self._seed, "eval", "greedy"))
        judged_greedy = self._judge_responses(self._task.heldout, self._decode([group[0] for group in greedy]))
        greedy_failures = self._judge_responses.take_statistics()["reward_failures"]
        judged = self._judge(groups)
        statistics = self._judge_responses.take_statistics()  # components: of the sampled ones only
        statistics["reward_failures"] += greedy_failures
        figures = compute_figures(judged, [judgement.correct for judgement in judged_greedy], self._k)
        return figures | statistics | self._further_figures(judged), judged

    def _further_figures(self, judged: Sequence[Sequence[Judged]]) -> dict[str, float]:
        if self._task.figures is None:
            return {}
        pairs = [
            (problem, one.text) for problem, group in zip(self._task.heldout, judged, strict=True) for one in group
        ]
        return self._task.figures([problem for problem, _ in pairs], [text for _, text in pairs])

    def _judge(self, groups: Sequence[Sequence[Completion]]) -> list[list[Judged]]:
        """Of each problem's completions what the task says; it is asked once for all of them."""
        problems = [problem for problem, group in zip(self._task.heldout, groups, strict=True) for _ in group]
        completions = [completion for group in groups for completion in group]
        texts = self._decode(completions)
        judgements = self._judge_responses(problems, texts)
        for note in self._judge_responses.take_notes():
            self._say(note)
        judged = [
            Judged(
                text=text,
                reward=judgement.reward,
                correct=judgement.correct,
                has_format=self._task.has_format(text),
                num_tokens=len(completion.token_ids),
                is_truncated=completion.finish_reason == "length",
            )
            for text, judgement, completion in zip(texts, judgements, completions, strict=True)
        ]
        size = self._sampled.num_samples
        return [judged[start : start + size] for start in range(0, len(judged), size)]

    def _samples(self, judged: Sequence[Sequence[Judged]]) -> list[dict[str, Any]]:
        return [
            {
                "prompt": problem.question,
                "answer": problem.answer,
                "responses": [
                    # Nothing of a held-out problem is ever kept for training.
                    {"text": one.text, "reward": one.reward, "correct": one.correct, "kept": False}
                    for one in group
                ],
            }
            for problem, group in zip(self._task.heldout[: self._num_report], judged, strict=False)
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
