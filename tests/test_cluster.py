"""`expert_iteration.cluster`: what Ray cannot give is refused before anything waits for it."""

import json
import subprocess
import sys
import time

import pytest
import ray

from expert_iteration.cli import CONFIG_DIR
from expert_iteration.cluster import check_resources, start_actor, stop_actors
from expert_iteration.errors import UserError
from expert_iteration.places import given

ON_CPU = {"ray_num_gpus": 0}


def test_a_run_that_reserves_nothing_fits_everywhere(make_cfg):
    check_resources(make_cfg(), ON_CPU, {"CPU": 1.0})


def test_what_the_parts_ask_for_together_must_be_there(make_cfg):
    cfg = make_cfg("ray.collector_config.num_cpus=2", "ray.replay_buffer_config.num_cpus=1")
    check_resources(cfg, ON_CPU, {"CPU": 3.0})
    with pytest.raises(UserError) as refusal:
        check_resources(cfg, ON_CPU, {"CPU": 2.0})
    assert "Ray has 2 CPU, but the run asks for 3 (2 for collector_config, 1 for replay_buffer_config)" in str(
        refusal.value
    )


def test_accelerators_of_the_models_count_with_those_of_the_parts(make_cfg):
    cfg = make_cfg("++ray.collector_config.num_gpus=1")
    check_resources(cfg, {"ray_num_gpus": 2}, {"CPU": 1.0, "GPU": 3.0})
    with pytest.raises(UserError, match=r"Ray has 2 GPU.* asks for 3 \(1 for collector_config, 2 for the models\)"):
        check_resources(cfg, {"ray_num_gpus": 2}, {"CPU": 1.0, "GPU": 2.0})


def test_a_resource_of_the_users_own_must_be_there(make_cfg):
    cfg = make_cfg("++ray.collector_config.resources={big_memory: 1}")
    check_resources(cfg, ON_CPU, {"CPU": 1.0, "big_memory": 1.0})
    with pytest.raises(UserError, match="Ray has 0 big_memory"):
        check_resources(cfg, ON_CPU, {"CPU": 1.0})


def test_a_cluster_that_does_not_answer_is_refused_with_the_commands_that_start_one():
    command = "from expert_iteration import cluster; from expert_iteration.cli import compose_config as c; "
    command += "from expert_iteration.resolve import resolve_config as r; "
    command += "cluster.start_ray(r(c('ei_tiny', 'sync', ['ray.init_config.address=127.0.0.1:1']), 'sync'))"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=CONFIG_DIR.parent, capture_output=True, text=True, check=False
    )
    assert "UserError: ray.init_config.address (127.0.0.1:1): no Ray cluster answers there" in done.stderr
    assert "ray start --head" in done.stderr


def test_null_leaves_an_option_to_its_default():
    assert given({"num_cpus": None, "num_gpus": 0, "address": "auto"}) == {"num_gpus": 0, "address": "auto"}


# --- actors ---


class Worker:
    def __init__(self, farewell):
        import atexit
        import pathlib

        atexit.register(pathlib.Path(farewell).touch)


def test_actors_have_their_threads_and_end_in_their_own_way(ray_session, tmp_path):
    paths = [tmp_path / f"farewell-{number}" for number in range(3)]
    actors = [start_actor(Worker, {}, str(path)) for path in paths]
    ray.get([actor.__ray_ready__.remote() for actor in actors])
    stop_actors(actors, timeout=60)
    # What they registered for their exit happens, a moment after Ray calls them ended: killed ones never would.
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, "no farewell"
        time.sleep(0.05)


# --- the end of a run ---

# Ray kills an actor that does not exit, and its children, but not theirs.
FAILING_RUN = """
import json, os, signal, subprocess, sys, time
import psutil, ray
from expert_iteration import cluster
from expert_iteration.cli import compose_config
from expert_iteration.interruption import StopSignals
from expert_iteration.resolve import resolve_config

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
PARENT = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}]); time.sleep(300)"

class Busy:
    def start(self):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", PARENT], start_new_session=True)
        return os.getpid()

    def work(self):
        time.sleep(300)

cluster.RELEASE_SECONDS = 2
other = subprocess.Popen([sys.executable, "-c", STUBBORN])
try:
    with cluster.ray_running(resolve_config(compose_config("ei_tiny"), "sync"), StopSignals()):
        actor = ray.remote(num_cpus=0)(Busy).remote()
        actor_process = psutil.Process(ray.get(actor.start.remote()))
        actor.work.remote()
        while len(children := actor_process.children(recursive=True)) < 2:
            time.sleep(0.1)
        raise RuntimeError("the run fails")
except RuntimeError:
    pass
started = [actor_process, *children]
left = [process for process in started if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
print(json.dumps({
    "started": len(started),
    "left": [process.cmdline() for process in left],
    "descendants": [process.pid == other.pid for process in psutil.Process().children(recursive=True)],
    "other": other.poll(),
    "ray": ray.is_initialized(),
}))
for process in (other, *left):
    process.kill()
"""


def test_a_run_s_processes_are_gone_when_it_ends_and_others_are_not():
    done = subprocess.run(
        [sys.executable, "-c", FAILING_RUN], cwd=CONFIG_DIR.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "started": 3,
        "left": [],
        "descendants": [True],
        "other": None,
        "ray": False,
    }
