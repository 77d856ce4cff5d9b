"""`expert_iteration.selection`: which responses of a group are kept, and what is remembered of groups."""

import pickle
import re
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torchrl.data import LazyStackStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.data.llm.topk import TopKRewardSelector as TorchRLTopKRewardSelector

from expert_iteration.config import Selection
from expert_iteration.errors import UserError
from expert_iteration.selection import TopKRewardSelector

NAN, INF = float("nan"), float("inf")


def make_row(group: int, reward: float, name: int = 0) -> TensorDict:
    return TensorDict(
        {
            "group_id": torch.tensor(group),
            "name": torch.tensor(name),
            ("tokens", "full"): torch.arange(3 + name % 5),
            ("next", "reward"): torch.tensor([reward]),
            ("next", "done"): torch.tensor([True]),
            ("text", "prompt"): f"Prompt {group}",
        }
    )


def make_group(rewards, group: int = 0) -> TensorDict:
    return lazy_stack([make_row(group, float(reward), name) for name, reward in enumerate(rewards)])


def make_selector(total: int, topk: int, **options) -> TopKRewardSelector:
    return TopKRewardSelector(total_dialog_turns=total, topk_size=topk, **options)


def names(kept) -> list[int]:
    """Which rows of a group came back, in order."""
    return [] if kept is None else [int(row["name"]) for row in kept.unbind(0)]


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [
        ([0, 1, 2, 3, 4], [4, 3]),  # strictly above 2
        ([0, 0, 1, 1], [2, 3]),  # the lower median is 0
        ([1, 1, 1, 0, 0, 0, 0, 0], [0, 1, 2]),  # 3 of 8 right: all three
        ([1, 1, 1, 1, 0, 0, 0, 0], [0, 1, 2]),  # 4 of 8: the lower median is still 0
        ([1, 1, 1, 1, 1, 0, 0, 0], []),  # 5 of 8: the lower median is 1
        ([0.5, 2, 1, 2, 0.1, 2, 0, 0], [1, 3, 5]),  # first come first among equals
        ([0, 5, 0, 7, 0, 6, 0, 8], [7, 3, 5]),  # highest first, at most three
        ([2, 2, 2], []),
        ([3], []),
        ([-1, -2], [0]),
    ],
)
def test_what_is_kept_of_a_group(rewards, kept):
    assert names(make_selector(len(rewards), min(3, len(rewards))).select(make_group(rewards))) == kept


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [
        ([NAN, 1, 0, 0], [1]),
        ([INF, 1, 0, 0], [1]),
        ([-INF, 1, 0, NAN], [1]),
        ([NAN, 1, 1, 1], []),
        ([NAN, NAN, NAN, NAN], []),
    ],
)
def test_a_non_finite_reward_drops_its_response_only(rewards, kept):
    selector = make_selector(4, 2)
    assert names(selector.select(make_group(rewards))) == kept
    assert selector.stats()["nonfinite_rewards"] == sum(abs(r) == INF or r != r for r in rewards)
    assert selector.stats()["groups_all_equal"] == (rewards == [NAN, 1, 1, 1] or rewards[1:] == [1, 1, 1])


def test_rows_of_a_group_may_come_in_any_mixture_and_in_parts():
    selector = make_selector(4, 2)
    first, second = make_group([0, 1, 0, 2], group=7).unbind(0), make_group([3, 0, 0, 0], group=8).unbind(0)
    assert selector.select(lazy_stack([first[0], second[0], first[1]])) is None
    assert selector.select(lazy_stack([second[1], first[2]])) is None
    assert selector.stats()["groups_in_flight"] == 2
    kept = selector.select(lazy_stack([second[2], first[3], second[3]]))
    assert [int(row["group_id"]) for row in kept.unbind(0)] == [7, 7, 8]
    assert kept.get(("next", "reward")).flatten().tolist() == [2.0, 1.0, 3.0]


def test_kept_rows_are_whole_and_ragged():
    kept = make_selector(4, 2).select(make_group([0, 1, 0, 2]))
    assert kept.batch_size == (2,)
    assert [ids.tolist() for ids in kept.get(("tokens", "full"), as_list=True)] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3]]
    assert kept.get(("text", "prompt")).tolist() == ["Prompt 0"] * 2


