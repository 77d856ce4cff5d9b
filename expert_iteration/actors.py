"""The actors of a run beside the engine's, and what the training process holds of them.

Importing this module loads neither torch nor TorchRL: an actor loads what it needs in its own process, so all of them
start at once, before the training process has loaded its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expert_iteration.config import RefModelConfig
from expert_iteration.screen import redirect_output

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CollectedBatch:
    """What the trainer hears of a batch whose kept responses now lie in the buffer."""

    dialog_turns: int  # collected so far, this batch included
    total_dialog_turns: int
    responses_kept: int  # of this batch
    samples: list[dict[str, Any]]  # a few groups, in the form of samples.jsonl

    @property
    def progress(self) -> float:
        """The fraction of the run that is collected, 0 to 1."""
        return self.dialog_turns / self.total_dialog_turns


class CollectorActor:
    """An `ExpertCollector` in a process of its own.

    Args:
        make_collector: builds it there; environments and selectors do not travel.
        log_path: where this process's output goes.
    """

    def __init__(self, make_collector: Callable[[], Any], log_path: str) -> None:
        redirect_output(log_path)
        self._collector = make_collector()

    def collect(self) -> None:
        """See `ExpertCollector.collect`."""
        self._collector.collect()

    def write(self, replay_buffer: Any) -> CollectedBatch:
        """See `ExpertCollector.write`."""
        return self._collector.write(replay_buffer)


class CollectorClient:
    """The trainer's view of the collector: iterating it yields each batch once its rows lie in the buffer.

    Args:
        actor: the `CollectorActor`.
        replay_buffer: a client of the buffer.
        num_batches: after which the iteration ends.
        overlap: gather the next batch while the caller works on the one just yielded (`train.sync_iter=false`).
    """

    def __init__(self, actor: Any, replay_buffer: Any, num_batches: int, *, overlap: bool) -> None:
        self._actor = actor
        self._replay_buffer = replay_buffer
        self._num_batches = num_batches
        self._overlap = overlap

    def __iter__(self) -> Iterator[CollectedBatch]:
        import ray
        from torchrl._utils import timeit

        for index in range(self._num_batches):
            if index == 0 or not self._overlap:
                collected = self._actor.collect.remote()
            with timeit("wait_for_data"):
                ray.get(collected)
            batch = ray.get(self._actor.write.remote(self._replay_buffer))
            if self._overlap and index + 1 < self._num_batches:
                collected = self._actor.collect.remote()
            yield batch


class ReferenceActor:
    """The frozen start model in a process of its own.

    Args:
        name: hub id or folder of the model.
        config: the `ref_model` section.
        device: a torch device.
        micro_batch_size: rows scored at once.
        log_path: where this process's output goes.
    """

    def __init__(self, name: str, config: RefModelConfig, *, device: str, micro_batch_size: int, log_path: str) -> None:
        redirect_output(log_path)
        from expert_iteration.models import load_model
        from expert_iteration.scorer import ReferenceScorer

        dtype, attention = config.torch_dtype.value, config.attn_implementation
        model = load_model(name, dtype=dtype, attn_implementation=attention, device=device)
        # Any id does for padding, which is masked.
        self._scorer = ReferenceScorer(model, pad_token_id=0, micro_batch_size=micro_batch_size)

    def score(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """See `ReferenceScorer.score`."""
        return self._scorer.score(rows)


class ReferenceClient:
    """A picklable handle on the reference's actor."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def score(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """See `ReferenceScorer.score`."""
        import ray

        return ray.get(self.actor.score.remote(rows))
