"""`expert_iteration.collector`: from prompts to rows in the buffer, with TorchRL's real parts around a fake engine."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tensordict import is_leaf_nontensor
from torchrl.data import LazyStackStorage

from expert_iteration.chat_template import chat_prompt_ids
from expert_iteration.collector import ExpertCollector
from expert_iteration.engine import Completion, Sampling
from expert_iteration.environment import make_task_env
from expert_iteration.judging import Judge
from expert_iteration.policy import EnginePolicy
from expert_iteration.prompt_stream import PromptStream
from expert_iteration.reference import RetrieveLogProb
from expert_iteration.replay_buffer import ExpertReplayBuffer
from expert_iteration.row_keys import STORED_KEYS
from expert_iteration.sampler import RewardPrioritizedPass
from expert_iteration.selection import TopKRewardSelector
from expert_iteration.tasks import Problem, Task

SYSTEM_PROMPT = "Answer with a digit."
PROBLEMS = [Problem(question, "") for question in ("2+2?", "How many apples has Amy?", "7-4?", "Is 9 a square?")]
END = "<|im_end|>"
REPEATS, TOPK, TURNS = 4, 2, 16
# The four responses of each group, in the order they are asked for. The lower median of the rewards is 1.
TEXTS = ["3", "1", "20", "0"]
KEPT_TEXTS = {"3", "20"}


def reward_is_the_number(problems, texts):
    return [float(text) for text in texts]


class FakeEngine:
    """Answers prompt after prompt with the next text; each call is a policy version of its own."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts = tokenizer, texts
        self.calls, self.answered = [], []

    def sample(self, prompts, sampling, seed):
        self.calls.append((prompts, sampling, seed))
        for prompt in prompts:
            text = self.texts[len(self.answered) % len(self.texts)]
            ids = self.tokenizer(text.removesuffix(END))["input_ids"]
            stop = [self.tokenizer.convert_tokens_to_ids(END)]
            # "0" is cut short by the length limit, all others stop.
            completion = Completion(ids, "length", 0) if text == "0" else Completion(ids + stop, "stop", 0)
            self.answered.append((prompt, completion._replace(policy_version=len(self.calls))))
        return [[completion] for _, completion in self.answered[-len(prompts) :]]


class FakeReference:
    """Log-probs that tell the token: -id / 100."""

    def __init__(self):
        self.scored = []

    def score(self, rows):
        self.scored += [row.tolist() for row in rows]
        return [row / -100 for row in rows]


class FakeRecords:
    """Keeps what it sees."""

    def __init__(self, batches, records):
        self.batches, self.send = batches, records.append

    def __call__(self, batch):
        self.batches.append(batch)
        return batch

    def state_dict(self):
        return {"seen": len(self.batches)}

    def load_state_dict(self, state):
        self.loaded = state


def make_collector(tokenizer, *, texts=TEXTS, num_envs=8, seed=0, keep_stop_token=True, topk=TOPK, **options):
    """An `ExpertCollector` with everything it works with as attributes of one object."""
    task = Task("digits", SYSTEM_PROMPT, PROBLEMS, [], reward_is_the_number, reward_is_the_number, bool)
    prompts = PromptStream(PROBLEMS, seed, state=options["state"]["prompts"] if "state" in options else None)
    judge = Judge(task)
    parts = SimpleNamespace(
        engine=FakeEngine(tokenizer, texts),
        reference=FakeReference(),
        batches=[],
        records=[],
        buffer=ExpertReplayBuffer(
            storage=LazyStackStorage(100),
            sampler=RewardPrioritizedPass(100, alpha=0.0, epsilon=0.0),
            batch_size=4,
            capacity=100,
            seed=0,
        ),
    )
    parts.collector = ExpertCollector(
        make_env=lambda: make_task_env(task, tokenizer, prompts, judge, num_envs=num_envs, repeats=REPEATS),
        prompts=prompts,
        judge=judge,
        policy=EnginePolicy(
            parts.engine, tokenizer, Sampling(max_tokens=3), seed=seed, keep_stop_token=keep_stop_token
        ),
        selector=TopKRewardSelector(REPEATS, topk, group_key="group_id"),
        postproc=FakeRecords(parts.batches, parts.records),
        **{
            "retrieve_log_prob": RetrieveLogProb(parts.reference.score),
            "dialog_turns_per_batch": TURNS,
            "num_batches": 3,
            "num_sample_groups": 2,
            **options,
        },
    )
    return parts


