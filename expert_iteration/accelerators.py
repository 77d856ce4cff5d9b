"""The accelerators that this process may use, and how much memory there is. Asks NVIDIA's driver library, not torch."""

import ctypes
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import psutil

from expert_iteration.config import Config, is_local


class MemorySizes(NamedTuple):
    """Bytes of a host's memory, and of each accelerator's; None: unknown, as in a cluster."""

    host: int | None
    accelerators: list[int] | None


def memory_sizes(cfg: Config) -> MemorySizes:
    """The memory that the run's models have, as far as the driver knows: those of a Ray cluster may be elsewhere."""
    return own_memory_sizes() if is_local(cfg) else MemorySizes(None, None)


def own_memory_sizes() -> MemorySizes:
    """The memory of the host on which this process is, and of the accelerators that it may use."""
    return MemorySizes(psutil.virtual_memory().total, accelerator_memory())


def count_accelerators(environ: Mapping[str, str] = os.environ) -> int:
    """Accelerators that this process may use, without importing torch (seconds) or starting CUDA.

    `CUDA_VISIBLE_DEVICES` restricts them as it does for CUDA: by index or unique id, cut off at the first that is not.
    """
    return len(_visible(_count_installed(), environ))


def accelerator_memory(environ: Mapping[str, str] = os.environ) -> list[int] | None:
    """Bytes of memory of each accelerator that `count_accelerators` counts; None where the driver does not tell.

    The driver numbers accelerators by their place on the bus and CUDA by their speed, so with different ones in a
    machine an index of `CUDA_VISIBLE_DEVICES` may mean another one here.
    """
    visible = _visible(_count_installed(), environ)
    if not visible:
        return []
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    nvml.nvmlInit_v2()
    try:
        sizes = [_memory_of(nvml, entry) for entry in visible]
    finally:
        nvml.nvmlShutdown()
    known = [size for size in sizes if size is not None]
    return known if len(known) == len(sizes) else None


def _visible(installed: int, environ: Mapping[str, str]) -> list[str]:
    """Index or unique id of each accelerator that CUDA would show."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None or installed == 0:
        return [str(index) for index in range(installed)]
    visible = []
    for entry in (part.strip() for part in listed.split(",")):
        is_unique_id = entry.startswith(("GPU-", "MIG-"))
        if not is_unique_id and not (entry.isdecimal() and int(entry) < installed):
            break
        visible.append(entry)
    return visible


def _count_installed() -> int:
    """Accelerators according to NVIDIA's driver library, 0 where it is missing or refuses to start."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return 0
    nvml.nvmlShutdown()
    return count.value


class _NvmlMemory(ctypes.Structure):
    """`nvmlMemory_t`."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _memory_of(nvml: Any, entry: str) -> int | None:
    """Total bytes of one accelerator, or None: CUDA takes the beginning of a unique id, the driver only the whole."""
    handle, memory = ctypes.c_void_p(), _NvmlMemory()
    if entry.isdecimal():
        status = nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(entry)), ctypes.byref(handle))
    else:
        status = nvml.nvmlDeviceGetHandleByUUID(entry.encode(), ctypes.byref(handle))
    if status != 0 or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return None
    return memory.total
