"""What a run checks and prepares before it starts anything."""

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
    task, _, notes = _prepare_task(cfg_of())
    assert (len(task.train), len(notes)) == (4000, 1)
    shorter, _, notes = _prepare_task(cfg_of("inference_model.max_model_len=80"))
    assert 0 < len(shorter.train) < 4000
    dropped = len(task.train) + len(task.heldout) - len(shorter.train) - len(shorter.heldout)
    assert notes[1].startswith(f"note: {dropped} prompts were left out (")
    assert "for they have more than 48 tokens: '" in notes[1]


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
