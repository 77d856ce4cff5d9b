"""What a run checks and prepares before it starts anything."""

import re

import pytest

from expert_iteration.errors import UserError
from expert_iteration.run import _describe_optimizer, _prepare_task, _refuse_used_directory


def test_a_directory_that_holds_a_run_is_refused(make_cfg, tmp_path):
    (tmp_path / ".hydra").mkdir()
    _refuse_used_directory(make_cfg(), tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"holds a run already \(metrics\.jsonl\).*hydra\.run\.dir"):
        _refuse_used_directory(make_cfg(), tmp_path)


def test_two_runs_do_not_share_a_directory_of_checkpoints(make_cfg, tmp_path):
    disk = tmp_path / "disk"
    (disk / "checkpoint_4").mkdir(parents=True)
    with pytest.raises(UserError, match=r"logging\.checkpoint_dir .* holds the checkpoints of another run"):
        _refuse_used_directory(make_cfg(f"logging.checkpoint_dir={disk}"), tmp_path / "run")


@pytest.fixture
def cfg_of(make_cfg, tiny_folder):
    return lambda *overrides: make_cfg(f"model.name={tiny_folder}", *overrides)


def test_prompts_that_leave_no_room_are_left_out_and_said(cfg_of):
    few = ("eval.num_prompts=40", "env.max_prompts=30")
    task, _, notes = _prepare_task(cfg_of(*few))
    assert notes == ["tiny: 30 prompts for training, 40 held out for evaluation"]
    shorter, _, notes = _prepare_task(cfg_of(*few, "inference_model.max_model_len=80"))
    assert (len(shorter.train), len(shorter.heldout)) == (30, 40)
    assert shorter.heldout != task.heldout
    assert re.match(r"note: \d+ prompts were left out, for .* have more than 48 tokens \(inference.*\): '", notes[1])
    alone, _, notes = _prepare_task(cfg_of(*few, "eval.only=true"))
    assert (alone.heldout, notes) == (task.heldout, ["tiny: 40 held out for evaluation"])


def test_a_mistake_in_the_data_is_told_before_the_model_is_looked_at(cfg_of, tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\n")
    of_data = ("env.dataset=gsm8k", f"env.dataset_path={tmp_path / 'rows.csv'}", "model.chat_template=none-such")
    with pytest.raises(UserError, match="no usable row"):
        _prepare_task(cfg_of(*of_data))


def test_a_chat_template_that_cannot_be_used_is_refused_before_anything_starts(cfg_of, tmp_path):
    (tmp_path / "mine.jinja").write_text("{% for message in messages %}")
    for template, said in ((tmp_path / "mine.jinja", "TemplateSyntaxError"), ("mine", "which has default")):
        with pytest.raises(UserError, match=rf"^model\.chat_template \({template}\) .*{said}"):
            _prepare_task(cfg_of(f"model.chat_template={template}"))


def test_the_learning_rate_that_was_chosen_is_said(make_cfg):
    assert _describe_optimizer(make_cfg()) == ["AdamW at a learning rate of 0.0002, full fine-tuning"]
    (chosen,) = _describe_optimizer(make_cfg("optimizer.lr=null"))
    assert chosen == "AdamW at a learning rate of 1e-05 (optimizer.lr=null), full fine-tuning"
    (adapters,) = _describe_optimizer(make_cfg("optimizer.lr=null", "train_model.lora.enabled=true"))
    assert adapters == "AdamW at a learning rate of 0.0001 (optimizer.lr=null), adapters of rank 8"
    assert _describe_optimizer(make_cfg("eval.only=true")) == []
