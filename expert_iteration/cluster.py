"""Ray: starting or joining it, and whether it can give what a run asks for."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray

from expert_iteration.config import Config, is_local
from expert_iteration.devices import DeviceAllocation, compute_device_allocation
from expert_iteration.errors import UserError
from expert_iteration.interruption import StopSignals
from expert_iteration.places import Places, check_hosts, given, reserve

EXIT_SECONDS = 1.0
KNOCK_SECONDS = 10.0
RELEASE_SECONDS = 10.0  # for the processes of a run to exit by themselves once Ray is down
PROJECT_ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def ray_running(cfg: Config, signals: StopSignals) -> Iterator[Places]:
    """Ray for one run, as `start_ray`, with its places; on leaving, Ray and every process started meanwhile are gone.

    The next job of a sweep then finds memory and accelerators free.

    Args:
        cfg: the configuration.
        signals: of this process, which are not for Ray's.
    """
    others = psutil.Process().children(recursive=True)
    try:
        with signals.while_ray_starts():
            allocation = start_ray(cfg)
        yield reserve(cfg, allocation)
    finally:
        shut_down_ray(others)


def shut_down_ray(others: Collection[psutil.Process] = ()) -> None:
    """Shut Ray down, and wait until this process's descendants have exited; what has not in time is killed.

    Ray itself does not wait for its workers, and of what they have started it ends the children but not theirs.

    Args:
        others: descendants to leave alone.
    """
    # Noted before: whoever outlives its parent is no descendant any more.
    processes = set(psutil.Process().children(recursive=True)) - set(others)
    ray.shutdown()
    left = _wait_for_exit(processes)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _wait_for_exit(left)


def _wait_for_exit(processes: Collection[psutil.Process]) -> list[psutil.Process]:
    """Those that are still there after a while."""
    deadline = time.monotonic() + RELEASE_SECONDS
    while (left := [process for process in processes if _is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _is_alive(process: psutil.Process) -> bool:
    """Whether it may hold something: what has exited stays a zombie for ever where nobody collects orphans.

    That is common in containers, and `psutil.wait_procs` would wait for it.
    """
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start_ray(cfg: Config) -> DeviceAllocation:
    """Start Ray on this machine, or join the cluster of `ray.init_config.address`.

    Returns:
        Which model gets which of its accelerators.

    Raises:
        UserError: it has fewer CPUs, accelerators or other resources than the run asks for. Ray would wait for ever.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without an address Ray would join whatever it finds, for instance a colleague's cluster on the same machine.
    options = {"address": "local"} | given(cfg.ray.init_config)
    ours = _code_on_this_host() if is_local(cfg) else _code_that_travels()
    theirs = options.get("runtime_env", {})
    env_vars = ours.pop("env_vars", {}) | theirs.get("env_vars", {})
    options["runtime_env"] = ours | theirs | {"env_vars": env_vars}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if is_local(cfg):
        quiet["include_dashboard"] = False
    try:
        _knock(options["address"])
        ray.init(**quiet | options)
    except OSError as error:
        raise UserError(
            f"ray.init_config.address ({options['address']}): no Ray cluster answers there. Start one with `ray start "
            "--head`, and `ray start --address=HOST:6379` on every other host, or set the key to null for this machine."
        ) from error
    available = ray.cluster_resources()
    allocation = compute_device_allocation(cfg, int(available.get("GPU", 0)))
    check_resources(cfg, allocation, available)
    check_hosts(allocation, [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]])
    return allocation


def _knock(address: str) -> None:
    """See whether somebody answers at a HOST:PORT: Ray itself would try for more than ten minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()


def _code_on_this_host() -> dict[str, Any]:
    """Ray's runtime environment in which processes import the package and ei_utils from any working directory."""
    path = os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH"))))
    return {"env_vars": {"PYTHONPATH": path}}


def _code_that_travels() -> dict[str, Any]:
    """The same for the hosts of a cluster, to which Ray brings the code, and nothing else that lies beside it."""
    return {"py_modules": [str(PROJECT_ROOT / "expert_iteration"), str(PROJECT_ROOT / "ei_utils.py")]}


def check_resources(cfg: Config, allocation: DeviceAllocation, available: dict[str, float]) -> None:
    """Refuse what could never be placed.

    Args:
        cfg: reads the dictionaries of the `ray` section.
        allocation: which model gets which accelerators.
        available: resources by Ray's name (`ray.cluster_resources()`).

    Raises:
        UserError: names the resource, what each part asks of it, and what there is.
    """
    asked = {
        "collector_config": cfg.ray.collector_config,
        "train_handler_config": cfg.ray.train_handler_config,
        "replay_buffer_config": cfg.ray.replay_buffer_config,
    }
    requests = {name: _resources(given(options)) for name, options in asked.items()}
    requests["the models"] = Counter(GPU=allocation["ray_num_gpus"])
    for resource in sorted(set().union(*requests.values())):
        parts = {name: request[resource] for name, request in requests.items() if request[resource]}
        if sum(parts.values()) > available.get(resource, 0):
            listed = ", ".join(f"{amount:g} for {name}" for name, amount in parts.items())
            raise UserError(
                f"Ray has {available.get(resource, 0):g} {resource}, but the run asks for {sum(parts.values()):g} "
                f"({listed}): lower the numbers in the ray section (null reserves none), or join a larger "
                "cluster with ray.init_config.address."
            )


def start_actor(actor_class: type, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """A Ray actor that reserves no CPU unless the options say so: on few cores the processes share them."""
    return ray.remote(**{"num_cpus": 0} | options)(actor_class).remote(*args, **kwargs)


def stop_actors(actors: Sequence[Any], timeout: float = 10.0) -> None:
    """Let actors exit by themselves, so that what they registered for their exit happens; wait for it a while.

    Whoever is still busy then is killed when Ray stops. Being killed leaves, for one, semaphores in shared memory.
    """
    ray.wait([actor.__ray_terminate__.remote() for actor in actors], num_returns=len(actors), timeout=timeout)
    # Ray says so as soon as an actor has begun to exit; its exit handlers (vLLM's, W&B's) take about half a second.
    time.sleep(EXIT_SECONDS)


def _resources(options: dict[str, Any]) -> Counter[str]:
    amounts = {"CPU": options.get("num_cpus", 0), "GPU": options.get("num_gpus", 0), **options.get("resources", {})}
    return Counter(amounts)
