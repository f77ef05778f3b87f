"""One run from top to bottom: world, folder, data, model, training, figures, finished model."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback, default_data_collator
from transformers.utils import logging as transformers_logging

from conf.cli import user_errors
from conf.schema import Config, tokenizer_of
from sparsity import SparsityCallback, prunable_parameters
from sparsity.prunable import own_linear_weights
from sparsity.schedule import schedule_record
from sparsity.shards import local_values, rank_layout
from train.arguments import MUON, check_recipe, training_arguments
from train.branch import begin_branch
from train.checkpoints.durable import write_atomically
from train.checkpoints.resume import checkpoint_to_resume, data_fingerprint
from train.checkpoints.write import parameters_of
from train.data import Blocks, PreparedData, TokenStream, heldout_tokens, prepare, unigram_bits_per_byte
from train.data.sampler import PermutationSampler
from train.data.stream import training_blocks
from train.distributed import World, wants_fsdp
from train.faults.guard import StepGuard
from train.faults.heartbeat import Heartbeat
from train.faults.preempt import Preemption
from train.faults.stop import RunStopped
from train.model.build import build_skeleton, model_on_meta
from train.model.export import export_model
from train.model.initial import initial_weights
from train.model.initial_check import check_start, check_tokenizer, command_line
from train.model.weights import allocate, draw_weights
from train.plan.branch import branch_words
from train.plan.disk import run_bytes
from train.plan.folders import is_at_hand
from train.plan.names import dense_words
from train.plan.run import RunPlan
from train.pruning import sparsity_callback
from train.record.card import write_card
from train.record.directory import RunDirectory
from train.record.figure import draw_report, read_records
from train.record.metrics import ProgressBar, Recorder, keep_whole_records
from train.record.publish import push_to_hub, renew_card
from train.record.snapshot import write_snapshot
from train.record.summary import summarize
from train.record.text import closing_words, opening_words, write_sample
from train.record.wandb_run import start_wandb
from train.scoring import Score, score_stream
from train.speed.compiled import compile_by_blocks
from train.speed.fp8 import check_fp8, convert_to_fp8
from train.speed.profiler import StepProfiler
from train.speed.throughput import StepClock, speedometer
from train.trainer import KeepSteps, PretrainingTrainer, RunState

SETUP_ERRORS = (ImportError,)
"""Beside a user's errors: transformers raises it for a library that a setting needs."""


