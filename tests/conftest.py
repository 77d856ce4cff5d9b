"""Fixtures that several test files share: the tiny model, configurations, the scripts as modules, one Ray instance."""

import importlib.util
import os
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest

from expert_iteration.cli import compose_config
from expert_iteration.config import Config
from expert_iteration.resolve import resolve_config
from expert_iteration.tiny import ensure_tiny_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The tiny model after two steps of its warm start: as good as random, real in everything else."""
    return ensure_tiny_model(0, tmp_path_factory.mktemp("tiny"), progress=False, steps=2)


@pytest.fixture(scope="session")
def warm_tiny_model():
    """The tiny model as runs use it, from the user's cache; built there in a minute when it is missing."""
    return ensure_tiny_model(0, progress=False)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_folder):
    """The tokenizer of the tiny model."""
    from expert_iteration.chat_template import load_tokenizer

    return load_tokenizer(str(tiny_folder))


@pytest.fixture
def load_tiny_model(tiny_folder):
    """A function that loads the tiny model afresh, in float32 and evaluation mode."""
    from expert_iteration.models import load_model

    return lambda: load_model(str(tiny_folder), dtype="float32", attn_implementation="sdpa", device="cpu")


@cache
def _resolved(overrides: tuple[str, ...], mode: str) -> Config:
    return resolve_config(compose_config("ei_tiny", mode, overrides), mode)


@pytest.fixture(scope="session")
def make_cfg():
    """A function from overrides to the checked configuration of `ei_tiny`, a copy that the test may change."""
    return lambda *overrides, mode="sync": deepcopy(_resolved(overrides, mode))


@pytest.fixture(scope="session")
def load_script():
    """A function that imports a script by its hyphenated name, for instance "expert-iteration-sync"."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name.replace("-", "_"), ROOT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def ray_session():
    """One Ray instance of two CPUs for all tests; its workers import the package, ei_utils and the test files."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield
    ray.shutdown()
