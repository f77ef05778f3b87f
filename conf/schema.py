"""The types behind every configuration key: a mistyped key or value is refused by name.

Plain data, checked in `__post_init__` with one sentence that gives the value, the rule and the remedy. Nothing here
imports torch or transformers: `python -m launch` and `python -m launch.plan` start from these classes alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    check(value in choices, f"{key}={value} is not known: choose one of {', '.join(choices)}.")


@dataclass
class ModelConfig:
    """A LLaMA: the names are `transformers.LlamaConfig`'s."""

    name: str = MISSING
    vocab_size: int = 32000
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    attn_implementation: str | None = None
    match: str | None = None
    """`average` makes this run the dense twin of the configured sparse one: as wide as its average parameter count."""

    def __post_init__(self) -> None:
        check(
            self.match in (None, "average"),
            f"model.match={self.match} is not known: give average for a dense twin, or null.",
        )
        check(
            not {"", ".", ".."} & set(self.name.split("/")),
            f"model.name={self.name} names the run's folder and leaves the runs folder: give a plain name.",
        )
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            value = getattr(self, key)
            check(value > 0, f"model.{key}={value} must be at least 1.")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        check(
            self.hidden_size % heads == 0 and (self.hidden_size // heads) % 2 == 0,
            f"model.hidden_size={self.hidden_size} must be model.num_attention_heads={heads} times an even head width: "
            f"take a multiple of {2 * heads}.",
        )
        check(
            kv_heads > 0 and heads % kv_heads == 0,
            f"model.num_key_value_heads={kv_heads} must divide model.num_attention_heads={heads}.",
        )


@dataclass
class DataConfig:
    """Where the text comes from and how it is cut; see `train/data`."""

    source: str = MISSING
    path: str | None = None
    """A file or folder of .txt, .jsonl, .jsonl.gz or .parquet; for `fineweb_edu` a local copy of its parquet files."""
    subset: str | None = None
    text_field: str = "text"
    heldout_share: float = 0.01
    """Share of the documents, picked by a hash of their text, that is never trained on."""
    sequence_length: int | None = None
    """Tokens in a block; the model's context where it is null."""
    max_documents: int | None = None
    num_workers: int | None = None
    """Processes that tokenize; all cores where it is null."""
    cache_dir: str = MISSING

    def __post_init__(self) -> None:
        check_choice("data.source", self.source, ("pydocs", "text", "fineweb_edu"))
        check(
            0 < self.heldout_share < 1,
            f"data.heldout_share={self.heldout_share} is outside (0, 1): give the share of documents to hold out.",
        )
        check(
            self.sequence_length is None or self.sequence_length >= 2,
            f"data.sequence_length={self.sequence_length} must be at least 2 tokens.",
        )
        check(
            self.num_workers is None or self.num_workers >= 1,
            f"data.num_workers={self.num_workers} must be at least 1: leave it null for all cores.",
        )
        check(
            self.max_documents is None or self.max_documents >= 2,
            f"data.max_documents={self.max_documents} must be at least 2: one to train on, one to hold out.",
        )
        check(
            self.source != "pydocs" or (self.path is None and self.subset is None),
            f"data=pydocs reads the docstrings of this Python, not data.path={self.path}: give data=text with it.",
        )
        check(
            self.source != "text" or self.path is not None,
            "data=text needs data.path: a file or folder of .txt, .jsonl, .jsonl.gz or .parquet.",
        )


@dataclass
class WindowConfig:
    """When weights are pruned: the first and the last event, in steps, tokens, or shares of the run's compute."""

    start: float = 0.25
    end: float = 0.75
    every: int | None = None
    """Steps between events; where it is null it follows the length of the window (100 for long runs)."""
    of: str = "auto"
    """Unit of start and end; `auto` reads two numbers up to 1 as shares of compute, larger ones as steps."""
    budget: float | None = None
    """Compute of the run in dense-equivalent steps: its length follows from it, and trainer.max_steps is null."""

    def __post_init__(self) -> None:
        check_choice("sparsity.window.of", self.of, ("auto", "steps", "tokens", "compute"))
        check(
            self.every is None or self.every >= 1,
            f"sparsity.window.every={self.every} must be at least 1 step: leave it null and it follows the window.",
        )
        check(
            self.budget is None or self.budget >= 1,
            f"sparsity.window.budget={self.budget} must be at least 1 dense-equivalent step.",
        )
        check(
            self.budget is None or (self.of in ("auto", "compute") and max(self.start, self.end) <= 1),
            f"sparsity.window.budget={self.budget} needs a window in shares of compute, not from {self.start:g} to "
            f"{self.end:g} in {self.of}: give start and end between 0 and 1 with of=compute, or budget=null.",
        )


@dataclass
class SparsityConfig:
    """How much is pruned, when, and what."""

    target: float = 0.0
    window: WindowConfig = field(default_factory=WindowConfig)
    score: str = "magnitude"
    include: list[str] | None = None
    """Name patterns (`*` matches anything) of the parameters to prune; every linear layer's weight where it is null."""
    requires_dense: list[str] = field(default_factory=list)
    """Name patterns of parameters that are never pruned."""

    def __post_init__(self) -> None:
        check(
            0 <= self.target < 1,
            f"sparsity.target={self.target} is outside [0, 1): give the share of weights to remove, 0.8 for 80 %.",
        )
        check_choice("sparsity.score", self.score, ("magnitude", "random"))


@dataclass
class OptimConfig:
    """The optimizer's part of `transformers.TrainingArguments`, by the same names."""

    optim: str = "adamw_torch_fused"
    learning_rate: float = 3e-4
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_steps: float = 0.01
    """Steps, or below 1 a share of the run."""
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass
class TrainerConfig(OptimConfig):
    """`transformers.TrainingArguments` by its own names; the optimizer's come from the group `optim`."""

    max_steps: int | None = 1000
    """Null where sparsity.window.budget gives the length of the run."""
    per_device_train_batch_size: int = 8
    """Sequences in a micro-batch: the most that fits; the batch of a step is `batch_size`."""
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int | None = None
    """Follows from `batch_size` where it is null."""
    bf16: bool | None = None
    """Compute in bfloat16; where it is null, on GPUs only."""
    fp16: bool = False
    tf32: bool | None = None
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    torch_compile_backend: str | None = None
    torch_compile_mode: str | None = None
    use_liger_kernel: bool = False
    logging_steps: float = 10
    logging_first_step: bool = True
    eval_strategy: str = "no"
    eval_steps: float | None = None
    save_strategy: str = "steps"
    save_steps: float = 500
    save_total_limit: int = 2
    seed: int = 0
    data_seed: int | None = None
    full_determinism: bool = False
    dataloader_num_workers: int = 0
    dataloader_pin_memory: bool = True
    dataloader_prefetch_factor: int | None = None
    ddp_timeout: int = 600
    """Seconds that a rank waits for the others in a collective before the run ends with an error."""
    disable_tqdm: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Any other TrainingArguments name: `+trainer.extra.neftune_noise_alpha=5`."""

    def __post_init__(self) -> None:
        check(self.max_steps is None or self.max_steps >= 1, f"trainer.max_steps={self.max_steps} must be at least 1.")
        for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            value = getattr(self, key)
            check(value is None or value >= 1, f"trainer.{key}={value} must be at least 1.")
        check(self.ddp_timeout >= 1, f"trainer.ddp_timeout={self.ddp_timeout} must be at least 1 second.")
        check(
            self.save_total_limit >= 1,
            f"trainer.save_total_limit={self.save_total_limit} must be at least 1: the newest checkpoint is always kept.",
        )
        check(self.learning_rate > 0, f"trainer.learning_rate={self.learning_rate} must be above 0.")


@dataclass
class LoggerConfig:
    """wandb, by the names of `wandb.init`; metrics.jsonl is always written."""

    wandb: bool = True
    mode: str = "auto"
    """`auto` is online where an API key is configured, offline elsewhere."""
    project: str = "sparsellm"
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choice("logger.mode", self.mode, ("auto", "online", "offline"))


@dataclass
class ExportConfig:
    """The final model folder."""

    dtype: str = "float32"
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        check_choice("export.dtype", self.dtype, ("float32", "bfloat16"))


@dataclass
class CardConfig:
    """The model's card, and the hub repository that the finished model may be uploaded to.

    A run that has ended and is started again with any of these keys rewrites its card, and trains nothing.
    """

    license: str | None = None
    """The model's licence by the hub's identifier, like apache-2.0; the card says so where none was chosen."""
    license_name: str | None = None
    """The licence's own name where `license` is other."""
    license_link: str | None = None
    hub_id: str | None = None
    """OWNER/NAME on the hub: what the card's usage code loads, and where the model is uploaded to."""
    push_to_hub: bool = False
    """Upload the finished model folder to `hub_id`, with the account that `hf auth login` or HF_TOKEN names."""
    private: bool = True
    """Whether a repository that the upload has to create can be seen by its owner only."""

    def __post_init__(self) -> None:
        check(
            self.license is None or re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license) is not None,
            f"card.license={self.license} is no licence identifier of the hub: give one like apache-2.0 or mit, or "
            "other with card.license_name.",
        )
        check(
            self.license == "other" or (self.license_name is None and self.license_link is None),
            f"card.license_name={self.license_name} and card.license_link={self.license_link} belong to a licence of "
            "your own: set card.license=other, or leave them null.",
        )
        check(
            self.license != "other" or self.license_name is not None,
            "card.license=other needs card.license_name: the name of the licence.",
        )
        check(
            self.hub_id is None or re.fullmatch(r"[\w.-]+/[\w.-]+", self.hub_id) is not None,
            f"card.hub_id={self.hub_id} is no repository of the hub: give OWNER/NAME.",
        )
        check(
            not self.push_to_hub or self.hub_id is not None,
            "card.push_to_hub=true needs card.hub_id: the OWNER/NAME on the hub to upload to.",
        )


