"""`expert_iteration.evaluation`: figures worked out by hand on a fake engine, and what is logged of them."""

import pytest

from expert_iteration.engine import Completion, Sampling
from expert_iteration.evaluation import Evaluator, probe_sequences
from expert_iteration.models import chat_prompt_ids
from expert_iteration.tasks import Problem, Task

SYSTEM_PROMPT = "Be brief."
HELDOUT = [Problem("1+1?", "2"), Problem("2+2?", "4"), Problem("3+3?", "6")]
SAMPLED = [["2", "3"], ["5", "7"], ["6", "6"]]  # right and wrong, both wrong, both right
GREEDY = ["2", "4", "66"]
END = "<|im_end|>"


def is_right(problems, texts):
    return [text == problem.answer for problem, text in zip(problems, texts, strict=True)]


def reward_or_length(problems, texts):
    """1 for a right answer, a tenth of its length for a wrong one: not the same as `is_right`."""
    return [1.0 if text == problem.answer else len(text) / 10 for problem, text in zip(problems, texts, strict=True)]


class FakeEngine:
    """Says what stands above, each response with the token that ends it."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, []

    def sample(self, prompts, sampling, seed):
        self.calls.append((prompts, sampling, seed))
        groups = [[text] for text in GREEDY] if sampling.temperature == 0 else SAMPLED
        return [[Completion(self.tokenizer(text + END)["input_ids"], "stop", 0) for text in group] for group in groups]


class FakeMetrics:
    def __init__(self):
        self.logged, self.shown = [], []

    def log(self, metrics, step):
        self.logged.append((metrics, step))

    def samples(self, rows, step, split):
        self.shown.append((rows, step, split))


@pytest.fixture
def make_evaluator(tiny_tokenizer):
    def make(seed=0, num_report=2):
        engine, metrics = FakeEngine(tiny_tokenizer), FakeMetrics()
        evaluator = Evaluator(
            engine,
            tiny_tokenizer,
            Task("sums", SYSTEM_PROMPT, [], HELDOUT, reward_or_length, is_right),
            Sampling(max_tokens=9, temperature=0.7, top_p=0.9, num_samples=2),
            seed=seed,
            metrics=metrics,
            num_report=num_report,
        )
        return evaluator, engine, metrics

    return make


def test_figures_are_those_worked_out_by_hand(make_evaluator, tiny_tokenizer):
    evaluator, _, _ = make_evaluator()
    lengths = [len(tiny_tokenizer(text)["input_ids"]) + 1 for group in SAMPLED for text in group]
    assert evaluator.evaluate(step=0, pushes=0) == {
        "pass@1": 3 / 6,
        "greedy": 2 / 3,
        "reward": pytest.approx((1 + 0.1 + 0.1 + 0.1 + 1 + 1) / 6),
        "pass@k": 2 / 3,
        "k": 2.0,
        "num_prompts": 3.0,
        "response_length": sum(lengths) / 6,
    }


def test_figures_are_logged_under_eval_with_the_step(make_evaluator):
    evaluator, _, metrics = make_evaluator()
    figures = evaluator.evaluate(step=12, pushes=0)
    assert metrics.logged == [({f"eval/{name}": value for name, value in figures.items()}, 12)]


def test_samples_show_the_first_problems_with_all_responses_none_of_them_kept(make_evaluator):
    evaluator, _, metrics = make_evaluator(num_report=2)
    evaluator.evaluate(step=12, pushes=0)
    right = {"text": "2", "reward": 1.0, "correct": True, "kept": False}
    wrong = [{"text": text, "reward": 0.1, "correct": False, "kept": False} for text in "357"]
    assert metrics.shown == [
        (
            [
                {"prompt": "1+1?", "answer": "2", "responses": [right, wrong[0]]},
                {"prompt": "2+2?", "answer": "4", "responses": wrong[1:]},
            ],
            12,
            "heldout",
        )
    ]


def test_every_problem_is_asked_through_the_chat_template(make_evaluator, tiny_tokenizer):
    evaluator, engine, _ = make_evaluator()
    evaluator.evaluate(step=0, pushes=0)
    asked = [chat_prompt_ids(tiny_tokenizer, SYSTEM_PROMPT, problem.question) for problem in HELDOUT]
    assert [prompts for prompts, _, _ in engine.calls] == [asked, asked]


def test_one_call_samples_as_configured_and_one_is_greedy(make_evaluator):
    evaluator, engine, _ = make_evaluator()
    evaluator.evaluate(step=0, pushes=0)
    assert [sampling for _, sampling, _ in engine.calls] == [
        Sampling(max_tokens=9, temperature=0.7, top_p=0.9, num_samples=2),
        Sampling(max_tokens=9, temperature=0.0, top_p=1.0, num_samples=1),
    ]


def test_every_evaluation_of_a_run_draws_from_the_same_random_states(make_evaluator):
    evaluator, engine, _ = make_evaluator(seed=1)
    evaluator.evaluate(step=0, pushes=0)
    evaluator.evaluate(step=50, pushes=0)
    first, second = engine.calls[:2], engine.calls[2:]
    assert first == second
    other, other_engine, _ = make_evaluator(seed=2)
    other.evaluate(step=0, pushes=0)
    assert other_engine.calls[0][2] != first[0][2]


def test_responses_are_judged_and_shown_without_special_tokens(make_evaluator):
    evaluator, engine, metrics = make_evaluator()
    assert END in engine.tokenizer.decode(engine.sample([], Sampling(9), 0)[0][0].token_ids)
    assert evaluator.evaluate(step=0, pushes=0)["pass@1"] > 0
    ((rows, _, _),) = metrics.shown
    assert not [response for row in rows for response in row["responses"] if "<|" in response["text"]]


def test_the_probe_is_prompts_with_their_ground_truths_cut_from_the_left(tiny_tokenizer):
    problems = [*HELDOUT, Problem("4+4?", "8 " * 200), Problem("5+5?", "10")]
    sequences = probe_sequences(tiny_tokenizer, problems, SYSTEM_PROMPT)
    assert len(sequences) == 4
    for sequence, problem in zip(sequences[:3], problems, strict=False):
        prompt = chat_prompt_ids(tiny_tokenizer, SYSTEM_PROMPT, problem.question)
        assert sequence == prompt + tiny_tokenizer(problem.answer)["input_ids"]
    assert sequences[3] == tiny_tokenizer("8 " * 200)["input_ids"][-128:]