def test_a_prompt_seen_again_is_selected_afresh():
    for options, groups in (({}, (0, 1)), ({"group_key": ("text", "prompt")}, (0, 0))):
        selector = make_selector(4, 2, **options)
        assert names(selector.select(make_group([9, 8, 0, 0], groups[0]))) == [0, 1]
        again = selector.select(make_group([0, 0, 1, 0], groups[1]))
        assert names(again) == [2]
        assert again.get(("next", "reward")).max() == 1


def test_a_group_is_forgotten_once_judged():
    selector = make_selector(4, 2)
    for group in range(50):
        selector.select(make_group([0, 1, 0, NAN] if group % 2 else [1, 1, 1, 1], group))
        assert selector.queues == {}
    selector.select(make_group([1, 2, 3], group=99))
    assert {key: len(queue) for key, queue in selector.queues.items()} == {99: 3}


def test_stats_count_groups_and_responses():
    selector = make_selector(4, 2)
    assert set(selector.stats().values()) == {0}
    for group, rewards in enumerate([[0, 1, 0, 2], [1, 1, 1, 1], [1, 1, 1, 0], [NAN, 0, 1, 0]]):
        selector.select(make_group(rewards, group))
    assert selector.stats() == {
        "groups_seen": 4,
        "groups_kept": 2,
        "groups_all_equal": 1,
        "responses_seen": 16,
        "responses_kept": 3,
        "nonfinite_rewards": 1,
        "groups_in_flight": 0,
        "acceptance_rate": 3 / 16,
        "all_equal_rate": 1 / 4,
    }


# --- the other rules ---

FIVE_OF_EIGHT = [1, 0, 1, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("rule", "rewards", "kept"),
    [
        ({"selection": "above_median"}, FIVE_OF_EIGHT, []),
        ({"selection": "topk"}, FIVE_OF_EIGHT, [0, 2, 3]),
        ({"selection": "threshold", "threshold": 1.0}, FIVE_OF_EIGHT, [0, 2, 3]),
        ({"selection": "percentile", "percentile": 50}, FIVE_OF_EIGHT, [0, 2, 3]),
        ({"selection": "percentile", "percentile": 90}, [0, 0, 0, 0, 0, 0, 0, 1], [7]),
        ({"selection": "percentile", "percentile": 0}, [0, 0, 0, 0, 0, 0, 0, 1], [7]),  # the least is never kept
        ({"selection": "percentile", "percentile": 50}, [1, 1, 1], []),
        ({"selection": "percentile", "percentile": 50}, [NAN, NAN], []),
        ({"selection": "topk"}, [0, 0, 0, 1], [3, 0, 1]),  # wrong ones too, unless min_reward says otherwise
        ({"selection": "topk", "min_reward": 1.0}, [0, 0, 0, 1], [3]),
        ({"selection": "topk"}, [1, 1, 1], []),
        ({"selection": "topk"}, [NAN, 1, 1], []),
        ({"selection": "topk"}, [NAN, 1, 2], [2, 1]),
        ({"selection": "threshold", "threshold": 1.0}, [1, 1, 1], [0, 1, 2]),
        ({"selection": "threshold", "threshold": 0.5}, [0.4, 0.5, INF, 0.6], [3, 1]),
        ({"selection": "threshold", "threshold": 0.5, "min_reward": 0.6}, [0.4, 0.5, 0.6], [2]),
        ({"selection": "threshold", "threshold": 0.5}, [0.4, 0.3], []),
        ({"selection": "threshold", "threshold": 0.7}, [0.7, 0.1], [0]),  # as float32 it is less
        ({"selection": "topk", "min_reward": 0.7}, [0.7, 0.1], [0]),
        ({"selection": "above_median", "min_reward": 2.0}, [0, 1, 2, 3, 0], [3, 2]),
    ],
)
def test_what_each_rule_keeps_of_a_group(rule, rewards, kept):
    selector = make_selector(len(rewards), min(3, len(rewards)), **rule)
    assert names(selector.select(make_group(rewards))) == kept
    assert selector.stats()["responses_kept"] == len(kept)


