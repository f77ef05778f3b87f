"""The keys of a run: all its groups, and the group `launch`."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.schema.checks import check, check_choice
from conf.schema.data import DataConfig
from conf.schema.during import DuringConfig
from conf.schema.model import ModelConfig
from conf.schema.output import CardConfig, ExportConfig, LoggerConfig
from conf.schema.sparsity import SparsityConfig
from conf.schema.trainer import OptimConfig, TrainerConfig


@dataclass
class LaunchConfig:
    """Settings by which `python -m launch` starts the processes; `python -m train` only checks them."""

    num_processes: int | None = None
    """Number of processes on each machine; null takes one for each GPU, or two on a machine without GPUs."""
    config_file: str | None = None
    """An accelerate config; null takes the one in launch/accelerate that fits these machines."""
    max_restarts: int = 0
    """Number of times that a run that lost a rank is restarted automatically from its checkpoint."""
    num_machines: int | None = None
    """Number of machines, each with its own `python -m launch`; null takes the number of SLURM's nodes, or one."""
    machine_rank: int | None = None
    """Number of this machine, from 0; null takes SLURM's."""
    main_process_ip: str | None = None
    """Name or address of machine 0, the same on all machines; null takes the first of SLURM's nodes."""
    main_process_port: int | None = None
    """A free port of machine 0, the same on all machines; null derives one from SLURM's job."""
    num_replicas: int = 1
    """Number of copies of the model, each sharded over its share of all processes; above 1 this is HSDP."""
    reshard_after_forward: str = "auto"
    """Free gathered weights between the forward and the backward pass, so that FSDP2 gathers them twice: `true`, `false`,
    or `auto`, which does so only if the step would not fit into the GPU's memory otherwise."""
    parallel_jobs: int | None = None
    """Number of jobs of a sweep at a time; null takes as many as fit on the GPUs, or one on a machine without GPUs."""

    def __post_init__(self) -> None:
        # A bare true or false in yaml arrives as True or False.
        self.reshard_after_forward = str(self.reshard_after_forward).lower()
        check_choice("launch.reshard_after_forward", self.reshard_after_forward, ("auto", "true", "false"))
        for key in ("num_processes", "num_machines", "parallel_jobs", "num_replicas"):
            value = getattr(self, key)
            check(value is None or value >= 1, f"launch.{key}={value} must be at least 1.")
        check(self.max_restarts >= 0, f"launch.max_restarts={self.max_restarts} must be at least 0.")
        machines, rank, port = self.num_machines, self.machine_rank, self.main_process_port
        check(
            rank is None or 0 <= rank < (machines or 1),
            f"launch.machine_rank={rank} must be from 0 to launch.num_machines - 1 = {(machines or 1) - 1}.",
        )
        check(port is None or 0 < port < 65536, f"launch.main_process_port={port} must be from 1 to 65535.")


@dataclass
class Config:
    """The keys of a run."""

    run_name: str | None = None
    """Folder of the run in `runs_dir`; null takes the experiment's or the model's name, with the sparsity."""
    runs_dir: str = "runs"
    """Folder that holds the folders of all runs and sweeps."""
    sweep_name: str | None = None
    """Name of a sweep: its folder in `runs_dir`, and the wandb group of its runs."""
    overwrite: bool = False
    """Delete an existing run of this name and start from the beginning."""
    resume: str = "auto"
    """`auto` resumes a run if it exists, `must` refuses to start from the beginning, and `never` refuses to resume."""
    dry_run: bool = False
    """Print the accelerate command and stop."""
    batch_size: int | None = None
    """Number of sequences in an optimizer step over all processes; it does not depend on the number of devices."""
    init_from: str | None = None
    """A transformers folder or hub name to start from. Its exact zeros stay zero; a prune window prunes more weights."""
    branch_from: str | None = None
    """RUN or RUN@STEP: begin at that run's checkpoint, the newest if no step is given, with the changes in this config."""
    max_skipped: int = 10
    """Number of consecutive updates that may be skipped because loss or gradient norm is not finite; after more, the run
    stops."""
    tokenizer: str | None = None
    """A hub name, a local folder, a SentencePiece .model file, or `train`, which trains a BPE of the model's vocabulary size.
    Null takes the tokenizer of `init_from`, else that of `model.path`, else `train`."""
    recipe: str = "plain"
    """`plain`, or `authors`, which treats weights, query scale and documents as the paper's authors do. The keys that a
    recipe sets are in conf/recipe; each can also be set by itself."""
    prompt: str = "The"
    """Text that the finished model continues as its sample."""
    next_commands: list[str] = field(default_factory=list)
    """Commands to try next, which are printed at the end."""
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    sparsity: SparsityConfig = MISSING
    optim: OptimConfig = MISSING
    trainer: TrainerConfig = MISSING
    logger: LoggerConfig = MISSING
    eval: DuringConfig = field(default_factory=DuringConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    card: CardConfig = field(default_factory=CardConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        check(self.prompt.strip() != "", "prompt='' is empty: give the finished model some words to go on from.")
        check(
            self.data.source != "wikitext",
            "data=wikitext is a test text, for `python -m eval`: train on data=text, fineweb_edu or pydocs.",
        )
        attention = self.model.attn_implementation
        check(
            self.data.attention == "causal" or attention in (None, "sdpa"),
            f"data.attention=document chooses attention itself and model.attn_implementation={attention} would be ignored: "
            "leave model.attn_implementation null.",
        )
        check_choice("recipe", self.recipe, ("plain", "authors"))
        check_choice("resume", self.resume, ("auto", "never", "must"))
        check(self.max_skipped >= 0, f"max_skipped={self.max_skipped} must be at least 0.")
        check(self.batch_size is None or self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1.")
        for key in ("run_name", "sweep_name"):
            name = getattr(self, key)
            check(
                name is None or not {"", ".", ".."} & set(name.split("/")),
                f"{key}={name} leaves the runs folder: give a plain name, or a path below {self.runs_dir}.",
            )


def tokenizer_of(config: Config) -> str:
    """Return the tokenizer that a run uses: the configured one, else that of `init_from` or `model.path`, else `train`."""
    return config.tokenizer or config.init_from or config.model.path or "train"
