"""Sizes that follow from the configuration, with the arithmetic that users see at start."""

import math
from dataclasses import dataclass

from expert_iteration.config import Config

ASYNC_BUFFER_SIZE = 256


@dataclass(frozen=True)
class Sizes:
    """What a run will do at most, in responses (turns), groups and steps.

    Attributes:
        turns_per_batch: responses collected per batch; a whole number of groups.
        groups_per_batch: prompts per batch, each with `env.repeats` responses.
        num_batches: batches in the run, which is rounded up to whole ones.
        num_envs: responses asked of the engine at once; divides the batch.
        max_kept_per_batch: responses that selection keeps of a batch at most.
        buffer_size: responses that the buffer holds.
        max_trained_per_batch: responses that follow a batch into training at most; more than it keeps if the buffer is
            not emptied (sync mode).
        max_gradient_steps: micro-batches over the run, if every batch keeps all it may.
        max_optimizer_steps: optimizer steps over the run, if every batch keeps all it may.
    """

    turns_per_batch: int
    groups_per_batch: int
    num_batches: int
    num_envs: int
    max_kept_per_batch: int
    buffer_size: int
    max_trained_per_batch: int
    max_gradient_steps: int
    max_optimizer_steps: int


def derive_sizes(cfg: Config) -> Sizes:
    """The sizes of a run; `cfg` has passed the rules of `validation.py` that stand before the buffer's.

    A run of fewer turns than a batch makes one smaller batch, of whole groups.
    """
    train, repeats = cfg.train, cfg.env.repeats
    turns_per_batch = min(train.dialog_turns_per_batch, _ceil_div(train.total_dialog_turns, repeats) * repeats)
    groups_per_batch = turns_per_batch // repeats
    num_batches = _ceil_div(train.total_dialog_turns, turns_per_batch)
    max_kept = groups_per_batch * train.topk_size
    buffer_size = train.buffer_size or (max_kept if train.sync else ASYNC_BUFFER_SIZE)
    trained = _trained_after_batches(cfg, num_batches, max_kept, buffer_size)
    gradient_steps, optimizer_steps = _steps(cfg, trained)
    return Sizes(
        turns_per_batch=turns_per_batch,
        groups_per_batch=groups_per_batch,
        num_batches=num_batches,
        # A multiple of repeats that divides the configured batch need not divide a shorter one; the gcd always does.
        num_envs=math.gcd(min(cfg.env.num_envs, turns_per_batch), turns_per_batch),
        max_kept_per_batch=max_kept,
        buffer_size=buffer_size,
        max_trained_per_batch=trained[-1],
        max_gradient_steps=gradient_steps,
        max_optimizer_steps=optimizer_steps,
    )


def optimizer_steps_of_batch(cfg: Config, num_responses: int) -> int:
    """Optimizer steps that a synchronous run makes of the responses of one batch, all epochs together.

    Each epoch ends with a smaller micro-batch, each batch with a smaller optimizer step: nothing is carried over.
    """
    gradient_steps = cfg.train.epochs * _ceil_div(num_responses, cfg.train.optim_batch_size)
    return _ceil_div(gradient_steps, cfg.train.gradient_accumulation_steps)


def describe_sizes(sizes: Sizes, cfg: Config) -> list[str]:
    """Lines for the start of a run: each derived size with its arithmetic."""
    train = cfg.train
    return [
        f"{sizes.turns_per_batch} turns / {cfg.env.repeats} repeats = {sizes.groups_per_batch} groups; "
        f"{train.topk_size} kept each -> at most {sizes.max_kept_per_batch} responses a batch",
        _describe_run(sizes, train.total_dialog_turns),
        f"engine: {sizes.turns_per_batch} turns / {sizes.num_envs} asked at once = "
        f"{sizes.turns_per_batch // sizes.num_envs} calls a batch",
        f"{_describe_trained(sizes)} / {train.optim_batch_size} a micro-batch, {train.epochs} epochs, "
        f"{sizes.num_batches} batches -> at most {sizes.max_gradient_steps} gradient steps; "
        f"{train.gradient_accumulation_steps} to an optimizer step -> at most {sizes.max_optimizer_steps}",
        f"buffer: {sizes.buffer_size} responses",
    ]


def _trained_after_batches(cfg: Config, num_batches: int, max_kept: int, buffer_size: int) -> list[int]:
    """Responses trained on after each batch, at most: what is not emptied accumulates up to the buffer's size."""
    if cfg.train.empty_replay_buffer or not cfg.train.sync:
        return [max_kept] * num_batches
    return [min(batch * max_kept, buffer_size) for batch in range(1, num_batches + 1)]


def _steps(cfg: Config, trained: list[int]) -> tuple[int, int]:
    """Gradient and optimizer steps over the run, at most, given the responses trained on after each batch."""
    train = cfg.train
    if train.sync:
        gradient_steps = sum(train.epochs * _ceil_div(responses, train.optim_batch_size) for responses in trained)
        return gradient_steps, sum(optimizer_steps_of_batch(cfg, responses) for responses in trained)
    gradient_steps = _ceil_div(sum(trained) * train.epochs, train.optim_batch_size)
    return gradient_steps, _ceil_div(gradient_steps, train.gradient_accumulation_steps)


def _describe_trained(sizes: Sizes) -> str:
    if sizes.max_trained_per_batch == sizes.max_kept_per_batch:
        return f"{sizes.max_kept_per_batch} responses"
    return f"{sizes.max_kept_per_batch} to {sizes.max_trained_per_batch} responses (the buffer is not emptied)"


def _describe_run(sizes: Sizes, total: int) -> str:
    turns = sizes.num_batches * sizes.turns_per_batch
    rounded = f" (rounded up from {total})" if turns != total else ""
    return f"{turns} turns{rounded} / {sizes.turns_per_batch} = {sizes.num_batches} batches"


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
