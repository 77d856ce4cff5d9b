"""The schema of the configuration: every key with its type and meaning, and no values.

Values live in `config/*.yaml`, each with a comment on what it costs or gains; no field has a default here, so a value
has one home, and a configuration that lacks a key is refused instead of guessed. Rules between keys are in
`validation.py`, sizes that follow from them in `sizes.py`. Importing this module loads neither torch nor ray nor vllm.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

SCHEMA_NAME = "schema"
# What optimizer.lr=null means. Adapters start at zero and have few parameters: they need larger steps.
FULL_FINE_TUNING_LR = 1e-5
LORA_LR = 1e-4
# Figures of an evaluation by which policies can be compared (no enum: OmegaConf finds members by names without an @).
EVAL_METRICS = ("pass@1", "pass@k", "greedy", "reward")

# OmegaConf finds an enum member by its name and lists the names when there is none: each name is spelled as its value.


class Device(StrEnum):
    """Where the three models live."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Placement(StrEnum):
    """Whether models share accelerators."""

    auto = "auto"
    dedicated = "dedicated"
    colocated = "colocated"


class Dataset(StrEnum):
    """The tasks that ship with the suite."""

    tiny = "tiny"
    gsm8k = "gsm8k"
    ifeval = "ifeval"
    math = "math"
    countdown = "countdown"
    custom = "custom"


class Selection(StrEnum):
    """Which responses are kept."""

    above_median = "above_median"
    topk = "topk"
    threshold = "threshold"
    percentile = "percentile"
    random = "random"


class Ties(StrEnum):
    """Which of equal rewards are kept where there is no room for all."""

    first = "first"
    shortest = "shortest"
    random = "random"


class AnswerMode(StrEnum):
    """Where in a response to a problem with a number its answer is looked for."""

    auto = "auto"
    answer_tag = "answer_tag"
    hash = "hash"
    boxed = "boxed"
    last_number = "last_number"


class OpenAIKind(StrEnum):
    """What is served at `reward.openai_url`."""

    judge = "judge"
    reward_model = "reward_model"


class KLScheduleType(StrEnum):
    """Shapes of the KL coefficient over the run."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class RestartFrom(StrEnum):
    """What each iteration fine-tunes."""

    current = "current"
    base = "base"


class Resume(StrEnum):
    """Whether a run goes on where an earlier one in its directory stopped."""

    never = "never"
    auto = "auto"


class LossFunction(StrEnum):
    """What imitating the kept responses means."""

    sft = "sft"
    minor_sft = "minor_sft"


class Dtype(StrEnum):
    """Floating-point types by torch's names."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class OptimizerName(StrEnum):
    """Optimizers by torch's names."""

    AdamW = "AdamW"
    Adam = "Adam"
    SGD = "SGD"


class SchedulerType(StrEnum):
    """Shapes of the learning rate after its warm-up."""

    cosine_with_warmup = "cosine_with_warmup"
    linear = "linear"
    constant = "constant"


class InferenceBackend(StrEnum):
    """Inference engines."""

    vllm = "vllm"
    transformers = "transformers"


class Parallel(StrEnum):
    """How several devices train one model."""

    auto = "auto"
    ddp = "ddp"
    fsdp = "fsdp"


class LoggingBackend(StrEnum):
    """Where metrics go besides `metrics.jsonl`."""

    wandb = "wandb"
    none = "none"


