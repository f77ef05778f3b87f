"""Sweep results: a table and a figure of the finished jobs, and the commands that resume the others."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.run import exit_code
from launch.sweep import Job, Sweep, key_of
from train.plan.run import run_directory
from train.record.directory import RunDirectory
from train.record.read import SUMMARY, is_number, read_summary
from train.record.table import markdown

FIGURE, METHODS_FIGURE = "sweep.png", "methods.png"


def close_sweep(sweep: Sweep, codes: Mapping[str, int | None]) -> list[Job]:
    """Print a table and draw a figure of the finished jobs, and print the commands that resume the others.

    Args:
        sweep: The sweep.
        codes: The exit codes, by name, of the jobs that this command was to run; None for a job that did not start. With
            overwrite=true such a job may still have the summary of an older run, which does not count.

    Returns:
        The jobs that are not finished.
    """
    done = {job.name: summary_of(job) for job in sweep.jobs if codes.get(job.name, 0) == 0}
    summaries = [summary for summary in done.values() if summary is not None]
    failed = [job for job in sweep.jobs if done.get(job.name) is None]
    if summaries:
        print("\n" + markdown(summaries), flush=True)
        if sweep.name is not None:
            from eval.runs.sweep import draw_sweep

            draw_sweep(summaries, sweep.folder / FIGURE, sweep.name)
            print(f"\nfigure   {sweep.folder / FIGURE}", flush=True)
            folders = {run_directory(job.config): done.get(job.name) for job in sweep.jobs}
            finished = {folder: summary for folder, summary in folders.items() if summary is not None}
            compare_methods(finished, sweep.folder / METHODS_FIGURE)
    if failed and sweep.name is None:
        print(
            f"error: {failed[0].name} did not finish; its output is in {sweep.folder / '.submitit'}.", file=sys.stderr
        )
    elif failed:
        print(failure_words(sweep, failed, codes), file=sys.stderr, flush=True)
    return failed


def compare_methods(summaries: Mapping[Path, Mapping[str, Any]], figure: Path) -> None:
    """Print and draw finished runs by method, if there are several, one of them with several seeds."""
    from eval.runs.methods.comparison import entries_of, has_seeds
    from eval.runs.methods.figure import draw_methods
    from eval.runs.methods.text import markdown as methods_markdown
    from eval.runs.trials import read_trials

    try:
        entries = entries_of(
            read_trials([str(folder) for folder, one in summaries.items() if is_number(one.get("heldout_loss"))])
        )
    except ValueError:
        return  # Their losses do not compare.
    if has_seeds(entries):
        draw_methods(entries, figure)
        print(f"\n{methods_markdown(entries)}\n\nfigure   {figure}", flush=True)


def close_search(folder: Path) -> int:
    """Print and draw the finished runs of a search, lowest held-out loss first; return the exit code of the search."""
    found = [read_summary(path) for path in folder.glob(f"*/{SUMMARY}")]
    if not found:
        print(f"error: no trial of {folder} finished; see their output above.", file=sys.stderr, flush=True)
        return 1
    from eval.runs.sweep import draw_sweep

    found.sort(key=_loss)
    draw_sweep(found, folder / FIGURE, folder.name)
    print("\n" + markdown(found) + "\n")
    if math.isinf(_loss(found[0])):
        print(f"error: no trial of {folder} has a finite held-out loss.", file=sys.stderr, flush=True)
        return 1
    print(f"best     {found[0]['run_name']}: held-out loss {found[0]['heldout_loss']:.4f}")
    print(f"figure   {folder / FIGURE}", flush=True)
    return 0


def _loss(summary: Mapping[str, Any]) -> float:
    """Return the held-out loss of a run; infinity if the run diverged and has none."""
    loss = summary.get("heldout_loss")
    return loss if is_number(loss) else math.inf


def summary_of(job: Job) -> dict[str, Any] | None:
    """Return the summary of a job's run, or None if the run has not finished."""
    path = RunDirectory(run_directory(job.config)).summary
    return read_summary(path) if path.exists() else None


def failure_words(sweep: Sweep, failed: list[Job], codes: Mapping[str, int | None]) -> str:
    """Return a line about the sweep, and two for each unfinished job: its state and the command that resumes it.

    Args:
        sweep: The sweep.
        failed: The jobs that are not finished.
        codes: The exit codes of jobs, as in `close_sweep`.
    """
    same = "" if failed[0].config.overwrite else "rerun the same command to run only these, or "
    lines = [
        f"error: {len(failed)} of the sweep's {len(sweep.jobs)} jobs did not finish; {same}use a job's own command:"
    ]
    for job in failed:
        code = codes.get(job.name)
        is_begun = code is not None or job.name not in codes
        ending = f"exit code {exit_code(code)}" if code else "not finished" if is_begun else "not begun"
        lines.append(f"  {job.name} ({ending})\n    {again(job) if is_begun else job.command}")
    return "\n".join(lines)


def again(job: Job) -> str:
    """Return the command that resumes a job."""
    return shlex.join(["python", "-m", "launch", *(item for item in job.overrides if key_of(item) != "overwrite")])
