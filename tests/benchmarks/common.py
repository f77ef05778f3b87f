"""The parts that the benchmarks share: rows of runs/bench/*.json, the table, this machine, and this process's memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULTS = Path("runs/bench")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# One memory arena, in which every block of more than a few pages is mapped by itself, so that freed memory leaves the
# resident set. In the heap such a block would use other free pages each time, and all of these would stay resident.
EXACT_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "32768"}


def interpret_kernels(module: str) -> None:
    """Run this command again with Triton's interpreter and exit, if Triton is installed and does not interpret yet.

    Triton reads the variable when it is imported, and torch may have imported it already.

    Args:
        module: The name of the module that was started with `python -m`.
    """
    if find_spec("triton") and "TRITON_INTERPRET" not in os.environ:
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode)


@dataclass(frozen=True)
class Comparison:
    """One measurement and its baseline; `details` are further keys of the row."""

    name: str
    seconds: float
    baseline: str
    baseline_seconds: float
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.baseline_seconds / self.seconds

    def row(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "seconds": self.seconds,
            "baseline": self.baseline,
            "baseline_seconds": self.baseline_seconds,
            "ratio": self.ratio,
            **self.details,
        }


PACKAGES = ("torch", "numpy", "transformers", "accelerate", "triton")


def machine() -> dict[str, Any]:
    """Return the origin of the numbers: processor, cores, GPU, Python and packages."""
    import torch

    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {"machine": processor(), "cores": os.cpu_count(), **gpu, **versions}


def command() -> str:
    """Return this process's command as a user would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return shlex.join(["python", "-m", spec.name, *sys.argv[1:]] if spec else sys.argv)


def devices() -> list[str]:
    """Return the devices to measure on: the CPU, and a GPU if there is one."""
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def can_compile(device: str) -> bool:
    """Return whether torch.compile can be measured here; on a CPU it needs a C++ compiler."""
    return device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is not None


def write_rows(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Write the file of a benchmark: its rows, each with the command and the machine that made it."""
    where = {"command": command(), **machine()}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps([{**row, **where} for row in rows], indent=2) + "\n")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    if "model name" not in found:
        return platform.processor() or platform.machine()
    return f"{found['model name']} (family {found.get('cpu family')}, model {found.get('model')})"


def publish(comparisons: Sequence[Comparison], output: Path, columns: Sequence[str] = ()) -> None:
    """Write the rows, and print them as a table that shows the details named in `columns`."""
    write_rows([comparison.row() for comparison in comparisons], output)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        # rich may not be installed on a machine with a GPU; the file has everything.
        print(output.read_text())
        return

    table = Table("", "seconds", "baseline", "baseline seconds", "ratio", *columns)
    for found in comparisons:
        figures = [f"{found.seconds:.4g}", found.baseline, f"{found.baseline_seconds:.4g}", f"{found.ratio:.3g}"]
        table.add_row(found.name, *figures, *(_cell(found.details.get(column)) for column in columns))
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    # Wide enough for every column if the output is a file or a log.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(f"{output} ({where})", highlight=False)


def finish(missed: Sequence[str]) -> None:
    """Exit with code 1 and the sentences in `missed`, if there are any."""
    if missed:
        raise SystemExit(" ".join(missed))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def in_process(module: str, function: str, *arguments: object, **environment: str) -> Any:
    """Return `module.function(*arguments)`, computed in a new process with one thread; values are sent as JSON."""
    call = (
        f"import json; from importlib import import_module; body = import_module({module!r}).{function}; "
        f"print(json.dumps(body(*json.loads({json.dumps(arguments)!r}))))"
    )
    variables = {**os.environ, **ONE_THREAD, **environment}
    done = subprocess.run([sys.executable, "-c", call], env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def clock(body: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Return the seconds of a call, and its value."""
    synchronize(device)
    started = time.perf_counter()
    value = body()
    synchronize(device)
    return time.perf_counter() - started, value


def beside(laps: Sequence[float], around: Sequence[float]) -> list[float]:
    """Return each lap divided by the mean of the laps of `around` before and after it, as noise affects all three."""
    return [2 * lap / (before + after) for lap, before, after in zip(laps, around, around[1:], strict=False)]


def clock_alone(body: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Return the seconds of a call of one thread, and its value.

    On a CPU these are processor seconds, so that other work on the machine does not count.
    """
    if device != "cpu":
        return clock(body, device)
    started = time.process_time()
    value = body()
    return time.process_time() - started, value


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def mark(device: str) -> Any:
    """Record a point in the device's time; on a GPU the host does not wait for it."""
    if device != "cuda":
        return time.perf_counter()
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def laps_between(marks: Sequence[Any], device: str) -> list[float]:
    """Return the seconds from each mark to the next."""
    synchronize(device)
    if device == "cuda":
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]
    return [after - before for before, after in pairwise(marks)]


# --- memory of this process ---


def peak_beyond(body: Callable[[], Any], device: str = "cpu") -> int | None:
    """Return by how much the peak during a call exceeds the memory used before, or None if it cannot be measured."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        body()
        return torch.cuda.max_memory_allocated() - before
    # This comes first, because locked pages cannot be given back.
    give_back_free_memory()
    with held_pages():
        if not reset_peak():
            return None
        before = resident_bytes()
        body()
        return max(0, peak_resident_bytes() - before)


def resident_bytes() -> int:
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    if sys.platform == "linux":
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak() -> bool:
    """Reset the peak so far; return False if the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back_free_memory() -> None:
    """Collect reference cycles, and make glibc's malloc return its free memory to the system.

    A measurement that reuses free memory, or during which it is returned, would seem to take less.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def held_pages() -> Iterator[None]:
    """Lock this process's pages in memory, if Linux allows it.

    If the system took back pages of code during a measurement, as many pages of data would go unnoticed.
    """
    if sys.platform != "linux":
        yield
        return
    libc, current_as_they_come = ctypes.CDLL(None), 1 | 4
    libc.mlockall(current_as_they_come)
    try:
        yield
    finally:
        libc.munlockall()


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])
