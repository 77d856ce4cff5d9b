"""The rules of `validation.py` for the data of section `env`: which they are, and what custom data need beside them."""

from pathlib import Path

from expert_iteration.config import Config, Dataset
from expert_iteration.errors import UserError
from expert_iteration.hub import HUB_ID
from expert_iteration.reward_sum import named_functions


def tiny_has_no_other_data(cfg: Config) -> None:
    """The task makes its own."""
    for key, value in (("env.dataset_path", cfg.env.dataset_path), ("env.dataset_name", cfg.env.dataset_name)):
        if value is not None and cfg.env.dataset is Dataset.tiny:
            raise UserError(
                f"{key} ({value}) has no effect with env.dataset=tiny, which makes its own problems: set it to null, "
                "or another env.dataset."
            )


def data_have_one_place(cfg: Config) -> None:
    """On this machine or on the hub."""
    if cfg.env.dataset_path is not None and cfg.env.dataset_name is not None:
        raise UserError(
            f"env.dataset_path ({cfg.env.dataset_path}) and env.dataset_name ({cfg.env.dataset_name}) are two places "
            "of the data: set one of them to null."
        )


def dataset_path_exists(cfg: Config) -> None:
    """A file or a folder."""
    path = cfg.env.dataset_path
    if path is not None and not Path(path).exists():
        raise UserError(f"env.dataset_path ({path}) does not exist: correct it, or set it to null for the hub's data.")


def dataset_name_is_a_hub_name(cfg: Config) -> None:
    """Paths have a key of their own."""
    name = cfg.env.dataset_name
    if name is not None and (not HUB_ID.fullmatch(name) or name.startswith(".")):
        raise UserError(
            f"env.dataset_name ({name}) must be a name on the hub such as openai/gsm8k; for a file or a folder use "
            "env.dataset_path."
        )


def custom_data_have_a_place(cfg: Config) -> None:
    """There are no others to take; a run on an expert set takes none."""
    given = (cfg.env.dataset_path, cfg.env.dataset_name, cfg.train.from_expert_set)
    if cfg.env.dataset is Dataset.custom and given == (None, None, None):
        raise UserError(
            "env.dataset=custom needs your data: set env.dataset_path to a file or a folder, or env.dataset_name to a "
            "data set on the hub."
        )


def custom_data_have_a_reward(cfg: Config) -> None:
    """By comparison with a column, or of one's own; a run on an expert set scores nothing."""
    is_scored = cfg.env.answer_column is not None or named_functions(cfg.reward)
    if cfg.env.dataset is Dataset.custom and not is_scored and cfg.train.from_expert_set is None:
        raise UserError(
            "env.dataset=custom without env.answer_column has no reward of its own: name the column with the ground "
            "truth, or give reward.fn or reward.openai_url."
        )


def evaluation_has_a_split_of_its_own(cfg: Config) -> None:
    """What is held out is not trained on; where nothing is trained it may be any."""
    split = cfg.env.split or "train"
    if cfg.env.eval_split == split and not cfg.eval.only:
        raise UserError(
            f"env.eval_split ({split}) is the split that is trained on: name another, or set it to null for the test "
            "split or, where there is none, prompts taken out of training."
        )


def prompt_and_answer_are_two_columns(cfg: Config) -> None:
    """Or the model would be told the answer."""
    column = cfg.env.prompt_column
    if column is not None and column == cfg.env.answer_column:
        raise UserError(f"env.prompt_column and env.answer_column ({column}) must be two columns: correct one of them.")


DATA_RULES = (
    tiny_has_no_other_data,
    data_have_one_place,
    dataset_path_exists,
    dataset_name_is_a_hub_name,
    custom_data_have_a_place,
    custom_data_have_a_reward,
    evaluation_has_a_split_of_its_own,
    prompt_and_answer_are_two_columns,
)
