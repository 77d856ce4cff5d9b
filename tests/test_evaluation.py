"""`expert_iteration.evaluation`: figures worked out by hand on a fake engine, and what is logged of them."""

import json

import pytest

from expert_iteration.best import Best
from expert_iteration.chat_template import chat_prompt_ids
from expert_iteration.engine import Completion, Sampling
from expert_iteration.evaluation import Evaluator, probe_sequences
from expert_iteration.judging import Judge
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


def is_odd(text):
    """A form that a right answer may lack and a wrong one have."""
    return text[-1] in "13579"


class FakeEngine:
    """Says what stands above, each response with the token that ends it; what is cut off has none."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls, self.sampled, self.cut_off = tokenizer, [], SAMPLED, ()

    def sample(self, prompts, sampling, seed):
        self.calls.append((prompts, sampling, seed))
        groups = [[text] for text in GREEDY] if sampling.temperature == 0 else self.sampled
        return [[self.complete(text) for text in group] for group in groups]

    def complete(self, text):
        if text in self.cut_off:
            return Completion(self.tokenizer(text)["input_ids"], "length", 0)
        return Completion(self.tokenizer(text + END)["input_ids"], "stop", 0)


class FakeMetrics:
    def __init__(self):
        self.logged, self.shown, self.rewarded = [], [], []

    def log(self, metrics, step):
        self.logged.append((metrics, step))

    def samples(self, rows, step, split):
        self.shown.append((rows, step, split))

    def rewards(self, values, step):
        self.rewarded.append((values, step))


@pytest.fixture
def make_evaluator(tiny_tokenizer):
    def make(seed=0, num_report=2, k=2, metric="pass@1", patience=None, on_best=lambda: None, say=print):
        engine, metrics = FakeEngine(tiny_tokenizer), FakeMetrics()
        task = Task("sums", SYSTEM_PROMPT, [], HELDOUT, reward_or_length, is_right, is_odd)
        evaluator = Evaluator(
            engine,
            tiny_tokenizer,
            task,
            Judge(task),
            Sampling(max_tokens=9, temperature=0.7, top_p=0.9, num_samples=2),
            k=k,
            best=Best(metric, patience),
            on_best=on_best,
            seed=seed,
            metrics=metrics,
            num_report=num_report,
            say=say,
        )
        return evaluator, engine, metrics

    return make


def test_figures_are_those_worked_out_by_hand(make_evaluator, tiny_tokenizer):
    evaluator, engine, _ = make_evaluator()
    engine.cut_off = ("3",)
    lengths = [len(tiny_tokenizer(text)["input_ids"]) + (text != "3") for group in SAMPLED for text in group]
    assert evaluator.evaluate(step=0, pushes=0) == {
        "pass@1": 3 / 6,
        "pass@1_stderr": pytest.approx(0.5 / 3**0.5),  # of the prompts' means 1/2, 0, 1
        "greedy": pytest.approx(2 / 3),
        "reward": pytest.approx((1 + 0.1 + 0.1 + 0.1 + 1 + 1) / 6),
        "pass@k": pytest.approx(2 / 3),
        "k": 2.0,
        "num_prompts": 3.0,
        "response_length": pytest.approx(sum(lengths) / 6),
        "truncation_rate": pytest.approx(1 / 6),
        "format_rate": pytest.approx(3 / 6),
        "reward_failures": 0.0,
    }


def test_k_may_be_less_than_the_samples(make_evaluator):
    evaluator, _, _ = make_evaluator(k=1)
    figures = evaluator.evaluate(step=0, pushes=0)
    assert (figures["pass@k"], figures["k"]) == (figures["pass@1"], 1.0)


def test_figures_are_logged_under_eval_with_the_step(make_evaluator):
    evaluator, _, metrics = make_evaluator()
    figures = evaluator.evaluate(step=12, pushes=0)
    assert metrics.logged == [({f"eval/{name}": value for name, value in figures.items()}, 12)]


def test_the_rewards_of_all_responses_are_written(make_evaluator):
    evaluator, _, metrics = make_evaluator(num_report=1)
    evaluator.evaluate(step=12, pushes=0)
    assert metrics.rewarded == [([1.0, 0.1, 0.1, 0.1, 1.0, 1.0], 12)]


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


# --- the best policy ---

WRONG = [["3", "3"], ["5", "5"], ["7", "7"]]
BETTER = [["2", "3"], ["5", "5"], ["7", "7"]]
RIGHT = [["2", "2"], ["4", "4"], ["6", "6"]]


def evaluate_all(evaluator, engine, answers, first_push=0):
    """Evaluate a policy for each set of answers, one push after another, ten gradient steps apart."""
    for pushes, engine.sampled in enumerate(answers, first_push):
        evaluator.evaluate(step=10 * pushes, pushes=pushes)


def test_a_trained_policy_that_beats_all_before_it_is_handed_on(make_evaluator):
    best_at = []
    evaluator, engine, metrics = make_evaluator(on_best=lambda: best_at.append(metrics.logged[-1][1]))
    evaluate_all(evaluator, engine, [WRONG, BETTER, BETTER, WRONG, RIGHT])
    assert best_at == [10, 40]  # once its figures were logged, and not again for an equal one


def test_a_start_model_that_nothing_beats_is_not_saved_again(make_evaluator):
    best_at = []
    evaluator, engine, _ = make_evaluator(on_best=lambda: best_at.append("never"))
    evaluate_all(evaluator, engine, [RIGHT, BETTER, RIGHT])
    assert best_at == []


@pytest.mark.parametrize("metric", ["pass@1", "pass@k", "greedy", "reward"])
def test_the_metric_decides(make_evaluator, metric):
    best_at = []
    evaluator, engine, _ = make_evaluator(metric=metric, on_best=lambda: best_at.append("saved"))
    evaluate_all(evaluator, engine, [WRONG, RIGHT])
    assert len(best_at) == (metric != "greedy")  # whose responses stay the same


def test_a_run_has_stalled_after_so_many_evaluations_without_a_better_one(make_evaluator):
    lines = []
    evaluator, engine, _ = make_evaluator(patience=2, say=lines.append)
    seen = []
    for number, engine.sampled in enumerate([WRONG, BETTER, WRONG, BETTER, WRONG]):
        evaluator.evaluate(step=10 * number, pushes=number)
        seen.append(evaluator.has_stalled)
    assert seen == [False, False, False, True, True]
    (line,) = lines
    assert line.startswith("pass@1 has not risen above 0.167 (after 10 gradient steps) in 2 evaluations (train.stop_")


def test_less_patience_than_before_ends_a_run_with_a_word(make_evaluator):
    evaluator, engine, _ = make_evaluator()
    evaluate_all(evaluator, engine, [RIGHT, WRONG, WRONG, WRONG])
    lines = []
    resumed, engine, _ = make_evaluator(patience=1, say=lines.append)
    resumed.load_state_dict(evaluator.state_dict())
    assert resumed.has_stalled
    evaluate_all(resumed, engine, [WRONG], first_push=4)  # the last of a run that ends
    (line,) = lines
    assert "in 3 evaluations (train.stop_patience): the run ends" in line


def test_without_patience_a_run_never_stalls(make_evaluator):
    evaluator, engine, _ = make_evaluator()
    evaluate_all(evaluator, engine, [RIGHT] + 20 * [WRONG])
    assert not evaluator.has_stalled


def test_it_goes_on_from_its_state(make_evaluator):
    evaluator, engine, _ = make_evaluator(patience=2)
    evaluate_all(evaluator, engine, [WRONG, RIGHT, BETTER])
    saved = json.loads(json.dumps(evaluator.state_dict()))
    best_at = []
    resumed, engine, _ = make_evaluator(patience=2, on_best=lambda: best_at.append("saved"))
    resumed.load_state_dict(saved)
    assert (resumed.is_pending, resumed.measured_pushes) == (False, 2)
    assert resumed.latest == evaluator.latest
    evaluate_all(resumed, engine, [RIGHT], first_push=3)
    assert best_at == []
    assert resumed.has_stalled


def test_an_evaluation_that_was_interrupted_is_pending(make_evaluator):
    def interrupt(*args):
        raise KeyboardInterrupt

    evaluator, engine, _ = make_evaluator()
    evaluator.evaluate(step=0, pushes=0)
    assert not evaluator.is_pending
    engine.sample = interrupt
    with pytest.raises(KeyboardInterrupt):
        evaluator.evaluate(step=5, pushes=1)
    assert (evaluator.is_pending, evaluator.measured_pushes) == (True, 1)


def test_what_is_done_for_the_best_finds_the_evaluation_ended(make_evaluator):
    seen = []
    evaluator, engine, _ = make_evaluator(on_best=lambda: seen.append(evaluator.state_dict()["is_pending"]))
    evaluate_all(evaluator, engine, [WRONG, RIGHT])
    assert seen == [False]


def test_the_probe_is_prompts_with_their_ground_truths_cut_from_the_left(tiny_tokenizer):
    problems = [*HELDOUT, Problem("4+4?", "8 " * 200), Problem("5+5?", "10")]
    sequences = probe_sequences(tiny_tokenizer, problems, SYSTEM_PROMPT)
    assert len(sequences) == 4
    for sequence, problem in zip(sequences[:3], problems, strict=False):
        prompt = chat_prompt_ids(tiny_tokenizer, SYSTEM_PROMPT, problem.question)
        assert sequence == prompt + tiny_tokenizer(problem.answer)["input_ids"]
    assert sequences[3] == tiny_tokenizer("8 " * 200)["input_ids"][-128:]
