"""Numbers and tables as text: rounded half up, as in the model cards of the published series, and with units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal


def half_up(value: float | Decimal, digits: int) -> str:
    """Return `value` rounded to `digits` decimals, halves away from zero: 2.675 gives 2.68.

    A float is rounded as the decimal number that Python prints; 1e15 and more are written with an exponent.
    """
    number = value if isinstance(value, Decimal) else Decimal(repr(float(value)))
    if not number.is_finite():
        return str(float(value))
    if abs(number) >= Decimal(10) ** 15:
        return f"{number:.{digits}e}"
    return str(number.quantize(Decimal(1).scaleb(-digits), rounding=ROUND_HALF_UP))


def finite_text(value: float, digits: int) -> str:
    """Return the text of `half_up`, or "not finite"."""
    return half_up(value, digits) if math.isfinite(value) else "not finite"


def count_text(count: float, digits: int = 2, *, trim: bool = False) -> str:
    """Return a number of parameters or tokens with a unit: 1.20B, 0.23B, 57.94M, 12.3K; `trim` drops a zero fraction: 8M."""
    for unit, size, least in (("T", 1e12, 1e12), ("B", 1e9, 1e8), ("M", 1e6, 1e6), ("K", 1e3, 1e3)):
        if count >= least:
            text = half_up(count / size, digits)
            return (text.rstrip("0").rstrip(".") if trim and digits else text) + unit
    return str(round(count))


def percent_text(share: float) -> str:
    """Return a share as a percentage: 0.8 as 80.00%."""
    return half_up(100 * Decimal(repr(float(share))), 2) + "%"


def power_text(value: float) -> str:
    """Return a number with its power of ten, as model cards write learning rates: 0.0003 as 3e-4."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{Decimal(mantissa).normalize():f}e{int(exponent)}"


def bytes_text(num_bytes: float) -> str:
    """Return a size in decimal units, as device memory is sold: 4,819,525,632 as 4.82 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{half_up(num_bytes / scale, 2)} {unit}"
    return f"{num_bytes:.0f} B"


def markdown_list(lines: Mapping[str, str]) -> str:
    """Return a Markdown list with an item `**name:** text` for each line."""
    return "\n".join(f"- **{name}:** {text}" for name, text in lines.items())


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are also aligned in a terminal."""
    table = [headings, *rows]
    widths = [max(len(line[column]) for line in table) for column in range(len(headings))]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in table]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
