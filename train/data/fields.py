"""The field of a record that holds a document's text, in JSON lines, CSV and parquet."""

from __future__ import annotations

from collections.abc import Collection
from datetime import date, datetime, time, timedelta
from itertools import islice
from numbers import Number
from typing import Any

MOST_FIELDS_NAMED = 8
MISSING = object()
"""The mark of a missing value, because None can be a value."""


def field_of(record: Any, text_field: str) -> Any:
    """Return the value of a field, or of a path of fields such as meta.text; MISSING if there is none."""
    if isinstance(record, dict) and text_field in record:
        return record[text_field]
    for name in text_field.split("."):
        if not isinstance(record, dict) or name not in record:
            return MISSING
        record = record[name]
    return record


def field_names(names: Collection[str]) -> str:
    """Return the first field names of a record or table, formatted for a sentence."""
    shown = [_short(name) for name in islice(names, MOST_FIELDS_NAMED)]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f"{', '.join(shown)}{more}" if names else "none"


def _short(name: str) -> str:
    """Make a name from a user's file printable and short enough for a sentence."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in name)
    return printable if len(printable) <= 40 else f"{printable[:40]}..."


def checked_text(value: Any, text_field: str) -> str:
    """Return a value of the text field as text.

    Some programs store text in parquet files as plain bytes; these are decoded.

    Raises:
        ValueError: The value is not text. The caller puts the document's place before the message.
    """
    if isinstance(value, bytes):
        value = value.decode()
    if not isinstance(value, str):
        raise ValueError(f"has {named(value)} as {text_field}: give a string in data.text_field={text_field}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"has half a surrogate pair in {text_field}, which UTF-8 cannot encode: fix it.") from None
    return value


def named(value: Any) -> str:
    """Return the kind of a JSON or parquet value, with its article."""
    if isinstance(value, bool):
        return "true or false"
    kinds: dict[type, str] = {
        type(None): "null", Number: "a number", str: "a string", list: "a list", dict: "an object", datetime: "a time",
        date: "a date", time: "a time of day", timedelta: "a span of time", tuple: "a list",
    }  # fmt: skip
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), f"{type(value).__name__} data")
