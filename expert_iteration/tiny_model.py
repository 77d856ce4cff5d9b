"""Tokenizer and warm start of the tiny model: a Qwen2 of half a million parameters taught by a sloppy teacher."""

import contextlib
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging as hf_logging

from expert_iteration.tiny import (
    CHAT_TEMPLATE,
    END_OF_TURN,
    NUMBERS,
    PAD,
    SPECIAL_TOKENS,
    START_OF_TURN,
    SYSTEM_PROMPT,
    TAGS,
    WORDINGS,
    Combination,
    Recipe,
    put_into_words,
    respond,
    sloppy_response,
    split_combinations,
)

_Example = tuple[list[int], list[int]]


def build_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the words of the task, with ChatML's turns; any text is encoded, by bytes if need be.

    For a Qwen2 model, AutoTokenizer puts Qwen2's pre-tokenizer into whatever was saved, so training uses it too. It
    splits numbers into digits; numbers of two digits are one token because they are added tokens.
    """
    bpe = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_tokenizer_corpus(), trainer)
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    bpe.add_tokens([AddedToken(number, normalized=False, single_word=True) for number in NUMBERS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        additional_special_tokens=[START_OF_TURN],
        model_max_length=recipe.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _tokenizer_corpus() -> Iterator[str]:
    """Generated problems and responses, and the fixed words of a chat often enough to become tokens."""
    rng = random.Random(0)
    train, _ = split_combinations()
    for combination in rng.choices(train, k=2000):
        yield put_into_words(combination, rng).question
        yield respond(combination, "careful")
    yield from [SYSTEM_PROMPT, "system\n", "user\n", "assistant\n"] * 200


def build_tiny_model(folder: Path, recipe: Recipe, model_seed: int, progress: bool) -> None:
    """Warm-start the model and save it with its tokenizer in `folder` (fp32 safetensors)."""
    tokenizer = build_tokenizer(recipe)
    with _one_thread(), _no_transformers_bars(), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed the caller's accelerators too.
        torch.random.default_generator.manual_seed(model_seed)
        model = Qwen2ForCausalLM(_model_config(tokenizer, recipe))
        _warm_start(model, tokenizer, recipe, random.Random(model_seed), progress)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _model_config(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        intermediate_size=recipe.intermediate_size,
        max_position_embeddings=recipe.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The order of floating-point sums depends on the number of threads, so the number is part of the recipe."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _no_transformers_bars() -> Iterator[None]:
    """One progress bar is enough; transformers would add its own for writing the weights."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _warm_start(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random, progress: bool
) -> None:
    """Imitate the sloppy teacher on training combinations, families equally often."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, recipe))
    families = [[c for c in split_combinations()[0] if c.ops == ops] for ops in WORDINGS]
    model.train()
    for _ in tqdm(range(recipe.steps), desc="tiny model", unit="step", disable=not progress):
        examples = [
            _example(rng.choice(rng.choice(families)), tokenizer, recipe, rng) for _ in range(recipe.batch_size)
        ]
        loss = _loss(model, examples, recipe.prompt_weight, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def _lr_factor(step: int, recipe: Recipe) -> float:
    """Linear to 1 over the warm-up steps, then half a cosine to 0."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def _example(
    combination: Combination, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, rng: random.Random
) -> _Example:
    """Prompt ids and response ids, the end-of-turn token included."""
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": put_into_words(combination, rng).question},
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    response = sloppy_response(combination, rng, recipe) + END_OF_TURN
    return tokenizer(prompt)["input_ids"], tokenizer(response)["input_ids"]


def _loss(model: Qwen2ForCausalLM, examples: list[_Example], prompt_weight: float, pad_id: int) -> torch.Tensor:
    """Mean loss of the response tokens + `prompt_weight` x mean loss of the prompt tokens."""
    length = max(len(prompt) + len(response) for prompt, response in examples)
    ids = torch.full((len(examples), length), pad_id)
    in_prompt = torch.zeros(len(examples), length, dtype=torch.bool)
    in_response = torch.zeros_like(in_prompt)
    for row, (prompt, response) in enumerate(examples):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        in_prompt[row, 1 : len(prompt)] = True
        in_response[row, len(prompt) : end] = True
    # Right padding: a real token never attends to it, so no attention mask is needed.
    logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses[in_response[:, 1:]].mean() + prompt_weight * losses[in_prompt[:, 1:]].mean()
