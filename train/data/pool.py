"""Applying a function to many items on all cores, with progress on stderr."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")

SECONDS_BETWEEN_LINES = 30.0


def num_cores() -> int:
    """Return the number of cores that this process may use; a scheduler may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    label: str,
    num_workers: int | None = None,
    sizes: Sequence[int] | None = None,
) -> list[Result]:
    """Return `[function(item) for item in items]`, in that order, computed by up to `num_workers` spawned processes.

    Args:
        function: A function at the top level of a module, so that it can be pickled.
        items: The arguments of the calls; they and the results must be picklable.
        label: The name of the stage in progress and errors.
        num_workers: The number of processes; None for all cores.
        sizes: The bytes of each item, for the progress bar.

    Raises:
        ValueError: A worker raised it, or was killed. The other workers are stopped.
    """
    sizes = sizes if sizes is not None else [1] * len(items)
    num_workers = min(num_workers or num_cores(), len(items))
    with Progress(label, sum(sizes)) as progress:
        if num_workers <= 1:
            results = []
            for item, size in zip(items, sizes, strict=True):
                results.append(function(item))
                progress.add(size)
            return results
        return _in_processes(function, items, sizes, num_workers, progress)


def _in_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    sizes: Sequence[int],
    num_workers: int,
    progress: Progress,
) -> list[Result]:
    others = set(multiprocessing.active_children())
    # Spawned, not forked: the parent may have threads and a CUDA context.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_end_with_parent)
    try:
        futures = {executor.submit(function, item): index for index, item in enumerate(items)}
        results: dict[int, Result] = {}
        for future in as_completed(futures):
            index = futures[future]
            results[index] = future.result()
            progress.add(sizes[index])
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        executor.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise ValueError(
                f"{progress.label}: a worker process was killed, most often because memory ran out: lower "
                f"data.num_workers={num_workers}."
            ) from None
        if isinstance(error, ValueError):
            raise ValueError(str(error)) from None
        raise
    executor.shutdown()
    return [results[index] for index in range(len(items))]


def _end_with_parent() -> None:
    """End this worker if its parent is killed; otherwise it would wait for work forever."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Progress:
    """Progress on stderr: a bar on a terminal, elsewhere a line every half minute and one at the end of a stage."""

    def __init__(self, label: str, total: int) -> None:
        self.label = label
        self.total = total
        self.done = 0
        self.started = self.last_line = time.monotonic()
        self.is_terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        scale = {"unit": "B", "unit_scale": True} if self.total > 1_000_000 else {"unit": ""}
        self.bar = tqdm(desc=self.label, total=self.total, disable=not self.is_terminal, file=sys.stderr, **scale)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.bar.close()
        if not self.is_terminal and kind is None:
            self._line(f"{time.monotonic() - self.started:.1f} s")

    def add(self, size: int) -> None:
        """Show that `size` more of `total` is done."""
        self.done += size
        self.bar.update(size)
        if not self.is_terminal and time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self._line(f"{100 * self.done / self.total:.0f} %" if self.total else f"{self.done:,}")

    def _line(self, text: str) -> None:
        self.last_line = time.monotonic()
        print(f"{self.label}: {text}", file=sys.stderr, flush=True)
