"""The command line: what parses, what is refused and how, and what a failing job does to the others."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.errors import HydraException

from expert_iteration import cli
from expert_iteration.cli import CONFIG_DIR, launch, prepare_arguments
from expert_iteration.config import Config
from expert_iteration.errors import UserError

REPO = CONFIG_DIR.parent
NO_ACCELERATOR = {"CUDA_VISIBLE_DEVICES": ""}

# The commands that must keep working: (script, arguments, some of the keys that result)
COMMANDS = [
    ("sync", "mode=sync", {"env.dataset": "gsm8k", "train.sync": True}),
    ("async", "mode=async", {"env.dataset": "gsm8k", "train.sync": False}),
    ("sync", "", {"train.sync": True}),
    ("async", "", {"train.sync": False}),
    ("sync", "mode=sync --config-name ei_ifeval", {"env.dataset": "ifeval", "train.optim_batch_size": 2}),
    (
        "sync",
        "mode=sync env.dataset=ifeval env.repeats=64 train.topk_size=8 train.kl_to_ref_coeff=0.5",
        {"env.dataset": "ifeval", "env.repeats": 64, "train.topk_size": 8, "train.kl_to_ref_coeff": 0.5},
    ),
    ("sync", "mode=sync model.name=ORG/MODEL", {"model.name": "ORG/MODEL"}),
    (
        "sync",
        "mode=sync --multirun train.topk_size=4,8 train.kl_to_ref_coeff=0.5,1.0",
        {"train.topk_size": 4, "train.kl_to_ref_coeff": 0.5},
    ),
    (
        "async",
        "mode=async train_model.num_devices=2 ref_model.num_devices=2 inference_model.num_devices=2",
        {"train_model.num_devices": 2, "ref_model.num_devices": 2, "inference_model.num_devices": 2},
    ),
    ("sync", "mode=sync --config-name ei_tiny", {"model.name": "tiny"}),
    ("async", "--config-name ei_tiny mode=async train.epochs=3", {"model.name": "tiny", "train.epochs": 3}),
]


def run_script(mode: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(REPO / f"expert-iteration-{mode}.py"), *arguments],
        cwd=cwd,
        env=os.environ | NO_ACCELERATOR | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def select(config: dict, key: str):
    for part in key.split("."):
        config = config[part]
    return config


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory to run jobs in, within this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return tmp_path


@pytest.mark.parametrize(("mode", "arguments", "expected"), COMMANDS)
def test_published_commands_show_their_configuration(mode, arguments, expected, tmp_path):
    done = run_script(mode, *shlex.split(arguments), "--cfg", "job", cwd=tmp_path, VLLM_USE_V1="0")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert {key: select(config, key) for key in expected} == expected
    assert list(tmp_path.iterdir()) == []  # looking leaves nothing behind


def test_flags_stand_anywhere(tmp_path):
    results = [
        run_script("sync", *arguments, cwd=tmp_path).stdout
        for arguments in (
            ["--cfg", "job", "train.topk_size=2", "--config-name", "ei_tiny", "seed=3"],
            ["train.topk_size=2", "--config-name=ei_tiny", "seed=3", "--cfg", "job"],
            ["-cn", "ei_tiny", "-c", "job", "train.topk_size=2", "seed=3"],
        )
    ]
    assert "seed: 3" in results[0]
    assert results[0] == results[1] == results[2]


def test_looking_at_the_configuration_imports_nothing_heavy():
    code = (
        "import sys; from expert_iteration import cli; cli.launch(lambda cfg, run_dir: None, 'sync', ['--cfg', 'job']);"
        "print([m for m in ('torch', 'ray', 'vllm', 'torchrl', 'tensordict', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_what_is_there(tmp_path):
    done = run_script("sync", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "expert-iteration-sync" in done.stdout
    assert "--config-name chooses the task" in done.stdout
    assert "mode: async, sync" in done.stdout
    assert "topk_size: 4" in done.stdout


@pytest.mark.parametrize(
    ("mode", "arguments", "parts"),
    [
        ("sync", ["mode=async"], ["python expert-iteration-async.py mode=async"]),
        ("async", ["mode=sync"], ["python expert-iteration-sync.py mode=sync"]),
        ("sync", [], ["device (cuda)", "make demo", "device=cpu"]),
        ("sync", ["--config-name", "ei_ifeval"], ["device (cuda)", "make demo", "device=cpu"]),
        ("sync", ["train.topk_size=64"], ["train.topk_size (64) cannot exceed env.repeats (32)"]),
        ("sync", ["train.topk_size=many"], ["train.topk_size: Value 'many' of type 'str'", "Integer"]),
        ("sync", ["train.selection=best"], ["train.selection: Invalid value 'best'", "[above_median, topk, threshold"]),
        ("sync", ["seed=null"], ["seed: null is not allowed"]),
        ("sync", ["train=5"], ["train: Invalid type"]),
        ("sync", ["train={epochz: 3}"], ["train.epochz", "did you mean train.epochs?"]),
        ("sync", ["optimizer.lr=${train.lr}"], ["Interpolation key 'train.lr' not found"]),
        ("sync", ["hydra.run.dir=${train.dir}"], ["hydra.run.dir", "Interpolation key 'train.dir' not found"]),
        ("sync", ["train.epochz=3"], ["train.epochz", "did you mean train.epochs?"]),
        ("sync", ["+train.epochz=3"], ["train.epochz", "did you mean train.epochs?"]),
        ("sync", ["++train.epochz=3"], ["train.epochz", "did you mean train.epochs?"]),
        ("sync", ["~train.epochz"], ["train.epochz", "did you mean train.epochs?"]),
        ("sync", ["train.epochz=3", "--cfg", "job"], ["train.epochz", "did you mean train.epochs?"]),
        ("sync", ["update_weight_frequency=3"], ["did you mean train.weight_update_frequency?"]),
        ("sync", ["ref_model.lora.enabled=true"], ["ref_model.lora.enabled", "is gone"]),
        ("sync", ["train.exp_name=x"], ["use logging.experiment_name"]),
        ("sync", ["~train.epochs"], ["train.epochs"]),
        ("sync", ["train.epochs"], ["train.epochs", "EQUAL"]),
        ("sync", ["mode=both"], ["mode/both", "async", "sync"]),
        ("sync", ["--config-name", "no_such_file"], ["no_such_file"]),
        ("sync", ["train.epochs=3,4"], ["train.epochs=3,4", "--multirun"]),
        ("sync", ["model.name=~/no/such/model"], ["/no/such/model", "config.json"]),
    ],
)
def test_mistakes_answer_without_a_traceback(mode, arguments, parts, here, capsys):
    assert launch(refuse_to_start, mode, arguments) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Error: ")
    assert "Traceback" not in shown
    assert [part for part in parts if part not in shown] == []


def refuse_to_start(cfg, run_dir):
    raise AssertionError("a mistake must be found before the run starts")


@pytest.mark.parametrize(("mode", "other"), [("sync", "async"), ("async", "sync")])
def test_scripts_refuse_each_other_s_mode(mode, other, tmp_path):
    done = run_script(mode, f"mode={other}", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        f"Error: mode={other} (train.sync={str(other == 'sync').lower()}) does not run in expert-iteration-{mode}.py: "
        f"use `python expert-iteration-{other}.py mode={other}`.\n"
    )


def test_the_default_without_an_accelerator_names_the_ways_out(tmp_path):
    done = run_script("sync", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: device (cuda) needs an accelerator")
    assert "`make demo`" in done.stderr
    assert "device=cpu" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_user_s_own_file_is_checked_too(here, capsys):
    (here / "mine.yaml").write_text("defaults: [base, mode: sync, _self_]\ntrain: {exp_name: a}\nmodel: {name: tiny}\n")
    assert launch(refuse_to_start, "sync", ["--config-dir", str(here), "--config-name", "mine"]) == 1
    assert capsys.readouterr().err == "Error: train.exp_name had no effect and is gone: use logging.experiment_name.\n"


def test_a_user_s_own_file_says_what_it_lacks(here, capsys):
    (here / "mine.yaml").write_text("defaults: [base, mode: sync, _self_]\nmodel: {name: tiny}\n")
    assert launch(refuse_to_start, "sync", ["--config-dir", str(here), "--config-name", "mine"]) == 1
    assert re.match(r"Error: device, env\.dataset, env\.num_envs.*: no value is set\.", capsys.readouterr().err)


# --- argument handling ---


def test_flags_are_put_first():
    assert prepare_arguments(["mode=sync", "--multirun", "train.topk_size=4,8", "-cn", "ei_tiny"]) == [
        "--multirun",
        "-cn",
        "ei_tiny",
        "mode=sync",
        "train.topk_size=4,8",
    ]


def test_looking_at_a_sweep_shows_its_first_job():
    arguments = ["-m", "train.topk_size=4,8", "train.epochs=range(2,5)", "seed=1", "--cfg", "job"]
    assert prepare_arguments(arguments) == ["--cfg", "job", "train.topk_size=4", "train.epochs=2", "seed=1"]


@pytest.mark.parametrize("prefix", ["", "+", "++", "~"])
def test_unknown_keys_are_refused_however_written(prefix):
    with pytest.raises(UserError, match=r"did you mean train.topk_size\?"):
        prepare_arguments([f"{prefix}train.topk_sise" + ("" if prefix == "~" else "=3")])


@pytest.mark.parametrize("argument", ["mode=async", "hydra.run.dir=/tmp/x", "hydra/launcher=basic", "++train.epochs=2"])
def test_known_keys_groups_and_hydra_s_own_pass(argument):
    assert prepare_arguments([argument]) == [argument]


def test_keys_of_free_dictionaries_need_no_plus():
    assert prepare_arguments(["ray.init_config.address=auto", "+ray.init_config.x=1", "~ray.init_config.address"]) == [
        "++ray.init_config.address=auto",
        "+ray.init_config.x=1",
        "~ray.init_config.address",
    ]


def test_a_user_s_own_config_group_passes(tmp_path):
    (tmp_path / "variant").mkdir()
    arguments = ["--config-dir", str(tmp_path), "+variant=a"]
    assert prepare_arguments(arguments) == arguments
    with pytest.raises(UserError, match="variant is not a configuration key"):
        prepare_arguments(arguments[2:])


def test_home_needs_no_quotes():
    assert prepare_arguments(["model.name=~/a b"]) == ["model.name='~/a b'"]


def test_shell_completion_is_left_to_hydra():
    arguments = ["--shell-completion", "query=bash"]
    assert prepare_arguments(arguments) == arguments


def test_what_is_no_override_is_hydra_s_to_refuse():
    with pytest.raises(HydraException, match=r"train\.epochs"):
        prepare_arguments(["train.epochs"])


# --- jobs ---


TINY = ["--config-name", "ei_tiny"]


def test_main_gets_the_checked_configuration_and_its_run_directory(here):
    jobs = []
    assert launch(lambda cfg, run_dir: jobs.append((cfg, run_dir)), "sync", [*TINY, "train.epochs=3"]) == 0
    [(cfg, run_dir)] = jobs
    assert isinstance(cfg, Config)
    assert cfg.train.epochs == 3
    assert run_dir.parent.parent == here / "outputs"
    composed = yaml.safe_load((run_dir / ".hydra" / "config.yaml").read_text())
    assert composed["train"]["epochs"] == 3
    assert composed["train"]["max_bad_steps"] == 5  # the whole configuration, not just the task file


def test_settings_without_effect_are_said_before_main(here, capsys):
    said = []
    arguments = [*TINY, "++train.minor_sft_beta=0.2", "optimizer.scheduler={enabled:false,type:linear}", "seed=1"]
    assert launch(lambda cfg, run_dir: said.append(capsys.readouterr().err), "sync", arguments) == 0
    [lines] = said
    assert [line.split(" has no effect here: ")[0] for line in lines.splitlines()] == [
        "note: train.minor_sft_beta",
        "note: optimizer.scheduler.type",
    ]


@pytest.mark.parametrize("arguments", [[], ["seed=1", "train.topk_size=4", "train.loss_function=sft"]])
def test_a_plain_command_gets_no_notes(arguments, here, capsys):
    assert launch(lambda cfg, run_dir: None, "sync", [*TINY, *arguments]) == 0
    assert capsys.readouterr().err == ""


def test_given_keys_are_those_that_overrides_set():
    overrides = ["mode=sync", "a.b=1", "+c.d='x y'", "++e.f=[1,2]", "~g.h", "i={j:1,k:{l:2}}"]
    assert cli.given_keys(overrides) == ["mode", "a.b", "c.d", "e.f", "g.h", "i.j", "i.k.l"]


def test_run_directory_can_be_chosen(here):
    jobs = []
    assert launch(lambda cfg, run_dir: jobs.append(run_dir), "sync", [*TINY, "hydra.run.dir=mine"]) == 0
    assert jobs == [here / "mine"]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_each_script_runs_in_its_own_mode(mode, here):
    modes = []
    assert launch(lambda cfg, run_dir: modes.append(cfg.train.sync), mode, TINY) == 0
    assert launch(lambda cfg, run_dir: modes.append(cfg.train.sync), mode, [*TINY, f"mode={mode}"]) == 0
    assert modes == [mode == "sync"] * 2


def test_main_does_not_run_when_a_rule_refuses(here, capsys):
    jobs = []
    assert launch(lambda cfg, run_dir: jobs.append(cfg), "sync", [*TINY, "train.topk_size=9"]) == 1
    assert jobs == []
    assert capsys.readouterr().err.startswith("Error: train.topk_size (9) cannot exceed")


def test_a_user_error_is_one_line(here, capsys):
    def main(cfg, run_dir):
        raise UserError("The data are empty: give others.")

    assert launch(main, "sync", TINY) == 1
    assert capsys.readouterr().err == "Error: The data are empty: give others.\n"


class WrappedByRay(UserError):
    """As Ray raises an error of a task: an instance of its class, with the worker's traceback for a text."""

    def __init__(self, cause: UserError):
        super().__init__("ray::train() (pid=1)\n  File worker.py ...")
        self.cause = cause


