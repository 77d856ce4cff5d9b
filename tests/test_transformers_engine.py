"""`expert_iteration.transformers_engine`, and through it what every engine has: the gate, offers, the probe."""

import threading
import time

import pytest
import torch
from builders import random_model
from transformers import GenerationConfig

from expert_iteration.chat_template import chat_prompt_ids, end_of_turn_id
from expert_iteration.engine import Sampling
from expert_iteration.lora import add_adapters
from expert_iteration.packed_weights import PackedWeights
from expert_iteration.policy_reader import PolicyReader
from expert_iteration.tiny import SYSTEM_PROMPT, heldout_problems
from expert_iteration.transformers_engine import TransformersEngine

# Float32 through a padded batch and without padding.
CLOSE = 1e-4


@pytest.fixture
def make_engine(tiny_folder, make_cfg):
    def make(folder=tiny_folder, batch_size=16, lora=None, **changes):
        config = make_cfg("inference_model.backend=transformers").inference_model
        for name, value in changes.items():
            setattr(config, name, value)
        return TransformersEngine(str(folder), config, batch_size=batch_size, lora=lora)

    return make


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer):
    """Of different lengths."""
    questions = [problem.question for problem in heldout_problems()[:6]]
    return [
        chat_prompt_ids(tiny_tokenizer, SYSTEM_PROMPT, question[: -index or None])
        for index, question in enumerate(questions)
    ]


def pack(model):
    weights = model.state_dict()
    packed = PackedWeights.allocate(weights.items(), torch.float32)
    packed.pack(weights.items())
    return packed


def change(model, seed=0, only=""):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (parameter for name, parameter in model.named_parameters() if only in name):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def flat(rows):
    return [value for row in rows for value in row]


@torch.no_grad()
def greedy(model, ids, length):
    """One token after the other, without a cache or padding."""
    ids = list(ids)
    for _ in range(length):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[-length:]


def test_greedy_responses_are_those_of_the_model_without_padding(make_engine, load_tiny_model, prompts):
    engine, model = make_engine(batch_size=4), load_tiny_model()
    assert len({len(ids) for ids in prompts}) > 1
    groups = engine.sample(prompts, Sampling(max_tokens=8, temperature=0.0), seed=0)
    for ids, (completion,) in zip(prompts, groups, strict=True):
        assert completion.token_ids == greedy(model, ids, 8)[: len(completion.token_ids)]


def test_a_call_repeats_for_its_seed_whatever_was_called_before(make_engine, prompts):
    engine, sampling = make_engine(batch_size=4), Sampling(max_tokens=8, num_samples=3)
    first, other = (engine.sample(prompts, sampling, seed=seed) for seed in (1, 2))
    assert engine.sample(prompts, sampling, seed=1) == first != other
    assert [len(group) for group in first] == [3] * len(prompts)
    assert all(len({tuple(completion.token_ids) for completion in group}) > 1 for group in first)


def test_a_response_ends_with_the_end_of_turn_token_and_is_cut_at_max_tokens(make_engine, prompts, tiny_tokenizer):
    engine, stop = make_engine(), end_of_turn_id(tiny_tokenizer)
    # The warm start has taught it little yet: over many tokens some responses end, and some do not.
    sampled = engine.sample(prompts, Sampling(max_tokens=60, num_samples=8), seed=0)
    completions = [completion for group in sampled for completion in group]
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        ends = completion.finish_reason == "stop"
        assert stop not in completion.token_ids[: len(completion.token_ids) - ends]
        assert completion.token_ids[-1] == stop if ends else len(completion.token_ids) == 60


def test_prompt_and_response_together_fit_into_the_model(make_engine, prompts):
    longest = max(len(ids) for ids in prompts)
    engine = make_engine(max_model_len=longest + 2)
    for ids, (completion,) in zip(prompts, engine.sample(prompts, Sampling(max_tokens=9), seed=0), strict=True):
        room = min(9, longest + 2 - len(ids))
        assert len(completion.token_ids) == room or completion.finish_reason == "stop"
        assert len(completion.token_ids) <= room
    with pytest.raises(ValueError, match=rf"{longest + 2} tokens leaves no room in {longest + 2}"):
        engine.sample([[1] * (longest + 2)], Sampling(max_tokens=1), seed=0)