class LoggingMode(StrEnum):
    """W&B's modes."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class EnvConfig:
    """The task, and how it is sampled."""

    dataset: Dataset
    """The task: prompts, ground truths and reward; `custom` has only what you give it."""
    dataset_name: str | None
    """A data set on the hub with the task's columns, in place of the task's own; null: that."""
    dataset_config: str | None
    """Which configuration of the hub's data set; null: the task's own, or the only one."""
    dataset_path: str | None
    """A local file or folder with the task's data; null: the hub, or what the task generates."""
    split: str | None
    """The split that is trained on; null: `train`, or the only one beside that for evaluation."""
    eval_split: str | None
    """The split of held-out prompts; null: `test`, or prompts taken out of training where there is none."""
    prompt_column: str | None
    """The column with the user's turn; null: the task's own (`custom`: `prompt` or `question`)."""
    answer_column: str | None
    """The column with the ground truth; null: the task's own (`custom`: none)."""
    system_prompt: str | None
    """Takes the place of the task's; empty: none; null: the task's own."""
    max_prompts: int | None
    """Training prompts at most, drawn by the seed (with `shuffle=false` the first); null: all."""
    shuffle: bool
    """Whether each pass over the prompts has an order of its own; false: that of the data."""
    skip_solved: int
    """Visits for which a prompt is left out once all responses of a visit solved it; 0: none."""
    skip_hopeless_after: int | None
    """So many visits in a row without a right response count as solved for `skip_solved`; null: never."""
    num_envs: int
    """Responses asked of the engine at once, and responses scored at once by the reference; capped at the batch."""
    repeats: int
    """Responses per prompt: the size of a group."""


@dataclass
class RewardConfig:
    """How responses are scored."""

    fn: Any
    """In place of the task's own reward: a built-in one by name, `package.module:function` or `file.py:function`, or
    a list of such, which are summed; null: the task's own, or with `openai_url` what is served there."""
    weights: list[float] | None
    """Of the functions that `fn` lists, in their order; null: 1 each."""
    answer_mode: AnswerMode
    """Where gsm8k, and custom data with an answer column, look for a response's answer."""
    pass_threshold: float | None
    """A response counts as right if its reward is at least this; null: as the task says (custom data without answers:
    1)."""
    workers: int
    """Processes that score responses one by one, within `timeout`; 0: the collector's own process, without a limit."""
    timeout: float
    """Seconds that a worker may take for a response."""
    openai_url: str | None
    """Address of an OpenAI-compatible server, up to `/v1`; null: none."""
    openai_model: str | None
    """The name under which it serves the model; null: the only one it has."""
    openai_kind: OpenAIKind
    """`judge`: a chat model that is asked for a score; `reward_model`: a model whose output is the reward."""
    openai_prompt: str | None
    """A file with the judge's instructions; null: the built-in ones."""
    openai_concurrency: int
    """Requests in flight at once."""
    openai_retries: int
    """Further tries of a request that failed."""
    openai_timeout: float
    """Seconds that a request may take."""


@dataclass
class ModelConfig:
    """The start model, of which policy, engine and reference are copies."""

    name: str
    """A hub id, a path (begins with `/`, `.` or `~`), or `tiny`, the model that the suite builds itself."""
    chat_template: str | None
    """A file with a Jinja template, or the name of one of the tokenizer's own templates; null: the tokenizer's default,
    or a plain one where it has none."""
    compile: bool
    """Whether the forward pass of training is compiled."""
    trust_remote_code: bool
    """Whether code that comes with the model may run, in all three models and the tokenizer."""


@dataclass
class KLScheduleConfig:
    """The KL coefficient over the run, from `train.kl_to_ref_coeff` at its start."""

    type: KLScheduleType
    """`constant`, or how it falls (or rises): `linear`, or `cosine`, half a wave."""
    end: float
    """The coefficient at the end of the run; no meaning for `constant`."""


