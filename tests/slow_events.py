"""One process of a run, like `python -m train`, whose prune events take so long that a test can kill it during one.

Run it as `accelerate launch ... -m tests.slow_events` with EVENTS_FILE set. Rank 0 writes the number of each event to that
file when the event begins, and then decides masks and zeroes weights and moments slowly.
"""

import os
import runpy
import time
from pathlib import Path
from typing import Any

import sparsity.event.pool as event
import sparsity.masked as masked

PAUSE_S = 0.05


def announced(prune_smallest: Any) -> Any:
    """Wrap `prune_smallest_` in pauses, so that a kill finds masks that are not yet applied to the weights."""
    events = 0

    def prune(*args: Any, **kwargs: Any) -> Any:
        nonlocal events
        events += 1
        if os.environ.get("RANK", "0") == "0":
            Path(os.environ["EVENTS_FILE"]).write_text(str(events))
        time.sleep(PAUSE_S)
        threshold = prune_smallest(*args, **kwargs)
        time.sleep(PAUSE_S)
        return threshold

    return prune


def slowly(zero_pruned: Any) -> Any:
    def zero(*args: Any) -> None:
        zero_pruned(*args)
        time.sleep(PAUSE_S / 10)

    return zero


if __name__ == "__main__":
    event.prune_smallest_ = announced(event.prune_smallest_)
    masked.zero_all_pruned_ = slowly(masked.zero_all_pruned_)
    runpy.run_module("train", run_name="__main__", alter_sys=True)