def collect(parts, batches=1):
    for _ in range(batches):
        parts.collector.collect()
        summary = parts.collector.write(parts.buffer)
    return summary


def stored(parts):
    return parts.buffer[:].unbind(0)


def identity(row):
    """What the engine was asked and what it said, as the row has it."""
    return (
        tuple(row["tokens", "prompt"].tolist()),
        tuple(row["tokens", "response"].tolist()),
        row["finish_reason"],
        int(row["policy_version"]),
    )


def said(parts, keep=lambda text: True):
    """What the engine was asked and what it said, by itself."""
    return [
        (tuple(prompt), tuple(completion.token_ids), completion.finish_reason, completion.policy_version)
        for number, (prompt, completion) in enumerate(parts.engine.answered)
        if keep(parts.engine.texts[number % len(parts.engine.texts)])
    ]


# --- tokens in, tokens out ---


def test_rows_hold_the_ids_the_engine_was_asked_with_and_returned(tiny_tokenizer):
    parts = make_collector(tiny_tokenizer)
    collect(parts, batches=2)
    assert Counter(map(identity, stored(parts))) == Counter(said(parts, KEPT_TEXTS.__contains__))
    end = tiny_tokenizer.convert_tokens_to_ids(END)
    for row in stored(parts):
        prompt, response = row["tokens", "prompt"].tolist(), row["tokens", "response"].tolist()
        assert prompt == chat_prompt_ids(tiny_tokenizer, SYSTEM_PROMPT, PROBLEMS[int(row["prompt_index"])].question)
        assert row["tokens", "full"].tolist() == prompt + response
        assert row["masks", "all_assistant_mask"].tolist() == [False] * len(prompt) + [True] * len(response)
        assert response[-1] == end
        assert row["text", "response"] == tiny_tokenizer.decode(response, skip_special_tokens=True)
        assert row["next", "reward"].item() == float(row["text", "response"])


def test_a_row_holds_what_the_buffer_keeps_and_the_reference_says_and_no_more(tiny_tokenizer):
    parts = make_collector(tiny_tokenizer)
    collect(parts)
    assert set(stored(parts)[0].keys(True, True, is_leaf=is_leaf_nontensor)) == {
        *STORED_KEYS,
        ("next", "ref_log_probs", "full"),
    }


def test_without_the_stop_token_only_a_response_that_stopped_is_shorter(tiny_tokenizer):
    # "0" was cut at the length limit: its last token is text. Above the lower median, -8, are 0 and -7.
    parts = make_collector(tiny_tokenizer, texts=["0", "-7", "-8", "-9"], keep_stop_token=False)
    collect(parts)
    found = {row["text", "response"]: row["tokens", "response"].tolist() for row in stored(parts)}
    assert found == {text: tiny_tokenizer(text)["input_ids"] for text in ("0", "-7")}
    assert {row["text", "response"]: row["finish_reason"] for row in stored(parts)} == {"0": "length", "-7": "stop"}


def test_the_engine_is_asked_with_the_given_sampling_and_a_new_seed_each_call(tiny_tokenizer):
    parts = make_collector(tiny_tokenizer, num_envs=4)
    collect(parts)
    assert [sampling for _, sampling, _ in parts.engine.calls] == [Sampling(max_tokens=3)] * 4
    assert len({seed for _, _, seed in parts.engine.calls}) == 4


def test_a_seed_repeats_prompts_and_sampling_seeds(tiny_tokenizer):
    first, second, other = (make_collector(tiny_tokenizer, seed=seed) for seed in (1, 1, 2))
    for parts in (first, second, other):
        collect(parts, batches=2)
    assert first.engine.calls == second.engine.calls
    assert [prompts for prompts, _, _ in first.engine.calls] != [prompts for prompts, _, _ in other.engine.calls]
    assert [seed for _, _, seed in first.engine.calls] != [seed for _, _, seed in other.engine.calls]


# --- groups ---


