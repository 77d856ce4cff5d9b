"""`expert_iteration.cluster`: what Ray cannot give is refused before anything waits for it."""

import os
import time

import pytest
import ray

from expert_iteration.cluster import check_resources, given, process_options, start_actor, stop_actors
from expert_iteration.errors import UserError

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
    cfg = make_cfg("++ray.train_handler_config.num_gpus=1")
    check_resources(cfg, {"ray_num_gpus": 2}, {"CPU": 1.0, "GPU": 3.0})
    with pytest.raises(UserError, match=r"Ray has 2 GPU.* asks for 3 \(1 for train_handler_config, 2 for the models\)"):
        check_resources(cfg, {"ray_num_gpus": 2}, {"CPU": 1.0, "GPU": 2.0})


def test_a_resource_of_the_users_own_must_be_there(make_cfg):
    cfg = make_cfg("++ray.collector_config.resources={big_memory: 1}")
    check_resources(cfg, ON_CPU, {"CPU": 1.0, "big_memory": 1.0})
    with pytest.raises(UserError, match="Ray has 0 big_memory"):
        check_resources(cfg, ON_CPU, {"CPU": 1.0})


def test_null_leaves_an_option_to_its_default():
    assert given({"num_cpus": None, "num_gpus": 0, "address": "auto"}) == {"num_gpus": 0, "address": "auto"}


def test_threads_are_those_configured_or_all():
    assert process_options(3, [])["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"
    assert process_options(None, [])["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == str(os.cpu_count())


def test_a_process_sees_the_accelerators_that_ray_gives_it_and_no_others():
    on_cpu, on_two = process_options(1, []), process_options(1, [4, 5])
    assert (on_cpu["num_gpus"], on_cpu["runtime_env"]["env_vars"]["CUDA_VISIBLE_DEVICES"]) == (0, "")
    assert on_two["num_gpus"] == 2
    assert "CUDA_VISIBLE_DEVICES" not in on_two["runtime_env"]["env_vars"]


# --- actors ---


class Worker:
    def __init__(self, farewell):
        import atexit
        import pathlib

        atexit.register(pathlib.Path(farewell).touch)

    def threads(self):
        return os.environ.get("OMP_NUM_THREADS")


def test_actors_have_their_threads_and_end_in_their_own_way(ray_session, tmp_path):
    paths = [tmp_path / f"farewell-{number}" for number in range(3)]
    actors = [start_actor(Worker, process_options(7, []), str(path)) for path in paths]
    assert ray.get([actor.threads.remote() for actor in actors]) == ["7"] * 3
    stop_actors(actors, timeout=60)
    # What they registered for their exit happens, a moment after Ray calls them ended: killed ones never would.
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, "no farewell"
        time.sleep(0.05)
