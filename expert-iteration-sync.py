"""Synchronous expert iteration: collect a batch, keep the best, imitate them, push the weights, collect the next.

    python expert-iteration-sync.py mode=sync                           # GSM8K, one or two GPUs
    python expert-iteration-sync.py mode=sync --config-name ei_tiny     # a tiny model, on a CPU

Unlike the textbook's, the policy goes on from where it stands after each batch, not from the start model; a KL penalty
in the loss holds it near that model. train.restart_from=base is the textbook's.

Any key of `config/` may be overridden on the command line, e.g. `train.topk_size=8`; `--cfg job` shows what results.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from expert_iteration import cli
from expert_iteration.cadence import is_due
from expert_iteration.config import Config, RestartFrom, empties_buffer
from expert_iteration.sizes import optimizer_steps_of_batch

if TYPE_CHECKING:
    from torch import nn

    from expert_iteration.actors import CollectorClient
    from expert_iteration.checkpoint import Checkpointer
    from expert_iteration.evaluation import Evaluator
    from expert_iteration.learner import Learner, StepResult
    from expert_iteration.metrics import Metrics
    from expert_iteration.position import Position
    from expert_iteration.replay_buffer import BufferReader
    from expert_iteration.weight_update import WeightUpdater


def train(
    cfg: Config,
    position: Position,
    collector: CollectorClient,
    replay_buffer: BufferReader,
    learner: Learner,
    policy_training: nn.Module,
    weight_updater: WeightUpdater,
    evaluator: Evaluator,
    checkpointer: Checkpointer,
    metrics: Metrics,
) -> None:
    """The algorithm: what happens in which order. Its collaborators say how (`ei_utils.py` builds them).

    A resumed run enters it anew, with collaborators that stand where they stood when the checkpoint was saved.
    """
    # Here, where the training process has it loaded already: it takes seconds, which no command line should wait.
    from ei_utils import log_training_metrics

    def push_weights() -> None:
        position.pushed_at = learner.optimizer_steps
        metrics.log(weight_updater.push_weights(policy_training), learner.gradient_steps)
        if is_due(weight_updater.pushes, cfg.eval.frequency):
            metrics.samples(data.samples, learner.gradient_steps, "train")
            evaluator.evaluate(learner.gradient_steps, weight_updater.pushes)

    def after(result: StepResult) -> None:
        if result.stepped and is_due(result.step, cfg.train.weight_update_frequency, result.since):
            push_weights()
        if result.stepped and is_due(result.step, cfg.train.checkpoint_frequency, result.since):
            checkpointer.save()
        if result.stepped:
            checkpointer.stop_if_asked()

    if evaluator.is_pending:  # before training, or where a run was interrupted in the middle of an evaluation
        evaluator.evaluate(learner.gradient_steps, weight_updater.pushes)
    for data in collector:  # Data collection loop
        if not data.is_resumed:
            metrics.drain(learner.gradient_steps)
        if not data.responses_kept:
            continue
        if not data.is_resumed:
            position.epoch = 0
            begin = learner.restart if cfg.train.restart_from is RestartFrom.base else learner.plan
            begin(optimizer_steps_of_batch(cfg, len(replay_buffer)), until=data.progress)
        while position.epoch < cfg.train.epochs:  # Epoch loop
            for batch in replay_buffer:  # Buffer consumption loop (only top-k responses)
                result = learner.step(batch)
                log_training_metrics(metrics, result, batch, learner, replay_buffer, weight_updater.policy_version)
                after(result)
            position.epoch += 1
        if (last := learner.flush()).stepped:
            metrics.training(last, optim_step=learner.optimizer_steps)
            after(last)
        if empties_buffer(cfg):
            replay_buffer.empty(empty_write_count=False)
        if cfg.train.weight_update_frequency is None and position.pushed_at < learner.optimizer_steps:
            push_weights()
        if evaluator.has_stalled:
            break
    if position.pushed_at < learner.optimizer_steps:
        push_weights()
    if evaluator.measured_pushes < weight_updater.pushes:
        evaluator.evaluate(learner.gradient_steps, weight_updater.pushes)


def main(cfg: Config, run_dir: Path) -> None:
    """Runs `train` in the process that holds the training devices, with everything else around it."""
    from expert_iteration.run import run

    run(cfg, train, run_dir)


if __name__ == "__main__":
    cli.run(main, mode="sync")
