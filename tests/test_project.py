"""The files around the code: the README's commands and snippets are real, requirements pinned, make explains itself."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from expert_iteration import keys
from expert_iteration.cli import compose_config
from expert_iteration.loss import SFTLoss
from expert_iteration.resolve import resolve_config

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text()
REQUIREMENTS = ["requirements_cpu.txt", "requirements_gsm8k.txt", "requirements_ifeval.txt", "tests/requirements.txt"]
SECTIONS = [
    "Quick start",
    "Overview",
    "Key Differences from GRPO and other RL algorithms",
    "Installation",
    "Hardware Requirements",
    "Configuration",
    "Usage",
    "Monitoring",
    "Checkpointing",
    "Debugging Out-of-memory issues",
    "Directory Structure",
    "Output Structure",
    "Theoretical Background",
    "Comparison with Other Methods",
]


def blocks(language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


def commands(first_word):
    lines = (
        line.split("  #")[0].strip() for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()
    )
    return [line for line in lines if line.split()[:1] == [first_word]]


def pins(name):
    lines = (line.split("#")[0].strip() for line in (REPO / name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-r ")]


def test_the_readme_has_the_published_sections_in_order():
    assert re.findall(r"^## (.*)$", README, flags=re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("command", commands("python"))
def test_every_command_of_the_readme_composes(command, tmp_path):
    _, script, *arguments = shlex.split(command)
    (tmp_path / "RUN_DIR" / ".hydra").mkdir(parents=True)
    (tmp_path / "RUN_DIR" / ".hydra" / "config.yaml").touch()
    done = subprocess.run(
        [sys.executable, str(REPO / script), *arguments, *([] if "--cfg" in arguments else ["--cfg", "job"])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "total_dialog_turns" in done.stdout


def test_the_readme_shows_what_it_promises():
    assert len(commands("python")) >= 9
    assert commands("make") == ["make demo", "make test"]


def flat(section, prefix=""):
    """The dotted keys of a nested dictionary, with their values."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_yaml_snippet_of_the_readme_names_real_keys(block):
    overrides = [f"{key}={'null' if value is None else value}" for key, value in flat(yaml.safe_load(block))]
    assert all(keys.is_known(override.split("=")[0]) for override in overrides)
    resolve_config(compose_config("ei_gsm8k", overrides=[*overrides, "device=cpu"]), "sync")


def test_the_loss_snippet_of_the_readme_runs(load_tiny_model, tiny_tokenizer, make_cfg):
    (snippet,) = [block for block in blocks("python") if "SFTLoss" in block]
    names = {
        "SFTLoss": SFTLoss,
        "cfg": make_cfg(),
        "policy_training": load_tiny_model(),
        "train_tokenizer": tiny_tokenizer,
        "train_device": torch.device("cpu"),
    }
    exec(snippet, names)
    assert names["loss_fn"].kl_to_ref_coeff == make_cfg().train.kl_to_ref_coeff


def test_the_directory_structure_of_the_readme_is_that_of_the_repository():
    (listing,) = [block for block in blocks("") if "ei_utils.py" in block]
    named = set(re.findall(r"\b[a-z_0-9]+\.py\b", listing))
    there = {path.name for path in (REPO / "expert_iteration").glob("*.py")} - {"__init__.py"}
    assert there <= named
    assert named - there <= {"ei_utils.py", "sync.py", "async.py"}


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_requirements_are_pinned_once(name):
    packages = [re.fullmatch(r"([A-Za-z0-9_-]+)(\[\w+\])?==[\w.]+", line) for line in pins(name)]
    assert all(packages), pins(name)
    names = [match[1].lower() for match in packages]
    assert len(names) == len(set(names))


def test_shared_pins_agree():
    versions = {}
    for name in REQUIREMENTS:
        for line in pins(name):
            package, version = re.split(r"(?:\[\w+\])?==", line)
            versions.setdefault(package.removesuffix("-cpu"), set()).add(version)
    assert {package: found for package, found in versions.items() if len(found) > 1} == {}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_lists_the_documented_targets():
    done = subprocess.run(["make", "help"], cwd=REPO, capture_output=True, text=True, check=True)
    for target in ("demo", "test", "lint", "install"):
        assert f"make {target}" in done.stdout
