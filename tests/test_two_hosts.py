"""A Ray cluster of two nodes on this machine, each with resources of its own, which runs join."""

import json
import subprocess
import sys

import pytest
from ray.cluster_utils import Cluster
from whole_runs import LIGHT, REPO, SHORT, Run

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def two_hosts():
    """The address of a cluster whose hosts are called "first" and "second", with two declared GPUs each."""
    host = {"num_cpus": 1, "num_gpus": 2}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**host, "resources": {"first": 1}, "include_dashboard": False},
    )
    cluster.add_node(**host, resources={"second": 1})
    yield cluster.address
    cluster.shutdown()


# Where Ray puts the bundles of a run: the host of each, in the order of the bundles.
PLACE = """
import json, sys
import ray
from expert_iteration import cluster, places
from expert_iteration.cli import compose_config
from expert_iteration.errors import UserError
from expert_iteration.interruption import StopSignals
from expert_iteration.resolve import resolve_config

places.RESERVE_SECONDS = 5
cfg = resolve_config(compose_config("ei_tiny", "sync", sys.argv[1:]), "sync")
try:
    with cluster.ray_running(cfg, StopSignals()) as found:
        bundles = ray.util.placement_group_table(found.group)["bundles_to_node_id"]
        hosts = [bundles[index] for index in range(len(bundles))]
        print(json.dumps([hosts.index(host) for host in hosts]))
except UserError as error:
    print(json.dumps(str(error)))
"""


def place(address, *overrides):
    """The bundles of a run by the first bundle on the same host, or the error."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", PLACE, f"ray.init_config.address={address}"),
            *("device=cuda", "inference_model.kv_cache_gib=null", *overrides),
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_an_engine_s_shards_are_on_one_host(two_hosts):
    overrides = ("inference_model.num_devices=2", "ref_model.num_devices=1", "train_model.num_devices=1")
    # What the training task reserves besides is part of its bundle.
    overrides += ("ray.train_handler_config.num_cpus=1", "++ray.train_handler_config.resources={second: 0.5}")
    hosts = place(two_hosts, *overrides)
    # The engine's two accelerators are one bundle, and fill a host; the others are on the second.
    assert len(hosts) == 3
    assert hosts[0] == 0
    assert hosts[1] == hosts[2] == 1


def test_a_training_task_that_fits_in_no_bundle_is_refused(two_hosts):
    message = place(two_hosts, "ray.train_handler_config.num_cpus=2")
    assert "Ray could not reserve 3 accelerators within 5 s" in message


def test_an_engine_that_fits_on_no_host_is_refused(two_hosts):
    message = place(two_hosts, "inference_model.num_devices=3", "train_model.lora.enabled=true")
    assert (
        "inference_model.num_devices (3) accelerators of one engine must be on one host, and none has more" in message
    )


@pytest.mark.slow
def test_a_run_over_both_hosts_completes(two_hosts, tmp_path, warm_tiny_model):
    run = Run(
        tmp_path / "run",
        *SHORT,
        *LIGHT,
        f"ray.init_config.address={two_hosts}",
        "++ray.collector_config.resources={first: 0.1}",
        "++ray.train_handler_config.resources={second: 0.1}",
        cwd=tmp_path,
    ).wait()
    assert run.process.returncode == 0, run.output
    assert run.summary["status"] == "completed"
    assert run.summary["weight_pushes"] == 1
    assert run.summary["max_probe_logprob_diff"] < 1e-3
