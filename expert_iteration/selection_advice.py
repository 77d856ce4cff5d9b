"""What to change where selection keeps too little, which depends on the rule in use."""

FINER = (
    "a finer reward, more env.repeats, a higher inference_model.temperature or prompts of another difficulty tell "
    "responses apart"
)
WITHIN_GROUPS = f"where all responses to a prompt have the same reward there is no best: {FINER}"
ADVICE = {
    "above_median": f"{WITHIN_GROUPS}; where most are right, train.selection=topk or threshold with train.min_reward "
    "keeps the right ones",
    "topk": f"{WITHIN_GROUPS}; where all are right, train.selection=threshold keeps some",
    "threshold": "a lower train.selection_threshold, easier prompts or a stronger model.name keep more",
    "percentile": "of a group that does worse than the rest of its batch nothing is kept: a lower "
    "train.selection_percentile or train.selection_percentile_end keeps more",
    "random": f"as many are drawn as above_median would keep, and {WITHIN_GROUPS}",
}


def advise(selection: str | None, min_reward: float | None) -> str:
    """Remedies, in one sentence without its end.

    Args:
        selection: `train.selection`; None, or another than there are now: the run does not say.
        min_reward: `train.min_reward`.
    """
    advice = ADVICE.get(str(selection), WITHIN_GROUPS)
    if min_reward is None:
        return advice
    return f"{advice}; a lower train.min_reward (now {min_reward:g}) keeps more"
