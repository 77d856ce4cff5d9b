"""The real vLLM engine in its Ray actor: what it samples, how it stops, how weights reach it."""

import threading
import time
from types import SimpleNamespace

import pytest
import ray
import torch
from tensordict import TensorDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_iteration.cli import compose_config
from expert_iteration.engine import CONCURRENCY_GROUPS, EngineClient, Sampling, VLLMEngine, _completion
from expert_iteration.models import chat_prompt_ids, end_of_turn_id
from expert_iteration.resolve import resolve_config
from expert_iteration.tiny import SYSTEM_PROMPT, heldout_problems
from expert_iteration.weight_update import WeightMismatchError, WeightUpdater

pytestmark = pytest.mark.vllm


def start_engine(model_folder):
    config = resolve_config(compose_config("ei_tiny"), "sync").inference_model
    actor = ray.remote(num_cpus=0, concurrency_groups=CONCURRENCY_GROUPS)(VLLMEngine).remote(str(model_folder), config)
    return EngineClient(actor)


@pytest.fixture(scope="module")
def tokenizer(warm_tiny_model):
    return AutoTokenizer.from_pretrained(warm_tiny_model)


@pytest.fixture(scope="module")
def running_engine(ray_session, warm_tiny_model, tokenizer):
    client = start_engine(warm_tiny_model)
    yield client
    ray.kill(client.actor)


@pytest.fixture
def engine(running_engine, warm_tiny_model, prompts, tmp_path):
    """The engine with the start model's weights, whatever an earlier test has pushed."""
    make_updater(running_engine, prompts, tmp_path).push_weights(load(warm_tiny_model))
    return running_engine


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [chat_prompt_ids(tokenizer, SYSTEM_PROMPT, problem.question) for problem in heldout_problems()[:32]]


