"""Keys that are passed on to transformers: their names and types, so that a wrong one is refused without importing it.

The arguments of TrainingArguments are read from the source of the installed version. Those of the learning rate schedules are
few, and a table here has them.
"""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Collection, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from conf.schema.checks import check

SET_HERE = {
    "output_dir", "overwrite_output_dir", "report_to", "fsdp", "fsdp_config", "deepspeed", "use_cpu",
    "accelerator_config", "remove_unused_columns", "dataloader_drop_last", "num_train_epochs", "label_names",
    "average_tokens_across_devices", "logging_nan_inf_filter", "push_to_hub", "resume_from_checkpoint", "run_name",
    "load_best_model_at_end",
}  # fmt: skip
"""Arguments of TrainingArguments that a run sets by itself."""
TYPES: Mapping[str, tuple[type, ...]] = {
    "bool": (bool,), "int": (int,), "float": (int, float), "str": (str,), "list": (list,), "dict": (dict,),
    "None": (type(None),),
}  # fmt: skip
"""The types of values in yaml that an annotation accepts. A bool is no number."""
FREE_SCHEDULES = ("greedy", "reduce_lr_on_plateau")
"""Learning rate schedules whose arguments are those of another class."""
MIN_RATE = {"num_cycles": "float", "min_lr": "float | None", "min_lr_rate": "float | None"}
SCHEDULE_ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "linear": {},
    "constant": {},
    "constant_with_warmup": {},
    "cosine": {"num_cycles": "float"},
    "cosine_with_restarts": {"num_cycles": "int"},
    "polynomial": {"lr_end": "float", "power": "float"},
    "inverse_sqrt": {"timescale": "int | None"},
    "cosine_with_min_lr": MIN_RATE,
    "cosine_warmup_with_min_lr": {**MIN_RATE, "warmup_lr_rate": "float | None"},
    "warmup_stable_decay": {
        "num_decay_steps": "int", "num_stable_steps": "int | None", "warmup_type": "str", "decay_type": "str",
        "min_lr_ratio": "float", "num_cycles": "float",
    },
}  # fmt: skip
"""The arguments of transformers' learning rate schedules with their types."""


@cache
def training_argument_types() -> dict[str, str]:
    """Return the annotations of the arguments of transformers.TrainingArguments; {} if its source cannot be read."""
    spec = find_spec("transformers")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        try:
            tree = ast.parse((Path(folder) / "training_args.py").read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"]
        fields = [node for found in classes for node in found.body if isinstance(node, ast.AnnAssign)]
        return {ast.unparse(field.target): ast.unparse(field.annotation) for field in fields}
    return {}


def accepts(annotation: str, value: Any) -> bool:
    """Return whether a value from yaml has a type of an annotation such as "int | None"; unknown types accept anything."""
    for name in (part.strip() for part in annotation.split("|")):
        kind = name.partition("[")[0]
        if kind == "Literal":
            if repr(value) == name.partition("[")[2].rstrip("]"):
                return True
        elif kind in TYPES:
            if isinstance(value, TYPES[kind]) and (kind == "bool" or not isinstance(value, bool)):
                return True
        elif "str" not in annotation:
            # An enumeration's names are given as str, which such an annotation has too.
            return True
    return False


def check_own_names(extra: Mapping[str, Any], own: Collection[str]) -> None:
    """Check that `trainer.extra` has no argument that is set elsewhere.

    Args:
        extra: The arguments of TrainingArguments that are passed on.
        own: The keys of the group `trainer`.

    Raises:
        ValueError: It has one.
    """
    for name in extra:
        check(name not in SET_HERE, f"trainer.extra.{name} is set by the framework itself: remove it.")
        check(name not in own, f"trainer.extra.{name} has its own key: set trainer.{name}.")


def check_extra(extra: Mapping[str, Any]) -> None:
    """Check the names and values of `trainer.extra` against the installed transformers.

    This is done for a command's own config only: a finished run may have been trained with another version.

    Raises:
        ValueError: A name is unknown, or a value has the wrong type.
    """
    types = training_argument_types() if extra else {}
    for name, value in extra.items() if types else ():
        words = f"trainer.extra.{name} is not an argument of transformers.TrainingArguments: "
        check(name in types, words + _hint(name, types, "see transformers' documentation for the available names."))
        _check_type(f"trainer.extra.{name}", types[name], value)


def check_schedule_arguments(schedule: str, arguments: Mapping[str, Any]) -> None:
    """Check the keys and values of `optim.lr_scheduler_kwargs`.

    Raises:
        ValueError: A key is unknown for the learning rate schedule, or a value has the wrong type.
    """
    if schedule in FREE_SCHEDULES or schedule not in SCHEDULE_ARGUMENTS:
        return
    # `min_lr_rate` is set for the default schedule, and `train.arguments` drops it for schedules that end at 0.
    known = {**SCHEDULE_ARGUMENTS[schedule], "min_lr_rate": "float | None"}
    for name, value in arguments.items():
        words = f"optim.lr_scheduler_kwargs.{name} does not fit optim.lr_scheduler_type={schedule}: "
        check(
            name in known,
            words + _hint(name, known, f"choose from {', '.join(SCHEDULE_ARGUMENTS[schedule]) or 'none'}."),
        )
        _check_type(f"optim.lr_scheduler_kwargs.{name}", known[name], value)


def _hint(name: str, known: Collection[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def _check_type(key: str, annotation: str, value: Any) -> None:
    shown = json.dumps(value, default=str)
    check(accepts(annotation, value), f"{key}={shown} has the wrong type: give {annotation.replace('None', 'null')}.")
