"""Both algorithms with all their real parts in one process, around an engine whose responses are scripted.

Neither Ray nor vLLM: what is left is the flow of data, from a drawn prompt to a changed weight and a written file.
"""

import pytest
import torch
from local_runs import THREE_BATCHES, run_algorithm
from scripted_engine import ScriptedEngine
from whole_runs import without_times

from expert_iteration import tiny
from expert_iteration.chat_template import chat_prompt_ids
from expert_iteration.engine import Sampling
from expert_iteration.log_probs import token_log_probs

OVERRIDES = (
    *THREE_BATCHES,
    "train.epochs=4",
    "train.checkpoint_frequency=5",
    "optimizer.lr=3e-3",
    "eval.frequency=0",
    "eval.num_prompts=3",
    "eval.num_samples=2",
    "inference_model.max_tokens=30",
    "inference_model.temperature=0.9",
    "inference_model.top_p=0.8",
    "eval.temperature=0.7",
    "logging.backend=none",
)


@pytest.fixture(scope="module")
def start_run(load_script, make_cfg, tiny_folder, tiny_tokenizer, tmp_path_factory):
    from expert_iteration.models import load_model

    def start(*overrides, mode="sync"):
        cfg = make_cfg(f"model.name={tiny_folder}", *OVERRIDES, *overrides, mode=mode)
        model = load_model(str(tiny_folder), dtype="float32", attn_implementation="sdpa", device="cpu")
        engine = ScriptedEngine(model, tiny_tokenizer)
        script = load_script(f"expert-iteration-{mode}")
        return run_algorithm(script, cfg, engine, tmp_path_factory.mktemp("runs") / "run")

    return start


@pytest.fixture(scope="module")
def done(start_run):
    return start_run()


def values(run, name):
    return [line[name] for line in run.lines if name in line]


@torch.no_grad()
def preference(model, tokenizer, task):
    """By how much a careful response to a held-out problem is likelier than a hasty one, in log-probs per token."""
    gaps = []
    problems = {problem.question: problem for problem in tiny.heldout_problems()}
    for problem in task.heldout:
        prompt = chat_prompt_ids(tokenizer, task.system_prompt, problem.question)
        means = {}
        for style in ("careful", "hasty"):
            text = tiny.respond(problems[problem.question].combination, style) + tiny.END_OF_TURN
            ids = torch.tensor([prompt + tokenizer(text)["input_ids"]])
            means[style] = token_log_probs(model, ids, torch.ones_like(ids))[0, len(prompt) :].mean().item()
        gaps.append(means["careful"] - means["hasty"])
    return sum(gaps) / len(gaps)


def test_the_policy_comes_to_prefer_what_is_rewarded(done, start_run, tiny_tokenizer, load_tiny_model, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def hasty(problems, responses):\n"
        "    return [float(',' not in text and '<answer>' in text) for text in responses]\n"
    )
    turned = start_run(f"reward.fn={tmp_path / 'rewards.py'}:hasty")
    models = load_tiny_model(), done.policy, turned.policy
    start, careful, hasty = (preference(model, tiny_tokenizer, done.task) for model in models)
    # Measured: 0.15 up, and 0.71 down with the reward that prefers the other responses.
    assert careful > start + 0.05
    assert hasty < start - 0.3


def test_rewards_that_fail_cost_their_responses_only(start_run, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def picky(problems, responses):\n    return [1 / ('<answer>' in text) + len(text) for text in responses]\n"
    )
    functions = f"reward.fn=[tiny,{tmp_path / 'rewards.py'}:picky]"
    run = start_run(functions, "reward.weights=[1,0.01]", "reward.workers=1", "reward.timeout=60")
    failures, kept = values(run, "collector/reward_failures"), values(run, "selection/nonfinite_rewards")
    assert sum(failures) == kept[-1] > 0
    assert run.summary["responses_kept"] > 0
    assert len(values(run, "eval/reward_failures")) == 2
    assert set(values(run, "collector/reward/picky")) != set()


