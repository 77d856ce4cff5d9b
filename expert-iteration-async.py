"""Asynchronous expert iteration: collect in the background, train on what the buffer holds, push weights now and then.

    python expert-iteration-async.py mode=async                         # GSM8K, one or two GPUs
    python expert-iteration-async.py mode=async --config-name ei_tiny   # a tiny model, on a CPU

Unlike the synchronous script, the engine generates while the policy is trained, so responses were made by a policy that
is a few pushes old; and what is trained on is drawn from a buffer larger than a batch, higher rewards more often.

Any key of `config/` may be overridden on the command line, e.g. `train.topk_size=8`; `--cfg job` shows what results.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from expert_iteration import cli
from expert_iteration.cadence import is_due
from expert_iteration.config import Config

if TYPE_CHECKING:
    from torch import nn

    from expert_iteration.actors import BackgroundCollector
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
    collector: BackgroundCollector,
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
    from expert_iteration.pacing import paced_batches

    def push_weights() -> None:
        position.pushed_at = learner.optimizer_steps
        metrics.log(weight_updater.push_weights(policy_training), learner.gradient_steps)
        if is_due(weight_updater.pushes, cfg.eval.frequency):
            metrics.samples(collector.latest.samples, learner.gradient_steps, "train")
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
    if not evaluator.has_stalled:
        collector.start()  # Data collection goes on in the background
        for batch in paced_batches(cfg, position, collector, replay_buffer, learner, metrics):  # Optimization loop
            result = learner.step(batch)
            log_training_metrics(metrics, result, batch, learner, replay_buffer, weight_updater.policy_version)
            after(result)
            if evaluator.has_stalled:
                break
    if (last := learner.flush()).stepped:
        metrics.training(last, optim_step=learner.optimizer_steps)
        after(last)
    if position.pushed_at < learner.optimizer_steps:
        push_weights()
    if evaluator.measured_pushes < weight_updater.pushes:
        evaluator.evaluate(learner.gradient_steps, weight_updater.pushes)


def main(cfg: Config, run_dir: Path) -> None:
    """Runs `train` in the process that holds the training devices, with everything else around it."""
    from expert_iteration.run import run

    run(cfg, train, run_dir)


if __name__ == "__main__":
    cli.run(main, mode="async")