@dataclass
class TrainConfig:
    """The algorithm: what is collected, what is kept, how it is imitated."""

    sync: bool
    """Set by the mode: true collects and trains in turn, false at the same time."""
    sync_iter: bool | None
    """Sync mode: false lets the engine generate the next batch while the learner trains; null in async mode."""
    epochs: int
    """Passes over the kept responses of a batch; in async mode, how often each is drawn on average."""
    weight_update_frequency: int | None
    """Gradient steps between weight pushes; null (sync mode): one push before each new collection."""
    dialog_turns_per_batch: int
    """Responses collected per batch, a multiple of `env.repeats`."""
    total_dialog_turns: int
    """Responses collected in the whole run, rounded up to whole batches."""
    topk_size: int
    """At most so many responses of a group are kept."""
    selection: Selection
    """`above_median`: the best, strictly above the group's lower median; `topk`: the best of a group that is not all
    equal; `threshold`: those that reach `selection_threshold`; `percentile`: those that reach a percentile of the
    batch; `random`: as many as `above_median`, from the same groups, and drawn evenly for training. Never more than
    `topk_size` of a group."""
    selection_threshold: float
    """The reward that `threshold` asks for."""
    selection_percentile: float
    """The percentile that `percentile` asks for at the start of the run, from 0 to below 100."""
    selection_percentile_end: float
    """The same at its end; in between it follows the run's progress."""
    selection_ties: Ties
    """Which of equal rewards are kept: the `first` to come, the `shortest`, or at `random`."""
    dedup: bool
    """Whether of responses of a group with the same text, up to case and white space, only one can be kept."""
    min_reward: float | None
    """Responses below are never kept, whatever the selection; null: no limit."""
    buffer_size: int | None
    """Responses that the buffer holds; null: one batch of kept responses in sync mode (the whole run's, where they
    accumulate), 256 (or a batch's kept responses if they are more) in async mode, where new responses take the places
    of the oldest."""
    empty_replay_buffer: bool
    """Sync mode: whether the buffer is emptied once its responses were trained on."""
    restart_from: RestartFrom
    """Sync mode: what is fine-tuned on each batch: `current`, the policy as it stands; `base`, the start model again,
    with a fresh optimizer and a learning-rate schedule of its own."""
    accumulate_expert_set: bool | None
    """Sync mode: whether all responses that were ever kept stay in the buffer; null: with `restart_from=base` only."""
    from_expert_set: str | None
    """Sync mode: a folder of Parquet files, or a .parquet or .jsonl file, to train on in place of anything that is
    sampled; null: none."""
    prioritized_sampling: bool
    """Whether responses of higher reward are drawn first (sync mode) or more often (async mode)."""
    prioritized_sampling_alpha: float
    """How much reward counts: a response is drawn in proportion to (its reward, shifted above 0) ^ alpha."""
    prioritized_sampling_beta: float
    """Async mode: strength of the importance weights in the loss, which undo the preference at 1; 0: none."""
    prioritized_sampling_epsilon: float
    """The least reward's height above 0, as a share of the spread of rewards in the buffer: how rarely it is drawn."""
    max_policy_age: int | None
    """Responses made more than so many weight pushes ago are dropped before training; null: none."""
    max_ahead: int | None
    """Async mode: groups that collection may be ahead of training at most; null: no limit."""
    collection_timeout: float
    """Seconds that training may wait for responses before the run ends with an error."""
    total_optimizer_steps: int | None
    """Async mode: optimizer steps of the run, shared out over what is collected; null: as `train.epochs` says."""
    deterministic: bool
    """Async mode: whether collecting and training alternate in a fixed order, so that a seed repeats a run."""
    optim_batch_size: int
    """Responses per micro-batch and training device; a gradient step is one micro-batch on each."""
    gradient_accumulation_steps: int
    """Gradient steps per optimizer step."""
    mixed_precision: bool
    """Whether the forward pass runs in `train_model.torch_dtype`; master weights are float32 either way."""
    loss_function: LossFunction
    """`sft`: negative log-likelihood; `minor_sft`: its bounded variant against the reference."""
    minor_sft_beta: float
    """Sharpness of `minor_sft`; no meaning for `sft`."""
    kl_to_ref_coeff: float | None
    """Weight of the KL divergence to the reference in the loss; null or 0: none."""
    kl_to_ref_schedule: KLScheduleConfig
    max_bad_steps: int
    """So many steps in a row without a finite loss and gradient end the run."""
    checkpoint_frequency: int
    """Gradient steps between checkpoints; 0: only the one at the end."""
    keep_checkpoints: int
    """Checkpoints that stay, the last and the best among them; older ones are removed."""
    stop_patience: int | None
    """So many evaluations in a row without a better `eval.metric` end the run; null: it goes on to its end."""
    logging_frequency: int
    """Gradient steps between lines of training metrics."""


