"""`expert_iteration.sampler`: draws in proportion to reward, and passes in which higher rewards come sooner."""

from itertools import permutations

import pytest
import torch

from expert_iteration.sampler import (
    RewardPrioritizedPass,
    RewardPrioritizedSampler,
    find_drawn,
    reward_priorities,
)

REWARDS = [-1.0, 0.0, 0.5, 3.0, 0.0]
ALPHA, EPSILON = 0.8, 0.05
# The chance with which a right sampler fails one of the tests of frequencies; all are seeded, so it falls once for all.
SIGNIFICANCE = 1e-3


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def plain_probabilities(rewards, alpha=ALPHA, epsilon=EPSILON):
    """P(i) from the formula of the issue, number by number."""
    shift, spread = max(0.0, -min(rewards)), max(rewards) - min(rewards)
    powers = [(reward + shift + epsilon * spread) ** alpha for reward in rewards]
    return [power / sum(powers) for power in powers]


def p_value(counts, probabilities):
    """Of Pearson's chi-square test: the chance of counts at least so far off."""
    counts, expected = tensor(counts), sum(counts) * tensor(probabilities)
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(tensor((len(counts) - 1) / 2), statistic / 2).item()


def seeded(sampler, seed=0):
    """As the buffer does it."""
    sampler._rng = torch.Generator().manual_seed(seed)
    return sampler


def make_sampler(rewards, slots=None, *, kind=RewardPrioritizedSampler, seed=0, capacity=None, **options):
    options = {"alpha": ALPHA, "epsilon": EPSILON} | options
    sampler = seeded(kind(capacity or len(rewards), **options), seed)
    sampler.write(torch.arange(len(rewards)) if slots is None else torch.tensor(slots), tensor(rewards))
    return sampler


def make_pass(rewards, **options):
    return make_sampler(rewards, kind=RewardPrioritizedPass, **options)


def draw(sampler, count):
    return sampler.sample(None, count)[0]


def counts(sampler, count=20_000):
    return draw(sampler, count).bincount(minlength=len(sampler.rewards)).tolist()


def one_pass(sampler, batch_size=2):
    """The slots of each batch of a pass, begun as TorchRL's buffer begins it."""
    sampler.ran_out, batches = False, []
    while not sampler.ran_out:
        batches.append(draw(sampler, batch_size).tolist())
    return batches


def in_order(batches):
    return [slot for batch in batches for slot in batch]


# --- priorities ---


