"""The configuration's trainer group as `transformers.TrainingArguments`."""

from __future__ import annotations

import difflib
from dataclasses import asdict, fields
from pathlib import Path

import torch
from transformers import TrainingArguments

from conf.schema import Config, TrainerConfig
from conf.schema.trainer import OWN_KEYS
from train.plan import RunPlan

SET_HERE = {
    "output_dir", "overwrite_output_dir", "report_to", "fsdp", "fsdp_config", "deepspeed", "use_cpu",
    "accelerator_config", "remove_unused_columns", "dataloader_drop_last", "num_train_epochs", "label_names",
    "average_tokens_across_devices", "logging_nan_inf_filter", "push_to_hub", "resume_from_checkpoint", "run_name",
    "load_best_model_at_end",
}  # fmt: skip


def training_arguments(config: Config, plan: RunPlan, output_dir: Path) -> TrainingArguments:
    """TrainingArguments for this run; a ValueError names a key that they do not have."""
    values = asdict(config.trainer)
    extra = values.pop("extra")
    for name in OWN_KEYS:
        del values[name]
    check_extra(extra)
    if "min_lr" not in values["lr_scheduler_type"]:
        # Only the schedules that end above 0 know the key, which is there for the default one.
        values["lr_scheduler_kwargs"].pop("min_lr_rate", None)
    if values["bf16"] is None:
        values["bf16"] = torch.cuda.is_available() and not values["fp16"]
    values["max_steps"] = plan.num_steps
    values["per_device_train_batch_size"] = plan.micro_batch_size
    values["gradient_accumulation_steps"] = plan.gradient_accumulation_steps
    values["disable_tqdm"] = bool(values["disable_tqdm"])
    if not values["gradient_checkpointing"]:
        # Newer transformers have another name for it and warn at the mere mention.
        del values["gradient_checkpointing"]
    # transformers' own mode makes the host wait for each kernel; `train.determinism` has set ours.
    values["full_determinism"] = False
    values["dataloader_pin_memory"] &= torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        use_cpu=not torch.cuda.is_available(),
        accelerator_config={
            "use_configured_state": True,
            "use_seedable_sampler": False,
            # From pinned memory a copy to the GPU does not make the host wait.
            "non_blocking": values["dataloader_pin_memory"],
        },
        report_to="none",
        remove_unused_columns=False,
        dataloader_drop_last=True,
        # Packed blocks all have the same number of tokens, so the plain mean is exact and costs no host sync.
        average_tokens_across_devices=False,
        logging_nan_inf_filter=False,
        **{**values, **extra},
    )
    name_matmul_precision()
    return arguments


def name_matmul_precision() -> None:
    """Name the precision that transformers set by torch's newer option by the older one too.

    transformers asks for TF32 by `torch.backends.fp32_precision` alone. `torch.get_float32_matmul_precision()`, which
    inductor calls when it tunes a matrix product, then raises because the two names disagree.
    """
    if torch.backends.fp32_precision == "tf32":
        torch.set_float32_matmul_precision("high")


def check_extra(extra: dict[str, object]) -> None:
    known = {field.name for field in fields(TrainingArguments)}
    for name in extra:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see transformers' documentation for the names there are."
            raise ValueError(f"trainer.extra.{name} is no name of transformers.TrainingArguments: {hint}")
        if name in SET_HERE:
            raise ValueError(f"trainer.extra.{name} is set by the framework itself: remove it.")
        if name in TrainerConfig.__dataclass_fields__:
            raise ValueError(f"trainer.extra.{name} has a key of its own: set trainer.{name}.")
