"""Saving and restoring everything that the next step of a run depends on.

The names of the files, and which of them are whole, are `checkpoint_files.py`'s.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from expert_iteration import timeline
from expert_iteration.checkpoint_files import SavedCheckpoint, newest_whole, prune, replacing, write_manifest
from expert_iteration.config import Config, pushes_before_collecting, to_plain_dict
from expert_iteration.errors import UserError
from expert_iteration.interruption import StopRequest
from expert_iteration.packed_weights import PackedWeights

if TYPE_CHECKING:
    from expert_iteration.actors import BackgroundCollector, CollectorClient
    from expert_iteration.evaluation import Evaluator
    from expert_iteration.learner import Learner
    from expert_iteration.metrics import Metrics
    from expert_iteration.position import Position
    from expert_iteration.reference_update import ReferenceUpdater
    from expert_iteration.replay_buffer import BufferReader
    from expert_iteration.weight_update import WeightUpdater
    from expert_iteration.without_engine import ExpertSetCollector, NoEvaluator, NoWeightUpdater

STATE_FILE = "state.pt"
ROWS_FILE = "buffer.td"
ENGINE_FILE = "engine.safetensors"  # where the policy has changed since the last push
REFERENCE_FILE = "reference.safetensors"  # where it is the start model no more
FINGERPRINT_VALUES = 64  # of each parameter: models of one shape differ in all of them


@dataclass(frozen=True)
class RunParts:
    """The collaborators of a script, as far as a checkpoint asks them where they stand."""

    position: Position
    collector: CollectorClient | BackgroundCollector | ExpertSetCollector
    replay_buffer: BufferReader
    learner: Learner
    weight_updater: WeightUpdater | NoWeightUpdater
    evaluator: Evaluator | NoEvaluator
    metrics: Metrics
    reference_updater: ReferenceUpdater

    def state_dict(self) -> dict[str, Any]:
        """Where all of them stand, but for weights and optimizer; but for the buffer's rows in types that `torch.load`
        trusts.

        The buffer comes first, with what its writer says of itself. In asynchronous mode batches go on coming; what was
        heard of them meanwhile is told apart by their number.
        """
        return {
            "buffer": self.replay_buffer.state_dict(),
            "position": self.position.state_dict(),
            "collector": self.collector.state_dict(),
            "learner": self.learner.process_state(),
            "weight_updater": self.weight_updater.state_dict(),
            "evaluator": self.evaluator.state_dict(),
            "metrics": self.metrics.state_dict(),
            "reference_version": self.reference_updater.version,
        }

    def load(self, checkpoint: SavedCheckpoint, state: Mapping[str, Any], policy: nn.Module, total_turns: int) -> None:
        """Have all of them go on from a checkpoint.

        Args:
            checkpoint: that is whole.
            state: `load_state` of its folder.
            policy: that is trained.
            total_turns: responses that the run is to collect, which may be other than they were.
        """
        self.learner.load_checkpoint(torch.load(checkpoint.weights, weights_only=True))
        if (before := checkpoint.manifest["total_turns"]) != total_turns:
            self.learner.rescale(before / total_turns)
            for batch in _batches_in(state):
                batch["total_dialog_turns"] = total_turns
        pushed = load_packed(checkpoint.folder / ENGINE_FILE)
        self.weight_updater.load_state_dict(state["weight_updater"], policy, pushed)
        if (reference := load_packed(checkpoint.folder / REFERENCE_FILE)) is not None:
            self.reference_updater.restore(reference, state["reference_version"])
        writer_state = state["buffer"]["_writer_state"]
        self.replay_buffer.load_state_dict(state["buffer"])
        self.position.load_state_dict(state["position"])
        self.collector.load_state_dict(state["collector"], writer_state)
        self.evaluator.load_state_dict(state["evaluator"])
        self.metrics.load_state_dict(state["metrics"], num_batches(state))
        # Last, for what comes before may draw.
        self.learner.load_process_state(state["learner"])


def _batches_in(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every `CollectedBatch` of a state, as a dictionary."""
    writer_state = state["buffer"]["_writer_state"] or {"last_written": []}
    own = [state["collector"].get(name) for name in ("current", "latest")]
    return [batch for batch in (*own, *writer_state["last_written"]) if batch is not None]


def num_batches(state: Mapping[str, Any]) -> int:
    """Collected batches that a saved buffer knows of."""
    writer_state = state["buffer"]["_writer_state"]
    return 0 if writer_state is None else writer_state["num_written"]


