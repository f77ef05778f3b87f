"""The configuration's trainer group as `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn
from transformers import PreTrainedModel, SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from conf.schema import Config
from conf.schema.trainer import OWN_KEYS
from train.plan.rate import decay_length
from train.plan.run import RunPlan

MUON = "muon"


def training_arguments(config: Config, plan: RunPlan, output_dir: Path) -> TrainingArguments:
    """Return the run's TrainingArguments.

    Args:
        config: The run's configuration.
        plan: The plan made from it.
        output_dir: The folder of the checkpoints.

    Raises:
        ValueError: transformers refuses a value of `trainer.extra`.
    """
    values = asdict(config.trainer)
    extra = values.pop("extra")
    if values["decay_steps"] is not None:
        values["lr_scheduler_kwargs"] = {
            **values["lr_scheduler_kwargs"], "num_decay_steps": decay_length(values["decay_steps"], plan.num_steps)
        }  # fmt: skip
    for name in OWN_KEYS:
        del values[name]
    if "min_lr" not in values["lr_scheduler_type"]:
        # `min_lr_rate` is set for the default schedule; schedules that end at 0 do not accept it.
        values["lr_scheduler_kwargs"].pop("min_lr_rate", None)
    if values["optim"] == MUON:
        # transformers does not know Muon; `PretrainingTrainer` makes the optimizer itself.
        check_muon_arguments(extra)
        values["optim"] = "adamw_torch"
    if values["bf16"] is None:
        values["bf16"] = torch.cuda.is_available() and not values["fp16"]
    if config.eval.every is not None:
        values["eval_strategy"], values["eval_steps"] = "steps", config.eval.every
    values["max_steps"] = plan.num_steps
    values["per_device_train_batch_size"] = plan.micro_batch_size
    values["gradient_accumulation_steps"] = plan.gradient_accumulation_steps
    values["disable_tqdm"] = bool(values["disable_tqdm"])
    if not values["gradient_checkpointing"]:
        # Newer versions of transformers have renamed the key and warn whenever it is given.
        del values["gradient_checkpointing"]
    # transformers' own deterministic mode makes the host wait for each kernel; `train.determinism` has set ours instead.
    values["full_determinism"] = False
    values["dataloader_pin_memory"] &= torch.cuda.is_available()
    try:
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
    except (ValueError, TypeError) as error:
        if not extra:
            raise
        raise ValueError(f"trainer.extra={extra} is refused by transformers: {_first_sentence(error)}") from error
    name_matmul_precision()
    return arguments


def check_muon_arguments(extra: dict[str, object]) -> None:
    """Check the keys of `trainer.extra` for Muon, which transformers does not configure.

    Raises:
        ValueError: A key would have no effect.
    """
    for name in ("optim_args", "optim_target_modules"):
        if extra.get(name):
            raise ValueError(f"trainer.extra.{name}={extra[name]} has no effect with optim.optim=muon: remove it.")


def name_matmul_precision() -> None:
    """Set torch's older setting of the matmul precision to the value that transformers gave the newer one.

    transformers turns TF32 on only through `torch.backends.fp32_precision`. Then `torch.get_float32_matmul_precision()`,
    which inductor calls when it tunes a matrix product, raises because the two settings disagree.
    """
    # torch's type annotations do not have this module attribute.
    if getattr(torch.backends, "fp32_precision", None) == "tf32":
        torch.set_float32_matmul_precision("high")


def check_recipe(arguments: TrainingArguments, model: PreTrainedModel) -> None:
    """Check, before the data is prepared, that optimizer, learning rate schedule and compiler can be created.

    Args:
        arguments: The run's arguments.
        model: A model with the run's parameters, on any device: some optimizers look at the parameters' names.

    Raises:
        ValueError: One of them cannot be created.
    """
    weight = nn.Parameter(torch.zeros(1))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        if kind.__module__.startswith("torch."):
            kind([weight], **options)
    except (ImportError, ValueError, TypeError) as error:
        raise ValueError(
            f"optim.optim={OptimizerNames(arguments.optim).value} cannot be created: {_first_sentence(error)}"
        ) from error
    scheduler = SchedulerType(arguments.lr_scheduler_type).value
    settings: dict[str, Any] = dict(arguments.lr_scheduler_kwargs or {})  # type: ignore[arg-type]
    try:
        get_scheduler(scheduler, torch.optim.SGD([weight], lr=1.0), 1, arguments.max_steps, settings)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"optim.lr_scheduler_kwargs={settings} does not fit optim.lr_scheduler_type={scheduler}: {_first_sentence(error)}"
        ) from error
    if arguments.use_liger_kernel and find_spec("liger_kernel") is None:
        raise ValueError("trainer.use_liger_kernel=true needs the library liger-kernel: pip install liger-kernel.")
    backend = arguments.torch_compile_backend
    if arguments.torch_compile and backend not in (known := torch._dynamo.list_backends(exclude_tags=())):
        raise ValueError(
            f"trainer.torch_compile_backend={backend} is not known to torch: choose one of {', '.join(known)}."
        )


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".") + "."
