"""What a row of the buffer consists of: one response to one prompt, by TensorDict keys."""

TOKENS_KEY = ("tokens", "full")  # int64 [T], prompt and response
RESPONSE_MASK_KEY = ("masks", "all_assistant_mask")  # bool [T], True on response tokens
IMPORTANCE_WEIGHT_KEY = "importance_weight"  # float32 [], in drawn rows, where prioritized sampling gives weights

# What the buffer keeps of a response. Everything else a rollout carries (the environment's next prompt, the flags of a
# dialog of one turn) stays behind.
STORED_KEYS = (
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
# What the loss, the learner and the metrics of a step read of a row; its texts above all stay in the buffer.
TRAINED_KEYS = (TOKENS_KEY, RESPONSE_MASK_KEY, ("next", "reward"), ("next", "ref_log_probs", "full"), "policy_version")
