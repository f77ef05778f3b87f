"""The plan of a run: the batch, steps, tokens and prune schedule that its configuration determines; nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.schema import Config, ModelConfig
from sparsity.choices import Choices
from sparsity.mixed import Mixed
from sparsity.pattern import Blocks, Pattern, parse_pattern
from sparsity.schedule import SCHEDULES, Ramp
from sparsity.scope import SCOPES, Pool, Scope, seen_together, target_shares
from sparsity.score import SCORES, Score
from sparsity.update import Update
from sparsity.window import compute_window, schedule_of_window
from train.plan.architecture import default_length, describe, resolved
from train.plan.batch import split_batch
from train.plan.branch import Past, planned_steps
from train.plan.counts import ParameterCounts, count_parameters
from train.plan.names import planned_pools, prunable_shapes, pruned_groups
from train.plan.rate import check_decay, check_window_and_decay
from train.plan.twin import DenseTwin, dense_twin


@dataclass(frozen=True)
class RunPlan:
    """The plan of one run on `world_size` processes; `batch_size` is the number of sequences per step over all of them."""

    run_dir: Path
    world_size: int
    num_steps: int
    sequence_length: int
    batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    schedule: Ramp | Mixed | None
    """The schedule of all prunable weights together; None if the run stays dense."""
    pools: tuple[Pool, ...]
    """The groups of weights that compete with each other; empty if the run stays dense."""
    scope: Scope
    """The rule that divides the pruned weights among the pools."""
    update: Update
    """The rule that determines whether pruned weights may return."""
    score: Score
    """The rule that ranks weights."""
    pattern: Pattern | None
    """The positions that may be pruned; None for all."""
    calibration: int
    """The number of sequences whose activations the score needs at each event; 0 if it needs none."""
    model: ModelConfig
    """The model to train: the configured one, or its dense twin."""
    counts: ParameterCounts
    target_sparsity: float | None
    """The final sparsity of all prunable weights together. A twin has that of its sparse run, a dense run None."""
    twin: DenseTwin | None = None
    """The dense twin and its difference from the size it should have; None if model.match is null."""
    past: Past | None = None
    """The steps of another run from which this one branches, if they are known."""

    @property
    def architecture(self) -> str:
        """The `model_type` of transformers."""
        return "llama" if self.model.path is None else describe(self.model).kind

    @property
    def batch_tokens(self) -> int:
        """The number of tokens of a step, over all processes."""
        return self.batch_size * self.sequence_length

    @property
    def total_tokens(self) -> int:
        """The number of tokens that the run trains on."""
        return self.num_steps * self.batch_tokens

    @property
    def average_density(self) -> float:
        """The mean density of the prunable weights over the run's steps, with those before a branch."""
        if self.past is not None:
            return self.past.average_density(self.density_at, self.num_steps)
        return self.schedule.average_density(self.num_steps) if self.schedule else 1.0

    def density_at(self, step: int) -> float:
        """Return the density of the prunable weights while a step runs; weights pruned before a branch stay pruned."""
        density = self.schedule.density(step) if self.schedule else 1.0
        return density if self.past is None or self.update.lets_return else min(density, self.past.density)

    @property
    def extra_linear(self) -> float:
        """The average number of pruned linear weights that cost compute too, because their gradients are needed."""
        if self.schedule is None:
            return 0.0
        extra = self.update.extra_compute(self.schedule, self.num_steps)
        if self.update.gradients != "dense":
            extra += self.score.extra_compute(self.schedule, self.num_steps)
        return extra / self.num_steps * self.num_prunable

    @property
    def num_thresholds(self) -> int:
        """The number of sets of weights that compete with each other."""
        if self.scope.is_by_row:
            return sum(pool.numel // pool.shape[-1] for pool in self.pools)
        return len(self.pools)

    @property
    def num_prunable(self) -> int:
        """The number of prunable weights."""
        if self.past is not None and not self.pools:
            return self.past.num_prunable
        return sum(pool.numel for pool in self.pools)

    @property
    def num_pruned(self) -> int:
        """The number of weights that are pruned at the end."""
        inherited = 0 if self.past is None or self.update.lets_return else self.past.num_pruned
        if self.schedule is None:
            return inherited
        base = self.schedule.base
        counts = self.scope.counts(self.pools, base, base.end_step)
        return max(inherited, sum(counts if self.pattern is None else map(self.pattern.whole, counts)))


def plan_run(config: Config, world_size: int) -> RunPlan:
    """Return the plan of a run.

    Args:
        config: The run's configuration.
        world_size: The number of processes.

    Raises:
        ValueError: The configuration is not valid; the message says why.
    """
    model = resolved(config.model)
    sequence_length = config.data.sequence_length or default_length(model)
    if sequence_length > model.max_position_embeddings:
        raise ValueError(
            f"data.sequence_length={sequence_length} is longer than the model's context, "
            f"model.max_position_embeddings={model.max_position_embeddings}: use a shorter length or a longer context."
        )
    pools = planned_pools(model, config.sparsity)
    batch_size, micro, accumulation = split_batch(config, world_size)
    _check_shards(model, config, world_size)
    schedule, num_steps = _schedule_and_steps(config, pools, batch_size * sequence_length)
    check_decay(config.trainer, num_steps)
    _check_keep_steps(config, num_steps)
    target_sparsity = schedule.sparsity if schedule else None
    twin = None
    if model.match == "average":
        twin = dense_twin(model, _average_linear(model, pools, schedule, num_steps))
        model, schedule = twin.model, None
    score = SCORES.find(config.sparsity.score)
    return RunPlan(
        run_dir=run_directory(config),
        world_size=world_size,
        num_steps=num_steps,
        sequence_length=sequence_length,
        batch_size=batch_size,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        schedule=schedule,
        pools=tuple(pools) if schedule else (),
        scope=SCOPES.find(config.sparsity.scope),
        update=config.sparsity.make_update(),
        score=score,
        pattern=parse_pattern(config.sparsity.pattern),
        calibration=config.sparsity.calibration if "activations" in score.needs else 0,
        model=model,
        counts=count_parameters(model),
        target_sparsity=target_sparsity,
        twin=twin,
    )


def _schedule_and_steps(config: Config, pools: Sequence[Pool], batch_tokens: int) -> tuple[Ramp | Mixed | None, int]:
    """Return the prune schedule, None for a dense run, and the number of steps, which a compute budget may determine."""
    sparsity, window, num_steps = config.sparsity, config.sparsity.window, config.trainer.max_steps
    num_steps = planned_steps(config) if num_steps is None else num_steps
    if (num_steps is None) == (window.budget is None):
        raise ValueError(
            f"trainer.max_steps={num_steps} and sparsity.window.budget={window.budget}, but exactly one of them must set "
            "the length of the run: set one and leave the other null (both may be null with branch_from=RUN@STEP and "
            "optim.decay_steps)."
        )
    shares = target_shares(pools, sparsity.target)
    if not any(target for _, target in shares):
        return None, num_steps or round(window.budget or 0)
    kind = SCHEDULES.find(sparsity.schedule)
    if num_steps is None:
        schedule, num_steps = compute_window(
            sparsity.target,
            window.start,
            window.end,
            budget=window.budget,
            every_steps=window.every,
            kind=kind,
            shares=shares,
        )
    else:
        schedule = schedule_of_window(
            sparsity.target,
            window.start,
            window.end,
            of=window.of,  # type: ignore[arg-type]
            every_steps=window.every,
            num_steps=num_steps,
            batch_tokens=batch_tokens,
            kind=kind,
            shares=shares,
        )
    check_window_and_decay(config.trainer, schedule, num_steps)
    choices = Choices(
        schedule,
        score=SCORES.find(sparsity.score),
        factors=sparsity.factors,
        normalize=sparsity.normalize,
        scope=SCOPES.find(sparsity.scope),
        groups=pruned_groups(sparsity),
        pattern=parse_pattern(sparsity.pattern),
        update=sparsity.make_update(),
        calibration=sparsity.calibration,
    )
    if config.init_from is not None and choices.update.lets_return:
        raise ValueError(
            f"init_from={config.init_from} keeps the zeros of its model, but sparsity.update={sparsity.update} lets "
            "pruned weights return: use sparsity.update=shrink, or start from new weights."
        )
    return seen_together(schedule, pools), num_steps


def _check_shards(model: ModelConfig, config: Config, world_size: int) -> None:
    """Refuse blocks that FSDP2 would share out to two ranks; what a config of the user's own shards is checked at the start."""
    pattern, num_ranks = parse_pattern(config.sparsity.pattern), max(1, world_size // config.launch.num_replicas)
    if isinstance(pattern, Blocks) and config.sparsity.target and config.launch.config_file is None:
        for name, shape in prunable_shapes(model, config.sparsity).items():
            pattern.check_shards(name, shape, num_ranks)


def _check_keep_steps(config: Config, num_steps: int) -> None:
    """Refuse to keep checkpoints of steps that the run does not have."""
    if late := [step for step in config.trainer.keep_steps if step > num_steps]:
        raise ValueError(
            f"trainer.keep_steps has {late[0]}, but the run has only {num_steps} steps, so there would be no such checkpoint: "
            "give earlier steps, or train longer."
        )


def _average_linear(model: ModelConfig, pools: Sequence[Pool], schedule: Ramp | Mixed | None, num_steps: int) -> float:
    """Return the mean density of all linear weights; those that are never pruned count in full."""
    if schedule is None:
        return 1.0
    prunable = sum(pool.numel for pool in pools)
    return 1.0 - (1.0 - schedule.average_density(num_steps)) * prunable / count_parameters(model).linear


def run_directory(config: Config) -> Path:
    """Return runs_dir/run_name, or in a sweep runs_dir/sweep_name/job; a dense twin has its own name."""
    sparsity = f"{100 * config.sparsity.target:g}p" if config.sparsity.target else "dense"
    name = config.run_name or f"{config.model.name}-{sparsity}"
    return Path(config.runs_dir) / (f"{name}-twin" if config.model.match else name)
