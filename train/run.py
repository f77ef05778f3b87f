"""One run from top to bottom: folder, data, model, training, figures, finished model."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from transformers.utils import logging as transformers_logging

from conf.cli import user_errors
from conf.schema import Config, tokenizer_of
from train.assembly import build, checked_arguments, make_trainer
from train.checkpoints.contents import parameters_of
from train.data import prepare, unigram_bits_per_byte
from train.data.mixture import MixtureBlocks
from train.data.sets import prepare_sets
from train.distributed import World, wants_fsdp
from train.evaluation import Evaluation, check_evaluation
from train.faults.guard import StepGuard
from train.faults.heartbeat import Heartbeat
from train.faults.preempt import Preemption
from train.faults.stop import RunStopped
from train.model.export import export_model
from train.model.weights import allocate
from train.plan.branch import branch_figures, branch_words
from train.plan.disk import run_bytes
from train.plan.names import dense_words
from train.plan.run import RunPlan
from train.record.directory import RunDirectory
from train.record.finish import finish
from train.record.metrics import Recorder, keep_whole_records
from train.record.publish import push_to_hub, renew_card
from train.record.snapshot import write_snapshot
from train.record.summary import count_nonzero_linear, summarize
from train.record.text import closing_words, opening_words
from train.start import Start, check_beginning, find_start
from train.trainer import PretrainingTrainer


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
    world.on_main(check_evaluation, config, not directory.config.exists())
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


def repeat_ending(
    config: Config, plan: RunPlan, directory: RunDirectory, world: World, summary: dict[str, Any]
) -> None:
    """Print a finished run's closing lines again, and rewrite its model card if this command gives card.* keys.

    Collective: every rank calls it.
    """
    world.on_main(renew_card, config, plan, directory, summary)
    say(world, closing_words(summary, directory, config.next_commands))
    world.on_main(push_to_hub, config.card, directory.model)


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
