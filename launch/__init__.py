"""From a config to processes on machines."""

import sys
from pathlib import Path

if (
    sys.argv[:1] == ["-m"]
    and not sys.flags.safe_path
    and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]
):
    # `python -m` looks in the current folder first: a user's own train.py or conf/ would be taken for ours.
    sys.path.append(sys.path.pop(0))