# --- sampling is what is asked for, and nothing else ---


@pytest.fixture(scope="module")
def opinionated(tiny_tokenizer, tmp_path_factory):
    """A model with its publisher's tastes beside it, and the folder it lies in."""
    folder = tmp_path_factory.mktemp("opinionated")
    model = random_model(len(tiny_tokenizer), tie_word_embeddings=False).eval()
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=3, top_p=0.2, temperature=3.0, repetition_penalty=9.0
    )
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_responses_are_drawn_from_the_distribution_asked_for_and_from_no_other(
    opinionated, make_engine, temperature, top_p
):
    (model, folder), prompt, draws = opinionated, [5, 6, 7], 5000
    with torch.no_grad():
        probabilities = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    ranked, order = probabilities.sort(descending=True)
    kept = order[ranked.cumsum(0) - ranked < top_p]
    expected = torch.zeros_like(probabilities).scatter(0, kept, probabilities[kept])
    sampling = Sampling(max_tokens=1, temperature=temperature, top_p=top_p, num_samples=draws)
    (group,) = make_engine(folder, batch_size=draws).sample([prompt], sampling, seed=0)
    drawn = torch.tensor([completion.token_ids[0] for completion in group]).bincount(minlength=len(expected))
    distance = (drawn / draws - expected / expected.sum()).abs().sum() / 2
    # Measured: at most 0.10, which is chance; 0.4 where the 50 likeliest words alone are drawn.
    assert distance < 0.2


def test_greedy_responses_know_no_repetition_penalty(opinionated, make_engine):
    model, folder = opinionated
    ((completion,),) = make_engine(folder).sample([[5, 6, 7]], Sampling(max_tokens=20, temperature=0.0), seed=0)
    assert completion.token_ids == greedy(model, [5, 6, 7], 20)


# --- weights ---


def test_log_probs_are_those_of_the_model(make_engine, prompts, load_tiny_model):
    with torch.no_grad():
        table = load_tiny_model()(torch.tensor([prompts[0]])).logits.log_softmax(-1)[0]
    expected = [0.0, *(table[position, token].item() for position, token in enumerate(prompts[0][1:]))]
    assert make_engine().token_log_probs(prompts)[0] == pytest.approx(expected, abs=CLOSE)


def test_offered_weights_are_loaded_scored_and_label_what_they_generate(make_engine, prompts, load_tiny_model):
    engine, model = make_engine(), change(load_tiny_model())
    probe = [list(ids) for ids in prompts[:2]]
    before = engine.sample(prompts[:1], Sampling(max_tokens=2), seed=0)
    report = engine.offer_weights(pack(model), 3, probe)
    (applied,) = report.applied
    assert (applied.version, engine.version(), report.superseded) == (3, 3, 0)
    with torch.no_grad():
        table = model(torch.tensor(probe[:1])).logits.log_softmax(-1)[0]
    expected = [0.0, *(table[position, token].item() for position, token in enumerate(probe[0][1:]))]
    assert applied.probe_scores[0] == pytest.approx(expected, abs=CLOSE)
    after = engine.sample(prompts[:1], Sampling(max_tokens=2), seed=0)
    assert [group[0].policy_version for group in (*before, *after)] == [0, 3]
    assert engine.report().applied == []


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda name: name.replace("model.norm", "model.noise"),
            r"unknown \['model.noise.weight'\], missing \['model.norm",
        ),
        (lambda name: None if name == "lm_head.weight" else name, r"missing \['lm_head.weight'\]"),
    ],
)
def test_weights_with_other_names_are_refused_and_nothing_is_loaded(
    make_engine, load_tiny_model, prompts, rename, message
):
    engine = make_engine()
    before = engine.token_log_probs(prompts[:1])
    weights = {rename(name): tensor for name, tensor in change(load_tiny_model()).state_dict().items() if rename(name)}
    packed = PackedWeights.allocate(weights.items(), torch.float32)
    packed.pack(weights.items())
    with pytest.raises(RuntimeError, match=message):
        engine.offer_weights(packed, 1)
    assert engine.token_log_probs(prompts[:1]) == before
    assert engine.version() == 0