@pytest.mark.parametrize(
    "rewards", [REWARDS, [0.1, 1.0, 0.1], [-3.0, -2.0, -2.5], [0.0, 1.0], [1e300, 0.0, -1e300], [7.0]]
)
@pytest.mark.parametrize(("alpha", "epsilon"), [(0.8, 1e-6), (1.0, 0.05), (2.0, 0.5), (0.0, 1e-6)])
def test_priorities_are_in_the_proportions_of_the_formula(rewards, alpha, epsilon):
    found = reward_priorities(tensor(rewards), alpha, epsilon)
    assert found.max() == 1.0
    # The plain formula overflows where ours divides first: only proportions matter, so it may take smaller rewards.
    scale = max(map(abs, rewards))
    expected = plain_probabilities([reward / scale for reward in rewards], alpha, epsilon)
    # Some operations in float64, each exact to 1e-16, with an exponent of at most 2.
    torch.testing.assert_close(found / found.sum(), tensor(expected), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("reward", [-2.0, 0.0, 5.0])
def test_equal_rewards_have_equal_priorities(reward):
    assert reward_priorities(tensor([reward] * 3), alpha=0.8, epsilon=0.0).tolist() == [1.0] * 3


def test_the_stated_rarity_of_the_least_reward_holds():
    for epsilon, draws in [(1e-6, 63_000), (0.05, 11)]:
        least, greatest = reward_priorities(tensor([0.0, 1.0]), 0.8, epsilon).tolist()
        assert greatest / least == pytest.approx(draws, rel=0.05)  # stated with two digits


def test_a_draw_never_falls_on_what_has_no_priority():
    cumulative = tensor([0.0, 0.0, 2.0, 2.0, 3.0, 3.0])  # priorities 0 0 2 0 1 0
    uniform = tensor([0.0, 1e-300, 0.5, 2 / 3, 0.7, 1.0 - 2**-53, 1.0])
    assert find_drawn(cumulative, uniform).tolist() == [2, 2, 2, 4, 4, 4, 4]


# --- drawing with replacement ---


def test_rows_are_drawn_as_often_as_the_formula_says():
    found = counts(make_sampler(REWARDS))
    assert p_value(found, plain_probabilities(REWARDS)) > SIGNIFICANCE
    # The test can tell: neither an even draw nor another exponent passes.
    assert p_value(found, [0.2] * 5) < 1e-9
    assert p_value(found, plain_probabilities(REWARDS, alpha=0.6)) < 1e-9


def test_alpha_zero_draws_evenly_whatever_the_rewards():
    for epsilon in (0.0, EPSILON):
        assert p_value(counts(make_sampler(REWARDS, alpha=0.0, epsilon=epsilon)), [0.2] * 5) > SIGNIFICANCE


def test_rewards_that_are_all_zero_are_drawn_evenly():
    assert p_value(counts(make_sampler([0.0] * 4, epsilon=1e-6)), [0.25] * 4) > SIGNIFICANCE


def test_what_is_overwritten_is_drawn_by_its_new_reward():
    sampler = make_sampler(REWARDS)
    draw(sampler, 10)
    sampler.write(torch.tensor([3, 1]), torch.tensor([-2.0, 1.0]))
    now = [-1.0, 1.0, 0.5, -2.0, 0.0]
    found = counts(sampler)
    assert p_value(found, plain_probabilities(now)) > SIGNIFICANCE
    assert p_value(found, plain_probabilities(REWARDS)) < 1e-9


def test_only_live_slots_are_drawn_and_only_they_count():
    sampler = make_sampler([3.0, 1.0, 2.0], slots=[1, 4, 6], capacity=8)
    sampler.drop(torch.tensor([1]))
    assert (sampler.num_live, sampler.live.nonzero()[:, 0].tolist()) == (2, [4, 6])
    found = counts(sampler)
    least, greatest = plain_probabilities([1.0, 2.0])  # the spread is that of what is left
    assert [found[slot] for slot in (0, 1, 2, 3, 5, 7)] == [0] * 6
    assert p_value([found[4], found[6]], [least, greatest]) > SIGNIFICANCE
    sampler.write(torch.tensor([1]), torch.tensor([5.0]))
    assert set(draw(sampler, 100).tolist()) >= {1}


def test_a_seed_repeats_the_draws():
    first, second, other = (draw(make_sampler(REWARDS, seed=seed), 50).tolist() for seed in (1, 1, 2))
    assert first == second != other


def test_nothing_live_is_nothing_to_draw():
    sampler = make_sampler([1.0, 2.0])
    assert sampler.can_sample(None, 5)
    sampler.drop(torch.tensor([0, 1]))
    assert not sampler.can_sample(None, 5)
    with pytest.raises(RuntimeError, match="no row of the buffer is live"):
        draw(sampler, 1)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_is_refused(reward):
    sampler = make_sampler([1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        sampler.write(torch.tensor([0]), torch.tensor([reward]))
    assert sampler.rewards.tolist() == [1.0, 2.0]


# --- importance weights ---


def weighted_draw(sampler, count=2000):
    """The importance weight of every slot that was drawn."""
    index, info = sampler.sample(None, count)
    weights = info["importance_weight"]
    assert (weights.shape, weights.dtype) == ((count,), torch.float32)
    return dict(zip(index.tolist(), weights.tolist(), strict=True))


@pytest.mark.parametrize("beta", [0.4, 1.0])
def test_importance_weights_are_those_of_prioritized_replay(beta):
    found = weighted_draw(make_sampler(REWARDS, beta=beta))
    probabilities = plain_probabilities(REWARDS)
    # Rounded to float32.
    expected = [(p / min(probabilities)) ** -beta for p in probabilities]
    assert [found[slot] for slot in range(5)] == pytest.approx(expected, rel=1e-6)
    assert max(found.values()) == 1.0


def test_weights_with_beta_one_undo_the_preference_on_average():
    sampler = make_sampler(REWARDS, beta=1.0)
    index, info = sampler.sample(None, 20_000)
    totals = torch.zeros(5).index_add(0, index, info["importance_weight"])
    # Each is 20,000 times the same number; the rarest slot is drawn some 900 times, hence within 3.3 % (one sd).
    assert (totals / totals.mean()).tolist() == pytest.approx([1.0] * 5, abs=0.15)


def test_without_beta_no_weights_are_computed():
    assert make_sampler(REWARDS).sample(None, 3)[1] == {}


def test_rows_that_cannot_be_drawn_do_not_make_all_weights_zero():
    found = weighted_draw(make_sampler([0.0, 1.0, 2.0], epsilon=0.0, beta=1.0, alpha=1.0))
    assert found == pytest.approx({1: 1.0, 2: 0.5})


# --- 100,000 rows ---


class Counting(RewardPrioritizedSampler):
    """Counts how often what costs time in proportion to the capacity is computed."""

    computed = 0

    def _compute_ranking(self):
        self.computed += 1
        return super()._compute_ranking()


def test_of_100_000_rows_only_the_first_draw_after_a_change_looks_at_all():
    # What that saves is measured by extras/benchmarks/sampler.py.
    rewards = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    sampler = make_sampler(rewards.tolist(), kind=Counting, beta=0.4)

    def draw_often():
        for _ in range(100):
            assert len(draw(sampler, 16)) == 16
            sampler.drop(torch.empty(0, dtype=torch.int64))  # as the buffer does when nothing is too old
        return sampler.computed

    assert draw_often() == 1
    sampler.drop(torch.tensor([5, 7]))
    assert draw_often() == 2
    sampler.write(torch.tensor([5, 99_999]), torch.ones(2))
    assert draw_often() == 3


# --- passes ---


def test_a_pass_takes_every_live_row_once_and_its_last_batch_is_smaller():
    sampler = make_pass(REWARDS)
    sampler.drop(torch.tensor([2]))
    for _ in range(5):
        batches = one_pass(sampler, batch_size=3)
        assert [len(batch) for batch in batches] == [3, 1]
        assert sorted(in_order(batches)) == [0, 1, 3, 4]


def test_the_order_of_a_pass_is_that_of_drawing_without_replacement():
    rewards = [0.0, 1.0, 3.0]
    sampler, found = make_pass(rewards), dict.fromkeys(permutations(range(3)), 0)
    for _ in range(4000):
        found[tuple(in_order(one_pass(sampler)))] += 1
    p = plain_probabilities(rewards)
    orders = {(i, j, k): p[i] * p[j] / (1 - p[i]) for i, j, k in found}
    assert p_value(list(found.values()), list(orders.values())) > SIGNIFICANCE
    assert p_value(list(found.values()), [1 / 6] * 6) < 1e-9


@pytest.mark.parametrize(
    ("rewards", "options"), [([0.0, 1.0, 3.0], {"alpha": 0.0}), ([2.0, 2.0, 2.0], {}), ([0.0, 0.0, 0.0], {})]
)
def test_without_preference_every_order_is_equally_likely(rewards, options):
    sampler, found = make_pass(rewards, **options), dict.fromkeys(permutations(range(3)), 0)
    for _ in range(3000):
        found[tuple(in_order(one_pass(sampler)))] += 1
    assert p_value(list(found.values()), [1 / 6] * 6) > SIGNIFICANCE


def test_rows_without_priority_end_the_pass_in_a_random_order():
    sampler = make_pass([0.0, 1.0, 0.0], epsilon=0.0)
    orders = [in_order(one_pass(sampler)) for _ in range(1000)]
    assert {order[0] for order in orders} == {1}
    # A fair coin, 1,000 times: 50 are three standard deviations.
    assert abs(sum(order[1] == 0 for order in orders) - 500) < 50


def test_a_batch_of_a_pass_has_no_importance_weights():
    assert make_pass(REWARDS).sample(None, 3)[1] == {}


def test_what_is_written_during_a_pass_belongs_to_the_next():
    sampler = make_pass([1.0, 2.0, 3.0, 4.0], capacity=6)
    seen = draw(sampler, 2).tolist()
    (overwritten, kept) = sorted({0, 1, 2, 3} - set(seen))
    sampler.write(torch.tensor([overwritten, seen[0], 4]), tensor([9.0, 9.0, 9.0]))
    assert not sampler.ran_out
    assert draw(sampler, 10).tolist() == [kept]
    assert sampler.ran_out
    assert sorted(in_order(one_pass(sampler))) == [0, 1, 2, 3, 4]


def test_a_pass_whose_last_rows_are_dropped_is_over():
    sampler = make_pass([1.0, 2.0, 3.0])
    first = draw(sampler, 1)
    assert not sampler.ran_out
    sampler.drop(torch.tensor([slot for slot in range(3) if slot != first]))
    assert sampler.ran_out
    assert one_pass(sampler) == [first.tolist()]


def test_emptying_ends_the_pass():
    sampler = make_pass([1.0, 2.0, 3.0])
    draw(sampler, 1)
    sampler._empty()
    assert sampler.ran_out
    assert sampler.num_live == 0
    sampler.write(torch.tensor([1]), torch.tensor([1.0]))
    assert one_pass(sampler) == [[1]]


# --- state ---


def through_file(sampler, fresh, folder):
    sampler.dumps(folder / "sampler")
    fresh.loads(folder / "sampler")


def through_dict(sampler, fresh, folder):
    state = sampler.state_dict()
    sampler.drop(torch.tensor([0]))  # what happens afterwards is not in it
    fresh.load_state_dict(state)


@pytest.mark.parametrize("restore", [through_file, through_dict])
@pytest.mark.parametrize("kind", [RewardPrioritizedSampler, RewardPrioritizedPass])
def test_a_restored_sampler_draws_as_the_saved_one_would_have(kind, restore, tmp_path):
    def begin():
        sampler = make_sampler(REWARDS, slots=[0, 2, 3, 5, 6], kind=kind, capacity=8)
        sampler.drop(torch.tensor([2]))
        draw(sampler, 3)  # of 4: for a pass, in its middle
        return sampler

    def go_on(sampler):
        seeded(sampler, 7)
        return [draw(sampler, 3).tolist() for _ in range(5)]

    fresh = make_sampler([8.0] * 8, kind=kind)
    draw(fresh, 3)
    restore(begin(), fresh, tmp_path)
    assert go_on(fresh) == go_on(begin())