@dataclass
class LoraConfig:
    """Low-rank adapters (Hu et al., 2021, arXiv:2106.09685) on every linear layer but the head."""

    enabled: bool
    """Whether adapters are trained in place of the model's own weights."""
    r: int
    """Rank of the adapters."""
    alpha: float
    """An adapter's output is scaled by alpha / r."""
    dropout: float
    """Share of an adapter's inputs that are dropped in training, from 0 to below 1."""


@dataclass
class QuantizationConfig:
    """4-bit weights (NF4, with the package bitsandbytes)."""

    enabled: bool
    """Whether the frozen weights are held in four bits."""


@dataclass
class TrainModelConfig:
    """The policy while it is trained."""

    num_devices: int
    """Data-parallel ranks, each with an accelerator of its own; on a CPU, processes."""
    parallel: Parallel
    """With several devices: `ddp` keeps the whole model on each, `fsdp` a share; `auto`: `fsdp` for full fine-tuning on
    accelerators, else `ddp`."""
    lora: LoraConfig
    quantization: QuantizationConfig
    gradient_checkpointing: bool
    """Whether activations are computed again in the backward pass instead of kept."""
    attn_implementation: str
    """Attention kernel by its transformers name: sdpa, eager, flash_attention_2."""
    torch_dtype: Dtype
    """Type of the forward pass under `train.mixed_precision`."""
    eval: bool
    """Whether the policy is trained in evaluation mode, without dropout."""
    num_threads: int | None
    """CPU threads of the training process; null: all cores, or half where the engine works at the same time."""


@dataclass
class InferenceModelConfig:
    """The engine that samples responses."""

    backend: InferenceBackend
    """Which engine: `vllm`, or Hugging Face's own generation for small models and machines without vLLM."""
    num_devices: int
    """Accelerators of an engine, which share its model (tensor parallelism); on a CPU, processes. vLLM only."""
    num_replicas: int
    """Engines, each with `num_devices`, that share the prompts."""
    attn_implementation: str
    """As `train_model.attn_implementation`, for `transformers`; vLLM chooses its own."""
    torch_dtype: Dtype
    """Type of the engine's weights."""
    gpu_memory_utilization: float
    """Share of each accelerator's memory that the engine takes, in (0, 1]."""
    temperature: float
    """Sampling temperature, above 0."""
    top_p: float
    """Nucleus sampling: the share of probability drawn from, in (0, 1]."""
    max_tokens: int
    """Tokens per response at most."""
    max_model_len: int | None
    """Tokens per prompt and response together at most; null: the model's own context length."""
    include_stop_str_in_output: bool
    """Whether the end-of-turn token that stopped a response is part of it, and thus trained. Texts never show it."""
    enforce_eager: bool
    """Whether the engine runs without CUDA graphs and compilation."""
    enable_prefix_caching: bool
    """Whether prompts that begin alike, as a group's do, share their cache."""
    num_threads: int | None
    """CPU threads of the engine; null: as `train_model.num_threads`."""
    kv_cache_gib: int | None
    """Whole GiB of KV cache on a CPU; null: vLLM's own choice. On accelerators `gpu_memory_utilization` decides."""


@dataclass
class RefModelConfig:
    """The frozen model to which the KL divergence is taken: the start model, unless it is refreshed."""

    num_devices: int | None
    """Replicas of the reference, each with an accelerator of its own; on a CPU, processes. 0 (with LoRA): none, the
    trainer's model with its adapters switched off is the reference. null: 0 with LoRA, else 1."""
    quantization: QuantizationConfig
    attn_implementation: str
    """As `train_model.attn_implementation`."""
    torch_dtype: Dtype
    """Type of the reference's weights."""
    num_threads: int | None
    """CPU threads of the reference; null: as `train_model.num_threads`."""
    refresh_every: int | None
    """Weight pushes after which the policy becomes the reference; null: it stays the start model."""