def make_updater(client, prompts, directory):
    return WeightUpdater(client, probe=prompts[:4], directory=directory, wire_dtype=torch.float32)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def change(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def test_a_response_ends_with_the_end_of_turn_token_and_is_cut_at_max_tokens(engine, prompts, tokenizer):
    stop = end_of_turn_id(tokenizer)
    completions = [group[0] for group in engine.sample(prompts, Sampling(max_tokens=32), seed=0)]
    stopped = [completion for completion in completions if completion.finish_reason == "stop"]
    assert stopped
    assert all(completion.token_ids[-1] == stop for completion in stopped)
    assert all(stop not in completion.token_ids[:-1] for completion in completions)
    cut = [group[0] for group in engine.sample(prompts, Sampling(max_tokens=3), seed=0)]
    assert all(completion.finish_reason == "length" and len(completion.token_ids) == 3 for completion in cut)


def test_a_call_repeats_for_its_seed_whatever_was_called_before(engine, prompts):
    sampling = Sampling(max_tokens=20, num_samples=2)
    first = engine.sample(prompts, sampling, seed=1)
    other = engine.sample(prompts, sampling, seed=2)
    assert engine.sample(prompts, sampling, seed=1) == first
    assert other != first
    assert all(len(group) == 2 for group in first)


def test_log_probs_are_those_of_the_hugging_face_model(engine, prompts, warm_tiny_model):
    ids = prompts[0]
    with torch.no_grad():
        table = load(warm_tiny_model)(torch.tensor([ids])).logits.log_softmax(-1)[0]
    expected = [0.0, *(table[position, token].item() for position, token in enumerate(ids[1:]))]
    # 1e-4: two float32 implementations of the same two layers.
    assert engine.token_log_probs([ids])[0] == pytest.approx(expected, abs=1e-4)


def test_pushed_weights_arrive_and_label_what_they_generate(engine, prompts, warm_tiny_model, tmp_path):
    model, updater = load(warm_tiny_model), make_updater(engine, prompts, tmp_path)
    updater.verify_start(model)
    updater.push_weights(model)
    change(model)
    metrics = updater.push_weights(model)
    assert metrics["weights/probe_diff"] < 1e-3
    assert engine.version() == updater.policy_version == 2
    groups = engine.sample(prompts[:2], Sampling(max_tokens=4), seed=0)
    assert {completion.policy_version for group in groups for completion in group} == {2}
    greedy = engine.sample(prompts[:8], Sampling(max_tokens=8, temperature=0.0), seed=0)
    for ids, (completion,) in zip(prompts[:8], greedy, strict=True):
        output = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
        assert output[0, len(ids) :].tolist()[: len(completion.token_ids)] == completion.token_ids


def test_a_dropped_lm_head_is_found_once_the_weights_have_changed(engine, prompts, warm_tiny_model, tmp_path):
    class Incomplete(WeightUpdater):
        def _weights(self, policy):
            return {name: value for name, value in super()._weights(policy).items() if name != "lm_head.weight"}

    model = load(warm_tiny_model)
    updater = Incomplete(engine, probe=prompts[:4], directory=tmp_path, wire_dtype=torch.float32)
    updater.verify_start(model)
    updater.push_weights(model)  # nothing has changed: what is missing is right by chance
    change(model)
    with pytest.raises(WeightMismatchError, match=r"expected but not sent: lm_head\.weight"):
        updater.push_weights(model)


def test_a_push_does_not_wait_for_a_generation_and_no_response_mixes_weights(
    engine, prompts, warm_tiny_model, tmp_path
):
    model, updater = load(warm_tiny_model), make_updater(engine, prompts, tmp_path)
    updater.verify_start(model)
    updater.push_weights(model)
    results = []
    generation = threading.Thread(
        target=lambda: results.append(engine.sample(prompts * 8, Sampling(max_tokens=200, num_samples=2), seed=0))
    )
    generation.start()
    while not engine.health()["busy_seconds"]:
        time.sleep(0.01)
    for seed in range(3):
        change(model, seed)
        pushed = updater.push_weights(model)
        assert "weights/engine_version" not in pushed
    # Health answers too; the engine is where it was, and one update waits, the newest.
    assert engine.health()["busy_seconds"] > 0
    assert engine.version() == 1
    assert pushed["weights/superseded"] == 2
    assert len(list(tmp_path.iterdir())) == 1
    generation.join()
    # `Completion` has one version because vLLM's spans do: `engine._completion` refuses a response with two.
    assert {completion.policy_version for group in results[0] for completion in group} == {1}
    after = engine.sample(prompts[:2], Sampling(max_tokens=2), seed=0)
    assert {completion.policy_version for group in after for completion in group} == {4} == {engine.version()}
    assert list(tmp_path.iterdir()) == []
    # Scored by the engine when it loaded version 4, compared when the trainer hears of it.
    reported = updater.push_weights(model)
    assert reported["weights/wait_seconds"] > 0
    assert reported["weights/probe_diff"] < 1e-3


@pytest.mark.parametrize("spans", [[("1", 0, 3), ("2", 3, 5)], [], None])
def test_a_response_that_mixes_weights_or_has_none_is_refused(spans):
    spans = spans and [SimpleNamespace(version=version, start=start, end=end) for version, start, end in spans]
    output = SimpleNamespace(weight_versions=spans, token_ids=[1, 2, 3, 4, 5], finish_reason="stop")
    with pytest.raises(RuntimeError, match="mixes weight sets, or has none"):
        _completion(output)


def test_torchrl_wrapper_accepts_the_client(engine, prompts, tokenizer):
    from torchrl.modules.llm import vLLMWrapper

    policy = vLLMWrapper(
        engine,
        tokenizer=tokenizer,
        input_mode="text",
        return_log_probs=False,
        generate_kwargs={"max_new_tokens": 8, "stop_token_ids": [end_of_turn_id(tokenizer)]},
    )
    text = tokenizer.decode(prompts[0])
    output = policy(TensorDict(text=TensorDict(prompt=[text, text], batch_size=[2]), batch_size=[2]))
    responses = output.get(("tokens", "response"), as_list=True)
    assert len(responses) == 2
    assert all(0 < len(ids) <= 8 for ids in responses)


def test_untied_embeddings_are_pushed_whole(ray_session, warm_tiny_model, tokenizer, prompts, tmp_path):
    model = load(warm_tiny_model)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "untied")
    tokenizer.save_pretrained(tmp_path / "untied")
    client = start_engine(tmp_path / "untied")
    updater = make_updater(client, prompts, tmp_path)
    updater.verify_start(model)
    change(model)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert updater.push_weights(model)["weights/probe_diff"] < 1e-3
    ray.kill(client.actor)
