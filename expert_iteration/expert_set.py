"""The expert set: every response that was kept, as a data set of its own that others can load.

A Parquet file for each batch that kept something, named after the batch, so that a batch collected again replaces its
own. `datasets.load_dataset("parquet", data_dir="<run directory>/expert_set")` loads them all; so does
`train.from_expert_set` (`expert_set_reader.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pyarrow.parquet

from expert_iteration.checkpoint_files import replacing
from expert_iteration.errors import UserError
from expert_iteration.row_keys import rows_by_group

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from expert_iteration.tasks import Task

# Declared, because types found out from each file's rows would differ between files: of a column with nothing but
# nulls, or integers where others have fractions.
SCHEMA = pyarrow.schema(
    {
        "prompt": pyarrow.string(),  # the question, without the chat template
        "system_prompt": pyarrow.string(),  # null: none
        "response": pyarrow.string(),  # without special tokens
        "answer": pyarrow.string(),  # ground truth in the data set's own form, "" where there is none
        "reward": pyarrow.float32(),
        "rank": pyarrow.int32(),  # in its group by reward: 1 for the best, equal rewards share the better rank
        "group_size": pyarrow.int32(),
        "group_pass_rate": pyarrow.float32(),  # share of the group's responses that the task calls correct
        "correct": pyarrow.bool_(),
        "group_id": pyarrow.int64(),
        "prompt_index": pyarrow.int64(),  # the row of the task's training problems
        "policy_version": pyarrow.int64(),  # of the weights that made the response
        "iteration": pyarrow.int64(),  # the batch, from 1
        "finish_reason": pyarrow.string(),  # stop, or length where the response was cut short
    }
)
# As sampled from and sampled; the end-of-turn token is in it with inference_model.include_stop_str_in_output.
TOKEN_COLUMNS = {"prompt_token_ids": ("tokens", "prompt"), "response_token_ids": ("tokens", "response")}

Record = dict[str, Any]


class ExpertSetWriter:
    """Writes what a batch kept, with what is known of its groups.

    Args:
        folder: where the files go; made when there is something to write.
        task: of the responses.
        token_ids: whether token ids are written beside the texts.
    """

    def __init__(self, folder: Path, task: Task, *, token_ids: bool) -> None:
        self._folder = folder
        self._task = task
        self._token_columns = TOKEN_COLUMNS if token_ids else {}
        lists = [(name, pyarrow.list_(pyarrow.int32())) for name in self._token_columns]
        self._schema = pyarrow.schema([*SCHEMA, *lists])

    def describe(self, batch: TensorDictBase, kept: TensorDictBase) -> list[Record]:
        """The kept rows as records of the set, without "iteration".

        Args:
            batch: rows of whole groups, as the environment made them.
            kept: those that selection chose, the same objects.
        """
        wanted = {int(row["group_id"]) for row in kept.unbind(0)}
        groups = [rows for number, rows in rows_by_group(batch).items() if number in wanted]
        # By identity: two responses of a group may have the same text.
        known = {id(row): facts for rows in groups for row, facts in self._judge(rows)}
        return [known[id(row)] | self._content(row) for row in kept.unbind(0)]

    def write(self, records: list[Record], batch: int) -> None:
        """Write the records of a batch, of which there is at least one, in place of what is there of that batch.

        Args:
            records: from `describe`.
            batch: its number in the run, from 1.

        Raises:
            UserError: the file could not be written, for instance on a full disk.
        """
        path = self._folder / f"batch_{batch:06d}.parquet"
        table = pyarrow.Table.from_pylist([{**record, "iteration": batch} for record in records], self._schema)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:  # whose name is hidden from whoever loads the folder meanwhile
                pyarrow.parquet.write_table(table, temporary)
        except OSError as error:
            raise UserError(
                f"{path} could not be written ({error.strerror or error}): make room and go on with resume_from, or "
                "set expert_set.save=false."
            ) from error

    def _judge(self, group: list[TensorDictBase]) -> Iterator[tuple[TensorDictBase, Record]]:
        """Each row of a group with what the group says of it."""
        correct = [row["next", "correct"].item() for row in group]
        rewards = [row["next", "reward"].item() for row in group]
        for row, reward, is_correct in zip(group, rewards, correct, strict=True):
            yield (
                row,
                {
                    "reward": reward,
                    "rank": 1 + sum(other > reward for other in rewards),
                    "group_size": len(group),
                    "group_pass_rate": sum(correct) / len(group),
                    "correct": is_correct,
                },
            )

    def _content(self, row: TensorDictBase) -> Record:
        index = int(row["prompt_index"])
        return {
            "prompt": row["query"],
            "system_prompt": self._task.system_prompt,
            "response": row["text", "response"],
            "answer": self._task.train[index].answer,
            "group_id": int(row["group_id"]),
            "prompt_index": index,
            "policy_version": int(row["policy_version"]),
            "finish_reason": row["finish_reason"],
            **{name: row[key].tolist() for name, key in self._token_columns.items()},
        }


def drop_shards_after(folder: Path, batch: int) -> None:
    """Remove what was written of later batches than this one, and what a crash left half written.

    Args:
        folder: of the set; nothing happens where there is none.
        batch: number of the last batch to stay, from 1; 0: none stays.
    """
    for path in folder.glob("batch_*.parquet"):
        if int(path.stem.removeprefix("batch_")) > batch:
            path.unlink()
    for path in folder.glob(".batch_*.tmp"):
        path.unlink()