def run(config: Config, plan: RunPlan, world: World, preemption: Preemption, heartbeat: Heartbeat) -> None:
    """Train, evaluate and export one model. Collective: every rank of the world calls it.

    RunStopped, on every rank, where the run ends early and can go on.
    """
    started = time.monotonic()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    directory = RunDirectory(plan.run_dir)
    with user_errors(quiet=not world.is_main, also=SETUP_ERRORS):
        arguments = training_arguments(config, plan, directory.checkpoints)
        check_fp8(config, plan, world.device, world.is_main)
        check_recipe(arguments, model_on_meta(plan.model))
    finished = world.on_main(directory.claim, config, run_bytes(config, plan))
    if finished is not None:
        world.on_main(renew_card, config, plan, directory, finished)
        say(world, closing_words(finished, directory, config.next_commands))
        world.on_main(push_to_hub, config.card, directory.model)
        return
    world.on_main(check_beginning, config, plan, directory)
    data = world.on_main(prepare, config.data, tokenizer_of(config), plan.model.vocab_size, plan.sequence_length)
    with user_errors(quiet=not world.is_main, also=SETUP_ERRORS):
        # Refuses a batch that is more than the text.
        PermutationSampler(len(training_blocks(data)), batch_size=plan.batch_size)
        tokenizer = AutoTokenizer.from_pretrained(data.tokenizer, trust_remote_code=False)
        model = build_skeleton(plan.model, tokenizer)
        if config.trainer.fp8:
            convert_to_fp8(model)
        compile_by_blocks(model, arguments)
        prunable = prunable_parameters(model, config.sparsity.include, config.sparsity.requires_dense)
        shapes = {name: param.shape for name, param in parameters_of(model).items()}
    fingerprint = world.on_main(data_fingerprint, data.folder)
    branch = world.on_main(begin_branch, config, plan, directory, identity(plan), data.folder, data.tokenizer)
    branch_step = None if branch is None else branch.step
    resume_from = checkpoint_to_resume(directory, identity(plan), data.folder, world, branch_step)
    with user_errors(quiet=not world.is_main):
        fill = filling(config, plan, model, tokenizer, resume_from)
        initial_sparsity = world.on_main(inherited_sparsity, config, model, list(prunable))
        if not wants_fsdp():
            allocate(model, world.device)
            fill(model)
    world.on_main(directory.begin, config)
    world.on_main(lambda: len(keep_whole_records(directory.metrics)))
    world.on_main(write_snapshot, directory.environment, world)

    sparsity = sparsity_callback(config, plan, branch)
    clock = StepClock(world.device, is_read=world.is_main)
    if sparsity is not None:
        sparsity.clock = clock
    recorder = profiler = None
    keeper = KeepSteps(config.trainer.keep_steps) if config.trainer.keep_steps else None
    if world.is_main:
        profiler = make_profiler(config, directory, clock)
        recorder = make_recorder(config, plan, directory, sparsity, initial_sparsity, clock, world.device)
    with user_errors(quiet=not world.is_main, also=SETUP_ERRORS):
        trainer = PretrainingTrainer(
            world=world,
            sparsity=sparsity,
            run_state=RunState(
                identity=identity(plan),
                carried={"data": fingerprint, "tokenizer": data.tokenizer},
                branch_step=branch_step,
                keep_steps=tuple(config.trainer.keep_steps),
                before_save=recorder.sync if recorder else lambda: None,
            ),
            guard=StepGuard(world, preemption, config.max_skipped),
            heartbeat=heartbeat,
            clock=clock,
            async_save=config.trainer.async_save,
            uses_muon=config.trainer.optim == MUON,
            batch_size=plan.batch_size,
            fill=fill if wants_fsdp() else None,
            evaluator=lambda module: heldout_figures(score_heldout(module, data, config, world), data),
            model=model,
            args=arguments,
            train_dataset=Blocks(TokenStream(data.folder, "train"), plan.sequence_length),
            eval_dataset=[],
            data_collator=default_data_collator,
            callbacks=[callback for callback in (keeper, profiler, sparsity, recorder) if callback is not None],
        )
    show_progress(trainer, sparsity)
    fsdp_version = 2 if trainer.is_fsdp_enabled else 0
    sharding = "FSDP2" if fsdp_version else "no sharding"
    say(world, opening_words(config, plan, data, world.size, sharding, dense_words(shapes, prunable)))
    if branch is not None:
        say(world, f"  {branch_words(branch)}")
    if resume_from is not None:
        say(world, f"  resumed from {resume_from}")
    try:
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    except RunStopped:
        if recorder is not None:
            recorder.close()
        raise

    score = score_heldout(trainer.model_wrapped, data, config, world)
    export_model(
        trainer.model,
        tokenizer,
        directory.model,
        dtype=config.export.dtype,
        max_shard_size=config.export.max_shard_size,
        world=world,
    )
    summary = summarize(
        config,
        plan,
        step_losses=trainer.step_losses(),
        nonzero_linear_params=count_nonzero_linear(trainer.model_wrapped),
        num_prunable=sparsity.num_prunable if sparsity else 0,
        average_density=sparsity.average_density if sparsity else 1.0,
        score=score,
        heldout_bytes=data.heldout.num_bytes,
        unigram_bits_per_byte=unigram_bits_per_byte(data) if world.is_main else 0.0,
        fsdp_version=fsdp_version,
        train_seconds=trainer.train_seconds,
        seconds=trainer.earlier_seconds + time.monotonic() - started,
    )
    if branch is not None:
        summary["branch"] = {"run": Path(branch.run).name, "step": branch.step, "trunk": branch.trunk}
    if recorder is not None:
        finish(config, plan, directory, recorder, summary)
    world.on_main(push_to_hub, config.card, directory.model)


def check_beginning(config: Config, plan: RunPlan, directory: RunDirectory) -> None:
    """Refuse an `init_from` that does not fit a run that begins; a ValueError says why."""
    if not directory.config.exists():
        check_start(config, plan, command_line())
        check_tokenizer(config, command_line())


