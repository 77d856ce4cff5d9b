"""The place of every process that holds a model: its accelerators, its CPU threads, its host.

On accelerators the whole run is one Ray placement group: all of it is there, or the run is refused within a minute. An
engine's shards form one bundle, which never spans hosts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from expert_iteration.config import Config, num_engines, num_references
from expert_iteration.devices import DeviceAllocation
from expert_iteration.errors import UserError

RESERVE_SECONDS = 60.0
Kind = Literal["inference", "reference", "train"]


@dataclass(frozen=True)
class Places:
    """Ray's options for the engines, references and training ranks of a run.

    Attributes:
        allocation: which model has which accelerators.
        threads: CPU threads of a process of each kind.
        group: the reserved accelerators; None without any.
        training_task: further options of rank 0, the user's (`ray.train_handler_config`).
    """

    allocation: DeviceAllocation
    threads: dict[Kind, int]
    group: PlacementGroup | None
    training_task: dict[str, Any] = field(default_factory=dict)

    def engine(self, index: int) -> dict[str, Any]:
        """Options of engine `index`."""
        return self._options("inference", index)

    def reference(self, index: int) -> dict[str, Any]:
        """Options of replica `index` of the reference."""
        return self._options("reference", index)

    def trainer(self, rank: int) -> dict[str, Any]:
        """Options of training rank `rank`."""
        options = self._options("train", rank)
        if rank > 0:
            return options
        theirs = self.training_task.get("runtime_env", {})
        env_vars = options["runtime_env"]["env_vars"] | theirs.get("env_vars", {})
        return options | self.training_task | {"runtime_env": theirs | {"env_vars": env_vars}}

    def _options(self, kind: Kind, index: int) -> dict[str, Any]:
        # The threads by a variable, because torch's own setting holds for one thread only and Ray runs an actor's
        # methods in several.
        env_vars = {"OMP_NUM_THREADS": str(self.threads[kind])}
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0, "runtime_env": {"env_vars": env_vars}}
        of_kind = processes(self.allocation)[kind]
        if self.group is None or not of_kind:
            # Ray hides accelerators only from processes that ask for some.
            env_vars["CUDA_VISIBLE_DEVICES"] = ""
            return options
        devices = of_kind[index]
        options["num_gpus"] = self.allocation["gpu_shares"][kind]
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            self.group, placement_group_bundle_index=bundles(self.allocation).index(devices)
        )
        return options


def reserve(cfg: Config, allocation: DeviceAllocation) -> Places:
    """Reserve the accelerators of a run.

    Raises:
        UserError: they were not all free within a minute.
    """
    wanted = bundles(allocation)
    group = None
    task = given(cfg.ray.train_handler_config)
    if wanted:
        resources: list[dict[str, float]] = [{"GPU": len(devices)} for devices in wanted]
        # Whatever rank 0 asks for must lie in its bundle.
        for devices in processes(allocation)["train"][:1]:
            own = resources[wanted.index(devices)]
            own.update({"CPU": task["num_cpus"]} if task.get("num_cpus") else {}, **task.get("resources", {}))
        group = placement_group(resources, strategy="PACK")
        if not group.wait(RESERVE_SECONDS):
            remove_placement_group(group)
            raise UserError(
                f"Ray could not reserve {_describe(wanted)} within {RESERVE_SECONDS:g} s: of "
                f"{ray.cluster_resources().get('GPU', 0):g} accelerators {ray.available_resources().get('GPU', 0):g} "
                "are free, and those of one engine must be on one host. Wait for the other runs, or ask for fewer "
                "(*.num_devices, inference_model.num_replicas, ray.train_handler_config)."
            )
    return Places(allocation, default_threads(cfg), group, task)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are set; null means that Ray's or our default holds."""
    return {name: value for name, value in options.items() if value is not None}


def processes(allocation: DeviceAllocation) -> dict[Kind, list[tuple[int, ...]]]:
    """The accelerators of each process that holds a model, by kind."""
    return {
        "inference": [tuple(devices) for devices in allocation["inference_replicas"]],
        "reference": [(device,) for device in allocation["ref_model_devices"]],
        "train": [(device,) for device in allocation["train_model_devices"]],
    }


def bundles(allocation: DeviceAllocation) -> list[tuple[int, ...]]:
    """What is reserved together: the accelerators of one process, or of several that share theirs."""
    return sorted({devices for kind in processes(allocation).values() for devices in kind if devices})


def check_hosts(allocation: DeviceAllocation, gpus_per_host: Sequence[float]) -> None:
    """Refuse an engine whose shards fit on no host of a cluster.

    Raises:
        UserError: names what one engine asks for, and the most that a host has.
    """
    shards = max((len(devices) for devices in allocation["inference_replicas"]), default=0)
    most = max(gpus_per_host, default=0)
    if shards > most:
        raise UserError(
            f"inference_model.num_devices ({shards}) accelerators of one engine must be on one host, and none has more "
            f"than {most:g}: lower it, and raise inference_model.num_replicas."
        )


def default_threads(cfg: Config) -> dict[Kind, int]:
    """CPU threads of a process of each kind: as configured, else the cores shared by those that work at once.

    Processes of a kind work at once; so do engine and trainer, unless they take turns. Threads of two models on the
    same cores wait for each other in the middle of their matrix products.
    """
    cores = len(os.sched_getaffinity(0))  # not all of the host's, where a scheduler gave this process some
    take_turns = (cfg.train.sync and cfg.train.sync_iter) or not num_engines(cfg)
    available = cores if take_turns else max(1, cores // 2)
    counts: dict[Kind, int] = {
        "train": cfg.train_model.num_devices,
        "inference": num_engines(cfg),  # whose shards share what their engine has
        "reference": num_references(cfg),
    }
    configured: dict[Kind, int | None] = {
        "train": cfg.train_model.num_threads,
        "inference": cfg.inference_model.num_threads,
        "reference": cfg.ref_model.num_threads,
    }
    return {kind: configured[kind] or max(1, available // max(1, count)) for kind, count in counts.items()}


def _describe(wanted: Sequence[tuple[int, ...]]) -> str:
    count = sum(len(devices) for devices in wanted)
    return f"{count} accelerators" if count > 1 else "an accelerator"