def test_a_directory_that_cannot_be_written_is_one_line(here, capsys):
    (here / "file").write_text("")
    assert launch(lambda cfg, run_dir: None, "sync", ["--config-name", "ei_tiny", "hydra.run.dir=file/run"]) == 1
    error = capsys.readouterr().err
    assert re.search(r"Error: .*file.* cannot be written \(Not a directory\): give another hydra\.run\.dir", error)
    assert "Traceback" not in error


def test_a_user_error_from_a_ray_task_is_one_line_too(here, capsys):
    def main(cfg, run_dir):
        raise WrappedByRay(UserError("The data are empty: give others."))

    assert launch(main, "sync", TINY) == 1
    assert capsys.readouterr().err == "Error: The data are empty: give others.\n"


def test_any_other_error_shows_its_traceback(here, capsys):
    def main(cfg, run_dir):
        raise KeyError("tokens")

    assert launch(main, "sync", TINY) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert "in main" in shown
    assert "KeyError: 'tokens'" in shown


def test_ctrl_c(here, capsys):
    def main(cfg, run_dir):
        raise KeyboardInterrupt

    assert launch(main, "sync", TINY) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_failing_job_does_not_end_a_sweep(here, capsys):
    jobs = []

    def main(cfg, run_dir):
        jobs.append((cfg.train.topk_size, run_dir.name))
        if cfg.train.topk_size == 2:
            raise RuntimeError("engine died")
        if cfg.train.topk_size == 3:
            raise UserError("The data are empty: give others.")

    arguments = ["mode=sync", "--multirun", "train.topk_size=1,2,9,3,4", *TINY]
    assert launch(main, "sync", arguments) == 1
    assert jobs == [(1, "0"), (2, "1"), (3, "3"), (4, "4")]
    shown = capsys.readouterr().err
    assert "RuntimeError: engine died" in shown
    assert "Error: train.topk_size (9) cannot exceed" in shown
    assert "Error: The data are empty" in shown
    [sweep] = (here / "multirun").glob("*/*")
    assert sorted(path.name for path in sweep.iterdir() if path.is_dir()) == ["0", "1", "2", "3", "4"]


