"""Measure tokens per second and MFU of training on one device, by setting: attention, loss, precision, batch.

    python -m tests.benchmarks.throughput [--profile]                   -> runs/bench/throughput.json
    python -m tests.benchmarks.throughput --together --seconds 200      the most important variants first, in one process
    python -m tests.benchmarks.throughput --hidden 128 --layers 2 --heads 4 --vocabulary 512 --length 64 --batch 2 --steps 3

By default it trains the 1B model of the series on a GPU; on a CPU give a small model, as in the last line. It uses random
tokens, no network, and nothing but torch and transformers. Every variant trains from the same seed, in a separate process
or, with `--together`, one after the other in this process, which frees memory in between. The host waits for the device only
after the last step. A variant that this machine cannot run is recorded with the reason. MFU counts, per token, 6 FLOPs for a
linear weight and 12 x layers x hidden x length, as a share of --peak TFLOP/s.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks import foreign_steps, own_steps, titan
from tests.benchmarks.common import in_process, laps_between, mark, write_rows
from tests.benchmarks.throughput_profile import profiled
from tests.benchmarks.throughput_variants import AS_RUNS, BEST, TELLING, VARIANTS, Variant, Workload

MODULE = "tests.benchmarks.throughput"
OUTPUT = Path("runs/bench/throughput.json")
PEAK_TFLOPS = 989.5
"""The peak TFLOP/s of an H100 SXM and an H200 in dense bf16."""
WARM_UP = 3


@dataclass
class Result:
    name: str
    seconds: float = 0.0
    """The median seconds of an update."""
    tokens_per_second: float = 0.0
    mfu: float | None = None
    peak_bytes: int | None = None
    predicted_bytes: int | None = None
    """The peak that `launch.plan` states for such a run; only under FSDP2."""
    last_loss: float | None = None
    skipped: str | None = None
    """The reason why the variant did not run, or None."""
    settings: dict[str, Any] = field(default_factory=dict)
    profile: list[dict[str, Any]] = field(default_factory=list)
    dense_seconds: float | None = None
    """In a sparse variant, the seconds of an update without masks, measured before and after the masked ones."""
    after_update_seconds: float | None = None
    """In a sparse variant, the seconds of the masking after each update."""
    wall_seconds: float = 0.0
    """All seconds, including those to build and compile."""


def measured(work: dict[str, int], name: str, device: str, peak_tflops: float, profile: bool) -> dict[str, Any]:
    """Measure one variant in this process, alone on the device, and return plain data."""
    (variant,) = (variant for variant in VARIANTS if variant.name == name)
    variant = replace(variant, attention="sdpa") if variant.attention == BEST else variant
    return asdict(measure(Workload(**work), variant, device, peak_tflops, profile))


def measure(
    work: Workload, variant: Variant, device: str, peak_tflops: float, profile: bool = False, trace: Path | None = None
) -> Result:
    """Train one variant, and return its result; a failure is a result with the reason."""
    torch.set_float32_matmul_precision("high")
    settings = asdict(variant) if variant.trained_by == "loop" else {"trained_by": variant.trained_by}
    result, work = Result(variant.name, settings=settings), replace(work, batch=work.batch * variant.batch_factor)
    started = time.monotonic()
    try:
        train(result, work, variant, device, profile, trace)
    except Exception as error:
        # If a variant's library or kernel is missing, the others must still be measured.
        words = " ".join(str(error).split())[:400]
        result.skipped = f"{type(error).__name__}: {words}"
    else:
        tokens = work.batch * work.length * variant.accumulation
        result.tokens_per_second = tokens / result.seconds
        if device == "cuda":
            result.mfu = result.tokens_per_second * work.flops_per_token() / (peak_tflops * 1e12)
    result.wall_seconds = time.monotonic() - started
    return result


def train(result: Result, work: Workload, variant: Variant, device: str, profile: bool, trace: Path | None) -> None:
    if variant.trained_by == "Trainer":
        seconds, result.last_loss = foreign_steps.run_trainer(work, device, variant, WARM_UP)
        result.seconds = statistics.median(seconds)
        result.peak_bytes = torch.cuda.max_memory_allocated() if device == "cuda" else None
        return
    with contextlib.ExitStack() as settings:
        if variant.inductor:
            import torch._inductor.config as inductor

            settings.enter_context(inductor.patch(dict(variant.inductor)))
        if variant.trained_by == "torchtitan":
            step = titan.make_step(work, device)
        else:
            # Masks are installed later: steps without them are measured first.
            training = own_steps.Training(work, replace(variant, sparse=False), device)
            step = training.step
        seconds, result.last_loss = run_steps(step, work, device)
        if variant.sparse:
            measure_sparse(result, training, seconds, work, device)
        else:
            result.seconds = statistics.median(seconds)
        result.peak_bytes = torch.cuda.max_memory_allocated() if device == "cuda" else None
        if variant.trained_by == "loop" and variant.precision == "fsdp2":
            result.predicted_bytes = own_steps.predicted_bytes(work, variant, device)
        if profile or trace is not None:
            result.profile = profiled(step, work, device, trace)


def measure_sparse(result: Result, training: Any, dense: list[float], work: Workload, device: str) -> None:
    """Prune, train with masks, then without them again, so that dense steps come before and after the sparse ones."""
    training.prune()
    sparse, result.last_loss = run_steps(training.step, work, device)
    result.after_update_seconds = statistics.median(run_steps(lambda _: training.after_update(), work, device)[0])
    training.unmask()
    again, _ = run_steps(training.step, work, device)
    result.seconds = statistics.median(sparse)
    result.dense_seconds = (statistics.median(dense) + statistics.median(again)) / 2


def make_step(work: Workload, variant: Variant, device: str) -> Callable[[Tensor], Tensor]:
    """Return a function that trains on tokens [batch, length] and returns the loss on the device."""
    training = own_steps.Training(work, variant, device)
    return training.step


def run_steps(step: Callable[[Tensor], Any], work: Workload, device: str) -> tuple[list[float], float]:
    """Return the seconds of each step after the warm-up, and the last loss; the host waits only after the last step."""
    batches, marks = work.batches(device), []
    loss: Any = None
    for index in range(WARM_UP + work.steps):
        if index == WARM_UP:
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            marks.append(mark(device))
        loss = step(batches[index % len(batches)])
        if index >= WARM_UP:
            marks.append(mark(device))
    return laps_between(marks, device), float("nan") if loss is None else float(loss)


class TimeIsUp(BaseException):
    """The end of the time. It is not an Exception, so that no code in between handles it as an error."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in this thread after `seconds`, unless the context ends first."""

    def raise_it(*_: Any) -> None:
        raise TimeIsUp(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, raise_it)
    # The signal is repeated, because it is lost if it comes while the interpreter cleans up.
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure_together(
    work: Workload, variants: list[Variant], device: str, peak_tflops: float, seconds: float, trace: Path | None,
    most_seconds: float = 90.0,
) -> Iterator[Result]:  # fmt: skip
    """Measure the variants one after the other in this process while there is time, then profile the fastest.

    The attention `best` is that of the fastest bf16 variant so far. If a variant runs out of memory, later ones with as
    large a batch are left out.
    """
    import torch._functorch.config as functorch

    # The cache's key does not include the allowed attention kernels, so the second variant would get the first one's graph.
    functorch.enable_autograd_cache = False
    deadline, found = time.monotonic() + seconds, dict[str, tuple[float, Variant]]()
    reserve = 25.0 if trace is not None else 0.0
    largest = max((variant.batch_factor for variant in variants), default=1)
    for variant in variants:
        left = deadline - time.monotonic() - reserve
        if left < 5:
            yield Result(variant.name, skipped="out of time")
            continue
        fastest = max(found.values(), key=lambda pair: pair[0], default=(0.0, AS_RUNS))[1]
        chosen = replace(variant, attention=fastest.attention) if variant.attention == BEST else variant
        chosen = replace(chosen, batch_factor=min(chosen.batch_factor, largest))
        try:
            with at_most(min(most_seconds, left)):
                result = measure(work, chosen, device, peak_tflops)
        except TimeIsUp as error:
            result = Result(variant.name, skipped=str(error))
        free_memory(device)
        if (result.skipped or "").startswith("OutOfMemoryError"):
            largest = max(1, chosen.batch_factor // 2)
        is_plain = chosen.trained_by == "loop" and chosen.attention != "document" and not (chosen.fp8 or chosen.sparse)
        if result.skipped is None and is_plain:
            found[variant.name] = (result.tokens_per_second, chosen)
        yield result
    if trace is not None and found:
        fastest = max(found.values(), key=lambda pair: pair[0])[1]
        again = replace(fastest, name=f"profile of: {fastest.name}")
        try:
            with at_most(max(1.0, deadline - time.monotonic())):
                result = measure(replace(work, steps=3), again, device, peak_tflops, trace=trace)
        except TimeIsUp as error:
            result = Result(again.name, skipped=str(error))
        yield result


def free_memory(device: str) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_apart(
    work: Workload, variants: list[Variant], device: str, peak_tflops: float, profile: bool
) -> Iterator[Result]:
    """Measure each variant in a separate process, so that the memory of one does not affect another."""
    for variant in variants:
        try:
            yield Result(**in_process(MODULE, "measured", asdict(work), variant.name, device, peak_tflops, profile))
        except subprocess.CalledProcessError as error:
            yield Result(variant.name, skipped=f"its process ended with {error.returncode}")


def line(result: Result) -> str:
    """Return a result as a line of text."""
    if result.skipped:
        return f"{result.name:<48} skipped: {result.skipped[:160]}"
    words = f"{result.name:<48} {result.tokens_per_second:10,.0f} tokens/s"
    if result.mfu is not None:
        words += f"  MFU {result.mfu:.1%}"
    if result.peak_bytes is not None:
        words += f"  {result.peak_bytes / 2**30:.1f} GiB"
    if result.predicted_bytes is not None:
        words += f" (plan {result.predicted_bytes / 2**30:.1f})"
    if result.dense_seconds:
        words += f"  {result.seconds / result.dense_seconds:.4f} of dense"
    return words + f"  loss {result.last_loss:.4f}  in {result.wall_seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Workload()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peak", type=float, default=PEAK_TFLOPS, help="TFLOP/s of the device, for MFU")
    parser.add_argument("--profile", action="store_true", help="write where each variant's time goes")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument(
        "--together", action="store_true", help="the telling variants in one process, as --seconds allow"
    )
    parser.add_argument("--seconds", type=float, default=200.0, help="for all variants of --together")
    parser.add_argument("--trace", type=Path, help="with --together: file.json.gz for a trace of the fastest variant")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    work = Workload(**{name: getattr(options, name) for name in asdict(Workload())})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and work == Workload():
        sys.exit("error: the 1B model needs a GPU: on a CPU give a small one, see --help.")
    offered = TELLING if options.together else VARIANTS
    chosen = [replace(variant, backend=options.backend) for variant in offered if options.only in variant.name]
    if options.together:
        results = measure_together(work, chosen, device, options.peak, options.seconds, options.trace)
    else:
        results = measure_apart(work, chosen, device, options.peak, options.profile)
    rows = []
    for result in results:
        rows.append({**asdict(work), **asdict(result)})
        print(line(result), flush=True)
        write_rows(rows, options.output)
    print(options.output)


if __name__ == "__main__":
    main()
