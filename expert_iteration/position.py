"""Where the loops of a script stand, as far as none of its collaborators knows: what a checkpoint says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Position:
    """A script begins with a new one; a resumed run with the one that its checkpoint holds.

    Attributes:
        pushed_at: optimizer steps made when weights were last pushed.
        epoch: sync mode: passes made over the buffer since the batch at work was collected.
        responses_kept: async mode: of the batches that the trainer knows of.
        owed: async mode: gradient steps that were owed, all in all, after each of these batches.
    """

    pushed_at: int = 0
    epoch: int = 0
    responses_kept: int = 0
    owed: list[int] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """As plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        for name, value in state.items():
            setattr(self, name, list(value) if isinstance(value, list) else value)
