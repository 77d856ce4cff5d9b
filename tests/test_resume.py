"""`expert_iteration.resume` and `resume_command`: where a run goes on, whether it fits, its directory as it was."""

import json
from types import SimpleNamespace

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from test_checkpoint_files import save

from expert_iteration import resume
from expert_iteration.checkpoint_files import MANIFEST, open_checkpoint
from expert_iteration.config import to_plain_dict
from expert_iteration.errors import UserError
from expert_iteration.resume import Fingerprint, check_fits, find_checkpoint, rewind, run_directory_of
from expert_iteration.resume_command import continue_command
from expert_iteration.sizes import derive_sizes

FOUND = Fingerprint(tokenizer="T", data="D")


@pytest.fixture
def run_dir(tmp_path):
    """A run directory with checkpoints at steps 2 and 4, as a run that was cut off leaves it."""
    run_dir = tmp_path / "a run"
    hydra = run_dir / ".hydra"
    hydra.mkdir(parents=True)
    (hydra / "config.yaml").write_text("logging:\n  checkpoint_dir: checkpoints\n")
    (hydra / "hydra.yaml").write_text("hydra:\n  job:\n    config_name: ei_tiny\n")
    (hydra / "overrides.yaml").write_text(yaml.safe_dump(["mode=sync", "train.topk_size=3", "resume_from=/old"]))
    (run_dir / "checkpoints").mkdir()
    for step in (2, 4):
        save(run_dir / "checkpoints", step)
    return run_dir


def damage(run_dir, step):
    (run_dir / "checkpoints" / f"checkpoint_{step}.pt").write_bytes(b"cut")


def cfg_of(make_cfg, *overrides, mode="sync", **changes):
    cfg = make_cfg(*overrides, mode=mode)
    for name, value in changes.items():
        setattr(cfg, name, value)
    return cfg


# --- which checkpoint ---


def test_a_run_starts_afresh_unless_it_is_told_to_go_on(make_cfg, run_dir):
    assert find_checkpoint(make_cfg(), run_dir) == (None, [])


@pytest.mark.parametrize("named", ["", "checkpoints/checkpoint_2", "checkpoints/checkpoint_2.pt"])
def test_resume_from_takes_the_newest_of_a_run_or_the_one_that_is_named(make_cfg, run_dir, named):
    checkpoint, notes = find_checkpoint(cfg_of(make_cfg, resume_from=str(run_dir / named)), run_dir)
    assert checkpoint.step == (2 if named else 4)
    assert notes == []


def test_a_damaged_one_is_passed_over_and_named(make_cfg, run_dir):
    damage(run_dir, 4)
    for changes in ({"resume_from": str(run_dir)}, {"resume": "auto"}):
        checkpoint, (note,) = find_checkpoint(cfg_of(make_cfg, **changes), run_dir)
        assert checkpoint.step == 2
        assert "checkpoint_4 is damaged: checkpoint_4.pt has 3 bytes in place of 28" in note


def test_a_damaged_one_that_is_named_is_refused(make_cfg, run_dir):
    damage(run_dir, 4)
    cfg = cfg_of(make_cfg, resume_from=str(run_dir / "checkpoints" / "checkpoint_4.pt"))
    with pytest.raises(UserError, match=r"checkpoint_4\.pt has 3 bytes .*Give the run's directory"):
        find_checkpoint(cfg, run_dir)


def test_a_run_without_a_whole_one_is_refused_with_the_reasons(make_cfg, run_dir):
    for step in (2, 4):
        damage(run_dir, step)
    with pytest.raises(UserError, match=r"no whole checkpoint .*checkpoint_4 is damaged.*checkpoint_2 is damaged"):
        find_checkpoint(cfg_of(make_cfg, resume_from=str(run_dir)), run_dir)


def test_it_goes_on_in_its_own_directory_only(make_cfg, run_dir, tmp_path):
    with pytest.raises(UserError, match=r"resume_from .* goes on in its own run directory, but hydra\.run\.dir is"):
        find_checkpoint(cfg_of(make_cfg, resume_from=str(run_dir)), tmp_path / "other")


