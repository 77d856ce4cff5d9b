"""The collector: a TorchRL `LLMCollector` and the writer's side of the buffer.

It gathers a batch, scores it (in the environment), keeps the best of each group, has the reference score what is kept,
and holds the rows until it is told to write them. Collecting and writing are two calls so that a synchronous run may
gather the next batch while it trains on the last one: what the trainer iterates over never changes under its feet.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.collectors.llm import LLMCollector

from expert_iteration import timeline
from expert_iteration.actors import BackgroundCollector, CollectedBatch
from expert_iteration.expert_set import ExpertSetWriter, Record
from expert_iteration.judging import Judge
from expert_iteration.policy import EnginePolicy
from expert_iteration.prompt_stream import PromptStream
from expert_iteration.random_state import random_state, set_random_state
from expert_iteration.reference import RetrieveLogProb
from expert_iteration.row_keys import RESPONSE_ID_KEY, ROLLOUT_KEYS, rows_by_group
from expert_iteration.selection import TopKRewardSelector


class RecordSender(Protocol):
    """What the collector asks of its post-processing hook."""

    def __call__(self, data: TensorDictBase) -> TensorDictBase:
        """See a batch, and hand it on."""
        ...

    def send(self, record: dict[str, float]) -> None:
        """Send a record of metrics to the trainer."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What it counts."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        ...


