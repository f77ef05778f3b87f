"""Code that lets `python -m` find our packages before a user's files of the same names.

This file is run by its path, because our packages cannot be imported before it has run.
"""

import sys
from pathlib import Path

if (
    sys.argv[:1] == ["-m"]
    and not sys.flags.safe_path
    and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[2]
):
    # `python -m` puts the current folder first, which may hold a user's own train.py or conf/.
    sys.path.append(sys.path.pop(0))