def test_auto_starts_afresh_where_there_is_none_and_nothing_that_lay_there_is_lost(make_cfg, run_dir):
    for step in (2, 4):
        damage(run_dir, step)
    (run_dir / "metrics.jsonl").write_text("{}\n")
    checkpoint, notes = find_checkpoint(cfg_of(make_cfg, resume="auto"), run_dir)
    assert checkpoint is None
    assert "starting afresh; what lay there is now in abandoned-1/" in notes[-1]
    assert {path.name for path in (run_dir / "abandoned-1").iterdir()} == {
        *("metrics.jsonl", "checkpoint_2", "checkpoint_2.pt", "checkpoint_4", "checkpoint_4.pt")
    }
    assert find_checkpoint(cfg_of(make_cfg, resume="auto"), run_dir) == (None, [])


def test_auto_leaves_the_checkpoints_of_another_run_alone(make_cfg, run_dir, tmp_path):
    folder = run_dir / "checkpoints" / "checkpoint_4"
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"run_dir": str(run_dir)}))
    cfg = cfg_of(make_cfg, f"logging.checkpoint_dir='{run_dir / 'checkpoints'}'", resume="auto")
    assert find_checkpoint(cfg, run_dir)[0].step == 4
    with pytest.raises(UserError, match="holds the checkpoints of another run"):
        find_checkpoint(cfg, tmp_path / "other")


def test_a_checkpoint_on_another_disk_knows_its_run(run_dir, tmp_path):
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    folder = save(elsewhere, 6)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"run_dir": str(run_dir)}))
    assert run_directory_of(folder) == run_directory_of(folder.with_name("checkpoint_6.pt")) == run_dir
    with pytest.raises(UserError, match="neither a run directory"):
        run_directory_of(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        run_directory_of(tmp_path / "nowhere")


# --- whether it fits ---


def checkpoint_of(cfg, **changes):
    sizes = derive_sizes(cfg)
    about = {"turns_per_batch": sizes.turns_per_batch, "buffer_size": sizes.buffer_size, "tokenizer": "T", "data": "D"}
    return SimpleNamespace(folder="checkpoint_4", manifest={"config": to_plain_dict(cfg), **about, **changes})


def fits(checkpoint, cfg):
    return check_fits(checkpoint, cfg, derive_sizes(cfg), FOUND)


def test_the_same_run_fits_without_a_word(make_cfg):
    assert fits(checkpoint_of(make_cfg()), make_cfg()) == []


def test_what_may_change_is_listed(make_cfg):
    cfg = make_cfg("train.total_dialog_turns=8192", "train.checkpoint_frequency=7", "logging.backend=none")
    assert fits(checkpoint_of(make_cfg()), cfg) == [
        "changed since the checkpoint: train.total_dialog_turns: 4096 -> 8192",
        "changed since the checkpoint: train.checkpoint_frequency: 100 -> 7",
        "changed since the checkpoint: logging.backend: wandb -> none",
    ]


@pytest.mark.parametrize(
    ("overrides", "changes", "said"),
    [
        (("train.topk_size=3", "optimizer.lr=1e-5"), {}, ["train.topk_size: 2 -> 3", "optimizer.lr: 0.0002 -> 1e-05"]),
        (("train_model.num_devices=2",), {}, ["train_model.num_devices: 1 -> 2"]),  # another world
        (("model.name=gpt2",), {}, ["model.name: tiny -> gpt2"]),
        (("logging.checkpoint_dir=elsewhere",), {}, ["logging.checkpoint_dir: checkpoints -> elsewhere"]),
        ((), {"tokenizer": "other"}, ["another tokenizer"]),
        ((), {"data": "other"}, ["other prompts"]),
        (("eval.metric=greedy",), {}, ["eval.metric: pass@1 -> greedy"]),
        (("train.total_dialog_turns=64",), {}, ["turns per batch: 256 -> 64", "buffer size: 64 -> 16"]),
    ],
)
def test_what_does_not_fit_is_refused_with_every_difference(make_cfg, overrides, changes, said):
    with pytest.raises(UserError) as error:
        fits(checkpoint_of(make_cfg(), **changes), make_cfg(*overrides))
    for part in said:
        assert f"\n  {part}" in str(error.value)


def test_a_key_that_an_older_version_did_not_have_is_no_difference(make_cfg):
    checkpoint = checkpoint_of(make_cfg())
    del checkpoint.manifest["config"]["train"]["topk_size"]
    assert fits(checkpoint, make_cfg("train.topk_size=3")) == []


def test_every_key_that_may_change_exists():
    from expert_iteration.keys import leaf_keys, sections

    assert set(resume.MAY_CHANGE) <= {*leaf_keys(), *sections()}


def test_other_tokens_or_prompts_have_another_fingerprint(tiny_tokenizer):
    from copy import deepcopy

    from expert_iteration.tasks import Problem

    def task(answer):
        return SimpleNamespace(train=[Problem("q", answer)], heldout=[], examples=())

    first = resume.fingerprint(task("1"), tiny_tokenizer)
    assert resume.fingerprint(task("1"), tiny_tokenizer) == first
    assert resume.fingerprint(task("2"), tiny_tokenizer).data != first.data
    other = deepcopy(tiny_tokenizer)
    other.chat_template += " "
    assert resume.fingerprint(task("1"), other).tokenizer != first.tokenizer


# --- the directory as it was ---


def test_a_directory_is_rewound_to_the_checkpoint(run_dir):
    lines = [
        {"step": 1, "collector/batch": 1.0},
        {"step": 2, "collector/batch": 2.0},  # of a batch that the buffer did not hold yet: it comes again
        {"step": 2, "train/loss": 1.0},
    ]
    kept = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "metrics.jsonl").write_text(kept + '{"step": 3}\n{"st')
    (run_dir / "samples.jsonl").write_text('{"step": 3}\n')
    for name in ("summary.json", "report.html"):
        (run_dir / name).write_text("")
    (run_dir / "expert_set").mkdir()
    for batch in (1, 2):
        (run_dir / "expert_set" / f"batch_{batch:06d}.parquet").write_text("")
    folder = run_dir / "checkpoints" / "checkpoint_2"
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest |= {"file_bytes": {"metrics.jsonl": len(kept), "samples.jsonl": 0}, "num_batches": 1}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for _ in range(2):
        rewind(run_dir, open_checkpoint(folder))
        metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert metrics == [lines[0], lines[2]]
        assert (run_dir / "samples.jsonl").read_text() == ""
        assert not (run_dir / "summary.json").exists()
        assert [path.name for path in (run_dir / "expert_set").iterdir()] == ["batch_000001.parquet"]
        names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        assert names == ["checkpoint_2", "checkpoint_2.pt"]


