"""Do a short run of the 1B model through `python -m launch`, as a user would, and compare its figures with the plan's.

    python -m tests.gpu.large_run --work FOLDER [--dense] [--steps 30] [--batch 8] [--rehearse] [key=value ...]

The run is sparse by default: it has three prune events and exports the result. Further arguments are overrides of the run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from conf.schema.trainer import TrainerConfig
from tests.gpu.runner import FIGURES, ROOT

SKIPPED_STEPS = 5
"""The steps at the start of a run, while it compiles and warms up; they do not count in the median."""
EVENTS = (10, 15, 20)


def write_text(path: Path, num_bytes: int) -> None:
    """Write documents of pseudo-random words, with enough different words for a vocabulary of 32,000."""
    drawn = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(drawn.choices(letters, k=drawn.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / (rank + 5) for rank in range(len(words))]
    written = 0
    with open(path, "w") as file:
        while written < num_bytes:
            line = json.dumps({"text": " ".join(drawn.choices(words, weights, k=400))}) + "\n"
            written += file.write(line)


def overrides(work: Path, num_steps: int, batch: int, dense: bool, rehearse: bool) -> list[str]:
    """Return the run's command line after `python -m launch`."""
    found = [
        "trainer=gpu", "model=llama2_1b", "data=text", f"data.path={work}/text.jsonl", "data.heldout_share=0.1",
        f"data.cache_dir={work}/cache", f"runs_dir={work}/runs", f"run_name={run_name(dense)}", "logger=none", "overwrite=true",
        f"batch_size={batch}", f"trainer.per_device_train_batch_size={batch}", f"trainer.max_steps={num_steps}",
        "trainer.logging_steps=1", "trainer.save_strategy=no", "trainer.disable_tqdm=true",
    ]  # fmt: skip
    if dense:
        found += ["sparsity=dense"]
    else:
        first, second, last = EVENTS
        found += [
            "sparsity=geometric", "sparsity.target=0.8", "sparsity.window.of=steps", f"sparsity.window.start={first}",
            f"sparsity.window.end={last}", f"sparsity.window.every={second - first}",
        ]  # fmt: skip
    if rehearse:
        found += [
            "model=llama_micro", "model.max_position_embeddings=64", "model.vocab_size=300", "trainer.tf32=null",
            "trainer.bf16=false", "trainer.torch_compile_backend=aot_eager", "trainer.dataloader_num_workers=0",
            "launch.num_processes=1",
        ]  # fmt: skip
    return found


def run_name(dense: bool) -> str:
    return "dense" if dense else "sparse"


