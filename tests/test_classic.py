"""Classic expert iteration: the start model fine-tuned anew on all that was kept, and a reference that follows."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import ray
import torch
from builders import random_model
from local_runs import THREE_BATCHES, run_algorithm
from scripted_engine import ScriptedEngine
from tensordict import TensorDict, lazy_stack

from expert_iteration.actors import ReferenceActor, ReferenceClient
from expert_iteration.learner import Learner
from expert_iteration.loss import SFTLoss
from expert_iteration.models import load_model
from expert_iteration.optimizer import make_optimizer
from expert_iteration.packed_weights import PackedWeights
from expert_iteration.policy_reader import PolicyReader
from expert_iteration.reference_update import ReferenceUpdater
from expert_iteration.schedule import make_scheduler
from expert_iteration.scorer import ReferenceScorer

VOCABULARY = 50
OVERRIDES = (
    *THREE_BATCHES,
    "train.checkpoint_frequency=0",
    "optimizer.lr=3e-3",
    "optimizer.scheduler.type=linear",
    "eval.frequency=0",
    "eval.num_prompts=3",
    "eval.num_samples=1",
    "logging.backend=none",
)
SAME = 1e-9  # of a KL: it is quadratic in the 1e-6 by which padding changes a float32 log-prob


@pytest.fixture
def start_run(load_script, make_cfg, tiny_folder, tiny_tokenizer, tmp_path):
    """A function from overrides to a run of the tiny model; what it logged under a name is `values(name)`."""

    def start(*overrides, mode="sync"):
        cfg = make_cfg(f"model.name={tiny_folder}", *OVERRIDES, *overrides, mode=mode)
        model = load_model(str(tiny_folder), dtype="float32", attn_implementation="sdpa", device="cpu")
        engine = ScriptedEngine(model, tiny_tokenizer)
        done = run_algorithm(load_script(f"expert-iteration-{mode}"), cfg, engine, tmp_path / "run")
        done.values = lambda name: [line[name] for line in done.lines if name in line]
        return done

    return start


# --- from the start model ---


def test_every_batch_fine_tunes_the_start_model_on_all_that_was_kept(start_run):
    run = start_run("train.restart_from=base", "train.epochs=2")
    # One, two and three micro-batches, twice over.
    assert run.values("buffer/size")[:12] == [4.0] * 2 + [8.0] * 4 + [12.0] * 6
    kl, rates = run.values("train/kl_to_ref"), run.values("learning_rate")
    begins = [0, 2, 6]
    assert all(abs(kl[step]) < SAME for step in begins)
    assert min(kl[step] for step in range(12) if step not in begins) > 1e-6
    # A schedule for each, of which the last step counts too.
    assert rates == pytest.approx([3e-3 * left / steps for steps in (2, 4, 6) for left in range(steps, 0, -1)])
    # What collects is the policy of the batch before.
    assert run.values("collector/policy_version/max") == [0, 1, 2]
    trained = run.policy.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in run.engine.model.state_dict().items())


def test_the_newest_batch_alone_may_be_fine_tuned_on(start_run):
    run = start_run("train.restart_from=base", "train.accumulate_expert_set=false", "train.epochs=2")
    assert run.values("buffer/size")[:6] == [4.0] * 6
    kl = run.values("train/kl_to_ref")
    assert [abs(value) < SAME for value in kl] == [True, False] * 3


def test_an_expert_set_may_accumulate_for_a_policy_that_goes_on(start_run):
    run = start_run("train.accumulate_expert_set=true", "train.epochs=1")
    assert run.values("buffer/size")[:6] == [4.0] + [8.0] * 2 + [12.0] * 3
    kl, rates = run.values("train/kl_to_ref"), run.values("learning_rate")
    assert [abs(value) < SAME for value in kl] == [True] + [False] * 5
    assert rates == sorted(rates, reverse=True)


def test_with_adapters_the_start_is_that_of_the_adapters(start_run):
    run = start_run("train.restart_from=base", "train.epochs=1", "train_model.lora.enabled=true", "optimizer.lr=3e-2")
    kl = run.values("train/kl_to_ref")
    assert [abs(value) < SAME for value in kl] == [True, True, False, True, False, False]


# --- the learner ---


def make_row(seed):
    generator = torch.Generator().manual_seed(seed)
    return TensorDict(
        {
            ("tokens", "full"): torch.randint(VOCABULARY, (7,), generator=generator),
            ("masks", "all_assistant_mask"): torch.arange(7) >= 3,
            ("next", "reward"): torch.tensor([1.0]),
        }
    )


def make_learner(*, keep_start=True, dtype=None):
    model = random_model(VOCABULARY)
    settings = SimpleNamespace(name="AdamW", betas=[0.9, 0.98], weight_decay=0.1)
    optimizer = make_optimizer(model, settings, 3e-3)
    shape = SimpleNamespace(enabled=True, type="cosine_with_warmup", warmup_steps=2, num_cycles=0.5)
    return Learner(
        model,
        SFTLoss(model, SimpleNamespace(pad_token_id=0)),
        optimizer,
        make_scheduler(optimizer, shape, 100),
        gradient_accumulation_steps=2,
        clip_grad_norm=1.0,
        autocast_dtype=dtype,
        max_bad_steps=2,
        keep_start=keep_start,
    )


def train(learner, seeds):
    """The losses of gradient steps of two rows each, and the weights after them."""
    losses = [learner.step(lazy_stack([make_row(seed), make_row(seed + 50)]))["loss"] for seed in seeds]
    return losses, [parameter.detach().clone() for parameter in learner.model.parameters()]


def test_after_a_restart_the_steps_are_those_of_a_fresh_learner():
    learner, fresh = make_learner(), make_learner()
    learner.plan(3, until=0.5)
    train(learner, range(6))
    learner.restart(4, until=1.0)
    fresh.plan(4, until=1.0)
    assert (learner.gradient_steps, learner.optimizer_steps, learner.last_step_at) == (6, 3, 6)
    (losses, weights), (expected_losses, expected_weights) = train(learner, range(8)), train(fresh, range(8))
    assert losses == expected_losses
    assert all(torch.equal(one, other) for one, other in zip(weights, expected_weights, strict=True))
    assert (learner.gradient_steps, learner.optimizer_steps, learner.responses_trained) == (14, 7, 28)


def test_a_learner_from_a_checkpoint_goes_on_and_begins_anew_from_the_start_model():
    learner, resumed, fresh = make_learner(), make_learner(), make_learner()
    learner.restart(4, until=0.5)
    train(learner, range(4))
    resumed.load_checkpoint(deepcopy(learner.checkpoint()))
    ends = [train(one, range(4, 8)) for one in (learner, resumed)]
    assert ends[0][0] == ends[1][0]
    resumed.restart(1, until=1.0)
    fresh.plan(1, until=1.0)
    assert train(resumed, range(2))[0] == train(fresh, range(2))[0]


def test_a_learner_that_has_kept_no_start_cannot_restart():
    with pytest.raises(RuntimeError, match="keep_start"):
        make_learner(keep_start=False).restart(1, until=1.0)


# --- a reference that follows ---


@pytest.mark.parametrize(
    ("every", "lora", "versions", "same"),
    [
        ("null", (), [], [True, False, False]),
        (1, (), [1, 2, 3], [True, True, True]),
        (2, (), [0, 2, 2], [True, False, True]),
        (1, ("train_model.lora.enabled=true", "ref_model.num_devices=1"), [1, 2, 3], [True, True, True]),
    ],
)
def test_after_so_many_pushes_the_policy_is_the_reference(start_run, every, lora, versions, same):
    run = start_run(f"ref_model.refresh_every={every}", "train.epochs=2", "optimizer.lr=1e-2", *lora)
    assert run.values("weights/reference_version") == versions
    assert len(run.values("weights/refresh_seconds")) == len(set(versions) - {0})
    kl = run.values("train/kl_to_ref")  # two steps a batch
    assert [abs(value) < SAME for value in kl[::2]] == same
    assert min(kl[1::2]) > 1e-6


def test_an_asynchronous_reference_follows_too(start_run):
    run = start_run("ref_model.refresh_every=2", "train.weight_update_frequency=1", "train.epochs=2", mode="async")
    assert run.values("weights/reference_version") == [0, 2, 2, 4, 4, 6]


class Reference:
    """Remembers what it is given."""

    def __init__(self):
        self.loaded = []

    def load(self, weights, timeout):
        self.loaded.append(({name: tensor.clone() for name, tensor in weights}, timeout))


def make_updater(reference, every):
    return ReferenceUpdater(reference, PolicyReader(), dtype=torch.bfloat16, every=every, timeout=7.0)


def test_a_refresh_gives_whole_weights_in_the_type_of_the_reference():
    policy, reference = random_model(VOCABULARY), Reference()
    updater = make_updater(reference, every=3)
    assert [updater.after_push(policy, pushes, pushes + 1) for pushes in (1, 2)] == [
        {"weights/reference_version": 0.0}
    ] * 2
    assert (reference.loaded, updater.version, updater.weights) == ([], 0, None)
    assert updater.after_push(policy, 3, 4)["weights/reference_version"] == updater.version == 4
    [(weights, timeout)] = reference.loaded
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in policy.state_dict().items()}
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    assert timeout == 7.0
    assert updater.after_push(policy, 4, 5) == {"weights/reference_version": 4.0}


def test_without_refreshing_nothing_is_said_and_no_reference_needed():
    updater = make_updater(None, every=None)
    assert updater.after_push(random_model(VOCABULARY), 1, 1) == {}


def test_a_restored_reference_is_refreshed_again():
    policy, reference, restored = random_model(VOCABULARY), Reference(), Reference()
    updater, resumed = make_updater(reference, every=1), make_updater(restored, every=1)
    updater.after_push(policy, 1, 1)
    resumed.restore(updater.weights, updater.version)
    assert (resumed.version, restored.loaded[0][0].keys()) == (1, reference.loaded[0][0].keys())
    kept = {name: tensor.clone() for name, tensor in updater.weights}
    with torch.no_grad():
        policy.lm_head.weight.add_(1.0)
    resumed.after_push(policy, 2, 2)
    assert resumed.version == 2
    assert not torch.equal(restored.loaded[1][0]["lm_head.weight"], kept["lm_head.weight"])
    # The other run's weights are not this one's to overwrite.
    assert all(torch.equal(tensor, kept[name]) for name, tensor in updater.weights)


def load_random_model():
    return random_model(VOCABULARY).eval()


def test_the_process_of_the_reference_scores_with_what_it_was_given(ray_session, tmp_path):
    make = ray.remote(num_cpus=0)(ReferenceActor).remote
    actor = make(load_random_model, micro_batch_size=2, log_path=str(tmp_path / "log"))
    references = ReferenceClient({"reference": actor})
    rows = [make_row(seed)["tokens", "full"] for seed in range(4)]
    other = random_model(VOCABULARY, seed=1).eval()
    before, expected = (
        ReferenceScorer(model, pad_token_id=0, micro_batch_size=2).score(rows) for model in (load_random_model(), other)
    )
    assert all(torch.equal(one, two) for one, two in zip(references.score(rows), before, strict=True))
    weights = PackedWeights.allocate(other.state_dict().items(), torch.float32)
    weights.pack(other.state_dict().items())
    references.load(weights, timeout=60)
    assert all(torch.equal(one, two) for one, two in zip(references.score(rows), expected, strict=True))
    actor.score.remote(200 * rows)  # which keeps it busy
    with pytest.raises(TimeoutError, match=r"reference has not .* weight_update\.timeout=0 s \(logs/reference\.log"):
        references.load(weights, timeout=0)
    with pytest.raises(RuntimeError, match=r"missing \['lm_head\.weight'"):
        references.load(PackedWeights.allocate([], torch.float32), timeout=60)
    ray.kill(actor)
