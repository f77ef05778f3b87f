"""The wandb run of a run: its folder, name, group and tags."""

from __future__ import annotations

import os
import uuid
from typing import Any

from conf.schema import Config
from sparsity.common.files import write_atomically
from train.plan.run import RunPlan
from train.record.siblings import SHARE_BY_CHANCE
from train.record.wandb_key import has_wandb_key

ID_FILE = "id.txt"
"""The file in a run's folder `wandb` that keeps the id, so that a resumed run continues there."""
MAX_TAG_LENGTH = 64
"""The longest tag that wandb accepts."""


def start_wandb(config: Config, plan: RunPlan, values: dict[str, Any], initial_sparsity: float) -> Any | None:
    """Start a wandb run in the run's folder, offline if no key is configured; a resumed run keeps its id.

    Args:
        config: The run's configuration.
        plan: The plan made from it.
        values: The configuration that wandb shows.
        initial_sparsity: The share of zeros in the weights from which the run starts.

    Returns:
        The wandb run; None if wandb is off.

    Raises:
        ValueError: wandb did not start.
    """
    if not config.logger.wandb:
        return None
    import wandb

    logger, run_dir = config.logger, plan.run_dir
    mode = os.environ.get("WANDB_MODE") if logger.mode == "auto" else logger.mode
    id_file = run_dir / "wandb" / ID_FILE
    if not id_file.exists():
        id_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(id_file, uuid.uuid4().hex[:8] + "\n")
    try:
        run = wandb.init(
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(run_dir),
            project=logger.project,
            entity=logger.entity,
            group=logger.group or config.sweep_name,
            job_type=logger.job_type or kind_of_run(plan, initial_sparsity),
            tags=run_tags(config, plan, initial_sparsity),
            name=config.run_name or run_dir.name,
            config=values,
            mode=mode or ("online" if has_wandb_key() else "offline"),  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True),
        )
    except Exception as error:
        # There is no connection, the key is wrong, or wandb refuses the value of a WANDB_ variable.
        raise ValueError(
            f"wandb did not start ({' '.join(str(error).split())}): check the WANDB_ variables and the account, or set "
            "logger.mode=offline or logger=none."
        ) from error
    run.define_metric("train/tokens")
    for group in ("train/*", "perf/*", "eval/*", "sparsity/*", "layer_density/*"):
        run.define_metric(group, step_metric="train/tokens")
    return run


def kind_of_run(plan: RunPlan, initial_sparsity: float) -> str:
    """Return wandb's job type: `sparse` if the run prunes or starts sparse, `twin`, or `dense`."""
    if plan.twin:
        return "twin"
    return "sparse" if plan.schedule or initial_sparsity > SHARE_BY_CHANCE else "dense"


def run_tags(config: Config, plan: RunPlan, initial_sparsity: float) -> list[str]:
    """Return the model's name, the sparsity, and the tags of the config.

    The sparsity is the target; a twin has that of its sparse run, and a run that does not prune has that of its initial
    weights.
    """
    target = initial_sparsity if plan.target_sparsity is None else plan.target_sparsity
    level = f"sparsity-{100 * target:.4g}"
    of_kind = {"sparse": [level], "twin": ["twin", f"twin-of-{level}"], "dense": ["dense"]}
    tags = [config.model.name, *of_kind[kind_of_run(plan, initial_sparsity)], *config.logger.tags]
    return [tag[:MAX_TAG_LENGTH] for tag in dict.fromkeys(tags) if tag]
