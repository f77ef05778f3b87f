"""A plan as text for the terminal, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from sparsity.common.text import bytes_text, count_text, half_up, power_text
from train.plan.series import card_cells

HEADINGS = (
    ("", "model"),
    ("total", "params"),
    ("linear", "params"),
    ("avg.", "linear"),
    ("nonzero", "linear"),
    ("spar-", "sity"),
    ("batch", "tok."),
    ("", "lr"),
    ("total", "tokens"),
    ("train", "loss"),
    ("", "std"),
    ("", "ppl"),
)
MAX_COLUMNS = 100
NEWLINE = "\n"
NOTE = (
    "Batch and total tokens above are counted like the series' cards, which call 2^20 tokens 1M (8M for 4096 x 2048 = "
    "8,388,608); the true numbers are below. Loss and perplexity stay empty until they are measured."
)
DENSITY_HEADINGS = (
    ("", "average", "by the cards'", "dense-equivalent", "true tokens", "true"),
    ("model", "density", "bookkeeping", "steps", "per step", "tokens"),
)


def series_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table with the cards' columns, and below it the numbers that the cards count differently."""
    cells = [tuple(card_cells(row).values()) for row in rows]
    lines = align([tuple(above for above, _ in HEADINGS), tuple(name for _, name in HEADINGS), *cells], gap=1)
    density = [
        (
            row["model"],
            half_up(row["average_density"], 4),
            half_up(row["average_density_card"], 4),
            half_up(row["dense_equivalent_steps"], 1),
            f"{row['batch_tokens_true']:,}",
            count_text(row["total_tokens_true"], 1),
        )
        for row in rows
    ]
    below = align([*DENSITY_HEADINGS, *density])
    note = textwrap.wrap(f"{NOTE} {_recipes(rows)}", MAX_COLUMNS)
    return "\n".join([*_ruled(lines), "", *note, "", *_ruled(below)])


def _recipes(rows: Sequence[dict[str, Any]]) -> str:
    """Return a sentence on the recipes of the runs."""
    recipes = {row["recipe"] for row in rows}
    if len(recipes) == 1:
        return f"Trained by recipe={recipes.pop()}."
    return "By recipe: " + ", ".join(f"{row['model']} {row['recipe']}" for row in rows) + "."


def run_text(plan: dict[str, Any]) -> str:
    """Return one run as text: its line of the table, then schedule, batch, compute, memory, network and disk space."""
    sections = [
        series_text([plan]),
        _section("Schedule", _schedule(plan)),
        _section(f"Batch on {plan['batch']['devices']} devices", _batch(plan)),
        _section("Compute", _compute(plan)),
        _section("Memory per GPU", _memory(plan)),
        _section("Host memory of a rank", _host_memory(plan)),
        _section("Network, received by each GPU", _network(plan)),
        _section("Disk", _disk(plan)),
    ]
    if plan["choices"]:
        sections.insert(1, _section("Choices", [("", words) for words in plan["choices"]]))
    if plan["branch"]:
        sections.insert(1, _section("Branch", _branch(plan["branch"])))
    if plan["twin"]:
        sections.insert(1, _section("Dense twin", _twin(plan["twin"])))
    return "\n\n".join(sections)


