"""A whole set of weights in one piece of host memory, and the ways in which that piece reaches another process.

One piece, because several hundred tensors take longer to hand over than their bytes; reused push after push, because
a second copy of a large model is what a host may have no room for.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

ALIGNMENT = 64  # bytes: a cache line, and more than any dtype needs


class PackedTensor(NamedTuple):
    """Where a tensor lies in the buffer."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int  # in bytes from the buffer's start
    tied_to: str | None  # the first name of the same memory, where it has several

    @property
    def num_bytes(self) -> int:
        """Its length in the buffer."""
        return self.shape.numel() * self.dtype.itemsize


class PackedWeights:
    """Tensors by name in one flat buffer.

    Args:
        layout: where each tensor lies; tied ones, which share their memory, lie at the same offset.
        buffer: uint8 [N] in host memory. Iterating yields views of it: (name, tensor).
    """

    def __init__(self, layout: Sequence[PackedTensor], buffer: torch.Tensor) -> None:
        self.layout = tuple(layout)
        self.buffer = buffer

    @classmethod
    def allocate(cls, weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> PackedWeights:
        """A buffer with room for these weights, whose values are not copied yet.

        Args:
            weights: a tensor is looked at only until the next is asked for.
            dtype: in which floating-point weights are packed; others keep theirs.
        """
        layout: dict[str, PackedTensor] = {}
        ties = _Ties()
        end = 0
        for name, tensor in weights:
            tied_to = ties.find(name, tensor)
            offset = end if tied_to is None else layout[tied_to].offset
            packed_dtype = dtype if tensor.is_floating_point() else tensor.dtype
            layout[name] = PackedTensor(name, tensor.shape, packed_dtype, offset, tied_to)
            if tied_to is None:
                end += -(-layout[name].num_bytes // ALIGNMENT) * ALIGNMENT
        # Pinned, so that accelerators copy at full speed.
        return cls(list(layout.values()), torch.empty(end, dtype=torch.uint8, pin_memory=torch.cuda.is_available()))

    @property
    def names(self) -> frozenset[str]:
        """Of all tensors."""
        return frozenset(entry.name for entry in self.layout)

    @property
    def num_bytes(self) -> int:
        """Length of the buffer."""
        return self.buffer.numel()

    def pack(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy weights into the buffer, cast to its dtypes on the way.

        Args:
            weights: in the order, shapes and ties of those that it was allocated for; a tensor may be gone once the
                next is asked for.

        Raises:
            RuntimeError: they differ.
        """
        ties = _Ties()
        entries = iter(self.layout)
        for name, tensor in weights:
            entry = next(entries, None)
            found = name, tensor.shape, ties.find(name, tensor)
            expected = None if entry is None else (entry.name, entry.shape, entry.tied_to)
            if entry is None or found != expected:
                raise _changed(expected, found)
            if entry.tied_to is None:
                self._view(entry).copy_(tensor)
        left = next(entries, None)
        if left is not None:
            raise _changed((left.name, left.shape, left.tied_to), None)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((entry.name, self._view(entry)) for entry in self.layout)

    def get(self) -> PackedWeights:
        """Itself, for an engine in this process; the next `pack` changes what it holds."""
        return self

    @torch.no_grad()
    def copy_to(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Copy the weights into tensors of the same names.

        Raises:
            RuntimeError: names or shapes differ; nothing is copied then.
        """
        shapes = {entry.name: entry.shape for entry in self.layout}
        unknown, missing = sorted(shapes.keys() - targets.keys()), sorted(targets.keys() - shapes.keys())
        reshaped = [name for name, shape in shapes.items() if name in targets and targets[name].shape != shape]
        if unknown or missing or reshaped:
            raise RuntimeError(
                f"These weights are not the model's: unknown {unknown}, missing {missing}, of another shape {reshaped}."
            )
        for name, tensor in self:
            targets[name].copy_(tensor)

    def save(self, path: Path) -> None:
        """Write them as a safetensors file: the buffer as one tensor, and where each tensor lies as its metadata."""
        from safetensors.torch import save_file

        layout = [
            (entry.name, list(entry.shape), str(entry.dtype).removeprefix("torch."), entry.offset, entry.tied_to)
            for entry in self.layout
        ]
        save_file({"buffer": self.buffer}, path, metadata={"layout": json.dumps(layout)})

    @classmethod
    def load(cls, path: Path) -> PackedWeights:
        """What `save` wrote, mapped into memory."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            layout = json.loads(file.metadata()["layout"])
            buffer = file.get_tensor("buffer")
        return cls([_entry(*fields) for fields in layout], buffer)

    def _view(self, entry: PackedTensor) -> torch.Tensor:
        flat = self.buffer[entry.offset : entry.offset + entry.num_bytes]
        return flat.view(entry.dtype).view(entry.shape)


def _entry(name: str, shape: list[int], dtype: str, offset: int, tied_to: str | None) -> PackedTensor:
    return PackedTensor(name, torch.Size(shape), getattr(torch, dtype), offset, tied_to)


_Seen = tuple[str, torch.Size, str | None]  # a tensor's name, its shape, and what it is tied to


def _changed(expected: _Seen | None, found: _Seen | None) -> RuntimeError:
    def describe(seen: _Seen | None) -> str:
        if seen is None:
            return "nothing more"
        name, shape, tied_to = seen
        return f"{name} {list(shape)}" + (f", tied to {tied_to}," if tied_to else "")

    return RuntimeError(
        f"The weights are not those of the first push: {describe(expected)} was expected, {describe(found)} came."
    )


class _Ties:
    """Finds tensors that share their memory among those of one pass, also where they are temporary.

    Addresses would not do: a freed tensor's is given to the next. A weak reference keeps the storage's identity.
    """

    def __init__(self) -> None:
        self._first: dict[tuple[Any, ...], str] = {}

    def find(self, name: str, tensor: torch.Tensor) -> str | None:
        """The first name under which the same memory came; None when it is new."""
        identity = StorageWeakRef(tensor.untyped_storage()), tensor.storage_offset(), tensor.shape, tensor.stride()
        first = self._first.setdefault(identity, name)
        return None if first == name else first


@dataclass(frozen=True)
class ObjectStoreWeights:
    """Weights in Ray's object store, which hands every process on a host the same memory and moves it between hosts."""

    layout: tuple[PackedTensor, ...]
    reference: Any  # a ray.ObjectRef; the store frees the memory when the last holder drops it

    @classmethod
    def put(cls, weights: PackedWeights) -> ObjectStoreWeights:
        """Copy the weights into the store."""
        import ray

        return cls(weights.layout, ray.put(weights.buffer.numpy()))

    def get(self) -> PackedWeights:
        """The weights as views of the store's memory, which is read-only."""
        import ray

        array = ray.get(self.reference)
        with warnings.catch_warnings():
            # Whoever loads weights copies them, so nobody writes.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return PackedWeights(self.layout, torch.from_numpy(array))


@dataclass(frozen=True)
class FileWeights:
    """Weights in a file that a process of the same host maps into its memory."""

    layout: tuple[PackedTensor, ...]
    path: str
    num_bytes: int

    def get(self) -> PackedWeights:
        """The weights as views of the mapped file."""
        return PackedWeights(self.layout, torch.from_file(self.path, size=self.num_bytes, dtype=torch.uint8))


@contextmanager
def in_memory_file(weights: PackedWeights) -> Iterator[FileWeights]:
    """Weights in a file without a name, for this process's children, while the body runs.

    It lies in memory (Linux's memfd), so `/dev/shm`, which containers often keep small, needs no room; and it is gone
    with this process, also when that is killed.
    """
    descriptor = os.memfd_create("weights")
    try:
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
        torch.from_file(path, shared=True, size=weights.num_bytes, dtype=torch.uint8).copy_(weights.buffer)
        yield FileWeights(weights.layout, path, weights.num_bytes)
    finally:
        os.close(descriptor)
