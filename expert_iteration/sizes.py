"""Sizes that follow from the configuration, with the arithmetic that users see at start."""

import math
from dataclasses import dataclass

from expert_iteration.config import Config, RestartFrom, accumulates_expert_set, empties_buffer

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
        max_optimizer_steps: optimizer steps over the run, if every batch keeps all it may, or those that
            `train.total_optimizer_steps` asks for (async mode).
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

    A run of fewer turns than a batch makes one smaller batch, of whole groups. For a run on an expert set
    `train.total_dialog_turns` must be the number of its responses (`run.py` sets it). To an evaluation alone, which has
    no batches and whose values no rule compares, the sizes say nothing.
    """
    if cfg.train.from_expert_set is not None:
        return _sizes_of_expert_set(cfg)
    train, repeats = cfg.train, cfg.env.repeats
    turns_per_batch = min(train.dialog_turns_per_batch, ceil_div(train.total_dialog_turns, repeats) * repeats)
    groups_per_batch = turns_per_batch // repeats
    num_batches = ceil_div(train.total_dialog_turns, turns_per_batch)
    max_kept = groups_per_batch * train.topk_size
    buffer_size = train.buffer_size or _buffer_size(cfg, num_batches, max_kept)
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


def responses_per_gradient_step(cfg: Config) -> int:
    """Responses of one gradient step: a micro-batch on each training device."""
    return cfg.train.optim_batch_size * cfg.train_model.num_devices


def optimizer_steps_of_batch(cfg: Config, num_responses: int) -> int:
    """Optimizer steps that a synchronous run makes of the responses of one batch, all epochs together.

    Each epoch ends with a smaller micro-batch, each batch with a smaller optimizer step: nothing is carried over.
    """
    gradient_steps = cfg.train.epochs * ceil_div(num_responses, responses_per_gradient_step(cfg))
    return ceil_div(gradient_steps, cfg.train.gradient_accumulation_steps)


def due_gradient_steps(cfg: Config, responses_kept: int, progress: float) -> int:
    """Gradient steps that an asynchronous run owes, all in all, once it has collected a fraction of what it will.

    Args:
        cfg: `train.total_optimizer_steps` shares its steps out evenly over what is collected; if null, each kept
            response is drawn `train.epochs` times on average.
        responses_kept: of all batches so far.
        progress: fraction of the run's batches that is collected. Only at 1 does the last, smaller micro-batch count.
    """
    train = cfg.train
    if train.total_optimizer_steps is not None:
        # Steps x batches done / batches may fall just short of the whole number that it is.
        return math.floor(train.total_optimizer_steps * progress + 1e-9) * train.gradient_accumulation_steps
    draws = train.epochs * responses_kept
    per_step = responses_per_gradient_step(cfg)
    return ceil_div(draws, per_step) if progress >= 1 else draws // per_step


def batches_ahead(cfg: Config) -> int | None:
    """Batches that an asynchronous run may have collected beyond the last one worked off; None: any number."""
    if cfg.train.deterministic:
        return 1
    if cfg.train.max_ahead is None:
        return None
    return cfg.train.max_ahead // derive_sizes(cfg).groups_per_batch


def describe_sizes(sizes: Sizes, cfg: Config) -> list[str]:
    """Lines for the start of a run: each derived size with its arithmetic."""
    train = cfg.train
    if cfg.eval.only:
        return [_describe_evaluation(cfg)]
    if train.from_expert_set is not None:
        return [_describe_passes(sizes, cfg)]
    return [
        f"{sizes.turns_per_batch} turns / {cfg.env.repeats} repeats = {sizes.groups_per_batch} groups; "
        f"{train.topk_size} kept each -> at most {sizes.max_kept_per_batch} responses a batch",
        _describe_run(sizes, train.total_dialog_turns),
        f"engine: {sizes.turns_per_batch} turns / {sizes.num_envs} asked at once = "
        f"{sizes.turns_per_batch // sizes.num_envs} calls a batch",
        *(_describe_sync(sizes, cfg) if train.sync else _describe_async(sizes, cfg)),
    ]


def _sizes_of_expert_set(cfg: Config) -> Sizes:
    """One batch, of responses that are there already: as many as `train.total_dialog_turns` says."""
    responses = cfg.train.total_dialog_turns
    gradient_steps, optimizer_steps = _steps(cfg, [responses])
    return Sizes(
        turns_per_batch=responses,
        groups_per_batch=responses,
        num_batches=1,
        num_envs=min(cfg.env.num_envs, responses),
        max_kept_per_batch=responses,
        buffer_size=responses,
        max_trained_per_batch=responses,
        max_gradient_steps=gradient_steps,
        max_optimizer_steps=optimizer_steps,
    )


def _buffer_size(cfg: Config, num_batches: int, max_kept: int) -> int:
    """Responses that the buffer must hold."""
    if not cfg.train.sync:
        return max(ASYNC_BUFFER_SIZE, max_kept)
    return num_batches * max_kept if accumulates_expert_set(cfg) else max_kept


def _trained_after_batches(cfg: Config, num_batches: int, max_kept: int, buffer_size: int) -> list[int]:
    """Responses trained on after each batch, at most: what is not emptied accumulates up to the buffer's size."""
    if empties_buffer(cfg) or not cfg.train.sync:
        return [max_kept] * num_batches
    return [min(batch * max_kept, buffer_size) for batch in range(1, num_batches + 1)]


