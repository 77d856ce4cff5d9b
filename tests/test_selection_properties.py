"""What holds of selection whatever the groups: how many are kept, who is never dropped, and what is remembered."""

import math
import pickle
from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, lazy_stack

from expert_iteration.config import Selection, Ties
from expert_iteration.selection import TopKRewardSelector
from expert_iteration.selection_rules import normalize

COMMON = settings(derandomize=True, deadline=None, max_examples=60)
PARAMETERS = {"threshold": 0.5, "percentile": 30.0, "percentile_end": 80.0, "num_groups": 6}
RULES = st.fixed_dictionaries(
    {
        "selection": st.sampled_from([name.value for name in Selection]),
        "ties": st.sampled_from([name.value for name in Ties]),
        "dedup": st.booleans(),
        "min_reward": st.sampled_from([None, -1.0, 0.1, 1.0]),
        "seed": st.integers(0, 3),
    }
)
# Few different rewards, texts and lengths, so that ties and duplicates are the rule.
REWARDS = st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.0, -2.0, math.nan, math.inf, -math.inf])
TEXTS = st.sampled_from(["a", "A ", "b", "bb", "\N{FULLWIDTH LATIN CAPITAL LETTER B}", "", "c  d", "c d"])
RESPONSES = st.tuples(REWARDS, TEXTS, st.lists(st.integers(0, 2), max_size=3))


@st.composite
def batches(draw, max_groups=3):
    """Groups of one size, and how many are kept of each at most."""
    size = draw(st.integers(2, 6))
    groups = st.lists(st.lists(RESPONSES, min_size=size, max_size=size), min_size=1, max_size=max_groups)
    return draw(groups), draw(st.integers(1, size))


def make_rows(groups):
    """A row for each response, which knows what it is made of."""
    return [
        TensorDict(
            {
                "group_id": torch.tensor(number),
                "place": torch.tensor(place),
                "text": text,
                "tokens": torch.tensor(ids, dtype=torch.int64),
                ("next", "reward"): torch.tensor([reward]),
                ("next", "correct"): torch.tensor([reward == 1.0]),
                ("next", "done"): torch.tensor([True]),
            }
        )
        for number, group in enumerate(groups)
        for place, (reward, text, ids) in enumerate(group)
    ]


def make_selector(groups, most, rule):
    keys = {"text_key": "text", "tokens_key": "tokens", "correct_key": ("next", "correct")}
    return TopKRewardSelector(len(groups[0]), most, **keys, **PARAMETERS | rule)


def select(selector, rows):
    """The kept rows by group."""
    kept = selector.select(lazy_stack(rows))
    by_group = {}
    for row in [] if kept is None else kept.unbind(0):
        by_group.setdefault(int(row["group_id"]), []).append(row)
    return by_group


def contents(rows):
    """What was kept, whatever it is called."""
    return Counter((row["text"], tuple(row["tokens"].tolist()), row["next", "reward"].item()) for row in rows)


@COMMON
@given(batches(), RULES)
def test_never_too_many_of_a_group_and_only_those_that_may(batch, rule):
    groups, most = batch
    selector = make_selector(groups, most, rule)
    kept = select(selector, make_rows(groups))
    for rows in kept.values():
        assert len(rows) <= most
        assert len({int(row["place"]) for row in rows}) == len(rows)
        rewards = [row["next", "reward"].item() for row in rows]
        assert all(map(math.isfinite, rewards))
        if rule["selection"] != "random":
            assert rewards == sorted(rewards, reverse=True)
            assert rule["min_reward"] is None or min(rewards) >= torch.tensor(rule["min_reward"]).item()
        if rule["dedup"]:
            assert len({normalize(row["text"]) for row in rows}) == len(rows)
    assert selector.queues == {}
    stats = selector.stats()
    assert stats["groups_seen"] == len(groups)
    assert stats["groups_kept"] == len(kept)
    assert stats["responses_kept"] == sum(map(len, kept.values()))
    assert sum(count for name, count in stats.items() if "by_pass_rate/" in name) == len(groups)


@COMMON
@given(batches(), RULES)
def test_topk_never_drops_a_response_that_is_better_than_a_kept_one(batch, rule):
    groups, most = batch
    rule = rule | {"selection": "topk"}
    kept = select(make_selector(groups, most, rule), make_rows(groups))
    for number, group in enumerate(groups):
        rows = kept.get(number, [])
        chosen = {int(row["place"]) for row in rows}
        texts = {normalize(row["text"]) for row in rows}
        dropped = [
            torch.tensor(reward).item()
            for place, (reward, text, _) in enumerate(group)
            if place not in chosen and math.isfinite(reward) and not (rule["dedup"] and normalize(text) in texts)
        ]
        if rows:
            assert max(dropped, default=-math.inf) <= min(row["next", "reward"].item() for row in rows)
        # A copy is never better than the one that is kept of it.
        for row in rows if rule["dedup"] else ():
            copies = [reward for reward, text, _ in group if normalize(text) == normalize(row["text"])]
            finite = [torch.tensor(reward).item() for reward in copies if math.isfinite(reward)]
            assert row["next", "reward"].item() == max(finite)


