"""Let `python -m` find our packages before a user's files of the same names. Run by path: nothing of ours is found yet."""

import sys
from pathlib import Path

if (
    sys.argv[:1] == ["-m"]
    and not sys.flags.safe_path
    and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[2]
):
    # `python -m` puts the current folder first, with a user's own train.py or conf/.
    sys.path.append(sys.path.pop(0))