def _steps(cfg: Config, trained: list[int]) -> tuple[int, int]:
    """Gradient and optimizer steps over the run, at most, given the responses trained on after each batch."""
    train = cfg.train
    if train.sync:
        gradient_steps = sum(
            train.epochs * ceil_div(responses, responses_per_gradient_step(cfg)) for responses in trained
        )
        return gradient_steps, sum(optimizer_steps_of_batch(cfg, responses) for responses in trained)
    gradient_steps = due_gradient_steps(cfg, sum(trained), progress=1)
    return gradient_steps, ceil_div(gradient_steps, train.gradient_accumulation_steps)


def _describe_evaluation(cfg: Config) -> str:
    held_out, samples = cfg.eval.num_prompts, cfg.eval.num_samples
    return (
        f"evaluation of {cfg.model.name}: {held_out} prompts x ({samples} responses at temperature "
        f"{cfg.eval.temperature:g} + 1 greedy) = {held_out * (samples + 1)} responses"
    )


def _describe_passes(sizes: Sizes, cfg: Config) -> str:
    return (
        f"{sizes.turns_per_batch} responses / {responses_per_gradient_step(cfg)} a gradient step, {cfg.train.epochs} "
        f"epochs -> {sizes.max_gradient_steps} gradient steps; {cfg.train.gradient_accumulation_steps} to an optimizer "
        f"step -> {sizes.max_optimizer_steps}"
    )


def _describe_sync(sizes: Sizes, cfg: Config) -> list[str]:
    train = cfg.train
    return [
        f"{_describe_trained(sizes, cfg)} / {responses_per_gradient_step(cfg)} a gradient step, {train.epochs} epochs, "
        f"{sizes.num_batches} batches -> {_describe_steps(sizes, cfg)}",
        f"buffer: {sizes.buffer_size} responses",
        *(["each batch fine-tunes the start model anew"] if train.restart_from is RestartFrom.base else []),
    ]


def _describe_async(sizes: Sizes, cfg: Config) -> list[str]:
    return [
        _describe_drawn(sizes, cfg),
        f"buffer: {sizes.buffer_size} responses, the oldest make room",
        *_describe_ahead(sizes, cfg),
    ]


def _describe_drawn(sizes: Sizes, cfg: Config) -> str:
    train = cfg.train
    kept = f"at most {sizes.max_kept_per_batch} kept a batch x {sizes.num_batches} batches"
    if train.total_optimizer_steps is None:
        drawn = f"{kept} x {train.epochs} epochs / {responses_per_gradient_step(cfg)} a gradient step"
        return f"{drawn} -> {_describe_steps(sizes, cfg)}"
    epochs = (
        sizes.max_gradient_steps * responses_per_gradient_step(cfg) / (sizes.max_kept_per_batch * sizes.num_batches)
    )
    return (
        f"{sizes.max_optimizer_steps} optimizer steps x {train.gradient_accumulation_steps} = "
        f"{sizes.max_gradient_steps} gradient steps; x {responses_per_gradient_step(cfg)} each / ({kept}) -> at least "
        f"{epochs:.3g} epochs"
    )


def _describe_steps(sizes: Sizes, cfg: Config) -> str:
    return (
        f"at most {sizes.max_gradient_steps} gradient steps; {cfg.train.gradient_accumulation_steps} to an optimizer "
        f"step -> at most {sizes.max_optimizer_steps}"
    )


def _describe_ahead(sizes: Sizes, cfg: Config) -> list[str]:
    """Nothing where collection may be any number of batches ahead."""
    batches = batches_ahead(cfg)
    if batches is None:
        return []
    noun = "batch" if batches == 1 else "batches"
    return [f"collection: at most {batches * sizes.groups_per_batch} groups = {batches} {noun} ahead of training"]


def _describe_trained(sizes: Sizes, cfg: Config) -> str:
    if sizes.max_trained_per_batch == sizes.max_kept_per_batch:
        return f"{sizes.max_kept_per_batch} responses"
    why = "all that was kept so far" if accumulates_expert_set(cfg) else "the buffer is not emptied"
    return f"{sizes.max_kept_per_batch} to {sizes.max_trained_per_batch} responses ({why})"


def _describe_run(sizes: Sizes, total: int) -> str:
    turns = sizes.num_batches * sizes.turns_per_batch
    rounded = f" (rounded up from {total})" if turns != total else ""
    return f"{turns} turns{rounded} / {sizes.turns_per_batch} = {sizes.num_batches} batches"


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)