def filling(
    config: Config, plan: RunPlan, model: Any, tokenizer: Any, resume_from: Path | None
) -> Callable[[nn.Module], Any]:
    """Return what gives the model its first weights, a ValueError if `init_from` is not of the model.

    A resumed run gets none: its checkpoint has them all.
    """
    if resume_from is not None:
        return lambda module: None
    if config.init_from is not None:
        weights = initial_weights(model, config.init_from, plan.model.path is not None)
        return weights.fill
    seed, init = config.trainer.seed, plan.model.init
    return lambda module: draw_weights(module, build_skeleton(plan.model, tokenizer), seed, init)


def inherited_sparsity(config: Config, model: Any, prunable: list[str]) -> float:
    """Return the share of zeros in the prunable weights of `init_from`; 0 if a resumed run's folder is gone."""
    if config.init_from is None or not is_at_hand(config.init_from):
        return 0.0
    return initial_weights(model, config.init_from, config.model.path is not None).zero_share(prunable)


def identity(plan: RunPlan) -> dict[str, Any]:
    """What a step of the run is: a checkpoint with another one is of another run."""
    return {
        "batch_size": plan.batch_size,
        "sequence_length": plan.sequence_length,
        "num_steps": plan.num_steps,
        "schedule": schedule_record(plan.schedule) if plan.schedule else None,
    }


def say(world: World, words: str) -> None:
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
    values: Any = OmegaConf.to_container(OmegaConf.structured(config))
    schedule = {"schedule": schedule_record(plan.schedule)} if plan.schedule else {}
    with user_errors():
        wandb_run = start_wandb(config, plan, {**values, **schedule, "world_size": plan.world_size}, initial_sparsity)
    return Recorder(
        plan,
        sparsity,
        directory.metrics,
        wandb_run,
        clock,
        speedometer(plan, device, "fp8" if config.trainer.fp8 else "bf16"),
    )


def make_profiler(config: Config, directory: RunDirectory, clock: StepClock) -> StepProfiler | None:
    steps = config.trainer.profile_steps
    return StepProfiler(steps[0], steps[1], directory.profile, clock) if steps else None


def show_progress(trainer: PretrainingTrainer, sparsity: SparsityCallback | None) -> None:
    """Put our progress bar in the place of transformers' own reporting."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        bar: TrainerCallback = ProgressBar(sparsity)
        trainer.add_callback(bar)


def score_heldout(model: nn.Module, data: PreparedData, config: Config, world: World) -> Score:
    """The held-out split's likelihood. Collective."""
    return score_stream(
        model,
        heldout_tokens(data),
        window=data.sequence_length,
        batch_size=config.trainer.per_device_eval_batch_size,
        world=world,
        show_progress=not config.trainer.disable_tqdm,
    )


def heldout_figures(score: Score, data: PreparedData) -> dict[str, float]:
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte(data.heldout.num_bytes),
    }


@torch.no_grad()
def count_nonzero_linear(model: nn.Module) -> int:
    """Weights of the linear layers that are not exactly 0, over all shards. Collective over the shard group."""
    weights = list(own_linear_weights(model).values())
    counts = torch.stack([torch.count_nonzero(local_values(weight)) for weight in weights])
    return int(rank_layout(weights).sum_counts(counts).sum())


def finish(config: Config, plan: RunPlan, directory: RunDirectory, recorder: Recorder, summary: dict[str, Any]) -> None:
    """Rank 0's last work: sample, report, card, and at the very end the summary, which marks the run as finished."""
    recorder.finish(summary)
    extras = {
        "sample": lambda: write_sample(directory.model, config.prompt, directory.sample),
        "report": lambda: draw_report(read_records(directory.metrics), summary, directory.report),
        "model card": lambda: write_card(config, plan, directory, summary),
    }
    for name, make in extras.items():
        try:
            make()
        except OSError:
            # A full disk: the run is not finished, and the same command goes on with it.
            raise
        except Exception as error:
            # A diverged model cannot write and its losses cannot be drawn: its figures must not be lost for that.
            print(f"warning: the {name} could not be made: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    write_atomically(directory.summary, json.dumps(summary, indent=2) + "\n")
    print(closing_words(summary, directory, config.next_commands), flush=True)
