"""The chat environment: prompts are drawn, each is repeated into a group, responses are scored.

TorchRL's `DatasetChatEnv` in text mode with two parts of ours: the stream of prompts, which gives each group its
identity, and the reward transform.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch.utils.data import DataLoader, IterableDataset
from torchrl.data import Composite, Unbounded
from torchrl.envs.llm import DatasetChatEnv
from torchrl.envs.transforms import Transform

from expert_iteration.seeds import derive_seed
from expert_iteration.tasks import Problem, RewardFn, Task


class PromptStream(IterableDataset):
    """Endless prompts: every problem once an epoch, in a new order each epoch.

    Yields `query` (str), `prompt_index` (the row in `problems`) and `group_id`, which counts the draws: a problem drawn
    again is a new group.

    Args:
        problems: what is drawn from.
        seed: of the orders.
        first_group: draws to leave out, which an earlier run has made.
    """

    def __init__(self, problems: Sequence[Problem], seed: int, first_group: int = 0) -> None:
        self._problems = problems
        self._seed = seed
        self._first_group = first_group

    def __iter__(self) -> Iterator[dict[str, Any]]:
        group_id = self._first_group
        epoch, start = divmod(group_id, len(self._problems))
        while True:
            generator = torch.Generator().manual_seed(derive_seed(self._seed, "prompts", epoch))
            for index in torch.randperm(len(self._problems), generator=generator).tolist()[start:]:
                yield {"query": self._problems[index].question, "prompt_index": index, "group_id": group_id}
                group_id += 1
            epoch, start = epoch + 1, 0


class TaskReward(Transform):
    """Scores responses with the task's reward and ends the dialog after its one turn.

    Writes `reward` (float32, `[num_envs, 1]`) and sets `done` and `terminated`.
    """

    def __init__(self, problems: Sequence[Problem], reward: RewardFn) -> None:
        super().__init__(in_keys=[("text", "response"), "prompt_index"], out_keys=["reward"])
        self._problems = problems
        self._reward = reward

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        rows = tensordict.unbind(0)
        problems = [self._problems[int(row["prompt_index"])] for row in rows]
        rewards = self._reward(problems, [row["text", "response"] for row in rows])
        reward = torch.tensor(rewards, dtype=torch.float32).unsqueeze(-1)
        done = torch.ones_like(reward, dtype=torch.bool)
        return next_tensordict.set("reward", reward).set("done", done).set("terminated", done.clone())

    def transform_reward_spec(self, reward_spec: Composite) -> Composite:
        """One unbounded reward a response."""
        reward_spec["reward"] = Unbounded(shape=(*self.parent.batch_size, 1), dtype=torch.float32)
        return reward_spec


def make_task_env(
    task: Task, tokenizer: Any, *, num_envs: int, repeats: int, seed: int, first_group: int = 0
) -> DatasetChatEnv:
    """The environment of a task: `num_envs` dialogs at once, `repeats` of each prompt, from the `first_group`-th on.

    Text mode: TorchRL's history mode spends three times vLLM's own time on copying chat objects (256 responses of 18
    tokens), and its tokens mode cannot hold prompts of different lengths.
    """
    # The environment repeats and batches by itself, so the loader hands out single prompts.
    loader = DataLoader(PromptStream(task.train, seed, first_group), batch_size=1, collate_fn=_collate)
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
    return env.append_transform(TaskReward(task.train, task.reward))


def _collate(items: list[dict[str, Any]]) -> TensorDict:
    return TensorDict(
        query=[item["query"] for item in items],
        prompt_index=torch.tensor([item["prompt_index"] for item in items]),
        group_id=torch.tensor([item["group_id"] for item in items]),
        batch_size=[len(items)],
    )
