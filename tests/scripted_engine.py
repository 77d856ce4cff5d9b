"""An engine whose responses are scripted: shows what a run does with them, without waiting for a model to write."""

import torch

from expert_iteration import tiny
from expert_iteration.engine import AppliedUpdate, Completion, OfferReport
from expert_iteration.log_probs import token_log_probs

STYLES = ("untagged", "careful", "hasty", "hasty")  # of the responses of a group; "careful" alone is right


class ScriptedEngine:
    """Responds in the tiny task's styles, in turn, whatever it has learned; loads weights as a pool of one does."""

    names = ("engine",)

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.version, self.asked, self.samplings = model, tokenizer, 0, 0, set()
        problems = [*tiny.train_problems(), *tiny.heldout_problems()]
        self.combinations = {problem.question: problem.combination for problem in problems}

    def sample(self, prompts, sampling, seed):
        self.samplings.add(sampling)
        return [[self.respond(prompt) for _ in range(sampling.num_samples)] for prompt in prompts]

    def respond(self, prompt):
        question = self.tokenizer.decode(prompt).split("user\n")[1].split(tiny.END_OF_TURN)[0]
        text = tiny.respond(self.combinations[question], STYLES[self.asked % len(STYLES)]) + tiny.END_OF_TURN
        self.asked += 1
        return Completion(self.tokenizer(text)["input_ids"], "stop", self.version)

    def offer_weights(self, weights, version, probe, timeout):
        self.model.load_state_dict(dict(weights))
        self.version = version
        scores = None if probe is None else self.token_log_probs(probe)[0]
        return [OfferReport([AppliedUpdate(version, 0.0, 0.0, scores)], superseded=0)]

    def report(self):
        return [OfferReport([], superseded=0)]

    @torch.no_grad()
    def token_log_probs(self, sequences):
        rows = [torch.tensor([sequence]) for sequence in sequences]
        return [[token_log_probs(self.model, ids, torch.ones_like(ids))[0].tolist() for ids in rows]]
