"""`expert_iteration.prompt_stream`: which prompts come in which order, and which are passed over for a while."""

from collections import Counter
from itertools import islice

import pytest

from expert_iteration.prompt_stream import PromptStream
from expert_iteration.tasks import Problem

PROBLEMS = [Problem(f"What is {n} + {n}?", f"#### {2 * n}") for n in range(7)]
SOLVED, HALF, HOPELESS = 4, 2, 0
RESPONSES = 4


def draw(seed, count, problems=PROBLEMS):
    return list(islice(PromptStream(problems, seed), count))


def epochs(seed, count):
    """The order of the problems in each of the first epochs."""
    indices = [item["prompt_index"] for item in draw(seed, count * len(PROBLEMS))]
    return [indices[start : start + len(PROBLEMS)] for start in range(0, len(indices), len(PROBLEMS))]


def visits(stream, count, num_right, ahead=1):
    """The indices of the next `count` groups, of which `num_right(index)` responses turn out right.

    So many are drawn before the outcome of the first of them is known.
    """
    items, seen = iter(stream), []
    while len(seen) < count:
        for item in list(islice(items, ahead)):
            stream.finish(item["group_id"], num_right(item["prompt_index"]), RESPONSES)
            seen.append(item["prompt_index"])
    return seen


# --- the order ---


def test_the_order_of_prompts_repeats_for_a_seed():
    stream = PromptStream(PROBLEMS, seed=3)
    assert list(islice(stream, 20)) == list(islice(stream, 20)) == draw(3, 20)


def test_another_seed_and_another_epoch_have_another_order():
    orders = [tuple(epoch) for seed in (0, 1, 2) for epoch in epochs(seed, 3)]
    assert len(set(orders)) == 9


def test_every_problem_comes_once_an_epoch():
    for epoch in epochs(seed=5, count=3):
        assert sorted(epoch) == list(range(len(PROBLEMS)))


def test_without_shuffling_the_order_is_that_of_the_data():
    items = islice(PromptStream(PROBLEMS, seed=5, shuffle=False), 2 * len(PROBLEMS))
    assert [item["prompt_index"] for item in items] == 2 * list(range(len(PROBLEMS)))


def test_the_group_id_counts_the_draws():
    items = draw(0, 3 * len(PROBLEMS))
    assert [item["group_id"] for item in items] == list(range(len(items)))
    assert all(item["query"] == PROBLEMS[item["prompt_index"]].question for item in items)


# --- what is passed over ---


def skipping(**options):
    return PromptStream(PROBLEMS, seed=0, **{"shuffle": False, "skip_solved": 2, **options})


def test_a_solved_prompt_is_left_out_for_so_many_turns_and_comes_back():
    stream = skipping()
    seen = visits(stream, 26, lambda index: SOLVED if index == 3 else HALF)
    without = [0, 1, 2, 4, 5, 6]
    assert seen == [0, 1, 2, 3, 4, 5, 6, *without, *without, *range(7)]
    assert stream.num_skipped == 2


def test_a_prompt_that_some_response_solved_is_not_left_out():
    stream = skipping()
    assert visits(stream, 21, lambda index: HALF) == 3 * list(range(7))
    assert stream.num_skipped == 0


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_hopeless_prompt_is_left_out_after_so_many_visits(after):
    stream = skipping(skip_solved=1, skip_hopeless_after=after)
    seen = visits(stream, 7 * (after + 1), lambda index: HOPELESS if index == 3 else HALF)
    assert Counter(seen)[3] == after
    assert seen[: 7 * after] == after * list(range(7))
    assert 3 not in seen[7 * after : 7 * after + 6]


def test_hopeless_visits_count_in_a_row():
    stream = skipping(skip_hopeless_after=2)
    outcomes = iter([HOPELESS, HALF, HOPELESS, HALF])
    seen = visits(stream, 28, lambda index: next(outcomes) if index == 3 else HALF)
    assert seen == 4 * list(range(7))


def test_hopeless_prompts_stay_unless_asked_for():
    assert visits(skipping(), 21, lambda index: HOPELESS) == 3 * list(range(7))


def test_nothing_is_left_out_unless_asked_for():
    assert visits(PromptStream(PROBLEMS, 0, shuffle=False), 21, lambda index: SOLVED) == 3 * list(range(7))


def test_where_all_prompts_are_solved_they_come_back_and_the_stream_goes_on():
    stream = skipping(skip_solved=3)
    assert visits(stream, 21, lambda index: SOLVED) == 3 * list(range(7))
    assert stream.num_skipped == 2 * 3 * 7


@pytest.mark.parametrize("skip_solved", [10**6, 10**10])
def test_however_long_solved_prompts_are_left_out_the_next_comes_at_once(skip_solved):
    stream = skipping(skip_solved=skip_solved)
    assert visits(stream, 14, lambda index: SOLVED) == 2 * list(range(7))
    assert stream.num_skipped == 7 * min(skip_solved, 2**31 - 1)


# --- going on ---


@pytest.mark.parametrize("ahead", [1, 2, 5, 9])
def test_a_stream_goes_on_from_its_state_as_if_nothing_had_happened(ahead):
    outcome = {index: (SOLVED, HALF, HOPELESS)[index % 3] for index in range(len(PROBLEMS))}
    options = {"shuffle": True, "skip_solved": 1, "skip_hopeless_after": 2}
    stream, items = skipping(**options), []
    drawn, waiting, states = iter(stream), [], []
    for _ in range(20):
        waiting += islice(drawn, ahead)
        # What is saved is between two groups, others being drawn already.
        for _ in range(ahead):
            item = waiting.pop(0)
            stream.finish(item["group_id"], outcome[item["prompt_index"]], RESPONSES)
            items.append(item)
        waiting += islice(drawn, ahead)
        states.append((len(items), stream.state_dict()))
    for count, state in states[:-1]:
        resumed = skipping(**options, state=state)
        assert [item["group_id"] for item in islice(resumed, ahead)] == list(range(count, count + ahead))
        assert list(islice(resumed, ahead)) == items[count : count + ahead]
    assert stream.num_skipped > 0


def test_what_a_stream_remembers_is_a_small_number_a_prompt():
    stream = PromptStream([Problem(str(n), "") for n in range(1000)], 0, skip_solved=1)
    visits(stream, 5000, lambda index: SOLVED if index % 2 else HALF, ahead=50)
    state = stream.state_dict()
    assert state["marks"].numel() == 1000
    assert state["open"] == {}
