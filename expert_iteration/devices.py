"""Which model gets which devices: pure functions of the configuration and the number of accelerators."""

from typing import TypedDict

from expert_iteration.accelerators import count_accelerators
from expert_iteration.config import (
    Config,
    Device,
    InferenceBackend,
    Parallel,
    Placement,
    is_local,
    num_engines,
    num_references,
    num_trainers,
)
from expert_iteration.errors import UserError

# Ray counts resources in steps of 1 / 10,000.
RAY_RESOLUTION = 10_000


class GpuShares(TypedDict):
    """What one process of each model asks of Ray as `num_gpus`; 0 without accelerators, or without such a process."""

    train: float
    inference: float
    reference: float


class DeviceAllocation(TypedDict):
    """Accelerators, numbered among those that a run uses; which of a machine's each of them is, Ray decides.

    A model without any runs on the CPU, or has no process of its own: the reference, or an engine that is not needed.
    """

    train_model_devices: list[int]
    """One for each data-parallel rank."""
    inference_model_devices: list[int]
    """Those of all engines."""
    ref_model_devices: list[int]
    """One for each replica of the reference."""
    ray_num_gpus: int
    """Accelerators that the run uses."""
    cuda_visible_devices: str
    """The same as a list for CUDA."""
    inference_replicas: list[list[int]]
    """For each engine, also on the CPU, the accelerators that share its model."""
    placement: str
    """`cpu`, `dedicated` (the engines have accelerators of their own), or `colocated` (all on one)."""
    gpu_shares: GpuShares
    sleeps: bool
    """Whether the engine gives its memory back while the trainer works: they share an accelerator and take turns."""


def compute_device_allocation(cfg: Config, num_accelerators: int) -> DeviceAllocation:
    """Gives every model its devices: the engines first, then the references, then training.

    Each has its own where there are enough (`placement=auto`, or `dedicated`). Otherwise (`auto`), with one device for
    each model, one accelerator holds all of them, and of two the engine has one and the reference shares the trainer's.

    Args:
        cfg: reads `device`, `placement`, and how many devices the three models ask for.
        num_accelerators: those of this machine (`count_accelerators`), or of the Ray cluster.

    Raises:
        UserError: `device=cuda` without accelerators, fewer than the models need, or several devices for a model with
            `placement=colocated`.
    """
    if cfg.device is Device.cuda and num_accelerators == 0:
        raise UserError(
            "device (cuda) needs an accelerator and none is visible here: `make demo` shows the suite on a CPU, "
            "device=cpu runs this configuration on one (slowly), CUDA_VISIBLE_DEVICES may hide what there is."
        )
    if cfg.device is Device.cpu or num_accelerators == 0:
        return _without_accelerators(cfg)
    needed = sum(device_counts(cfg).values())
    if cfg.placement is Placement.colocated and not cfg.eval.only:  # which has nothing to share with
        _refuse_several(cfg)
    elif needed <= num_accelerators:
        return _dedicated(cfg)
    elif cfg.placement is Placement.dedicated or _asks_for_several(cfg):
        raise UserError(_explain_too_few(cfg, num_accelerators))
    elif num_accelerators > 1:
        return _reference_beside_trainer()
    return _colocated(cfg)


def device_counts(cfg: Config) -> dict[str, int]:
    """Devices that each model asks for, in the order in which they are given out."""
    return {
        "inference_model": num_engines(cfg) * cfg.inference_model.num_devices,
        "ref_model": num_references(cfg),
        "train_model": num_trainers(cfg),
    }


def parallel_kind(cfg: Config, allocation: DeviceAllocation) -> Parallel:
    """How several ranks train one model, with `train_model.parallel=auto` decided; a single rank has it whole (ddp).

    Full fine-tuning keeps four float32 numbers for each weight, which is worth sharing out; adapters are so few that
    gathering the base again and again would cost more than it saves. On a CPU all ranks share one memory anyway.
    """
    if cfg.train_model.num_devices == 1:
        return Parallel.ddp
    if cfg.train_model.parallel is not Parallel.auto:
        return cfg.train_model.parallel
    on_accelerators = bool(allocation["train_model_devices"])
    return Parallel.fsdp if on_accelerators and not cfg.train_model.lora.enabled else Parallel.ddp


def check_devices(cfg: Config) -> None:
    """Refuses what this machine cannot do, before anything heavy is imported.

    A Ray cluster (`ray.init_config.address`) has devices that this machine does not see; there Ray decides later.

    Raises:
        UserError: as `compute_device_allocation`.
    """
    if is_local(cfg):
        compute_device_allocation(cfg, count_accelerators())