class Checkpointer:
    """Writes the checkpoints of a run.

    Args:
        directory: where they go.
        parts: what they are made of.
        cfg: the whole configuration, saved as a plain dictionary.
        about: what the manifests say of the run beside where it stands.
        clock: seconds since the run's start.
        stop: whether the run was asked to end.
    """

    def __init__(
        self,
        directory: Path,
        parts: RunParts,
        cfg: Config,
        *,
        about: Mapping[str, Any],
        clock: Callable[[], float],
        stop: StopRequest,
    ) -> None:
        self._directory = directory
        self._parts = parts
        self._cfg = cfg
        self._about = dict(about)
        self._clock = clock
        self._stop = stop
        self._last_step = -1

    def save(self, *, again: bool = False) -> Path:
        """Write a checkpoint of this gradient step, and remove those that are too many; at one step it writes once.

        `checkpoint_<gradient step>.pt` loads on any machine, whatever was trained on, with
        `torch.load(path, weights_only=True)`: step, optim_step, model_state_dict, optimizer_state_dict,
        scheduler_state_dict, scaler_state_dict, config, and the learner's further counters. With LoRA model_state_dict
        holds the adapters alone, and base_model says of which model. What else the next step depends on lies in the
        folder of the same stem.

        Args:
            again: write it also where one of this step is there already, from before the last evaluation.

        Returns:
            The path of the `.pt`.

        Raises:
            UserError: it could not be written, for instance on a full disk. What was written before is untouched.
        """
        step = self._parts.learner.gradient_steps
        path = self._directory / f"checkpoint_{step}.pt"
        if step == self._last_step and not again:
            return path
        with timeline.span(timeline.SAVING):
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._write(path)
                prune(self._directory, self._cfg.train.keep_checkpoints)
            except OSError as error:
                raise UserError(self._explain(path, error)) from error
        self._last_step = step
        return path

    def resumed_at(self, step: int) -> None:
        """Say that the checkpoint of this gradient step is there already."""
        self._last_step = step

    def stop_if_asked(self) -> None:
        """End the run where the user, or the machine, has asked it to stop, with everything saved.

        Raises:
            Interrupted: it has.
            UserError: as `save`.
        """
        if self._stop.signum is not None:
            self.save()
        self._stop.check()

    def _write(self, path: Path) -> None:
        folder = path.with_suffix("")
        state = self._parts.state_dict()
        rows = state["buffer"].pop("_storage")
        packed = {ENGINE_FILE: self._pushed_weights(), REFERENCE_FILE: self._parts.reference_updater.weights}
        with replacing(path) as temporary:
            self._save_weights(temporary)
        with replacing(folder) as temporary:
            temporary.mkdir()
            save_state(state, temporary / STATE_FILE)
            if rows:
                save_rows(rows, temporary / ROWS_FILE)
            for name, weights in packed.items():
                if weights is not None:
                    save_packed(weights, temporary / name)
            write_manifest(temporary, [path, *sorted(temporary.iterdir())], self._describe(state))

    def _save_weights(self, path: Path) -> None:
        extra: dict[str, Any] = {"config": to_plain_dict(self._cfg)}
        if self._cfg.train_model.lora.enabled:
            extra["base_model"] = self._cfg.model.name
        save_state({**self._parts.learner.checkpoint(), **extra}, path)

    def _pushed_weights(self) -> PackedWeights | None:
        """What the engines hold, where that is not what the checkpoint has anyway, and is used before the next push."""
        if pushes_before_collecting(self._cfg):
            return None
        is_behind = self._parts.position.pushed_at < self._parts.learner.optimizer_steps
        return self._parts.weight_updater.pushed_weights if is_behind else None

    def _describe(self, state: Mapping[str, Any]) -> dict[str, Any]:
        from expert_iteration.metrics import plain

        latest = self._parts.evaluator.latest if self._is_measured() else {}
        return {
            **self._about,
            "step": self._parts.learner.gradient_steps,
            "optimizer_steps": self._parts.learner.optimizer_steps,
            "num_batches": num_batches(state),
            "seconds": self._clock(),
            "file_bytes": state["metrics"]["file_bytes"],
            "score": plain(latest.get(self._cfg.eval.metric)),
            "evaluation": plain(latest),
            "config": to_plain_dict(self._cfg),
        }

    def _is_measured(self) -> bool:
        """Whether the last evaluation was of the policy as it is now."""
        is_pushed = self._parts.position.pushed_at == self._parts.learner.optimizer_steps
        return is_pushed and self._parts.evaluator.measured_pushes == self._parts.weight_updater.pushes

    def _explain(self, path: Path, error: OSError) -> str:
        whole, _ = newest_whole(self._directory)
        last = "There is none before it." if whole is None else f"The last whole one is {whole.folder}."
        return (
            f"The checkpoint {path} could not be written ({error.strerror or error}). {last} Make room, and go "
            "on with resume_from."
        )


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """`torch.save`, which raises an OSError where the disk is full; torch by itself raises something else."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def save_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows of the buffer as TensorDict's own memory-mapped file, which `load_rows` reads.

    It is made in memory first: on a full disk a write to a mapped file kills the process.
    """
    from tensordict import TensorDict, lazy_stack

    descriptor = os.memfd_create("rows")
    try:
        made = f"/proc/self/fd/{descriptor}"
        lazy_stack([TensorDict(row) for row in rows]).consolidate(made)
        shutil.copyfile(made, path)
    finally:
        os.close(descriptor)


def load_rows(path: Path) -> list[dict[str, Any]]:
    """What `save_rows` wrote, in memory."""
    from tensordict import TensorDict

    return [row.clone().to_dict() for row in TensorDict.from_consolidated(path).unbind(0)]


def save_packed(weights: PackedWeights, path: Path) -> None:
    """`PackedWeights.save`, which raises an OSError where the disk is full."""
    try:
        weights.save(path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def load_state(folder: Path) -> dict[str, Any]:
    """What `Checkpointer` saved of `RunParts.state_dict` in a checkpoint's folder."""
    state = torch.load(folder / STATE_FILE, weights_only=True)
    rows = folder / ROWS_FILE
    state["buffer"]["_storage"] = load_rows(rows) if rows.exists() else []
    return state


def weights_fingerprint(model: nn.Module) -> str:
    """What tells a model from others: a hash of its parameters' names and shapes, and of a few values of each."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:FINGERPRINT_VALUES].float().cpu()
        digest.update(f"{name} {list(parameter.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def load_packed(path: Path) -> PackedWeights | None:
    """What `save_packed` wrote; None where it wrote nothing."""
    return PackedWeights.load(path) if path.exists() else None
