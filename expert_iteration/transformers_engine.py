"""Hugging Face's own generation behind the engines' interface: for machines without vLLM, and for quick tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from expert_iteration.chat_template import load_tokenizer, stop_token_ids
from expert_iteration.config import InferenceModelConfig, LoraConfig
from expert_iteration.engine import Completion, Engine, OfferedWeights, Sampling
from expert_iteration.models import context_length, load_model
from expert_iteration.scorer import ReferenceScorer

PAD = 0  # any id does, for padding is masked


class TransformersEngine(Engine):
    """A Hugging Face model that generates in this process.

    Args:
        model_path: a local folder or hub id.
        config: the `inference_model` section; what concerns vLLM's memory and compilation has no effect here.
        batch_size: sequences that are generated at once; what bounds the memory.
        device: a torch device.
        trust_remote_code: whether code that comes with the model may run.
        chat_template: as `model.chat_template`; it says which token ends a turn.
        lora: the adapters, where offered weights are adapters alone; None: offered weights are the model's.
    """

    def __init__(
        self,
        model_path: str,
        config: InferenceModelConfig,
        *,
        batch_size: int,
        device: str = "cpu",
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        lora: LoraConfig | None = None,
    ) -> None:
        super().__init__()
        from transformers import GenerationConfig

        tokenizer = load_tokenizer(model_path, trust_remote_code, chat_template)
        self._max_length = context_length(model_path, config.max_model_len, trust_remote_code)
        self._batch_size = batch_size
        self._model = load_model(
            model_path,
            dtype=config.torch_dtype.value,
            attn_implementation=config.attn_implementation,
            device=device,
            trust_remote_code=trust_remote_code,
            section="inference_model",
        )
        self._stop_token_ids = stop_token_ids(tokenizer, self._model.generation_config.eos_token_id)
        # `generate` takes from here what a call leaves open: the publisher's taste, such as a repetition penalty.
        self._model.generation_config = GenerationConfig()
        self._offered = self._model.state_dict() if lora is None else _add_adapters(self._model, lora)
        self._scorer = ReferenceScorer(self._model, pad_token_id=PAD, micro_batch_size=batch_size)

    @torch.inference_mode()
    def _sample(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[list[Completion]]:
        torch.manual_seed(seed)
        rows = [ids for ids in prompts for _ in range(sampling.num_samples)]
        # Rows of like length share a batch, so that little of it is padding.
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self._batch_size):
            indices = order[start : start + self._batch_size]
            batch = self._sample_batch([rows[index] for index in indices], sampling)
            completions.update(zip(indices, batch, strict=True))
        samples = sampling.num_samples
        return [
            [completions[index] for index in range(start, start + samples)] for start in range(0, len(rows), samples)
        ]

    def _sample_batch(self, rows: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """One response to each row, which are sorted by length."""
        limits = [min(sampling.max_tokens, self._room_after(ids)) for ids in rows]
        width = len(rows[-1])
        input_ids = torch.tensor([[PAD] * (width - len(ids)) + list(ids) for ids in rows])
        attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows])
        output = self._model.generate(
            input_ids.to(self._model.device),
            attention_mask=attention_mask.to(self._model.device),
            max_new_tokens=max(limits),
            eos_token_id=self._stop_token_ids,
            pad_token_id=PAD,
            **_how_to_sample(sampling),
        )
        responses = zip(output[:, width:].tolist(), limits, strict=True)
        return [self._complete(ids[:limit]) for ids, limit in responses]

    def _room_after(self, prompt: Sequence[int]) -> int:
        """Tokens that a response may have, as in vLLM at least one."""
        room = self._max_length - len(prompt)
        if room < 1:
            raise ValueError(f"A prompt of {len(prompt)} tokens leaves no room in {self._max_length} (max_model_len).")
        return room

    def _complete(self, ids: list[int]) -> Completion:
        end = next((position for position, token in enumerate(ids) if token in self._stop_token_ids), None)
        if end is None:
            return Completion(ids, "length", self._version)
        return Completion(ids[: end + 1], "stop", self._version)  # what comes after is padding

    def _score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return [row.tolist() for row in self._scorer.score([torch.tensor(ids) for ids in sequences])]

    def _load(self, weights: OfferedWeights, version: int) -> None:
        weights.get().copy_to(self._offered)


def _how_to_sample(sampling: Sampling) -> dict[str, float | int | bool]:
    """The arguments of `generate`, each named: its defaults are not vLLM's (top_k is 50)."""
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}


def _add_adapters(model: nn.Module, lora: LoraConfig) -> Mapping[str, torch.Tensor]:
    """Put adapters into a model, which do nothing until they are loaded; returns their tensors by PEFT's names."""
    from expert_iteration.lora import adapter_state_dict, add_adapters

    return adapter_state_dict(add_adapters(model, lora, seed=0))
