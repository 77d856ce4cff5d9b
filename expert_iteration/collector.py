"""The collector: a TorchRL `LLMCollector` and the writer's side of the buffer.

It gathers a batch, scores it (in the environment), keeps the best of each group, has the reference score what is kept,
and holds the rows until it is told to write them. Collecting and writing are two calls so that a synchronous run may
gather the next batch while it trains on the last one: what the trainer iterates over never changes under its feet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.collectors.llm import LLMCollector

from expert_iteration import timeline
from expert_iteration.actors import CollectedBatch
from expert_iteration.reference import RetrieveLogProb
from expert_iteration.row_keys import RESPONSE_ID_KEY, ROLLOUT_KEYS
from expert_iteration.selection import TopKRewardSelector


class ExpertCollector:
    """Gathers batches of responses and writes the best into the buffer.

    Args:
        make_env: builds the environment (in this process: environments do not travel).
        policy: generates.
        selector: keeps the best of each group.
        retrieve_log_prob: scores what is kept with the reference; None: rows are written without its log-probs.
        postproc: sees every batch before selection (the metrics hook, `RemoteDataLogger`).
        log_record: sends a record of metrics to the trainer.
        dialog_turns_per_batch: responses a batch.
        num_batches: batches in the run.
        num_sample_groups: groups reported with each batch.
    """

    def __init__(
        self,
        *,
        make_env: Callable[[], Any],
        policy: Any,
        selector: TopKRewardSelector,
        retrieve_log_prob: RetrieveLogProb | None,
        postproc: Callable[[TensorDictBase], TensorDictBase],
        log_record: Callable[[dict[str, float]], None],
        dialog_turns_per_batch: int,
        num_batches: int,
        num_sample_groups: int,
    ) -> None:
        self._selector = selector
        self._retrieve_log_prob = retrieve_log_prob
        self._log_record = log_record
        self._dialog_turns_per_batch = dialog_turns_per_batch
        self._num_batches = num_batches
        self._num_sample_groups = num_sample_groups
        self._turns = self._empty_batches = self._responses_kept = 0
        self._pending: tuple[TensorDictBase | None, CollectedBatch] | None = None
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
        summary = CollectedBatch(
            dialog_turns=self._turns,
            total_dialog_turns=self._num_batches * self._dialog_turns_per_batch,
            responses_kept=0 if kept is None else len(kept),
            samples=_sample_groups(batch, selected, self._num_sample_groups),
        )
        self._empty_batches += summary.responses_kept == 0
        self._log_record(
            {f"selection/{name}": value for name, value in self._selector.stats().items()}
            | {
                "selection/batch_kept": summary.responses_kept,
                "selection/empty_batches": self._empty_batches,
                "collector/dialog_turns": self._turns,
                "collector/time/collect": time.monotonic() - start,
            }
        )
        self._pending = (kept, summary)

    def write(self, replay_buffer: Any) -> CollectedBatch:
        """Write the held rows into the buffer, of which `replay_buffer` is a client."""
        assert self._pending is not None, "write() follows collect()"
        kept, summary = self._pending
        self._pending = None
        if kept is not None:
            with timeline.span(timeline.WRITING):
                # One piece of memory travels in two thirds of the time of the several hundred that rows consist of.
                replay_buffer.extend(kept.consolidate())
        return summary

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
    groups: dict[int, list[TensorDictBase]] = {}
    for row in batch.unbind(0):
        groups.setdefault(int(row["group_id"]), []).append(row)
    return [
        {
            "prompt": members[0]["query"],
            "responses": [
                {"text": row["text", "response"], "reward": row["next", "reward"].item(), "kept": id(row) in kept}
                for row in members
            ],
        }
        for members in list(groups.values())[:num_groups]
    ]
