"""Which model gets which devices: pure functions of the configuration and the number of accelerators."""

import ctypes
import os
from collections.abc import Mapping
from typing import TypedDict

from expert_iteration.config import Config, Device
from expert_iteration.errors import UserError


class DeviceAllocation(TypedDict):
    """Accelerators by index among the visible ones; a model without any runs on the CPU."""

    train_model_devices: list[int]
    inference_model_devices: list[int]
    ref_model_devices: list[int]
    ray_num_gpus: int
    cuda_visible_devices: str


def count_accelerators(environ: Mapping[str, str] = os.environ) -> int:
    """Accelerators that this process may use, without importing torch (seconds) or starting CUDA.

    `CUDA_VISIBLE_DEVICES` restricts them as it does for CUDA: by index or unique id, cut off at the first that is not.
    """
    installed = _count_installed()
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or installed == 0:
        return installed
    count = 0
    for entry in (part.strip() for part in visible.split(",")):
        is_unique_id = entry.startswith(("GPU-", "MIG-"))
        if not is_unique_id and not (entry.isdecimal() and int(entry) < installed):
            break
        count += 1
    return count


def compute_device_allocation(cfg: Config, num_accelerators: int) -> DeviceAllocation:
    """Gives every model its own devices: the engine first, then the reference, then training.

    Args:
        cfg: reads `device` and the `num_devices` of the three models.
        num_accelerators: those of this machine (`count_accelerators`), or of the Ray cluster.

    Raises:
        UserError: `device=cuda` without accelerators, fewer than the models need, or several devices on the CPU.
    """
    counts = device_counts(cfg)
    if cfg.device is Device.cuda and num_accelerators == 0:
        raise UserError(
            "device (cuda) needs an accelerator and none is visible here: `make demo` shows the suite on a CPU, "
            "device=cpu runs this configuration on one (slowly), CUDA_VISIBLE_DEVICES may hide what there is."
        )
    if cfg.device is Device.cpu or num_accelerators == 0:
        _refuse_many(counts, "without accelerators")
        return _as_allocation([], [], [])
    needed = sum(counts.values())
    if needed > num_accelerators:
        sum_text = " + ".join(f"{count} for {model}" for model, count in counts.items())
        raise UserError(
            f"{sum_text} = {needed} accelerators, but {num_accelerators} are visible: "
            f"{_remedy_for_too_few(counts, num_accelerators)}."
        )
    devices = iter(range(needed))
    inference, ref, train = ([next(devices) for _ in range(count)] for count in counts.values())
    return _as_allocation(train, inference, ref)


def device_counts(cfg: Config) -> dict[str, int]:
    """Devices that each model asks for, in the order in which they are given out."""
    return {
        "inference_model": cfg.inference_model.num_devices,
        "ref_model": 1 if cfg.ref_model.num_devices is None else cfg.ref_model.num_devices,
        "train_model": cfg.train_model.num_devices,
    }


def check_devices(cfg: Config) -> None:
    """Refuses what this machine cannot do, before anything heavy is imported.

    A Ray cluster (`ray.init_config.address`) has devices that this machine does not see; there Ray decides later.

    Raises:
        UserError: as `compute_device_allocation`, or more devices for a model than the suite can use so far.
    """
    if cfg.ray.init_config.get("address") is None:
        compute_device_allocation(cfg, count_accelerators())
    _refuse_many(device_counts(cfg), "by this version")


def _remedy_for_too_few(counts: dict[str, int], num_accelerators: int) -> str:
    several = any(count > 1 for count in counts.values())
    on_cpu = "device=cpu with every num_devices=1 (slow)" if several else "device=cpu (slow)"
    if num_accelerators >= len(counts):
        return f"lower *.num_devices (1 each takes {len(counts)}), or set {on_cpu}"
    return f"{len(counts)} are needed, one for each model, so set {on_cpu}, or use a machine with {len(counts)}"


def _refuse_many(counts: dict[str, int], where: str) -> None:
    for model, count in counts.items():
        if count > 1:
            raise UserError(
                f"{model}.num_devices ({count}) above 1 is not supported yet {where}: set {model}.num_devices=1."
            )


def _as_allocation(train: list[int], inference: list[int], ref: list[int]) -> DeviceAllocation:
    used = sorted(train + inference + ref)
    return {
        "train_model_devices": train,
        "inference_model_devices": inference,
        "ref_model_devices": ref,
        "ray_num_gpus": len(used),
        "cuda_visible_devices": ",".join(map(str, used)),
    }


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
