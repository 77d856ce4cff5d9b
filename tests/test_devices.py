"""Which model gets which devices."""

from functools import cache

import pytest

from expert_iteration import devices
from expert_iteration.cli import CONFIG_DIR, compose_config
from expert_iteration.config import Config, Parallel
from expert_iteration.devices import check_devices, compute_device_allocation, parallel_kind
from expert_iteration.errors import UserError
from expert_iteration.resolve import resolve_config

TWO_EACH = ("train_model.num_devices=2", "ref_model.num_devices=2", "inference_model.num_devices=2")
FULL = "train_model.lora.enabled=false"
DEDICATED, COLOCATED = "placement=dedicated", "placement=colocated"
PUBLISHED_KEYS = (
    "train_model_devices",
    "inference_model_devices",
    "ref_model_devices",
    "ray_num_gpus",
    "cuda_visible_devices",
)


@cache
def load(*overrides: str, task: str = "ei_gsm8k", mode: str = "sync") -> Config:
    return resolve_config(compose_config(task, mode, overrides), mode)


def allocate(num_accelerators: int, *overrides: str, **kwargs: str) -> dict:
    return compute_device_allocation(load(*overrides, **kwargs), num_accelerators)


def placed(num_accelerators: int, *overrides: str, **kwargs: str) -> tuple:
    """Engines, references and trainers."""
    allocation = allocate(num_accelerators, *overrides, **kwargs)
    inference = [device for replica in allocation["inference_replicas"] for device in replica]
    assert allocation["inference_model_devices"] == inference
    return allocation["inference_replicas"], allocation["ref_model_devices"], allocation["train_model_devices"]


@pytest.mark.parametrize("placement", ["auto", "dedicated", "colocated"])
def test_an_evaluation_alone_takes_engines_only(placement):
    overrides = ("eval.only=true", f"placement={placement}", "train_model.lora.enabled=false")
    assert placed(1, *overrides) == ([[0]], [], [])
    assert placed(8, *overrides, "inference_model.num_devices=2", "train_model.num_devices=4") == ([[0, 1]], [], [])
    allocation = allocate(1, *overrides)
    assert (allocation["ray_num_gpus"], allocation["sleeps"]) == (1, False)
    assert allocation["gpu_shares"] == {"train": 0.0, "inference": 1.0, "reference": 0.0}
    with pytest.raises(UserError, match=r"^2 for inference_model = 2 accelerators, but 1 is visible"):
        placed(1, *overrides, "inference_model.num_devices=2")


@pytest.mark.parametrize("placement", ["auto", "dedicated", "colocated"])
def test_an_expert_set_takes_no_engine(placement):
    overrides = (f"train.from_expert_set={CONFIG_DIR}", f"placement={placement}")
    allocation = allocate(1, *overrides)
    assert placed(1, *overrides) == ([], [], [0])
    assert (allocation["ray_num_gpus"], allocation["sleeps"]) == (1, False)
    assert allocation["gpu_shares"] == {"train": 1.0, "inference": 0.0, "reference": 0.0}
    assert placed(0, *overrides, "device=cpu", FULL) == ([], [], [])


def test_without_an_engine_reference_and_trainer_share_what_there_is():
    overrides = (f"train.from_expert_set={CONFIG_DIR}", FULL)
    assert placed(2, *overrides, "inference_model.num_devices=2") == ([], [0], [1])
    assert placed(1, *overrides) == ([], [0], [0])
    assert allocate(1, *overrides)["gpu_shares"] == {"train": 0.5, "inference": 0.0, "reference": 0.5}
    with pytest.raises(UserError, match=r"^1 for ref_model \+ 2 for train_model = 3 accelerators, but 2 are visible"):
        placed(2, *overrides, "train_model.num_devices=2")


@pytest.mark.parametrize("overrides", [("device=cpu",), ("device=auto",), ("device=cpu", *TWO_EACH)])
def test_none_means_cpu(overrides):
    assert allocate(0, *overrides) == {
        "train_model_devices": [],
        "inference_model_devices": [],
        "ref_model_devices": [],
        "ray_num_gpus": 0,
        "cuda_visible_devices": "",
        "inference_replicas": [[]],
        "placement": "cpu",
        "gpu_shares": {"train": 0.0, "inference": 0.0, "reference": 0.0},
        "sleeps": False,
    }


@pytest.mark.parametrize("placement", ["auto", "dedicated", "colocated"])
def test_cpu_stays_on_cpu_beside_accelerators(placement):
    assert allocate(8, "device=cpu", f"placement={placement}") == allocate(0, "device=cpu")


