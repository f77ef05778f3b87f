"""One run: from a config to figures and a final model."""

from pathlib import Path

# Run by its path: before it has run, an import may find a user's file.
_FIRST = Path(__file__).resolve().parents[1] / "sparsity" / "common" / "own_first.py"
exec(compile(_FIRST.read_bytes(), _FIRST, "exec"), {"__file__": str(_FIRST)})
