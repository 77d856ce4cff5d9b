"""What each selection rule keeps of GSM8K's groups, from hardly any right response to hardly any wrong one: a table.

    python extras/benchmarks/selection_rules.py [--groups 500] [--repeats 32] [--topk 4] [--seed 0]

Responses are simulated as texts and scored by the suite's own rewards, groups are judged by its own selector. At a pass
rate p a response states the right number with probability p, whatever its form: 80 % are well-formed (a thought and a
number in `<answer>`), 10 % have no thought, and 10 % name the number outside the tag. They have 200 to 1,200
characters. Each cell: responses kept of a group / share of groups of which nothing is kept / share of the kept that are
wrong. The last column is the share of the kept, at one pass rate, that are not well-formed.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tensordict import TensorDict

from expert_iteration import rewards
from expert_iteration.reward_registry import load_built_in
from expert_iteration.selection import TopKRewardSelector
from expert_iteration.tasks import Problem

PASS_RATES = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
FORM_AT = 0.6  # the pass rate of the last column
REWARDS = ("gsm8k", "gsm8k_granular", "gsm8k_granular_brief")
RULES = {
    "above_median": {"selection": "above_median"},
    "topk": {"selection": "topk"},
    "topk, min_reward=0.5": {"selection": "topk", "min_reward": 0.5},
    "threshold": {"selection": "threshold", "threshold": 1.0},
}
PROBLEM = Problem("", "#### 72")
FORMS = ("<think>{thought}</think><answer>{number}</answer>", "{thought}<answer>{number}</answer>", "{thought}{number}")
FORM_SHARES = (0.8, 0.1, 0.1)


def draw_response(pass_rate: float, rng: random.Random) -> str:
    """A response as the head of this file describes it."""
    number = 72 if rng.random() < pass_rate else rng.randint(1, 71)
    (form,) = rng.choices(FORMS, FORM_SHARES)
    return form.format(thought="so " * rng.randint(67, 400), number=number)


def judge(reward: str, responses: list[str], repeats: int) -> TensorDict:
    """Rows as the selector takes them: reward and rightness of each response, group by group."""
    problems, count = [PROBLEM] * len(responses), len(responses)
    totals = [rewards.total(scored) for scored in load_built_in(reward)(problems, responses)]
    correct = rewards.gsm8k_corrects(problems, responses)
    return TensorDict(
        {
            "group_id": torch.arange(count) // repeats,
            ("next", "reward"): torch.tensor(totals).unsqueeze(-1),
            ("next", "correct"): torch.tensor(correct).unsqueeze(-1),
            "well_formed": torch.tensor([rewards.has_thought_and_answer(response) for response in responses]),
            ("next", "done"): torch.ones(count, 1, dtype=torch.bool),
        },
        batch_size=[count],
    )


def measure(rows: TensorDict, rule: dict, repeats: int, topk: int) -> tuple[float, float, float, float]:
    """Of these groups under this rule: responses kept of one, shares lost, of the kept wrong, and not well-formed."""
    selector = TopKRewardSelector(repeats, topk, group_key="group_id", **rule)
    kept, stats = selector.select(rows), selector.stats()
    lost = 1 - stats["groups_kept"] / stats["groups_seen"]
    if kept is None:
        return 0.0, lost, 0.0, 0.0
    wrong, malformed = (1 - kept[key].float().mean().item() for key in (("next", "correct"), "well_formed"))
    return stats["responses_kept"] / stats["groups_seen"], lost, wrong, malformed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=32)
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    responses = {rate: [draw_response(rate, rng) for _ in range(args.groups * args.repeats)] for rate in PASS_RATES}
    print("| reward | rule |", " | ".join(f"{rate:.2f}" for rate in PASS_RATES), "| malformed |")
    print("|---|---|" + "---|" * (len(PASS_RATES) + 1))
    for reward in REWARDS:
        rows = {rate: judge(reward, responses[rate], args.repeats) for rate in PASS_RATES}
        for name, rule in RULES.items():
            figures = {rate: measure(rows[rate], rule, args.repeats, args.topk) for rate in PASS_RATES}
            cells = [f"{kept:.1f} / {lost:.0%} / {wrong:.0%}" for kept, lost, wrong, _ in figures.values()]
            print(f"| `{reward}` | {name} |", " | ".join(cells), f"| {figures[FORM_AT][3]:.0%} |")


if __name__ == "__main__":
    main()