def test_replicas_on_a_cpu_are_processes():
    assert placed(0, "device=cpu", "inference_model.num_replicas=3") == ([[], [], []], [], [])


@pytest.mark.parametrize("num_accelerators", [3, 6, 8])
@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("placement", ["auto", "dedicated"])
def test_each_model_has_its_own(placement, device, num_accelerators):
    allocation = allocate(num_accelerators, FULL, f"device={device}", f"placement={placement}")
    assert {key: allocation[key] for key in PUBLISHED_KEYS} == {
        "inference_model_devices": [0],
        "ref_model_devices": [1],
        "train_model_devices": [2],
        "ray_num_gpus": 3,
        "cuda_visible_devices": "0,1,2",
    }
    assert allocation["placement"] == "dedicated"
    assert allocation["gpu_shares"] == {"train": 1.0, "inference": 1.0, "reference": 1.0}
    assert not allocation["sleeps"]


@pytest.mark.parametrize("placement", ["auto", "dedicated"])
@pytest.mark.parametrize("num_accelerators", [2, 3, 8])
def test_with_adapters_the_reference_needs_none(placement, num_accelerators):
    allocation = allocate(num_accelerators, f"placement={placement}")
    assert placed(num_accelerators, f"placement={placement}") == ([[0]], [], [1])
    assert allocation["gpu_shares"] == {"train": 1.0, "inference": 1.0, "reference": 0.0}
    assert placed(3, f"placement={placement}", "ref_model.num_devices=1") == ([[0]], [1], [2])


@pytest.mark.parametrize("num_accelerators", [6, 8])
@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("overrides", [(), (FULL,)])
def test_the_published_six(overrides, mode, num_accelerators):
    allocation = allocate(num_accelerators, *overrides, *TWO_EACH, mode=mode)
    assert {key: allocation[key] for key in PUBLISHED_KEYS} == {
        "inference_model_devices": [0, 1],
        "ref_model_devices": [2, 3],
        "train_model_devices": [4, 5],
        "ray_num_gpus": 6,
        "cuda_visible_devices": "0,1,2,3,4,5",
    }
    assert allocation["inference_replicas"] == [[0, 1]]
    assert allocation["gpu_shares"] == {"train": 1.0, "inference": 2.0, "reference": 1.0}


def test_ifeval_takes_six():
    assert placed(6, task="ei_ifeval") == ([[0, 1]], [], [2, 3, 4, 5])


def test_replicas_have_devices_of_their_own():
    overrides = ("inference_model.num_replicas=2", "inference_model.num_devices=2")
    assert placed(8, *overrides) == ([[0, 1], [2, 3]], [], [4])
    assert allocate(8, *overrides)["gpu_shares"]["inference"] == 2.0
    with pytest.raises(UserError, match=r"4 for inference_model \+ 1 for train_model = 5 accelerators, but 3 are"):
        allocate(3, *overrides)


@pytest.mark.parametrize(
    ("num_accelerators", "placement"), [(1, "auto"), (1, "colocated"), (3, "colocated"), (8, "colocated")]
)
def test_one_accelerator_holds_all(num_accelerators, placement):
    allocation = allocate(num_accelerators, FULL, f"placement={placement}")
    assert {key: allocation[key] for key in PUBLISHED_KEYS} == {
        "inference_model_devices": [0],
        "ref_model_devices": [0],
        "train_model_devices": [0],
        "ray_num_gpus": 1,
        "cuda_visible_devices": "0",
    }
    assert allocation["placement"] == "colocated"
    assert allocation["inference_replicas"] == [[0]]
    shares = allocation["gpu_shares"].values()
    assert min(shares) > 0
    assert sum(round(share * devices.RAY_RESOLUTION) for share in shares) <= devices.RAY_RESOLUTION


def test_shares_leave_out_a_reference_that_is_none():
    assert allocate(1)["gpu_shares"] == {"train": 0.5, "inference": 0.5, "reference": 0.0}


def test_of_two_the_engine_has_one():
    allocation = allocate(2, FULL)
    assert (allocation["placement"], allocation["ray_num_gpus"]) == ("dedicated", 2)
    assert placed(2, FULL) == ([[0]], [1], [1])
    assert allocation["gpu_shares"] == {"train": 0.5, "inference": 1.0, "reference": 0.5}
    assert not allocation["sleeps"]


@pytest.mark.parametrize(
    ("sleeps", "overrides", "mode"),
    [
        (True, (), "sync"),
        (False, ("train.sync_iter=false",), "sync"),  # it generates while the trainer works
        (False, (), "async"),
        (False, ("inference_model.backend=transformers",), "sync"),
    ],
)
def test_the_engine_sleeps_where_it_takes_turns(sleeps, overrides, mode):
    assert allocate(1, *overrides, mode=mode)["sleeps"] == sleeps