def test_a_tensor_of_another_shape_is_refused_though_it_could_be_broadcast(make_engine, load_tiny_model):
    weights = load_tiny_model().state_dict()
    weights["model.norm.weight"] = torch.ones(1)
    packed = PackedWeights.allocate(weights.items(), torch.float32)
    with pytest.raises(RuntimeError, match=r"of another shape \['model\.norm\.weight'\]"):
        make_engine().offer_weights(packed, 1)


@pytest.fixture
def lora(make_cfg):
    return make_cfg("train_model.lora.enabled=true", "train_model.lora.r=4").train_model.lora


def test_adapters_alone_give_what_the_merged_weights_give(make_engine, load_tiny_model, prompts, lora):
    policy, reader = add_adapters(load_tiny_model(), lora, seed=1), PolicyReader()
    whole, adapted = make_engine(), make_engine(lora=lora)
    sampling, probe = Sampling(max_tokens=8, temperature=0.0), [list(ids) for ids in prompts[:2]]
    # The start model: other adapters than the policy's, and both do nothing yet.
    assert adapted.sample(prompts, sampling, seed=0) == whole.sample(prompts, sampling, seed=0)
    for version in (1, 2):
        change(policy, seed=version, only="lora_")
        scores, completions, num_bytes = [], [], []
        for engine, read in ((whole, reader.weights), (adapted, reader.adapters)):
            packed = PackedWeights.allocate(read(policy), torch.float32)
            packed.pack(read(policy))
            (applied,) = engine.offer_weights(packed, version, probe).applied
            scores.append(flat(applied.probe_scores))
            completions.append(engine.sample(prompts, sampling, seed=0))
            num_bytes.append(packed.num_bytes)
        assert scores[0] == pytest.approx(scores[1], abs=CLOSE)
        assert scores[1] == pytest.approx(flat(reader.score(policy, probe)), abs=CLOSE)
        assert completions[0] == completions[1]
        assert completions[0][0][0].policy_version == version
        assert num_bytes[1] < num_bytes[0] / 10


def test_adapters_of_another_rank_are_refused(make_engine, load_tiny_model, lora):
    policy = add_adapters(load_tiny_model(), lora, seed=1)
    packed = PackedWeights.allocate(PolicyReader().adapters(policy), torch.float32)
    lora.r = 8
    with pytest.raises(RuntimeError, match="of another shape"):
        make_engine(lora=lora).offer_weights(packed, 1)


def test_an_offer_does_not_wait_for_a_generation_and_the_newest_is_loaded_after_it(
    make_engine, prompts, load_tiny_model
):
    engine, groups = make_engine(), []
    sampling = Sampling(max_tokens=60, num_samples=16)
    generation = threading.Thread(target=lambda: groups.extend(engine.sample(prompts, sampling, seed=0)))
    generation.start()
    while not engine.health().generating_seconds:
        time.sleep(0.001)
    model = load_tiny_model()
    for version in (1, 2, 3):
        report = engine.offer_weights(pack(change(model)), version, [[1, 2, 3]])
    health = engine.health()
    assert (health.version, health.responses, health.loading_seconds) == (0, 16 * len(prompts), 0.0)
    assert (report.applied, report.superseded) == ([], 2)
    generation.join()
    assert {completion.policy_version for group in groups for completion in group} == {0}
    ((after,),) = engine.sample(prompts[:1], Sampling(max_tokens=1), seed=0)
    assert after.policy_version == engine.version() == 3
    (applied,) = engine.report().applied
    assert applied.wait_seconds > 0
    assert engine.health() == (3, 0.0, 0.0, 0)