README = Path(__file__).parent.parent / "README.md"
ROW = re.compile(r"\| `(\w+)`(?:, `min_reward=(\d)`)? \| [^|]+ \| ([^|]+) \| ([^|]+) \| ([^|]+) \| [^|]+ \|")


def test_the_readme_works_the_binary_reward_through_as_it_is():
    table = README.read_text().partition("| `train.selection` |")[2].partition("\n\n")[0]
    rows = ROW.findall(table)
    assert {rule for rule, *_ in rows} == {str(rule) for rule in Selection}
    for rule, least, *expected in rows:
        options = {"min_reward": float(least) if least else None, "threshold": 1.0, "percentile": 50}
        selector = make_selector(8, 4, selection=rule, **options)
        batch = [
            row
            for group, right in enumerate((3, 5, 8, 0))
            for row in make_group([1] * right + [0] * (8 - right), group)
        ]
        kept = selector.select(lazy_stack(batch))
        found = [[] for _ in range(4)]
        for row in kept.unbind(0):
            found[int(row["group_id"])].append(row["next", "reward"].item())
        assert [describe(rewards, rule) for rewards in found] == [*expected, "nothing"], rule


def describe(rewards, rule):
    if rule == "random" and rewards:
        return f"{len(rewards)} at random"
    counts = ((rewards.count(1.0), "right"), (rewards.count(0.0), "wrong"))
    return ", ".join(f"{count} {word}" for count, word in counts if count) or "nothing"


def test_a_percentile_is_of_the_batch_and_follows_the_run():
    selector = make_selector(4, 4, selection="percentile", percentile=0, percentile_end=80, num_groups=6)
    seen = []
    for first in (0, 2, 4):
        batch = lazy_stack([*make_group([0, 1, 2, 3], first), *make_group([4, 5, 6, 7], first + 1)])
        kept = selector.select(batch).get(("next", "reward")).flatten().tolist()
        seen.append((selector.stats()["batch_percentile"], kept))
    assert seen == [
        (0, [3, 2, 1, 7, 6, 5, 4]),  # above the least
        (40, [3, 7, 6, 5, 4]),  # 2.8 or more
        (80, [7, 6]),  # 5.6 or more
    ]


def test_a_run_of_one_batch_stays_at_the_percentile_it_begins_with():
    selector = make_selector(4, 4, selection="percentile", percentile=50, percentile_end=80, num_groups=1)
    assert names(selector.select(make_group([0, 1, 2, 3]))) == [3, 2]
    assert selector.stats()["batch_percentile"] == 50


def test_a_batch_in_which_all_are_right_but_one_keeps_groups_of_equal_rewards():
    selector = make_selector(2, 1, selection="percentile", percentile=50)
    kept = selector.select(lazy_stack([*make_group([1, 1], 0), *make_group([0, 1], 1), *make_group([0, 0], 2)]))
    assert [int(row["group_id"]) for row in kept.unbind(0)] == [0, 1]


# --- ties, duplicates, right and wrong ---

LOOKING = {"text_key": "text", "tokens_key": "tokens", "correct_key": "correct"}


def make_responses(*responses, group=0) -> TensorDict:
    """Rows of a group from (reward, text) or (reward, text, number of tokens); right is who has a reward of 1."""
    rows = []
    for name, (reward, text, *length) in enumerate(responses):
        row = make_row(group, float(reward), name).exclude(("text", "prompt"), ("tokens", "full"))
        tokens = torch.tensor([ord(character) for character in text])[: length[0] if length else None]
        row.update({"text": text, "tokens": tokens, "correct": torch.tensor([reward == 1])})
        rows.append(row)
    return lazy_stack(rows)


@pytest.mark.parametrize(("ties", "kept"), [("first", [2, 0]), ("shortest", [2, 3])])
def test_of_equal_rewards_the_first_or_the_shortest_is_kept(ties, kept):
    rows = make_responses((1, "four"), (0, ""), (2, "longest"), (1, "two"), (1, "three"))
    assert names(make_selector(5, 2, selection="topk", ties=ties, **LOOKING).select(rows)) == kept


