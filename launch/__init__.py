"""The launcher, which turns a config into processes on one or more machines."""

from pathlib import Path

# Run by its path: until it has run, an import may find a user's file of the same name.
_FIRST = Path(__file__).resolve().parents[1] / "sparsity" / "common" / "own_first.py"
exec(compile(_FIRST.read_bytes(), _FIRST, "exec"), {"__file__": str(_FIRST)})