@dataclass
class SchedulerConfig:
    """The learning rate over the run's optimizer steps."""

    enabled: bool
    """Whether the learning rate changes at all."""
    type: SchedulerType
    """Its shape after the warm-up."""
    warmup_steps: float
    """Length of the linear warm-up: below 1 a fraction of the run, else a whole number of optimizer steps."""
    num_cycles: float
    """Cosine waves from the end of the warm-up to the end of the run: 0.5 falls once, to 0."""


@dataclass
class OptimizerConfig:
    """The optimizer."""

    name: OptimizerName
    """By torch's name."""
    lr: float | None
    """Peak learning rate; null: 1e-5, or 1e-4 with LoRA."""
    betas: list[float]
    """Adam's and AdamW's two decay rates; no meaning for SGD."""
    weight_decay: float
    """Weight decay, on weight matrices only (not on norms and biases)."""
    clip_grad_norm: float | None
    """The gradient's norm is scaled down to this; null: never."""
    scheduler: SchedulerConfig


@dataclass
class WeightUpdateConfig:
    """Pushing trained weights into the engine, and proof that they arrived."""

    lora_only: bool
    """With LoRA: whether only the adapters travel and the engine applies them; false merges them into whole weights."""
    probe_frequency: int
    """Pushes between comparisons of trainer and engine; 0: at the start, and until the weights have changed visibly."""
    probe_tolerance: float | None
    """Largest mean difference of log-probs that passes; null: by the coarser dtype of trainer and engine."""
    timeout: float
    """Seconds that a push may take before the run ends with an error."""


@dataclass
class EvalConfig:
    """Evaluation on held-out prompts."""

    only: bool
    """Whether the model is evaluated and nothing is trained."""
    frequency: int
    """Weight pushes between evaluations; 0: only before and after the run."""
    num_prompts: int
    """Held-out prompts."""
    num_samples: int
    """Sampled responses per prompt, beside one greedy response."""
    k: int | None
    """The k of pass@k, at most `num_samples`; null: `num_samples`."""
    temperature: float
    """Temperature of the sampled responses."""
    metric: str
    """What decides which policy is the best: one of EVAL_METRICS, higher being better."""


@dataclass
class ExpertSetConfig:
    """What was kept, as a data set of its own."""

    save: bool
    """Whether every kept response is written to `expert_set/`, as Parquet files."""
    token_ids: bool
    """Whether they hold the sampled token ids beside the texts."""


@dataclass
class TinyConfig:
    """The built-in tiny model."""

    model_seed: int
    """Seed of its warm start."""
    cache_dir: str | None
    """Folder where it is built once and found again; null: the user's cache folder."""


@dataclass
class RayConfig:
    """Free dictionaries, handed to Ray as they are."""

    init_config: dict[str, Any]
    """Arguments of `ray.init`."""
    collector_config: dict[str, Any]
    """Resources of the collector's actor."""
    train_handler_config: dict[str, Any]
    """Resources of the training task."""
    replay_buffer_config: dict[str, Any]
    """Resources of the buffer's actor."""


@dataclass
class LoggingConfig:
    """What is recorded, and where."""

    experiment_name: str | None
    """Part of the W&B run's name."""
    checkpoint_dir: str
    """Folder of the checkpoints, relative to the run directory."""
    backend: LoggingBackend
    """Where metrics go besides `metrics.jsonl`."""
    mode: LoggingMode | None
    """W&B's mode; null: as `WANDB_MODE` says, else online with a login, else offline."""
    project: str | None
    """W&B project; null: ei-sync or ei-async."""
    entity: str | None
    """W&B user or team; null: the account's default."""
    group: str | None
    """W&B group."""
    tags: list[str]
    """W&B tags."""
    num_samples: int
    """Prompts written to `samples.jsonl` per evaluation, each with all its responses."""
    kl_budget: float
    """KL to the reference, in nats per token, above which the report warns."""