def test_ties_at_random_are_drawn_evenly_by_seed_and_group():
    def draws(seed, groups=400):
        selector = make_selector(4, 1, selection="threshold", threshold=1, ties="random", seed=seed, **LOOKING)
        texts = ("a", "bb", "bb", "ccc")  # copies have chances of their own
        return [
            int(selector.select(make_responses(*((1, text) for text in texts), group=group))["name"])
            for group in range(groups)
        ]

    drawn = Counter(draws(0))
    # A hundred each, standard deviation 8.7: five of them are 44.
    assert all(abs(drawn[name] - 100) < 44 for name in range(4))
    assert draws(0, 20) == draws(0, 20)
    assert draws(0, 20) != draws(1, 20)


def test_of_responses_that_are_the_same_text_the_best_stays_in_the_running():
    rows = make_responses(
        (0, "It is 4"), (1, " it is\n4 "), (0, "no"), (1, "IT IS \N{FULLWIDTH DIGIT FOUR}"), (NAN, "five"), (0.5, "six")
    )
    assert names(make_selector(6, 4, selection="topk", **LOOKING).select(rows)) == [1, 3, 5, 0]
    selector = make_selector(6, 4, selection="topk", dedup=True, **LOOKING)
    assert names(selector.select(rows)) == [1, 5, 2]
    stats = selector.stats()
    assert (stats["duplicates_dropped"], stats["batch_distinct_responses"], stats["nonfinite_rewards"]) == (2, 4, 1)


def test_medians_are_of_what_remains_without_duplicates():
    rows = make_responses((1, "a"), (1, "a"), (1, "A"), (0, "b"), (0.5, "c"))
    assert names(make_selector(5, 2, **LOOKING).select(rows)) == []  # the median is 1
    assert names(make_selector(5, 2, dedup=True, **LOOKING).select(rows)) == [0]  # of 1, 0 and 0.5


def test_a_group_of_one_text_is_all_equal_without_its_duplicates():
    selector = make_selector(3, 2, selection="topk", dedup=True, **LOOKING)
    assert selector.select(make_responses((1, "a"), (1, "a"), (1, "a"))) is None
    assert selector.stats()["groups_all_equal"] == 1


def test_groups_are_counted_by_how_many_of_their_responses_are_right():
    selector = make_selector(8, 2, selection="topk", **LOOKING)
    expected = {0: "000", 1: "001_025", 2: "001_025", 3: "026_050", 4: "026_050", 5: "051_075", 6: "051_075"}
    expected |= {7: "076_099", 8: "100"}
    rows = [
        row
        for group, right in enumerate(expected)
        for row in make_responses(*[(1, "x")] * right, *[(0, "y")] * (8 - right), group=group)
    ]
    selector.select(lazy_stack(rows))
    stats = selector.stats()
    found = {name: count for name, count in stats.items() if "by_pass_rate/" in name}
    assert found == {f"groups_by_pass_rate/{name}": count for name, count in Counter(expected.values()).items()}
    assert list(found) == sorted(found)
    assert (stats["groups_all_right"], stats["groups_all_wrong"], stats["groups_seen"]) == (1, 1, 9)
    assert stats["batch_pass_rate"] == 0.5


# --- the random control ---


def test_the_random_control_keeps_as_many_drawn_uniformly():
    selector = make_selector(8, 2, selection="random", seed=3)
    rewards, trials = [5, 4, 3, 2, 1, 0, 0, NAN], 3000
    drawn = Counter()
    group = make_group(rewards)
    for _ in range(trials):
        kept = names(selector.select(group))
        assert len(set(kept)) == 2
        drawn.update(kept)
    assert 7 not in drawn
    # Each of 7 rows is drawn with probability 2/7: 857 times, standard deviation 25. Five of them are 124.
    assert all(abs(drawn[name] - trials * 2 / 7) < 124 for name in range(7))
    assert selector.stats()["acceptance_rate"] == 2 / 8


