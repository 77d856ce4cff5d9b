"""The hooks of `ei_utils` that users edit: what is logged of collection and of training, under which names."""

import threading

import pytest
import ray
import torch
from ray.util.queue import Queue
from tensordict import TensorDict, lazy_stack

from ei_utils import RemoteDataLogger, log_training_metrics
from expert_iteration.learner import StepResult
from expert_iteration.metrics import Metrics

STATISTICS = ("mean", "std", "min", "max")


@pytest.fixture
def make_queue(ray_session):
    queues = []

    def make(size):
        queues.append(Queue(size, actor_options={"num_cpus": 0}))
        return queues[-1]

    yield make
    for queue in queues:
        queue.shutdown()


def make_row(reward, length, version=0, finish_reason="stop"):
    return TensorDict(
        {
            ("next", "reward"): torch.tensor([reward]),
            ("tokens", "response"): torch.arange(length),
            "policy_version": torch.tensor(version),
            "finish_reason": finish_reason,
        }
    )


def make_batch(*rows):
    return lazy_stack([make_row(*row) for row in rows])


def waiting(queue):
    return queue.get_nowait_batch(queue.qsize())


# --- RemoteDataLogger ---


def test_a_batch_is_summed_up_in_one_record_and_handed_on_unchanged(make_queue):
    queue = make_queue(10)
    batch = make_batch((0.0, 2, 3), (1.0, 4, 3), (0.5, 9, 5, "length"), (0.5, 5, 5))
    assert RemoteDataLogger(queue)(batch) is batch
    (record,) = waiting(queue)
    assert record == {
        "collector/rewards/mean": 0.5,
        # Of all there are, not of a sample of more: the squares 1/4, 1/4, 0, 0 by 4.
        "collector/rewards/std": pytest.approx(0.125**0.5),
        "collector/rewards/min": 0.0,
        "collector/rewards/max": 1.0,
        "collector/response_length/mean": 5.0,
        "collector/response_length/std": pytest.approx(6.5**0.5),
        "collector/response_length/min": 2.0,
        "collector/response_length/max": 9.0,
        "collector/policy_version/mean": 4.0,
        "collector/policy_version/min": 3.0,
        "collector/policy_version/max": 5.0,
        "collector/truncation_rate": 0.25,
        "collector/response_tokens": 20.0,
        "collector/time/elapsed": 0.0,
        "collector/dropped_records": 0.0,
        "collector/batch": 1.0,
    }


def test_every_batch_makes_one_record_in_order(make_queue):
    queue = make_queue(10)
    logger = RemoteDataLogger(queue)
    for reward in (0.1, 0.2, 0.3):
        logger(make_batch((reward, 2), (reward, 3)))
    records = waiting(queue)
    assert [record["collector/rewards/mean"] for record in records] == pytest.approx([0.1, 0.2, 0.3])
    assert records[0]["collector/time/elapsed"] == 0.0
    assert all(record["collector/time/elapsed"] > 0 for record in records[1:])


def test_a_single_response_has_no_deviation(make_queue):
    queue = make_queue(10)
    RemoteDataLogger(queue)(make_batch((0.7, 3)))
    (record,) = waiting(queue)
    assert [record[f"collector/rewards/{name}"] for name in STATISTICS] == pytest.approx([0.7, 0.0, 0.7, 0.7])
    assert [record[f"collector/response_length/{name}"] for name in STATISTICS] == [3.0, 0.0, 3.0, 3.0]


def test_a_reward_that_is_no_number_leaves_the_others_their_statistics(make_queue):
    queue = make_queue(10)
    logger = RemoteDataLogger(queue)
    logger(make_batch((float("nan"), 2), (1.0, 4), (float("inf"), 4), (0.0, 4)))
    logger(make_batch((float("nan"), 2)))
    first, second = waiting(queue)
    assert [first[f"collector/rewards/{name}"] for name in STATISTICS] == [0.5, 0.5, 0.0, 1.0]
    assert not any(name.startswith("collector/rewards/") for name in second)
    assert second["collector/response_length/mean"] == 2