# --- the command line ---


def continued(*overrides, config_name=None, multirun=False):
    return continue_command(OverridesParser.create().parse_overrides(list(overrides)), config_name, multirun)


def test_resume_from_alone_is_the_command_line_of_the_run(run_dir):
    flags, overrides = continued("mode=sync", f"resume_from='{run_dir}'", "train.total_dialog_turns=99")
    assert flags == ["--config-name", "ei_tiny"]
    assert overrides == ["hydra.output_subdir=.hydra/resumed-1", f"hydra.run.dir='{run_dir}'", "train.topk_size=3"]


def test_settings_that_are_given_win_over_those_of_the_run(run_dir):
    _, overrides = continued(f"resume_from='{run_dir}'", "train.topk_size=2")
    assert overrides[2:] == ["mode=sync"]


def test_a_configuration_that_is_named_is_taken_as_it_is(run_dir):
    flags, overrides = continued(f"resume_from='{run_dir}'", config_name="ei_tiny")
    assert flags == []
    assert overrides == ["hydra.output_subdir=.hydra/resumed-1", f"hydra.run.dir='{run_dir}'"]


def test_each_continuation_has_its_files_beside_the_first_and_the_last_settings_hold(run_dir):
    again = run_dir / ".hydra" / "resumed-1"
    again.mkdir()
    (again / "accepted").touch()
    (again / "hydra.yaml").write_text("hydra:\n  job:\n    config_name: ei_tiny\n")
    (again / "overrides.yaml").write_text(yaml.safe_dump(["mode=sync", "train.total_dialog_turns=99"]))
    _, overrides = continued(f"resume_from='{run_dir}'")
    assert overrides[0] == "hydra.output_subdir=.hydra/resumed-2"
    assert overrides[2:] == ["mode=sync", "train.total_dialog_turns=99"]