def align(rows: Sequence[tuple[str, ...]], gap: int = 2) -> list[str]:
    """Return lines with columns as wide as their widest cell, `gap` spaces apart; the first is left-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        (" " * gap)
        .join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        .rstrip()
        for row in rows
    ]


def _branch(branch: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("from", f"{branch['from']} at step {branch['step']:,}, density {half_up(branch['density'], 4)}"),
        ("own steps", f"{branch['steps']:,}, {count_text(branch['tokens'])} tokens"),
        ("FLOPs of these", f"{power_text(_round(branch['training_flops_dense']))} dense"),
        ("", "table, schedule and FLOPs below are those of the whole run"),
    ]


def _twin(twin: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("width", f"{twin['hidden_size']}, MLP {twin['intermediate_size']}"),
        ("N-bar to match", f"{twin['target_linear_params']:,.0f} linear parameters"),
        ("off by", f"{100 * twin['relative_error']:+.2f} % ({twin['linear_params']:,} linear parameters)"),
    ]


def _schedule(plan: dict[str, Any]) -> list[tuple[str, str]]:
    schedule = plan["schedule"]
    lines = [("steps", f"{schedule['steps']:,}")]
    if schedule["prune_start_step"] is None:
        is_sparse = plan["branch"] and plan["branch"]["density"] < 1
        lines.append(("pruning", f"none, {'pruned weights stay pruned' if is_sparse else 'the run stays dense'}"))
    else:
        start, end = 100 * schedule["compute_share_at_start"], 100 * schedule["compute_share_at_end"]
        lines += [
            ("prune window", f"step {schedule['prune_start_step']:,} to {schedule['prune_end_step']:,}"),
            ("", f"{start:.1f} % to {end:.1f} % of the compute"),
            ("prune events", _events(schedule)),
            ("", _method(schedule)),
            *(("", f"{' '.join(group['include'])} to {group['target']:g}") for group in schedule["groups"]),
        ]
    rate = schedule["learning_rate"]
    decay = "" if rate["decay_start_step"] is None else f", decay from step {rate['decay_start_step']:,}"
    lines.append(("learning rate", f"{rate['kind']}, warm-up to step {rate['warmup_steps']:,}{decay}"))
    lines.append(("compute", f"{plan['dense_equivalent_steps']:,.1f} dense-equivalent steps"))
    return lines


def _events(schedule: dict[str, Any]) -> str:
    if schedule["num_events"] == 1:
        return f"one, before step {schedule['prune_start_step']:,} ({schedule['kind']})"
    return f"{schedule['num_events']}, every {schedule['every_steps']} steps ({schedule['kind']})"


def _method(schedule: dict[str, Any]) -> str:
    thresholds = schedule["num_thresholds"]
    return (
        f"{schedule['pattern']}, by {schedule['score']}, {schedule['scope']}: "
        f"{'one threshold' if thresholds == 1 else f'{thresholds} thresholds'}"
        + (f", update {schedule['update']}" if schedule["update"] != "shrink" else "")
    )


def _batch(plan: dict[str, Any]) -> list[tuple[str, str]]:
    batch, fits = plan["batch"], plan["fits"]
    room = f"{bytes_text(fits['device_memory_bytes'])} less {100 * fits['memory_headroom']:g} %"
    if fits["micro_batch_size"] is None:
        largest = (
            f"none: one sequence peaks at {bytes_text(fits['peak_bytes'])} of {room};\n"
            "more devices or trainer.gradient_checkpointing=true need less"
        )
    else:
        largest = (
            f"micro-batch {fits['micro_batch_size']}, accumulation {fits['gradient_accumulation_steps']}, "
            f"{bytes_text(fits['peak_bytes'])} of {room}"
        )
    return [
        ("tokens per step", f"{batch['tokens_per_step']:,} = {batch['sequences']} x {batch['sequence_length']}"),
        ("as configured", f"micro-batch {batch['micro_batch_size']}, "
         f"accumulation {batch['gradient_accumulation_steps']}"),
        ("largest that fits", largest),
    ]  # fmt: skip


def _compute(plan: dict[str, Any]) -> list[tuple[str, str]]:
    compute = plan["compute"]
    of_own = f" for the {plan['branch']['steps']:,} steps after the branch" if plan["branch"] else ""
    return [
        ("training FLOPs", f"{power_text(_round(compute['training_flops_dense']))} dense"),
        ("", f"= {compute['formula']}"),
        ("", f"{power_text(_round(compute['training_flops_average']))} by average density"),
        ("time", f"{compute['days']:.3g} days{of_own}, {compute['seconds_per_step']:.3g} s a step"),
        ("", f"at mfu={compute['mfu']:g}, assumed, of {_peak(compute)}"),
        ("", "GPUs compute masked weights too, so the time follows the dense FLOPs"),
    ]  # fmt: skip


def _peak(compute: dict[str, Any]) -> str:
    of_device = f"the bf16 peak of device={compute['device']}, " if compute["device"] else ""
    return f"{of_device}{compute['peak_tflops']:g} TFLOP/s"


def _memory(plan: dict[str, Any]) -> list[tuple[str, str]]:
    memory = plan["memory"]
    labels = {
        "weights_bytes": "weights, float32",
        "gradients_bytes": "gradients, float32",
        "waiting_gradients_bytes": "whole gradients between micro-batches",
        "moments_bytes": f"moments of {memory['optimizer']}",
        "masks_bytes": "masks",
        "activations_bytes": "activations",
        "largest_transient_bytes": f"largest transient: {memory['peak_phase']}",
        "peak_bytes": "peak",
    }
    gathered = "freed after the forward" if memory["reshard_after_forward"] else "kept for the backward"
    return [(label, bytes_text(memory[key])) for key, label in labels.items()] + [("gathered weights", gathered)]


def _host_memory(plan: dict[str, Any]) -> list[tuple[str, str]]:
    memory = plan["host_memory"]
    on_cpus = f"{bytes_text(memory['start_bytes_on_cpus'])} without GPUs, its shard and a layer"
    return [
        ("weights drawn or read", f"{bytes_text(memory['layer_bytes'])}, one layer\n{on_cpus}"),
        ("export, rank 0 only", f"{bytes_text(memory['export_bytes_of_rank_0'])}, one file"),
    ]


def _network(plan: dict[str, Any]) -> list[tuple[str, str]]:
    network = plan["network"]
    lines = [("per step", bytes_text(network["bytes_per_step"]))]
    if plan["schedule"]["prune_start_step"] is not None:
        lines.append(("per prune event", bytes_text(network["bytes_per_prune_event"])))
    return lines


def _disk(plan: dict[str, Any]) -> list[tuple[str, str]]:
    disk = plan["disk"]
    return [
        ("a checkpoint", bytes_text(disk["checkpoint_bytes"])),
        ("exported model", f"{bytes_text(disk['export_bytes'])} ({disk['export_dtype']})"),
    ]


def _section(title: str, lines: Sequence[tuple[str, str]]) -> str:
    width = max(len(label) for label, _ in lines)
    indent = "\n" + " " * (width + 4)
    return "\n".join([title, *(f"  {label.ljust(width)}  {value.replace(NEWLINE, indent)}" for label, value in lines)])


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def _ruled(lines: list[str]) -> list[str]:
    return [*lines[:2], "-" * max(len(line) for line in lines), *lines[2:]]
