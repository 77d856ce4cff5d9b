"""`expert_iteration.tiny` and `tiny_model`: problems, split, teacher, tokenizer, warm start, cache."""

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_iteration import tiny, tiny_model
from expert_iteration.errors import UserError
from expert_iteration.rewards import tiny_correct, tiny_reward

GSM8K = Path(__file__).parents[1] / "../shared/data/gsm8k/train.jsonl"
FEW_STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.ensure_tiny_model(0, tmp_path_factory.mktemp("cache"), progress=False, steps=FEW_STEPS)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def chat(question: str, response: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": tiny.SYSTEM_PROMPT}, {"role": "user", "content": question}]
    return turns if response is None else [*turns, {"role": "assistant", "content": response}]


# Problems


def test_combinations_stay_in_range_and_never_go_below_zero():
    combinations = tiny.all_combinations()
    assert len(set(combinations)) == len(combinations) == 1008
    for ops, a, b, c in combinations:
        assert all(number in range(2, 6 if ops[0] == "*" else 10) for number in (a, b))
        assert c in range(2, 10)
        first = eval(f"{a}{ops[0]}{b}")
        assert first >= 0
        assert eval(f"{first}{ops[1]}{c}") >= 0


def test_split_shares_no_combination_and_never_changes():
    train, heldout = tiny.split_combinations()
    assert (len(train), len(heldout)) == (805, 203)
    assert set(train) | set(heldout) == set(tiny.all_combinations())
    # The published figures hold for this split: whoever changes it measures again.
    digest = hashlib.sha256(repr(sorted(tuple(combination) for combination in heldout)).encode()).hexdigest()
    assert digest[:8] == "08b6c4ba"


def test_heldout_problems_ask_for_numbers_never_trained_on():
    train, heldout = tiny.train_problems(), tiny.heldout_problems()
    assert (len(train), len(heldout)) == (4000, 200)
    assert {p.combination for p in train} == set(tiny.split_combinations()[0])
    assert {p.combination for p in heldout} <= set(tiny.split_combinations()[1])
    for problems in (train, heldout, heldout[:40]):
        assert set(Counter(p.combination.ops for p in problems).values()) == {len(problems) // 4}


def test_problem_lists_are_the_same_at_each_call():
    state = random.getstate()
    first, second = tiny.train_problems(), tiny.train_problems()
    assert first == second
    assert random.getstate() == state


def test_questions_hold_the_numbers_and_ground_truths_the_result():
    for problem in tiny.train_problems() + tiny.heldout_problems():
        ops, a, b, c = problem.combination
        assert sorted(map(int, re.findall(r"\d+", problem.question))) == sorted((a, b, c))
        assert "{" not in problem.question
        assert problem.answer.endswith(f"#### {eval(f'({a}{ops[0]}{b}){ops[1]}{c}')}")


# Teacher


def test_teacher_is_right_when_careful_and_wrong_otherwise_and_its_digits_never_are():
    for combination in tiny.all_combinations():
        answer = tiny.put_into_words(combination, random.Random(0)).answer
        earned = {style: tiny_reward(tiny.respond(combination, style), answer) for style in STYLES}
        assert earned == {"careful": 1.0, "hasty": 0.2, "untagged": 0.1}
        assert tiny_correct(tiny.respond(combination, "careful"), answer)
        for style in STYLES:
            calculations = re.findall(r"(\d+[-+*]\d+)=(\d+)", tiny.respond(combination, style))
            assert len(calculations) == (1 if style == "hasty" else 2)
            assert all(eval(left) == int(right) for left, right in calculations)


STYLES = ("careful", "hasty", "untagged")


def test_example_of_a_right_response():
    assert tiny.respond(tiny.Combination("+-", 2, 4, 3), "careful") == "<think>2+4=6, 6-3=3</think><answer>3</answer>"


@pytest.mark.parametrize(("ops", "shares"), [("+-", (0.32, 0.60, 0.08)), ("*+", (0.42, 0.40, 0.18))])
def test_teacher_is_sloppy_in_the_shares_of_the_recipe(ops, shares):
    combination, rng, draws = tiny.Combination(ops, 5, 5, 3), random.Random(0), 10_000
    counts = Counter(tiny.sloppy_response(combination, rng, tiny.Recipe()) for _ in range(draws))
    # Four standard deviations of a share are at most 4 x sqrt(0.25 / 10,000) = 0.02.
    for style, share in zip(STYLES, shares, strict=True):
        assert counts[tiny.respond(combination, style)] / draws == pytest.approx(share, abs=0.02)


# Tokenizer


def test_saved_tokenizer_gives_the_ids_the_model_was_trained_on(tokenizer):
    trained = tiny_model.build_tokenizer(tiny.Recipe())
    for problem in tiny.train_problems()[:400]:
        text = trained.apply_chat_template(
            chat(problem.question, tiny.respond(problem.combination, "careful")), tokenize=False
        )
        assert tokenizer(text)["input_ids"] == trained(text)["input_ids"]


def test_each_number_of_the_task_is_one_token(tokenizer):
    for number in range(100):
        ids = tokenizer(f"<think>5*{number}={number}, {number}</think>")["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids).count(str(number)) == 3 + (number == 5)


def test_longer_numbers_are_read_digit_by_digit(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("1234")["input_ids"]) == ["1", "2", "3", "4"]


def test_right_response_has_18_tokens_and_a_prompt_about_48(tokenizer):
    problems = tiny.train_problems()
    for problem in problems[:200]:
        assert len(tokenizer(tiny.respond(problem.combination, "careful") + tiny.END_OF_TURN)["input_ids"]) == 18
    prompts = [
        tokenizer.apply_chat_template(chat(p.question), add_generation_prompt=True)["input_ids"] for p in problems
    ]
    assert 40 < sum(map(len, prompts)) / len(prompts) < 55


@pytest.mark.parametrize(
    "text",
    [
        "Tom has 12 balls.\n\n  Two  spaces,\ttabs; 1234 and $5.00",
        "Ünïcode 漢字 🙂 don't",
        "<think>2+4=6</think><answer>6</answer>",
        "",
    ],
)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_turn_markers_are_special_and_tags_are_not(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert set(tokenizer.all_special_tokens) == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}
    for token in (*tiny.TAGS, *tiny.SPECIAL_TOKENS):
        assert len(tokenizer(token)["input_ids"]) == 1
    ids = tokenizer("<|im_start|><answer>3</answer><|im_end|><|endoftext|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<answer>3</answer>"


def test_assistant_mask_covers_each_response_with_its_end_of_turn(tokenizer):
    dialog = [
        *chat("One?", "<answer>1</answer>"),
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    encoded = tokenizer.apply_chat_template(dialog, return_dict=True, return_assistant_tokens_mask=True)
    masked = [id for id, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(masked) == "<answer>1</answer><|im_end|>2<|im_end|>"


def test_prompt_and_response_ids_concatenate_to_the_dialog(tokenizer):
    question, response = "How many?", "<think>2+4=6</think><answer>6</answer>"
    prompt = tokenizer.apply_chat_template(chat(question), add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(chat(question, response))["input_ids"]
    joined = prompt + tokenizer(response + tiny.END_OF_TURN)["input_ids"]
    assert joined + tokenizer("\n")["input_ids"] == whole


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K's training file is not here")
def test_real_questions_fit_into_the_model(tokenizer):
    questions = [json.loads(line)["question"] for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    longest = max(len(tokenizer(question)["input_ids"]) for question in questions)
    assert longest < tiny.Recipe().max_position_embeddings // 2


# Model


def test_saved_model_is_the_tied_qwen2_of_the_recipe_in_fp32(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == len(tokenizer)
    assert 450_000 < model.num_parameters() < 500_000
    assert model.config.max_position_embeddings == 2048
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def response_loss(model, tokenizer) -> float:
    """Mean loss of the careful responses to the first held-out problems."""
    losses = []
    for problem in tiny.heldout_problems()[:20]:
        dialog = chat(problem.question, tiny.respond(problem.combination, "careful"))
        encoded = tokenizer.apply_chat_template(
            dialog, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        labels = encoded["input_ids"].masked_fill(encoded["assistant_masks"] == 0, -100)
        with torch.no_grad():
            losses.append(model(input_ids=encoded["input_ids"], labels=labels).loss.item())
    return sum(losses) / len(losses)


def test_warm_start_teaches_the_form_of_a_response(tmp_path, folder, tokenizer):
    untaught = response_loss(AutoModelForCausalLM.from_pretrained(folder), tokenizer)
    taught = tiny.ensure_tiny_model(0, tmp_path, progress=False, steps=30)
    # Uniform over 575 tokens is 6.4; tags, separators and end of turn come first, digits much later.
    assert untaught > 4.0
    assert response_loss(AutoModelForCausalLM.from_pretrained(taught), tokenizer) < 2.0


def test_learning_rate_warms_up_then_falls_to_zero():
    recipe = tiny.Recipe(steps=100, warmup_steps=10)
    factors = [tiny_model._lr_factor(step, recipe) for step in range(101)]
    assert factors[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[10] == 1.0
    assert factors[100] == pytest.approx(0.0, abs=1e-12)


def test_same_seed_gives_the_same_bits_whatever_the_caller_did_before(tmp_path, folder, monkeypatch):
    threads, used, loss = torch.get_num_threads(), set(), tiny_model._loss
    monkeypatch.setattr(tiny_model, "_loss", lambda *args: (used.add(torch.get_num_threads()), loss(*args))[1])
    torch.set_num_threads(2)
    try:
        torch.manual_seed(123)
        random.seed(123)
        states = torch.get_rng_state(), random.getstate()
        again = tiny.ensure_tiny_model(0, tmp_path, progress=False, steps=FEW_STEPS)
        assert used == {1}
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
    finally:
        torch.set_num_threads(threads)
    for name in ("model.safetensors", "tokenizer.json", "config.json", "generation_config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    other = tiny.ensure_tiny_model(1, tmp_path, progress=False, steps=FEW_STEPS)
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


# Cache


def fake_build(folder: Path, recipe: tiny.Recipe, model_seed: int, progress: bool) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_text(f"{recipe.steps} {model_seed}")


def test_second_call_builds_nothing(tmp_path, monkeypatch):
    builds = []
    monkeypatch.setattr(tiny_model, "build_tiny_model", lambda *args: (builds.append(args[2]), fake_build(*args)))
    first = tiny.ensure_tiny_model(0, tmp_path, progress=False)
    assert tiny.ensure_tiny_model(0, tmp_path, progress=False) == first
    assert builds == [0]
    others = [
        tiny.ensure_tiny_model(1, tmp_path, progress=False),
        tiny.ensure_tiny_model(0, tmp_path, progress=False, steps=5),
    ]
    assert len({first, *others}) == 3


def test_changed_recipe_changes_the_name(monkeypatch):
    digest = tiny.Recipe().digest()
    assert tiny.Recipe(lr=1e-3).digest() != digest
    monkeypatch.setattr(tiny, "THINGS", (*tiny.THINGS, "cups"))
    assert tiny.Recipe().digest() != digest


def test_failed_build_leaves_nothing_and_the_next_one_succeeds(tmp_path, monkeypatch):
    def fail(folder: Path, *_) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_model, "build_tiny_model", fail)
    with pytest.raises(KeyboardInterrupt):
        tiny.ensure_tiny_model(0, tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tiny_model, "build_tiny_model", fake_build)
    assert (tiny.ensure_tiny_model(0, tmp_path, progress=False) / "model.safetensors").is_file()


def test_build_is_discarded_when_another_process_was_faster(tmp_path, monkeypatch):
    def build_while_another_does(folder: Path, recipe: tiny.Recipe, *args) -> None:
        fake_build(folder, recipe, *args)
        winner = tmp_path / f"tiny-{recipe.digest()}-seed0"
        winner.mkdir()
        (winner / "model.safetensors").write_text("the winner's")

    monkeypatch.setattr(tiny_model, "build_tiny_model", build_while_another_does)
    target = tiny.ensure_tiny_model(0, tmp_path, progress=False)
    assert (target / "model.safetensors").read_text() == "the winner's"
    assert list(tmp_path.iterdir()) == [target]


def test_progress_says_where_the_model_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny_model, "build_tiny_model", fake_build)
    target = tiny.ensure_tiny_model(0, tmp_path, progress=True)
    assert str(target) in capsys.readouterr().err


def test_cache_that_cannot_be_written_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        tiny.ensure_tiny_model(0, tmp_path / "file" / "cache", progress=False)


def test_default_cache_honours_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tiny.default_cache_dir() == tmp_path / "expert_iteration"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tiny.default_cache_dir() == Path.home() / ".cache" / "expert_iteration"


def test_tasks_and_tiny_import_no_torch():
    code = "import sys, expert_iteration.tasks, expert_iteration.tiny; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