def test_what_was_refused_is_not_asked_again(run_dir):
    refused = run_dir / ".hydra" / "resumed-1"  # Hydra writes it before anybody has looked
    refused.mkdir()
    (refused / "hydra.yaml").write_text("hydra:\n  job:\n    config_name: ei_tiny\n")
    (refused / "overrides.yaml").write_text(yaml.safe_dump(["mode=sync", "train.topk_size=999"]))
    _, overrides = continued(f"resume_from='{run_dir}'")
    assert overrides == [
        *("hydra.output_subdir=.hydra/resumed-2", f"hydra.run.dir='{run_dir}'"),
        *("mode=sync", "train.topk_size=3"),
    ]


def test_paths_are_of_where_the_run_was_started_and_so_is_the_configuration(run_dir):
    (run_dir / ".hydra" / "hydra.yaml").write_text(
        "hydra:\n  job:\n    config_name: mine\n  runtime:\n    cwd: /home/me\n    config_sources:\n"
        "    - {path: /home/me/configs, provider: command-line}\n    - {path: /suite/config, provider: main}\n"
    )
    given = ["env.dataset_path=rows.jsonl", "reward.fn=my.py:f", "model.name=ORG/MODEL", "tiny.cache_dir=/abs"]
    given += ["model.chat_template=mine.jinja", "reward.openai_prompt=judge.txt"]
    given += ["env.dataset_path='my rows.csv'", "++env.dataset_path=rows.csv", "+reward.fn=my.py:f", "~env.split"]
    given += [
        "train.from_expert_set=${oc.env:SETS}/a",
        "env.dataset_path=sets/${env.dataset}",
        "env.dataset_path=null",
        "env.prompt_column=rows.csv",
    ]
    given += ["reward.fn=[tiny,my.py:f,'own, b.py:g',/abs.py:h,my.module:i]"]
    (run_dir / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(given))
    flags, overrides = continued(f"resume_from='{run_dir}'")
    assert flags == ["--config-name", "mine", "--config-dir", "/home/me/configs"]
    assert overrides[2:] == [
        *("env.dataset_path=/home/me/rows.jsonl", "reward.fn=/home/me/my.py:f"),
        *("model.name=ORG/MODEL", "tiny.cache_dir=/abs", "model.chat_template=/home/me/mine.jinja"),
        "reward.openai_prompt=/home/me/judge.txt",
        *("env.dataset_path='/home/me/my rows.csv'", "++env.dataset_path=/home/me/rows.csv"),
        *("+reward.fn=/home/me/my.py:f", "~env.split", "train.from_expert_set=${oc.env:SETS}/a"),
        "env.dataset_path='/home/me/sets/${env.dataset}'",
        *("env.dataset_path=null", "env.prompt_column=rows.csv"),
        "reward.fn=[tiny,/home/me/my.py:f,'/home/me/own, b.py:g',/abs.py:h,my.module:i]",
    ]


def test_auto_leaves_the_first_configuration_alone_and_the_command_line_as_it_is(run_dir, tmp_path):
    flags, overrides = continued("resume=auto", f"hydra.run.dir='{run_dir}'")
    assert (flags, overrides) == ([], ["hydra.output_subdir=.hydra/resumed-1"])
    assert continued("resume=auto", f"hydra.run.dir='{tmp_path / 'new'}'") == ([], [])
    assert continued("mode=sync") == continued("resume=never") == ([], [])
    with pytest.raises(UserError, match=r"resume \(auto\) needs hydra\.run\.dir"):
        continued("resume=auto")


@pytest.mark.parametrize("override", ["resume_from='{}'", "resume=auto"])
def test_a_sweep_goes_on_with_nothing(run_dir, override):
    with pytest.raises(UserError, match="go on with one run"):
        continued(override.format(run_dir), multirun=True)
