"""Fakes of a few lines that the tests of both scripts share: each tells what it is asked to do as an event."""

from types import SimpleNamespace

from expert_iteration.learner import StepResult
from expert_iteration.position import Position

# What `train` is run with unless a test says otherwise: steps and nothing beside them.
QUIET = ("eval.frequency=0", "train.checkpoint_frequency=0", "train.epochs=1", "train.optim_batch_size=1")


def drive(script, cfg, events, collector, replay_buffer, bad_at):
    """Run a script's `train` on fakes; returns them, and the events."""
    learner = FakeLearner(events, cfg.train.gradient_accumulation_steps, bad_at)
    parts = {
        "position": Position(),
        "collector": collector,
        "replay_buffer": replay_buffer,
        "learner": learner,
        "policy_training": object(),
        "weight_updater": FakeWeightUpdater(events),
        "evaluator": FakeEvaluator(events),
        "checkpointer": FakeCheckpointer(events, learner),
        "metrics": FakeMetrics(),
    }
    script.train(cfg, **parts)
    return SimpleNamespace(events=events, **parts)


class FakeLearner:
    """Steps the optimizer at the end of each window, except where the window is bad."""

    def __init__(self, events, accumulation, bad_at):
        self.events, self.accumulation, self.bad_at = events, accumulation, bad_at
        self.gradient_steps = self.optimizer_steps = self.responses_trained = self.last_step_at = self.window = 0
        self.bad_steps, self.tokens_trained, self.seconds = 0, 0, 1.0

    def plan(self, num_optimizer_steps, until):
        self.events.append(f"plan {num_optimizer_steps} until {until:g}")

    def restart(self, num_optimizer_steps, until):
        self.events.append(f"restart {num_optimizer_steps} until {until:g}")

    def step(self, batch):
        self.gradient_steps += 1
        self.window += 1
        self.responses_trained += len(batch)
        self.events.append(f"step {self.gradient_steps}")
        return self.end_window() if self.window == self.accumulation else self.result(stepped=False)

    def flush(self):
        return self.end_window() if self.window else self.result(stepped=False)

    def end_window(self):
        self.window = 0
        if self.gradient_steps in self.bad_at:
            return self.result(stepped=False)
        result = self.result(stepped=True)
        self.last_step_at = self.gradient_steps
        self.optimizer_steps += 1
        self.events.append("optimizer step")
        return result

    def result(self, stepped):
        return StepResult({"loss": 1.0}, stepped=stepped, step=self.gradient_steps, since=self.last_step_at)


class FakeWeightUpdater:
    def __init__(self, events):
        self.events, self.pushes, self.policies = events, 0, []

    policy_version = property(lambda self: self.pushes)

    def push_weights(self, policy):
        self.pushes += 1
        self.policies.append(policy)
        self.events.append("push")
        return {"weights/policy_version": float(self.pushes)}


class FakeEvaluator:
    def __init__(self, events):
        self.events, self.is_pending, self.has_stalled, self.measured_pushes = events, True, False, 0

    def evaluate(self, step, pushes):
        self.is_pending, self.measured_pushes = False, pushes
        self.events.append(f"evaluate at {step}")


class FakeCheckpointer:
    def __init__(self, events, learner):
        self.events, self.learner = events, learner

    def save(self):
        assert self.learner.window == 0, "gradients of an open window are in no checkpoint"
        self.events.append(f"checkpoint at {self.learner.gradient_steps}")

    def stop_if_asked(self):
        assert self.learner.window == 0, "gradients of an open window are in no checkpoint"


class FakeMetrics:
    def __init__(self):
        self.logged, self.shown, self.drained, self.trained = [], [], [], []

    def log(self, metrics, step):
        self.logged.append((metrics, step))

    def samples(self, rows, step, split):
        self.shown.append((rows, step, split))

    def drain(self, step):
        self.drained.append(step)

    def training(self, result, **extra):
        self.trained.append((result.step, extra))


def only(events, *kinds):
    """The events that begin with one of these words."""
    return [event for event in events if event.startswith(kinds)]
