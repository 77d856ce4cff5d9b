"""Micro-batches to optimizer steps: precision, accumulation, clipping, schedule, and what happens to a bad step.

The learner knows nothing of sync or async, of buffers or engines: `step(batch)` is one gradient step, and every
`gradient_accumulation_steps` of them make an optimizer step. It also knows nothing of processes: with several training
ranks each has a learner, `data_parallel.py` says what they exchange, and `parallel_learner.py` is rank 0's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchrl._utils import timeit

from expert_iteration import schedule, timeline
from expert_iteration.data_parallel import Alone, held, is_bulky, whole, whole_on_cpu
from expert_iteration.errors import UserError
from expert_iteration.loss import SFTLoss
from expert_iteration.models import hugging_face_model
from expert_iteration.random_state import random_state, set_random_state
from expert_iteration.row_keys import RESPONSE_MASK_KEY, TOKENS_KEY
from expert_iteration.sizes import ceil_div
from expert_iteration.turns import Turns

if TYPE_CHECKING:
    from expert_iteration.adapter_reference import AdapterReference


class StepResult(dict[str, float]):
    """Metrics of one gradient step by name, and where it stands.

    Metrics: loss, loss_sft, loss_kl_to_ref and kl_to_ref (where there are such), entropy (of the policy, nats), reward
    and response_length (means over the micro-batch, length in tokens), learning_rate and kl_to_ref_coeff (where a
    schedule sets it); and grad_norm (before clipping) where a window ended.

    Attributes:
        stepped: whether the weights changed: an optimizer step happened and was not skipped as bad.
        step: gradient steps so far.
        since: gradient steps at the optimizer step before this one; hand it to `is_due`.
    """

    def __init__(self, metrics: Mapping[str, float], *, stepped: bool, step: int, since: int):
        super().__init__(metrics)
        self.stepped, self.step, self.since = stepped, step, since


class Share(NamedTuple):
    """One rank's part of a gradient step."""

    rows: TensorDictBase
    """At least one, for every rank takes part in every step."""
    num_responses: int
    """How many of them count: all, or 0 on a rank for which none were left."""
    step_responses: int
    """Responses of the step on all ranks."""
    step_tokens: int
    """Their prompt and response tokens."""


