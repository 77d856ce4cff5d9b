"""Data-parallel training on two real ranks, this process and a Ray actor, over gloo: the same run as on one rank."""

import io
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from builders import random_model, random_policy
from tensordict import TensorDict, lazy_stack

from expert_iteration.data_parallel import Alone, Replicas, Shards
from expert_iteration.learner import Learner
from expert_iteration.log_probs import LogProbModel
from expert_iteration.loss import SFTLoss
from expert_iteration.optimizer import make_optimizer
from expert_iteration.parallel_learner import ParallelBaseScorer, ParallelLearner, ParallelPolicyReader
from expert_iteration.policy_reader import PolicyReader
from expert_iteration.schedule import KLSchedule, make_scheduler
from expert_iteration.scorer import ReferenceScorer
from expert_iteration.train_ranks import RankGroup

VOCABULARY = 50
NUM_ROWS = 9
EPOCHS = 3
CLIP = 0.5
SEQUENCES = [[1, 2, 3, 4], [5, 6]]


@dataclass(frozen=True)
class Case:
    kind: str  # alone, ddp, fsdp
    lora: bool = False
    base_dtype: torch.dtype = torch.float32
    autocast_dtype: torch.dtype | None = None
    accumulation: int = 1
    seed: int = 0
    checkpointing: bool = False


def make_row(seed, start_model):
    """A response with its log-probs under the start model, from which the KL term measures."""
    generator = torch.Generator().manual_seed(seed)
    prompt, response = (int(torch.randint(1, 9, (1,), generator=generator)) for _ in range(2))
    mask = torch.arange(prompt + response) >= prompt
    ids = torch.randint(VOCABULARY, mask.shape, generator=generator)
    (log_probs,) = ReferenceScorer(start_model, pad_token_id=0, micro_batch_size=1).score([ids])
    return TensorDict(
        {
            ("tokens", "full"): ids,
            ("masks", "all_assistant_mask"): mask,
            ("next", "reward"): torch.tensor([float(seed)]),
            ("next", "ref_log_probs", "full"): log_probs.masked_fill(~mask, 0.0),
        }
    )


ROWS = [make_row(seed, random_model(VOCABULARY)) for seed in range(NUM_ROWS)]


def build(case, loaded, rank, ranks):
    """A rank's learner; `ranks` is given on rank 0 of several."""
    model = random_model(VOCABULARY, seed=case.seed)
    if case.lora:
        model = random_policy(model.to(case.base_dtype), r=2)
    if case.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = LogProbModel(model)
    parallel = {"alone": Alone, "ddp": Replicas, "fsdp": partial(Shards, "cpu")}[case.kind]()
    parallel.prepare(module, case.autocast_dtype)
    settings = SimpleNamespace(name="AdamW", betas=[0.9, 0.98], weight_decay=0.1)
    optimizer = make_optimizer(model, settings, 3e-3)
    shape = SimpleNamespace(enabled=True, type="cosine_with_warmup", warmup_steps=0, num_cycles=0.5)
    make = Learner if ranks is None else partial(ParallelLearner, ranks=ranks)
    return make(
        model,
        SFTLoss(module, SimpleNamespace(pad_token_id=0), kl_to_ref_coeff=0.5),
        optimizer,
        make_scheduler(optimizer, shape, 6),
        gradient_accumulation_steps=case.accumulation,
        clip_grad_norm=CLIP,
        autocast_dtype=case.autocast_dtype,
        max_bad_steps=2,
        kl_schedule=KLSchedule(start=0.5, end=0.1, shape="linear"),
        parallel=parallel,
        keep_start=True,
    )


@pytest.fixture(scope="module")
def ranks(ray_session, tmp_path_factory):
    group = RankGroup(dict, [{}], tmp_path_factory.mktemp("run"), "gloo")
    group.join(print)
    yield group
    group.leave()
    group._end()


def run(learner, rows_per_step):
    """The losses of each gradient step and the norms of each window, over the epochs, each with a smaller last step."""
    losses, norms = [], []
    for _ in range(EPOCHS):
        for start in range(0, NUM_ROWS, rows_per_step):
            rows = ROWS[start : start + rows_per_step]
            result = learner.step(lazy_stack(rows))
            losses.append((len(rows), result["loss"]))
            norms += [result["grad_norm"]] if result.stepped else []
        norms += [last["grad_norm"]] if (last := learner.flush()).stepped else []
    return losses, norms


