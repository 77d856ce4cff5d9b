"""Expert iteration for language models: the parts that `ei_utils.py` puts together."""

import os

# TorchRL's chat environments need lists of strings to become stacks, in every process (driver, actors, tasks).
# tensordict reads the variable when it is imported, and every process of a run imports this package first.
os.environ.setdefault("LIST_TO_STACK", "1")