@pytest.mark.parametrize("num_envs", [REPEATS, 2 * REPEATS, TURNS, REPEATS // 2, 1])
def test_batches_are_whole_groups_in_order_whatever_is_asked_at_once(tiny_tokenizer, num_envs):
    parts = make_collector(tiny_tokenizer, num_envs=num_envs)
    for number in range(3):
        summary = collect(parts)
        assert summary.responses_kept == TURNS // REPEATS * TOPK
        groups = range(number * TURNS // REPEATS, (number + 1) * TURNS // REPEATS)
        found = Counter(int(row["group_id"]) for row in parts.batches[-1].unbind(0))
        assert found == dict.fromkeys(groups, REPEATS)
    assert [len(prompts) for prompts, _, _ in parts.engine.calls] == [num_envs] * (3 * TURNS // num_envs)
    assert parts.records[-1]["selection/groups_in_flight"] == 0


@pytest.mark.parametrize("num_envs", [TURNS, REPEATS, 2])
def test_an_epoch_of_prompts_is_asked_from_its_first_on(tiny_tokenizer, num_envs):
    parts = make_collector(tiny_tokenizer, num_envs=num_envs)
    collect(parts)
    assert sorted({int(row["prompt_index"]) for row in parts.batches[0].unbind(0)}) == [0, 1, 2, 3]


def test_all_responses_of_a_group_share_a_prompt(tiny_tokenizer):
    parts = make_collector(tiny_tokenizer)
    collect(parts)
    prompts = {}
    for row in parts.batches[0].unbind(0):
        prompts.setdefault(int(row["group_id"]), set()).add((row["text", "prompt"], int(row["prompt_index"])))
    assert len(prompts) == TURNS // REPEATS
    assert all(len(found) == 1 for found in prompts.values())


def test_a_prompt_drawn_again_is_a_new_group(tiny_tokenizer):
    parts = make_collector(tiny_tokenizer)
    collect(parts, batches=2)
    groups = Counter((row["text", "prompt"], int(row["group_id"])) for row in stored(parts))
    assert len({prompt for prompt, _ in groups}) == len(PROBLEMS)
    assert len(groups) == 2 * len(PROBLEMS)
    assert set(groups.values()) == {TOPK}


# --- selection, reference, buffer ---


def test_the_reference_scores_what_is_kept_and_nothing_else(tiny_tokenizer):
    parts = make_collector(tiny_tokenizer)
    collect(parts, batches=2)
    kept = [list(prompt + response) for prompt, response, _, _ in said(parts, KEPT_TEXTS.__contains__)]
    assert sorted(parts.reference.scored) == sorted(kept)
    for row in stored(parts):
        expected = (row["tokens", "full"] / -100) * row["masks", "all_assistant_mask"]
        assert torch.equal(row["next", "ref_log_probs", "full"], expected)


def test_without_a_reference_rows_are_written_without_its_log_probs(tiny_tokenizer):
    parts = make_collector(tiny_tokenizer, retrieve_log_prob=None)
    collect(parts)
    assert len(stored(parts)) == 8
    assert set(stored(parts)[0].keys(True, True, is_leaf=is_leaf_nontensor)) == {*STORED_KEYS}


def test_kept_responses_are_numbered_through_all_batches(tiny_tokenizer):
    parts = make_collector(tiny_tokenizer)
    collect(parts, batches=2)
    assert [int(row["response_id"]) for row in stored(parts)] == list(range(16))


def test_nothing_is_written_before_it_is_asked_for(tiny_tokenizer):
    parts = make_collector(tiny_tokenizer)
    parts.collector.collect()
    assert len(parts.buffer) == 0
    parts.collector.write(parts.buffer)
    before = sorted(map(identity, stored(parts)))
    assert len(before) == 8
    parts.collector.collect()
    assert sorted(map(identity, stored(parts))) == before
    parts.collector.write(parts.buffer)
    assert len(parts.buffer) == parts.buffer.write_count == 16


def test_a_batch_in_which_nothing_is_better_writes_nothing(tiny_tokenizer):
    parts = make_collector(tiny_tokenizer, texts=["4"])
    summary = collect(parts, batches=2)
    assert (summary.responses_kept, summary.dialog_turns) == (0, 2 * TURNS)
    assert len(parts.buffer) == parts.buffer.write_count == 0
    assert parts.reference.scored == []
    assert [record["selection/empty_batches"] for record in parts.records] == [1, 2]
    assert {response["kept"] for sample in summary.samples for response in sample["responses"]} == {False}


def test_a_batch_says_how_far_the_run_is(tiny_tokenizer):
    parts = make_collector(tiny_tokenizer)
    summaries = [collect(parts) for _ in range(3)]
    assert [summary.dialog_turns for summary in summaries] == [16, 32, 48]
    assert [summary.progress for summary in summaries] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert {summary.total_dialog_turns for summary in summaries} == {48}


# --- what people and metrics see ---


def test_samples_show_the_first_groups_whole_with_what_was_kept(tiny_tokenizer):
    parts = make_collector(tiny_tokenizer)
    samples = collect(parts).samples
    first = parts.batches[0].unbind(0)[0]
    assert len(samples) == 2
    assert samples[0]["prompt"] == PROBLEMS[int(first["prompt_index"])].question != samples[1]["prompt"]
    for sample in samples:
        assert sample["responses"] == [
            {"text": "3", "reward": 3.0, "kept": True},
            {"text": "1", "reward": 1.0, "kept": False},
            {"text": "20", "reward": 20.0, "kept": True},
            {"text": "0", "reward": 0.0, "kept": False},
        ]


def test_of_two_equal_texts_the_sample_shows_which_was_kept(tiny_tokenizer):
    parts = make_collector(tiny_tokenizer, texts=["0", "3", "3", "0"], topk=1)
    (sample, _) = collect(parts).samples
    assert [response["kept"] for response in sample["responses"]] == [False, True, False, False]


def test_no_samples_when_none_are_wanted(tiny_tokenizer):
    assert collect(make_collector(tiny_tokenizer, num_sample_groups=0)).samples == []


def test_the_hook_sees_every_response_and_a_record_is_sent_for_each_batch(tiny_tokenizer):
    parts = make_collector(tiny_tokenizer)
    collect(parts, batches=2)
    assert [Counter(map(identity, batch.unbind(0))) for batch in parts.batches] == [
        Counter(said(parts)[:TURNS]),
        Counter(said(parts)[TURNS:]),
    ]
    first, second = parts.records
    assert (
        first.keys()
        == second.keys()
        >= {
            "selection/groups_seen",
            "selection/groups_kept",
            "selection/groups_all_equal",
            "selection/acceptance_rate",
            "collector/time/collect",
        }
    )
    assert {name: second[name] for name in ("selection/groups_seen", "selection/responses_kept")} == {
        "selection/groups_seen": 8,
        "selection/responses_kept": 16,
    }
    assert (second["selection/batch_kept"], second["collector/dialog_turns"]) == (8, 32)


def test_writing_follows_collecting(tiny_tokenizer):
    parts = make_collector(tiny_tokenizer)
    with pytest.raises(AssertionError, match="follows collect"):
        parts.collector.write(parts.buffer)
    collect(parts)
    with pytest.raises(AssertionError, match="follows collect"):
        parts.collector.write(parts.buffer)


# --- going on where another stood ---


@pytest.mark.parametrize("num_envs", [2, 16])
def test_a_collector_goes_on_where_another_stood(tiny_tokenizer, num_envs):
    whole = make_collector(tiny_tokenizer, num_envs=num_envs)
    collect(whole, batches=2)
    state = whole.buffer.state_dict()["_writer_state"]
    assert (state["num_written"], state["turns"]) == (2, 2 * TURNS)
    other = make_collector(tiny_tokenizer, num_envs=num_envs, state=state)
    asked = len(whole.engine.calls)
    assert collect(other) == collect(whole)
    assert other.engine.calls == whole.engine.calls[asked:]
    ids = [[int(row["group_id"]) for row in parts.batches[-1].unbind(0)] for parts in (whole, other)]
    assert ids[0] == ids[1]
    numbers = [[int(row["response_id"]) for row in stored(parts)] for parts in (whole, other)]
    assert numbers[1] == numbers[0][-len(numbers[1]) :]


def test_a_batch_that_kept_nothing_is_noted_too(tiny_tokenizer):
    parts = make_collector(tiny_tokenizer, texts=["1"])
    collect(parts)
    state = parts.buffer.state_dict()["_writer_state"]
    assert (state["num_written"], state["empty_batches"]) == (1, 1)
    assert [batch["responses_kept"] for batch in state["last_written"]] == [0]
