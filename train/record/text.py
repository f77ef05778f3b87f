"""The messages in the terminal at the start and at the end of a run."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from conf.schema import Config
from sparsity.common.text import count_text, half_up
from sparsity.mixed import Mixed
from sparsity.registry import name_of
from sparsity.schedule import Ramp
from train.data import PreparedData
from train.plan.choices import choice_words
from train.plan.run import RunPlan
from train.record.directory import RunDirectory
from train.record.table import markdown


def opening_words(
    config: Config, plan: RunPlan, data: PreparedData, world_size: int, sharding: str, dense: str = ""
) -> str:
    """Return a description of the run in a few lines.

    Args:
        config: The run's configuration.
        plan: The plan made from it.
        data: The prepared text.
        world_size: The number of processes.
        sharding: How the model is divided among them.
        dense: The parameters that a sparse run does not prune (`train.plan.names.dense_words`).
    """
    choices = choice_words(config, prunes=plan.schedule is not None)
    lines = [
        f"{plan.run_dir}: {count_text(plan.counts.total)} parameters, {count_text(plan.counts.linear)} of them linear, "
        f"on {world_size} {'process' if world_size == 1 else 'processes'} ({sharding})",
        f"  {plan.num_steps:,} steps of {plan.batch_tokens:,} tokens = {count_text(plan.total_tokens)} tokens, from "
        f"{count_text(data.train.num_tokens)} tokens of text ({plan.total_tokens / data.train.num_tokens:.2f} epochs)",
        *([f"  with {', '.join(choices)}"] if choices else []),
    ]
    if plan.schedule is None:
        if plan.past is not None and plan.past.num_pruned:
            kept = f"{100 * (1 - plan.past.density):.4g} %, which were pruned before the branch, stay pruned"
            return "\n".join([*lines, f"  {kept}; average density {half_up(plan.average_density, 4)}"])
        return "\n".join([*lines, "  dense: nothing is pruned"])
    schedule = plan.schedule
    return "\n".join(
        [
            *lines,
            f"  pruned to {100 * schedule.sparsity:.4g} % {_events(schedule)}; average density "
            f"{half_up(plan.average_density, 4)}",
            *([f"  not pruned: {dense}"] if dense else []),
        ]
    )


def _events(schedule: Ramp | Mixed) -> str:
    if schedule.num_events == 1:
        return f"in one event before step {schedule.start_step}"
    return (
        f"in {schedule.num_events} events ({name_of(schedule)}), steps {schedule.start_step} to {schedule.end_step}, one every "
        f"{schedule.every_steps}"
    )


def closing_words(summary: dict[str, Any], directory: RunDirectory, commands: Sequence[str] = ()) -> str:
    """Return the text at the end of a run: its line of the table, held-out figures, files, and the next commands.

    Args:
        summary: The run's figures.
        directory: The run's folder.
        commands: Commands to suggest in addition to the run's own.
    """
    wandb_runs = sorted(str(path) for path in directory.wandb.glob("*run-*"))
    lines = [
        "",
        markdown([summary]),
        "",
        f"held-out text: {half_up(summary['bits_per_byte'], 3)} bits per byte (a unigram model of the same tokens: "
        f"{half_up(summary['unigram_bits_per_byte'], 3)}), perplexity {half_up(summary['perplexity'], 2)} a token",
        f"{summary['steps']} steps, {count_text(summary['total_tokens'])} tokens, "
        f"{summary['tokens_per_second']:,.0f} tokens a second on {summary['world_size']} processes",
        "",
        f"model    {directory.model}",
        f"report   {directory.report}",
        f"figures  {directory.summary}, {directory.metrics}",
    ]
    if wandb_runs:
        lines.append(f"wandb    {wandb_runs[-1]}")
    if directory.sample.exists():
        lines += ["", "a sample:", *(f"  {line}" for line in directory.sample.read_text(encoding="utf-8").splitlines())]
    return "\n".join(
        [*lines, "", "next:", *(f"  {as_typed(command)}" for command in [*own_commands(summary, directory), *commands])]
    )


def own_commands(summary: dict[str, Any], directory: RunDirectory) -> list[str]:
    """Return the commands that a user may run next: evaluation, and wandb's upload."""
    options = [f"{key}={shlex.quote(str(value))}" for key, value in summary["eval_overrides"].items()]
    commands = [" ".join([f"python -m eval model={directory.model} data={summary['data']}", *options])]
    if any("offline" in path.name for path in directory.wandb.glob("*run-*")):
        commands.append(f"wandb sync {directory.wandb}/offline-run-*")
    return commands


def as_typed(command: str) -> str:
    """Return the command with the path of this environment's programs, so that it works if that is not activated."""
    here = Path(sys.executable)
    program, _, rest = command.partition(" ")
    if not (here.parent / program).exists() or shutil.which(program) == str(here.parent / program):
        return command
    place = os.path.relpath(here.parent) if here.is_relative_to(Path.cwd()) else str(here.parent)
    return f"{place}/{program} {rest}"


def write_sample(model_folder: Path, prompt: str, path: Path, max_new_tokens: int = 90) -> None:
    """Continue a prompt with the finished model, loaded as any user would load it, and write the text to a file.

    Args:
        model_folder: The exported model.
        prompt: The text to continue.
        path: The file to write.
        max_new_tokens: The largest number of tokens to add.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=False, use_safetensors=True).eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generated = model.generate(
            **inputs,
            max_new_tokens=min(max_new_tokens, room),
            max_length=None,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
        )
    text = str(tokenizer.decode(generated[0], skip_special_tokens=True))
    path.write_text(text.strip() + "\n", encoding="utf-8")
