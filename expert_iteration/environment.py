"""The chat environment: prompts are drawn, each is repeated into a group, responses are scored.

TorchRL's `DatasetChatEnv` in text mode with two parts of ours: the stream of prompts, which gives each group its
identity (`prompt_stream.py`), and the transform that has responses judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch.utils.data import DataLoader
from torchrl.data import Binary, Composite, Unbounded
from torchrl.envs.llm import DatasetChatEnv
from torchrl.envs.transforms import Transform

from expert_iteration.judging import Judge
from expert_iteration.prompt_stream import PromptStream
from expert_iteration.tasks import Problem, Task


class TaskReward(Transform):
    """Has responses judged and ends the dialog after its one turn.

    Writes `reward` (float32, `[num_envs, 1]`) and `correct` (bool, `[num_envs, 1]`), and sets `done` and `terminated`.
    """

    def __init__(self, problems: Sequence[Problem], judge: Judge) -> None:
        super().__init__(in_keys=[("text", "response"), "prompt_index"], out_keys=["reward", "correct"])
        self._problems = problems
        self._judge = judge

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        rows = tensordict.unbind(0)
        problems = [self._problems[int(row["prompt_index"])] for row in rows]
        judgements = self._judge(problems, [row["text", "response"] for row in rows])
        reward = torch.tensor([judgement.reward for judgement in judgements], dtype=torch.float32).unsqueeze(-1)
        correct = torch.tensor([judgement.correct for judgement in judgements]).unsqueeze(-1)
        done = torch.ones_like(correct)
        next_tensordict.set("reward", reward).set("correct", correct)
        return next_tensordict.set("done", done).set("terminated", done.clone())

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """Whether a response is right."""
        observation_spec["correct"] = Binary(shape=(*self.parent.batch_size, 1), dtype=torch.bool)
        return observation_spec

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """One unbounded reward a response."""
        reward_spec["reward"] = Unbounded(shape=(*self.parent.batch_size, 1), dtype=torch.float32)
        return reward_spec


def make_task_env(
    task: Task, tokenizer: Any, prompts: PromptStream, judge: Judge, *, num_envs: int, repeats: int
) -> DatasetChatEnv:
    """The environment of a task: `num_envs` dialogs at once, `repeats` of each of the prompts.

    Text mode: TorchRL's history mode spends three times vLLM's own time on copying chat objects (256 responses of 18
    tokens), and its tokens mode cannot hold prompts of different lengths.
    """
    # The environment repeats and batches by itself, so the loader hands out single prompts.
    loader = DataLoader(prompts, batch_size=1, collate_fn=_collate)
    env = DatasetChatEnv.from_dataloader(
        loader,
        repeats=repeats,
        batch_size=(num_envs,),
        tokenizer=tokenizer,
        system_prompt=task.system_prompt,
        # TorchRL would otherwise guess a template from the tokenizer's name, and for Qwen pick one of its own.
        template_kwargs={"chat_template": tokenizer.chat_template},
        input_mode="text",
    )
    return env.append_transform(TaskReward(task.train, judge))


def _collate(items: list[dict[str, Any]]) -> TensorDict:
    return TensorDict(
        query=[item["query"] for item in items],
        prompt_index=torch.tensor([item["prompt_index"] for item in items]),
        group_id=torch.tensor([item["group_id"] for item in items]),
        batch_size=[len(items)],
    )
