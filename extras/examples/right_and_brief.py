"""A reward of one's own, for `extras/examples/questions.jsonl`: the right number, and few characters."""

import re


def right_and_brief(problems, responses):
    """A dictionary for each response: components, each a number or a pair of number and weight."""
    rewards = []
    for problem, response in zip(problems, responses, strict=True):
        found = re.search(r"<answer>(-?\d+)</answer>", response)
        right = found is not None and found[1] == problem.answer
        brief = len(response) <= problem.metadata["longest"]
        rewards.append({"right": float(right), "brief": (float(right and brief), 0.1)})
    return rewards