@dataclass
class LaunchConfig:
    """How `python -m launch` starts the processes; `python -m train` only checks it."""

    num_processes: int | None = None
    """Processes on this machine; where it is null all GPUs, and two processes on a machine without."""
    config_file: str | None = None
    """An accelerate config; where it is null the one in launch/accelerate that fits this machine."""
    max_restarts: int = 0
    """How often a run that lost a rank is started again from its checkpoint, without being asked."""

    def __post_init__(self) -> None:
        check(
            self.num_processes is None or self.num_processes >= 1,
            f"launch.num_processes={self.num_processes} must be at least 1.",
        )
        check(self.max_restarts >= 0, f"launch.max_restarts={self.max_restarts} must be at least 0.")


@dataclass
class Config:
    """One run."""

    run_name: str | None = None
    """Folder of the run below `runs_dir`; where it is null, the experiment's or the model's name with the sparsity."""
    runs_dir: str = "runs"
    sweep_name: str | None = None
    overwrite: bool = False
    resume: str = "auto"
    dry_run: bool = False
    batch_size: int | None = None
    """Sequences per optimizer step over all processes, kept whatever the number of devices."""
    init_from: str | None = None
    """A transformers folder to start from; its exact zeros stay zero, and a prune window prunes beyond them."""
    max_skipped: int = 10
    """Updates in a row that may be skipped because loss or gradient norm are not finite, before the run stops."""
    tokenizer: str = "train"
    """A hub name, a local folder, a SentencePiece .model file, or `train`: a BPE of the model's vocabulary size."""
    prompt: str = "The "
    """Start of the sample that the finished model writes."""
    next_commands: list[str] = field(default_factory=list)
    """What to try next, printed at the end."""
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    sparsity: SparsityConfig = MISSING
    optim: OptimConfig = MISSING
    trainer: TrainerConfig = MISSING
    logger: LoggerConfig = MISSING
    export: ExportConfig = field(default_factory=ExportConfig)
    card: CardConfig = field(default_factory=CardConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        check(self.prompt.strip() != "", "prompt='' is empty: give the finished model some words to go on from.")
        check_choice("resume", self.resume, ("auto", "never", "must"))
        check(self.max_skipped >= 0, f"max_skipped={self.max_skipped} must be at least 0.")
        check(self.batch_size is None or self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1.")
        for key in ("run_name", "sweep_name"):
            name = getattr(self, key)
            check(
                name is None or not {"", ".", ".."} & set(name.split("/")),
                f"{key}={name} leaves the runs folder: give a plain name, or a path below {self.runs_dir}.",
            )


@dataclass
class EvalConfig:
    """One evaluation of a finished model."""

    folder: str = MISSING
    """A transformers folder; `python -m eval` takes it as model=DIR."""
    data: DataConfig = MISSING
    tokenizer: str | None = None
    """The model's own where it is null."""
    window: int | None = None
    """Tokens scored at a time; the model's context where it is null."""
    batch_size: int = 8
    device: str = "auto"
    format: str = "text"

    def __post_init__(self) -> None:
        check_choice("format", self.format, ("text", "json"))
        check(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1.")
        check(self.window is None or self.window >= 2, f"window={self.window} must be at least 2 tokens.")
        check(
            self.device in ("auto", "cpu", "cuda") or self.device.startswith("cuda:"),
            f"device={self.device} is not known: choose auto, cpu, cuda or cuda:N.",
        )


@dataclass
class PlanConfig:
    """What `python -m launch.plan` is asked beside the run's own keys."""

    series: list[str] = field(default_factory=list)
    """The experiments of the table that is printed where no experiment is named."""
    devices: int = 8
    device_memory: str = "141GB"
    """Memory of one GPU: a number with GB (1e9 bytes) or GiB (2^30 bytes)."""
    memory_headroom: float = 0.1
    """Share of the device's memory left free for the CUDA context, NCCL's buffers and fragmentation."""
    mfu: float = 0.4
    """Model FLOPs utilization: the share of the peak that the run's dense arithmetic reaches."""
    peak_tflops: float = 989.5
    """Dense bf16 peak of one GPU in 1e12 FLOP/s; 989.5 is an H100's or H200's."""
    format: str = "text"
    figure: str | None = "auto"
    """File of the density curve; `auto` writes plan.png here for one run and nothing for a table, null never writes."""

    def __post_init__(self) -> None:
        check_choice("format", self.format, ("text", "json"))
        check(self.devices >= 1, f"devices={self.devices} must be at least 1.")
        check(0 < self.mfu <= 1, f"mfu={self.mfu} is outside (0, 1]: give a share of the peak, 0.4 for 40 %.")
        check(self.peak_tflops > 0, f"peak_tflops={self.peak_tflops} must be above 0.")
        check(
            0 <= self.memory_headroom < 1,
            f"memory_headroom={self.memory_headroom} is outside [0, 1): give a share of device_memory, 0.1 for 10 %.",
        )


@dataclass
class PredictConfig:
    """A run whose loss the fitted law is asked for: its size and tokens, or the experiment that plans it."""

    avg_linear_params: float | None = None
    total_tokens: float | None = None
    experiment: str | None = None
    overrides: list[str] = field(default_factory=list)
    """The experiment's keys that are set otherwise: predict.overrides=[sparsity.target=0.6]."""

    def __post_init__(self) -> None:
        for key in ("avg_linear_params", "total_tokens"):
            value = getattr(self, key)
            check(value is None or value > 0, f"predict.{key}={value} must be above 0.")
        numbers = (self.avg_linear_params is not None, self.total_tokens is not None)
        check(
            self.experiment is None or not any(numbers),
            f"predict.experiment={self.experiment} already says size and tokens: leave out predict.avg_linear_params and "
            "predict.total_tokens.",
        )
        check(
            self.experiment is not None or all(numbers) or not any(numbers),
            "a prediction needs both predict.avg_linear_params and predict.total_tokens, or predict.experiment.",
        )
        check(
            self.experiment is not None or not self.overrides,
            f"predict.overrides={self.overrides} changes an experiment: name it with predict.experiment.",
        )

    @property
    def is_asked(self) -> bool:
        return self.experiment is not None or self.avg_linear_params is not None


@dataclass
class ScalingLawConfig:
    """What `python -m eval.scaling_law` fits, and what it is asked of the fit."""

    runs: Any = field(default_factory=list)
    """Run folders, folders of runs, patterns of them, or CSV files: one, or a list."""
    form: str = "nd"
    """nd: E + A / N^alpha + B / D^beta; for runs on equally many tokens n: E + A / N^alpha, or power: A / N^alpha."""
    loss: str = "auto"
    """The figure to fit; `auto` takes the first of loss, heldout_loss, final_train_loss that every run has."""
    num_bootstrap: int = 400
    confidence: float = 0.95
    num_folds: int | None = None
    """Folds of the held-out error; each configuration is left out once where it is null."""
    seed: int = 0
    predict: PredictConfig = field(default_factory=PredictConfig)
    target_loss: float | None = None
    """The loss for which the cheapest N and D are given."""
    format: str = "text"
    figure: str | None = "scaling_law.png"

    def __post_init__(self) -> None:
        self.runs = [self.runs] if isinstance(self.runs, str) else self.runs
        check(
            isinstance(self.runs, list) and len(self.runs) > 0 and all(isinstance(name, str) for name in self.runs),
            f"runs={self.runs} names nothing: give run folders, a folder of runs, a pattern, or a CSV file.",
        )
        check_choice("form", self.form, ("nd", "n", "power"))
        check_choice("format", self.format, ("text", "json"))
        check(self.num_bootstrap >= 20, f"num_bootstrap={self.num_bootstrap} must be at least 20 resamples.")
        check(
            0 < self.confidence < 1,
            f"confidence={self.confidence} is outside (0, 1): give 0.95 for intervals of 95 %.",
        )
        check(self.num_folds is None or self.num_folds >= 2, f"num_folds={self.num_folds} must be at least 2, or null.")
        check(
            self.target_loss is None or self.target_loss > 0,
            f"target_loss={self.target_loss} must be above 0 nats per token.",
        )


def register() -> None:
    """Make the classes known to Hydra as the schemas `run_schema`, `eval_schema`, `plan_schema`, `scaling_law_schema`."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=Config)
    store.store(name="eval_schema", node=EvalConfig)
    store.store(name="plan_schema", node=PlanConfig)
    store.store(name="scaling_law_schema", node=ScalingLawConfig)