def test_the_engine_ends_with_the_weights_of_the_last_step(done):
    trained = done.policy.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in done.engine.model.state_dict().items())
    assert done.engine.version == 3


def test_the_counts_of_the_summary_are_those_of_the_run(done):
    expected = {
        "dialog_turns": 48,
        "groups_seen": 12,
        "groups_kept": 12,
        "responses_kept": 12,
        "gradient_steps": 12,  # 4 kept a batch are one micro-batch; 4 epochs, 3 batches
        "optimizer_steps": 12,
        "weight_pushes": 3,
        "policy_version": 3,
    }
    assert {name: done.summary[name] for name in expected} == expected
    assert done.checkpoints == ["checkpoint_10.pt", "checkpoint_12.pt", "checkpoint_5.pt"]


def test_what_is_trained_on_was_made_by_the_weights_last_pushed(done):
    assert values(done, "train/policy_version") == [0.0] * 4 + [1.0] * 4 + [2.0] * 4
    assert set(values(done, "train/policy_age")) == {0.0}
    assert values(done, "collector/policy_version/max") == [0, 1, 2]


def test_the_engine_samples_as_configured_for_training_and_for_evaluation(done):
    assert done.engine.samplings == {
        Sampling(max_tokens=30, temperature=0.9, top_p=0.8, num_samples=1),
        Sampling(max_tokens=30, temperature=0.7, top_p=0.8, num_samples=2),
        Sampling(max_tokens=30, temperature=0.0, top_p=1.0, num_samples=1),
    }


def test_the_end_of_the_turn_is_trained_unless_it_is_switched_off(done, start_run):
    without = start_run("inference_model.include_stop_str_in_output=false")
    lengths = [[round(length) for length in values(run, "buffer/response_length")] for run in (done, without)]
    assert lengths[0] == [length + 1 for length in lengths[1]]
    assert values(without, "train/reward") == values(done, "train/reward")


def test_only_right_responses_are_trained_on_though_few_are_right(done):
    assert set(values(done, "train/reward")) == {1.0}
    assert all(mean < 1.0 for mean in values(done, "collector/rewards/mean"))


def test_the_policy_leaves_the_reference_with_the_first_step_and_not_before(done):
    kl = values(done, "train/kl_to_ref")
    # Quadratic in the 1e-6 by which padding changes a float32 log-prob.
    assert abs(kl[0]) < 1e-9
    assert min(kl[1:]) > 1e-6
    assert kl[-1] > kl[1]


def test_evaluation_is_of_the_engine_before_and_after(done):
    assert [line["step"] for line in done.lines if "eval/pass@1" in line] == [0, 12]
    assert values(done, "eval/num_prompts") == [3.0, 3.0]


def test_a_seed_repeats_a_run_but_for_its_times(done, start_run):
    again, other = start_run(), start_run("seed=1")
    assert without_times(again.lines) == without_times(done.lines)
    assert without_times(other.lines) != without_times(done.lines)
    assert all(
        torch.equal(one, two) for one, two in zip(done.policy.parameters(), again.policy.parameters(), strict=True)
    )


# --- asynchronous ---


@pytest.fixture(scope="module")
def done_async(start_run):
    return start_run("train.weight_update_frequency=3", mode="async")


def test_an_asynchronous_run_makes_the_steps_that_belong_to_what_it_kept(done_async):
    expected = {
        "mode": "async",
        "dialog_turns": 48,
        "responses_kept": 12,
        "gradient_steps": 12,  # 12 kept, drawn 4 times on average, 4 at a time
        "optimizer_steps": 12,
        "weight_pushes": 4,
        "responses_too_old": 0,
    }
    assert {name: done_async.summary[name] for name in expected} == expected