def figures(run_dir: Path, planned: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
    """Return the run's figures from its files: seconds per step, tokens per second, each event's step, and the plan."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "train/loss" in record]
    summary = json.loads((run_dir / "summary.json").read_text())
    # The rate counts only the time of training steps if the log has it, else all time between two records.
    rate = "perf/tokens_per_second" if "perf/tokens_per_second" in steps[-1] else "train/tokens_per_second"
    rates = values_of(steps, rate)
    settled = rates[SKIPPED_STEPS:] or rates
    mfu = values_of(steps, "perf/mfu")
    peak, memory = steps[-1].get("perf/peak_memory_gib"), (planned or {}).get("memory", {})
    return {
        "seconds": seconds,
        "tokens_per_second_median": statistics.median(settled) if settled else None,
        "step_seconds_median": summary["batch_tokens"] / statistics.median(settled) if settled else None,
        "tokens_per_second": rates,
        "mfu_median": statistics.median(mfu[SKIPPED_STEPS:] or mfu) if mfu else None,
        "peak_bytes": None if peak is None else peak * 2**30,
        "planned_peak_bytes": memory.get("peak_bytes"),
        "losses": [record["train/loss"] for record in steps],
        "densities": [record.get("sparsity/density") for record in steps],
        "last_record": steps[-1],
        "summary": summary,
        "plan": planned,
        "model_bytes": sum(file.stat().st_size for file in (run_dir / "model").glob("*.safetensors")),
    }


def values_of(records: list[dict[str, Any]], key: str) -> list[float]:
    return [record[key] for record in records if key in record]


def top_kernels(trace: dict[str, Any], rows: int = 25) -> list[dict[str, Any]]:
    """Return the kernels that take the most time of a profiler's trace, in microseconds."""
    found: dict[str, list[float]] = {}
    for event in trace["traceEvents"]:
        if event.get("cat") == "kernel":
            found.setdefault(event["name"], []).append(event["dur"])
    total = sum(map(sum, found.values())) or 1.0
    ordered = sorted(found.items(), key=lambda pair: -sum(pair[1]))
    return [
        {"name": name[:160], "microseconds": sum(taken), "calls": len(taken), "share": sum(taken) / total}
        for name, taken in ordered[:rows]
    ]


def read_trace(run_dir: Path) -> dict[str, Any] | None:
    """Return the trace that `trainer.profile_steps` left in the run's folder, or None."""
    for path in sorted(run_dir.rglob("*trace*.json*")):
        content = path.read_bytes()
        return json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    return None


def plan(arguments: list[str], environment: dict[str, str]) -> dict[str, Any] | None:
    command = [sys.executable, "-m", "launch.plan", *arguments, "devices=1", "format=json", "figure=null"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"launch.plan failed: {done.stderr.strip()[-500:]}", flush=True)
        return None
    return json.loads(done.stdout)


def problems(found: dict[str, Any], num_steps: int, dense: bool) -> list[str]:
    """Return a sentence for each check that the run does not pass."""
    summary, losses = found["summary"], found["losses"]
    wrong = []
    if summary["steps"] != num_steps or len(losses) != num_steps:
        wrong.append(f"{summary['steps']} steps and {len(losses)} losses instead of {num_steps}")
    if not all(loss == loss and loss < 20 for loss in losses):
        wrong.append(f"a loss that is no number: {losses}")
    sparsity = 0.0 if dense else 0.8
    if abs(summary["sparsity"] - sparsity) > 1e-6:
        wrong.append(f"a sparsity of {summary['sparsity']} instead of {sparsity}")
    if sum(round(loss * 256) == loss * 256 for loss in losses) > len(losses) / 2:
        wrong.append(f"losses that are rounded to bfloat16: {losses}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="profile steps 20 and 21, where the trainer can")
    parser.add_argument("--rehearse", action="store_true")
    options, more = parser.parse_known_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    write_text(work / "text.jsonl", 300_000 if options.rehearse else 8_000_000)
    arguments = [*overrides(work, options.steps, options.batch, options.dense, options.rehearse), *more]
    if options.profile and "profile_steps" in TrainerConfig.__dataclass_fields__:
        first = min(20, options.steps - 2)
        arguments += [f"trainer.profile_steps=[{first},{first + 1}]"]
    environment = dict(os.environ)
    planned = plan([word for word in arguments if not word.startswith("overwrite")], environment)
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "launch", *arguments], cwd=ROOT, env=environment, check=False)
    if done.returncode:
        sys.exit(f"the run ended with {done.returncode}")
    run_dir = work / "runs" / run_name(options.dense)
    found = figures(run_dir, planned, time.monotonic() - started)
    if options.profile and (trace := read_trace(run_dir)) is not None:
        found["profile"] = top_kernels(trace)
    if FIGURES in os.environ:
        Path(os.environ[FIGURES]).write_text(json.dumps(found))
    wrong = problems(found, options.steps, options.dense)
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    if wrong:
        sys.exit("the run has " + "; ".join(wrong))
    words = (
        f"{found['tokens_per_second_median']:,.0f} tokens/s, {found['step_seconds_median']:.3f} s a step, loss "
        f"{found['losses'][0]:.3f} to {found['losses'][-1]:.3f}, {found['summary']['sparsity']:.0%} sparse"
    )
    if found["mfu_median"]:
        words += f", MFU {found['mfu_median']:.1%}"
    if found["peak_bytes"] and found["planned_peak_bytes"]:
        words += f", peak {found['peak_bytes'] / 2**30:.1f} GiB"
        words += f" (plan {found['planned_peak_bytes'] / 2**30:.1f})"
    print(words)


if __name__ == "__main__":
    main()