def take_steps(learner, starts=(0, 4)):
    """The losses of some gradient steps of four rows each."""
    return [learner.step(lazy_stack(ROWS[start : start + 4]))["loss"] for start in starts]


def in_runs(losses, size):
    """Means over every `size` micro-batches of an epoch, by responses."""
    per_epoch = len(losses) // EPOCHS
    means = []
    for start in range(0, len(losses), per_epoch):
        epoch = losses[start : start + per_epoch]
        for part in (epoch[i : i + size] for i in range(0, per_epoch, size)):
            means.append(sum(n * loss for n, loss in part) / sum(n for n, _ in part))
    return means


KINDS = pytest.mark.parametrize("kind", ["ddp", "fsdp"])
ADAPTERS = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


@pytest.fixture
def on_two(ranks):
    """A function that builds a case on both ranks and returns rank 0's learner."""
    return lambda case: ranks.build(partial(build, case), None)


def on_one(case):
    return build(replace(case, kind="alone"), None, 0, None)


# --- the same training ---


@KINDS
@ADAPTERS
def test_two_ranks_train_as_one_with_twice_the_accumulation(on_two, kind, lora):
    """Six AdamW steps, clipped, each epoch's last of a single response: one rank has none to work on."""
    one = on_one(Case(kind, lora, accumulation=4))
    expected_losses, expected_norms = run(one, 2)
    two = on_two(Case(kind, lora, accumulation=2))
    losses, norms = run(two, 4)
    assert len(norms) == len(expected_norms) == 6
    assert max(norms) > CLIP
    # Sums in another order, in float32, whose numbers are 6e-8 of their size apart.
    assert [loss for _, loss in losses] == pytest.approx(in_runs(expected_losses, 2), rel=1e-6)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    assert (two.gradient_steps, two.optimizer_steps) == (9, 6)
    assert (two.responses_trained, two.tokens_trained) == (one.responses_trained, one.tokens_trained)


@KINDS
def test_metrics_are_means_over_the_responses_of_both_ranks(on_two, kind):
    batch = lazy_stack(ROWS[:3])  # two for one rank, one for the other
    expected, found = on_one(Case(kind)).step(batch), on_two(Case(kind)).step(batch)
    assert found.keys() == expected.keys() >= {"reward", "response_length", "kl_to_ref", "grad_norm"}
    assert dict(found) == pytest.approx(dict(expected), rel=1e-5)
    assert found["reward"] == 1.0


@KINDS
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_under_autocast_the_first_step_is_that_of_one_rank(on_two, kind, lora, checkpointing):
    """With LoRA frozen bfloat16 weights under float32 adapters."""
    base_dtype = torch.bfloat16 if lora else torch.float32
    case = Case(kind, lora, base_dtype, autocast_dtype=torch.bfloat16, checkpointing=checkpointing)
    one, two = on_one(case), on_two(case)
    expected, found = one.step(lazy_stack(ROWS[:4])), two.step(lazy_stack(ROWS[:4]))
    # The forward pass is the same but for the padding; gradients are sums of others that have bfloat16's 8 bits.
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-2)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)
    trained = [parameter for parameter in two.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_between_forward_and_backward_no_layer_stays_gathered(on_two, ranks, autocast_dtype):
    """Under autocast alone, each linear layer's whole weight would, as a copy in half precision."""
    learner = on_two(Case("fsdp", autocast_dtype=autocast_dtype))
    layers = learner.model.model.layers
    shapes = {tuple(parameter.shape) for parameter in layers.parameters() if parameter.ndim == 2}
    shapes |= {shape[::-1] for shape in shapes}
    saved, num_bytes = [], []

    def note(tensor):
        if tuple(tensor.shape) in shapes:
            saved.append(tensor)
        return tensor

    learner.loss_fn.register_forward_hook(
        lambda *_: num_bytes.append(sum(tensor.untyped_storage().nbytes() for tensor in saved))
    )
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        learner.step(lazy_stack(ROWS[:4]))
    assert len(saved) >= 2 * 7  # the seven linear layers of each of the two
    assert num_bytes == [0]


def test_gradients_that_only_some_ranks_have_are_summed(on_two, ranks):
    on_two(Case("ddp"))
    with ranks.together(partial(reduce_gradients, 1)) as found:
        ours = reduce_gradients(0)
    assert found == [ours] == [[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], None]]