class ExpertCollector:
    """Gathers batches of responses and writes the best into the buffer.

    Args:
        make_env: builds the environment on the prompts (in this process: environments do not travel).
        prompts: the stream of prompts, told of each group's outcome.
        judge: of the environment; asked for the statistics of each batch.
        policy: generates.
        selector: keeps the best of each group.
        retrieve_log_prob: scores what is kept with the reference; None: rows are written without its log-probs.
        postproc: sees every batch before selection, and sends records of metrics (`ei_utils.RemoteDataLogger`).
        dialog_turns_per_batch: responses a batch.
        num_batches: batches in the run.
        num_sample_groups: groups reported with each batch.
        expert_set: where what is kept is written too; None: nowhere.
        state: from `state_dict` of an earlier collector, to go on where it stood (with prompts that do); None: from the
            beginning.
    """

    def __init__(
        self,
        *,
        make_env: Callable[[], Any],
        prompts: PromptStream,
        judge: Judge,
        policy: EnginePolicy,
        selector: TopKRewardSelector,
        retrieve_log_prob: RetrieveLogProb | None,
        postproc: RecordSender,
        dialog_turns_per_batch: int,
        num_batches: int,
        num_sample_groups: int,
        expert_set: ExpertSetWriter | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._prompts = prompts
        self._judge = judge
        self._policy = policy
        self._selector = selector
        self._retrieve_log_prob = retrieve_log_prob
        self._postproc = postproc
        self._dialog_turns_per_batch = dialog_turns_per_batch
        self._num_batches = num_batches
        self._num_sample_groups = num_sample_groups
        self._expert_set = expert_set
        self._turns = self._empty_batches = self._responses_kept = 0
        self._num_written = 0
        # As many as may lie in the buffer before the trainer has heard of them.
        self._last_written: deque[dict[str, Any]] = deque(maxlen=BackgroundCollector.QUEUED)
        self._pending: tuple[TensorDictBase | None, list[Record], CollectedBatch] | None = None
        if state is not None:
            self._load_state_dict(state)
        env = make_env()
        self._collector = LLMCollector(
            env,
            policy=policy,
            dialog_turns_per_batch=dialog_turns_per_batch,
            # Endless: TorchRL counts its own frames; ours are counted in batches, so the end can be seen.
            total_dialog_turns=-1,
            flatten_data=True,
            postproc=postproc,
        )
        # Its constructor resets the environment once, to see what rows look like. The prompts drawn for that would be
        # skipped, and with env.num_envs below env.repeats every batch would begin in the middle of a group.
        env.reset_dataloader()
        self._batches: Iterator[TensorDictBase] = iter(self._collector)
        if state is not None:
            set_random_state(state["random"])  # after what draws while it is built

    def collect(self) -> None:
        """Gather the next batch and hold what is kept of it; nothing is written yet."""
        start = time.monotonic()
        with timeline.span(timeline.COLLECTING):
            batch = next(self._batches)
            selected = self._selector.select(batch)
        kept = None if selected is None else self._number(_prune(selected))
        if kept is not None and self._retrieve_log_prob is not None:
            with timeline.span(timeline.REFERENCE):
                kept = self._retrieve_log_prob(kept)
        self._turns += len(batch)
        self._finish_groups(batch)
        summary = CollectedBatch(
            dialog_turns=self._turns,
            total_dialog_turns=self._num_batches * self._dialog_turns_per_batch,
            responses_kept=0 if kept is None else len(kept),
            samples=_sample_groups(batch, selected, self._num_sample_groups),
            notes=self._judge.take_notes(),
        )
        self._empty_batches += summary.responses_kept == 0
        self._postproc.send(
            {f"selection/{name}": value for name, value in self._selector.stats().items()}
            | {
                "selection/batch_kept": summary.responses_kept,
                "selection/empty_batches": self._empty_batches,
                "collector/dialog_turns": self._turns,
                "collector/prompts_skipped": self._prompts.num_skipped,
                **{f"collector/{name}": value for name, value in self._judge.take_statistics().items()},
                "collector/time/collect": time.monotonic() - start,
            }
        )
        self._pending = (kept, self._describe(batch, selected), summary)

    def write(self, replay_buffer: Any) -> CollectedBatch:
        """Write the held rows into the buffer, of which `replay_buffer` is a client, and with them where this stands.

        In one call, so that whoever saves the buffer finds what belongs together.
        """
        assert self._pending is not None, "write() follows collect()"
        kept, records, summary = self._pending
        self._pending = None
        with timeline.span(timeline.WRITING):
            # One piece of memory travels in two thirds of the time of the several hundred that rows consist of.
            rows = None if kept is None else kept.consolidate()
            self._num_written += 1
            if self._expert_set is not None and records:
                self._expert_set.write(records, self._num_written)
            self._last_written.append(asdict(summary))
            replay_buffer.write_batch(rows, self.state_dict())
        return summary

    def close(self) -> None:
        """End what judges; nothing can be collected any more."""
        self._judge.close()

    def state_dict(self) -> dict[str, Any]:
        """Where collection stands after a batch was written, in types that `torch.load` trusts.

        Batches are whole groups, so no group is in flight then; prompts that were drawn ahead are drawn again.
        """
        return {
            "num_written": self._num_written,
            "last_written": list(self._last_written),
            "turns": self._turns,
            "empty_batches": self._empty_batches,
            "responses_kept": self._responses_kept,
            "prompts": self._prompts.state_dict(),
            "engine_calls": self._policy.calls,
            "records": self._postproc.state_dict(),
            "selector": self._selector.get_extra_state(),
            "random": random_state(),
        }

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._num_written = state["num_written"]
        self._last_written.extend(state["last_written"])
        self._turns, self._empty_batches = state["turns"], state["empty_batches"]
        self._responses_kept = state["responses_kept"]
        self._policy.calls = state["engine_calls"]
        self._postproc.load_state_dict(state["records"])
        self._selector.set_extra_state(state["selector"])

    def _finish_groups(self, batch: TensorDictBase) -> None:
        for group_id, group in rows_by_group(batch).items():
            self._prompts.finish(group_id, sum(row["next", "correct"].item() for row in group), len(group))

    def _describe(self, batch: TensorDictBase, selected: TensorDictBase | None) -> list[Record]:
        """What the expert set says of the kept rows; nothing where there is no set."""
        return [] if self._expert_set is None or selected is None else self._expert_set.describe(batch, selected)

    def _number(self, rows: TensorDictBase) -> TensorDictBase:
        """Give each response its running number, by which it is known wherever it goes; returns the rows."""
        for number, row in enumerate(rows.unbind(0), start=self._responses_kept):
            row.set(RESPONSE_ID_KEY, torch.tensor(number))
        self._responses_kept += len(rows)
        return rows


def _prune(rows: TensorDictBase) -> TensorDictBase:
    """Only what the buffer keeps of what a rollout says, in plain tensordicts.

    The environment's own classes travel badly: whoever unpickles one imports vLLM with it, which takes seconds.
    """
    return lazy_stack([TensorDict({key: row.get(key) for key in ROLLOUT_KEYS}) for row in rows.unbind(0)])


def _sample_groups(batch: TensorDictBase, selected: TensorDictBase | None, num_groups: int) -> list[dict[str, Any]]:
    """The first groups of a batch, with all their responses, for people to read."""
    # By identity: two responses of a group may have the same text, and one of them be kept.
    kept = set() if selected is None else {id(row) for row in selected.unbind(0)}
    return [
        {
            "prompt": members[0]["query"],
            "responses": [
                {"text": row["text", "response"], "reward": row["next", "reward"].item(), "kept": id(row) in kept}
                for row in members
            ],
        }
        for members in list(rows_by_group(batch).values())[:num_groups]
    ]