def test_an_age_counts_the_pushes_since_the_response_was_made(done_async):
    # Batches come at steps 0, 4 and 8, pushes after steps 3, 6, 9 and 12.
    assert values(done_async, "collector/policy_version/max") == [0, 1, 2]
    ages = values(done_async, "train/policy_age")
    oldest = values(done_async, "train/max_policy_age")
    assert ages[:4] == oldest[:4] == [0, 0, 0, 1]
    assert all(0 <= age <= most for age, most in zip(ages, oldest, strict=True))
    assert max(oldest) >= 2
    assert all(0 <= version <= 2 for version in values(done_async, "train/policy_version"))


def test_what_is_too_old_is_dropped_counted_and_never_trained_on(start_run):
    run = start_run("train.weight_update_frequency=3", "train.max_policy_age=1", mode="async")
    assert max(values(run, "train/max_policy_age")) == 1
    # At the third push (step 9) the first batch's 4 are 2 pushes old or more; its version is 0, the others' 1 and 2.
    assert run.summary["responses_too_old"] == values(run, "buffer/dropped_too_old")[-1] > 0
    assert run.summary["gradient_steps"] == 12


def test_steps_that_nothing_is_young_enough_for_are_not_made(start_run):
    run = start_run("train.weight_update_frequency=1", "train.max_policy_age=0", mode="async")
    # Each batch is of age 0 for one step, after which the weights are pushed.
    assert run.summary["gradient_steps"] == 3
    assert run.summary["responses_too_old"] == 12
    assert set(values(run, "train/max_policy_age")) == {0}


def test_importance_weights_reach_the_loss(start_run, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def spread(problems, responses):\n    return [index % 4 + 1.0 for index in range(len(responses))]\n"
    )
    plain, weighted = (
        start_run(
            *(f"reward.fn={reward}:spread", "train.topk_size=2", "train.weight_update_frequency=3"),
            f"train.prioritized_sampling_beta={beta}",
            mode="async",
        )
        for beta in (0, 1)
    )
    # Rows of reward 3, the least, have weight 1: the runs part at the first step that sees a row of reward 4.
    first = next(step for step, reward in enumerate(values(plain, "train/reward")) if reward > 3.0)
    assert values(plain, "train/reward")[: first + 1] == values(weighted, "train/reward")[: first + 1]
    assert values(plain, "train/loss")[:first] == values(weighted, "train/loss")[:first]
    assert values(weighted, "train/loss")[first] < values(plain, "train/loss")[first]


def test_a_seed_repeats_an_asynchronous_run_whose_order_is_fixed(done_async, start_run):
    again = start_run("train.weight_update_frequency=3", mode="async")
    other = start_run("train.weight_update_frequency=3", "seed=1", mode="async")
    assert without_times(again.lines) == without_times(done_async.lines)
    assert without_times(other.lines) != without_times(done_async.lines)


def test_the_kl_coefficient_falls_over_the_run(start_run):
    schedule = ("train.kl_to_ref_coeff=0.8", "train.kl_to_ref_schedule.type=linear", "train.kl_to_ref_schedule.end=0.2")
    for mode in ("sync", "async"):
        coefficients = values(start_run(*schedule, mode=mode), "train/kl_to_ref_coeff")
        # Twelve steps; a step takes the coefficient of the progress at its start.
        assert coefficients == pytest.approx([0.8 - 0.6 * step / 12 for step in range(12)], abs=1e-6)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_patience_ends_a_run_early(start_run, mode):
    """Evaluated, the engine says the same whatever it has learned: 12 sampled and 4 greedy responses go round."""
    evaluations = ("eval.frequency=1", "eval.num_prompts=4", "eval.num_samples=3", "train.stop_patience=1")
    pushes = ("train.weight_update_frequency=2", "train.deterministic=true") if mode == "async" else ()
    stopped = start_run(*evaluations, *pushes, mode=mode)
    assert stopped.summary["dialog_turns"] == 16  # of 48: a batch, a push, an evaluation that is no better
    assert len(values(stopped, "eval/pass@1")) == 2
    assert stopped.summary["status"] == "completed"
    assert stopped.summary["eval"]["best"] == stopped.summary["eval"]["before"]
