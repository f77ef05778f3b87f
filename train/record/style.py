"""The style of this project's figures: colours, light axes, counts with units on the ticks."""

from __future__ import annotations

from typing import Any

from sparsity.common.text import count_text

BLUE, ORANGE, GREY = "#1f5fa8", "#d1690e", "#666666"


def pyplot() -> Any:
    """Return matplotlib.pyplot, set to draw to files only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def lighten(axes: Any) -> None:
    """Draw a faint grid, and remove the frame on the sides without an axis."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def count_ticks(axis: Any, digits: int = 1) -> None:
    """Write ticks as counts with a unit: 2.5K, 1.0M."""
    axis.set_major_formatter(lambda value, _: count_text(value, digits) if value else "0")
