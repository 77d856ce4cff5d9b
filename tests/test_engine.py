"""The real vLLM engine in its Ray actor: what it samples, how it stops, how weights reach it.

What engines have in common, the gate and offers, is in `test_transformers_engine.py`.
"""

import threading
import time
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import ray
import torch
from tensordict import TensorDict
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_iteration.chat_template import chat_prompt_ids, end_of_turn_id
from expert_iteration.cli import compose_config
from expert_iteration.engine import Sampling
from expert_iteration.engine_client import CONCURRENCY_GROUPS, EngineActor, EngineClient, EnginePool
from expert_iteration.errors import UserError
from expert_iteration.lora import add_adapters
from expert_iteration.policy_reader import PolicyReader
from expert_iteration.resolve import resolve_config
from expert_iteration.tiny import SYSTEM_PROMPT, heldout_problems
from expert_iteration.vllm_engine import VLLMEngine, _adapter_options, _completion
from expert_iteration.weight_transport import PackedTransport
from expert_iteration.weight_update import WeightMismatchError, WeightUpdater

pytestmark = pytest.mark.vllm


def start_engine(model_folder, num_devices=1, lora=None):
    config = resolve_config(compose_config("ei_tiny"), "sync").inference_model
    config.num_devices = num_devices
    make_engine = partial(VLLMEngine, str(model_folder), config, lora=lora)
    actor = ray.remote(num_cpus=0, concurrency_groups=CONCURRENCY_GROUPS)(EngineActor).remote(make_engine)
    return EnginePool([EngineClient(actor)])


@pytest.fixture(scope="module")
def tokenizer(warm_tiny_model):
    return AutoTokenizer.from_pretrained(warm_tiny_model)


@pytest.fixture(scope="module")
def running_engine(ray_session, warm_tiny_model, tokenizer):
    pool = start_engine(warm_tiny_model)
    yield pool
    ray.kill(pool.actors[0])


@pytest.fixture
def engine(running_engine, warm_tiny_model, prompts):
    """The engine with the start model's weights, whatever an earlier test has pushed."""
    make_updater(running_engine, prompts).push_weights(load(warm_tiny_model))
    return running_engine


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [chat_prompt_ids(tokenizer, SYSTEM_PROMPT, problem.question) for problem in heldout_problems()[:32]]


def make_updater(pool, prompts, reader=None, **options):
    transport = PackedTransport(pool, torch.float32)
    return WeightUpdater(pool, transport, reader or PolicyReader(), probe=prompts[:4], **options)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def change(model, seed=0, only=""):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (parameter for name, parameter in model.named_parameters() if only in name):
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
    assert engine.token_log_probs([ids])[0][0] == pytest.approx(expected, abs=1e-4)


def test_pushed_weights_arrive_and_label_what_they_generate(engine, prompts, warm_tiny_model):
    model, updater = load(warm_tiny_model), make_updater(engine, prompts)
    updater.verify_start(model)
    updater.push_weights(model)
    change(model)
    metrics = updater.push_weights(model)
    assert metrics["weights/probe_diff"] < 1e-3
    assert engine.replicas[0].health().version == updater.policy_version == 2
    groups = engine.sample(prompts[:2], Sampling(max_tokens=4), seed=0)
    assert {completion.policy_version for group in groups for completion in group} == {2}
    assert_greedy(engine, prompts[:8], model, version=2)


def test_a_dropped_lm_head_is_found_once_the_weights_have_changed(engine, prompts, warm_tiny_model):
    class Incomplete(PolicyReader):
        def weights(self, policy):
            return ((name, value) for name, value in super().weights(policy) if name != "lm_head.weight")

    model = load(warm_tiny_model)
    updater = make_updater(engine, prompts, Incomplete())
    updater.verify_start(model)
    updater.push_weights(model)  # nothing has changed: what is missing is right by chance
    change(model)
    with pytest.raises(WeightMismatchError, match=r"expected but not sent: lm_head\.weight"):
        updater.push_weights(model)