def _asks_for_several(cfg: Config) -> bool:
    return any(count > 1 for count in device_counts(cfg).values())


def _refuse_several(cfg: Config) -> None:
    several = [f"{count} for {model}" for model, count in device_counts(cfg).items() if count > 1]
    if several:
        raise UserError(
            f"placement (colocated) puts every model on one accelerator, but the run asks for {', '.join(several)}: "
            "set every num_devices and inference_model.num_replicas to 1, or placement=auto."
        )


def _explain_too_few(cfg: Config, num_accelerators: int) -> str:
    counts = {model: count for model, count in device_counts(cfg).items() if count}
    sum_text = " + ".join(f"{count} for {model}" for model, count in counts.items())
    needed = sum(counts.values())
    return (
        f"{sum_text} = {needed} accelerators, but {num_accelerators} "
        f"{'is' if num_accelerators == 1 else 'are'} visible: {'; '.join(_remedies(cfg, num_accelerators))}."
    )


def _remedies(cfg: Config, num_accelerators: int) -> list[str]:
    """What would place the run: each of them by itself."""
    counts = device_counts(cfg)
    references = counts["ref_model"]
    remedies = []
    if references and sum(counts.values()) - references <= num_accelerators:
        lora = "" if cfg.train_model.lora.enabled else "train_model.lora.enabled=true with "
        remedies.append(f"{lora}ref_model.num_devices=0 needs none for the reference")
    if _asks_for_several(cfg):
        share = "" if cfg.placement is Placement.auto else " and placement=auto"
        remedies.append(f"every num_devices and inference_model.num_replicas at 1{share} fits on any number")
    else:
        remedies.append("placement=auto lets models share them")
    return [*remedies, "device=cpu needs none (slow)"]


def _without_accelerators(cfg: Config) -> DeviceAllocation:
    replicas: list[list[int]] = [[] for _ in range(num_engines(cfg))]
    return _as_allocation("cpu", [], replicas, [], {"train": 0.0, "inference": 0.0, "reference": 0.0})


def _dedicated(cfg: Config) -> DeviceAllocation:
    counts = device_counts(cfg)
    devices = iter(range(sum(counts.values())))
    per_engine = cfg.inference_model.num_devices
    replicas = [[next(devices) for _ in range(per_engine)] for _ in range(num_engines(cfg))]
    ref, train = ([next(devices) for _ in range(counts[model])] for model in ("ref_model", "train_model"))
    shares: GpuShares = {
        "train": 1.0 if train else 0.0,
        "inference": float(per_engine) if replicas else 0.0,
        "reference": 1.0 if ref else 0.0,
    }
    return _as_allocation("dedicated", train, replicas, ref, shares)


def _reference_beside_trainer() -> DeviceAllocation:
    shares: GpuShares = {"train": 0.5, "inference": 1.0, "reference": 0.5}
    return _as_allocation("dedicated", [1], [[0]], [1], shares)


def _colocated(cfg: Config) -> DeviceAllocation:
    engines, references = num_engines(cfg), num_references(cfg)
    share = RAY_RESOLUTION // (1 + engines + references) / RAY_RESOLUTION
    shares: GpuShares = {
        "train": share,
        "inference": share if engines else 0.0,
        "reference": share if references else 0.0,
    }
    # vLLM can sleep. Where the engine generates the next batch while the trainer works, it must not.
    takes_turns = engines > 0 and cfg.train.sync and cfg.train.sync_iter is True
    sleeps = takes_turns and cfg.inference_model.backend is InferenceBackend.vllm
    return _as_allocation("colocated", [0], [[0]] * engines, [0] * references, shares, sleeps=sleeps)


def _as_allocation(
    placement: str,
    train: list[int],
    replicas: list[list[int]],
    ref: list[int],
    shares: GpuShares,
    *,
    sleeps: bool = False,
) -> DeviceAllocation:
    inference = [device for replica in replicas for device in replica]
    used = sorted({*train, *inference, *ref})
    return {
        "train_model_devices": train,
        "inference_model_devices": inference,
        "ref_model_devices": ref,
        "ray_num_gpus": len(used),
        "cuda_visible_devices": ",".join(map(str, used)),
        "inference_replicas": replicas,
        "placement": placement,
        "gpu_shares": shares,
        "sleeps": sleeps,
    }
