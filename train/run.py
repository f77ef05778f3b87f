"""One run from top to bottom: folder, data, model, training, figures, finished model."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback, default_data_collator
from transformers.utils import logging as transformers_logging

from conf.cli import user_errors
from conf.schema import Config, tokenizer_of
from sparsity import SparsityCallback
from sparsity.schedule import schedule_record
from train.arguments import MUON, check_recipe, training_arguments
from train.checkpoints.write import parameters_of
from train.data import Blocks, PreparedData, prepare, training_blocks, unigram_bits_per_byte
from train.data.collate import collate_documents
from train.data.mixture import MixtureBlocks, mixture_blocks
from train.data.sampler import PermutationSampler
from train.distributed import World, wants_fsdp
from train.evaluation import Evaluation, prepare_sets
from train.faults.guard import StepGuard
from train.faults.heartbeat import Heartbeat
from train.faults.preempt import Preemption
from train.faults.stop import RunStopped
from train.model.build import build_skeleton
from train.model.export import export_model
from train.model.weights import allocate
from train.plan.branch import branch_figures, branch_words
from train.plan.disk import run_bytes
from train.plan.names import dense_words
from train.plan.run import RunPlan
from train.pruning import sparsity_callback
from train.record.directory import RunDirectory
from train.record.finish import finish
from train.record.metrics import ProgressBar, Recorder, keep_whole_records
from train.record.publish import push_to_hub, renew_card
from train.record.snapshot import write_snapshot
from train.record.summary import count_nonzero_linear, summarize
from train.record.text import closing_words, opening_words
from train.record.wandb_run import ID_FILE, start_wandb
from train.speed.compiled import compile_by_blocks
from train.speed.fp8 import check_fp8, convert_to_fp8
from train.speed.profiler import StepProfiler
from train.speed.throughput import StepClock, speedometer
from train.start import Start, check_beginning, find_start, identity
from train.trainer import KeepSteps, PretrainingTrainer, RunState

SETUP_ERRORS = (ImportError,)
"""Errors reported as the user's: transformers raises ImportError if a setting needs a library that is not installed."""


def run(config: Config, plan: RunPlan, world: World, preemption: Preemption, heartbeat: Heartbeat) -> None:
    """Train, evaluate and export one model.

    Collective: every rank of the world calls it.

    Args:
        config: The run's configuration.
        plan: The plan made from it.
        world: This process and its peers.
        preemption: The listener for requests to stop.
        heartbeat: This rank's signs of life.

    Raises:
        RunStopped: On every rank, if the run ends early; the same command resumes it.
    """
    started = time.monotonic()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    directory = RunDirectory(plan.run_dir)
    arguments = checked_arguments(config, plan, directory, world)
    finished = world.on_main(directory.claim, config, run_bytes(config, plan))
    if finished is not None:
        repeat_ending(config, plan, directory, world, finished)
        return
    world.on_main(check_beginning, config, plan, directory)
    data = world.on_main(prepare, config.data, tokenizer_of(config), plan.model.vocab_size, plan.sequence_length)
    sets = world.on_main(prepare_sets, config, data)
    model, tokenizer, blocks = build(config, plan, data, arguments, world)
    start = find_start(config, plan, directory, data, model, tokenizer, world)
    if start.branch is not None:
        plan = replace(plan, past=start.branch.past)
        if isinstance(blocks, MixtureBlocks):
            blocks.continue_from(start.branch.step * plan.batch_size, start.branch.blocks)
    if not wants_fsdp():
        with user_errors(quiet=not world.is_main):
            allocate(model, world.device)
            start.fill(model)
    world.on_main(directory.begin, config)
    world.on_main(lambda: len(keep_whole_records(directory.metrics)))
    world.on_main(write_snapshot, directory.environment, world)

    guard = StepGuard(world, preemption, config.max_skipped)
    evaluation = Evaluation(config, data, sets, tokenizer, world)
    trainer, recorder = make_trainer(
        config, plan, directory, data, blocks, model, arguments, start, evaluation, world, guard, heartbeat
    )
    sharding = "FSDP2" if trainer.is_fsdp_enabled else "no sharding"
    shapes = {name: param.shape for name, param in parameters_of(model).items()}
    say(world, opening_words(config, plan, data, world.size, sharding, dense_words(shapes, start.prunable)))
    train(trainer, recorder, start, world)

    if not config.eval.is_empty and trainer.evaluated_step != trainer.state.global_step:
        trainer.evaluate()
    score, others = evaluation.final(trainer.model_wrapped)
    export_model(
        trainer.model,
        tokenizer,
        directory.model,
        dtype=config.export.dtype,
        max_shard_size=config.export.max_shard_size,
        world=world,
    )
    sparsity = trainer.sparsity
    summary = summarize(
        config,
        plan,
        step_losses=trainer.step_losses(),
        nonzero_linear_params=count_nonzero_linear(trainer.model_wrapped),
        num_prunable=sparsity.num_prunable if sparsity else 0,
        average_density=sparsity.average_density if sparsity else 1.0,
        score=score,
        others=others,
        heldout_bytes=data.heldout.num_bytes,
        by_source=blocks.figures(plan.num_steps * plan.batch_size) if isinstance(blocks, MixtureBlocks) else {},
        unigram_bits_per_byte=unigram_bits_per_byte(data) if world.is_main else 0.0,
        fsdp_version=2 if trainer.is_fsdp_enabled else 0,
        train_seconds=trainer.train_seconds,
        seconds=trainer.earlier_seconds + time.monotonic() - started,
    )
    if start.branch is not None:
        summary["branch"] = branch_figures(start.branch)
    if recorder is not None:
        finish(config, plan, directory, recorder, summary)
    world.on_main(push_to_hub, config.card, directory.model)


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


def repeat_ending(
    config: Config, plan: RunPlan, directory: RunDirectory, world: World, summary: dict[str, Any]
) -> None:
    """Print a finished run's closing lines again, and rewrite its model card if this command gives card.* keys.

    Collective: every rank calls it.
    """
    world.on_main(renew_card, config, plan, directory, summary)
    say(world, closing_words(summary, directory, config.next_commands))
    world.on_main(push_to_hub, config.card, directory.model)


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


def train(trainer: PretrainingTrainer, recorder: Recorder | None, start: Start, world: World) -> None:
    """Train from the beginning or from the checkpoint; close the records if the run ends early.

    Collective: every rank calls it.
    """
    if start.branch is not None:
        say(world, f"  {branch_words(start.branch)}")
    if start.checkpoint is not None:
        say(world, f"  resumed from {start.checkpoint}")
    try:
        trainer.train(resume_from_checkpoint=None if start.checkpoint is None else str(start.checkpoint))
    except RunStopped:
        if recorder is not None:
            recorder.close()
        raise


def say(world: World, words: str) -> None:
    """Print `words` on rank 0."""
    if world.is_main:
        print(words, flush=True)


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
