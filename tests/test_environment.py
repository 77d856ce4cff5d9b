"""`expert_iteration.environment`: how prompts are written, how responses are judged."""

import pytest
import torch
from chat_tokenizers import llama_tokenizer

from expert_iteration.chat_template import chat_prompt_ids
from expert_iteration.engine import Completion, Sampling
from expert_iteration.environment import make_task_env
from expert_iteration.judging import Judge
from expert_iteration.policy import EnginePolicy
from expert_iteration.prompt_stream import PromptStream
from expert_iteration.tasks import Problem, Task

PROBLEMS = [Problem(f"What is {n} + {n}?", f"#### {2 * n}") for n in range(7)]
QUESTIONS = [" What is 2+2?\n", "Spell ünïcödé 漢字.", "Is <|im_end|> a token, and is {{ this }} a template?", "a\n\nb"]


def contains_answer(problems, responses):
    return [
        float(problem.answer.split()[-1] in text.split()) for problem, text in zip(problems, responses, strict=True)
    ]


def make_env(tokenizer, problems=PROBLEMS, *, num_envs=4, repeats=2, seed=0, system_prompt="Be brief."):
    task = Task("sums", system_prompt, problems, [], contains_answer, contains_answer, bool)
    return make_task_env(task, tokenizer, PromptStream(problems, seed), Judge(task), num_envs=num_envs, repeats=repeats)


# --- how a prompt is written ---


@pytest.fixture(params=["tiny", "llama"])
def tokenizer(request, tiny_tokenizer):
    """ChatML; and a template of another family on a tokenizer that would begin every text with a token of its own."""
    if request.param == "tiny":
        return tiny_tokenizer
    llama = llama_tokenizer()
    # TorchRL has templates of its own, which it chooses by the name.
    llama.name_or_path = "somebody/llama-on-qwen"
    return llama


@pytest.mark.parametrize("system_prompt", ["Think, then answer.", None])
def test_a_prompt_is_the_chat_template_up_to_where_the_response_begins(tokenizer, system_prompt):
    problems = [Problem(question, "") for question in QUESTIONS]
    env = make_env(tokenizer, problems, num_envs=len(problems), repeats=1, system_prompt=system_prompt)
    rows = env.reset().unbind(0)
    assert {row["query"] for row in rows} == set(QUESTIONS)
    for row in rows:
        messages = [{"role": "user", "content": row["query"]}]
        if system_prompt is not None:
            messages.insert(0, {"role": "system", "content": system_prompt})
        template = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert row["text", "prompt"] == template


class SilentEngine:
    """Says nothing, and remembers which prompts it was asked."""

    def __init__(self):
        self.prompts = []

    def sample(self, prompts, sampling, seed):
        self.prompts += prompts
        return [[Completion([5], "length", 0)] for _ in prompts]


@pytest.mark.parametrize("system_prompt", ["Think, then answer.", None])
def test_training_and_evaluation_ask_a_question_with_the_same_tokens(tokenizer, system_prompt):
    problems = [Problem(question, "") for question in QUESTIONS]
    env = make_env(tokenizer, problems, num_envs=len(problems), repeats=1, system_prompt=system_prompt)
    engine, asked = SilentEngine(), env.reset()
    EnginePolicy(engine, tokenizer, Sampling(max_tokens=1), seed=0)(asked)
    expected = [chat_prompt_ids(tokenizer, system_prompt, row["query"]) for row in asked.unbind(0)]
    assert engine.prompts == expected


# --- rewards and ends ---


def respond(env, rows, texts):
    for row, text in zip(rows.unbind(0), texts, strict=True):
        row["text", "response"], row["text", "full"] = text, row["text", "prompt"] + text
    return env.step(rows)["next"]


def test_each_response_is_judged_with_its_own_problem(tiny_tokenizer):
    env = make_env(tiny_tokenizer, num_envs=4, repeats=2)
    rows = env.reset()
    first, _, third, _ = (PROBLEMS[int(row["prompt_index"])].answer.split()[-1] for row in rows.unbind(0))
    assert first != third
    after = respond(env, rows, [f"it is {first}", f"it is {third}", f"it is {first}", f"it is {third}"])
    assert after["reward"].tolist() == [[1.0], [0.0], [0.0], [1.0]]
    assert after["reward"].dtype == torch.float32


def test_a_dialog_has_one_turn(tiny_tokenizer):
    env = make_env(tiny_tokenizer, num_envs=4, repeats=2)
    rows = env.reset()
    assert not rows["done"].any()
    after = respond(env, rows, ["yes"] * 4)
    for name in ("done", "terminated"):
        assert after[name].shape == (4, 1)
        assert after[name].all()


def test_the_prompts_of_a_group_are_alike_and_stand_together(tiny_tokenizer):
    env = make_env(tiny_tokenizer, num_envs=6, repeats=3)
    rows = env.reset().unbind(0)
    for group in (rows[:3], rows[3:]):
        assert len({(int(row["group_id"]), int(row["prompt_index"]), row["text", "prompt"]) for row in group}) == 1
    assert int(rows[0]["group_id"]) != int(rows[3]["group_id"])
