"""Turns on an accelerator that trainer and engine share where they never work at the same time.

Each then has nearly all of its memory in turn: the engine sleeps while the trainer works (its weights move to host
memory, its cache is dropped) and wakes by itself when it is used, for which the trainer's allocator must have given its
free memory back before.
"""

from __future__ import annotations

from typing import Protocol


class Sleeper(Protocol):
    """The engines' client."""

    def sleep(self) -> None:
        """See `Engine.sleep`."""
        ...


class Turns:
    """Whose turn it is. To be told, in the training process, before anything uses the engine or trains.

    Args:
        engine: sleeps while it is the trainer's turn; None: they share nothing, and a turn does nothing.
    """

    def __init__(self, engine: Sleeper | None = None) -> None:
        self._engine = engine
        self._engine_has_it = True  # it has just loaded its model

    def to_engine(self) -> None:
        """The engine is about to be used, by this process or another."""
        if self._engine is not None and not self._engine_has_it:
            import torch

            torch.cuda.empty_cache()
            self._engine_has_it = True

    def to_trainer(self) -> None:
        """The trainer is about to work; nobody uses the engine until its next turn."""
        if self._engine is not None and self._engine_has_it:
            self._engine.sleep()
            self._engine_has_it = False
