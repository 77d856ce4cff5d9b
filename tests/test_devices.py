"""Which model gets which devices."""

from functools import cache

import pytest

from expert_iteration import devices
from expert_iteration.cli import compose_config
from expert_iteration.config import Config
from expert_iteration.devices import check_devices, compute_device_allocation, count_accelerators
from expert_iteration.errors import UserError
from expert_iteration.resolve import resolve_config

TWO_EACH = ("train_model.num_devices=2", "ref_model.num_devices=2", "inference_model.num_devices=2")
ON_CPU = {
    "train_model_devices": [],
    "inference_model_devices": [],
    "ref_model_devices": [],
    "ray_num_gpus": 0,
    "cuda_visible_devices": "",
}


@cache
def load(*overrides: str) -> Config:
    return resolve_config(compose_config("ei_gsm8k", "sync", overrides), "sync")


@pytest.mark.parametrize("overrides", [("device=cpu",), ("device=auto",)])
def test_none_means_cpu(overrides):
    assert compute_device_allocation(load(*overrides), 0) == ON_CPU


def test_cpu_stays_on_cpu_beside_accelerators():
    assert compute_device_allocation(load("device=cpu"), 8) == ON_CPU


@pytest.mark.parametrize("num_accelerators", [3, 6, 8])
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_model_has_its_own(device, num_accelerators):
    assert compute_device_allocation(load(f"device={device}"), num_accelerators) == {
        "inference_model_devices": [0],
        "ref_model_devices": [1],
        "train_model_devices": [2],
        "ray_num_gpus": 3,
        "cuda_visible_devices": "0,1,2",
    }


@pytest.mark.parametrize("num_accelerators", [6, 8])
def test_the_published_six(num_accelerators):
    assert compute_device_allocation(load(*TWO_EACH), num_accelerators) == {
        "inference_model_devices": [0, 1],
        "ref_model_devices": [2, 3],
        "train_model_devices": [4, 5],
        "ray_num_gpus": 6,
        "cuda_visible_devices": "0,1,2,3,4,5",
    }


@pytest.mark.parametrize("num_accelerators", [1, 2])
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_too_few_are_refused_with_the_arithmetic(device, num_accelerators):
    with pytest.raises(UserError, match=rf"1 for inference_model .* = 3 accelerators, but {num_accelerators} are"):
        compute_device_allocation(load(f"device={device}"), num_accelerators)


@pytest.mark.parametrize("num_accelerators", [1, 2])
def test_too_few_are_told_what_is_possible(num_accelerators):
    with pytest.raises(
        UserError, match=r"3 are needed, one for each model, so set device=cpu \(slow\), or .* with 3\."
    ):
        compute_device_allocation(load(), num_accelerators)
    compute_device_allocation(load("device=cpu"), num_accelerators)
    compute_device_allocation(load(), 3)


def test_lowering_num_devices_is_offered_only_where_it_helps():
    with pytest.raises(
        UserError, match=r"lower \*\.num_devices \(1 each takes 3\), or set device=cpu with every num_dev"
    ):
        compute_device_allocation(load(*TWO_EACH), 3)
    with pytest.raises(UserError, match=r"one for each model, so set device=cpu with every num_devices=1") as error:
        compute_device_allocation(load(*TWO_EACH), 2)
    assert "lower" not in str(error.value)


def test_too_few_for_the_published_six():
    with pytest.raises(UserError, match=r"2 for inference_model \+ 2 for ref_model \+ 2 for train_model = 6 .* 3 are"):
        compute_device_allocation(load(*TWO_EACH), 3)


def test_cuda_without_accelerators_names_the_ways_out():
    with pytest.raises(UserError, match=r"make demo.*device=cpu"):
        compute_device_allocation(load(), 0)


@pytest.mark.parametrize("model", ["train_model", "inference_model", "ref_model"])
def test_several_devices_on_a_cpu_are_refused(model):
    with pytest.raises(UserError, match=rf"{model}.num_devices \(2\).*{model}.num_devices=1"):
        compute_device_allocation(load("device=cpu", f"{model}.num_devices=2"), 0)


def test_several_devices_are_refused_until_code_uses_them(monkeypatch):
    monkeypatch.setattr(devices, "count_accelerators", lambda: 8)
    check_devices(load())
    with pytest.raises(UserError, match=r"num_devices \(2\) above 1 is not supported yet"):
        check_devices(load(*TWO_EACH))


def test_a_cluster_has_devices_that_this_machine_does_not_see(monkeypatch):
    monkeypatch.setattr(devices, "count_accelerators", lambda: 0)
    check_devices(load("ray.init_config.address=auto"))
    with pytest.raises(UserError, match="make demo"):
        check_devices(load())


class FakeNvml:
    """Stands in for the driver library; `ctypes.byref(x)` holds x as `_obj`."""

    def __init__(self, count: int, init: int = 0):
        self.count, self.init = count, init

    def nvmlInit_v2(self):
        return self.init

    def nvmlDeviceGetCount_v2(self, reference):
        reference._obj.value = self.count
        return 0

    def nvmlShutdown(self):
        return 0


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 4),
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("2, 3", 2),
        ("0,7,1", 1),  # CUDA stops at the first that is not there
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1),
        ("MIG-1,MIG-2,MIG-3", 3),
        ("NoDevFiles", 0),
    ],
)
def test_visible_accelerators_are_counted(visible, count, monkeypatch):
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: FakeNvml(4))
    assert count_accelerators({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


def test_a_driver_that_does_not_start_counts_as_none(monkeypatch):
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: FakeNvml(4, init=9))
    assert count_accelerators({}) == 0


def test_no_driver_library_counts_as_none(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(devices.ctypes, "CDLL", missing)
    assert count_accelerators({"CUDA_VISIBLE_DEVICES": "0"}) == 0


def test_count_agrees_with_torch():
    import torch

    assert count_accelerators() == torch.cuda.device_count()