def test_a_full_queue_drops_the_oldest_and_counts_them(make_queue):
    queue = make_queue(3)
    logger = RemoteDataLogger(queue)

    def send_five():
        for number in range(5):
            logger.send({"collector/dialog_turns": number})

    sending = threading.Thread(target=send_five, daemon=True)
    sending.start()
    sending.join(timeout=60)
    assert not sending.is_alive(), "it waits for room, which nobody will make"

    def found():
        names = ("collector/dialog_turns", "collector/dropped_records")
        return [tuple(record[name] for name in names) for record in waiting(queue)]

    assert found() == [(2, 0.0), (3, 1.0), (4, 2.0)]
    logger.send({"collector/dialog_turns": 5})
    assert found() == [(5, 2.0)]
    other = RemoteDataLogger(queue)
    other.load_state_dict(logger.state_dict())
    other.send({"collector/dialog_turns": 6})
    assert found() == [(6, 2.0)]


def test_records_of_another_process_reach_the_metrics_file(make_queue, tmp_path):
    queue = make_queue(10)

    @ray.remote
    def collect(queue):
        from ei_utils import RemoteDataLogger

        RemoteDataLogger(queue).send({"selection/groups_seen": 4.0})

    ray.get(collect.remote(queue))
    metrics = Metrics(tmp_path, loggers=[], log_queue=queue, logging_frequency=1, clock=lambda: 1.5)
    metrics.drain(step=7)
    metrics.close()
    assert '"step": 7' in (text := (tmp_path / "metrics.jsonl").read_text())
    assert '"selection/groups_seen": 4.0' in text


# --- log_training_metrics ---


class FakeLearner:
    gradient_steps, optimizer_steps, bad_steps, responses_trained = 12, 3, 1, 40
    tokens_trained, seconds = 1800, 6.0


class FakeBuffer:
    def __init__(self, write_count):
        self.write_count = write_count

    def statistics(self):
        return {
            "buffer/size": 4.0,
            "buffer/write_count": self.write_count,
            "buffer/reward": 0.75,
            "buffer/response_length": 18.0,
        }


class FakeLogger:
    def __init__(self):
        self.lines = []

    def log_metrics(self, metrics, step):
        self.lines.append((dict(metrics), step))


def logged(tmp_path, result, versions, policy_version, write_count=8.0):
    logger = FakeLogger()
    metrics = Metrics(tmp_path, loggers=[logger], logging_frequency=1)
    batch = make_batch(*((1.0, 2, version) for version in versions))
    log_training_metrics(metrics, result, batch, FakeLearner(), FakeBuffer(write_count), policy_version)
    ((line, step),) = logger.lines
    assert step == result.step
    return line


def test_a_gradient_step_is_logged_under_the_names_of_the_documentation(tmp_path):
    result = StepResult(
        {
            "loss": 1.5,
            "loss_sft": 1.0,
            "loss_kl_to_ref": 0.5,
            "kl_to_ref": 0.25,
            "reward": 0.9,
            "response_length": 17.0,
            "learning_rate": 1e-4,
            "grad_norm": 2.0,
        },
        stepped=True,
        step=12,
        since=8,
    )
    assert logged(tmp_path, result, versions=[1, 2, 3], policy_version=4) == {
        "train/loss": 1.5,
        "train/loss_sft": 1.0,
        "train/loss_kl_to_ref": 0.5,
        "train/kl_to_ref": 0.25,
        "train/reward": 0.9,
        "train/response_length": 17.0,
        "train/grad_norm": 2.0,
        "learning_rate": 1e-4,
        "optim_step": 3,
        "train/bad_steps": 1,
        "train/data_read_count": 40,
        "train/policy_version": 2.0,
        "train/policy_age": 2.0,
        "train/max_policy_age": 3.0,
        "train/steps_per_second": 2.0,
        "train/tokens_per_second": 300.0,
        "train/gradient_steps_per_write": 1.5,
        "train/optim_steps_per_write": 0.375,
        "buffer/size": 4.0,
        "buffer/write_count": 8.0,
        "buffer/reward": 0.75,
        "buffer/response_length": 18.0,
    }


def test_what_a_step_does_not_have_is_not_logged(tmp_path):
    result = StepResult({"loss": 1.0, "learning_rate": 0.1}, stepped=False, step=1, since=0)
    line = logged(tmp_path, result, versions=[0], policy_version=0)
    assert not {"train/kl_to_ref", "train/loss_kl_to_ref", "train/grad_norm"} & line.keys()
    assert line["train/policy_age"] == 0.0


def test_steps_per_write_are_finite_before_the_first_write(tmp_path):
    result = StepResult({"loss": 1.0}, stepped=False, step=1, since=0)
    assert (
        logged(tmp_path, result, versions=[0], policy_version=0, write_count=0.0)["train/gradient_steps_per_write"]
        == 12.0
    )