# (accelerators, overrides, what is needed, remedies that must be named)
TOO_FEW = [
    (1, (FULL, DEDICATED), "1 for inference_model + 1 for ref_model + 1 for train_model = 3", ["placement=auto lets"]),
    (2, (FULL, DEDICATED), "= 3 accelerators, but 2 are visible", ["lora.enabled=true with ref_model.num_devices=0"]),
    (
        1,
        (DEDICATED,),
        "1 for inference_model + 1 for train_model = 2 accelerators, but 1 is visible",
        ["placement=auto"],
    ),
    (2, ("ref_model.num_devices=1", DEDICATED), "= 3", ["ref_model.num_devices=0 needs none"]),
    (3, TWO_EACH, "2 for inference_model + 2 for ref_model + 2 for train_model = 6", ["every num_devices and"]),
    (2, (*TWO_EACH, DEDICATED), "= 6 accelerators, but 2 are", ["at 1 and placement=auto fits on any"]),
    (4, TWO_EACH, "= 6 accelerators, but 4 are", ["ref_model.num_devices=0 needs none", "every num_devices and"]),
    (1, ("train_model.num_devices=2",), "= 3 accelerators, but 1 is", ["every num_devices and"]),
]


@pytest.mark.parametrize(("num_accelerators", "overrides", "arithmetic", "remedies"), TOO_FEW)
def test_too_few_are_refused_with_arithmetic_and_remedies(num_accelerators, overrides, arithmetic, remedies):
    with pytest.raises(UserError) as error:
        allocate(num_accelerators, *overrides)
    message = str(error.value)
    assert arithmetic in message
    assert [remedy for remedy in [*remedies, "device=cpu needs none (slow)"] if remedy not in message] == []
    allocate(num_accelerators, *overrides, "device=cpu")


def test_remedies_place_the_run():
    for num_accelerators in (1, 2):
        allocate(num_accelerators, FULL, "placement=auto")
        allocate(num_accelerators, "train_model.num_devices=1", "placement=auto")
    allocate(2, DEDICATED, "ref_model.num_devices=0")
    allocate(4, *TWO_EACH, "ref_model.num_devices=0")


def test_the_reference_is_offered_as_a_remedy_only_where_it_suffices():
    with pytest.raises(UserError) as error:
        allocate(3, *TWO_EACH)
    assert "ref_model.num_devices=0" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "train_model.num_devices=2",
        "inference_model.num_devices=2",
        "inference_model.num_replicas=2",
        "ref_model.num_devices=2",
    ],
)
def test_several_devices_cannot_be_colocated(override):
    with pytest.raises(
        UserError, match=rf"placement \(colocated\).*2 for {override.split('.')[0]}.*to 1, or placement="
    ):
        allocate(8, COLOCATED, override)


@pytest.mark.parametrize("placement", ["auto", "dedicated", "colocated"])
def test_cuda_without_accelerators_names_the_ways_out(placement):
    with pytest.raises(UserError, match=r"make demo.*device=cpu"):
        allocate(0, f"placement={placement}")


def test_a_cluster_has_devices_that_this_machine_does_not_see(monkeypatch):
    monkeypatch.setattr(devices, "count_accelerators", lambda: 0)
    check_devices(load("ray.init_config.address=auto"))
    for local in ((), ("ray.init_config.address=local",)):
        with pytest.raises(UserError, match="make demo"):
            check_devices(load(*local))


@pytest.mark.parametrize(
    ("kind", "num_accelerators", "overrides"),
    [
        ("ddp", 2, ()),
        ("ddp", 3, ("train_model.num_devices=2",)),
        ("fsdp", 4, ("train_model.num_devices=2", FULL)),
        ("ddp", 4, ("train_model.num_devices=2", FULL, "train_model.parallel=ddp")),
        ("fsdp", 3, ("train_model.num_devices=2", "train_model.parallel=fsdp")),
        ("ddp", 3, (FULL, "train_model.parallel=fsdp")),  # one rank has nobody to share with
        ("ddp", 0, ("train_model.num_devices=2", FULL, "device=cpu")),
        ("fsdp", 0, ("train_model.num_devices=2", "device=cpu", "train_model.parallel=fsdp")),
    ],
)
def test_full_fine_tuning_on_accelerators_is_shared_out(kind, num_accelerators, overrides):
    cfg = load(*overrides)
    assert parallel_kind(cfg, compute_device_allocation(cfg, num_accelerators)) is Parallel(kind)