def test_a_sweep_without_failures(here):
    jobs = []
    assert launch(lambda cfg, run_dir: jobs.append(cfg.seed), "sync", ["seed=1,2", "--multirun", *TINY]) == 0
    assert jobs == [1, 2]


def test_a_sweep_with_a_wrong_type_starts_no_job(here):
    jobs = []
    assert launch(lambda cfg, run_dir: jobs.append(cfg.seed), "sync", ["seed=1,two", "--multirun", *TINY]) == 1
    assert jobs == []


def test_logging_of_one_job_is_not_silenced_by_the_next(here):
    """Hydra's `job_logging: disabled` switches existing loggers off at the start of every job."""
    import logging

    states = []

    def main(cfg, run_dir):
        logger = logging.getLogger("expert_iteration.test_cli")
        states.append(logger.disabled)

    assert launch(main, "sync", ["seed=1,2", "--multirun", *TINY]) == 0
    assert states == [False, False]


def test_an_unknown_hub_model_is_refused_before_main(here, monkeypatch, capsys):
    def unavailable(name):
        raise UserError(f"model.name ({name}) cannot be had.")

    monkeypatch.setattr(cli, "check_model_available", unavailable)
    jobs = []
    assert launch(lambda cfg, run_dir: jobs.append(cfg), "sync", [*TINY, "model.name=org/none"]) == 1
    assert jobs == []
    assert capsys.readouterr().err == "Error: model.name (org/none) cannot be had.\n"