class Learner:
    """Owns the optimizer's side of training; the model, the loss and the schedule are given.

    A *window* is the gradient steps that share an optimizer step. Gradients are summed over its responses, on all
    ranks, and divided by their number at its end, so that any division of a large batch into micro-batches and among
    ranks gives the large batch's step.

    A *bad* step is a window with a non-finite loss, or a non-finite gradient: its gradients are thrown away, weights,
    optimizer and schedule stay as they are, `bad_steps` counts it. Under float16 a gradient that overflows while the
    loss is finite is the gradient scaler's ordinary way of finding its scale: the step is skipped but not bad, unless
    the scale is already down to 1, where scaling cannot be the reason.

    Args:
        model: trained in place, on the device where its parameters are. Trainable parameters are float32: autocast
            lowers the precision of the forward pass only, as bfloat16 parameters hardly move at usual learning rates.
        loss_fn: batch -> SFTLossOutput whose terms are means over the batch's responses.
        optimizer: over the model's trainable parameters.
        scheduler: from `schedule.make_scheduler`; advances with each optimizer step.
        gradient_accumulation_steps: gradient steps in a window.
        clip_grad_norm: largest norm of the mean gradient; None: no clipping.
        autocast_dtype: of the forward pass; None: no autocast. float16 adds a gradient scaler.
        max_bad_steps: bad steps in a row that end the run.
        eval_mode: leave the model in eval mode (no dropout, and Hugging Face then does no gradient checkpointing).
        kl_schedule: sets `loss_fn.kl_to_ref_coeff` for each window, by the scheduler's progress when it opens; None:
            it stays as it is, and out of the metrics.
        parallel: what the ranks exchange; by default this learner is alone.
        reference: gives each batch the reference log-probs that it lacks; None: batches bring what they need.
        keep_start: keep the weights as they are now in host memory, what this rank holds of them, for `restart`.

    Raises:
        UserError: a trainable parameter is not float32 (or float64).

    Attributes:
        turns: of engine and trainer, on an accelerator that they share.
        gradient_steps, optimizer_steps, bad_steps: counted over the run.
        responses_trained: rows that went through the model, each as often as it did, on all ranks.
        tokens_trained: prompt and response tokens that went through the model, without padding.
        seconds: spent in `step` and `flush`.
        first_optimizer_step_time: when it ended, in seconds since the epoch; None before.
        last_step_at: gradient step of the last optimizer step (0 before the first).
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: SFTLoss,
        optimizer: Optimizer,
        scheduler: LambdaLR,
        *,
        gradient_accumulation_steps: int,
        clip_grad_norm: float | None,
        autocast_dtype: torch.dtype | None,
        max_bad_steps: int,
        eval_mode: bool = False,
        kl_schedule: schedule.KLSchedule | None = None,
        parallel: Alone | None = None,
        reference: AdapterReference | None = None,
        keep_start: bool = False,
    ):
        self.model, self.loss_fn, self.optimizer, self.scheduler = model, loss_fn, optimizer, scheduler
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.clip_grad_norm = clip_grad_norm
        self.max_bad_steps = max_bad_steps
        self.eval_mode = eval_mode
        self.kl_schedule = kl_schedule
        self.reference = reference
        self.turns = Turns()
        self._parallel = Alone() if parallel is None else parallel
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        _check_master_weights(model)
        self._start = [held(p).to("cpu", copy=True) for p in self._parameters] if keep_start else None
        self.device = self._parameters[0].device
        self._autocast = torch.autocast(self.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=autocast_dtype == torch.float16)
        self.gradient_steps = self.optimizer_steps = self.bad_steps = self.last_step_at = 0
        self.responses_trained = self.tokens_trained = 0
        self.seconds = 0.0
        self.first_optimizer_step_time: float | None = None
        self._bad_in_a_row = 0
        self._window_fault: str | None = None
        self._clear_window()

    def step(self, batch: TensorDictBase) -> StepResult:
        """One gradient step on a batch of B responses; ends the window when it is full.

        Raises:
            RuntimeError: the `max_bad_steps`-th bad step in a row; says what was not finite.
        """
        with self._timed():
            self._prepare(batch)
            (share,) = share_out(batch, 1)
            return self.train_on(share)

    def train_on(self, share: Share) -> StepResult:
        """This rank's part of a gradient step; collective. The metrics are those of the whole step, on every rank."""
        self.model.train(not self.eval_mode)
        if not self._window_steps:
            self._set_kl_to_ref_coeff()
        values = self._backward(share)
        window_is_full = self._window_steps == self.gradient_accumulation_steps
        if window_is_full:
            values["grad_norm"] = self._mean_gradient_norm()
        metrics = self._to_floats(values)
        self._note_bad_loss(metrics)
        return self._end_window(metrics) if window_is_full else self._result(metrics, stepped=False)

    def flush(self) -> StepResult:
        """The optimizer step of a window that is not full; nothing happens when it is empty.

        Returns:
            learning_rate, kl_to_ref_coeff (where a schedule sets it) and, if there was a window, grad_norm.

        Raises:
            RuntimeError: as `step`.
        """
        if not self._window_steps:
            return self._result({}, stepped=False)
        with self._timed():
            return self._end_window(self._to_floats({"grad_norm": self._mean_gradient_norm()}))

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.monotonic()
        with timeit("training"), timeline.span(timeline.TRAINING):
            yield
        self.seconds += time.monotonic() - start

    def plan(self, num_optimizer_steps: int, until: float) -> None:
        """Tell the schedule that the next `num_optimizer_steps` take the run to the fraction `until` of its length."""
        schedule.plan(self.scheduler, num_optimizer_steps, until)

    @torch.no_grad()
    def restart(self, num_optimizer_steps: int, until: float) -> None:
        """Begin anew: the start weights, a fresh optimizer, a whole schedule of learning rates for the steps to come.

        All else is as with `plan`, and counters go on.

        Raises:
            RuntimeError: the start weights were not kept.
        """
        if self._start is None:
            raise RuntimeError("The learner was built without keep_start, so it has no weights to begin anew from.")
        for parameter, start in zip(self._parameters, self._start, strict=True):
            held(parameter).copy_(start)
        self.optimizer.state.clear()
        schedule.plan(self.scheduler, num_optimizer_steps, until, anew=True)

    def rescale(self, ratio: float) -> None:
        """Tell the schedule that what was the whole run is `ratio` of it."""
        schedule.rescale(self.scheduler, ratio)

    def state_dict(self) -> dict[str, Any]:
        """Counters and the states of optimizer, scheduler and scaler, named as in a checkpoint; no weights.

        With a sharded model the optimizer's tensors are this rank's shards: a checkpoint is made by `checkpoint`.

        Raises:
            RuntimeError: in the middle of a window, whose gradients are in no checkpoint.
        """
        if self._window_steps:
            raise RuntimeError("A window of gradient steps is open: call flush() before state_dict().")
        return {
            "step": self.gradient_steps,
            "optim_step": self.optimizer_steps,
            "last_step_at": self.last_step_at,
            "bad_steps": self.bad_steps,
            "bad_steps_in_a_row": self._bad_in_a_row,
            "responses_trained": self.responses_trained,
            "tokens_trained": self.tokens_trained,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.scheduler.state_dict(),
            "scaler_state_dict": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; the model's weights are loaded by the caller. An open window is dropped."""
        self.gradient_steps, self.optimizer_steps = state["step"], state["optim_step"]
        self.last_step_at = state["last_step_at"]
        self.responses_trained, self.tokens_trained = state["responses_trained"], state["tokens_trained"]
        self.bad_steps, self._bad_in_a_row = state["bad_steps"], state["bad_steps_in_a_row"]
        self.optimizer.load_state_dict(state["optimizer_state_dict"])
        self.scheduler.load_state_dict(state["scheduler_state_dict"])
        self.scaler.load_state_dict(state["scaler_state_dict"])
        self._clear_window()

    def checkpoint(self, *, keep: bool = True) -> dict[str, Any]:
        """`state_dict` and the weights ("model_state_dict"), whole and on the CPU; collective.

        Whatever the ranks hold, it is what one rank with the whole model would save.

        Args:
            keep: False takes part only; the result is without tensors.

        Raises:
            RuntimeError: as `state_dict`.
        """
        return whole_on_cpu({**self.state_dict(), "model_state_dict": trained_weights(self.model)}, keep=keep)

    def load_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Continue from `checkpoint`; collective.

        Args:
            state: as saved; on other ranks than 0 its `outline` is enough.

        Raises:
            RuntimeError: the weights are not those of this model, by name or shape.
        """
        self._load_weights(state["model_state_dict"])
        optimizer = state["optimizer_state_dict"]
        moments = {index: self._receive_moments(index, values) for index, values in optimizer["state"].items()}
        self.load_state_dict({**state, "optimizer_state_dict": {**optimizer, "state": moments}})

    @property
    def is_in_window(self) -> bool:
        """Whether gradients wait for the rest of their window."""
        return self._window_steps > 0

    def process_state(self) -> dict[str, Any]:
        """What a run that goes on needs beside `checkpoint`: times, the reference's log-probs, random states by rank.

        In types that `torch.load` trusts; collective.
        """
        return {
            "seconds": self.seconds,
            "first_optimizer_step_time": self.first_optimizer_step_time,
            "reference": {} if self.reference is None else self.reference.state_dict(),
            "random": self._random_states(),
        }

    def load_process_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `process_state` of as many ranks; collective."""
        self.seconds = state["seconds"]
        self.first_optimizer_step_time = state["first_optimizer_step_time"]
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])
        self._set_random_states(state["random"])

    def _random_states(self) -> list[dict[str, Any]]:
        return [random_state()]

    def _set_random_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        set_random_state(states[0])

    @torch.no_grad()
    def _load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        own = trained_weights(self.model)
        shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (own, weights)]
        if shapes[0] != shapes[1]:
            different = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
            raise RuntimeError(
                f"The checkpoint is of another model: {len(different)} tensors are missing, unknown or of another "
                f"shape, such as {', '.join(different[:3])}."
            )
        for name, tensor in own.items():
            tensor.copy_(self._parallel.receive(weights[name], like=tensor))

    def _receive_moments(self, index: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the optimizer keeps of its parameter `index`: moments of its shape, and numbers such as its steps."""
        parameter = self._parameters[index]
        return {
            name: self._parallel.receive(value, like=parameter) if is_bulky(value) else value
            for name, value in values.items()
        }

    def _prepare(self, batch: TensorDictBase) -> None:
        """What comes before a gradient step, once for all ranks."""
        self.turns.to_trainer()
        if self.reference is not None:
            self.reference.attach(batch)

    def _set_kl_to_ref_coeff(self) -> None:
        """Once a window, for its micro-batches make one step: a plan that comes in between counts from the next on."""
        if self.kl_schedule is not None:
            self.loss_fn.kl_to_ref_coeff = self.kl_schedule(schedule.progress(self.scheduler))

    def _backward(self, share: Share) -> dict[str, torch.Tensor]:
        """Add the gradients of the share's summed loss; returns the step's metrics as tensors, still on the device."""
        with self._autocast:
            output = self.loss_fn(share.rows)
        terms = {"loss_sft": output.loss_sft, "loss_kl_to_ref": output.loss_kl_to_ref}
        terms = {name: term for name, term in terms.items() if term is not None}
        loss = torch.stack(list(terms.values())).sum()
        self.scaler.scale(loss * share.num_responses).backward()
        self.gradient_steps += 1
        self._window_steps += 1
        self._window_responses += share.step_responses
        self.responses_trained += share.step_responses
        self.tokens_trained += share.step_tokens
        beside = {"kl_to_ref": output.kl_to_ref, "entropy": output.entropy}
        terms |= {name: value for name, value in beside.items() if value is not None}
        metrics = {"loss": loss, **terms, **_batch_metrics(share.rows, self.device)}
        return self._parallel.mean(metrics, share.num_responses / share.step_responses)

    def _mean_gradient_norm(self) -> torch.Tensor:
        """Turn the summed gradients into the mean over the window's responses and clip it; returns the norm before."""
        self._parallel.reduce_gradients(self._parameters)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        torch._foreach_div_(gradients, float(self._window_responses))
        norm = whole(nn.utils.get_total_norm(gradients))
        if self.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self.clip_grad_norm, norm)
        return norm

    def _end_window(self, metrics: dict[str, float]) -> StepResult:
        overflow = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        fault = self._window_fault
        if fault is None and not math.isfinite(metrics["grad_norm"]) and not overflow:
            fault = self._describe_gradient(metrics["grad_norm"])
        stepped = fault is None and math.isfinite(metrics["grad_norm"])
        since = self.last_step_at
        if stepped:
            self.scaler.step(self.optimizer)
            self.optimizer_steps += 1
            self.first_optimizer_step_time = self.first_optimizer_step_time or time.time()
            self.last_step_at = self.gradient_steps
            self._bad_in_a_row = 0
        self.scaler.update()
        result = self._result(metrics, stepped=stepped, since=since)
        if stepped:
            self.scheduler.step()
        self._clear_window()
        if fault is not None:
            self._count_bad_step(fault)
        return result

    def _note_bad_loss(self, metrics: Mapping[str, float]) -> None:
        bad = [f"{name} is {value}" for name, value in metrics.items() if "loss" in name and not math.isfinite(value)]
        if bad and self._window_fault is None:
            self._window_fault = f"{', '.join(bad)} at gradient step {self.gradient_steps}"

    def _describe_gradient(self, norm: float) -> str:
        named = self.model.named_parameters()
        bad = [name for name, p in named if p.grad is not None and not whole(p.grad).isfinite().all()]
        return f"the gradient norm is {norm} at gradient step {self.gradient_steps} ({', '.join(bad[:3])})"

    def _count_bad_step(self, fault: str) -> None:
        self.bad_steps += 1
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= self.max_bad_steps:
            raise RuntimeError(
                f"{self._bad_in_a_row} optimizer steps in a row (train.max_bad_steps) were not finite; in the last, "
                f"{fault}. Lower optimizer.lr or optimizer.clip_grad_norm, or use train_model.torch_dtype=float32."
            )

    def _clear_window(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._window_steps = self._window_responses = 0
        self._window_fault = None

    def _to_floats(self, values: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """One transfer, hence one wait for the device, for all metrics of a step."""
        numbers = torch.stack([value.detach().to(self.device, torch.float32) for value in values.values()]).tolist()
        return dict(zip(values, numbers, strict=True))

    def _result(self, metrics: Mapping[str, float], *, stepped: bool, since: int | None = None) -> StepResult:
        since = self.last_step_at if since is None else since
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        metrics = {**metrics, "learning_rate": learning_rate}
        if self.kl_schedule is not None:
            metrics["kl_to_ref_coeff"] = self.loss_fn.kl_to_ref_coeff
        return StepResult(metrics, stepped=stepped, step=self.gradient_steps, since=since)


def share_out(batch: TensorDictBase, num_ranks: int) -> list[Share]:
    """Cut a batch of B rows into runs whose lengths differ by one at most.

    A rank for which none is left gets a row that does not count: it must take part all the same.
    """
    num_rows = batch.shape[0]
    num_tokens = sum(len(ids) for ids in batch.get(TOKENS_KEY, as_list=True))
    bounds = [ceil_div(rank * num_rows, num_ranks) for rank in range(num_ranks + 1)]
    shares = []
    for start, end in pairwise(bounds):
        rows = batch[start:end] if end > start else batch[:1]
        shares.append(Share(rows, end - start, num_rows, num_tokens))
    return shares


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a model, by name: all of its state, or with adapters (PEFT) theirs alone.

    The tensors are the model's own, and tied ones the same object.
    """
    if hugging_face_model(model) in (None, model):
        return model.state_dict(keep_vars=True)
    from expert_iteration.lora import adapter_state_dict  # a model within another: PEFT's wrapper

    return adapter_state_dict(model)


def _batch_metrics(batch: TensorDictBase, device: torch.device) -> dict[str, torch.Tensor]:
    rewards = torch.stack([reward.float().mean() for reward in batch.get(("next", "reward"), as_list=True)])
    lengths = torch.stack([mask.sum() for mask in batch.get(RESPONSE_MASK_KEY, as_list=True)])
    return {"reward": rewards.mean().to(device), "response_length": lengths.float().mean().to(device)}


def _check_master_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"The trainable parameter {name} is {parameter.dtype}: load the model with dtype=torch.float32 and set "
                "the precision of the forward pass with autocast_dtype (train_model.torch_dtype)."
            )