@pytest.mark.parametrize("rewards", [[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 0, 0], [0, 1, 2, 3]])
def test_the_random_control_keeps_nothing_where_selection_would_not(rewards):
    expected = names(make_selector(4, 4).select(make_group(rewards)))
    found = names(make_selector(4, 4, selection="random").select(make_group(rewards)))
    assert len(found) == len(expected)


def test_a_least_reward_lowers_how_many_the_control_draws_and_not_which():
    rewards = [0, 0, 0, 0, 1, 2, 3, 4]
    selector = make_selector(8, 4, selection="random", min_reward=3.0)
    drawn = Counter()
    for _ in range(60):
        kept = names(selector.select(make_group(rewards)))
        assert len(kept) == 2
        drawn.update(kept)
    assert set(drawn) == set(range(8))


def test_the_random_control_repeats_with_its_seed():
    def draws(seed):
        selector = make_selector(8, 2, selection="random", seed=seed)
        return [names(selector.select(make_group(range(8)))) for _ in range(10)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


# --- state ---


@pytest.mark.parametrize("copy", [lambda selector: pickle.loads(pickle.dumps(selector)), None], ids=["pickle", "state"])
def test_a_restored_selector_continues(copy):
    selector = make_selector(8, 2, selection="random", seed=1)
    for group in range(5):
        selector.select(make_group(range(8), group))
    whole = make_group(range(8), group=100)
    selector.select(whole[:5])
    if copy is not None:
        restored = copy(selector)
    else:
        restored = make_selector(8, 2, selection="random", seed=999)
        restored.load_state_dict(pickle.loads(pickle.dumps(selector.state_dict())))
    expected = [names(selector.select(whole[5:])), names(selector.select(make_group(range(8), 101)))]
    assert [names(restored.select(whole[5:])), names(restored.select(make_group(range(8), 101)))] == expected
    assert restored.stats() == selector.stats()
    assert restored.stats()["groups_seen"] == 7


def test_a_percentile_goes_on_where_it_stood():
    def make():
        options = {"selection": "percentile", "percentile": 0, "percentile_end": 90, "num_groups": 10}
        return make_selector(4, 2, **options, **LOOKING)

    selector, restored = make(), make()
    responses = [(0, "a"), (1, "b"), (0.5, "c"), (0.7, "d")]
    for group in range(4):
        selector.select(make_responses(*responses, group=group))
    restored.load_state_dict(pickle.loads(pickle.dumps(selector.state_dict())))
    assert restored.stats() == selector.stats()
    for one in (selector, restored):
        one.select(make_responses(*responses, group=4))
    assert restored.stats() == selector.stats()
    assert restored.stats()["batch_percentile"] == 40


def test_a_saved_state_does_not_follow_the_selector():
    selector = make_selector(4, 2)
    rows = make_group([0, 1, 2, 3])
    selector.select(rows[:2])
    state = selector.state_dict()
    selector.select(rows[2:])
    fresh = make_selector(4, 2)
    fresh.load_state_dict(state)
    assert names(fresh.select(rows[2:])) == [3, 2]


# --- as TorchRL uses it ---


def documented_rows() -> TensorDict:
    """The 50 items of TorchRL's docstring: reward i at each of i + 5 tokens, a prompt for each five."""
    rows = [
        TensorDict(
            {
                ("next", "done"): torch.full((1, 1), True),
                ("next", "reward"): torch.full((i + 5, 1), float(i)),
                "text": f"Prompt {i // 5}",
            }
        )
        for i in range(50)
    ]
    return lazy_stack(rows)


@pytest.mark.parametrize("name", ["group_key", "prompt_key"])
def test_the_scenario_that_torchrl_documents(name):
    buffer = ReplayBuffer(storage=LazyStackStorage(50), sampler=SamplerWithoutReplacement(), batch_size=5)
    buffer.append_transform(make_selector(5, 3, **{name: "text"}))
    for chunk in documented_rows().chunk(25):
        buffer.extend(chunk)
    # Two of each five are strictly above the median, so top 3 writes 10 groups x 2 (the docstring's 30 would need >=).
    assert buffer.write_count == len(buffer) == 20
    rewards = buffer[:4].get(("next", "reward"), as_padded_tensor=True).squeeze(-1)
    assert [row.max().item() for row in rewards] == [4.0, 3.0, 9.0, 8.0]
    assert (rewards[1] == torch.tensor([3.0] * 8 + [0.0] * 6)).all()
    assert len(buffer.sample()) == 5


@pytest.mark.parametrize("shape", [(8,), (8, 1), (1, 8), (2, 4)])
@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("group_key", ["group_id", ("text", "prompt")])
def test_rows_of_any_batch_shape(shape, lazy, group_key):
    if lazy:
        parts = make_group([0, 5, 0, 7, 0, 6, 0, 8])
        rows = (
            lazy_stack([lazy_stack(list(parts[start : start + shape[1]])) for start in range(0, 8, shape[1])])
            if (len(shape) == 2)
            else parts
        )
    else:
        same_length = [make_row(0, reward) for reward in (0.0, 5.0, 0.0, 7.0, 0.0, 6.0, 0.0, 8.0)]
        rows = torch.stack(same_length).reshape(shape)
    assert rows.shape == shape
    kept = make_selector(8, 3, group_key=group_key)._inv_call(rows)
    assert kept.batch_size == (3,)
    assert kept.get(("next", "reward")).flatten().tolist() == [8.0, 7.0, 6.0]


def test_rows_stacked_along_time_as_a_collector_does():
    kept = make_selector(4, 2).select(lazy_stack([make_group([0, 1, 0, 2])], dim=1))
    assert kept.batch_size == (2,)
    assert names(kept) == [3, 1]


def test_sampling_changes_nothing():
    rows = make_group([0, 1])
    assert make_selector(2, 1)(rows) is rows


def test_an_unfinished_dialog_is_an_error():
    rows = make_group([0, 1, 2, 3])
    rows.tensordicts[2]["next", "done"] = torch.tensor([False])
    with pytest.raises(RuntimeError, match="finished dialog"):
        make_selector(4, 2).select(rows)


@pytest.mark.parametrize("key", ["group_id", ("next", "reward"), ("next", "done")])
def test_a_row_that_lacks_an_entry_is_an_error_that_names_it(key):
    rows = lazy_stack([make_row(0, 1.0).exclude(key) for _ in range(4)])
    with pytest.raises(KeyError, match=key if isinstance(key, str) else key[-1]):
        make_selector(4, 2).select(rows)


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="topk_size"):
        make_selector(2, 3)
    with pytest.raises(UserError, match="above_median, topk, threshold, percentile, random"):
        make_selector(4, 2, selection="best")
    with pytest.raises(UserError, match="first, shortest, random"):
        make_selector(4, 2, ties="longest", tokens_key="tokens")
    for options in (
        {"selection": "threshold"},
        {"selection": "percentile"},
        {"selection": "percentile", "percentile": 50, "percentile_end": 90},
        {"dedup": True},
        {"ties": "shortest"},
    ):
        with pytest.raises(UserError, match="needs"):
            make_selector(4, 2, **options)
    with pytest.raises(UserError, match="one setting"):
        make_selector(4, 2, prompt_key="text", group_key="group_id")


def test_selection_is_fast_enough_to_be_forgotten():
    """A batch of 256 in 32 groups: 4 ms on one core, where TorchRL's class takes 200 ms for the same rows.

    Asserted is a fifth of TorchRL's time, measured at once, for clocks differ and the machine may be busy.
    """
    rows = [make_row(index // 8, index, index) for index in range(256)]
    for row in rows:
        # The shapes that TorchRL's class asks for: a reward for each token.
        row["next", "done"] = torch.ones(1, 1, dtype=torch.bool)
        row["next", "reward"] = row["next", "reward"].expand(2, 1)
    rows = lazy_stack(rows)

    def seconds(selector, repeats):
        took = []
        for _ in range(repeats):
            start = time.perf_counter()
            assert len(selector._inv_call(rows)) == 64
            took.append(time.perf_counter() - start)
        return min(took)

    ours = seconds(make_selector(8, 2, group_key=("text", "prompt")), repeats=5)
    assert ours < seconds(TorchRLTopKRewardSelector(8, 2, verbose=False), repeats=1) / 5
