"""Names that transformers and torch accept, so that a wrong one is reported without importing them."""

from __future__ import annotations

import difflib
import math
from typing import Any

from conf.schema.checks import check

OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor", "adamw_anyprecision",
    "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit", "adamw_8bit", "ademamix_8bit",
    "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
    "paged_lion_32bit", "paged_lion_8bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
    "galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw", "muon", "schedule_free_radam", "schedule_free_adamw",
    "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw",
)  # fmt: skip
"""The names in transformers.training_args.OptimizerNames, and muon (`train.muon`)."""
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
)  # fmt: skip
"""The names in transformers.SchedulerType."""
INTERVALS = ("no", "steps", "epoch")
"""The names in transformers.IntervalStrategy, without "best", because a run resumes from its newest checkpoint."""
COMPILE_MODES = ("default", "lite", "max-autotune-no-cudagraphs", "max-autotune")
"""The modes of torch.compile except reduce-overhead, whose CUDA graphs do not work if blocks share one compiled graph."""


def check_name(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError, with the nearest name, if `value` is none of `choices`."""
    near = difflib.get_close_matches(value, choices, n=1)
    hint = f"did you mean {near[0]}? There are" if near else "choose one of"
    check(value in choices, f"{key}={value} is not known: {hint} {', '.join(choices)}.")


def check_trainer(trainer: Any) -> None:
    """Raise a ValueError if transformers or torch would refuse a name or number of the trainer group."""
    check_name("optim.optim", trainer.optim, OPTIMIZERS)
    check_name("optim.lr_scheduler_type", trainer.lr_scheduler_type, SCHEDULERS)
    check_name("trainer.eval_strategy", trainer.eval_strategy, INTERVALS)
    check_name("trainer.save_strategy", trainer.save_strategy, INTERVALS)
    if trainer.torch_compile_mode is not None:
        check_name("trainer.torch_compile_mode", trainer.torch_compile_mode, COMPILE_MODES)
    for key in ("logging_steps", "save_steps", "eval_steps"):
        value = getattr(trainer, key)
        check(
            value is None or value > 0, f"trainer.{key}={value} must be above 0: steps, or below 1 a share of the run."
        )
    for key in ("dataloader_num_workers", "seed", "data_seed"):
        value = getattr(trainer, key)
        check(value is None or 0 <= value < 1 << 32, f"trainer.{key}={value} must be from 0 to 4294967295.")
    for key in ("weight_decay", "warmup_steps", "adam_epsilon", "max_grad_norm"):
        value = getattr(trainer, key)
        check(value >= 0, f"optim.{key}={value} must be at least 0.")
    for key in ("weight_decay", "warmup_steps", "adam_epsilon"):
        check(math.isfinite(getattr(trainer, key)), f"optim.{key}={getattr(trainer, key)} must be finite.")
    for key in ("adam_beta1", "adam_beta2"):
        value = getattr(trainer, key)
        check(0 <= value < 1, f"optim.{key}={value} is outside [0, 1).")
