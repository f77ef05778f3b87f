"""The parts of a run, built from its configuration: arguments, model, blocks, trainer, recorder."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback, default_data_collator

from conf.cli import user_errors
from conf.schema import Config
from sparsity import SparsityCallback
from sparsity.mixed import schedule_record
from train.arguments import MUON, check_recipe, training_arguments
from train.data import Blocks, PreparedData, training_blocks
from train.data.collate import collate_documents
from train.data.mixture import MixtureBlocks, mixture_blocks
from train.data.sampler import PermutationSampler
from train.distributed import World, wants_fsdp
from train.evaluation import Evaluation
from train.faults.guard import StepGuard
from train.faults.heartbeat import Heartbeat
from train.model.build import build_skeleton
from train.plan.run import RunPlan
from train.pruning import sparsity_callback
from train.record.directory import RunDirectory
from train.record.metrics import ProgressBar, Recorder
from train.record.wandb_run import ID_FILE, start_wandb
from train.speed.compiled import compile_by_blocks
from train.speed.fp8 import check_fp8, convert_to_fp8
from train.speed.profiler import StepProfiler
from train.speed.throughput import StepClock, speedometer
from train.start import Start, identity
from train.trainer import KeepSteps, PretrainingTrainer, RunState

SETUP_ERRORS = (ImportError,)
"""Errors reported as the user's: transformers raises ImportError if a setting needs a library that is not installed."""


def checked_arguments(config: Config, plan: RunPlan, directory: RunDirectory, world: World) -> Any:
    """Return the run's TrainingArguments; end the run if a setting cannot be used on this machine."""
    with user_errors(quiet=not world.is_main, also=SETUP_ERRORS):
        arguments = training_arguments(config, plan, directory.checkpoints)
        check_fp8(config, plan, world.device, world.is_main)
        check_recipe(arguments, build_skeleton(plan.model))
    return arguments


def blocks_of_run(config: Config, plan: RunPlan, data: PreparedData) -> Blocks | MixtureBlocks:
    """Return the blocks to train on; those of a mixture cover the whole run, and sources repeat in them.

    Raises:
        ValueError: The text has fewer blocks than a batch.
    """
    if data.sources:
        seed = config.trainer.seed if config.trainer.data_seed is None else config.trainer.data_seed
        return mixture_blocks(data, plan.num_steps * plan.batch_size, seed)
    blocks = training_blocks(data)
    PermutationSampler(len(blocks), batch_size=plan.batch_size)
    return blocks


def build(
    config: Config, plan: RunPlan, data: PreparedData, arguments: Any, world: World
) -> tuple[Any, Any, Blocks | MixtureBlocks]:
    """Return the model without weights and not yet sharded, the tokenizer, and the blocks to train on.

    Args:
        config: The run's configuration.
        plan: The plan made from it.
        data: The prepared text.
        arguments: The TrainingArguments.
        world: This process and its peers.
    """
    with user_errors(quiet=not world.is_main, also=SETUP_ERRORS):
        blocks = blocks_of_run(config, plan, data)
        tokenizer = AutoTokenizer.from_pretrained(data.tokenizer, trust_remote_code=False)
        model = build_skeleton(plan.model, tokenizer)
        if config.trainer.fp8:
            convert_to_fp8(model)
        compile_by_blocks(model, arguments)
    return model, tokenizer, blocks


