"""The groups `optim` and `trainer`: `transformers.TrainingArguments` by its own names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from conf.schema.checks import MAX_STEPS, check
from conf.schema.choices import check_trainer
from conf.schema.passed_on import check_own_names, check_schedule_arguments

OWN_KEYS = ("fp8", "profile_steps", "async_save", "decay_steps", "keep_steps")
"""Keys of the group `trainer` that TrainingArguments does not have."""


@dataclass
class OptimConfig:
    """The optimizer settings of `transformers.TrainingArguments`, by the same names."""

    optim: str = "adamw_torch_fused"
    learning_rate: float = 3e-4
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    warmup_steps: float = 0.01
    """Number of warm-up steps; a number below 1 is a share of the run."""
    decay_steps: float | None = None
    """Number of last steps, or below 1 a share of the run, in which warmup_stable_decay lowers the rate; 0 for no decay."""
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0


@dataclass
class TrainerConfig(OptimConfig):
    """The keys of `transformers.TrainingArguments` and `OWN_KEYS`; the optimizer's values come from the group `optim`."""

    max_steps: int | None = 1000
    """Number of optimizer steps; null if sparsity.window.budget, or the decay of a branched run, sets the length."""
    per_device_train_batch_size: int = 8
    """Number of sequences in a micro-batch, which memory limits; a step has `batch_size` sequences in all."""
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int | None = None
    """Null derives it from `batch_size`."""
    bf16: bool | None = None
    """Compute in bfloat16; null does so on GPUs only."""
    fp16: bool = False
    tf32: bool | None = None
    fp8: bool = False
    """Compute the matrix products of the decoder's linear layers in float8, with torchao's tensorwise scaling. lm_head and
    everything else stay in bfloat16, and weights and masks in float32. This needs torchao (the extra `fp8`) and a GPU of
    compute capability 8.9 or higher; it is only faster with `torch_compile`."""
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
    keep_steps: list[int] = field(default_factory=list)
    """Steps whose checkpoints are saved and never removed, for runs that branch from them."""
    async_save: bool = False
    """Write checkpoints in a thread while training continues, so that a save takes only as long as the copy to host memory.
    The copy needs as much memory as the rank's part of the checkpoint. A checkpoint appears once it is complete, and the
    next save waits for it."""
    seed: int = 0
    data_seed: int | None = None
    full_determinism: bool = False
    """Compute the same bits in every run on the same GPUs; on CPUs this is always so."""
    dataloader_num_workers: int = 0
    dataloader_pin_memory: bool = True
    dataloader_prefetch_factor: int | None = None
    ddp_timeout: int = 600
    """Seconds that a rank waits for the others in a collective before the run ends with an error."""
    disable_tqdm: bool | None = None
    profile_steps: list[int] | None = None
    """[first, last]: rank 0 writes a torch profiler trace of these steps to `profile/` in the run's folder, with a table of
    the costliest kernels and, on a GPU, a memory snapshot. `last` is included; steps are numbered as in metrics.jsonl."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Any other TrainingArguments name: `+trainer.extra.neftune_noise_alpha=5`."""

    def __post_init__(self) -> None:
        check(self.max_steps is None or self.max_steps >= 1, f"trainer.max_steps={self.max_steps} must be at least 1.")
        check(
            self.max_steps is None or self.max_steps <= MAX_STEPS,
            f"trainer.max_steps={self.max_steps} is more than {MAX_STEPS:,} steps: give fewer, and a larger batch_size.",
        )
        for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            value = getattr(self, key)
            check(value is None or value >= 1, f"trainer.{key}={value} must be at least 1.")
        check(self.ddp_timeout >= 1, f"trainer.ddp_timeout={self.ddp_timeout} must be at least 1 second.")
        check(
            self.save_total_limit >= 1,
            f"trainer.save_total_limit={self.save_total_limit} must be at least 1: the newest checkpoint is always kept.",
        )
        check(
            not self.fp8 or (self.bf16 is not False and not self.fp16),
            f"trainer.fp8=true with bf16={self.bf16} and fp16={self.fp16}: everything that is not float8 is bfloat16, so "
            "leave trainer.bf16 null or true and trainer.fp16 false.",
        )
        self._check_profile_steps()
        check(
            all(step >= 1 for step in self.keep_steps),
            f"trainer.keep_steps={list(self.keep_steps)} has a step below 1: give the steps to keep, such as [80,160].",
        )
        wsd = self.lr_scheduler_type == "warmup_stable_decay"
        check(
            wsd or self.decay_steps is None,
            f"optim.decay_steps={self.decay_steps} is for optim.lr_scheduler_type=warmup_stable_decay, not "
            f"{self.lr_scheduler_type}: use optim=wsd, or leave it null.",
        )
        check(
            not wsd or self.decay_steps is not None or "num_decay_steps" in self.lr_scheduler_kwargs,
            "optim.lr_scheduler_type=warmup_stable_decay does not say when it decays: set optim.decay_steps=0.2 for the last "
            "fifth of the run, or 0 for never.",
        )
        kwargs = [key for key in ("num_decay_steps", "num_stable_steps") if key in self.lr_scheduler_kwargs]
        check(
            not kwargs or (self.decay_steps is None and kwargs == ["num_decay_steps"]),
            f"optim.lr_scheduler_kwargs has {' and '.join(kwargs)}, but optim.decay_steps and the length of the run determine "
            "them: set only optim.decay_steps.",
        )
        check(
            self.decay_steps is None or self.decay_steps >= 0,
            f"optim.decay_steps={self.decay_steps} must be at least 0.",
        )
        check(
            0 < self.learning_rate < math.inf, f"trainer.learning_rate={self.learning_rate} must be a number above 0."
        )
        check_trainer(self)
        check_own_names(self.extra, self.__dataclass_fields__)
        check_schedule_arguments(self.lr_scheduler_type, self.lr_scheduler_kwargs)

    def _check_profile_steps(self) -> None:
        if self.profile_steps is None:
            return
        steps = list(self.profile_steps)
        check(
            len(steps) == 2 and 1 <= steps[0] <= steps[1],
            f"trainer.profile_steps={steps} is not a range of steps: give the first and the last, such as [10,13].",
        )
        check(
            self.max_steps is None or steps[1] <= self.max_steps,
            f"trainer.profile_steps={steps} ends after trainer.max_steps={self.max_steps}: profile earlier steps.",
        )
