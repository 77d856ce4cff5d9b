"""What a row of the buffer consists of: one response to one prompt, by TensorDict keys; and which rows are a group."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensordict import TensorDictBase

TOKENS_KEY = ("tokens", "full")  # int64 [T], prompt and response
RESPONSE_MASK_KEY = ("masks", "all_assistant_mask")  # bool [T], True on response tokens
REF_LOG_PROBS_KEY = ("next", "ref_log_probs", "full")  # float32 [T], 0 on prompt tokens
RESPONSE_ID_KEY = "response_id"  # int64 [], a running number over all kept responses of a run
IMPORTANCE_WEIGHT_KEY = "importance_weight"  # float32 [], in drawn rows, where prioritized sampling gives weights

# What the buffer keeps of a rollout. Everything else it carries (the environment's next prompt, the flags of a dialog
# of one turn) stays behind.
ROLLOUT_KEYS = (
    ("tokens", "prompt"),
    ("tokens", "response"),
    TOKENS_KEY,
    RESPONSE_MASK_KEY,
    ("text", "prompt"),
    ("text", "response"),
    ("next", "reward"),
    ("next", "done"),
    "finish_reason",
    "policy_version",
    "group_id",
    "prompt_index",
)
# What the buffer keeps of a response, besides the reference's log-probs where they come with it.
STORED_KEYS = (*ROLLOUT_KEYS, RESPONSE_ID_KEY)
# What the loss, the learner and the metrics of a step read of a row; its texts above all stay in the buffer.
TRAINED_KEYS = (
    TOKENS_KEY,
    RESPONSE_MASK_KEY,
    ("next", "reward"),
    REF_LOG_PROBS_KEY,
    "policy_version",
    RESPONSE_ID_KEY,
)


def rows_by_group(rows: TensorDictBase) -> dict[int, list[TensorDictBase]]:
    """The rows of each `group_id`, in the order in which the groups and their rows come."""
    groups: dict[int, list[TensorDictBase]] = {}
    for row in rows.unbind(0):
        groups.setdefault(int(row["group_id"]), []).append(row)
    return groups