def make_trainer(
    config: Config,
    plan: RunPlan,
    directory: RunDirectory,
    data: PreparedData,
    blocks: Blocks | MixtureBlocks,
    model: Any,
    arguments: Any,
    start: Start,
    evaluation: Evaluation,
    world: World,
    guard: StepGuard,
    heartbeat: Heartbeat,
) -> tuple[PretrainingTrainer, Recorder | None]:
    """Return the trainer with its callbacks, and on rank 0 the recorder.

    Collective: every rank calls it.

    Args:
        config: The run's configuration.
        plan: The plan made from it.
        directory: The run's folder.
        data: The prepared text.
        blocks: The blocks to train on.
        model: The model, with or without weights.
        arguments: The TrainingArguments.
        start: The checkpoint to resume, or the function that fills the model.
        evaluation: Evaluates the model during and after training.
        world: This process and its peers.
        guard: Skips bad updates, and decides when to stop.
        heartbeat: This rank's signs of life.
    """
    sparsity = sparsity_callback(config, plan, start.branch)
    clock = StepClock(world.device, is_read=world.is_main)
    if sparsity is not None:
        sparsity.clock = clock
    recorder = profiler = None
    keeper = KeepSteps(config.trainer.keep_steps) if config.trainer.keep_steps else None
    if world.is_main:
        profiler = make_profiler(config, directory, clock)
        recorder = make_recorder(config, plan, directory, sparsity, start.sparsity, clock, world.device)
        if isinstance(blocks, MixtureBlocks):
            recorder.figures_of_data = lambda step: blocks.figures(step * plan.batch_size)
    with user_errors(quiet=not world.is_main, also=SETUP_ERRORS):
        trainer = PretrainingTrainer(
            world=world,
            sparsity=sparsity,
            run_state=RunState(
                identity=identity(plan),
                carried={"data": start.fingerprint, "tokenizer": data.tokenizer},
                branch_step=start.branch_step,
                keep_steps=tuple(config.trainer.keep_steps),
                before_save=recorder.sync if recorder else lambda: None,
            ),
            guard=guard,
            heartbeat=heartbeat,
            clock=clock,
            async_save=config.trainer.async_save,
            uses_muon=config.trainer.optim == MUON,
            batch_size=plan.batch_size,
            fill=start.fill if wants_fsdp() else None,
            evaluator=evaluation,
            model=model,
            args=arguments,
            train_dataset=blocks,
            eval_dataset=[],
            data_collator=collate_documents if data.by_document else default_data_collator,
            by_document=data.by_document,
            callbacks=[callback for callback in (keeper, profiler, sparsity, recorder) if callback is not None],
        )
    show_progress(trainer, sparsity)
    return trainer, recorder


def make_recorder(
    config: Config,
    plan: RunPlan,
    directory: RunDirectory,
    sparsity: SparsityCallback | None,
    initial_sparsity: float,
    clock: StepClock,
    device: torch.device,
) -> Recorder:
    """Return the recorder of rank 0; start its wandb run if one is wanted.

    Args:
        config: The run's configuration.
        plan: The plan made from it.
        directory: The run's folder.
        sparsity: The run's sparsity callback, if it has one.
        initial_sparsity: The share of zeros in the weights from which the run starts.
        clock: The timer of the training steps.
        device: The device that trains.
    """
    values: Any = OmegaConf.to_container(OmegaConf.structured(config))
    schedule = {"schedule": schedule_record(plan.schedule)} if plan.schedule else {}
    is_wandb_new = not (directory.wandb / ID_FILE).exists()
    with user_errors():
        wandb_run = start_wandb(config, plan, {**values, **schedule, "world_size": plan.world_size}, initial_sparsity)
    return Recorder(
        plan,
        sparsity,
        directory.metrics,
        wandb_run,
        clock,
        speedometer(plan, device, "fp8" if config.trainer.fp8 else "bf16"),
        is_wandb_new,
    )


def make_profiler(config: Config, directory: RunDirectory, clock: StepClock) -> StepProfiler | None:
    """Return the profiler of trainer.profile_steps; None if no steps are given."""
    steps = config.trainer.profile_steps
    return StepProfiler(steps[0], steps[1], directory.profile, clock) if steps else None


def show_progress(trainer: PretrainingTrainer, sparsity: SparsityCallback | None) -> None:
    """Replace transformers' progress reports with our progress bar."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        bar: TrainerCallback = ProgressBar(sparsity)
        trainer.add_callback(bar)