@COMMON
@given(batches(), RULES, st.randoms(use_true_random=False))
def test_what_is_kept_does_not_depend_on_the_order_in_which_rows_come(batch, rule, chance):
    groups, most = batch
    if rule["ties"] == "first":
        rule = rule | {"ties": "shortest"}
    if rule["selection"] == "random":
        rule = rule | {"selection": "topk"}
    rows = make_rows(groups)
    expected = select(make_selector(groups, most, rule), rows)
    chance.shuffle(rows)
    found = select(make_selector(groups, most, rule), rows)
    assert {number: contents(kept) for number, kept in found.items()} == {
        number: contents(kept) for number, kept in expected.items()
    }


@COMMON
@given(batches(), RULES, st.data())
def test_what_is_kept_does_not_depend_on_the_parts_in_which_rows_come(batch, rule, data):
    groups, most = batch
    if rule["selection"] == "percentile":
        rule = rule | {"selection": "threshold"}  # the one rule that looks at what comes together
    rows = make_rows(groups)
    expected = select(make_selector(groups, most, rule), rows)
    selector = make_selector(groups, most, rule)
    cut = data.draw(st.integers(1, len(rows)))
    found = select(selector, rows[:cut])
    if cut < len(rows):
        assert len(selector.queues) == (cut % len(groups[0]) != 0)
        found |= select(selector, rows[cut:])
    assert {number: contents(kept) for number, kept in found.items()} == {
        number: contents(kept) for number, kept in expected.items()
    }


@COMMON
@given(batches(), RULES, st.sampled_from([0.1, 0.5, 1.0]))
def test_groups_of_equal_rewards_are_kept_by_their_height_or_not_at_all(batch, rule, reward):
    groups, most = batch
    equal = [[(reward, text, ids) for _, text, ids in group] for group in groups]
    selector = make_selector(equal, most, rule)
    kept = select(selector, make_rows(equal))
    least = max(0.5, rule["min_reward"] or 0.5)
    assert bool(kept) == (rule["selection"] == "threshold" and reward >= least)
    assert selector.stats()["groups_all_equal"] == len(groups)


@COMMON
@given(batches(), RULES)
def test_the_control_keeps_as_many_as_the_rule_it_is_for(batch, rule):
    groups, most = batch
    numbers = [
        {group: len(rows) for group, rows in select(make_selector(groups, most, rule | own), make_rows(groups)).items()}
        for own in ({"selection": "random"}, {"selection": "above_median"})
    ]
    assert numbers[0] == numbers[1]


@COMMON
@given(batches(), RULES)
def test_a_group_that_comes_again_is_judged_by_itself(batch, rule):
    groups, most = batch
    if rule["selection"] in ("random", "percentile"):
        rule = rule | {"selection": "topk"}  # the others draw again, or have another percentile by then
    selector = make_selector(groups, most, rule)
    first, again = (select(selector, make_rows(groups)) for _ in range(2))
    assert {n: contents(rows) for n, rows in again.items()} == {n: contents(rows) for n, rows in first.items()}


@COMMON
@given(st.text(max_size=20))
def test_the_same_text_is_known_in_another_case_and_with_other_white_space(text):
    assert normalize(text) == normalize(f"\n {text}\t")
    assert normalize(text.upper()) == normalize(text.upper().lower())
    assert normalize(text) == " ".join(normalize(text).split())


def test_memory_is_bounded_over_a_hundred_thousand_prompts():
    batch, num_batches = 1000, 100
    groups = [[(1.0 * (number % 3 == 0), "a", [1]), (0.5 * (number % 2), "b", [2])] for number in range(batch)]
    rows = make_rows(groups)
    ids = torch.arange(batch)
    for number, row in enumerate(rows):
        row["group_id"] = ids[number // 2]  # a view: the same rows come again as other groups, for making them is slow
    stacked = lazy_stack(rows)
    selector = TopKRewardSelector(2, 1, selection="topk")
    sizes = []
    for _ in range(num_batches):
        assert len(selector.select(stacked)) > 0
        ids += batch
        sizes.append(len(pickle.dumps(selector)))
    assert selector.queues == {}
    assert selector.stats()["groups_seen"] == 100_000
    # Counts take a few bytes more as they grow; a byte for each prompt would be 98,000.
    assert sizes[-1] - sizes[1] < 100
