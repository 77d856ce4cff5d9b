"""The accelerators that this process may use, counted and measured without torch."""

import ctypes

import psutil
import pytest

from expert_iteration import accelerators
from expert_iteration.accelerators import (
    MemorySizes,
    accelerator_memory,
    count_accelerators,
    memory_sizes,
    own_memory_sizes,
)

GIB = 2**30
UUID = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"


class FakeNvml:
    """Stands in for the driver library; `ctypes.byref(x)` holds x as `_obj`. Accelerator i has 10 + i GiB."""

    def __init__(self, count: int, init: int = 0):
        self.count, self.init = count, init

    def nvmlInit_v2(self):
        return self.init

    def nvmlDeviceGetCount_v2(self, reference):
        reference._obj.value = self.count
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, reference):
        reference._obj.value = 10 + index.value
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, reference):
        reference._obj.value = 80
        return 0 if uuid == UUID.encode() else 6

    def nvmlDeviceGetMemoryInfo(self, handle, reference):
        reference._obj.total = handle.value * GIB
        return 0

    def nvmlShutdown(self):
        return 0


@pytest.fixture
def four(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeNvml(4))


def environ(visible: str | None) -> dict[str, str]:
    return {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 4),
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("2, 3", 2),
        ("0,7,1", 1),  # CUDA stops at the first that is not there
        (UUID, 1),
        ("MIG-1,MIG-2,MIG-3", 3),
        ("NoDevFiles", 0),
    ],
)
def test_visible_accelerators_are_counted(visible, count):
    assert count_accelerators(environ(visible)) == count


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize(
    ("visible", "gib"),
    [(None, [10, 11, 12, 13]), ("3,1", [13, 11]), ("1,9,2", [11]), (f"0,{UUID}", [10, 80]), ("", [])],
)
def test_memory_of_the_visible_ones_is_read(visible, gib):
    assert accelerator_memory(environ(visible)) == [size * GIB for size in gib]


@pytest.mark.usefixtures("four")
def test_an_abbreviated_id_is_counted_and_its_memory_unknown():
    assert count_accelerators(environ("0,GPU-8932")) == 2
    assert accelerator_memory(environ("0,GPU-8932")) is None


def test_a_driver_that_does_not_start_counts_as_none(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeNvml(4, init=9))
    assert count_accelerators({}) == 0
    assert accelerator_memory({}) == []


def test_no_driver_library_counts_as_none(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert count_accelerators({"CUDA_VISIBLE_DEVICES": "0"}) == 0
    assert accelerator_memory({"CUDA_VISIBLE_DEVICES": "0"}) == []


def test_count_and_memory_agree_with_torch():
    import torch

    assert count_accelerators() == torch.cuda.device_count()
    sizes = accelerator_memory()
    assert sizes is not None
    assert len(sizes) == torch.cuda.device_count()


def test_of_a_cluster_a_process_knows_its_own_memory_and_the_driver_nothing(make_cfg, monkeypatch):
    monkeypatch.setattr(accelerators, "accelerator_memory", lambda: [GIB])
    own = MemorySizes(psutil.virtual_memory().total, [GIB])
    assert own_memory_sizes() == own
    assert memory_sizes(make_cfg()) == memory_sizes(make_cfg("ray.init_config.address=local")) == own
    assert memory_sizes(make_cfg("ray.init_config.address=auto")) == MemorySizes(None, None)