@dataclass
class Config:
    """The whole configuration."""

    seed: int
    """Seed of data order, initialization, sampling and selection."""
    resume: Resume
    """`auto`: go on from the newest checkpoint in the directory that `hydra.run.dir` names, if one is there."""
    resume_from: str | None
    """A run directory, or a checkpoint in one, to go on from; null: none."""
    device: Device
    """`auto`: accelerators where there are any; `cpu`; `cuda`: accelerators, or the run is refused."""
    placement: Placement
    """`dedicated`: every model has accelerators of its own; `colocated`: all share one; `auto`: as there are enough."""
    env: EnvConfig
    reward: RewardConfig
    model: ModelConfig
    train: TrainConfig
    train_model: TrainModelConfig
    inference_model: InferenceModelConfig
    ref_model: RefModelConfig
    optimizer: OptimizerConfig
    weight_update: WeightUpdateConfig
    eval: EvalConfig
    expert_set: ExpertSetConfig
    tiny: TinyConfig
    ray: RayConfig
    logging: LoggingConfig


def learning_rate(cfg: Config) -> float:
    """The peak learning rate, given or chosen by what is trained."""
    if cfg.optimizer.lr is not None:
        return cfg.optimizer.lr
    return LORA_LR if cfg.train_model.lora.enabled else FULL_FINE_TUNING_LR


def num_references(cfg: Config) -> int:
    """Replicas of the reference; 0 where the trainer's model with its adapters off is the reference, or none is."""
    if cfg.eval.only:
        return 0
    if cfg.ref_model.num_devices is not None:
        return cfg.ref_model.num_devices
    return 0 if cfg.train_model.lora.enabled else 1


def num_trainers(cfg: Config) -> int:
    """Training ranks; 0 where a model is only evaluated."""
    return 0 if cfg.eval.only else cfg.train_model.num_devices


def num_engines(cfg: Config) -> int:
    """Engines of the run; 0 where nothing is sampled, because an expert set is trained on."""
    return 0 if cfg.train.from_expert_set is not None else cfg.inference_model.num_replicas


def collects(cfg: Config) -> bool:
    """Whether responses are sampled to be trained on, in groups and batches."""
    return not cfg.eval.only and cfg.train.from_expert_set is None


def accumulates_expert_set(cfg: Config) -> bool:
    """Whether every response that was ever kept is trained on again after each batch."""
    if cfg.train.accumulate_expert_set is not None:
        return cfg.train.accumulate_expert_set
    return cfg.train.restart_from is RestartFrom.base


def empties_buffer(cfg: Config) -> bool:
    """Whether the responses of a batch are forgotten once they were trained on; in sync mode only."""
    return cfg.train.sync and cfg.train.empty_replay_buffer and not accumulates_expert_set(cfg)


def pushes_before_collecting(cfg: Config) -> bool:
    """Whether the engine never generates with other weights than the trainer's at that moment."""
    train = cfg.train
    return train.sync and train.sync_iter is True and train.weight_update_frequency is None


def is_local(cfg: Config) -> bool:
    """Whether the run has this machine to itself. Only Ray knows what the machines of a cluster have."""
    return cfg.ray.init_config.get("address") in (None, "local")


def register_schema() -> None:
    """Makes the schema known to Hydra under the name that `config/base.yaml` lists first in its defaults."""
    ConfigStore.instance().store(name=SCHEMA_NAME, node=Config)


def to_plain_dict(cfg: Config) -> dict[str, Any]:
    """The configuration as nested dicts, lists, strings and numbers: what checkpoints and W&B store.

    Enum members become strings, so that `torch.load(..., weights_only=True)` accepts the result.
    """
    plain = OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
