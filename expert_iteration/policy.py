"""The policy that the collector steps: text prompts in, sampled tokens out, from an inference engine."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from expert_iteration.engine import Completion, Sampling
from expert_iteration.engine_client import EnginePool
from expert_iteration.seeds import derive_seed


class EnginePolicy(TensorDictModuleBase):
    """Samples a response to each prompt and keeps what the engine says of it.

    Reads `("text", "prompt")`. Writes, a row: `("tokens", "prompt" | "response" | "full")` int64, the ids that were
    sampled from and sampled, end-of-turn token included; `("masks", "all_assistant_mask")` bool over `full`, true on
    the response; `("text", "response")` without special tokens, and `("text", "full")`; `finish_reason`;
    `policy_version`, the version of the weights that made the response.

    It stands in for TorchRL's `vLLMWrapper`, which in text mode drops the prompt's ids, the weight version and the
    finish reason, and which needs vLLM in the collector's process.

    Args:
        engine: where to sample.
        tokenizer: of the model; prompts carry its chat template already.
        sampling: how to sample.
        seed: of the run; every call draws from a random state of its own.
        keep_stop_token: whether the end-of-turn token belongs to the response that is trained.

    Attributes:
        calls: of the engine so far, which give each its random state.
    """

    in_keys = (("text", "prompt"),)
    out_keys = (
        ("tokens", "prompt"),
        ("tokens", "response"),
        ("tokens", "full"),
        ("masks", "all_assistant_mask"),
        ("text", "response"),
        ("text", "full"),
        "finish_reason",
        "policy_version",
    )

    def __init__(
        self, engine: EnginePool, tokenizer: Any, sampling: Sampling, *, seed: int, keep_stop_token: bool = True
    ) -> None:
        super().__init__()
        self._engine = engine
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._seed = seed
        self._keep_stop_token = keep_stop_token
        self.calls = 0

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Fill in the responses, in place."""
        rows = tensordict.unbind(0)
        prompts = [row["text", "prompt"] for row in rows]
        prompt_ids = self._tokenize(prompts)
        seed = derive_seed(self._seed, "rollout", self.calls)
        self.calls += 1
        groups = self._engine.sample(prompt_ids, self._sampling, seed)
        responses = [self._response_ids(completion) for (completion,) in groups]
        texts = self._tokenizer.batch_decode(responses, skip_special_tokens=True)
        for row, prompt, ids, response, text, (completion,) in zip(
            rows, prompts, prompt_ids, responses, texts, groups, strict=True
        ):
            full = torch.tensor(ids + response)
            row["tokens", "full"] = full
            row["tokens", "prompt"], row["tokens", "response"] = full[: len(ids)], full[len(ids) :]
            row["masks", "all_assistant_mask"] = torch.arange(len(full)) >= len(ids)
            row["text", "response"], row["text", "full"] = text, prompt + text
            row["finish_reason"] = completion.finish_reason
            row["policy_version"] = torch.tensor(completion.policy_version)
        return tensordict

    def _tokenize(self, prompts: list[str]) -> list[list[int]]:
        """Each distinct prompt is tokenized once; a group shares it."""
        distinct = list(dict.fromkeys(prompts))
        # The chat template has written the special tokens already.
        ids = self._tokenizer(distinct, add_special_tokens=False)["input_ids"]
        by_text = dict(zip(distinct, ids, strict=True))
        return [by_text[prompt] for prompt in prompts]

    def _response_ids(self, completion: Completion) -> list[int]:
        if completion.finish_reason == "stop" and not self._keep_stop_token:
            return completion.token_ids[:-1]
        return completion.token_ids
