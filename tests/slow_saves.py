"""One process of a run, like `python -m train`, that writes each file of a checkpoint slowly.

Run it as `accelerate launch ... -m tests.slow_saves`. Half of a rank's file is on the disk for some seconds before the rest,
so that a kill or a signal finds a half-written checkpoint.
"""

import runpy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from train.checkpoints import write

PAUSE_S = 3.0


def slowly(write_tensors: Any) -> Any:
    def slow(path: Path, tensors: Mapping[str, Tensor]) -> str:
        path.write_bytes(b"half")
        time.sleep(PAUSE_S)
        return write_tensors(path, tensors)

    return slow


if __name__ == "__main__":
    write.write_tensors = slowly(write.write_tensors)
    runpy.run_module("train", run_name="__main__", alter_sys=True)
