"""`expert_iteration.places`: every process has its accelerators, its threads and its host, or the run is refused."""

import os
from pathlib import Path

import pytest

from expert_iteration.devices import compute_device_allocation
from expert_iteration.errors import UserError
from expert_iteration.places import Places, bundles, check_hosts, default_threads, processes, reserve

TWO_EACH = ("train_model.num_devices=2", "ref_model.num_devices=2", "inference_model.num_devices=2")
ON_GPUS = ("device=cuda", "inference_model.kv_cache_gib=null")


@pytest.fixture
def allocate(make_cfg):
    return lambda num_accelerators, *overrides: compute_device_allocation(
        make_cfg(*ON_GPUS, *overrides), num_accelerators
    )


def test_an_engine_s_shards_are_one_bundle_and_everything_else_has_its_own(allocate):
    allocation = allocate(6, *TWO_EACH)
    assert bundles(allocation) == [(0, 1), (2,), (3,), (4,), (5,)]
    assert processes(allocation) == {
        "inference": [(0, 1)],
        "reference": [(2,), (3,)],
        "train": [(4,), (5,)],
    }


def test_models_that_share_an_accelerator_share_its_bundle(allocate):
    assert bundles(allocate(1)) == [(0,)]
    assert bundles(allocate(2)) == [(0,), (1,)]  # engine; trainer and reference


def test_without_accelerators_nothing_is_reserved_and_none_is_shown(make_cfg):
    cfg = make_cfg(*TWO_EACH)
    places = reserve(cfg, compute_device_allocation(cfg, 0))
    assert places.group is None
    for options in (places.engine(0), places.reference(1), places.trainer(1)):
        assert (options["num_cpus"], options["num_gpus"]) == (0, 0)
        assert options["runtime_env"]["env_vars"]["CUDA_VISIBLE_DEVICES"] == ""


def test_a_process_asks_for_its_share_in_its_bundle(allocate):
    allocation = allocate(6, *TWO_EACH)
    places = Places(allocation, {"train": 3, "inference": 4, "reference": 5}, group=object())
    for options, num_gpus, bundle, threads in (
        (places.engine(0), 2, 0, 4),
        (places.reference(1), 1, 2, 5),
        (places.trainer(1), 1, 4, 3),
    ):
        assert options["num_gpus"] == num_gpus
        assert options["scheduling_strategy"].placement_group_bundle_index == bundle
        assert options["runtime_env"]["env_vars"] == {"OMP_NUM_THREADS": str(threads)}


def test_shares_of_one_accelerator_fit_into_it(allocate):
    places = Places(allocate(1), {"train": 1, "inference": 1, "reference": 1}, group=object())
    asked = [options["num_gpus"] for options in (places.engine(0), places.reference(0), places.trainer(0))]
    assert all(0 < share < 1 for share in asked)
    assert sum(asked) <= 1


def test_the_training_task_has_the_user_s_options_beside_its_place(make_cfg):
    cfg = make_cfg("ray.train_handler_config.num_cpus=2", "++ray.train_handler_config.runtime_env.env_vars.MINE=yes")
    places = reserve(cfg, compute_device_allocation(cfg, 0))
    first, second = places.trainer(0), places.trainer(1)
    assert (first["num_cpus"], second["num_cpus"]) == (2, 0)
    assert first["runtime_env"]["env_vars"] == second["runtime_env"]["env_vars"] | {"MINE": "yes"}


def test_an_evaluation_alone_has_engines_and_a_process_without_an_accelerator(allocate):
    allocation = allocate(2, "eval.only=true", "inference_model.num_replicas=2")
    assert bundles(allocation) == [(0,), (1,)]
    places = Places(allocation, {"train": 1, "inference": 1, "reference": 1}, group=object())
    assert places.engine(1)["num_gpus"] == 1
    assert places.trainer(0)["num_gpus"] == 0
    assert places.trainer(0)["runtime_env"]["env_vars"]["CUDA_VISIBLE_DEVICES"] == ""


def test_an_engine_must_fit_on_a_host(allocate):
    allocation = allocate(6, "inference_model.num_devices=4")
    check_hosts(allocation, [2.0, 4.0])
    with pytest.raises(UserError, match=r"num_devices \(4\) .* none has more than 3: .*num_replicas"):
        check_hosts(allocation, [3.0, 3.0])


def test_without_accelerators_any_host_will_do(make_cfg):
    check_hosts(compute_device_allocation(make_cfg(*TWO_EACH), 0), [])


# --- threads ---


def test_threads_are_those_given(make_cfg):
    cfg = make_cfg("train_model.num_threads=3", "inference_model.num_threads=4", "ref_model.num_threads=5")
    assert default_threads(cfg) == {"train": 3, "inference": 4, "reference": 5}


def test_models_that_work_at_the_same_time_share_the_cores(make_cfg, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert default_threads(make_cfg()) == {"train": 8, "inference": 8, "reference": 8}
    assert default_threads(make_cfg("train.sync_iter=false")) == {"train": 4, "inference": 4, "reference": 4}
    assert default_threads(make_cfg(mode="async")) == {"train": 4, "inference": 4, "reference": 4}
    several = make_cfg("train_model.num_devices=2", "inference_model.num_replicas=2", "inference_model.num_devices=2")
    assert default_threads(several) == {"train": 4, "inference": 4, "reference": 8}
    alone = make_cfg(f"train.from_expert_set={Path(__file__).parent}", "train.sync_iter=false")
    assert default_threads(alone) == {"train": 8, "inference": 8, "reference": 8}
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert set(default_threads(make_cfg(mode="async")).values()) == {1}
