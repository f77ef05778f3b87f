"""Values of a command line, read as they were typed.

Hydra's grammar rejects `~/corpus`, `a=b/` or `it's`, and reads `1e3` or `true` as something other than text. Here a key
whose type is text takes its value as typed: the value is quoted if Hydra would read it differently.

- Text that the user quoted ('...' or "...") is passed to Hydra unchanged, and so is null, which means no value.
- `${key}` refers to another key, as everywhere in Hydra; braces that Hydra cannot read are text.
- In a sweep (-m), commas outside quotes separate the values, so a value with a comma must be quoted:
  "title='one, two'". Hydra's functions (choice, interval, ...) work there.
- The keys of a dictionary may be quoted and may be new: "factors={'*q_proj*': 0.5}" adds to the others.
- A ~ at the start of a path is expanded, as the shell does at the start of a word.
"""

from __future__ import annotations

import os
import re
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

TEXT = (str, str | None)
TEXT_LISTS = (list[str], list[str] | None)
NAME_LISTS = ("runs",)
"""Keys that take one name or a list of names; their type in the schema is Any."""
PATHS = (
    "data.path", "data.cache_dir", "runs_dir", "init_from", "tokenizer", "launch.config_file", "folder", "out",
    "model.path", "branch_from", "task_path", "runs", "figure", "page",
)  # fmt: skip
"""Keys whose value may start with ~."""
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
QUOTED_NAMES = re.compile(QUOTED.pattern + r"(?=\s*:)", re.DOTALL)
SWEPT = re.compile(r"(?:choice|range|interval|glob|tag|sort|shuffle)\(.*\)", re.DOTALL)


def as_typed(argument: str, *schemas: Any, is_sweep: bool = False) -> str:
    """Return `key=value` so that Hydra reads the value as the text that was typed.

    Args:
        argument: One argument of the command line; flags and keys that are not text are returned unchanged.
        schemas: The config classes whose keys the command accepts.
        is_sweep: Whether commas outside quotes separate the values of a sweep.
    """
    key, equals, value = argument.partition("=")
    name = key.lstrip("+")
    kind = next((found for schema in schemas if (found := kind_of(name, schema)) is not None), None)
    if not equals or not value.strip() or argument.startswith("-"):
        return argument
    if kind in TEXT:
        if is_sweep and SWEPT.fullmatch(value.strip()):
            return argument
        pieces = [piece.strip() for piece in split_at_commas(value)] if is_sweep else [value]
        return f"{key}={','.join(text_value(name, piece) for piece in pieces)}"
    if getattr(kind, "__origin__", None) is dict:
        # Hydra's grammar does not allow quotes around the keys of a dictionary, or new keys without +.
        plus = "" if key.startswith(("+", "~")) else "+"
        return f"{plus}{key}={QUOTED_NAMES.sub(lambda found: found[0][1:-1], value)}"
    if kind in TEXT_LISTS or name in NAME_LISTS:
        return f"{key}={list_value(name, value, is_sweep)}"
    return argument


def override_of(key: str, text: str) -> str:
    """Return the override that sets `key` to `text`, which may contain any characters."""
    value = text_value(key, text)
    return f"{key}={_quoted(value) if value == 'null' else value}"


def as_swept(override: str, *schemas: Any) -> str:
    """Return one job's override, as Hydra's sweeper wrote it, in the form of `as_typed`.

    The sweeper puts a backslash before spaces and punctuation, which `as_typed` would take for typed ones.

    Args:
        override: `key=value` in Hydra's grammar.
        schemas: The config classes whose keys the command accepts.
    """
    key, _, value = override.partition("=")
    kinds = [kind_of(key.lstrip("+"), schema) for schema in schemas]
    if "\\" not in value or QUOTED.fullmatch(value) or not any(kind in TEXT for kind in kinds):
        return override
    return override_of(key, text_of(value))


def text_of(value: str) -> str:
    """Return a value of the command line as text, without its quotes if it has any."""
    return str(OverridesParser.create().parse_override(f"text={value}").value())


def kind_of(name: str, schema: Any) -> Any:
    """Return the type of a dotted key: Any inside an open dict, None if the schema has no such key."""
    kind = schema
    for part in name.split("."):
        if kind is Any or getattr(kind, "__origin__", None) is dict:
            return Any
        kind = get_type_hints(kind).get(part) if hasattr(kind, "__dataclass_fields__") else None
        if kind is None:
            return None
    return kind


def text_value(name: str, value: str) -> str:
    """Return one value of a text key, quoted if Hydra would read something else."""
    if QUOTED.fullmatch(value) or value == "null":
        return value
    if name in PATHS and value.startswith("~"):
        value = os.path.expanduser(value)
    try:
        read = OverridesParser.create().parse_override(f"text={value}")
        is_read = not read.is_sweep_override() and read.value() == value
    except HydraException:
        is_read = False
    if not is_read:
        return _quoted(value.replace("${", r"\${"))
    # Hydra rewrites a sweep's values and would put a backslash before each space; one at the end would escape a comma.
    return _quoted(value) if re.search(r"\s|\\$", value) else value


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def list_value(name: str, value: str, is_sweep: bool) -> str:
    """Return a list of texts, or one name, in Hydra's grammar; lists that Hydra can read are returned unchanged."""
    inner = value.strip()
    is_list = inner.startswith("[") and inner.endswith("]")
    if name not in NAME_LISTS and (not is_list or is_sweep or _is_read(value)):
        return value
    if is_sweep or re.search(r"\$\{|[{}]|.\[|\].", inner):
        # A nested list, a reference to another key, or the values of a sweep.
        return value
    pieces = [piece.strip() for piece in split_at_commas(inner[1:-1] if is_list else inner)]
    return f"[{','.join(text_value(name, piece) for piece in pieces if piece)}]"


def split_at_commas(text: str) -> list[str]:
    """Split at the commas that are outside quotes."""
    pieces, start, position = [], 0, 0
    while position < len(text):
        at_start = not text[start:position].strip()
        if at_start and (quoted := QUOTED.match(text, position)):
            position = quoted.end()
            continue
        if text[position] == ",":
            pieces.append(text[start:position])
            start = position + 1
        position += 1
    return [*pieces, text[start:]]


def _is_read(value: str) -> bool:
    """Return whether Hydra can read `value` as a list of texts and nulls."""
    try:
        read = OverridesParser.create().parse_override(f"list={value}").value()
    except HydraException:
        return False
    return isinstance(read, list) and all(isinstance(item, str) for item in read)