def test_a_push_does_not_wait_for_a_generation_and_no_response_mixes_weights(engine, prompts, warm_tiny_model):
    model, updater = load(warm_tiny_model), make_updater(engine, prompts)
    updater.verify_start(model)
    updater.push_weights(model)
    results = []
    generation = threading.Thread(
        target=lambda: results.append(engine.sample(prompts * 8, Sampling(max_tokens=200, num_samples=2), seed=0))
    )
    generation.start()
    (replica,) = engine.replicas
    while not replica.health().responses:
        time.sleep(0.01)
    for seed in range(3):
        change(model, seed)
        pushed = updater.push_weights(model)
        assert "weights/engine_version" not in pushed
    # Health answers too; the engine is where it was, and one update waits, the newest.
    assert replica.health().responses == 2 * 8 * len(prompts)
    assert replica.health().version == 1
    assert pushed["weights/superseded"] == 2
    generation.join()
    # `Completion` has one version because vLLM's spans do: `_completion` refuses a response with two.
    assert {completion.policy_version for group in results[0] for completion in group} == {1}
    after = engine.sample(prompts[:2], Sampling(max_tokens=2), seed=0)
    assert {completion.policy_version for group in after for completion in group} == {4} == {replica.health().version}
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


# --- tensor parallelism ---


@pytest.fixture(scope="module")
def untied(warm_tiny_model, tokenizer, tmp_path_factory):
    """The folder of the model with a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    model = load(warm_tiny_model)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_two_shards_are_one_engine_and_end_with_it(ray_session, untied, prompts):
    pool = start_engine(untied, num_devices=2)
    try:
        model, updater = load(untied), make_updater(pool, prompts, probe_frequency=1)
        assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
        updater.verify_start(model)
        for seed in range(2):
            change(model, seed)
            assert updater.push_weights(model)["weights/probe_diff"] < 1e-3
            assert_greedy(pool, prompts[:8], model, version=seed + 1)
        sampling = Sampling(max_tokens=20, num_samples=2)
        first, other = (pool.sample(prompts, sampling, seed=seed) for seed in (1, 2))
        assert pool.sample(prompts, sampling, seed=1) == first != other
        workers = shards()
        assert len(workers) == 2
    finally:
        ray.kill(pool.actors[0])
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert len(gone) == 2
    assert not alive


def shards():
    """The processes of vLLM's workers that descend from this one."""
    return [process for process in psutil.Process().children(recursive=True) if "Worker_TP" in process.name()]


# --- adapters alone ---


def test_adapters_alone_are_served_and_a_version_never_meets_anothers_cache(
    ray_session, warm_tiny_model, prompts, make_cfg
):
    lora = make_cfg("train_model.lora.enabled=true", "train_model.lora.r=4").train_model.lora
    pool = start_engine(warm_tiny_model, lora=lora)
    policy = add_adapters(load(warm_tiny_model), lora, seed=1)
    updater = make_updater(pool, prompts, adapters_only=True, probe_frequency=1)
    updater.verify_start(policy)
    # The cache holds whole blocks, on a CPU of 128 tokens.
    long_prompts = [prompts[number] * 8 for number in range(3)]
    assert min(map(len, long_prompts)) > 256
    for version in range(1, 4):
        change(policy, seed=version, only="lora_")
        assert updater.push_weights(policy)["weights/probe_diff"] < 1e-3
        assert_greedy(pool, long_prompts, policy, version)
    ray.kill(pool.actors[0])


def assert_greedy(pool, prompts, model, version):
    """The engine says what Hugging Face's generation says, and of which version it is."""
    groups = pool.sample(prompts, Sampling(max_tokens=8, temperature=0.0), seed=0)
    for ids, (completion,) in zip(prompts, groups, strict=True):
        output = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False)
        assert output[0, len(ids) :].tolist()[: len(completion.token_ids)] == completion.token_ids
        assert completion.policy_version == version


def test_a_rank_that_vllm_does_not_serve_is_refused(make_cfg):
    lora = make_cfg("train_model.lora.enabled=true", "train_model.lora.r=600").train_model.lora
    with pytest.raises(UserError, match=r"train_model\.lora\.r \(600\) is above what vLLM serves \(512\)"):
        _adapter_options(lora)
    lora.r = 9
    assert _adapter_options(lora)["max_lora_rank"] == 16