def reduce_gradients(rank, _=None):
    """Of four parameters the first has a gradient on rank 0, the second on rank 1, the third on both."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
    for index, value in [[(0, 1.0), (2, 1.0)], [(1, 2.0), (2, 2.0)]][rank]:
        parameters[index].grad = torch.full((2,), value)
    Replicas().reduce_gradients(parameters)
    return [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]


@KINDS
@ADAPTERS
def test_a_restart_begins_anew_on_both_ranks(on_two, kind, lora):
    learner, fresh = on_two(Case(kind, lora)), on_one(Case(kind, lora))
    start = learner.checkpoint()
    take_steps(learner)
    fresh.plan(0, until=1 / 3)  # where two of the six steps have taken the run, for the KL coefficient
    for begins in (learner, fresh):
        begins.restart(2, until=1.0)
    state = learner.checkpoint()
    assert_same(state["model_state_dict"], start["model_state_dict"])
    assert state["optimizer_state_dict"]["state"] == {}
    assert (state["step"], state["optim_step"]) == (2, 2)
    # The first is of the start weights, the second of one step of a fresh optimizer at the same learning rate.
    assert take_steps(learner) == pytest.approx(take_steps(fresh), rel=1e-5)


# --- what is bad is bad for all ---


@KINDS
def test_a_bad_response_on_one_rank_is_a_bad_step_on_both(on_two, kind):
    learner = on_two(Case(kind))
    before = learner.checkpoint()
    rows = [row.clone() for row in ROWS[:4]]
    rows[3]["next", "ref_log_probs", "full"].fill_(torch.nan)  # the other rank's
    assert not learner.step(lazy_stack(rows)).stepped
    assert learner.bad_steps == 1
    assert_same(learner.checkpoint()["model_state_dict"], before["model_state_dict"])
    # Both go on together.
    assert learner.step(lazy_stack(ROWS[:4])).stepped


@KINDS
def test_the_gradient_scaler_is_the_same_on_both_ranks(on_two, ranks, kind):
    learner = on_two(Case(kind, autocast_dtype=torch.float16))
    with ranks.together(partial(set_scale, 2.0**100)):
        set_scale(2.0**100, learner)
    assert not learner.step(lazy_stack(ROWS[:4])).stepped
    with ranks.together(partial(set_scale, 16.0)) as scales:
        assert set_scale(16.0, learner) == 2.0**99
    assert scales == [2.0**99]
    result = learner.step(lazy_stack(ROWS[:4]))
    expected = on_one(Case(kind, autocast_dtype=torch.float16))
    set_scale(16.0, expected)
    assert result.stepped
    assert result["grad_norm"] == pytest.approx(expected.step(lazy_stack(ROWS[:4]))["grad_norm"], rel=0.01)


def set_scale(scale, learner):
    """Set the scale of a learner's gradient scaler; returns what it was."""
    before = learner.scaler.get_scale()
    learner.scaler.load_state_dict({**learner.scaler.state_dict(), "scale": scale})
    return before


# --- checkpoints ---


@pytest.mark.parametrize(
    ("before", "after", "lora"),
    [("fsdp", "alone", False), ("alone", "fsdp", True), ("fsdp", "ddp", True), ("ddp", "fsdp", False)],
)
def test_a_checkpoint_moves_between_rank_counts_and_kinds(on_two, before, after, lora):
    def start(kind):
        return on_one(Case(kind, lora)) if kind == "alone" else on_two(Case(kind, lora))

    expected, learner = on_one(Case("alone", lora)), start(before)
    for trained in (expected, learner):
        take_steps(trained)
    saved = io.BytesIO()
    torch.save(learner.checkpoint(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert_same_form(state, expected.checkpoint())
    restored = start(after)
    restored.load_checkpoint(state)
    assert_same(restored.checkpoint(), state)
    assert take_steps(restored) == pytest.approx(take_steps(expected), rel=1e-5)


@KINDS
def test_a_checkpoint_of_another_model_is_refused(on_two, kind):
    learner = on_one(Case(kind))
    state = learner.checkpoint()
    state["model_state_dict"]["lm_head.weight"] = torch.zeros(3, 32)
    with pytest.raises(RuntimeError, match=r"1 tensors .* such as lm_head\.weight"):
        learner.load_checkpoint(state)


def assert_same_form(found, expected):
    """Nested states with the same keys, shapes, dtypes and kinds."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same_form(found[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)


def assert_same(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


# --- reading the policy ---


@KINDS
@ADAPTERS
def test_the_reader_gives_whole_merged_weights_and_scores(on_two, ranks, kind, lora):
    one, two = on_one(Case(kind, lora)), on_two(Case(kind, lora))
    expected_reader, reader = PolicyReader(), ParallelPolicyReader(two, ranks)
    for _ in range(2):
        one.step(lazy_stack(ROWS[:4]))
        two.load_checkpoint(one.checkpoint())
        assert_same(dict(reader.weights(two.model)), dict(expected_reader.weights(one.model)))
        if lora:
            assert_same(dict(reader.adapters(two.model)), dict(expected_reader.adapters(one.model)))
        assert_same_scores(reader.score(two.model, SEQUENCES), expected_reader.score(one.model, SEQUENCES))


def test_what_is_gathered_for_scoring_is_not_used_after_an_optimizer_step(on_two, ranks):
    """Before `flush` there is no forward pass, which would gather the weights anew."""
    learner, one = on_two(Case("fsdp", accumulation=2)), on_one(Case("fsdp"))
    reader = ParallelPolicyReader(learner, ranks)
    learner.step(lazy_stack(ROWS[:4]))
    before = reader.score(learner.model, SEQUENCES)
    learner.flush()
    after = reader.score(learner.model, SEQUENCES)
    one.load_checkpoint(learner.checkpoint())
    assert after != before
    assert_same_scores(after, PolicyReader().score(one.model, SEQUENCES))


def assert_same_scores(found, expected):
    for row, values in zip(found, expected, strict=True):
        assert row == pytest.approx(values, abs=1e-5)


def test_a_reading_that_is_broken_off_leaves_the_ranks_in_step(on_two, ranks):
    learner = on_two(Case("fsdp"))
    reader = ParallelPolicyReader(learner, ranks)
    weights = reader.weights(learner.model)
    next(weights)
    weights.close()
    assert learner.step(lazy_stack(ROWS[:4])).stepped


@KINDS
@pytest.mark.parametrize("num_rows", [1, 5])
def test_the_reference_with_adapters_off_is_scored_by_all_ranks(on_two, ranks, kind, num_rows):
    learner = on_two(Case(kind, lora=True))
    take_steps(learner)
    base = random_model(VOCABULARY).eval()
    rows = [row["tokens", "full"] for row in ROWS[:num_rows]]
    expected = ReferenceScorer(base, pad_token_id=0, micro_batch_size=2).score(rows)
    scorer = ParallelBaseScorer(ranks, learner.model, learner.loss_fn.model, micro_batch_size=2, autocast_dtype=None)
    for found, values in zip(scorer.score(rows), expected, strict=True):
        torch.testing.assert_close(found, values, rtol=0, atol=1e-5)
    assert scorer.score([]) == []


# --- the last tests, for a failure ends the group ---


def build_unlike(loaded, rank, ranks):
    return build(Case("ddp", seed=rank), loaded, rank, ranks)


def test_ranks_that_loaded_different_weights_are_refused(ranks):
    with pytest.raises(RuntimeError, match=r"loaded different weights \(\d+ parameters .*model\.embed_tokens\.weight"):
        ranks.build(build_unlike, None)


@pytest.fixture
def three_ranks(ray_session, tmp_path):
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    group = RankGroup(dict, [{}, {}], tmp_path, "gloo")
    group.join(print)
    yield group
    group._end()
    group.leave()


@pytest.mark.slow
def test_three_ranks_train_as_one_with_three_times_the_accumulation(three_ranks):
    """An adapter of rank 2 leaves the third of three shards empty."""
    for kind, lora in [("ddp", False), ("ddp", True), ("fsdp", False), ("fsdp", True)]:
        one = on_one(Case(kind, lora, accumulation=3))
        three = three_ranks.build(partial(build, Case(kind, lora)), None)
        (expected_losses, expected_norms), (losses, norms) = run(one, 1), run(three, 3)
        assert [loss for _, loss in losses] == pytest.approx(in_runs(expected_losses, 3), rel=1e-6)
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        assert_same_form(three.checkpoint(), one.checkpoint())
